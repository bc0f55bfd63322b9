"""Where images come from: folders, tar files, Parquet and Arrow, torchvision, stored moments.

`open_source` lists the images and their labels once; any process can then load the i-th.
"""

import dataclasses
import os
from functools import partial
from pathlib import Path

from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources.folders import open_classes, open_listed
from selfalign.data.latents.sources.source import Source
from selfalign.data.latents.sources.tables import TABLE_SUFFIXES, open_hub, open_table
from selfalign.data.latents.sources.tars import open_tars
from selfalign.data.latents.sources.torchvision_sets import open_torchvision
from selfalign.data.listing import list_files, require_one_split
from selfalign.errors import UserError
from selfalign.names import printable

__all__ = ["Source", "open_source"]

TAR = frozenset([".tar"])


def open_source(source: str, config: PrepareConfig | None = None) -> Source:
    """List what `source` names.

    Args:
        source: `torchvision:NAME[:FOLDER]`, `hub:OWNER/NAME[:SPLIT]`, a .tar, .parquet or .arrow
            file, or a folder: of class subfolders, of tar files, of Parquet or Arrow files, one
            that `Dataset.save_to_disk` wrote, or one with a `dataset.json` (EDM2, REPA).
        config: what is meant of several images or labels, and whether unreadable ones are left out.

    Raises:
        UserError: there is no such source, or it holds too few images; the message says what is
            allowed.
    """
    config = config or PrepareConfig()
    try:
        opened = _open(source, config)
    except OSError as error:  # of the path as a whole: files are named where they are read
        raise UserError(f"source is {source!r}: {error.strerror or error}") from error
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


def _open(source: str, config: PrepareConfig) -> Source:
    kind, _, name = source.partition(":")
    if Path(source).exists():
        return _open_path(Path(source), config)
    if kind == "torchvision":
        return open_torchvision(name)
    if kind == "hub" and name:
        return open_hub(name, config)
    raise UserError(
        f"source is {source!r}: there is no such file or folder; allowed are a folder of images, "
        "a .tar, .parquet or .arrow file or a folder of them, a folder with dataset.json, "
        "torchvision:NAME[:FOLDER] and hub:OWNER/NAME[:SPLIT]"
    )


def _open_path(path: Path, config: PrepareConfig) -> Source:
    if path.is_file():
        if path.suffix in TAR:
            return open_tars([path], config)
        if path.suffix in TABLE_SUFFIXES:
            return open_table(path, [path], config)
        raise UserError(
            f"source is {str(path)!r}: allowed are files that end in .tar, .parquet or .arrow; "
            "unpack others, compressed tar files too, which cannot be read in parallel"
        )
    if not path.is_dir():
        raise UserError(f"source is {str(path)!r}: allowed are files and folders")
    if os.path.lexists(path / "dataset.json"):
        return open_listed(path, config.skip_unreadable)
    if (path / "dataset_dict.json").is_file() and (path / "train" / "state.json").is_file():
        return _open_path(path / "train", config)  # as `hub:` does where no split is named
    if not list_files(path, only_first=True).files:
        for suffixes, open_files in ((TABLE_SUFFIXES, partial(open_table, path)), (TAR, open_tars)):
            if files := list_files(path, suffixes=suffixes).files:
                require_one_split((file.name for file in files), path)
                return open_files([Path(file.path) for file in files], config)
    return open_classes(path, config.skip_unreadable)
