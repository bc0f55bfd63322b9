"""Every kind of source yields the images and labels that went into it."""

import gzip
import io
import json
import math
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from small_images import FASHION_MNIST, random_image

from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources import Source, open_source
from selfalign.errors import UserError


def png(seed: int) -> bytes:
    file = io.BytesIO()
    random_image(seed).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
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


def test_a_large_folder_is_listed_once(class_folder: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(30):
        shutil.copytree(class_folder / "cats", class_folder / f"{number}")
    scanned: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(str(path)) or scandir(path))
    assert len(open_source(str(class_folder)).names) == 32 * 20
    twice = {path for path in scanned if scanned.count(path) > 1} - {str(class_folder)}
    assert len(twice) <= 1


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


def write_shards(folder: Path, names: list[str], *members: list[tuple[str, bytes]]) -> None:
    for name, held in zip(names, members, strict=True):
        write_tar(folder / name, held)


@pytest.mark.parametrize(
    "names", [["x-000000.tar", "x-000001.tar"], ["train-00007-of-9.tar", "train-00008-of-9.tar"]]
)
def test_numbered_tars_are_parts_of_a_set_and_their_folders_classes(
    tmp_path: Path, names: list[str]
):
    write_shards(
        tmp_path,
        names,
        [("cats/1.png", png(1)), ("dogs/1.png", png(2))],
        [("./dogs/2.png", png(3)), ("./cats/2.png", png(4))],
    )
    assert_holds(open_source(str(tmp_path)), [1, 2, 3, 4], [0, 1, 1, 0], ("cats", "dogs"))


@pytest.mark.parametrize(
    ("names", "beside"),
    [
        (["0.tar", "1.tar"], []),
        (["class01.tar", "class02.tar"], []),
        (["a.tar", "b.tar"], [("1.json", b"{}")]),  # WebDataset's samples
    ],
)
def test_tars_that_may_be_classes_or_parts_are_asked_about(
    tmp_path: Path, names: list[str], beside: list[tuple[str, bytes]]
):
    write_shards(
        tmp_path, names, [("1.png", png(1)), *beside], [("1.png", png(2)), ("2.png", png(3))]
    )
    with pytest.raises(UserError, match=r"to .* may be classes, or parts .*--label-key archive or"):
        open_source(str(tmp_path))
    classes = open_source(str(tmp_path), PrepareConfig(label_key="archive"))
    assert_holds(classes, [1, 2, 3], [0, 1, 1], tuple(Path(name).stem for name in names))
    assert_holds(
        open_source(str(tmp_path), PrepareConfig(label_key="none")), [1, 2, 3], [0] * 3, ()
    )
    with pytest.raises(
        UserError, match="label_key is 'json': allowed for tar files are archive, n"
    ):
        open_source(str(tmp_path), PrepareConfig(label_key="json"))


def test_a_tar_for_each_class_and_tars_in_class_folders(tmp_path: Path):
    write_shards(
        tmp_path / "each",
        ["n01440764.tar", "n01443537.tar"],
        [("1.png", png(1))],
        [("1.png", png(2))],
    )
    assert_holds(open_source(str(tmp_path / "each")), [1, 2], [0, 1], ("n01440764", "n01443537"))
    for label, name in enumerate(("cats", "dogs")):
        write_shards(
            tmp_path / "folders" / name,
            ["000.tar", "001.tar"],
            [("1.png", png(10 * label))],
            [("1.png", png(10 * label + 1))],
        )
    assert_holds(
        open_source(str(tmp_path / "folders")), [0, 1, 10, 11], [0, 0, 1, 1], ("cats", "dogs")
    )


