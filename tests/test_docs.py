"""Every command of README and docs is run, or listed here with the reason why not; every option exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfalign.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    {ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")}
    | set((ROOT / "benchmarks").glob("*.md"))
)
PROGRAMS = (
    "selfalign",
    "python",
    "make",
    "accelerate",
    "torchrun",
    "pip",
    "sudo",
    "eval",
    "mkdocs",
)
NOT_RUN = {
    r"make (demo|install|lint|test|test-all|docs)": "they make the environment; CI is made of them",
    r"pip install .*": "it changes the environment",
    r"sudo apt-get .*": "it changes the machine",
    r"eval .*": "the script is checked by bash in test_completion.py",
    r"accelerate launch .*": "it needs GPUs or machines; launchers run in training/test_processes.py",
    r"torchrun .*": "as accelerate launch",
    r"python tests/golden/check\.py .*": "golden/test_golden.py runs the same files",
    r"python benchmarks/.*": "they measure for minutes, alone on a machine; benchmark/ has their parts",
    r"python examples/.*": "test_examples.py runs every file",
    r"mkdocs .*": "`make docs` runs it",
}
"""Programs by pattern. Of `selfalign` every command is run up to where its work begins."""
PLACEHOLDERS = re.compile(r"…|\bRUN\b|\bSTUDY\b|[A-Z]+\||\w\|\w|\bOUT\b|\bFILE\b")
"""What stands for something else: a form, and no command."""
MISSING = re.compile(
    "does not exist|there is no such|no such|is not a run|holds no|cannot be fetched|needs the package"
    "|is neither|needed is a folder of diffusers"
)
"""What is said of files that are not here, once all options have been read."""


class WorkBeginsError(Exception):
    """Stands in for the work."""


def commands() -> Iterator[tuple[Path, str]]:
    """The commands in all blocks of code, lines put together and comments left out."""
    for document in DOCUMENTS:
        for language, code in re.findall(
            r"^```(\w*)\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE
        ):
            if language in ("", "bash", "sh"):
                for line in re.sub(r"\\\n\s*", " ", code).splitlines():
                    command = re.split(r"\s#", line)[0].strip()
                    if command.partition(" ")[0] in PROGRAMS:
                        yield document, " ".join(command.split())


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end where their work begins."""

    def begin(*_: object, **__: object) -> None:
        raise WorkBeginsError

    for place in (
        "runs.start.start_run",
        "runs.start.resume_run",
        "study.launch.launch",
        "study.reuse.take_over",
        "benchmark.limit.measure_limit",
        "benchmark.measure.time_step",
        "benchmark.sampling.time_sampling",
        "benchmark.cost.step_cost",
        "interop.imported.import_run",
        "data.latents.prepare.prepare",
    ):
        monkeypatch.setattr(f"selfalign.{place}", begin)
    monkeypatch.chdir(tmp_path)


def of_selfalign() -> list[str]:
    return sorted(
        {
            command
            for _, command in commands()
            if command.startswith("selfalign ") and not PLACEHOLDERS.search(command)
        }
    )


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize("command", of_selfalign())
def test_commands_take_their_options(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = shlex.split(command)[1:]
    assert words[0] in COMMANDS
    if "docs/results/digits" in words:
        words[words.index("docs/results/digits")] = str(ROOT / "docs" / "results" / "digits")
    if "mine.yaml" in words and "--config" in words:
        (tmp_path / "mine.yaml").write_text("recipe: sra-dts-as")
    try:
        code = main(words)
    except WorkBeginsError:
        return
    except SystemExit as end:
        if "--help" in words and end.code in (0, None):
            return
        raise
    said = capsys.readouterr().err
    assert code == 0 or MISSING.search(said), said


def test_all_others_are_listed_with_a_reason() -> None:
    unlisted = {
        command
        for _, command in commands()
        if not command.startswith("selfalign")
        and not any(re.fullmatch(pattern, command) for pattern in NOT_RUN)
    }
    assert not unlisted
    listed = [command for _, command in commands()]
    for pattern in NOT_RUN:
        if pattern.startswith(("mkdocs", "make")):
            continue
        assert any(re.fullmatch(pattern, command) for command in listed), (
            f"{pattern} is in no document"
        )
