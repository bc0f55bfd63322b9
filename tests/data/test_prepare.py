"""A set is prepared whole, the same however it came about, or not at all."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_images import random_image

from selfalign.cli import main
from selfalign.data.images import read_image
from selfalign.data.latents import layout, store, workers
from selfalign.data.latents.autoencoder import encode_moments, load_autoencoder
from selfalign.data.latents.prepare import prepare
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.verify import verify
from selfalign.errors import UserError

PIXELS = PrepareConfig(image_size=16, vae="none")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 6 images, so that a small set has several."""
    monkeypatch.setattr(layout, "SMALLEST_SHARD", 6)
    monkeypatch.setattr(workers, "ENCODE_BATCH", 4)


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def stored(root: Path) -> np.ndarray:
    layout = store.read_manifest(root).layout
    shards = [np.fromfile(root / s.file, layout.dtype) for s in store.read_manifest(root).shards]
    return np.concatenate(shards).reshape(-1, *layout.shape)


def test_pixels_are_stored_as_they_are_read(class_folder: Path, tmp_path: Path, small_shards: None):
    manifest = prepare(str(class_folder), tmp_path / "out", PIXELS)
    assert [shard.records for shard in manifest.shards] == [6] * 6 + [4]
    files = sorted((class_folder / "cats").iterdir()) + sorted((class_folder / "dogs").iterdir())
    expected = torch.stack([read_image(file, 16) for file in files])
    assert np.array_equal(stored(tmp_path / "out")[:, 0], expected.numpy())
    index = np.load(tmp_path / "out" / "index.npy")
    assert index[:, 0].tolist() == [0] * 20 + [1] * 20
    assert index[:, 1].sum() == 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_moments_and_mirrored_copies(
    class_folder: Path, tmp_path: Path, autoencoder: Path, small_shards: None, dtype: str
):
    config = PrepareConfig(16, str(autoencoder), dtype, flip=True)  # type: ignore[arg-type]
    prepare(str(class_folder), tmp_path / "out", config)
    records = torch.from_numpy(stored(tmp_path / "out"))
    assert records.shape == (40, 2, 8, 8, 8)
    image = read_image(class_folder / "cats" / "0.png", 16)
    views = torch.stack([image, image.flip(-1)])
    expected = encode_moments(load_autoencoder(str(autoencoder)), views)
    tolerance = 2e-3 if dtype == "float16" else 1e-5
    torch.testing.assert_close(records[0].float(), expected, atol=tolerance, rtol=tolerance)


def test_processes_do_not_change_the_result(
    class_folder: Path, tmp_path: Path, autoencoder: Path, small_shards: None
):
    for processes in (1, 2):
        config = PrepareConfig(16, str(autoencoder), processes=processes)
        prepare(str(class_folder), tmp_path / str(processes), config)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_vae_sd_folder_without_the_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    moments = np.random.default_rng(0).normal(size=(3, 8, 4, 4)).astype(np.float32)
    moments[:, 4:] = abs(moments[:, 4:])
    (tmp_path / "vae-sd").mkdir()
    for i, array in enumerate(moments):
        np.save(tmp_path / "vae-sd" / f"{i}.npy", array)
    (tmp_path / "vae-sd" / "dataset.json").write_text('{"labels": null}')
    config = PrepareConfig(32, "mse", "float32")
    manifest = prepare(str(tmp_path / "vae-sd"), tmp_path / "out", config)
    assert np.array_equal(stored(tmp_path / "out")[:, 0], moments)
    assert manifest.layout.scale == 0.18215 and manifest.layout.autoencoder == "mse"
    assert verify(tmp_path / "out") == {}
    with pytest.raises(UserError, match=r"allowed is \(8, 8, 8\)"):
        prepare(str(tmp_path / "vae-sd"), tmp_path / "out2", PrepareConfig(64, "mse"))
    np.save(tmp_path / "vae-sd" / "1.npy", np.zeros((8, 5, 4), np.float32))
    with pytest.raises(UserError, match=r"1\.npy is an array of"):
        prepare(str(tmp_path / "vae-sd"), tmp_path / "out3", config)


