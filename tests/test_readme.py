"""What the README promises."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import selfalign
from selfalign import EMA, Objective, RunConfig, SiT, build_student, draw_views, make_generator
from selfalign.cli import main
from selfalign.evaluation import classifier

README = Path(__file__).parents[1] / "README.md"


def test_the_example_trains() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    config, student, ema = names["config"], names["student"], names["ema"]
    assert isinstance(config, RunConfig)
    assert isinstance(student, SiT)
    assert isinstance(ema, EMA)
    # The output starts as zero, and its average follows it.
    weights, averages = (model.final_layer.linear.weight for model in (student, ema.model))
    assert weights.abs().max() > averages.abs().max() > 0
    images, labels = names["images"], names["labels"]
    assert isinstance(images, torch.Tensor)
    draw = draw_views(config, images.shape, make_generator(0, "views", 0))
    trained = Objective(config)(student, ema.model, images, labels, draw).means()["denoising"]
    untrained = Objective(config)(build_student(config), ema.model, images, labels, draw).means()
    assert trained < untrained["denoising"]


@pytest.fixture
def _a_run_of_mine(small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(small_run, tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_a_run_of_mine")
def test_what_it_says_of_python_works() -> None:
    (code,) = re.findall(r"`(selfalign\.sample\(.*?\))`", README.read_text())
    images, labels = eval(code, {"selfalign": selfalign})
    assert images.shape[0] == labels.shape[0] == 16


@pytest.mark.usefixtures("_a_run_of_mine")
@pytest.mark.parametrize("name", ["finetuning", "checkpoints"])
def test_what_guides_say_of_python_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks that begin with a run of one's own, in small, and up to what needs the hub."""
    monkeypatch.setattr(classifier, "STEPS", 3)
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "cache"))
    text = (README.parent / "docs" / f"{name}.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = (block for block in blocks if 'load_run("runs/mine")' in block)
    small = code.replace("steps=50", "steps=2").replace("num=1000", "num=20, steps=2")
    here = [line for line in small.splitlines() if "me/mine" not in line]
    names: dict[str, object] = {}
    exec("\n".join(here), names)
    assert isinstance(names["run"], selfalign.LoadedRun)
    assert name == "finetuning" or (tmp_path / "folder" / "README.md").exists()


@pytest.mark.usefixtures("forget_parts")
def test_the_term_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = README.read_text()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[1]
    command = next(line for line in text.splitlines() if "--plugins small_velocity.py" in line)
    monkeypatch.chdir(tmp_path)
    Path("small_velocity.py").write_text(code)
    small = "--model.size tiny/4 --training.steps 2 --training.batch-size 4 --training.trackers"
    more = "--training.log-every 1 --training.heldout-samples 10"
    assert main([*command.split()[1:], *small.split(), *more.split()]) == 0
    assert "small-velocity_loss" in Path("runs/idea/metrics.jsonl").read_text()


def test_its_links_lead_somewhere() -> None:
    for document in (README, *(README.parent / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
