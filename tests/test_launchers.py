"""Commands under torchrun and `accelerate launch`, ended in every way: exit codes, what is left, going on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_images import random_image

from selfalign.cli import main
from selfalign.runs.load import load_run
from selfalign.training.checkpoint import latest_checkpoint, step_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux", reason="Linux tells of a parent's death, and has /proc"
    ),
]

LAUNCHERS = {
    "torchrun": (
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--shutdown-timeout", "150"),  # it kills what takes longer to end, as on a busy machine
    ),
    "accelerate": (
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--main_process_port", "0"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ),
}  # fmt: skip
RECORDER = """
import os, sys
from pathlib import Path

def run():
    place, rank, end = Path(os.environ["PLACE"]), os.environ["RANK"], os._exit
    (place / f"pid_{rank}").write_text(str(os.getpid()))
    note = place / f"code_{rank}"
    os._exit = lambda code: (note.write_text(str(code)), end(code))
    from selfalign.cli import main
    if sys.argv[1] == "sample":
        from selfalign.sampling import generate
        inner = generate.generate
        generate.generate = lambda *a, **k: ((place / "sampling").touch(), inner(*a, **k))[1]
    code = main()
    note.write_text(str(code))
    return code

if __name__ == "__main__":
    sys.exit(run())
"""
"""Runs the command, and notes its process and its exit code, which launchers do not pass on."""
GRID = "variants:\n  one: {recipe: sit}\n  two: {recipe: sra}\n"


@dataclass(frozen=True)
class Work:
    """A command that takes a while, and what is asked of it."""

    words: list[str]
    begun: Callable[[], bool]
    """Whether it is at what takes long."""
    how: str
    """Said to whom interrupts it."""
    go_on: Callable[[], None]
    """Goes on with it, and checks that it can."""
    shared: bool = False
    """Whether both processes work."""


def train(place: Path, run: Path) -> Work:
    out = place / "run"
    small = ["--model.size", "tiny/4", "--training.batch-size", "16", "--training.log-every", "2"]
    words = ["train", "sra-dts-as", "--out", str(out), "--training.steps", "1000000", *small]

    def go_on() -> None:
        done = step_of(latest_checkpoint(out / "checkpoints"))
        assert main(["train", "--resume", str(out), "--training.steps", str(done + 2)]) == 0
        assert load_run(out).step == done + 2

    metrics = out / "metrics.jsonl"
    words += ["--training.checkpoint-every", "2", "--training.heldout-samples", "16"]
    return Work(
        words,
        lambda: metrics.is_file() and metrics.read_text().count("\n") > 4,
        "selfalign train --resume",
        go_on,
        shared=True,
    )


def sample(place: Path, run: Path) -> Work:
    out = place / "samples"

    def go_on() -> None:
        assert not out.exists()
        assert main(["sample", str(run), "--out", str(out), "--num", "2", "--steps", "1"]) == 0

    return Work(
        ["sample", str(run), "--out", str(out), "--num", "1000000", "--batch-size", "64"],
        (place / "sampling").is_file,
        "nothing was written; the same command makes the same samples",
        go_on,
    )


def evaluate(place: Path, run: Path) -> Work:
    out = place / "evaluated"
    words = ["evaluate", str(run), "--metrics", "denoising", "--out", str(out)]

    def go_on() -> None:
        (kept,) = (run / "evaluation").iterdir()
        assert len(list((kept / "shards").glob("0*.npz"))) >= 1
        assert main([*words, "--num", "512", "--steps", "2"]) == 0

    return Work(
        [*words, "--num", "1000000", "--steps", "2"],
        lambda: len(list(run.glob("evaluation/*/shards/0*.npz"))) >= 1,
        "finished samples are kept; the same command goes on",
        go_on,
        shared=True,
    )


def prepare(place: Path, run: Path) -> Work:
    images, store = place / "images" / "a", place / "store"
    images.mkdir(parents=True)
    random_image(0, 900, 900).save(images / "0.png")
    for number in range(1, 400):
        os.link(images / "0.png", images / f"{number}.png")
    words = ["prepare", str(images.parent), str(store), "--vae", "none", "--image-size", "256"]

    def go_on() -> None:
        assert main([*words, "--processes", "2"]) == 0
        assert main(["prepare", "--verify", str(store)]) == 0
        assert json.loads((store / "manifest.json").read_text())["layout"]["images"] == 400

    return Work(
        [*words, "--processes", "2"],
        lambda: any(store.glob(".*.partial.shard-*")),
        "finished files are kept; the same command goes on",
        go_on,
    )


def study(place: Path, run: Path) -> Work:
    (place / "grid.yaml").write_text(GRID)
    out = place / "study"
    words = ["study", str(place / "grid.yaml"), "--out", str(out), "--profile", "smoke"]
    words += ["--seeds", "1", "--training.steps", "40", "--training.log-every", "1"]
    words += [
        "--measurement.num",
        "64",
        "--data.name",
        "digits",
        "--model.size",
        "tiny/4",
        "--processes",
        "2",
    ]

    def go_on() -> None:
        assert main(words) == 0
        assert len(list(out.glob("runs/*/*/result.json"))) == 2
        assert not list(out.glob("runs/**/*.failed"))

    return Work(
        words,
        lambda: len(list(out.glob("runs/*/*/metrics.jsonl"))) >= 2,
        "its runs stop at checkpoints; the same command goes on",
        go_on,
    )


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def processes_marked(mark: str) -> list[int]:
    """Processes that were started with a variable of this value, and by those, that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.fixture
