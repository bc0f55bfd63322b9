"""What a command line can hold that no command can do: one line, exit code 2, nothing written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfalign import parts
from selfalign.cli import main
from selfalign.errors import told_by_machine

TRAIN = "train sra-dts-as --out x --model.size tiny/4 --training.batch-size 8 --training.steps 2"
SAMPLE = "sample run --out x --num 2 --steps 1"
EVALUATE = "evaluate run --num 20 --steps 1 --metrics fd"
PREPARE = "prepare images x --vae none --image-size 16"
STUDY = "study paper --out x --profile smoke"
LONG = "n" * 300


def entries(folder: Path) -> dict[str, int]:
    """All that is there, with the times of files."""
    return {
        str(path.relative_to(folder)): 0 if path.is_dir() else path.lstat().st_mtime_ns
        for path in folder.rglob("*")
    }


@pytest.fixture
def refused(
    tmp_path: Path,
    small_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Run a command beside a run, images, a pipe and links that lead nowhere; the line that it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "cache"))
    shutil.copytree(small_run, "run")
    for number in range(6):
        path = Path(f"images/{'ab'[number % 2]}/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), number, np.uint8)).save(path)
    Path("file").touch()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("lost").symlink_to("/nonexistent/x")

    def run(*words: str) -> str:
        before = entries(tmp_path)
        capsys.readouterr()
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.startswith("selfalign: error: ") and said.count("\n") == 1
        assert entries(tmp_path) == before
        return said

    return run


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (TRAIN, "--model.size tiny/", "model.size is 'tiny/'"),
        (TRAIN, "--terms.alignment.block nosuch", "module 'nosuch', which the backbone does not run"),
        (TRAIN, "--targets.ema.block blocks", "module 'blocks', which the backbone does not run"),
        (TRAIN, "--objective.terms dispersive dispersive", "each name once"),
        (
            TRAIN,
            "--objective.terms dispersive --training.batch-size 1",
            "terms.dispersive needs 2 images at once, and has 1",
        ),
        (TRAIN, f"--terms.alignment.weight {'9' * 400}", "terms.alignment.weight is inf"),
        (TRAIN, "--training.heldout-samples 1000000000000", "from 1 to"),
        (TRAIN, f"--out {LONG}", "File name too long"),
        (TRAIN, f"--out {'a/' * 2100}x", "File name too long"),
        (TRAIN, "--out loop", "loop cannot be written"),
        (TRAIN, "--out pipe", "new or an empty folder"),
        (TRAIN, "--out file/x", "Not a directory"),
        (TRAIN, "--plugins loop", "names no file"),
        (TRAIN, f"--plugins {LONG}.py", "there is no such file"),
        ("train", f"--resume {LONG}", "File name too long"),
        (SAMPLE, "--steps 1000000000000000", "from 1 to 1,000,000"),
        (SAMPLE, "--guidance-scale 1e308", "allowed is 1 (off) to 1000"),
        (SAMPLE, "--num 1000000000000", "--num is 1000000000000: allowed is a number from 1 to"),
        (SAMPLE, "--batch-size 1000000000000", "--batch-size is 1000000000000"),
        (SAMPLE, "--out file", "is not a folder"),
        (SAMPLE, "--out pipe", "is not a folder"),
        (SAMPLE, "--out lost", "is not a folder"),
        (SAMPLE, f"--out {LONG}", "File name too long"),
        (EVALUATE, "--num 1000000000000", "from 1 to 100,000,000"),
        (EVALUATE, "--batch-size 99999999999", "from 1 to"),
        (EVALUATE, "--steps 1000000000000000", "from 1 to 1,000,000"),
        ("evaluate images", "--step 3 --reference images", "images is no run"),
        (EVALUATE, "--weights raw ema:0.5", "weights are 'ema:0.5': this run keeps raw, ema"),
        (PREPARE, "--processes 99999999", "from 1 to 1,024"),
        ("prepare images loop", "--vae none", "loop"),
        ("prepare loop x", "--vae none", "allowed are"),
        (STUDY, "--seeds 1000000000000", "from 1 to 10,000"),
        (STUDY, "--processes 99999999", "from 1 to 1,024"),
        (STUDY, "--threads 99999999", "from 1 to 1,024"),
        (STUDY, "--measurement.num 1000000000000000", "from 20 to 100,000,000"),
        (STUDY, "--measurement.heldout-pairs 1000000000000", "from 10 to 100,000,000"),
        (STUDY, "--measurement.sampling.steps 1000000000000", "from 1 to 1,000,000"),
        ("study", f"{LONG}.yaml --out x", "File name too long"),
        ("study", "2x2 --out x --encoders timm:resnet18", "2x2 has no variant that takes them"),
        ("bench estimate", "--device-tflops inf", "allowed is a finite number above 0"),
        ("bench estimate", "--efficiency inf", "allowed is a finite number above 0"),
        ("bench step", "--batch-size 99999999999", "from 1 to"),
        (
            "bench sample",
            "--mask-ratio 0.0001 --model.size tiny/4 --data.shape 1 8 8",
            "leaves a group of the 4 tokens empty",
        ),
    ],
)  # fmt: skip
def test_what_no_command_can_do(
    refused: Callable[..., str], command: str, options: str, message: str
) -> None:
    assert message in refused(*command.split(), *options.split())


@pytest.mark.parametrize("command", [TRAIN, SAMPLE, EVALUATE, PREPARE, STUDY])
def test_an_empty_word_is_a_shells_variable_that_is_not_set(
    refused: Callable[..., str], command: str
) -> None:
    assert "after --out stands an empty word" in refused(*command.split(), "--out", "")


@pytest.mark.parametrize("name", ["samples.npz", "sampling.json", "grid.png"])
def test_a_folder_in_a_files_place_is_found_before_sampling(
    refused: Callable[..., str], name: str
) -> None:
    (Path("x") / name).mkdir(parents=True)
    assert f"x/{name} is a folder" in refused(*SAMPLE.split())


def test_samples_that_fit_no_disk_or_memory_are_refused_beforehand(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SAMPLE.split(), "--num", "100000000"]
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**12))
        assert "need 14,400 MB of memory, and this machine has 1 MB" in refused(*words)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**6))
    assert "need 7,200.0 MB in x, where 1.0 MB are free" in refused(*words)


def test_names_cannot_steer_the_terminal(refused: Callable[..., str]) -> None:
    said = refused("train", "--resume", "a\x1b[2J\x07\u202eb\udcff")
    assert said.isprintable() or said.rstrip("\n").isprintable()
    assert r"a\x1b[2J\x07\u202eb\udcff" in said


PLUGIN = "from pathlib import Path\nPath('canary').touch()\n"


@pytest.mark.usefixtures("forget_parts")
class TestPluginsThatFilesName:
    """A run folder or a grid of somebody else's must not have a file run that nobody here has named."""

    def test_a_run_folder(self, refused: Callable[..., str], tmp_path: Path) -> None:
        Path("run/evil.py").write_text(PLUGIN)
        config = Path("run/config.json")
        text = config.read_text().replace('"plugins": []', '"plugins": ["run/evil.py"]')
        assert "evil" in text
        config.write_text(text)
        for words in (SAMPLE, EVALUATE, "train --resume run --training.steps 8"):
            said = refused(*words.split())
            assert "run/evil.py" in said and "add --plugins run/evil.py" in said
        assert not Path("canary").exists()
        # Named once, its content is known, under whatever name and in whatever process.
        assert main([*SAMPLE.split(), "--plugins", "run/evil.py"]) == 0
        assert Path("canary").exists()
        parts._plugins.clear()
        assert main(SAMPLE.split()) == 0
        parts._plugins.clear()
        Path("run/evil.py").write_text(PLUGIN + "# changed\n")
        assert "read it" in refused(*EVALUATE.split())

    def test_a_grid(self, refused: Callable[..., str]) -> None:
        Path("evil.py").write_text(PLUGIN)
        Path("grid.yaml").write_text("variants: {a: {recipe: sit, settings: {plugins: [evil.py]}}}")
        assert "read it" in refused("study", "grid.yaml", "--out", "x")
        Path("grid.yaml").write_text("variants: {a: {recipe: sit, settings: {plugins: evil.py}}}")
        assert "allowed are names of files" in refused("study", "grid.yaml", "--out", "x")
        assert not Path("canary").exists()

    @pytest.mark.parametrize("name", ["\0.py", "~nobody/x.py", LONG + ".py", "/", "loop", "pipe"])
    def test_no_names_of_files(self, refused: Callable[..., str], name: str) -> None:
        import json

        config = json.loads(Path("run/config.json").read_text())
        config["config"]["plugins"] = [name]
        Path("run/config.json").write_text(json.dumps(config))
        assert "there is no such file" in refused(*SAMPLE.split())


def test_what_the_machine_says_is_told_and_bugs_are_not_hidden() -> None:
    assert told_by_machine(FileNotFoundError(2, "No such file", "a")) == "a: No such file"
    assert "memory does not suffice" in (told_by_machine(MemoryError()) or "")
    torchs = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    assert "smaller batches" in (told_by_machine(torchs) or "")
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1")
    assert "another process of the job has ended" in (told_by_machine(gloo) or "")
    nccl = type("DistBackendError", (RuntimeError,), {})("NCCL error: remote process exited")
    assert "another process of the job has ended" in (told_by_machine(nccl) or "")
    assert told_by_machine(RuntimeError("shape mismatch")) is None
    assert told_by_machine(KeyError("x")) is None
