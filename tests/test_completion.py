"""What shells are given to complete commands with."""

import subprocess
from pathlib import Path

import pytest

from selfalign.cli import main


def test_completes_commands_recipes_and_options_of_parts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "bash"])
    assert not ended.value.code
    script = capsys.readouterr().out
    for word in ("sra-dts-as", "--partitions.stripes.width", "--solvers.dopri5.rtol", "evaluate"):
        assert word in script
    assert "--solvers.kind" not in script
    (tmp_path / "selfalign.bash").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "selfalign.bash")], check=True)


@pytest.mark.parametrize("words", [[], ["fish"], ["bash", "zsh"]])
def test_other_shells_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *words]) == 2
    assert "allowed are bash, zsh, tcsh" in capsys.readouterr().err