def test_latents_too_large_for_half_precision(tmp_path: Path):
    (tmp_path / "vae-sd").mkdir()
    for i in range(3):
        np.save(tmp_path / "vae-sd" / f"{i}.npy", np.full((8, 4, 4), 7e4 * (i == 1), np.float32))
    (tmp_path / "vae-sd" / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match=r"latents of 1\.npy are not finite in float16"):
        prepare(str(tmp_path / "vae-sd"), tmp_path / "out", PrepareConfig(32, "mse"))


# Unreadable images


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_unreadable_image_stops_and_is_named(
    class_folder: Path, tmp_path: Path, small_shards: None, processes: int
):
    (class_folder / "dogs" / "19.png").write_bytes(b"no image")
    config = dataclasses.replace(PIXELS, processes=processes)
    with pytest.raises(UserError, match=r"dogs/19\.png is not a readable image"):
        prepare(str(class_folder), tmp_path / "out", config)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").glob("*.part"))


def test_unreadable_images_are_skipped_and_listed(
    class_folder: Path, tmp_path: Path, small_shards: None
):
    prepare(str(class_folder), tmp_path / "whole", PIXELS)
    unreadable = [0, 1, 2, 3, 4, 5, 25]  # all of a shard, and one of another
    names = [f"{c}/{i}.png" for c in ("cats", "dogs") for i in sorted(range(20), key=str)]
    for i in unreadable:
        (class_folder / names[i]).write_bytes(b"no image")
    with pytest.raises(UserError, match="not a readable image"):
        prepare(str(class_folder), tmp_path / "out", PIXELS)
    config = dataclasses.replace(PIXELS, skip_unreadable=True)
    manifest = prepare(str(class_folder), tmp_path / "out", config)
    assert list(manifest.skipped) == [names[i] for i in unreadable]
    expected = np.delete(stored(tmp_path / "whole"), unreadable, axis=0)
    assert np.array_equal(stored(tmp_path / "out"), expected)
    assert np.load(tmp_path / "out" / "index.npy")[:, 0].tolist() == [0] * 14 + [1] * 19


def test_nothing_readable(tmp_path: Path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    config = dataclasses.replace(PIXELS, skip_unreadable=True)
    with pytest.raises(UserError, match="0 of the 3 images"):
        prepare(str(tmp_path), tmp_path.with_name("out"), config)


# Moments of another kind


def store_moments(root: Path, *arrays: np.ndarray) -> str:
    root.mkdir()
    for i, array in enumerate(arrays):
        np.save(root / f"{i}.npy", array)
    (root / "dataset.json").write_text('{"labels": null}')
    return str(root)


def deviations(count: int = 3) -> list[np.ndarray]:
    """Whole moments, of means and standard deviations."""
    moments = np.random.default_rng(0).normal(size=(count, 8, 4, 4)).astype(np.float32)
    moments[:, 4:] = abs(moments[:, 4:])
    return list(moments)


@pytest.mark.parametrize("which", [0, 2])
def test_log_variances_are_not_taken_for_deviations(tmp_path: Path, which: int):
    arrays = deviations()
    arrays[which][4:] = 2 * np.log(arrays[which][4:])
    source = store_moments(tmp_path / "vae-sd", *arrays)
    with pytest.raises(UserError, match=rf"{which}\.npy has a standard deviation of -.*exp\(0\.5"):
        prepare(source, tmp_path / "out", PrepareConfig(32, "mse"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 4, 4, 4)])
