"""The command line as a person meets it: help, lists, and one-line errors."""

import dataclasses
from dataclasses import fields
from pathlib import Path

import pytest

from selfalign import RECIPES, RunConfig
from selfalign.cli import main
from selfalign.parts import PartSettings
from selfalign.settings import Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "command is 'frobnicate': allowed are train, sample"),
        (["train", "nope", "--out", "x"], "recipe is 'nope': allowed are sit, sra"),
        (["train", "sit"], "--out"),
        (["train", "sit", "--out", "x", "--model.size", "S/3"], "model.size is 'S/3': allowed"),
        (["train", "sit", "--out", "x", "--training.steps", "many"], "--training.steps"),
        (["train", "sit", "--out", "x", "--nope", "3"], "Unrecognized options: --nope"),
        (["train", "sit", "--out", "x", "--flow.path", "curved"], "--flow.path"),
        (["train", "sit", "--out", "x", "--training.learning-rate", "nan"], "learning_rate is nan"),
        (["train", "--resume", "nowhere"], "'nowhere' is not a run"),
        (["train", "--resume", "nowhere", "--training.batch-size", "3"], "Unrecognized options"),
        (["sample", "nowhere", "--out", "x"], "'nowhere' is not a run"),
        (["sample", "nowhere", "--out", "x", "--solver", "magic"], "--solver"),
        (["recipes", "please"], "takes no arguments"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("selfalign: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    assert list(tmp_path.iterdir()) == []


def test_a_used_folder_is_refused(small_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "sit", "--out", str(small_run)]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_help_lists_every_field_with_default_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", "sra-dts-as", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for section in dataclasses.fields(RunConfig):
        value = getattr(RunConfig(), section.name)
        if isinstance(value, PartSettings):
            settings = [f"{part.section}.{f.name}" for part in value.values() for f in fields(part)]
        elif isinstance(value, Settings):
            settings = [f"{section.name}.{f.name}" for f in fields(value) if f.name != "sources"]
        else:
            settings = [section.name]
        for name in settings:
            assert f"--{name.replace('_', '-')}" in shown
    assert "(default: independent)" in " ".join(shown.replace("│", " ").split())
    assert "Optimizer steps in all." in shown


def test_recipes_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train"], ["train", "--help"]])
def test_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "usage: selfalign" in capsys.readouterr().out


def test_training_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "--data.name digits --model.size tiny --training.steps 1 --training.batch-size 2"
    assert main(["train", "sit", "--out", str(tmp_path / "run"), *tiny.split()]) == 0
    assert " to train on, " in capsys.readouterr().out
