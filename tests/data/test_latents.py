"""Training reads a stored set: sampled from the posteriors, in order, from anywhere."""

import errno
import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import xxhash

from selfalign.data.datasets import open_data
from selfalign.data.latents import store
from selfalign.data.latents.autoencoder import load_autoencoder
from selfalign.data.latents.prepare import prepare
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.source import DataSource
from selfalign.data.stream import training_batches
from selfalign.errors import UserError
from selfalign.records import write_json
from selfalign.sections import DataConfig


def opened(root: Path, **settings) -> DataSource:
    return open_data(DataConfig(name="latents", root=str(root), **settings))


def write_set(root: Path, records: np.ndarray, shard: int, **layout) -> Path:
    """A set as `prepare` would write it, of given numbers; labels count up, the first is held out."""
    root.mkdir()
    shards = []
    for first in range(0, len(records), shard):
        part = records[first : first + shard]
        path = root / f"shard-{first // shard:05d}.bin"
        part.tofile(path)
        shards.append(store.Shard(path.name, len(part), store.file_sha256(path)))
        sums = [xxhash.xxh3_64_intdigest(view.tobytes()) for record in part for view in record]
        np.array(sums, "<u8").tofile(root / shards[-1].checksums)
    index = np.zeros((len(records), 2), np.int32)
    index[:, 0] = np.arange(len(records))
    index[0, 1] = 1
    np.save(root / "index.npy", index)
    described = store.Layout(
        **{
            "kind": "moments",
            "image_size": 256,
            "dtype": str(records.dtype),
            "shape": records.shape[1:],
            "scale": 0.5,
            "shift": 0.25,
            "autoencoder": "ema",
            "autoencoder_sha256": "",
            "class_names": tuple(map(str, range(len(records)))),
            "source": "",
            "fingerprint": "",
            "images": len(records),
            "shard_images": shard,
            **layout,
        }
    )
    manifest = store.Manifest(
        described, tuple(shards), store.file_sha256(root / "index.npy"), (), {}, "xxh3_64"
    )
    write_json(root / "manifest.json", manifest)
    return root


@pytest.fixture
def moments() -> np.ndarray:
    """11 images, two views, means 0 to 21 and standard deviations 1 to 2, of 2 × 4 × 4 numbers."""
    records = np.empty((11, 2, 4, 4, 4), np.float16)
    records[:, :, :2] = np.arange(22).reshape(11, 2, 1, 1, 1)
    records[:, :, 2:] = np.linspace(1, 2, 22).reshape(11, 2, 1, 1, 1)
    return records


def test_without_seeds_it_is_the_scaled_mean(tmp_path: Path, moments: np.ndarray):
    source = opened(write_set(tmp_path / "set", moments, 4))
    assert (source.channels, source.image_size, source.num_classes) == (2, (4, 4), 11)
    latents, labels = source.train.read([9, 0, 4, 4])
    assert labels.tolist() == [10, 1, 5, 5]  # 0 is held out
    assert torch.equal(latents[:, 0, 0, 0], torch.tensor([20.0, 2, 10, 10]) * 0.5 + 0.25)
    assert latents.shape == (4, 2, 4, 4) and latents.dtype == torch.float32
    assert source.heldout.read([0])[1].tolist() == [0]


def test_samples_are_the_posteriors(tmp_path: Path, moments: np.ndarray):
    source = opened(write_set(tmp_path / "set", moments, 4))
    latents, _ = source.train.read([5] * 4000, range(4000))
    mean, std = 12 * 0.5 + 0.25, float(moments[6, 0, 2, 0, 0]) * 0.5
    assert abs(latents.mean() - mean) < 0.01
    assert abs(latents.std() - std) < 0.01
    noise = (latents.flatten(1) - mean) / std
    correlations = torch.corrcoef(noise[:200]).fill_diagonal_(0)
    assert correlations.abs().max() < 0.9 and correlations.mean().abs() < 0.01


def test_a_sample_is_a_function_of_index_and_seed(tmp_path: Path, moments: np.ndarray):
    source = opened(write_set(tmp_path / "set", moments, 4), flip=True)
    together, _ = source.train.read([3, 7, 3], [5, 6, 7])
    for position, (index, seed) in enumerate([(3, 5), (7, 6), (3, 7)]):
        assert torch.equal(source.train.read([index], [seed])[0][0], together[position])
    assert not torch.equal(together[0], together[2])


