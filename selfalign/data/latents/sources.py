"""Where images come from: folders, tar files, Parquet and Arrow, torchvision, stored moments.

`open_source` lists the images and their labels once; any process can then load the i-th.
"""

import dataclasses
import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from selfalign.data.folder import (
    IMAGE_SUFFIXES,
    encode_name,
    image_files,
    list_images,
    printable,
)
from selfalign.data.latents.store import read_json
from selfalign.errors import UserError

if TYPE_CHECKING:
    import datasets

FINGERPRINT_IMAGES = 64
"""How many images go into the fingerprint of a source that has no files to name."""


@dataclass(frozen=True)
class Source:
    """Images in a fixed order."""

    names: Sequence[str]
    """By which messages name each image, and which decide what is held out."""
    labels: np.ndarray
    """One per image."""
    class_names: tuple[str, ...]
    """Names by label; empty for a source without classes."""
    fingerprint: str
    """Changes when the source does."""
    load: Callable[[int], Any]
    """The i-th, as an opened image, or as an array of moments (2C, H, W). Can be pickled."""
    moments: bool = False
    """Whether the images are stored as a VAE's moments already."""


def open_source(source: str) -> Source:
    """List what `source` names.

    Args:
        source: `torchvision:NAME[:FOLDER]`, `hub:OWNER/NAME[:SPLIT]`, a .tar, .parquet or .arrow
            file, or a folder: of class subfolders, of tar files, of Parquet or Arrow files, one
            that `Dataset.save_to_disk` wrote, or one with a `dataset.json` (EDM2, REPA).

    Raises:
        UserError: there is no such source, or it holds too few images; the message says what is
            allowed.
    """
    kind, _, name = source.partition(":")
    path = Path(source)
    if path.exists():
        opened = _open_path(path)
    elif kind == "torchvision":
        opened = _open_torchvision(name)
    elif kind == "hub":
        opened = _open_hub(name)
    else:
        raise UserError(
            f"source is {source!r}: there is no such file or folder; allowed are a folder of images, "
            "a .tar, .parquet or .arrow file or a folder of them, a folder with dataset.json, "
            "torchvision:NAME[:FOLDER] and hub:OWNER/NAME[:SPLIT]"
        )
    if len(opened.names) < 2:
        raise UserError(
            f"source {source!r} holds {len(opened.names)} images: needed are at least 2, of which "
            "one is held out"
        )
    if opened.labels.min() < 0 or opened.labels.max() >= max(1, len(opened.class_names)):
        raise UserError(
            f"source {source!r} has labels from {opened.labels.min()} to {opened.labels.max()}: "
            f"allowed are 0 to {max(1, len(opened.class_names)) - 1}"
        )
    return dataclasses.replace(opened, names=[printable(name) for name in opened.names])


def _open_path(path: Path) -> Source:
    if path.is_file():
        if path.suffix == ".tar":
            return _open_tars([path])
        if path.suffix in (".parquet", ".arrow"):
            kind = path.suffix[1:]
            return _open_dataset(
                lambda: _library().load_dataset(kind, data_files=[str(path)], split="train"), path
            )
        raise UserError(
            f"source is {str(path)!r}: allowed are files that end in .tar, .parquet or .arrow; "
            "unpack others, compressed tar files too, which cannot be read in parallel"
        )
    if (path / "dataset.json").is_file():
        return _open_listed(path)
    if (path / "state.json").is_file():
        return _open_dataset(lambda: _library().load_from_disk(str(path)), path)
    if not any(image_files(path)):
        suffixes = {file.suffix for file in path.rglob("*")}
        if suffixes & {".parquet", ".arrow"}:
            return _open_dataset(lambda: _library().load_dataset(str(path), split="train"), path)
        if ".tar" in suffixes:
            return _open_tars(sorted(path.rglob("*.tar")))
    return _open_classes(path)


def _numbered(labels: np.ndarray) -> tuple[str, ...]:
    """Class names for a source that only numbers its classes."""
    return tuple(str(label) for label in range(int(labels.max(initial=-1)) + 1))


# Folders of files


@dataclass(frozen=True)
class _ImageFiles:
    paths: Sequence[Path]

    def __call__(self, index: int) -> Image.Image:
        return Image.open(self.paths[index])


@dataclass(frozen=True)
class _MomentFiles:
    paths: Sequence[Path]

    def __call__(self, index: int) -> np.ndarray:
        return np.load(self.paths[index], allow_pickle=False)


