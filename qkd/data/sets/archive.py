"""Arrays of a NumPy archive (npz): headers are checked before any value is read; large arrays stay in the file."""

from __future__ import annotations

import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from qkd.data.errors import DataError
from qkd.data.sets.rows import HeldRows, Rows, StoredRows
from qkd.foreign import is_regular

IN_MEMORY_BYTES = 1 << 26  # 64 MiB; larger arrays stay in the file if possible
_LONGEST_HEADER = 10_000  # characters; NumPy's own bound, above which its parser is not safe to use
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip member; its name and an extra field follow
_BLOCK = 1 << 20
# errors that the readers of zip files and NumPy headers were seen to raise on altered bytes
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, SyntaxError, RuntimeError,
               MemoryError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
               tokenize.TokenError)  # fmt: skip


@dataclass(frozen=True)
class ArrayHeader:
    """The header of one array in an archive.

    Args:
        name: Name of the array.
        dtype: Type of its values.
        shape: Its shape.
        is_fortran: Whether the first axis varies fastest.
        start: Bytes of the member before the first value.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool
    start: int

    @property
    def nbytes(self) -> int:
        """Size of its values in bytes."""
        count = 1
        for size in self.shape:
            count *= size  # Python's integers: a hostile shape must not wrap around
        return count * self.dtype.itemsize


class Archive:
    """An open npz file.

    Args:
        path: The file.
        wanted: Expected content, for messages.
        file: The file, open for reading.

    Raises:
        DataError: If it is not a NumPy archive.
    """

    def __init__(self, path: Path, wanted: str, file: IO[bytes]) -> None:
        self.path, self.wanted = path, wanted
        self._check_kind(file)
        self._zip = zipfile.ZipFile(file)
        self._members = {info.filename.removesuffix(".npy"): info for info in self._zip.infolist()}

    @property
    def names(self) -> list[str]:
        """Names of its arrays."""
        return list(self._members)

    def header(self, name: str) -> ArrayHeader:
        """Return the header of an array without reading any of its values.

        Raises:
            DataError: If it is encrypted, holds pickled objects, or its length does not match its header.
        """
        info = self._members[name]
        if info.flag_bits & 1:
            raise DataError(f"{self.path}: `{name}` is encrypted; decrypt it and save {self.wanted} with numpy.savez")
        with self._zip.open(info) as member:
            version = npy.read_magic(member)
            if version not in ((1, 0), (2, 0)):
                raise self._damaged(f"`{name}` has header version {version}")
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, is_fortran, dtype = read(member, max_header_size=_LONGEST_HEADER)
            found = ArrayHeader(name, dtype, shape, is_fortran, member.tell())
        if dtype.hasobject:
            raise DataError(
                f"{self.path}: `{name}` holds pickled objects, which are never opened; save {self.wanted} with "
                "numpy.savez"
            )
        if min((0, *shape)) < 0 or found.start + found.nbytes != info.file_size:
            raise self._damaged(f"`{name}` should have {found.nbytes:,} bytes, found {info.file_size - found.start:,}")
        return found

    def read(self, header: ArrayHeader) -> npt.NDArray[Any]:
        """Return an array, with only one copy in memory.

        Raises:
            DataError: If it is damaged, or larger than the memory of this machine.
        """
        self._require_room(header)
        values = np.empty(header.nbytes, np.uint8)
        with self._zip.open(self._members[header.name]) as member:
            member.read(header.start)
            rest = values.data
            while rest:
                block = member.read(min(len(rest), _BLOCK))
                if not block:
                    raise self._damaged(f"`{header.name}` is truncated")
                rest[: len(block)] = block
                rest = rest[len(block) :]
            member.read(1)  # the end, where the checksum is compared
        array = values.view(header.dtype)
        return array.reshape(header.shape[::-1]).T if header.is_fortran else array.reshape(header.shape)

    def rows(self, header: ArrayHeader) -> Rows:
        """Return access to the rows of a uint8 array: in the file if it is stored uncompressed, otherwise in memory.

        Raises:
            DataError: If it is damaged, or compressed and larger than the memory of this machine.
        """
        info = self._members[header.name]
        if info.compress_type != zipfile.ZIP_STORED or header.is_fortran or header.nbytes <= IN_MEMORY_BYTES:
            return HeldRows(self.read(header))
        stored = StoredRows(self.path, self._first_byte(info) + header.start, header.shape)
        self._check_sum(info, header, stored)
        return stored

    def _first_byte(self, info: zipfile.ZipInfo) -> int:
        """Return where the data of a member begins in the file: the fields of its local header vary in length."""
        with open(self.path, "rb") as file:
            file.seek(info.header_offset)
            fields = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if fields[0] != b"PK\x03\x04":
            raise self._damaged("a member does not begin where it should")
        return int(info.header_offset + _LOCAL_HEADER.size + fields[-2] + fields[-1])

    def _check_sum(self, info: zipfile.ZipInfo, header: ArrayHeader, stored: StoredRows) -> None:
        with self._zip.open(info) as member:
            found = [zlib.crc32(member.read(header.start))]

        def add(block: memoryview) -> None:
            found[0] = zlib.crc32(block, found[0])

        stored.each_block(add)
        if found[0] != info.CRC:
            raise self._damaged(f"the checksum of `{header.name}` does not match")

    def _require_room(self, header: ArrayHeader) -> None:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if header.nbytes > room:
            raise DataError(
                f"{self.path}: `{header.name}` takes {header.nbytes / 2**30:,.1f} GiB of memory, but this machine has "
                f"{room / 2**30:,.1f}; save it uncompressed with numpy.savez, so that it is read image by image"
            )

    def _check_kind(self, file: IO[bytes]) -> None:
        start = file.read(4)
        file.seek(0)
        if start[:1] == b"\x80":  # how a pickle begins
            raise DataError(f"{self.path}: is a pickle, which is never opened; save {self.wanted} with numpy.savez")
        if start != b"PK\x03\x04":  # how a zip file begins
            raise DataError(f"{self.path}: damaged or not a NumPy archive; write it again with numpy.savez")

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.path}: damaged or not a NumPy archive ({reason}); write it again with numpy.savez")


@contextmanager
def open_archive(path: Path, wanted: str) -> Iterator[Archive]:
    """Open an npz file; errors that a hostile or damaged file triggers are replaced by one that names the file.

    Args:
        path: The file.
        wanted: Expected content, for messages.

    Raises:
        DataError: If it is missing, not a regular file, damaged, encrypted or pickled.
    """
    if not is_regular(path):
        raise DataError(f"{path}: no such file; needs train.npz and test.npz in that folder, each with {wanted}")
    try:
        with open(path, "rb") as file:
            yield Archive(path, wanted, file)
    except DataError:
        raise
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: damaged or not a NumPy archive ({reason}); write it again with numpy.savez"
        ) from error
