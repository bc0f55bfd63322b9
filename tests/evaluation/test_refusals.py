"""What a person or an attacker brings to `selfalign evaluate`: one line, exit code 2, nothing written."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from selfalign import UserError, disk
from selfalign.cli import main
from selfalign.data.datasets import open_data
from selfalign.data.shapes import to_uint8
from selfalign.evaluation import classifier
from selfalign.evaluation.fitting import _other_data
from selfalign.evaluation.reference import open_reference
from selfalign.sections import DataConfig

POINTS = np.random.default_rng(1).random((9, 64))
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
MEAN, COVARIANCE = np.zeros(64), np.eye(64)


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files and folders."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    } | {f"{path.relative_to(folder)}/": (0, 0) for path in folder.rglob("*") if path.is_dir()}


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Run the command in a folder that holds samples.npz; returns the one line it says."""
    monkeypatch.chdir(tmp_path)
    np.savez("samples.npz", arr_0=PIXELS, arr_1=np.arange(40) % 10)

    def run(*words: object) -> str:
        before = state(tmp_path)
        capsys.readouterr()
        assert main(["evaluate", *map(str, words)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("selfalign: error: ") and said.count("\n") == 1
        assert state(tmp_path) == before
        return said

    return run


class TestStatistics:
    """A reference's mean and covariance, which go into a number as they are."""

    def broken(self, **changes: object) -> dict[str, object]:
        found = {"mu": MEAN, "sigma": COVARIANCE, **changes}
        return {name: value for name, value in found.items() if value is not None}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mu": np.float64(3)}, r"have the shapes \[\(\), "),
            ({"mu": np.zeros((64, 64))}, "have the shapes"),
            ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "have the shapes"),
            ({"sigma": np.eye(63)}, "have the shapes"),
            ({"sigma": np.ones(64)}, "have the shapes"),
            ({"sigma": None}, "have the shapes"),
            ({"mu": None}, "a reference holds images"),
            ({"mu_s": np.zeros(3)}, "mu_s and sigma_s of .* have the shapes"),
            ({"sigma_s": np.eye(3)}, "mu_s and sigma_s of .* have the shapes"),
            ({"mu": MEAN.astype(complex)}, "mu of .* holds complex128: allowed are real"),
            ({"sigma": COVARIANCE.astype(complex)}, "sigma of .* holds complex128"),
            ({"mu": np.array(["x"] * 64)}, "mu of .* holds <U1"),
            ({"mu": np.zeros(64, bool)}, "mu of .* holds bool"),
            ({"mu": np.zeros(64, "datetime64[s]")}, "mu of .* holds datetime64"),
            ({"mu": MEAN + np.nan}, "mu of .* holds NaN or infinite"),
            ({"mu": MEAN + 1e300}, "mu of .* holds numbers beyond 1e.100"),
            ({"sigma": np.full((64, 64), np.inf)}, "sigma of .* holds NaN or infinite"),
            ({"sigma": COVARIANCE + np.eye(64, k=1) * 1e-3}, "sigma of .* is not symmetric"),
            ({"sigma": -COVARIANCE}, "negative eigenvalue -1: a covariance has none"),
            ({"sigma": COVARIANCE + np.eye(64)[::-1] * 9}, "negative eigenvalue -8"),
            ({"mu": np.array([{}] * 64)}, "mu of .* pickled objects"),
        ],
        ids=str,
    )
    def test_those_of_no_features(
        self, tmp_path: Path, changes: dict[str, object], message: str
    ) -> None:
        np.savez(tmp_path / "r.npz", **self.broken(**changes))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            open_reference(tmp_path / "r.npz")

    @pytest.mark.parametrize(
        "changes",
        [
            {"mu": np.zeros(64, np.float32), "sigma": np.cov(POINTS.T, dtype="f4")},
            {"sigma": np.zeros((64, 64))},  # constant features
            {"sigma": np.cov(POINTS.T).astype(">f8")},  # of rank 8
            {"sigma": np.eye(64, dtype=np.int64)},
            {"mu_s": np.zeros(3), "sigma_s": np.eye(3)},
        ],
        ids=str,
    )
    def test_those_of_features(self, tmp_path: Path, changes: dict[str, object]) -> None:
        np.savez(tmp_path / "r.npz", **self.broken(**changes))  # type: ignore[arg-type]
        assert len(open_reference(tmp_path / "r.npz").given["features"].mean) == 64

    def test_spatial_statistics_alone(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "r.npz", mu_s=np.zeros(3), sigma_s=np.eye(3))
        assert set(open_reference(tmp_path / "r.npz").given) == {"spatial"}

    def test_values_too_large_to_compare(self, refused: Callable[..., str]) -> None:
        np.savez("r.npz", mu=MEAN + 1e200, sigma=COVARIANCE)
        said = refused("samples.npz", "--reference", "r.npz", "--data.name", "digits")
        assert "mu of r.npz holds numbers beyond 1e+100" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x" * 400], "does not exist"),
        (["samples.npz/x"], "does not exist"),
        (["samples.npz", "--reference", "r" * 400], "does not exist"),
        (["samples.npz", "--reference", "VIRTUAL_imagenet256_labeled.npz"], "https://openaipublic"),
        (["samples.npz", "--reference", "latents"], "manifest.json is missing"),
        (["samples.npz", "--reference", "/dev/null", "--data.name", "digits"], "/dev/null"),
        (["samples.npz", "--reference", "digits", "--out", "samples.npz"], "is not a folder"),
        (["samples.npz", "--reference", "digits", "--out", "samples.npz/o"], "is not a folder"),
        (["samples.npz", "--reference", "digits", "--out", "/proc/o"], "cannot be written"),
        (["samples.npz", "--reference", "digits", "--write-reference", "samples.npz"], "read from"),
        (["samples.npz", "--reference", "digits", "--write-reference", "/proc/r.npz"], "/proc"),
        (["samples.npz", "--reference", "digits", "--write-reference", "nosuch"], "ending in .npz"),
        (
            ["samples.npz", "--reference", "digits", "--data.name", "nosuch"],
            "allowed are arrays, cifar10",
        ),
        (["samples.npz", "--reference", "digits", "--inception-splits", "0"], "from 1"),
        (["samples.npz", "--reference", "digits", "--batch-size", "-1"], "from 1"),
        (["samples.npz", "--protocol", "nosuch", "--reference", "digits"], "--protocol"),
    ],
)
def test_settings(refused: Callable[..., str], words: list[str], message: str) -> None:
    said = refused(*words)
    assert message in said