def test_flip_reads_the_mirrored_copy(tmp_path: Path, moments: np.ndarray):
    moments[:, :, 2:] = 0
    source = opened(write_set(tmp_path / "set", moments, 4), flip=True)
    latents, _ = source.train.read([0] * 20, range(20))
    assert set(latents.unique().tolist()) == {2 * 0.5 + 0.25, 3 * 0.5 + 0.25}
    assert source.heldout.read([0], [1])[0].unique().tolist() == [0.25]
    plain = write_set(tmp_path / "plain", moments[:, :1], 4)
    with pytest.raises(UserError, match="without mirrored copies"):
        opened(plain, flip=True)


def test_pixels(class_folder: Path, tmp_path: Path):
    prepare(str(class_folder), tmp_path / "out", PrepareConfig(16, "none"))
    source = opened(tmp_path / "out", flip=True)
    folder = open_data(DataConfig(name="folder", root=str(class_folder), image_size=16))
    assert (source.channels, source.image_size) == (3, (16, 16))
    assert source.class_names == folder.class_names
    images, labels = source.train.read([0, 30])
    assert images.min() >= -1 and images.max() <= 1 and labels.tolist() == [0, 1]
    mirrored, _ = source.train.read([0, 30], [2, 3])
    assert torch.equal(mirrored, torch.stack([images[0], images[1].flip(-1)]))
    assert source.decode(images) is images