def _files_fingerprint(names: Iterable[str], labels: Iterable[int], paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for name, label, path in zip(names, labels, paths, strict=True):
        digest.update(encode_name(f"{name}\0{label}\0{path.stat().st_size}\n"))
    return digest.hexdigest()[:16]


def _open_classes(root: Path) -> Source:
    found, class_names = list_images(root)
    paths = [path for path, _ in found]
    names = [path.relative_to(root).as_posix() for path in paths]
    labels = np.array([label for _, label in found], np.int32)
    return Source(
        names, labels, class_names, _files_fingerprint(names, labels, paths), _ImageFiles(paths)
    )


def _open_listed(root: Path) -> Source:
    """The format of EDM2's tool, which REPA and SRA use: files, and their labels in dataset.json."""
    listing = read_json(root / "dataset.json")
    paths = sorted(root.rglob("*.npy"))
    moments = bool(paths)
    if not moments:
        paths = sorted(image_files(root))
    names = [path.relative_to(root).as_posix() for path in paths]
    try:
        by_name = None if listing["labels"] is None else dict(listing["labels"])
        labels = np.array([0 if by_name is None else by_name[name] for name in names])
    except KeyError as error:
        raise UserError(f"{root / 'dataset.json'} has no entry {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{root / 'dataset.json'} is not a list of [file, label] pairs under 'labels': {error}"
        ) from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{root / 'dataset.json'}: allowed as labels are whole numbers")
    return Source(
        names,
        labels.astype(np.int32),
        () if by_name is None else _numbered(labels),
        _files_fingerprint(names, labels, paths),
        (_MomentFiles if moments else _ImageFiles)(paths),
        moments,
    )


# Tar files


@dataclass(frozen=True)
class _Member:
    archive: Path
    folders: tuple[str, ...]
    """That lead to it: the archive, archives in it, and folders in those."""
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        with self.archive.open("rb") as file:
            return os.pread(file.fileno(), self.size, self.offset)


@dataclass(frozen=True)
class _TarImages:
    members: Sequence[_Member]

    def __call__(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.members[index].read()))


def _open_tars(archives: Sequence[Path]) -> Source:
    """Uncompressed tar files, as they are or one in another (as ImageNet comes).

    An image's class is the number in its `.cls` neighbour (WebDataset); without those it is the
    first of the folders and archives that lead to it and do not lead to all images.
    """
    members = [member for archive in archives for member in _members(archive)]
    images = [m for m in members if PurePosixPath(m.name).suffix.lower() in IMAGE_SUFFIXES]
    numbers = {
        (*m.folders, m.name.removesuffix(".cls")): m for m in members if m.name.endswith(".cls")
    }
    names = ["/".join((*m.folders, m.name)) for m in images]
    if numbers:
        labels = np.array(
            [
                _class_number(name, numbers.get((*m.folders, m.name.partition(".")[0])))
                for name, m in zip(names, images, strict=True)
            ],
            np.int32,
        )
        class_names = _numbered(labels)
    else:
        # Where the paths first differ: between the smallest and the largest, in their order.
        first, last = (edge((m.folders for m in images), default=()) for edge in (min, max))
        common = len(
            list(takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
        )
        tops = [m.folders[common] if len(m.folders) > common else "" for m in images]
        class_names = tuple(sorted(set(tops)))
        labels = np.array([class_names.index(top) for top in tops], np.int32)
        class_names = tuple(map(printable, class_names)) if len(class_names) > 1 else ()
    digest = hashlib.sha256()
    for name, label, member in zip(names, labels, images, strict=True):
        digest.update(encode_name(f"{name}\0{label}\0{member.size}\n"))
    return Source(names, labels, class_names, digest.hexdigest()[:16], _TarImages(images))


def _class_number(name: str, member: _Member | None) -> int:
    if member is None:
        raise UserError(f"{printable(name)} has no .cls file beside it, but others have")
    try:
        return int(member.read())
    except ValueError as error:
        raise UserError(f"the .cls file of {printable(name)} holds no whole number") from error


def _members(archive: Path) -> Iterator[_Member]:
    try:
        with tarfile.open(archive, "r:") as tar:
            yield from _walk(archive, tar, (archive.stem,), 0)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{archive} cannot be read as an uncompressed tar file: {error}; unpack it, or write it "
            "again without compression"
        ) from error


def _walk(
    archive: Path, tar: tarfile.TarFile, folders: tuple[str, ...], start: int
) -> Iterator[_Member]:
    for info in tar:
        path = PurePosixPath(info.name)
        if not info.isreg() or path.name.startswith("."):
            continue
        if path.suffix == ".tar":
            with tarfile.open(fileobj=tar.extractfile(info), mode="r:") as inner:
                inside = (*folders, *path.parent.parts, path.stem)
                yield from _walk(archive, inner, inside, start + info.offset_data)
        else:
            inside = (*folders, *path.parent.parts)
            yield _Member(archive, inside, path.name, start + info.offset_data, info.size)