def mark() -> Iterator[str]:
    """A word by which all processes of a test are known; those that are left are ended."""
    word = uuid.uuid4().hex
    yield word
    for process in processes_marked(word):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def terminate(launcher: int, first: int) -> None:
    os.kill(launcher, signal.SIGTERM)


def interrupt(launcher: int, first: int) -> None:
    """What a terminal does: all of the launcher's group gets it."""
    os.killpg(launcher, signal.SIGINT)


def interrupt_twice(launcher: int, first: int) -> None:
    interrupt(launcher, first)
    time.sleep(0.3)
    with contextlib.suppress(ProcessLookupError):
        interrupt(launcher, first)


def kill_launcher(launcher: int, first: int) -> None:
    os.kill(launcher, signal.SIGKILL)


def kill_first(launcher: int, first: int) -> None:
    os.kill(first, signal.SIGKILL)


KILLED: tuple[int | None, ...] = (None,)
EVENTS: dict[str, tuple[Callable[[int, int], None], tuple[int | None, ...]]] = {
    "SIGTERM": (terminate, (143,)),
    "Ctrl-C": (interrupt, (130,)),
    # torchrun dies of the second one, perhaps before it has passed the first one on, and kills what has not
    # ended by then, be it between its last words and its end.
    "Ctrl-C twice": (interrupt_twice, (130, 143, None)),
    "launcher killed": (kill_launcher, (143,)),
    "first process killed": (kill_first, KILLED),
}
"""What happens, and the exit codes that the process that works may have."""


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("command", [train, sample, evaluate, prepare, study])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_end_of_every_command(
    small_run: Path, tmp_path: Path, mark: str, launcher: str,
    command: Callable[[Path, Path], Work], event: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "of"
    subprocess.run(["cp", "-r", str(small_run), str(run)], check=True)
    work = command(tmp_path, run)
    (tmp_path / "recorder.py").write_text(RECORDER)
    act, allowed = EVENTS[event]
    with (tmp_path / "said").open("wb") as said:
        launched = subprocess.Popen(
            [
                sys.executable,
                *LAUNCHERS[launcher],
                "--",
                str(tmp_path / "recorder.py"),
                *work.words,
            ],
            env={**os.environ, "PLACE": str(tmp_path), "MARK": mark, "CUDA_VISIBLE_DEVICES": ""},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    wait_until(lambda: work.begun() or launched.poll() is not None, "it does not begin")
    assert launched.poll() is None, (tmp_path / "said").read_text()
    act(launched.pid, int((tmp_path / "pid_0").read_text()))
    launched.wait(120)
    wait_until(lambda: not processes_marked(mark), f"left running: {processes_marked(mark)}", 90)
    words = (tmp_path / "said").read_text()
    codes = {
        rank: int(file.read_text()) if (file := tmp_path / f"code_{rank}").is_file() else None
        for rank in range(2)
    }
    print(
        f"TABLE | {launcher} | {command.__name__} | {event} | {codes[0]} | {codes[1]} |", flush=True
    )
    assert codes[0] in allowed, words
    others = (0, 2, 143, None) if allowed == KILLED else allowed if work.shared else (0,)
    assert codes[1] in others, words
    if allowed != KILLED:
        assert words.count(work.how) == 1, words
    assert "/selfalign/" not in words.replace(str(tmp_path), ""), words  # a traceback of ours
    work.go_on()