@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_resume(tmp_path: Path, moments: np.ndarray, workers: int):
    source = opened(write_set(tmp_path / "set", moments, 4))
    settings = {"seed": 3, "batch_size": 4, "last": 9, "workers": workers}
    whole = list(training_batches(source.train, first=0, **settings))
    resumed = list(training_batches(source.train, first=5, **settings))
    assert len(whole) == 9
    for a, b in zip(whole[5:], resumed, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    first_epoch = torch.cat([batch.labels for batch in whole])[:10]
    assert sorted(first_epoch.tolist()) == list(range(1, 11))


def test_reads_the_same_whether_or_not_the_page_cache_holds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    records = np.random.default_rng(0).normal(size=(40, 1, 8, 32, 32)).astype(np.float16)
    root = write_set(tmp_path / "set", records, 7)
    order = [30, 2, 17, 17, 38, 0]
    expected = torch.from_numpy(records[1:][order, 0])

    def read() -> torch.Tensor:
        split = opened(root).train
        return split.records.read(split.positions[order], [0] * len(order))

    def forget() -> None:
        for path in root.glob("*.bin"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    assert torch.equal(read(), expected)
    if hasattr(os, "posix_fadvise"):
        forget()
        assert torch.equal(read(), expected)

    refused = []
    preadv = os.preadv

    def no_such_flag(fd: int, buffers: list, offset: int, flags: int = 0) -> int:
        if flags:
            refused.append(offset)
            raise OSError(errno.EOPNOTSUPP, "not on this file system")
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", no_such_flag)
    assert torch.equal(read(), expected) and refused
    monkeypatch.delattr(os, "RWF_NOWAIT")  # nor on this system
    refused.clear()
    assert torch.equal(read(), expected) and not refused


def test_splits_travel_to_processes_that_share_nothing(tmp_path: Path, moments: np.ndarray):
    train = opened(write_set(tmp_path / "set", moments, 4)).train
    before = train.read([1, 8], [3, 4])[0]
    assert torch.equal(pickle.loads(pickle.dumps(train)).read([1, 8], [3, 4])[0], before)


# What can be wrong


def test_a_shard_that_changed(tmp_path: Path, moments: np.ndarray):
    root = write_set(tmp_path / "set", moments, 4)
    source = opened(root)
    with (root / "shard-00001.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"shard-00001\.bin is truncated"):
        opened(root)
    with pytest.raises(UserError, match=r"shard-00001\.bin ends early"):
        source.train.read([0, 5])
    (root / "shard-00001.bin").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.bin is missing"):
        opened(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_while_training(tmp_path: Path, moments: np.ndarray, workers: int):
    root = write_set(tmp_path / "set", moments, 4)
    source = opened(root)
    (root / "shard-00001.bin").unlink()
    batches = training_batches(
        source.train, seed=0, batch_size=10, first=0, last=2, workers=workers
    )
    with pytest.raises(UserError, match=r"shard-00001\.bin cannot be opened"):
        next(batches)


def test_unfinished_and_damaged_sets(tmp_path: Path, moments: np.ndarray):
    with pytest.raises(UserError, match="make or finish it with `selfalign prepare"):
        opened(tmp_path)
    root = write_set(tmp_path / "set", moments, 4)
    np.save(root / "index.npy", np.zeros((3, 2), np.int32))
    with pytest.raises(UserError, match=r"index\.npy is damaged"):
        opened(root)
    (root / "index.npy").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=r"index\.npy cannot be read"):
        opened(root)


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("record", [0, 5, 10])
def test_a_changed_bit_is_found(tmp_path: Path, moments: np.ndarray, record: int, view: int):
    """When a small set is opened, and in a large one when the record is read."""
    root = write_set(tmp_path / "set", moments, 4)
    source = opened(root, flip=True)
    path = root / f"shard-{record // 4:05d}.bin"
    content = bytearray(path.read_bytes())
    content[(record % 4 * 2 + view) * 128 + 77] ^= 64
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        opened(root)
    split = source.heldout if record == 0 else source.train
    if record == 0 and view == 1:
        split.read([0])  # held-out images are not mirrored
        return
    with pytest.raises(UserError, match=rf"{path.name} is damaged: .*--verify"):
        split.read([max(0, record - 1)], [view])


def test_sets_of_version_0_1_0_are_read(tmp_path: Path, moments: np.ndarray):
    root = write_set(tmp_path / "set", moments, 4)
    expected, latents = opened(root).fingerprint, opened(root).train.read([1])[0]
    manifest = json.loads((root / "manifest.json").read_text())
    del manifest["layout"]["background"], manifest["record_checksums"], manifest["left_out"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    for path in root.glob("*.xxh3"):
        path.unlink()
    source = opened(root)
    assert source.fingerprint == expected
    assert torch.equal(source.train.read([1])[0], latents)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(("layout",), value) for value in (None, 5, [], {})],
        *[(("layout", "kind"), value) for value in ("pixels", "x", None)],
        *[(("layout", "dtype"), value) for value in ("float32", "int64", "object", "<U9", 3)],
        *[(("layout", "scale"), value) for value in ("x", None, 0, 10**400, True)],
        *[(("layout", "shape"), value) for value in ([2, 4, 4], [2, 4, 4, -4], [2, 10**12, 4, 4])],
        *[(("layout", "shape"), value) for value in ([2, 3, 4, 4], [9, 4, 4, 4], "2444")],
        *[(("layout", "class_names"), value) for value in ([], ["a"], [["x"]] * 11, "text")],
        *[(("layout", "images"), value) for value in (-1, 10**30, 1.5)],
        (("layout", "image_size"), 0),
        (("layout", "more"), 1),
        *[(("shards",), value) for value in ([], 5, None, [5])],
        *[(("shards", 0, "file"), value) for value in ("/dev/zero", "../x", 5, "", "shard-1.bin")],
        *[(("shards", 0, "records"), value) for value in (-1, 10**15, "4", None)],
        *[(("shards", 0, "sha256"), value) for value in (5, "x")],
        *[(("index_sha256",), value) for value in (5, None, "0" * 64)],
        *[(("format",), value) for value in (0, 2, "x", None)],
        (("more",), 1),
    ],
)
def test_manifests_that_are_wrong(tmp_path: Path, moments: np.ndarray, field: tuple, value: object):
    root = write_set(tmp_path / "set", moments, 4)
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    place = manifest
    for key in field[:-1]:
        place = place[key]
    place[field[-1]] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as error:
        opened(root)
    assert "\n" not in str(error.value) and str(root) in str(error.value)


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [(0, -5, "labels from -5"), (0, 999, "labels from 1 to 999"), (1, 2, "allowed are 0 and 1")],
)
def test_indexes_that_are_wrong(
    tmp_path: Path, moments: np.ndarray, column: int, value: int, said: str
):
    root = write_set(tmp_path / "set", moments, 4)
    index = np.load(root / "index.npy")
    index[0, column] = value
    np.save(root / "index.npy", index)
    with pytest.raises(UserError, match=r"index\.npy is damaged: its checksum"):
        opened(root)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["index_sha256"] = store.file_sha256(root / "index.npy")
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=said):
        opened(root)


