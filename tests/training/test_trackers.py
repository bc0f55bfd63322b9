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
from selfalign.runs.start import start_run

BY_T = "heldout_ema_by_timestep/0.05"


def test_tensorboard_gets_settings_terms_pictures_and_curves_by_t(
    small_config: RunConfig, tmp_path: Path
) -> None:
    config = override(small_config, {"training.trackers": ("tensorboard",)})
    start_run(config, tmp_path / "run", lambda state, values: None)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "run"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "denoising_loss", "alignment_loss", "heldout_raw", BY_T} <= set(tags["scalars"])
    assert tags["images"] == ["samples", "curves"]
    (text,) = events.Tensors("config/text_summary")
    assert b"views.mask_ratios: 0.25 0.75" in text.tensor_proto.string_val[0]
    assert events.Images("samples")[0].width > 100


@pytest.mark.slow
def test_wandb_gets_the_same_offline(
    small_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = override(small_config, {"training.trackers": ("wandb",)})
    start_run(config, tmp_path / "run", lambda state, values: None)
    (place,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    pictures = {path.name.partition("_")[0] for path in (place / "files" / "media").rglob("*.png")}
    assert pictures == {"samples", "curves"}
    (log,) = place.glob("*.wandb")
    content = log.read_bytes()
    for word in (b"views.mask_ratios", b"alignment_loss", BY_T.encode()):
        assert word in content


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