@pytest.mark.parametrize(
    "content",
    [
        b"{broken",
        b"[1, 2]",
        b'"text"',
        b"\xff\xfe\x00",
        b"",
        b'{"steps": NaN}',
        b'{"steps": 1e999}',
        b"[" * 100_000,
        b'{"steps": ' + b"9" * 10_000 + b"}",
        b" " * 2_000_000 + b"{}",
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_damaged_sampling_json(refused: Callable[..., str], content: bytes) -> None:
    Path("sampling.json").write_bytes(content)
    said = refused("samples.npz", "--reference", "digits", "--metrics", "fd")
    assert "sampling.json cannot be read: " in said and "says how the samples were made" in said


def test_the_report_is_not_put_among_images(refused: Callable[..., str]) -> None:
    from PIL import Image

    Path("images").mkdir()
    for number, image in enumerate(PIXELS):
        Image.fromarray(image[..., 0]).save(f"images/{number}.png")
    for out in ("images", "images/deep/er"):
        said = refused("images", "--reference", "digits", "--out", out)
        assert "within the images" in said
    said = refused(
        "samples.npz", "--reference", "images", "--data.name", "digits", "--out", "images"
    )
    assert "within the images" in said


def test_labels_that_no_classifier_knows(
    tmp_path: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    for labels in (np.full(40, -7), np.arange(40), np.full(40, 2**62)):
        np.savez("odd.npz", arr_0=PIXELS, arr_1=labels)
        said = refused("odd.npz", "--reference", "digits", "--metrics", "consistency")
        assert "consistency needs labels of the classifier's classes, 0 to 9" in said
        assert main(["evaluate", "odd.npz", "--reference", "digits", "--out", "o"]) == 0
        assert "note: consistency is left out" in " ".join(capsys.readouterr().out.split())
        found = json.loads(Path("o/evaluation.json").read_text())
        assert "class_consistency" not in found["metrics"] and "fd_classifier" in found["metrics"]
        shutil.rmtree("o")


def test_too_few_samples_are_no_zero(refused: Callable[..., str]) -> None:
    np.savez("one.npz", arr_0=PIXELS[:1])
    said = refused("one.npz", "--reference", "digits")
    assert "nothing to measure" in said and "at least 20 samples, here are 1" in said
    np.savez("five.npz", arr_0=PIXELS[:5])
    assert main(["evaluate", "five.npz", "--reference", "digits", "--out", "o"]) == 0
    found = json.loads(Path("o/evaluation.json").read_text())
    assert "fd_classifier" not in found["metrics"] and "precision" in found["metrics"]
    assert "fd is left out: it needs at least 20 samples, here are 5" in found["notes"]


def test_a_reference_of_one_image(refused: Callable[..., str]) -> None:
    np.savez("one.npz", arr_0=PIXELS[:1])
    said = refused("samples.npz", "--reference", "one.npz", "--data.name", "digits")
    assert "a reference needs at least 2" in said


class TestRuns:
    def test_nothing_is_sampled_before_metrics_are_chosen(
        self, run_folder: Path, refused: Callable[..., str]
    ) -> None:
        assert "needs --features inception" in refused("run", "--metrics", "fid", "--num", 20)
        assert "at least 20 samples" in refused("run", "--metrics", "fd", "--num", 19)
        assert "is a run" in refused("samples.npz", "--reference", "run", "--data.name", "digits")

    @pytest.mark.parametrize("labels", [["10"], ["-1"], ["0", "99"], ["nosuch"]])
    def test_labels_that_the_model_does_not_have(
        self, run_folder: Path, refused: Callable[..., str], labels: list[str]
    ) -> None:
        assert "labels" in refused("run", "--num", 20, "--labels", *labels)

    def test_more_samples_than_the_disk_holds(
        self, run_folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(run_folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=10**6))
        said = refused("run", "--num", 10**6)
        assert "samples need" in said and "MB are free" in said

    def test_damaged_samples_of_its_own(
        self, evaluated: tuple[list[str], Path], refused: Callable[..., str]
    ) -> None:
        words, kept = evaluated
        whole = (kept / "samples.npz").read_bytes()
        (kept / "samples.npz").write_bytes(whole[:1000] + b"?" + whole[1001:])
        assert "they are made again once" in refused(*words[1:])
        first = json.loads((kept / "evaluation.json").read_text())["metrics"]
        shutil.rmtree(kept)
        assert main(words) == 0
        assert json.loads((kept / "evaluation.json").read_text())["metrics"] == first

    def test_a_damaged_shard_is_made_again(self, evaluated: tuple[list[str], Path]) -> None:
        words, kept = evaluated
        whole = (kept / "samples.npz").read_bytes()
        (kept / "samples.npz").unlink()
        (kept / "shards").mkdir()
        (kept / "shards" / "00000000-00000016.npz").write_bytes(b"PK, half of a shard")
        assert main(words) == 0
        assert (kept / "samples.npz").read_bytes() == whole

    def test_another_process_making_the_same_samples(
        self, evaluated: tuple[list[str], Path], refused: Callable[..., str]
    ) -> None:
        from filelock import FileLock

        words, kept = evaluated
        (kept / "samples.npz").unlink()
        (kept / "shards").mkdir()
        with FileLock(kept / "shards" / ".lock"):
            assert "another process is making these samples" in refused(*words[1:])

    def test_a_read_only_run_goes_with_out_elsewhere(
        self,
        run_folder: Path,
        refused: Callable[..., str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        inside = str(run_folder)
        make = tempfile.TemporaryDirectory

        def read_only(dir: Path, **settings: Any) -> Any:
            if str(dir.resolve()).startswith(inside):
                raise OSError(errno.EROFS, "Read-only file system")
            return make(dir=dir, **settings)

        monkeypatch.setattr(disk.tempfile, "TemporaryDirectory", read_only)
        words = ["run", "--num", "30", "--steps", "1", "--metrics", "fd"]
        with monkeypatch.context() as patch:
            patch.setattr(
                "selfalign.evaluation.evaluate.open_setup", None
            )  # no work is done before
            assert "Read-only file system; --out names another place" in refused(*words)
        before = state(run_folder)
        assert main(["evaluate", *words, "--out", "elsewhere"]) == 0
        assert state(run_folder) == before
        assert Path("elsewhere/evaluation.json").is_file()
        (samples,) = Path("elsewhere").glob("step_*/samples.npz")
        made = samples.stat().st_mtime_ns
        assert main(["evaluate", *words, "--out", "elsewhere"]) == 0  # and are used again
        assert samples.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    ("classes", "source_classes", "shape", "message"),
    [
        (10, 10, (1, 8, 8), None),
        (12, 10, (1, 8, 8), None),  # more classes in the model than in the data
        (0, 10, (1, 8, 8), None),  # an unconditional model sees no labels
        (3, 10, (1, 8, 8), "data of the model's 3 classes: here are 10"),
        (10, 0, (1, 8, 8), "data of the model's 10 classes: here are 0"),
        (10, 10, (3, 8, 8), r"data of the model's shape, \(1, 8, 8\): here is \(3, 8, 8\)"),
        (10, 10, (1, 8, 9), "data of the model's shape"),
    ],
)
def test_data_that_a_run_cannot_be_tried_on(
    classes: int, source_classes: int, shape: tuple[int, int, int], message: str | None
) -> None:
    """A label that the model does not have would be an index error, or another class."""
    sides = (8, 8)
    model = SimpleNamespace(channels=1, image_size=sides, num_classes=classes, predicts="velocity")
    source = SimpleNamespace(channels=shape[0], image_size=shape[1:], num_classes=source_classes)
    found = _other_data(SimpleNamespace(run=SimpleNamespace(model=model), source=source))  # type: ignore[arg-type]
    assert found is None if message is None else re.search(message, found or "")


def test_names_that_are_formulas_and_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = open_data(DataConfig())
    images = to_uint8(source.heldout.read(range(30))[0]).permute(0, 2, 3, 1).numpy()
    for name in ("$x$y$", "a[b]c[red]", "<b>&amp;", "日本語‮", "new\nline", os.fsdecode(b"\xff")):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        words = [
            "evaluate",
            f"{name}.npz",
            "--reference",
            "digits",
            "--metrics",
            "fd",
            "--out",
            "o",
        ]
        assert main(words) == 0
        said = capsys.readouterr()
        assert said.err == ""
        found = json.loads((tmp_path / "o" / "evaluation.json").read_text())
        assert found["settings"]["samples"]["source"] == f"{name}.npz"


def test_a_cache_that_cannot_be_written_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("samples.npz", arr_0=PIXELS)
    monkeypatch.setenv("SELFALIGN_CACHE", "/proc/cache")
    monkeypatch.setattr(classifier, "STEPS", 3)
    words = ["evaluate", "samples.npz", "--reference", "digits", "--metrics", "fd"]
    with pytest.warns(UserWarning, match="the classifier is not kept"):
        assert main(words) == 0
    notes = json.loads((tmp_path / "samples-evaluation" / "evaluation.json").read_text())["notes"]
    assert any("the reference's statistics are not kept" in note for note in notes)


def test_a_full_disk_ends_an_evaluation_before_the_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.chdir(tmp_path)
    np.savez("samples.npz", arr_0=PIXELS)
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "STEPS", 3)
    monkeypatch.setattr(classifier, "write_safetensors", fail)
    words = ["evaluate", "samples.npz", "--reference", "digits", "--metrics", "fd"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "cannot be written: No space left on device" in said and said.count("\n") == 1
    assert not (tmp_path / "samples-evaluation").exists()
