"""Parquet and Arrow, by the Hugging Face library: a column of images, and perhaps one of classes."""

import glob
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from selfalign.data.images import UnreadableImageError, open_image
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources.source import Source, fingerprint_sample, numbered_classes
from selfalign.errors import UserError
from selfalign.hub import use_cache_if_out_of_reach
from selfalign.names import printable
from selfalign.weights import listed

if TYPE_CHECKING:
    import datasets

TABLE_SUFFIXES = frozenset([".parquet", ".arrow"])
SHOWN = 5
"""How many columns a line lists at most."""
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target")
"""Columns that are taken for classes where none says that it is."""


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
    numbers: np.ndarray
    """Of the rows that hold an image."""
    folder: Path | None
    """In which files that rows name have to lie; None for what the library has downloaded."""

    def content(self, index: int) -> bytes:
        stored = self.rows[int(self.numbers[index])][self.column]
        if stored["bytes"] is not None:
            return stored["bytes"]
        path = Path(stored["path"])
        if self.folder is not None:
            path = (self.folder / path).resolve()
            if not path.is_relative_to(self.folder) or not path.is_file():
                raise UnreadableImageError(
                    f"row {self.numbers[index]} names {printable(stored['path'])}: allowed are files "
                    f"in {self.folder}, or the image itself in the table"
                )
        try:
            return path.read_bytes()
        except OSError as error:
            raise UnreadableImageError(
                f"row {self.numbers[index]} names {printable(str(path))}: {error.strerror}"
            ) from error

    def __call__(self, index: int) -> Image.Image:
        return open_image(io.BytesIO(self.content(index)))


def open_table(path: Path, files: Sequence[Path], config: PrepareConfig) -> Source:
    """Parquet or Arrow files, or a folder that `Dataset.save_to_disk` wrote.

    Args:
        path: what was named: a file or a folder.
        files: the tables in it.
        config: which columns are meant, and whether rows without an image are left out.
    """
    folder = (path if path.is_dir() else path.parent).resolve()
    if path.is_dir() and (path / "state.json").is_file():
        return _open(lambda: _library().load_from_disk(str(path)), path, config, folder)
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1:
        raise UserError(
            f"{str(path)!r} holds {' and '.join(sorted(kinds))} files: allowed is one kind"
        )
    # The library takes names for patterns, by which other files would be read too.
    names = [glob.escape(str(file)) for file in files]
    return _open(
        lambda: _library().load_dataset(kinds.pop()[1:], data_files=names, split="train"),
        path,
        config,
        folder,
        tuple(sorted({file.parent.name for file in files if file.parent != path})),
    )


def open_hub(name: str, config: PrepareConfig) -> Source:
    """A data set of the Hugging Face hub: `OWNER/NAME[:SPLIT]`."""
    repository, _, split = name.partition(":")

    def load() -> Any:
        use_cache_if_out_of_reach(_library().config)
        return _library().load_dataset(repository, split=split or "train")

    return _open(load, repository, config, None)


def _open(
    load: Callable[[], Any],
    name: object,
    config: PrepareConfig,
    folder: Path | None,
    folders: Sequence[str] = (),
) -> Source:
    """The table that `load` opens; names of folders in which its parts lie are told of, as no classes."""
    library = _library()
    library.disable_progress_bars()
    library.logging.set_verbosity(library.logging.CRITICAL)  # errors are raised as well
    where = repr(str(name))
    try:
        rows = load()
    except Exception as error:  # files, network, caches and formats fail in many ways
        cause = error.__cause__ or error  # the library's own message says only that it failed
        reason = printable(f"{type(cause).__name__}: {cause}")
        raise UserError(f"{where} cannot be read by datasets: {reason}") from error
    if not isinstance(rows, library.Dataset):
        raise UserError(f"{where} holds several splits: allowed is the folder of one")
    column = _image_column(library, rows.features, config.image_key, where)
    try:
        stored = rows.select_columns([column]).cast_column(column, library.Image(decode=False))
        chunks = [_holding_images(chunk) for chunk in stored.data.column(column).chunks]
        present = np.concatenate(chunks) if chunks else np.zeros(0, bool)
    except Exception as error:
        raise UserError(
            f"column {column!r} of {where} holds no images: {printable(str(error))}"
        ) from error
    numbers = np.flatnonzero(present)
    key = _label_column(library, rows.features, config.label_key, where)
    labels, class_names = (None, ()) if key is None else _classes(library, rows, key, where)
    left_out = {"rows without an image": int((~present).sum())}
    if others := [printable(name) for name in rows.features if name not in (column, key)]:
        left_out[f"columns ({listed(others, SHOWN)})"] = len(others)
    if len(folders) > 1:
        left_out[f"folders' names ({listed(list(map(printable, folders)), SHOWN)})"] = len(folders)
    if labels is not None:
        known = labels[numbers] >= 0
        if not known.all() and not config.skip_unreadable:
            raise UserError(
                f"row {numbers[known.argmin()]} of {where} has no class: repair it, or leave such "
                "rows out with --skip-unreadable"
            )
        left_out["rows without a class"] = int((~known).sum())
        numbers = numbers[known]
        labels = labels[numbers]
    else:
        labels = np.zeros(len(numbers), np.int32)
    images = _RowImages(stored, column, numbers, folder)

    def content(index: int) -> bytes:
        try:
            return images.content(index)
        except UnreadableImageError:
            return b""  # it is named when it is read

    return Source(
        [f"row {number}" for number in numbers],
        labels,
        class_names,
        fingerprint_sample(labels, content),
        images,
        left_out={kind: count for kind, count in left_out.items() if count},
    )


