"""What TensorBoard and W&B get of a run, and bars where processes or notebooks show them."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from selfalign import RunConfig
from selfalign.cli import console
from selfalign.config import override
from selfalign.errors import UserError
from selfalign.runs.start import start_run
from selfalign.training import accelerator

BY_T = "heldout_ema_by_timestep/0.05"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, small_config: RunConfig) -> Path:
    """A run that both trackers follow, without a network."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    config = override(small_config, {"training.trackers": ("tensorboard", "wandb")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        start_run(config, folder, lambda state, values: None)
    return folder


def test_tensorboard_gets_settings_terms_pictures_and_curves_by_t(tracked: Path) -> None:
    events = EventAccumulator(str(tracked / "tensorboard" / "run"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "denoising_loss", "alignment_loss", "heldout_raw", BY_T} <= set(tags["scalars"])
    assert tags["images"] == ["samples", "curves"]
    (text,) = events.Tensors("config/text_summary")
    assert b"views.mask_ratios: 0.25 0.75" in text.tensor_proto.string_val[0]
    assert events.Images("samples")[0].width > 100


def test_wandb_gets_the_same_offline(tracked: Path) -> None:
    (place,) = (tracked / "wandb").glob("offline-run-*")
    pictures = {path.name.partition("_")[0] for path in (place / "files" / "media").rglob("*.png")}
    assert pictures == {"samples", "curves"}
    (log,) = place.glob("*.wandb")
    content = log.read_bytes()
    for word in (b"views.mask_ratios", b"alignment_loss", BY_T.encode()):
        assert word in content


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    small_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(small_config, {"training.trackers": ("wandb",)})
    monkeypatch.setattr(accelerator, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(
        UserError, match=r"^training.trackers wandb needs the package wandb: pip install"
    ):
        start_run(config, tmp_path / "run", lambda state, values: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_of_a_launchers_processes_draws_a_bar(rank: str) -> None:
    """As under torchrun, which hands its terminal on."""
    code = "from selfalign.cli.console import shows_bars; print(shows_bars())"
    master, terminal = pty.openpty()
    environment = {**os.environ, "RANK": rank, "LOCAL_RANK": "0", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stdout=terminal, env=environment, check=True)
    assert os.read(master, 100).decode().strip() == str(rank == "0")
    os.close(master)
    os.close(terminal)


def test_notebooks_get_a_bar_where_they_can_redraw_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(console.console, "is_jupyter", True)
    for found in (None, object()):
        monkeypatch.setattr(console, "find_spec", lambda name, found=found: found)
        assert console.shows_bars() == (found is not None)
        assert console.make_bar("sampling").disable == (found is None)