def test_sampled_latents_are_not_taken_for_moments(tmp_path: Path, shape: tuple[int, ...]):
    arrays = [array[:4].reshape(shape) for array in deviations()]
    source = store_moments(tmp_path / "vae-sd", *arrays)
    with pytest.raises(UserError, match=r"allowed is \(8, 4, 4\).*sampled latents"):
        prepare(source, tmp_path / "out", PrepareConfig(32, "mse"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((8, 4, 4), np.nan, np.float32), "not finite"),
        (np.zeros((8, 4, 4), np.complex64), "complex64"),
        (np.zeros((8, 4, 4), np.int32), "int32"),
        (np.zeros((8, 5, 4), np.float32), r"shape \(8, 5, 4\)"),
        (np.zeros((8, 4), np.float32), r"shape \(8, 4\)"),
        (np.array([None]), "objects"),
    ],
)
@pytest.mark.parametrize("which", [0, 2])
def test_arrays_that_are_no_moments(tmp_path: Path, array: np.ndarray, said: str, which: int):
    arrays = deviations()
    arrays[which] = array
    source = store_moments(tmp_path / "vae-sd", *arrays)
    with pytest.raises(UserError, match=rf"{which}\.npy.*{said}"):
        prepare(source, tmp_path / "out", PrepareConfig(32, "mse"))
    assert not (tmp_path / "out").exists()


# What a failure leaves


def test_where_nothing_is_finished_nothing_stays(class_folder: Path, tmp_path: Path):
    image = class_folder / "dogs" / "19.png"
    image.write_bytes(image.read_bytes()[:100])
    for out in (tmp_path / "new" / "out", tmp_path / "empty"):
        if out.name == "empty":
            out.mkdir()
        with pytest.raises(UserError, match=r"dogs/19\.png is not a readable image"):
            prepare(str(class_folder), out, PIXELS)
        assert not out.exists() or not list(out.iterdir())


def test_folders_of_others_are_not_touched(class_folder: Path, tmp_path: Path):
    out = tmp_path / "out"
    (out / "thesis.part").mkdir(parents=True)
    (out / "mine.part").write_text("precious")
    with pytest.raises(UserError, match=r"holds other files \(mine\.part\): allowed is a new"):
        prepare(str(class_folder), out, PIXELS)
    assert sorted(path.name for path in out.iterdir()) == ["mine.part", "thesis.part"]


def test_what_an_interrupted_call_left_is_swept_up(
    class_folder: Path, tmp_path: Path, small_shards: None
):
    image = class_folder / "dogs" / "19.png"
    whole = image.read_bytes()
    image.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError):
        prepare(str(class_folder), tmp_path / "out", PIXELS)
    image.write_bytes(whole)
    for name in (".1234.partial.shard-00006.bin", "shard-00006.bin.part"):
        (tmp_path / "out" / name).write_bytes(bytes(10))
    prepare(str(class_folder), tmp_path / "out", PIXELS)
    assert not [path for path in (tmp_path / "out").iterdir() if "part" in path.name]
    assert verify(tmp_path / "out") == {}


@pytest.mark.parametrize(
    "content", ['{"file": 5}', "", "[]", '{"file": "../x.bin", "records": 1, "sha256": ""}']
)
def test_damaged_records_of_shards(
    class_folder: Path, tmp_path: Path, small_shards: None, content: str
):
    out = tmp_path / "out"
    image = class_folder / "dogs" / "19.png"
    image.write_bytes(bytes(len(image.read_bytes())))
    with pytest.raises(UserError):
        prepare(str(class_folder), out, PIXELS)
    (out / "shard-00000.json").write_text(content)
    with pytest.raises(UserError, match=r"shard-00000\.json cannot be read"):
        prepare(str(class_folder), out, PIXELS)


def test_a_set_of_version_0_1_0_is_left_as_it_is(class_folder: Path, tmp_path: Path):
    prepare(str(class_folder), tmp_path / "out", PIXELS)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["layout"]["background"], manifest["record_checksums"], manifest["left_out"]
    path.write_text(json.dumps(manifest))
    for sums in (tmp_path / "out").glob("*.xxh3"):
        sums.unlink()
    assert verify(tmp_path / "out") == {}
    assert prepare(str(class_folder), tmp_path / "out", PIXELS).record_checksums is None


def test_rare_classes_are_not_held_out(tmp_path: Path):
    for label in range(120):
        (tmp_path / "images" / f"{label}").mkdir(parents=True)
        for i in range(2 if label < 100 else 1):
            random_image(label + i, 16, 16).save(tmp_path / "images" / f"{label}" / f"{i}.png")
    prepare(str(tmp_path / "images"), tmp_path / "out", PIXELS)
    index = np.load(tmp_path / "out" / "index.npy")
    assert index[:, 1].sum() == 2
    assert len(set(index[index[:, 1] == 0, 0].tolist())) == 120


