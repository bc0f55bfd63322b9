"""`train --config`, `--write-config` and `selfalign diff`: settings as files."""

import json
from pathlib import Path

import pytest

from selfalign import RECIPES, UserError, recipe
from selfalign.cli import main
from selfalign.config import config_to_dict, override
from selfalign.config_file import read_config, write_config_file
from selfalign.recipes import nearest_recipe

CHANGES = {
    "training.learning_rate": 3e-5,
    "views.mask_ratios": (0.3, 0.7),
    "training.trackers": (),
    "model.num_classes": 7,
    "data.name": "folder",
    "data.root": "no",
    "terms.dispersive.weight": 0.25,
    "objective.terms": ("dispersive",),
}


@pytest.mark.parametrize("ending", [".yaml", ".json"])
@pytest.mark.parametrize("name", ["sit", "sra-dts-as", "haste-dts-as", "imagenet256-xl2"])
def test_what_is_written_reads_as_the_same_tree(tmp_path: Path, name: str, ending: str) -> None:
    config = override(recipe(name), CHANGES if name == "sra-dts-as" else {"seed": 3})
    write_config_file(tmp_path / f"c{ending}", config)
    again = read_config(tmp_path / f"c{ending}")
    assert config_to_dict(again) == config_to_dict(config)
    assert (
        f"recipe{'' if ending == '.yaml' else chr(34)}: " in (tmp_path / f"c{ending}").read_text()
    )


def test_the_nearest_recipe_is_the_recipe_itself() -> None:
    for name in RECIPES:
        found = nearest_recipe(recipe(name))
        assert recipe(found) == recipe(name)
    assert nearest_recipe(recipe("sra-dts-as", {"seed": 5})) == "sra-dts-as"


def test_a_run_is_trained_from_a_file(
    tmp_path: Path, small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    words = ["--model.size", "tiny/4", "--training.steps", "2", "--training.batch-size", "4"]
    words += ["--training.heldout-samples", "10", "--training.trackers"]
    assert main(["train", "sra", *words, "--write-config", str(file)]) == 0
    assert not Path("out").exists()
    assert "--config" in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["train", "--config", str(file), "--out", str(out), "--seed", "4"]) == 0
    config = json.loads((out / "config.json").read_text())["config"]
    assert (config["seed"], config["model"]["size"]) == (4, "tiny/4")
    capsys.readouterr()
    assert main(["diff", str(out), str(small_run)]) == 0
    said = capsys.readouterr().out
    assert "terms.alignment.target" not in said
    for line in ("views.attention", "model.size", "seed"):
        assert line in said
    assert main(["diff", str(out), str(out)]) == 0
    assert "have the same settings" in capsys.readouterr().out
    # A run's own file describes it as it is.
    again = read_config(small_run / "config.json")
    written = json.loads((small_run / "config.json").read_text())["config"]
    assert json.loads(json.dumps(config_to_dict(again))) == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {steps: many}", "training.steps is 'many': allowed are a whole number"),
        ("trainig: {steps: 3}", "config field is 'trainig': no such field"),
        ("recipe: srra", "recipe is 'srra': allowed are sit"),
        ("recipe: sra\ntraining: {stepps: 3}", "config field is 'training.stepps': no such field"),
        ("- 1", "is not a config: needed are keys and values"),
        ("a: [", "is not a config: ParserError"),
        ("a: 1\na: 2", "stands twice"),
        ("recipe: sra\nplugins: [x.py]", "plugins is 'x.py': there is no such file"),
    ],
)
def test_what_a_file_gets_wrong_is_one_line(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    words = ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "out")]
    assert main(["train", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and "c.yaml" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_options_of_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("recipe: sra")
    file = str(tmp_path / "c.yaml")
    for words, message in (
        (["train", "--config"], "--config names no file"),
        (["train", "--config", "c.toml"], "allowed are files that end in .yaml, .yml, .json"),
        (["train", "--config", "none.yaml"], "does not exist"),
        (["train", "sra", "--config", file], "'sra' stands beside it"),
        (["train", "sra", "--write-config", "c.txt"], "--write-config is 'c.txt'"),
        (["train", "--config", file], "out"),
        (["diff", str(tmp_path), file], "is not a run: it holds no config.json"),
        (["diff", file], "--help"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="allowed are names that end in"):
        write_config_file(tmp_path / "x", recipe("sit"))
