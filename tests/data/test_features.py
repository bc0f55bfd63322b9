"""Features beside a set and in the cache: the same however they came about, and of these very images."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_images import make_images
from support import on_cpus

from selfalign import UserError, load_plugin
from selfalign.cli import main
from selfalign.data.datasets import open_data
from selfalign.data.features import Encoded
from selfalign.data.images import read_image
from selfalign.data.latents import layout, workers
from selfalign.data.latents.prepare import prepare
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.store import features_folder, read_manifest
from selfalign.data.latents.verify import verify
from selfalign.sections import DataConfig
from selfalign.vision import encoder_sha256, open_encoder

PLUGIN = str(Path(__file__).parent.parent / "small_encoder.py")
WORDS = ("small", "small:1@16+class")


@pytest.fixture(autouse=True)
def _small(forget_parts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The small encoder, shards of 6 images, and a cache of one's own."""
    open_encoder.cache_clear()
    load_plugin(PLUGIN)
    monkeypatch.setattr(layout, "SMALLEST_SHARD", 6)
    monkeypatch.setattr(workers, "ENCODE_BATCH", 4)
    monkeypatch.setenv("SELFALIGN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", 10)


def config(**settings) -> PrepareConfig:
    return PrepareConfig(**{"image_size": 32, "vae": "none", "dtype": "float32", **settings})


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def encoded(root: Path, **settings) -> Encoded:
    data = DataConfig(name="latents", root=str(root), **settings)
    return Encoded(open_data(data), data, "targets.frozen-encoder.encoders")


def of_training_images(images: Path, word: str, positions: np.ndarray) -> torch.Tensor:
    files = sorted(images.rglob("*.png"))
    chosen = torch.stack([read_image(files[i], 32) for i in positions]).float() / 255
    return open_encoder(word, 32)(chosen)


@on_cpus
def test_several_encoders_beside_the_images(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(images), out, config(encoder=WORDS))
    found = encoded(out)
    split = found.split
    for word in WORDS:
        features = found.stored(word)
        assert features.encoder_sha256 == encoder_sha256(open_encoder(word, 32))
        expected = of_training_images(images, word, split.positions[[3, 0, 11]])
        read = features.read([3, 0, 11])
        assert read.shape[1:] == features.shape
        torch.testing.assert_close(read, expected)
    assert verify(out) == {}


def test_are_added_to_a_finished_set_which_stays_as_it_is(images: Path, tmp_path: Path) -> None:
    out, at_once = tmp_path / "out", tmp_path / "at-once"
    prepare(str(images), out, config())
    before = contents(out)
    prepare(str(images), out, config(encoder=WORDS))
    assert before.items() <= contents(out).items()
    prepare(str(images), at_once, config(encoder=WORDS))
    assert contents(at_once) == contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}
    prepare(str(images), out, config(encoder=WORDS))
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*.bin")}