# The autoencoder


@pytest.fixture
def encoded(class_folder: Path, tmp_path: Path, autoencoder: Path) -> Path:
    prepare(str(class_folder), tmp_path / "out", PrepareConfig(16, str(autoencoder), "float32"))
    return tmp_path / "out"


def test_decode_inverts_scale_and_shift(encoded: Path, autoencoder: Path):
    source = opened(encoded)
    latents, _ = source.train.read(range(39))
    model = load_autoencoder(str(autoencoder))
    with torch.inference_mode():
        expected = model.decode(latents / model.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(source.decode(latents), expected)


def test_reading_needs_no_autoencoder(encoded: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.rmtree(encoded / "autoencoder")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    source = opened(encoded)
    assert torch.isfinite(source.train.read([0, 1], [2, 3])[0]).all()
    with pytest.raises(UserError, match=r"pip install 'selfalign\[latents\]'"):
        source.decode(torch.zeros(1, 4, 8, 8))


def test_decode_without_the_autoencoder(encoded: Path, tmp_path: Path):
    source = opened(encoded)
    path = encoded / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["layout"]["autoencoder"] = str(tmp_path / "moved")
    path.write_text(json.dumps(manifest))
    kept = (encoded / "autoencoder").rename(tmp_path / "kept")
    with pytest.raises(UserError, match=r"cannot be turned into images.*put the autoencoder that"):
        opened(encoded).decode(torch.zeros(1, 4, 8, 8))
    kept.rename(encoded / "autoencoder")
    assert source.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)


def test_decode_with_another_autoencoder(encoded: Path):
    model = load_autoencoder(str(encoded / "autoencoder"))
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(encoded / "autoencoder")
    with pytest.raises(UserError, match="but the latents were encoded by"):
        opened(encoded).decode(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("package", ["diffusers", "datasets"])
def test_the_extra_is_named_where_it_is_missing(
    class_folder: Path, tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)
    source, vae = str(class_folder), "ema"
    if package == "datasets":
        source, vae = str(tmp_path / "x.parquet"), "none"
        Path(source).touch()
    with pytest.raises(UserError, match=r"pip install 'selfalign\[latents\]'"):
        prepare(source, tmp_path / "out", PrepareConfig(16, vae))


# Size


def test_all_of_imagenet_opens_at_once(tmp_path: Path):
    """1,281,167 images as sparse files: their size is what opening could depend on."""
    images, shard_images = 1_281_167, 20_019
    root = write_set(tmp_path / "set", np.zeros((2, 1, 8, 32, 32), np.float16), 1)
    manifest = store.read_manifest(root)
    shards = []
    for number, first in enumerate(range(0, images, shard_images)):
        records = min(shard_images, images - first)
        shards.append(store.Shard(f"shard-{number:05d}.bin", records, "0" * 64))
        with (root / shards[-1].file).open("wb") as file:
            file.truncate(records * manifest.layout.record_bytes)
        hole = xxhash.xxh3_64_intdigest(bytes(manifest.layout.record_bytes))
        np.full(records, hole, "<u8").tofile(root / shards[-1].checksums)
    index = np.full((images, 2), (7, 0), np.int32)
    index[::100, 1] = 1
    np.save(root / "index.npy", index)
    layout = msgspec.structs.replace(manifest.layout, class_names=tuple(map(str, range(8))))
    digest = store.file_sha256(root / "index.npy")
    write_json(
        root / "manifest.json", store.Manifest(layout, tuple(shards), digest, (), {}, "xxh3_64")
    )
    begun = time.perf_counter()
    source = opened(root)
    seconds = time.perf_counter() - begun
    assert len(source.train) + len(source.heldout) == images
    latents, labels = source.train.read([0, len(source.train) - 1], [0, 1])
    assert latents.shape == (2, 4, 32, 32) and labels.tolist() == [7, 7]
    assert seconds < 1