# Going on


def test_finished_shards_are_not_written_again(
    class_folder: Path, tmp_path: Path, small_shards: None
):
    out = tmp_path / "out"
    original = (class_folder / "dogs" / "19.png").read_bytes()
    # Of the same size, so that it is the same source when the image is there again.
    (class_folder / "dogs" / "19.png").write_bytes(bytes(len(original)))
    with pytest.raises(UserError):
        prepare(str(class_folder), out, PIXELS)
    (class_folder / "dogs" / "19.png").write_bytes(original)
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.bin")}
    assert len(before) in (5, 6)  # one more may be finished before the reader's error arrives
    seen = []
    prepare(str(class_folder), out, PIXELS, lambda done, total: seen.append((done, total)))
    assert before.items() <= {p: p.stat().st_mtime_ns for p in out.glob("shard-*.bin")}.items()
    kept = sum(4 if path.name == "shard-00006.bin" else 6 for path in before)  # 40 = 6 · 6 + 4
    assert seen[0] == (kept, 40) and seen[-1] == (40, 40)
    prepare(str(class_folder), tmp_path / "whole", PIXELS)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_set_is_left_alone(class_folder: Path, tmp_path: Path):
    manifest = prepare(str(class_folder), tmp_path / "out", PIXELS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")}
    assert prepare(str(class_folder), tmp_path / "out", PIXELS) == manifest
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("[!.]*")}


def test_other_settings_or_images_do_not_mix(class_folder: Path, tmp_path: Path):
    prepare(str(class_folder), tmp_path / "out", PIXELS)
    with pytest.raises(UserError, match=r"another image_size \(16, now 8\)"):
        prepare(str(class_folder), tmp_path / "out", PrepareConfig(8, "none"))
    random_image(0, 9, 9).save(class_folder / "cats" / "0.png")
    with pytest.raises(UserError, match="another fingerprint"):
        prepare(str(class_folder), tmp_path / "out", PIXELS)


