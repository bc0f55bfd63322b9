"""numpy's files from anywhere: checked before memory is asked for, mapped where they are not compressed.

What a header declares must be there. A `.npz` is a zip archive of `.npy` members: what the archive declares
must be there too, and its checksums must hold. Nothing is unpickled.
"""

import contextlib
import math
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from selfalign.errors import UserError
from selfalign.names import printable

Array = np.ndarray[Any, Any]

SUSPICIOUS_BYTES = 2**28
SUSPICIOUS_RATIO = 100
"""A compressed member that claims more bytes than both allow is taken for a zip bomb: images and
statistics do not compress that well."""
CHUNK = 2**20


def read_npy(path: Path) -> Array:
    """The array of a `.npy`.

    Raises:
        UserError: there is no such file, it is something else, it holds objects, or not the numbers that
            its header declares.
    """
    try:
        if not path.is_file():  # a pipe would wait for a writer
            raise ValueError("there is no such file")
        with path.open("rb") as file:
            shape, fortran, dtype = _read_header(file, path.stat().st_size)
            values = np.fromfile(file, dtype, math.prod(shape))
    except Exception as error:  # numpy evaluates headers, which fails in many ways
        raise UserError(f"{printable(str(path))} cannot be read: {_said(error)}") from error
    return values.reshape(shape, order="F" if fortran else "C")


class _Arrays(Mapping[str, Array]):
    """The arrays of a file by name; which there are is told without reading any."""

    names: Collection[str]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self.names


class Npz(_Arrays):
    """The arrays of a `.npz`, each read when it is asked for.

    Args:
        path: the file.

    Raises:
        UserError: the file is no `.npz`, or holds two arrays of one name; on access also: the array is
            damaged, encrypted, larger than it can be, or no plain array.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():  # a pipe would wait for a writer
                raise ValueError("there is no such file")
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
        except Exception as error:  # zipfile raises a dozen kinds for a damaged archive
            raise UserError(f"{path} is truncated or not a .npz file: {_said(error)}") from error
        self.members = {member.filename.removesuffix(".npy"): member for member in members}
        self.names = self.members.keys()
        if len(self.members) < len(members):
            raise UserError(f"{path} holds several arrays of one name: which one is meant?")

    def __getitem__(self, name: str) -> Array:
        member = self.members[name]
        try:
            return self._read(member)
        except UserError:
            raise
        except (
            Exception
        ) as error:  # zipfile, its decompressors and numpy raise whatever occurs to them
            raise UserError(
                f"{name} of {self.path} is truncated, damaged or no plain array: {_said(error)}"
            ) from error

    def _read(self, member: zipfile.ZipInfo) -> Array:
        name = member.filename.removesuffix(".npy")
        bomb = max(SUSPICIOUS_BYTES, SUSPICIOUS_RATIO * member.compress_size)
        if member.compress_type != zipfile.ZIP_STORED and member.file_size > bomb:
            raise UserError(
                f"{name} of {self.path} unpacks {member.compress_size:,} bytes to "
                f"{member.file_size:,}: too many to be images or statistics; save it with np.savez"
            )
        with zipfile.ZipFile(self.path) as archive, archive.open(member) as stream:
            shape, fortran, dtype = _read_header(stream, member.file_size)
            header = stream.tell()
            if member.compress_type == zipfile.ZIP_STORED and shape and 0 not in shape:
                while stream.read(CHUNK):  # to the end, where the checksum is compared
                    pass
                return self._map(member, header, dtype, shape, fortran)
        with zipfile.ZipFile(self.path) as archive, archive.open(member) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)

    def _map(
        self,
        member: zipfile.ZipInfo,
        header: int,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        fortran: bool,
    ) -> Array:
        """Map a stored member: its bytes follow its local header of 30 bytes, a name and an extra field."""
        with self.path.open("rb") as file:
            file.seek(member.header_offset)
            local = file.read(30)
        lengths = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
        start = member.header_offset + 30 + sum(lengths)
        order = "F" if fortran else "C"
        return np.memmap(self.path, dtype, "r", start + header, shape, order)  # type: ignore[call-overload]


class Hdf5(_Arrays):
    """The data sets at the top of an HDF5 file, each read when it is asked for.

    Links to other files, and data that is kept in others, are not followed: what a file says must be in it.

    Args:
        path: the file.

    Raises:
        UserError: h5py is not installed, or the file is none of HDF5; on access also: it is damaged,
            or larger than it can be.
    """

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ImportError as error:
            raise UserError(
                f"{path} needs h5py: pip install 'selfalign[arrays]', or save it as .npz"
            ) from error
        self.path, self._open = path, h5py.File
        with self._reading("it") as file:
            inside = [
                name for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)
            ]
            self.names = [name for name in inside if isinstance(file[name], h5py.Dataset)]

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[Any]:
        try:
            if not self.path.is_file():  # a pipe would wait for a writer
                raise ValueError("there is no such file")
            with self._open(self.path, "r") as file:
                yield file
        except Exception as error:  # HDF5 raises whatever its filters do
            raise UserError(f"{self.path} cannot be read: {what}: {_said(error)}") from error

    def __getitem__(self, name: str) -> Array:
        with self._reading(name) as file:
            held = file[name]
            if held.external or held.is_virtual:
                raise ValueError("its data is in other files")
            if held.shape is None:
                raise ValueError("it is empty")
            stored = held.id.get_storage_size()
            if held.nbytes > max(SUSPICIOUS_BYTES, SUSPICIOUS_RATIO * stored):
                raise ValueError(f"{stored:,} bytes make {held.nbytes:,}, too many to be samples")
            return np.asarray(held[()])


def _read_header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type; the bytes that follow must be as many as declared.

    Args:
        stream: the file from its beginning.
        size: bytes of the whole file.
    """
    version = np.lib.format.read_magic(stream)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"it is of the unknown version {version}")
    with warnings.catch_warnings(action="ignore"):  # about headers that Python 2 wrote
        shape, fortran, dtype = readers[version](stream)
    if not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"its shape is {shape}")
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are never loaded")
    declared, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if declared != held:
        raise ValueError(f"its header declares {declared:,} bytes, and {held:,} follow")
    return shape, fortran, dtype


def _said(error: Exception) -> str:
    """The first line of what an exception says, or its kind where it says nothing, as MemoryError does."""
    return printable(str(error).partition("\n")[0]) or type(error).__name__