@pytest.mark.parametrize("content", [b"", b"no tar file", b"\x1f\x8b" + bytes(600)])
def test_damaged_or_compressed_tar(tmp_path: Path, content: bytes):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar"):
        open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("cut", ["between members", "in a header", "a damaged header"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_tar_that_loses_images_says_so(tmp_path: Path, cut: str, nested: bool):
    """tarfile takes all of these for the end."""
    members = [(f"{i}.png", png(i)) for i in range(4)]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    content = path.read_bytes()
    path.write_bytes(
        {
            "between members": content[:third],
            "in a header": content[: third + 100],
            "a damaged header": content[:third] + b"\xff" * 512 + content[third + 512 :],
        }[cut]
    )
    if nested:
        write_tar(tmp_path / "outer.tar", [("x.tar", path.read_bytes()), ("y.png", png(9))])
        path = tmp_path / "outer.tar"
    with pytest.raises(
        UserError, match="x is damaged or cut off after 2 members.*--skip-unreadable"
    ):
        open_source(str(path))
    rest = open_source(str(path), PrepareConfig(skip_unreadable=True))
    assert len(rest.names) == 2 + nested
    assert rest.left_out == {"archives that are damaged or cut off": 1}


def rows(library):
    features = library.Features(
        {"image": library.Image(), "label": library.ClassLabel(names=["cat", "dog"])}
    )
    content = {
        "image": [{"bytes": png(i), "path": "same.png"} for i in range(3)],
        "label": [1, 0, 1],
    }
    return library.Dataset.from_dict(content, features=features)


@pytest.mark.parametrize("kind", ["parquet", "parquet folder", "arrow", "saved", "saved splits"])
def test_parquet_and_arrow(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "stored"
    if kind == "saved":
        rows(library).save_to_disk(path)
    elif kind == "saved splits":
        splits = {"train": rows(library), "test": rows(library).select([0])}
        library.DatasetDict(splits).save_to_disk(path)
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


# WebDataset: one image of each sample


def sample(number: int, *endings: str, label: int | None = 0) -> list[tuple[str, bytes]]:
    """The files of a sample; each image of another seed."""
    files = [(f"{number:03}.{ending}", png(10 * number + i)) for i, ending in enumerate(endings)]
    return files + ([] if label is None else [(f"{number:03}.cls", str(label).encode())])


@pytest.mark.parametrize("label", [0, None])
def test_a_mask_beside_an_image_is_none(tmp_path: Path, label: int | None):
    members = [m for n in range(3) for m in sample(n, "png", "mask.png", "seg.png", label=label)]
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert_holds(source, [0, 10, 20], [0, 0, 0], ("0",) if label == 0 else ())
    assert source.left_out == {"images beside .png": 6}


def test_of_several_images_one_is_chosen_by_its_key(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", [m for n in range(3) for m in sample(n, "png", "jpg")])
    with pytest.raises(UserError, match=r"several images \(jpg, png\): choose one by --image-key"):
        open_source(str(path))
    for key, seeds in (("png", [0, 10, 20]), (".JPG", [1, 11, 21])):
        chosen = open_source(str(path), PrepareConfig(image_key=key))
        assert_holds(chosen, seeds, [0, 0, 0], ("0",))
    with pytest.raises(UserError, match="no image ends so; allowed are jpg, png"):
        open_source(str(path), PrepareConfig(image_key="webp"))


@pytest.mark.parametrize("beside", ["cls", "json", "txt", None])
def test_words_that_tell_images_of_a_sample_apart_are_asked_about(
    tmp_path: Path, beside: str | None
):
    members = [m for n in range(3) for m in sample(n, "image.png", "mask.png", label=None)]
    if beside is not None:
        members += [(f"{n:03}.{beside}", b"1") for n in range(3)]
    path = write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError, match=r"several images \(image.png, mask.png\): .*--image-key"):
        open_source(str(path))
    chosen = open_source(str(path), PrepareConfig(image_key="image.png"))
    with_classes = beside == "cls"
    assert_holds(chosen, [0, 10, 20], [with_classes] * 3, ("0", "1") if with_classes else ())


def test_classes_without_an_image_are_counted(tmp_path: Path):
    members = [m for n in range(3) for m in sample(n, "png")] + [("999.cls", b"0")]
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    assert source.left_out == {".cls without an image": 1}


def test_dots_in_names_of_plain_tars_say_nothing(tmp_path: Path):
    names = ["photo.1.png", "photo.2.png", "v1.0/photo.png"]
    members = [(name, png(seed)) for seed, name in enumerate(names)]
    assert len(open_source(str(write_tar(tmp_path / "x.tar", members))).names) == 3


def test_splits_of_a_data_set_are_not_mixed(tmp_path: Path):
    for name in ("imagenet-train-000", "imagenet-val-000"):
        write_tar(tmp_path / f"{name}.tar", sample(1, "png"))
    with pytest.raises(UserError, match=r"several splits of a data set \(train, val\)"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["../../outside.png", "/etc/outside.png", "a/../../b.png", "C:\\x.png"]
)
def test_names_in_tars_lead_nowhere(tmp_path: Path, name: str):
    members = [(name, png(1)), ("a.png", png(2)), ("z.png", png(3))]
    source = open_source(str(write_tar(tmp_path / "in" / "x.tar", members)))
    for index in range(len(source.names)):
        source.load(index).close()
    assert len(source.names) == (2 if ".." in name else 3)  # those that lead out are left out
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["in", "x.tar"]


def test_links_and_devices_in_tars_are_passed_over(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f"{number}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for number in range(2):
            info = tarfile.TarInfo(f"real{number}.png")
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))
    source = open_source(str(tmp_path / "x.tar"))
    assert_holds(source, [0, 1], [0, 0], ())
    assert source.left_out == {"links and devices": 3}


@pytest.mark.parametrize(("name", "content"), [("0.eps", b"%!PS"), ("0.png", b"")])
def test_members_that_are_no_images(tmp_path: Path, name: str, content: bytes):
    path = write_tar(tmp_path / "x.tar", [(name, content), ("1.png", png(1)), ("2.png", png(2))])
    with pytest.raises(UserError, match=rf"x/{name} is not a readable image: it is"):
        open_source(str(path))
    source = open_source(str(path), PrepareConfig(skip_unreadable=True))
    assert_holds(source, [1, 2], [0, 0], ())
    assert source.left_out == {"unreadable": 1}


def test_two_classes_of_one_image(tmp_path: Path):
    path = write_tar(tmp_path / "x.tar", [*sample(0, "png"), ("000.cls", b"1"), *sample(1, "png")])
    with pytest.raises(UserError, match=r"000\.cls is there twice"):
        open_source(str(path))


def test_archives_nested_too_deep(tmp_path: Path):
    content = write_tar(tmp_path / "x.tar", sample(0, "png")).read_bytes()
    for _ in range(20):
        content = write_tar(tmp_path / "x.tar", [("y.tar", content)]).read_bytes()
    with pytest.raises(UserError, match="nested more than 16 deep"):
        open_source(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("content", [b"", b"cat", b"1.5", b"-1", b"9" * 30, b"7" * 1000, b"\xff"])
def test_class_numbers_that_are_none(tmp_path: Path, content: bytes):
    members = [("0.png", png(0)), ("0.cls", content), *sample(1, "png")]
    with pytest.raises(UserError, match=r"holds no whole number|labels from"):
        open_source(str(write_tar(tmp_path / "x.tar", members)))


# dataset.json


def listed(root: Path, labels: object) -> str:
    for i in range(3):
        random_image(i).save(root / f"{i}.png")
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return str(root)


WHOLE = [["0.png", 0], ["1.png", 1], ["2.png", 2]]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([*WHOLE, ["0.png", 0]], "two entries for '0.png'"),
        (WHOLE[:2], "no entry for '2.png'"),
        ([*WHOLE, ["3.png", 0]], "an entry for a file that is not there: '3.png'"),
        ([*WHOLE, ["../0.png", 0]], "an entry for a file that is not there: '../0.png'"),
        ([[f"{i + 1}.png", i] for i in range(3)], "no entry for '0.png'"),
        ([["0.png", -1], *WHOLE[1:]], "labels from -1 to 2"),
        ([["0.png", 10**12], *WHOLE[1:]], "labels from 1 to 1000000000000"),
        ([["0.png", 10**40], *WHOLE[1:]], r"dataset\.json"),
        ([["0.png", [1]], *WHOLE[1:]], r"labels\[0\]\[1\]: Expected `int`"),
        ([["0.png", 0, 0], *WHOLE[1:]], r"labels\[0\]"),
        ({"0.png": 0}, "labels: Expected `array"),
        (5, "labels"),
    ],
)
def test_listings_that_do_not_fit_their_files(tmp_path: Path, labels: object, said: str):
    with pytest.raises(UserError, match=said) as error:
        open_source(listed(tmp_path, labels))
    assert "dataset.json" in str(error.value)


def test_files_that_are_listed_and_not_there_may_be_left_out(tmp_path: Path):
    source = listed(tmp_path, [*WHOLE, ["3.png", 0]])
    opened = open_source(source, PrepareConfig(skip_unreadable=True))
    assert_holds(opened, [0, 1, 2], [0, 1, 2], ("0", "1", "2"))
    assert opened.left_out == {".json": 1, "listed and not there": 1}


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "deep", "not UTF-8", "NaN"])
def test_listings_that_are_no_json(tmp_path: Path, kind: str):
    path = tmp_path / "dataset.json"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        contents = {"deep": b"[" * 10**6, "not UTF-8": b'{"labels": "\xff"}', "NaN": b"NaN"}
        path.write_bytes(contents[kind])
    with pytest.raises(UserError, match=r"dataset\.json cannot be read"):
        open_source(str(tmp_path))


