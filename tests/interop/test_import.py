"""`selfalign import` and `--init`: released weights become runs, and runs start from weights."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_weights import HEADS, network, projectors
from torch import Tensor

from selfalign import SiT, UserError
from selfalign.backbones.sit.sizes import Size
from selfalign.cli import main
from selfalign.hub import fetch_weights
from selfalign.interop import imported
from selfalign.interop.card import card_facts
from selfalign.interop.imported import import_run
from selfalign.interop.released import build_sit
from selfalign.runs.load import load_run
from selfalign.training.starting import fit_weights

DIGITS = {"channels": 1, "image_size": (8, 8), "num_classes": 10}
QUICK = [
    *("--data.name", "digits", "--training.steps", "2", "--training.batch-size", "8"),
    *("--training.log-every", "1", "--training.heldout-samples", "10", "--training.trackers"),
]
SAMPLING = ["--num", "4", "--steps", "3", "--batch-size", "4"]


def save(path: Path, average: torch.nn.Module, **more: Any) -> Path:
    torch.save({"ema": average.state_dict(), **more}, path)
    return path


def run_command(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize(
    ("project", "changes", "name"),
    [
        ("sit", {"out_channels": 2}, "sit"),
        ("sra", {"projection_head": True}, "sra"),
        ("sra-dts-as", {"projection_head": True}, "sra-dts-as"),
        ("sra-dts-as", {}, "sra-dts-as"),
        ("self-flow", {"projection_head": True}, "self-flow"),
    ],
)
def test_a_release_becomes_a_run(
    tmp_path: Path,
    project: str,
    changes: dict[str, Any],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs = network(**DIGITS, **changes)
    weights = {f"module.{key}": value for key, value in theirs.state_dict().items()}
    if project == "self-flow":
        weights = {key.replace("ap_head", "projector"): v for key, v in weights.items()}
        embedder = "module.x_embedder.proj.weight"
        weights[embedder] = weights[embedder].flatten(1)
    torch.save({"ema": weights}, tmp_path / "w.pt")
    words = [tmp_path / "w.pt", tmp_path / "run", "--from", project, "--heads", HEADS]
    words += ["--channels", 1, "--data.name", "digits"]
    assert run_command("import", *words) == 0
    said = capsys.readouterr().out
    assert ("ap_head begins anew" in said) == (project == "sra-dts-as" and not changes)
    run = load_run(tmp_path / "run")
    assert run.class_names == tuple("0123456789") and run.step == 0
    assert json.loads((tmp_path / "run" / "imported.json").read_text())["from"] == project
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([1, 9])
    plain = {key.removeprefix("module."): value for key, value in weights.items()}
    loader = "sra" if project == "sra-dts-as" else project
    expected = build_sit(plain, loader, heads=HEADS, channels=1).velocity(x, t, labels)  # type: ignore[arg-type]
    torch.testing.assert_close(run.model.velocity(x, t, labels), expected)
    assert (run.config.used_targets().keys() == {"ema"}) == (name != "sit")


def test_an_imported_run_is_sampled_evaluated_and_gone_on_with(tmp_path: Path) -> None:
    file, run = save(tmp_path / "w.pt", network(**DIGITS)), tmp_path / "run"
    words = ["--from", "sra", "--heads", HEADS, "--data.name", "digits"]
    assert run_command("import", file, run, *words) == 0
    assert run_command("sample", run, "--out", tmp_path / "samples", *SAMPLING) == 0
    assert np.load(tmp_path / "samples" / "samples.npz")["arr_0"].shape == (4, 8, 8, 1)
    words = ["--num", "20", "--metrics", "denoising", "--steps", "2"]
    assert run_command("evaluate", run, *words) == 0
    assert run_command("train", "--resume", run, "--training.steps", 1) == 0


def test_without_images_weights_are_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = save(tmp_path / "w.pt", network(**DIGITS)), tmp_path / "run"
    assert run_command("import", file, run, "--from", "sit", "--heads", HEADS) == 0
    assert run_command("sample", run, "--out", tmp_path / "samples", *SAMPLING) == 0
    out = ["--init", run, "--out", tmp_path / "other", "--data.name", "none"]
    capsys.readouterr()
    assert run_command("train", "sit", *out) == 2
    assert "imported without images" in capsys.readouterr().err
    assert run_command("evaluate", run) == 2
    assert "--reference is left out" in capsys.readouterr().err
    assert run_command("inspect", run) == 2
    assert "--data.name names a data set" in capsys.readouterr().err
    assert run_command("inspect", run, "--only", "views", "--data.name", "digits") == 0


def test_latents_without_a_decoder_are_no_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = save(tmp_path / "w.pt", network(channels=4)), tmp_path / "run"
    assert run_command("import", file, run, "--from", "sit", "--heads", HEADS) == 0
    assert load_run(run).config.data.source.vae == "ema"
    import_run(str(file), tmp_path / "pixels", "sit", heads=HEADS, vae="")
    capsys.readouterr()
    assert run_command("sample", tmp_path / "pixels", "--out", tmp_path / "s", *SAMPLING) == 2
    assert "samples have 4 channels and are no images" in capsys.readouterr().err


def test_repa_keeps_its_projector(tmp_path: Path) -> None:
    weights = network().state_dict() | projectors().state_dict(prefix="projectors.")
    torch.save({"ema": weights}, tmp_path / "w.pt")
    run = import_run(str(tmp_path / "w.pt"), tmp_path / "run", heads=HEADS)
    assert run.recipe == "repa" and run.told == ()
    found = dict(load_run(tmp_path / "run").model.state_dict())
    assert torch.equal(found["projectors.0.4.weight"], weights["projectors.0.4.weight"])
    weights |= projectors((16, 8)).state_dict(prefix="projectors.")
    torch.save({"ema": weights}, tmp_path / "w.pt")
    run = import_run(str(tmp_path / "w.pt"), tmp_path / "two", heads=HEADS)
    assert run.recipe == "sit" and run.told == ("projectors is left out",)


def test_average_and_trained_weights_are_both_kept(tmp_path: Path) -> None:
    ema, raw = network(seed=0), network(seed=1)
    file = save(tmp_path / "w.pt", ema, model=raw.state_dict())
    import_run(str(file), tmp_path / "run", "sra", heads=HEADS)
    for weights, model in (("ema", ema), ("raw", raw)):
        own = load_run(tmp_path / "run", weights).model.state_dict()
        assert torch.equal(
            own["blocks.0.mlp.fc1.bias"], model.state_dict()["blocks.0.mlp.fc1.bias"]
        )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "layout of sit and repa and sra and dit, which mean different things by it: --from"),
        (["--from", "self-flow"], "not of self-flow"),
        (["--from", "sit"], "pass heads"),
        (
            ["--from", "sit", "--heads", "2", "--data.name", "digits"],
            "model.channels is 3: the data",
        ),
        (["--from", "vae"], "invalid choice"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path / "w.pt", network())
    assert run_command("import", file, tmp_path / "run", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_file_of_an_unknown_project_is_recognised(tmp_path: Path) -> None:
    weights = {name: value.contiguous() for name, value in network().state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors", {"from": "../x"})
    command = ("import", tmp_path / "w.safetensors", tmp_path / "run", "--heads", "2")
    assert run_command(*command) == 2
    assert run_command(*command, "--from", "sra") == 0


def test_empty_tensors_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = {name: value[:0].contiguous() for name, value in network().state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    assert run_command("import", tmp_path / "w.safetensors", tmp_path / "run") == 2
    assert "is empty" in capsys.readouterr().err


def test_an_import_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(tmp_path / "w.pt", network())
    monkeypatch.setattr(imported, "write_record", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    command = ("import", file, tmp_path / "runs" / "run", "--from", "sra", "--heads", "2")
    assert run_command(*command) == 128 + signal.SIGTERM
    assert "nothing was written; the same command" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_starts_from_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path / "w.pt", network(**DIGITS, projection_head=True))
    import_run(str(file), tmp_path / "run", heads=HEADS, licence="CC-BY-NC-4.0")
    monkeypatch.setattr("selfalign.interop.released.SIZES", {"named": Size(24, 2, HEADS)})
    for start in (file, tmp_path / "run"):
        out = tmp_path / f"of {start.name}"
        words = ["--init", start, "--out", out, "--model.size", "24x2x2/2", *QUICK]
        assert run_command("train", "sra", *words, "--training.learning-rate", "0") == 0
        own = load_run(out, "raw").model.state_dict()
        first = load_run(tmp_path / "run").model.state_dict()
        assert all(torch.equal(own[name], first[name]) for name in first)
        facts = card_facts(load_run(out))
        assert facts["start"] == start.name and facts["steps"].startswith("2 of batch 8")
        # The licence of weights goes with them.
        assert facts["licence"] == ("" if start == file else "CC-BY-NC-4.0")


def fitted(theirs: SiT, ours: SiT) -> tuple[SiT, list[str]]:
    tensors, told = fit_weights(theirs.state_dict(), ours)
    ours.load_state_dict(tensors)
    return ours, told


X, T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.1, 0.6])


def without_label(model: SiT, x: Tensor = X) -> Tensor:
    return model.velocity(x, T, torch.full((2,), model.null_label))


@pytest.mark.parametrize("classes", [3, 9, 0])
def test_other_classes_begin_as_no_label(classes: int) -> None:
    theirs = network()
    ours, (told,) = fitted(theirs, network(seed=1, num_classes=classes))
    assert told.startswith("5 classes")
    torch.testing.assert_close(without_label(ours), without_label(theirs))
    if classes:
        torch.testing.assert_close(ours.velocity(X, T, torch.tensor([0, 1])), without_label(theirs))


def test_classes_come_to_weights_without() -> None:
    theirs = network(num_classes=0)
    ours, (told,) = fitted(theirs, network(seed=1))
    assert told == "weights without classes get 5: each starts as no label"
    torch.testing.assert_close(without_label(ours), without_label(theirs))


def test_positions_of_another_size_are_interpolated() -> None:
    theirs = network()
    ours, (told,) = fitted(theirs, network(seed=1, image_size=(16, 16)))
    assert told == "positions of 4×4 tokens are interpolated to 8×8"
    grid = ours.pos_embed.unflatten(1, (8, 8))
    coarse = torch.nn.functional.avg_pool2d(grid[0].permute(2, 0, 1), 2).flatten(1).T
    assert (coarse - theirs.pos_embed[0]).abs().mean() < 0.1
    same, told_nothing = fitted(theirs, network(seed=1))
    assert told_nothing == [] and torch.equal(without_label(same), without_label(theirs))


def test_other_channels_and_patches_get_new_borders() -> None:
    for changes in ({"channels": 4}, {"patch_size": 4, "image_size": (16, 16)}):
        theirs, fresh = network(), network(seed=1, **changes)
        before = fresh.x_embedder.proj.weight.clone()
        ours, told = fitted(theirs, fresh)
        assert told == ["x_embedder begins anew", "final_layer begins anew"]
        assert torch.equal(ours.x_embedder.proj.weight, before)
        assert torch.equal(ours.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)


@pytest.mark.parametrize("changes", [{"depth": 3}, {"depth": 1}, {"hidden_size": 32}])
def test_another_transformer_is_refused(changes: dict[str, Any]) -> None:
    theirs = "the weights are of another transformer, 2 blocks of width 24, and the model has "
    with pytest.raises(UserError, match=theirs + r"\d blocks of width \d+ \(model.size\): "):
        fit_weights(network().state_dict(), network(seed=1, **changes))


def test_heads_come_and_go() -> None:
    _, told = fitted(network(projection_head=True), network(seed=1))
    assert told == ["ap_head is left out"]
    _, told = fitted(network(), network(seed=1, projection_head=True))
    assert told == ["ap_head begins anew"]


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path / "w.pt", network())
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str, local_files_only: bool) -> str:
        asked.append((repository, name))
        return str(file)

    files = ["README.md", "w.pt"]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda repository: files)
    run = import_run("hub:owner/name", tmp_path / "run", "sra", heads=HEADS, licence="MIT")
    assert asked == [("owner/name", "w.pt")] and run.recipe == "sra"
    origin = json.loads((tmp_path / "run" / "imported.json").read_text())
    assert origin["file"] == "hub:owner/name" and origin["licence"] == "MIT"
    assert fetch_weights("hub:owner/name:other.pt") == file and asked[-1][1] == "other.pt"
    files.append("more.safetensors")
    with pytest.raises(UserError, match=r"holds more.safetensors, w.pt: say which"):
        fetch_weights("hub:owner/name")
    with pytest.raises(UserError, match="allowed is hub:OWNER/NAME"):
        fetch_weights("hub:owner")
    monkeypatch.undo()
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch_weights("hub:owner/name:w.pt")
