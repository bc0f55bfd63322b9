"""numpy's files: what their headers promise is compared with what is there before memory is asked for."""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from selfalign.arrays import Array, Npz, read_npy
from selfalign.errors import UserError

ARRAYS = {
    "bytes": np.arange(60, dtype=np.uint8).reshape(3, 4, 5),
    "Fortran": np.asfortranarray(np.arange(60.0).reshape(3, 4, 5)),
    "big-endian": np.arange(12, dtype=">f4").reshape(3, 4),
    "a number": np.array(3.5),
    "text": np.array("inception"),
    "nothing": np.zeros((0, 3)),
}


def open_npz(path: Path) -> dict[str, Array]:
    return dict(Npz(path))


def npy(header: str, content: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + size + header.encode("latin1") + content


def of(shape: str, descr: str = "'|u1'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n"


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


DAMAGED = {
    "huge shape": npy(of("(10000000000000,)")),
    "more than the file": npy(of("(100, 100)"), bytes(5000)),
    "less than the file": npy(of("(10,)"), bytes(5000)),
    "negative": npy(of("(-1, 5)"), bytes(5)),
    "overflow": npy(of("(4294967296, 4294967296)")),
    "a truth": npy(of("(True, 8)"), bytes(8)),
    "text in the shape": npy(of("('a',)"), bytes(8)),
    "objects": npy(of("(1,)", "'|O'"), pickle.dumps([print])),
    "deep": npy("(" * 50_000 + "\n"),
    "version 3": npy(of("(8,)"), bytes(8), (3, 0)),
    "empty": b"",
    "an archive": b"PK\x03\x04" + bytes(100),
    "no dictionary": npy("[]\n"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_come_back(tmp_path: Path, kind: str):
    array = ARRAYS[kind]
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "stored.npz", array)
    np.savez_compressed(tmp_path / "packed.npz", array)
    for found in (
        read_npy(tmp_path / "x.npy"),
        open_npz(tmp_path / "stored.npz")["arr_0"],
        open_npz(tmp_path / "packed.npz")["arr_0"],
    ):
        assert found.dtype == array.dtype and found.shape == array.shape
        assert np.array_equal(found, array)


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_headers_are_named(tmp_path: Path, kind: str):
    (tmp_path / "x.npy").write_bytes(DAMAGED[kind])
    with pytest.raises(UserError, match=r"x\.npy cannot be read: [^\n]+$"):
        read_npy(tmp_path / "x.npy")
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
            archive.writestr("arr_0.npy", DAMAGED[kind])
        with pytest.raises(UserError, match=r"x\.npz is truncated[^\n]+$"):
            open_npz(tmp_path / "x.npz")


def test_pickles_never_run(tmp_path: Path):
    canary = np.empty(1, object)
    canary[0] = Canary(tmp_path / "ran")
    np.save(tmp_path / "x.npy", canary)
    np.savez(tmp_path / "x.npz", canary)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    for read, name in ((read_npy, "x.npy"), (open_npz, "x.npz"), (read_npy, "raw.npy")):
        with pytest.raises(UserError):
            read(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_changed_byte_is_found(tmp_path: Path, method: int):
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("arr_0.npy", file.getvalue())
    assert open_npz(tmp_path / "x.npz")["arr_0"].shape == (50, 8, 8, 3)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz is truncated"):
        open_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("flag", ["encrypted", "unknown compression"])
def test_members_that_cannot_be_unpacked(tmp_path: Path, flag: str):
    np.savez(tmp_path / "x.npz", np.zeros(9, np.uint8))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    central = content.find(b"PK\x01\x02")
    if flag == "encrypted":
        content[6], content[central + 8] = 1, 1
    else:
        content[8], content[central + 10] = 99, 99
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz is truncated"):
        open_npz(tmp_path / "x.npz")


def test_a_bomb_is_refused_without_the_memory(tmp_path: Path):
    side = 300_000_000
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w") as member,
    ):
        member.write(npy(of(f"({side},)")))
        for _ in range(side // 10**7):
            member.write(bytes(10**7))
    with pytest.raises(UserError, match="unpacks [0-9,]+ bytes to 300,000,0"):
        open_npz(tmp_path / "x.npz")


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "nothing", "a device"])
def test_what_is_no_file(tmp_path: Path, kind: str):
    path = tmp_path / "x.npy"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"x\.npy cannot be read: there is no such file"):
        read_npy(path)
