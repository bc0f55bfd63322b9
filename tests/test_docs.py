"""Commands of README and docs: those that can be made small do their work here, in the order of their
document; of all others it says why not, and they are run up to where the work begins."""

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_images import make_images
from small_weights import HEADS, network

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

_SHORT = (
    "--training.steps 1 --training.batch-size 4 --training.heldout-samples 4 --training.trackers"
)
_FEW = "--num 2 --steps 2"
DONE = {
    r"selfalign recipes": "",
    r"selfalign study power .*": "",
    r"selfalign train sra-dts-as --help": "",
    r"selfalign train .* --data.name folder .*": f"{_SHORT} --data.image-size 8 --model.size 24x2x2/4",
    r"selfalign train --resume runs/mine.*": "--training.steps 7",
    r"selfalign train .* --write-config mine.yaml": "",
    r"selfalign train --config .*": f"{_SHORT} --data.name digits --model.size 24x2x2/4",
    r"selfalign train .* --out runs/healthy .*": f"{_SHORT} --model.size 24x2x2/4",
    r"selfalign train .* --training.ema-decay 0.999 0.99 0.9": f"{_SHORT} --model.size 24x2x2/4",
    r"selfalign train repa .*": f"{_SHORT} --model.size 24x2x2/8",
    r"selfalign sample runs/(mine|dit-xl) .*": _FEW,
    r"selfalign evaluate runs/digits( --num \d+)?( --weights .*)?": "--num 4 --steps 2 --metrics denoising",
    r"selfalign inspect runs/\S+( --beside .*)?": "--only views batch",
    r"selfalign report .*": "",
    r"selfalign diff .*": "",
    r"selfalign export .*": "",
    r"selfalign import \S+XL-2-256x256.pt .*": f"--heads {HEADS}",
    r"selfalign prepare my_images data .*": "",
}
"""Commands that are carried out, and the words that make each small, put after its own."""
NOT_DONE = {
    r"selfalign train .* --plugins small_velocity\.py .*": "test_readme.py runs it",
    r"selfalign train .* --plugins my_part\.py .*": "test_extending.py runs that page's",
    r"selfalign train .* --init runs/sit-xl .*": "XL/2; interop/test_import.py has a small one",
    r"selfalign train .* --init lora/.*": "test_examples.py runs it",
    r"selfalign train .* --data.name arrays .*": "sets to be fetched; test_signals.py has small ones",
    r"selfalign sample runs/emoji .*": "it reads texts; conditions/test_text.py has a small one",
    r"selfalign train .* --backbone diffusers:.*": "backbones/test_diffusers.py has small ones",
    r"selfalign train .* --data.name fashion-mnist .*": "its files are a package of Debian",
    r"selfalign train imagenet.*": "ImageNet, and days on GPUs; test_recipes.py builds the recipes",
    r"selfalign prepare (--verify|imagenet).*": "ImageNet; data/test_prepare.py has a small folder",
    r"selfalign prepare my_images latents --vae ema": "its weights; data/test_prepare.py has a small one",
    r"selfalign evaluate runs/mine .*": "Inception's weights; evaluation/ has networks of its own",
    r"selfalign evaluate runs/digits .* --solver sde .*": "thousands of samples; evaluation/ measures dozens",
    r"selfalign evaluate samples\.npz .*": "networks to be fetched or trained; evaluation/ has them",
    r"selfalign inspect runs/digits --only probes attention": "it takes long; inspect/ runs each",
    r"selfalign inspect SiT-XL.*": "latents of ImageNet; inspect/ takes small released files",
    r"selfalign bench .*": "it measures for minutes, alone on a machine; benchmark/ has its parts",
    r"selfalign study (?!power).*": "minutes to days; study/ runs small ones whole",
    r"make (demo|install|lint|test|test-all|docs)": "they make the environment; CI is made of them",
    r"pip install .*": "it changes the environment",
    r"sudo apt-get .*": "it changes the machine",
    r"eval .*": "the script is checked by bash in test_completion.py",
    r"accelerate launch .*": "GPUs or machines; test_launchers.py starts two processes",
    r"torchrun .*": "as accelerate launch",
    r"python tests/golden/check\.py .*": "golden/test_golden.py checks the same files",
    r"python benchmarks/.*": "they measure for minutes, alone on a machine; benchmark/ has their parts",
    r"python examples/.*": "test_examples.py runs every file",
}
"""Commands that are not carried out here, and why."""
FORM = re.compile(r"…|\bRUN\b|\bSTUDY\b|[A-Z]+\||\w\|\w|\bOUT\b|\bFILE\b")
"""What stands for something else: a form of commands, and no command."""
NOT_HERE = re.compile(
    "does not exist|there is no such|no such|is not a run|holds no|cannot be fetched|needs the package"
    "|is neither|needed is a folder of diffusers|could not be downloaded"
)
"""What is said of files that are not here, once all options have been read."""


class WorkBeginsError(Exception):
    """Stands in for the work."""


def commands_of(document: Path) -> Iterator[str]:
    """The commands in the blocks of code, lines put together and comments left out."""
    for language, code in re.findall(
        r"^```(\w*)\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE
    ):
        if language in ("", "bash", "sh"):
            for line in re.sub(r"\\\n\s*", " ", code).splitlines():
                command = " ".join(re.split(r"\s#", line)[0].split())
                if command.partition(" ")[0] in PROGRAMS and not FORM.search(command):
                    yield command


