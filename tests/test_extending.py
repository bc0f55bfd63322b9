"""The examples of docs/extending.md, run as a user's files from outside the package."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from selfalign import parts
from selfalign.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
EXAMPLES = {
    match[1].split()[-1]: match[2]
    for match in re.finditer(r"^## ([^\n]+)\n.*?```python\n(.*?)```", PAGE, re.M | re.S)
}
LONGEST = 30

TRAINING = {
    "partition": "--views.partition diagonal --partitions.diagonal.width 2",
    "schedule": "--views.timesteps nearby --schedules.nearby.distance 0.3",
    "curriculum": "--views.curriculum halves-first --curriculums.halves-first.steps 2",
    "target": "--terms.alignment.target random-projection",
    "projector": "--terms.alignment.projector linear",
    "encoder": "--terms.alignment.target frozen-encoder --targets.frozen-encoder.encoders edges:7@16",
    "term": "--objective.terms small-velocity --terms.small-velocity.decay linear",
    "backbone": "--model.backbone mlp --backbones.mlp.width 48 --targets.ema.block 1",
    "optimizer": "--training.optimizer sgd --optimizers.sgd.momentum 0.95",
    "source": "--data.name discs --data.sources.discs.count 128",
    "solver": "",
}
"""The options that choose each example, as the page names them."""


pytestmark = pytest.mark.usefixtures("forget_parts")


def selfalign(*words: str) -> tuple[int, str]:
    """A command's exit code and what it said to stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        return main(words), said.getvalue()


def train(folder: Path, plugin: Path, options: str) -> tuple[int, str]:
    small = (
        "--model.size tiny/4 --training.steps 3 --training.batch-size 4 --training.log-every 1 "
        "--training.heldout-samples 10 --training.trackers --training.checkpoint-every 2 "
        "--training.keep-checkpoints 5"
    )
    words = ["train", "sra-dts-as", "--plugins", str(plugin), "--out", str(folder)]
    return selfalign(*words, *small.split(), *options.split())


@pytest.mark.parametrize("name", EXAMPLES)
def test_is_short(name: str) -> None:
    assert len([line for line in EXAMPLES[name].splitlines() if line.strip()]) <= LONGEST


def test_there_is_an_example_of_each_kind() -> None:
    assert set(EXAMPLES) == set(TRAINING)


@pytest.mark.parametrize("name", EXAMPLES)
def test_trains_resumes_and_samples(name: str, tmp_path: Path) -> None:
    plugin = tmp_path / "elsewhere" / f"{name}.py"
    plugin.parent.mkdir()
    plugin.write_text(EXAMPLES[name])
    options, run = TRAINING[name], tmp_path / "run"
    if name == "optimizer":
        options += " --training.learning-rate 0.01"
    assert train(run, plugin, options) == (0, "")

    record = json.loads((run / "config.json").read_text())["config"]
    assert record["plugins"] == [str(plugin.resolve())]
    for option, value in re.findall(r"--(\S+) (\S+)", TRAINING[name]):
        held = record
        for key in option.replace("small-velocity", "small_velocity").split("."):
            key = {"small_velocity": "small-velocity"}.get(key, key)
            held = held[key]
        assert str(held if not isinstance(held, list) else held[0]) == value

    whole = (run / "metrics.jsonl").read_text()
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    parts._plugins.clear()
    assert selfalign("train", "--resume", str(run)) == (0, "")  # the run names the file

    def losses(text: str) -> list[float]:
        lines = map(json.loads, text.splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    assert losses((run / "metrics.jsonl").read_text()) == losses(whole)
    if name == "term":
        assert "small-velocity_loss" in whole
    if name == "solver":
        words = ["--plugins", str(plugin), "--solver", "midpoint", "--num", "4", "--steps", "3"]
        sampled = selfalign("sample", str(run), "--out", str(tmp_path / "samples"), *words)
        assert sampled == (0, "")


def test_help_lists_the_settings_of_a_users_part(tmp_path: Path) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(EXAMPLES["partition"])
    command = [
        sys.executable,
        "-m",
        "selfalign",
        "train",
        "sit",
        "--plugins",
        str(plugin),
        "--help",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--partitions.diagonal.width INT" in said
    assert "Diagonals of a band." in said
    assert "diagonal" in said.split("--views.partition ")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--plugins {mine} --partitions.diagonal.width 0", "partitions.diagonal.width"),
        ("--plugins {mine} --partitions.diagonal.width a", "--partitions.diagonal.width"),
        ("--plugins {mine} --partitions.diagonal.width 2", "diagonal is not chosen"),
        ("--plugins {missing}", "there is no such file"),
        ("--plugins {broken}", "broken.py:2 fails: ZeroDivisionError"),
        ("--plugins", "--plugins names no file"),
    ],
)
def test_what_is_wrong_is_one_line(words: str, message: str, tmp_path: Path) -> None:
    mine, broken = tmp_path / "mine.py", tmp_path / "broken.py"
    mine.write_text(EXAMPLES["partition"])
    broken.write_text("x = 1\ny = x / 0\n")
    given = words.format(mine=mine, broken=broken, missing=tmp_path / "missing.py").split()
    if "width 0" in words:
        given += ["--views.partition", "diagonal"]
    code, said = selfalign("train", "sra-dts", "--out", str(tmp_path / "run"), *given)
    assert code == 2
    assert said.startswith("selfalign: error: ") and said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "run").exists()
