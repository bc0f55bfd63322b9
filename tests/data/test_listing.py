"""Which files of a folder are meant, and which are not: by one rule for all commands."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
from small_images import random_image

from selfalign.data.datasets import open_data
from selfalign.data.latents.settings import PrepareConfig
from selfalign.data.latents.sources import open_source
from selfalign.data.listing import list_files
from selfalign.errors import UserError
from selfalign.evaluation.inputs import open_images
from selfalign.sections import DataConfig


def save(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    random_image(seed, 8, 8).save(path)
    return path


def fill(root: Path, classes: tuple[str, ...] = ("a", "b"), count: int = 4) -> Path:
    for label, name in enumerate(classes):
        for number in range(count):
            save(root / name / f"{number}.png", 10 * label + number)
    return root


def counts(root: Path, skip: bool = False) -> tuple[int, int]:
    """How many images training and preparing find."""
    config = DataConfig(name="folder", root=str(root), image_size=8, skip_unreadable=skip)
    source = open_data(config)
    prepared = open_source(str(root), PrepareConfig(8, "none", skip_unreadable=skip))
    return len(source.train) + len(source.heldout), len(prepared.names)


def refusals(root: Path) -> list[str]:
    """What training, preparing and evaluating say of it."""
    said = []
    for action in (
        lambda: open_data(DataConfig(name="folder", root=str(root), image_size=8)),
        lambda: open_source(str(root)),
        lambda: open_images(root),
    ):
        with pytest.raises(UserError) as error:
            action()
        said.append(str(error.value))
        assert "\n" not in said[-1]
    return said


class TestLinks:
    def test_linked_folders_and_files_are_followed(self, tmp_path: Path):
        fill(tmp_path / "store", count=3)
        fill(tmp_path / "data", count=2)
        for name in "ab":
            (tmp_path / "data" / name / "more").symlink_to(tmp_path / "store" / name)
        (tmp_path / "data" / "a" / "9.png").symlink_to(save(tmp_path / "elsewhere.png", 99))
        assert counts(tmp_path / "data") == (11, 11)
        assert len(open_images(tmp_path / "data")) == 11

    def test_linked_classes(self, tmp_path: Path):
        fill(tmp_path / "store")
        (tmp_path / "data").mkdir()
        for name in "ab":
            (tmp_path / "data" / name).symlink_to(tmp_path / "store" / name)
        assert counts(tmp_path / "data") == (8, 8)
        assert len(open_images(tmp_path / "data")) == 8

    @pytest.mark.parametrize("target", [".", "..", "../..", "../b/.."])
    def test_loops_end(self, tmp_path: Path, target: str):
        fill(tmp_path / "up" / "data")
        (tmp_path / "up" / "data" / "a" / "loop").symlink_to(target)
        assert counts(tmp_path / "up" / "data") == (8, 8)
        listing = list_files(tmp_path / "up" / "data")
        assert listing.passed_over == {"links that lead back": 1}

    def test_a_class_that_leads_back_is_none(self, tmp_path: Path):
        fill(tmp_path)
        (tmp_path / "z").symlink_to(".")
        assert counts(tmp_path) == (8, 8)

    def test_folders_that_are_reached_in_many_ways_are_visited_once(self, tmp_path: Path):
        for depth in range(40):  # 2^40 ways to the last of them
            folder = tmp_path / "data" / "a" / f"{depth}"
            folder.mkdir(parents=True)
            for name in "xy":
                (folder / name).symlink_to(f"../{depth + 1}")
        fill(tmp_path / "data")
        assert counts(tmp_path / "data") == (8, 8)


@pytest.mark.parametrize(
    "name",
    [
        *(".hidden.png", "._1.png", ".ipynb_checkpoints/1.png", ".thumbnails/1.png"),
        *("__MACOSX/1.png", "@eaDir/1.png", "#recycle/1.png", "$RECYCLE.BIN/1.png"),
    ],
)
def test_what_systems_leave_behind_is_passed_over(tmp_path: Path, name: str):
    fill(tmp_path)
    for place in (tmp_path, tmp_path / "a", tmp_path / "a" / "deeper"):
        save(place / name)
    assert counts(tmp_path) == (8, 8)
    assert len(open_images(tmp_path)) == 8
    source = open_data(DataConfig(name="folder", root=str(tmp_path), image_size=8))
    assert source.left_out == {"hidden or of the system": 3}


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    # Its name is bound relative to the folder: those of sockets must be short.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


UNUSABLE = {
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "empty": Path.touch,
    "out of reach (No such file or directory)": lambda path: path.symlink_to("nowhere"),
    "out of reach (Too many levels of symbolic links)": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_called_an_image_and_is_none(tmp_path: Path, kind: str):
    fill(tmp_path)
    UNUSABLE[kind](tmp_path / "a" / "x.png")
    for said in refusals(tmp_path):
        assert "a/x.png is not a readable image: it is " + kind in said
    assert counts(tmp_path, skip=True) == (8, 8)


@pytest.mark.parametrize("suffix", [".eps", ".ps", ".wmf", ".emf", ".fits"])
def test_formats_that_are_not_read(tmp_path: Path, suffix: str):
    fill(tmp_path)
    (tmp_path / "a" / f"x{suffix}").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for said in refusals(tmp_path):
        assert f"a/x{suffix} is not a readable image: it is of a format that is not read" in said
    assert counts(tmp_path, skip=True) == (8, 8)


def test_postscript_is_not_read_under_another_name(tmp_path: Path):
    fill(tmp_path)
    (tmp_path / "a" / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match=r"x\.png is not a readable image: .* of no format"):
        counts(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val"),
        ("train", "test"),
        ("Training", "validation"),
        ("train2017", "val2017"),
    ],
)
def test_splits_are_no_classes(tmp_path: Path, names: tuple[str, ...]):
    for name in names:
        fill(tmp_path / name)
    for said in refusals(tmp_path):
        assert "splits of" in said and "name one of them" in said
    assert counts(tmp_path / names[0]) == (8, 8)


def test_other_names_of_splits_are_no_classes_of_a_data_set(tmp_path: Path):
    for name in ("dev", "Holdout", "evaluation"):
        fill(tmp_path / name)
    with pytest.raises(UserError, match=r"splits of .*\(Holdout, dev, evaluation\): name one"):
        open_data(DataConfig(name="folder", root=str(tmp_path), image_size=8))


def test_a_class_may_be_called_like_a_split(tmp_path: Path):
    fill(tmp_path, ("bus", "train"))
    assert counts(tmp_path) == (8, 8)


def test_the_only_folder_is_a_split(tmp_path: Path):
    fill(tmp_path / "train")
    with pytest.raises(UserError, match=r"name one of them, as in .*/train"):
        open_source(str(tmp_path))


def test_images_beside_classes_are_named(tmp_path: Path):
    fill(tmp_path)
    save(tmp_path / "loose.png")
    with pytest.raises(UserError, match=r"loose\.png lies beside class subfolders"):
        counts(tmp_path)


def test_folders_deeper_than_the_interpreter_can_recurse(tmp_path: Path):
    fill(tmp_path)
    deep = tmp_path / "a"
    here = os.open(deep, os.O_RDONLY)
    try:
        for _ in range(1_200):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
    finally:
        os.close(here)
    try:
        assert counts(tmp_path) == (8, 8)
    finally:  # pytest's own way to remove folders recurses
        subprocess.run(["rm", "-rf", str(tmp_path / "a")], check=True)


@pytest.mark.parametrize(
    "name",
    ["$5_$10", "[x]", "[/red]", "<b>", "a\nb", "\x01\x1b[31m", "\u202etxt", "שלום", "é" * 120],
)
def test_class_names_are_text_of_one_line(tmp_path: Path, name: str):
    fill(tmp_path, (name, "plain"))
    assert counts(tmp_path) == (8, 8)
    source = open_data(DataConfig(name="folder", root=str(tmp_path), image_size=8))
    assert len(set(source.class_names)) == 2
    assert all(shown.isprintable() for shown in source.class_names)


def test_evaluation_sees_grey_among_colour_in_three_channels(tmp_path: Path):
    for number in range(4):
        save(tmp_path / f"{number}.png", number)
    random_image(9, 8, 8).convert("L").save(tmp_path / "2.png")
    images = open_images(tmp_path)
    assert images.shape == (3, 8, 8)
    grey = images.read([2])[0]
    assert (grey[0] == grey[1]).all() and (grey[0] == grey[2]).all()
    for number in range(4):
        random_image(number, 8, 8).convert("L").save(tmp_path / f"{number}.png")
    assert open_images(tmp_path).shape == (1, 8, 8)