def _holding_images(chunk: Any) -> np.ndarray:
    """Which rows of an Arrow array of {bytes, path} have either."""
    row, content, path = (
        array.is_valid().to_numpy(zero_copy_only=False)
        for array in (chunk, chunk.field("bytes"), chunk.field("path"))
    )
    return row & (content | path)


def _image_column(library: Any, features: Any, image_key: str | None, where: str) -> str:
    """The column of images: the one that says so, or else the one that looks like it."""
    if image_key is not None:
        if image_key not in features:
            raise UserError(
                f"image_key is {image_key!r}: {where} has the columns {', '.join(features)}"
            )
        return image_key
    columns = [key for key, feature in features.items() if isinstance(feature, library.Image)]
    if not columns:
        columns = [key for key, feature in features.items() if _looks_like_images(feature)]
    if len(columns) != 1:
        raise UserError(
            f"{where} has {len(columns)} columns of images among {', '.join(features)}: choose one by "
            "--image-key; it holds encoded images, or {bytes, path} of them"
        )
    return columns[0]


def _looks_like_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _whole(value: Any) -> Any:
    """A label that pandas made a fraction, as it does with whole numbers beside missing ones."""
    if not isinstance(value, float):
        return value
    return None if math.isnan(value) else int(value) if value.is_integer() else value


def _label_column(library: Any, features: Any, label_key: str | None, where: str) -> str | None:
    """The column of classes: the one that says so, or else one of a usual name; None without classes."""
    if label_key is not None:
        if label_key not in features:
            raise UserError(
                f"label_key is {label_key!r}: {where} has the columns {', '.join(features)}"
            )
        return label_key
    columns = [key for key, feature in features.items() if isinstance(feature, library.ClassLabel)]
    columns = columns or [key for key in LABEL_COLUMNS if key in features]
    if len(columns) > 1:
        raise UserError(
            f"{where} has several columns of classes: {', '.join(columns)}; choose one by --label-key"
        )
    return columns[0] if columns else None


def _classes(library: Any, rows: Any, key: str, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """A class for each row, -1 for none, and the names."""
    features = rows.features
    values = rows.with_format(None)[key][:]
    if isinstance(features[key], library.ClassLabel):
        values = [None if value == -1 else value for value in values]
    values = [_whole(value) for value in values]
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {str}:
        names = sorted(set(values) - {None})
        number = {name: label for label, name in enumerate(names)}
        labels = np.array([-1 if value is None else number[value] for value in values], np.int32)
        return labels, tuple(map(printable, names))
    if kinds != {int}:
        raise UserError(f"column {key!r} of {where}: allowed as labels are whole numbers and texts")
    numbers = np.array([-1 if value is None else value for value in values])
    given = numbers[[value is not None for value in values]]
    class_names = numbered_classes(given, f"column {key!r} of {where}")
    if isinstance(features[key], library.ClassLabel):
        named = tuple(map(printable, features[key].names))
        class_names = named if len(named) >= len(class_names) else class_names
    return numbers.astype(np.int32), class_names