COMMANDS_OF = {document: list(commands_of(document)) for document in DOCUMENTS}


def listed(command: str, patterns: dict[str, str]) -> str | None:
    """What a table has for a command; None for nothing."""
    return next((words for p, words in patterns.items() if re.fullmatch(p, command)), None)


def done(document: Path) -> list[str]:
    return [c for c in COMMANDS_OF[document] if listed(c, DONE) is not None]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a reader has: images, and files of released weights."""
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "my_images", 6, side=32)
    for name, sigma in (("SiT", 1), ("DiT", 2)):
        model = network(channels=1, out_channels=sigma, num_classes=10)
        torch.save({"ema": model.state_dict()}, tmp_path / f"{name}-XL-2-256x256.pt")
    return tmp_path


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if done(d)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_commands_do_their_work(document: Path, place: Path, small_run: Path) -> None:
    """One after the other, as a reader types them; runs that another page trained are there."""
    lent = set()
    for command in done(document):
        words = shlex.split(command)[1:]
        made = words[words.index("--out") + 1] if "--out" in words else ""
        made = words[2] if words[0] == "import" else made
        if made in lent:
            shutil.rmtree(made)
        for word in words:
            run = "/".join(word.split("/")[:2])
            if run.startswith("runs/") and run != made and not Path(run).exists():
                shutil.copytree(small_run, run)
                lent.add(run)
        more = shlex.split(listed(command, DONE) or "")
        try:
            code = main([*(str(ROOT / w) if w.startswith("docs/") else w for w in words), *more])
        except SystemExit as end:  # of --help
            code = end.code
        assert code in (0, None), command


def not_done() -> list[str]:
    commands = {c for of_one in COMMANDS_OF.values() for c in of_one}
    return sorted(c for c in commands if c.startswith("selfalign ") and listed(c, DONE) is None)


@pytest.fixture
def without_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands end where their work begins."""

    def begin(*_: object, **__: object) -> None:
        raise WorkBeginsError

    for function in (
        "runs.start.start_run",
        "study.launch.launch",
        "benchmark.limit.measure_limit",
        "benchmark.measure.time_step",
        "benchmark.cost.step_cost",
        "data.latents.prepare.prepare",
    ):
        monkeypatch.setattr(f"selfalign.{function}", begin)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("without_work")
@pytest.mark.parametrize("command", not_done())
def test_the_others_take_their_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    assert words[0] in COMMANDS
    try:
        code = main(words)
    except WorkBeginsError:
        return
    except SystemExit as end:
        if "--help" in words and end.code in (0, None):
            return
        raise
    said = capsys.readouterr().err
    assert code == 0 or NOT_HERE.search(said), said


def test_every_command_is_done_or_listed_with_a_reason() -> None:
    commands = {c for of_one in COMMANDS_OF.values() for c in of_one}
    assert not {
        c for c in commands if (listed(c, DONE) is None) == (listed(c, NOT_DONE) is None)
    }, "in neither list, or in both"
    for pattern in (*DONE, *NOT_DONE):
        assert any(re.fullmatch(pattern, c) for c in commands), f"{pattern} is in no document"
    for file in re.findall(r"[\w/]*test_\w+\.py", " ".join(NOT_DONE.values())):
        assert (ROOT / "tests" / file).is_file(), f"a reason names {file}"


@pytest.fixture(scope="module")
def known() -> set[str]:
    """All options."""
    said = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(said):
        main(["completion", "bash"])
    return set(re.findall(OPTION, said.getvalue())) | ELSEWHERE


def test_the_options_that_others_come_to_exist(known: set[str]) -> None:
    page = (ROOT / "docs" / "coming_from.md").read_text()
    right = [row.split("|")[2] for row in page.splitlines() if row.count("|") == 3]
    options = set(re.findall(OPTION, " ".join(right)))
    assert len(options) > 40
    assert not options - known


def test_options_and_files_in_sentences_exist(known: set[str]) -> None:
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for code in re.findall(r"`([^`]+)`", text):
            for file in re.findall(r"(?:benchmarks|examples|tests)/\w+\.py", code):
                assert (ROOT / file).is_file(), f"{document.name}: {file}"
            ours = document.name not in NOT_OURS and not code.startswith(PROGRAMS[1:])
            unknown = set(re.findall(rf"(?<!\S){OPTION}", code)) - known if ours else ()
            assert not unknown, f"{document.name}: {code}"


OPTION = r"--[a-z][\w.-]*"
ELSEWHERE = {
    *("--init", "--config", "--write-config", "--resume", "--data.accept-changes", "--verify"),
    *(
        "--plugins",
        "--backbone",
        "--ops",
        "--version",
        "--option",
        "--size",
        "--fraction",
        "--max-restarts",
        "--shutdown-timeout",
    ),
}
"""Options that are read before all others, and those of benchmarks and of other programs."""
NOT_OURS = ("coming_from.md", "extending.md")
"""Pages with others' options (tested above), and with those of a reader's parts (test_extending.py)."""