@pytest.mark.slow
def test_processes_do_not_change_the_result(images: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        settings = config(encoder=("small",), processes=processes)
        prepare(str(images), tmp_path / str(processes), settings)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@on_cpus
def test_mirrored_images_have_features_of_their_own(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(images), out, config(encoder=("small",), flip=True))
    found = encoded(out, flip=True)
    plain, mirrored = (found.stored("small").read([2], [seed]) for seed in (0, 1))
    pixels, seen = (found.split.read([2], [seed])[0] for seed in (0, 1))
    assert torch.equal(seen, pixels.flip(-1)) and not torch.equal(plain, mirrored)
    torch.testing.assert_close(mirrored, open_encoder("small", 32)((seen + 1) / 2))
    again = tmp_path / "again"
    prepare(str(images), again, config(encoder=("small",)))
    with pytest.raises(UserError, match=r"data\.flip is True, but the features in .* --flip"):
        encoded(again, flip=True).stored("small")


@on_cpus
def test_unreadable_images_have_none(images: Path, tmp_path: Path) -> None:
    (images / "a" / "004.png").write_bytes(b"no image")
    out = tmp_path / "out"
    prepare(str(images), out, config(encoder=("small",), skip_unreadable=True))
    found = encoded(out)
    assert read_manifest(features_folder(out, "small")).records == read_manifest(out).records == 19
    kept = [i for i in range(20) if i != 4]
    positions = np.array(kept)[found.split.positions[[0, 4, 9]]]
    torch.testing.assert_close(
        found.stored("small").read([0, 4, 9]), of_training_images(images, "small", positions)
    )


def test_a_killed_preparation_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SMALLEST_SHARD", 512)  # as in the process that is killed
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    prepare(str(images), whole, config(encoder=("small",)))
    command = [
        *(sys.executable, "-m", "selfalign.cli", "prepare", str(images), str(killed)),
        *("--image-size", "32", "--vae", "none", "--dtype", "float32", "--encoder", "small"),
        *("--plugins", PLUGIN),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = killed / "features" / "small"
    deadline = time.monotonic() + 60
    while not any(folder.glob("*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    prepare(str(images), killed, config(encoder=("small",)))
    assert contents(killed) == contents(whole)
    assert verify(killed) == {}


def test_damage_is_found(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(images), out, config(encoder=("small",)))
    shard = features_folder(out, "small") / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert verify(out) == {
        "features/small/shard-00000.bin": "is damaged: its checksum differs from the manifest's"
    }
    features = encoded(out).stored("small")
    with pytest.raises(UserError, match=r"shard-00000\.bin is damaged"):
        features.read(list(range(len(features.positions))))
    shard.write_bytes(content[:-4])
    with pytest.raises(UserError, match="is truncated"):
        encoded(out).stored("small")


def test_of_other_images_are_refused(images: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    prepare(str(images), out, config(encoder=("small",)))
    changed = tmp_path / "changed"
    shutil.copytree(images, changed)
    shutil.copy(images / "a" / "000.png", changed / "a" / "001.png")
    prepare(str(changed), other, config())
    shutil.copytree(out / "features", other / "features")
    with pytest.raises(UserError, match="were made of other images .fingerprint"):
        encoded(other).stored("small")
    with pytest.raises(UserError, match="was made with another fingerprint"):
        prepare(str(changed), other, config(encoder=("small",)))


def rewrite(path: Path, **changes) -> None:
    """A file of JSON with other values at the top, or in a `layout`."""
    record = json.loads(path.read_text())
    for name, value in changes.items():
        (record if name in record else record["layout"])[name] = value
    path.write_text(json.dumps(record))


def test_a_manifest_that_says_something_else_is_refused(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(images), out, config(encoder=("small",)))
    folder = features_folder(out, "small")
    manifest, whole = folder / "manifest.json", (folder / "manifest.json").read_text()
    rewrite(manifest, encoder="small:4")
    with pytest.raises(UserError, match="features of 'small:4': those of 'small' were expected"):
        encoded(out).stored("small")
    manifest.write_text(whole)
    rewrite(manifest, record_checksums=None)
    with pytest.raises(UserError, match="record_checksums: features have them"):
        encoded(out).stored("small")
    manifest.write_text(whole)
    rewrite(manifest, shards=json.loads(whole)["shards"][:1])
    with pytest.raises(UserError, match="holds features of 6 images, and number"):
        encoded(out).stored("small")


def test_missing_features_name_the_command(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(str(images), out, config())
    with pytest.raises(
        UserError,
        match=r"has no features of it; make them with `selfalign prepare .* "
        r"--encoder small:3`",
    ):
        encoded(out).stored("small:3")
    assert encoded(out).when(("small",), "auto") == "every-step"  # these are pixels


def test_latents_have_none_to_see_unless_images_are_kept(
    images: Path, tmp_path: Path, autoencoder: Path
) -> None:
    out = tmp_path / "out"
    prepare(str(images), out, config(vae=str(autoencoder)))
    found = encoded(out)
    assert found.when(("small",), "auto") == "once"
    with pytest.raises(
        UserError, match=r"holds latents, and encoders see images; .*--encoder images"
    ):
        found.describe("small", "every-step")
    prepare(str(images), out, config(vae=str(autoencoder), encoder=("images",)))
    found = encoded(out)
    shape, _ = found.describe("small", "every-step")
    assert shape == (8, 8, 6) and found.image_side == 32
    kept = found.images()["images"].read([5]).permute(0, 3, 1, 2)
    files = sorted(images.rglob("*.png"))
    expected = read_image(files[found.split.positions[5]], 32)[None].float() / 255
    torch.testing.assert_close(kept, expected)


@on_cpus
def test_images_in_memory_are_encoded_once_into_the_cache(tmp_path: Path) -> None:
    data = DataConfig(name="digits", train_fraction=0.05)
    source = open_data(data)
    found = Encoded(source, data, "here")
    assert found.when(("small@32",), "auto") == "once"
    features = found.stored("small@32")
    (folder,) = (tmp_path / "cache" / "features").iterdir()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    x0, _ = source.train.read([0, 5])
    as_bytes = ((x0 + 1) * 127.5).round() / 255
    expected = open_encoder("small@32", 8)(as_bytes)
    torch.testing.assert_close(features.read([0, 5]).float(), expected, atol=0.01, rtol=0.01)
    again = Encoded(open_data(data), data, "here").stored("small@32")
    assert torch.equal(again.read([3]), features.read([3]))
    assert times == {path: path.stat().st_mtime_ns for path in folder.glob("*.bin")}


def test_sources_of_latents_have_no_images(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "vae-sd"
    folder.mkdir()
    for index in range(2):
        np.save(folder / f"{index}.npy", np.abs(np.random.rand(8, 4, 4)).astype(np.float32))
    (folder / "dataset.json").write_text(json.dumps({"labels": [["0.npy", 0], ["1.npy", 0]]}))
    words = ["--image-size", "32", "--vae", "ema", "--encoder", "small", "--plugins", PLUGIN]
    assert main(["prepare", str(folder), str(tmp_path / "out"), *words]) == 2
    assert "the source holds latents: encoders see images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