# Tables as people write them


def table(path: Path, columns: dict[str, object]) -> str:
    """Plain Parquet, without what the Hugging Face library adds."""
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table(columns), path)
    return str(path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")


IMAGES = [png(i) for i in range(3)]
STRUCTS = [{"bytes": content, "path": None} for content in IMAGES]


@pytest.mark.parametrize("images", [IMAGES, STRUCTS], ids=["bytes", "bytes and path"])
@pytest.mark.parametrize(
    ("label", "labels", "names"),
    [
        ([1, 0, 1], [1, 0, 1], ("0", "1")),
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
        (None, [0, 0, 0], ()),
    ],
)
def test_plain_parquet(
    tmp_path: Path, cache: None, images: list, label: list | None, labels: list, names: tuple
):
    columns = {"image": images, **({} if label is None else {"label": label})}
    assert_holds(open_source(table(tmp_path / "x.parquet", columns)), [0, 1, 2], labels, names)


@pytest.mark.parametrize("name", ["d[1]", "d*", "d?x", "**", "d{1,2}", "a b%20#"])
def test_names_are_no_patterns(tmp_path: Path, cache: None, name: str):
    for folder in (name, "d1", "dxx"):
        (tmp_path / folder).mkdir()
        for file in ("x", "y"):
            table(tmp_path / folder / f"{file}.parquet", {"image": IMAGES, "label": [0, 1, 0]})
    assert len(open_source(str(tmp_path / name)).names) == 6
    assert len(open_source(str(tmp_path / name / "x.parquet")).names) == 3


def test_folders_of_tables_are_no_classes_and_told_of(tmp_path: Path, cache: None):
    for folder in ("cats", "dogs"):
        (tmp_path / "t" / folder).mkdir(parents=True)
        table(tmp_path / "t" / folder / "x.parquet", {"image": IMAGES})
    source = open_source(str(tmp_path / "t"))
    assert_holds(source, [0, 1, 2, 0, 1, 2], [0] * 6, ())
    assert source.left_out == {"folders' names (cats, dogs)": 2}


def test_rows_without_an_image_or_a_class(tmp_path: Path, cache: None):
    images = [STRUCTS[0], None, STRUCTS[1], {"bytes": None, "path": None}, STRUCTS[2]]
    path = table(tmp_path / "x.parquet", {"image": images, "label": ["b", "a", "b", None, "a"]})
    source = open_source(path)
    assert_holds(source, [0, 1, 2], [1, 1, 0], ("a", "b"))
    assert source.names == ["row 0", "row 2", "row 4"]
    assert source.left_out == {"rows without an image": 2}
    path = table(tmp_path / "y.parquet", {"image": [*IMAGES, IMAGES[0]], "label": [0, None, 0, 1]})
    with pytest.raises(UserError, match="row 1 of .* has no class"):
        open_source(path)
    left = open_source(path, PrepareConfig(skip_unreadable=True))
    assert_holds(left, [0, 2, 0], [0, 0, 1], ("0", "1"))


def test_whole_numbers_that_pandas_made_fractions(tmp_path: Path, cache: None):
    """It does so with whole numbers of which some are missing."""
    columns = {"image": IMAGES, "label": [1.0, math.nan, 0.0], "width": [9, 9, 9]}
    path = table(tmp_path / "x.parquet", columns)
    with pytest.raises(UserError, match="row 1 of .* has no class"):
        open_source(path)
    source = open_source(path, PrepareConfig(skip_unreadable=True))
    assert_holds(source, [0, 2], [1, 0], ("0", "1"))
    assert source.left_out == {"rows without a class": 1, "columns (width)": 1}


def test_columns_are_chosen_by_name(tmp_path: Path, cache: None):
    columns = {"image": IMAGES, "mask": IMAGES[::-1], "coarse": [0, 0, 1], "label": [0, 1, 2]}
    path = table(tmp_path / "x.parquet", columns)
    with pytest.raises(UserError, match="2 columns of images among .*: choose one by --image-key"):
        open_source(path)
    config = PrepareConfig(image_key="mask", label_key="coarse")
    assert_holds(open_source(path, config), [2, 1, 0], [0, 0, 1], ("0", "1"))
    for wrong in (PrepareConfig(image_key="x"), PrepareConfig(image_key="mask", label_key="x")):
        with pytest.raises(UserError, match="_key is 'x': .* has the columns image, mask"):
            open_source(path, wrong)
    with pytest.raises(UserError, match="column 'coarse' of .* holds no images"):
        open_source(path, PrepareConfig(image_key="coarse"))


@pytest.mark.parametrize("label", [[0.5, 1.0, 2.0], [True, False, True], [-3, 0, 1], [2**60, 0, 1]])
def test_labels_that_are_no_classes(tmp_path: Path, cache: None, label: list):
    path = table(tmp_path / "x.parquet", {"image": IMAGES, "label": label})
    with pytest.raises(UserError, match="column 'label' of"):
        open_source(path)


def test_files_that_rows_name_lie_beside_the_table(tmp_path: Path, cache: None):
    (tmp_path / "set").mkdir()
    for folder, name in (("set", "in.png"), (".", "out.png")):
        (tmp_path / folder / name).write_bytes(png(5))
    outside = ["../out.png", str(tmp_path / "out.png")]
    images = [{"bytes": None, "path": path} for path in ("in.png", *outside)]
    source = open_source(table(tmp_path / "set" / "x.parquet", {"image": images}))
    with source.load(0) as image:
        assert np.array_equal(np.asarray(image), np.asarray(random_image(5)))
    for index in (1, 2):
        with pytest.raises(UserError, match="allowed are files in"):
            source.load(index)


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", bytes(1000)])
def test_damaged_tables(tmp_path: Path, cache: None, content: bytes):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.parquet' cannot be read by datasets: [^\n]+$"):
        open_source(str(tmp_path / "x.parquet"))