# Parquet and Arrow, by the Hugging Face library


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "Parquet, Arrow and the hub need the package datasets: pip install 'selfalign[latents]'"
        ) from error
    return datasets


@dataclass(frozen=True)
class _RowImages:
    rows: "datasets.Dataset"
    column: str

    def __call__(self, index: int) -> Image.Image:
        stored = self.rows[index][self.column]
        return Image.open(
            stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        )


def _open_hub(name: str) -> Source:
    repository, _, split = name.partition(":")
    return _open_dataset(
        lambda: _library().load_dataset(repository, split=split or "train"), repository
    )


def _open_dataset(load: Callable[[], Any], name: object) -> Source:
    library = _library()
    try:
        rows = load()
    except Exception as error:  # files, network and formats fail in many ways
        reason = printable(str(error))
        raise UserError(f"{str(name)!r} cannot be read by datasets: {reason}") from error
    if not isinstance(rows, library.Dataset):
        raise UserError(f"{str(name)!r} holds several splits: allowed is the folder of one")
    features = rows.features
    columns = [key for key, feature in features.items() if isinstance(feature, library.Image)]
    if len(columns) != 1:
        raise UserError(
            f"{str(name)!r} has {len(columns)} columns of images among {', '.join(features)}: "
            "allowed is one, of the type datasets.Image"
        )
    classes = [key for key, feature in features.items() if isinstance(feature, library.ClassLabel)]
    if len(classes) > 1:
        raise UserError(
            f"{str(name)!r} has several columns of classes: {', '.join(classes)}; allowed is one"
        )
    labels = np.zeros(len(rows), np.int32)
    class_names: tuple[str, ...] = ()
    if classes or "label" in features:
        key = classes[0] if classes else "label"
        column = rows.with_format("numpy")[key][:]
        if np.asarray(column).dtype.kind not in "iu":
            raise UserError(f"column {key!r} of {str(name)!r}: allowed as labels are whole numbers")
        labels = np.asarray(column).astype(np.int32)
        class_names = tuple(features[key].names) if classes else _numbered(labels)
    stored = rows.select_columns(columns).cast_column(columns[0], library.Image(decode=False))

    def content(index: int) -> bytes:
        image = stored[index][columns[0]]
        return image["bytes"] or Path(image["path"]).read_bytes()

    return Source(
        [f"row {index}" for index in range(len(rows))],
        labels,
        class_names,
        _sampled_fingerprint(labels, content),
        _RowImages(stored, columns[0]),
    )


def _sampled_fingerprint(labels: np.ndarray, content: Callable[[int], bytes]) -> str:
    """For sources that have no file per image: all labels, and images at equal distances."""
    digest = hashlib.sha256(labels.tobytes())
    for index in np.linspace(0, len(labels) - 1, min(len(labels), FINGERPRINT_IMAGES)).astype(int):
        digest.update(content(int(index)))
    return digest.hexdigest()[:16]


# torchvision


@dataclass(frozen=True)
class _TorchvisionImages:
    dataset: Any

    def __call__(self, index: int) -> Image.Image:
        return self.dataset[index][0]


def _open_torchvision(name: str) -> Source:
    import torchvision

    name, _, root = name.partition(":")
    maker = getattr(torchvision.datasets, name, None)
    if name not in torchvision.datasets.__all__ or maker is None:
        raise UserError(
            f"torchvision has no data set {name!r}: allowed are names such as CIFAR10, SVHN, "
            "Flowers102, as torchvision.datasets spells them"
        )
    try:
        dataset = maker(root or "data", download=True)
        images = len(dataset)
        labels = _torchvision_labels(dataset, images)
    except Exception as error:  # downloads, archives and constructors fail in many ways
        raise UserError(
            f"torchvision's {name} cannot be opened in {root or 'data'!r}: {printable(str(error))}"
        ) from error
    class_names = getattr(dataset, "classes", ())
    if len(class_names) <= labels.max():
        class_names = _numbered(labels)
    load = _TorchvisionImages(dataset)
    return Source(
        [f"image {index}" for index in range(images)],
        labels,
        tuple(map(str, class_names)),
        _sampled_fingerprint(labels, lambda index: load(index).tobytes()),
        load,
    )


def _torchvision_labels(dataset: Any, images: int) -> np.ndarray:
    """The labels, under whichever attribute; without decoding the images where there is one."""
    for attribute in ("targets", "labels", "_labels"):
        labels = np.asarray(getattr(dataset, attribute, ()))
        if labels.shape == (images,) and labels.dtype.kind in "iu":
            return labels.astype(np.int32)
    return np.array([int(dataset[index][1]) for index in range(images)], np.int32)