def start(source: Path, out: Path, processes: int) -> subprocess.Popen[bytes]:
    code = (
        "import sys\n"
        "if __name__ == '__main__':\n"
        "    from selfalign.data.latents import layout, workers\n"
        "    layout.SMALLEST_SHARD, workers.ENCODE_BATCH = 50, 4\n"
        "    from selfalign.cli import main\n"
        f"    sys.exit(main(['prepare', {str(source)!r}, {str(out)!r}, '--image-size', '256',\n"
        f"        '--vae', 'none', '--processes', '{processes}']))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path):
    for i in range(500):
        (tmp_path / "images").mkdir(exist_ok=True)
        random_image(i, 300, 300).save(tmp_path / "images" / f"{i}.bmp")
    assert start(tmp_path / "images", tmp_path / "whole", 1).wait() == 0
    kills, random = 0, np.random.default_rng(0)
    out = tmp_path / "out"
    finished: dict[Path, int] = {}
    while not (out / "manifest.json").exists():
        process = start(tmp_path / "images", out, processes=1 + kills % 2)
        while process.poll() is None and len(list(out.glob("shard-*.json"))) <= len(finished):
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        time.sleep(0.1)
        now = {
            path: path.with_suffix(".bin").stat().st_mtime_ns for path in out.glob("shard-*.json")
        }
        if not (out / "manifest.json").exists():
            assert finished.items() <= now.items()
        finished = now
        assert kills < 100
    assert kills > 3
    assert contents(out) == contents(tmp_path / "whole")
    assert verify(out) == {}


def test_two_at_once(class_folder: Path, tmp_path: Path):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being prepared by another process"):
            prepare(str(class_folder), tmp_path / "out", PIXELS)


# The disk


def test_read_only_output(class_folder: Path):
    with pytest.raises(UserError, match=r"cannot write to '/proc/selfalign'"):
        prepare(str(class_folder), Path("/proc/selfalign"), PIXELS)


def test_output_inside_the_source(class_folder: Path):
    with pytest.raises(UserError, match="inside the source"):
        prepare(str(class_folder), class_folder / "out", PIXELS)


def test_too_little_space_is_said_before_the_work(
    class_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"images need [\d.]+ kB in .*, where 1\.0 kB are free"):
        prepare(str(class_folder), tmp_path / "out", PIXELS)


def test_a_disk_that_fills_up_loses_nothing(class_folder: Path, tmp_path: Path, small_shards: None):
    """RLIMIT_FSIZE refuses to write past a size, where a full disk refuses to write at all."""
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (4000, hard)
    )  # a shard has 4,608 bytes, the last 3,072
    try:
        with pytest.raises(UserError, match=r"shard-0000\d\.bin cannot be written: File too large"):
            prepare(str(class_folder), out, PIXELS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(out.glob("*.part"))
    prepare(str(class_folder), out, PIXELS)
    assert verify(out) == {}


def test_a_disk_that_is_too_small_for_the_autoencoder(
    class_folder: Path, tmp_path: Path, autoencoder: Path
):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(UserError, match=r"autoencoder cannot be written: .*File too large"):
            prepare(str(class_folder), tmp_path / "out", PrepareConfig(16, str(autoencoder)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()


# Verification


@pytest.fixture
def prepared(class_folder: Path, tmp_path: Path, autoencoder: Path, small_shards: None) -> Path:
    prepare(str(class_folder), tmp_path / "out", PrepareConfig(16, str(autoencoder)))
    assert verify(tmp_path / "out") == {}
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("shard-00002.bin", "flip", "is damaged"),
        ("shard-00003.bin", "cut", "is truncated: it holds"),
        ("shard-00006.bin", "remove", "is missing"),
        ("shard-00001.bin", "extend", "is too long"),
        ("shard-00002.xxh3", "flip", "shard-00002.bin is intact and has other checksums"),
        ("shard-00004.xxh3", "cut", "is truncated: it holds"),
        ("shard-00005.xxh3", "remove", "is missing"),
        ("index.npy", "flip", "is damaged"),
        ("index.npy", "remove", "cannot be read: No such file"),
        ("autoencoder/diffusion_pytorch_model.safetensors", "flip", "weights differ"),
        ("autoencoder/diffusion_pytorch_model.safetensors", "cut", "cannot be read"),
    ],
)
def test_verify_finds(
    prepared: Path, file: str, damage: str, said: str, capsys: pytest.CaptureFixture[str]
):
    path = prepared / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "flip":
        content[-777 % len(content)] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content + b"0")
    problems = verify(prepared)
    assert list(problems) == [file.partition("/")[0]]
    assert said in problems[file.partition("/")[0]]
    assert main(["prepare", "--verify", str(prepared)]) == 2
    error = capsys.readouterr().err
    assert file.partition("/")[0] in error and said in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 99}', '{"format": 1}'])
def test_damaged_manifest(tmp_path: Path, content: str):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        verify(tmp_path)


def test_verify_what_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="no prepared data set"):
        verify(tmp_path)


# The command


@pytest.mark.parametrize(
    "words", [["--help"], ["--verify", "x", "--help"], ["a", "b", "--dtype", "x"]]
)
def test_help_and_refusals_need_no_torch(words: list[str]):
    script = (
        "import sys; from selfalign.cli import main\n"
        f"try: code = main(['prepare', *{words}])\n"
        "except SystemExit as end: code = end.code\n"
        "print(code, sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stderr.endswith(f"{0 if '--help' in words else 2} []\n"), done.stdout + done.stderr


def test_command(class_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "out")
    words = ["prepare", str(class_folder), out, "--image-size", "16", "--vae", "none"]
    assert main(words) == 0
    assert "40 images, 2 classes, as pixels in 1 files" in capsys.readouterr().out
    assert main(["prepare", "--verify", out]) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["format"] == 1
    for wrong in (
        ["--image-size", "0"],
        ["--vae", "nothing"],
        ["--dtype", "int8"],
        ["--processes"],
    ):
        assert main([*words, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
