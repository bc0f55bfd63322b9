"""Every kind of source yields the images and labels that went into it."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from small_images import FASHION_MNIST, random_image

from selfalign.data.latents.sources import Source, open_source
from selfalign.errors import UserError


def png(seed: int) -> bytes:
    file = io.BytesIO()
    random_image(seed).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def assert_holds(source: Source, seeds: list[int], labels: list[int], names: tuple[str, ...]):
    assert source.labels.tolist() == labels
    assert source.class_names == names
    assert len(source.names) == len(seeds)
    for index, seed in enumerate(seeds):
        with source.load(index) as image:
            assert np.array_equal(np.asarray(image), np.asarray(random_image(seed))), index


def test_class_folder_with_equal_and_strange_names(tmp_path: Path):
    odd = [("猫", "ñ é.png"), ("猫", "a.png"), ("dogs", "a.png")]
    for seed, (folder, name) in enumerate(odd):
        (tmp_path / folder).mkdir(exist_ok=True)
        random_image(seed).save(tmp_path / folder / name)
    source = open_source(str(tmp_path))
    assert_holds(source, [2, 1, 0], [0, 1, 1], ("dogs", "猫"))


def test_names_that_are_not_utf8(tmp_path: Path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102
    for seed in range(2):
        Path(os.fsdecode(folder + b"/\xff%d.png" % seed)).write_bytes(png(seed))
    source = open_source(str(tmp_path))
    assert_holds(source, [0, 1], [0, 0], ("caf\\udce9",))
    assert all(name.isprintable() for name in source.names)


def test_fingerprint_changes_with_the_files(class_folder: Path):
    before = open_source(str(class_folder)).fingerprint
    assert open_source(str(class_folder)).fingerprint == before
    random_image(999).save(class_folder / "cats" / "0.png")
    assert open_source(str(class_folder)).fingerprint != before


def test_tar_with_class_folders(tmp_path: Path):
    members = [("train/b/1.png", png(1)), ("train/a/1.png", png(2)), ("train/a/LICENSE", b"text")]
    source = open_source(str(write_tar(tmp_path / "images.tar", members)))
    assert_holds(source, [1, 2], [1, 0], ("a", "b"))


def test_tar_with_two_images_of_one_name(tmp_path: Path):
    members = [("1.png", png(1)), ("1.png", png(2))]
    source = open_source(str(write_tar(tmp_path / "images.tar", members)))
    assert_holds(source, [1, 2], [0, 0], ())


def test_tar_of_tars_as_imagenet_comes(tmp_path: Path):
    inner = []
    for label, name in enumerate(("n02", "n01")):
        path = write_tar(
            tmp_path / "inner.tar", [(f"{name}_{i}.png", png(10 * label + i)) for i in (0, 1)]
        )
        inner.append((f"{name}.tar", path.read_bytes()))
        path.unlink()
    source = open_source(str(write_tar(tmp_path / "train.tar", inner)))
    assert_holds(source, [0, 1, 10, 11], [1, 1, 0, 0], ("n01", "n02"))


def test_folder_of_tars_with_class_numbers_as_webdataset_writes_them(tmp_path: Path):
    for part in (0, 1):
        members = []
        for i in (0, 1):
            key = f"{part}{i}"
            members += [(f"{key}.cls", str(part + i).encode()), (f"{key}.png", png(10 * part + i))]
        write_tar(tmp_path / f"{part}.tar", members)
    source = open_source(str(tmp_path))
    assert_holds(source, [0, 1, 10, 11], [0, 1, 1, 2], ("0", "1", "2"))


@pytest.mark.parametrize("content", [b"", b"no tar file", b"\x1f\x8b" + bytes(600)])
def test_damaged_or_compressed_tar(tmp_path: Path, content: bytes):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar"):
        open_source(str(tmp_path / "x.tar"))


def rows(library):
    features = library.Features(
        {"image": library.Image(), "label": library.ClassLabel(names=["cat", "dog"])}
    )
    content = {
        "image": [{"bytes": png(i), "path": "same.png"} for i in range(3)],
        "label": [1, 0, 1],
    }
    return library.Dataset.from_dict(content, features=features)


@pytest.mark.parametrize("kind", ["parquet", "parquet folder", "arrow", "saved"])
def test_parquet_and_arrow(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "stored"
    if kind == "saved":
        rows(library).save_to_disk(path)
    elif kind == "arrow":
        rows(library).save_to_disk(path)
        path = next(path.glob("*.arrow"))
    else:
        path.mkdir()
        rows(library).to_parquet(path / "train-00000-of-00001.parquet")
        path = path if kind == "parquet folder" else next(path.iterdir())
    assert_holds(open_source(str(path)), [0, 1, 2], [1, 0, 1], ("cat", "dog"))


def test_vae_sd_folder(tmp_path: Path):
    moments = np.random.default_rng(0).normal(size=(3, 8, 4, 4)).astype(np.float32)
    names = [f"00000/img-mean-std-{i:08d}.npy" for i in range(3)]
    (tmp_path / "00000").mkdir()
    for name, array in zip(names, moments, strict=True):
        np.save(tmp_path / name, array)
    for labels in ([[name, 2 - i] for i, name in enumerate(names)], None):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
        source = open_source(str(tmp_path))
        assert source.moments
        assert source.labels.tolist() == ([2, 1, 0] if labels else [0, 0, 0])
        assert source.class_names == (("0", "1", "2") if labels else ())
        assert all(np.array_equal(source.load(i), moments[i]) for i in range(3))


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"labels": [["0.npy", 0]]}', '{"labels": [["0.npy", "a"], ["1.npy", 1]]}'],
)
def test_vae_sd_folder_with_a_bad_listing(tmp_path: Path, content: str):
    for i in (0, 1):
        np.save(tmp_path / f"{i}.npy", np.zeros((8, 4, 4), np.float32))
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json"):
        open_source(str(tmp_path))


def test_image_folder_with_dataset_json(tmp_path: Path):
    (tmp_path / "00000").mkdir()
    for i in (0, 1):
        random_image(i).save(tmp_path / "00000" / f"{i}.png")
    labels = [["00000/0.png", 1], ["00000/1.png", 0]]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert_holds(open_source(str(tmp_path)), [0, 1], [1, 0], ("0", "1"))


def test_torchvision_on_real_images(tmp_path: Path):
    if not FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for file in FASHION_MNIST.iterdir():
        (raw / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    source = open_source(f"torchvision:FashionMNIST:{tmp_path}")
    assert len(source.names) == len(source.labels) == 60_000
    assert np.bincount(source.labels).tolist() == [6_000] * 10
    assert source.class_names[9] == "Ankle boot"
    assert source.load(0).size == (28, 28)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("torchvision:Nothing", "CIFAR10"),
        ("torchvision:__all__", "CIFAR10"),
        ("nowhere", "no such file or folder"),
        ("{tmp}", "holds 0 images"),
        ("{tmp}/file.zip", "allowed are files that end in"),
    ],
)
def test_what_is_no_source(tmp_path: Path, source: str, said: str):
    if source.endswith("zip"):
        (tmp_path / "file.zip").touch()
    with pytest.raises(UserError, match=said):
        open_source(source.format(tmp=tmp_path))
