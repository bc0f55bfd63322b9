"""The guides for those who come from elsewhere and for fine-tuning: options exist, commands run."""

import re
import shlex
from pathlib import Path

import pytest

from selfalign.cli import main

ROOT = Path(__file__).parents[1]


def test_the_options_that_others_come_to_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "bash"])
    known = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)) | {"--init", "--config"}
    page = (ROOT / "docs" / "coming_from.md").read_text()
    right = [row.split("|")[2] for row in page.splitlines() if row.count("|") == 3]
    options = set(re.findall(r"--[a-z][\w.-]*", " ".join(right)))
    assert len(options) > 40
    assert not {option for option in options if option not in known and option != "--resume"}


def test_the_guide_of_fine_tuning_is_run(
    tmp_path: Path, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands one after the other, on a small model."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(small_run)
    small = "--model.size tiny/4 --training.batch-size 4 --training.trackers --data.name digits"
    smaller = f"{small} --training.heldout-samples 10"
    for command in (
        f"selfalign train sra-dts-as {smaller} --write-config mine.yaml",
        "selfalign train --config mine.yaml --out runs/next --training.steps 1",
        "selfalign train --config runs/next/config.json --out runs/again --training.steps 2",
        "selfalign diff runs/next runs/again",
        f"selfalign train sit --init runs/next --out runs/more {smaller} --training.steps 1",
        "selfalign sample runs/mine --out samples --num 2 --steps 2 --png --trajectory gif",
        "selfalign export runs/mine exported --format diffusers",
    ):
        assert main(shlex.split(command)[1:]) == 0, command
