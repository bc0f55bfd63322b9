"""`.npz` files from anywhere: every kind of damage is one UserError, before memory is asked for."""

import pickle
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from selfalign import UserError, arrays
from selfalign.arrays import Npz

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)


def member(header: str, content: bytes, version: tuple[int, int] = (1, 0)) -> bytes:
    """A `.npy` with a header of one's own."""
    text = f"{header}\n".encode("latin1")
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + content


def header(shape: str, dtype: str = "'|u1'") -> str:
    return f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}}}"


def archive(path: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("arr_0.npy", content)
    return path


class Canary:
    """Unpickling it would be seen."""

    fired = False

    @classmethod
    def fire(cls) -> None:
        cls.fired = True

    def __reduce__(self) -> object:
        return (Canary.fire, ())


class TestGood:
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_reads_what_numpy_writes(self, tmp_path: Path, save: object) -> None:
        arrays = {
            "bytes": PIXELS,
            "fortran": np.asfortranarray(np.random.default_rng(1).normal(size=(4, 7))),
            "half": PIXELS.astype(np.float16),
            "swapped": PIXELS.astype(">f4"),
            "name": np.array("a name"),
            "none": np.zeros((0, 3)),
        }
        save(tmp_path / "x.npz", **arrays)  # type: ignore[operator]
        found = Npz(tmp_path / "x.npz")
        assert set(found) == set(arrays) and len(found) == 6 and "absent" not in found
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
        assert isinstance(found["bytes"], np.memmap) == (save is np.savez)

    def test_reads_only_what_it_is_asked_for(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", arr_0=PIXELS, other=np.array([{"code": 1}], dtype=object))
        found = Npz(tmp_path / "x.npz")
        assert "other" in found
        np.testing.assert_array_equal(found["arr_0"], PIXELS)

    def test_highly_compressible_images_are_no_bomb(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "x.npz", arr_0=np.zeros((500, 64, 64, 3), np.uint8))
        assert Npz(tmp_path / "x.npz")["arr_0"].shape == (500, 64, 64, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\x93NUMPY",
        member(header("(12,6,5,3)"), PIXELS.tobytes(), (3, 0)),
        member(header("(12,6,5,3)"), PIXELS.tobytes(), (9, 9)),
        member(header("(13,6,5,3)"), PIXELS.tobytes()),
        member(header("(11,6,5,3)"), PIXELS.tobytes()),
        member(header("(True,8,8,1)"), bytes(64)),
        member(header("(-1,8,8,1)"), bytes(64)),
        member(header("(-8,-8,1,1)"), bytes(64)),
        member(header("(2.0,8,4,1)"), bytes(64)),
        member(header("('a','b')"), bytes(64)),
        member(header("(1000000000000,8,8,1)"), bytes(64)),
        member(header(f"({10**30},8,8,1)"), bytes(64)),
        member(header(f"({'1,' * 70})"), bytes(1)),
        member(header("(1,)", "'|O'"), pickle.dumps(Canary())),
        member(header("(1,)", "'nosuch'"), bytes(64)),
        member(header("(1,)", "'|V0'"), bytes(64)),
        member("[1, 2]", bytes(64)),
        member("{}", bytes(64)),
        member("(" * 3000, bytes(64)),
        member("__import__('os').getcwd()", bytes(64)),
        member(header("(1,)") * 900, bytes(64)),
    ],
    ids=lambda content: f"{content[8:60]!r}",
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_refuses_members_that_are_no_plain_arrays(
    tmp_path: Path, content: bytes, method: int, recwarn: pytest.WarningsRecorder
) -> None:
    file = archive(tmp_path / "x.npz", content, method)
    with pytest.raises(UserError, match=r"arr_0 of .*x\.npz"):
        Npz(file)["arr_0"]
    assert not Canary.fired and not recwarn.list


METHODS = [
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
    zipfile.ZIP_BZIP2,
    zipfile.ZIP_LZMA,
]


@pytest.mark.parametrize("method", METHODS)
def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path: Path, method: int) -> None:
    """In data it is refused; elsewhere (names, dates) it may change nothing, and never crashes."""
    content = member(header("(12,6,5,3)"), PIXELS.tobytes())
    whole = archive(tmp_path / "x.npz", content, method).read_bytes()
    refused = 0
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x41
        (tmp_path / "x.npz").write_bytes(damaged)
        try:
            np.testing.assert_array_equal(Npz(tmp_path / "x.npz")["arr_0"], PIXELS)
        except (UserError, KeyError):
            refused += 1
    assert refused > len(range(0, len(whole), 7)) * 0.6


def test_refuses_encrypted_and_unknown_members(tmp_path: Path) -> None:
    content = member(header("(12,6,5,3)"), PIXELS.tobytes())
    whole = bytearray(archive(tmp_path / "x.npz", content).read_bytes())
    central = whole.find(b"PK\x01\x02")
    encrypted, unknown = bytearray(whole), bytearray(whole)
    encrypted[6] |= 1
    encrypted[central + 8] |= 1
    unknown[8] = unknown[central + 10] = 99
    for damaged, message in ((encrypted, "encrypted"), (unknown, "not supported")):
        (tmp_path / "x.npz").write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            Npz(tmp_path / "x.npz")["arr_0"]


def test_refuses_two_members_of_one_name(tmp_path: Path) -> None:
    content = member(header("(12,6,5,3)"), PIXELS.tobytes())
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("arr_0.npy", content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("arr_0.npy", content)
    with pytest.raises(UserError, match="several arrays of one name"):
        Npz(tmp_path / "x.npz")


def test_refuses_what_is_no_file_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=r"folder\.npz is truncated or not"):
        Npz(tmp_path / "folder.npz")


def test_a_zip_bomb_is_refused_by_its_declared_size(tmp_path: Path) -> None:
    """20 GB of zeros, written a piece at a time; reading it may ask for no memory worth the name."""
    size = 20_000 * 2**20
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file,
        file.open("arr_0.npy", "w", force_zip64=True) as stream,
    ):
        stream.write(member(header(f"({size},)"), bytes(2**20)))
    # The archive's own word for the size is what is believed first: make it the bomb's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "SUSPICIOUS_BYTES", 2**19)
        with pytest.raises(UserError, match=r"unpacks [\d,]+ bytes to 1,048,\d+: too many"):
            Npz(tmp_path / "x.npz")["arr_0"]
    # Below that limit, the header's claim is compared with the archive's before any array is made.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"its header declares 20,971,520,000 bytes, and 1,048,576"):
        Npz(tmp_path / "x.npz")["arr_0"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10
