"""Arrays of a NumPy archive (npz), checked by their headers before a value is read; large ones stay in the file."""

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

IN_MEMORY_BYTES = 1 << 26  # arrays above it stay in the file where they can: 64 MiB
_LONGEST_HEADER = 10_000  # characters; NumPy's own bound, above which its parser is not safe to use
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip member; what follows are its name and an extra field
_BLOCK = 1 << 20
# what the readers of zip files and of NumPy's headers were seen to raise on altered bytes
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, SyntaxError, RuntimeError,
               MemoryError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error,
               tokenize.TokenError)  # fmt: skip


@dataclass(frozen=True)
class ArrayHeader:
    """What an archive says of one of its arrays.

    Args:
        name: Of the array.
        dtype: Type of its values.
        shape: Its shape.
        is_fortran: First axis fastest.
        start: Bytes of the member before the first value.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    is_fortran: bool
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        count = 1
        for size in self.shape:
            count *= size  # Python's integers: a hostile shape must not wrap around
        return count * self.dtype.itemsize


class Archive:
    """An open npz file.

    Args:
        path: The file.
        wanted: What it must hold, for messages.
        file: Open for reading.

    Raises:
        DataError: If it is no NumPy archive.
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
        """Return what the archive says of an array; not one of its values is read.

        Raises:
            DataError: If it is encrypted, holds pickled objects, or is not as long as it says.
        """
        info = self._members[name]
        if info.flag_bits & 1:
            raise DataError(f"{self.path}: `{name}` is encrypted; unpack it and save {self.wanted} with numpy.savez")
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
        """Return an array, in memory once.

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
            member.read(1)  # its end, where the check sum is compared
        array = values.view(header.dtype)
        return array.reshape(header.shape[::-1]).T if header.is_fortran else array.reshape(header.shape)

    def rows(self, header: ArrayHeader) -> Rows:
        """Return a uint8 array whose rows can be had: from the file where it is stored uncompressed, else from memory.

        Raises:
            DataError: If it is damaged, or is compressed and larger than the memory of this machine.
        """
        info = self._members[header.name]
        if info.compress_type != zipfile.ZIP_STORED or header.is_fortran or header.nbytes <= IN_MEMORY_BYTES:
            return HeldRows(self.read(header))
        stored = StoredRows(self.path, self._first_byte(info) + header.start, header.shape)
        self._check_sum(info, header, stored)
        return stored

    def _first_byte(self, info: zipfile.ZipInfo) -> int:
        """Return where a member begins in the file: the fields of its local header have their own lengths."""
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
            raise self._damaged(f"the check sum of `{header.name}` does not fit")

    def _require_room(self, header: ArrayHeader) -> None:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if header.nbytes > room:
            raise DataError(
                f"{self.path}: `{header.name}` takes {header.nbytes / 2**30:,.1f} GiB of memory, and this machine has "
                f"{room / 2**30:,.1f}; save it with numpy.savez (not compressed), which is read image by image"
            )

    def _check_kind(self, file: IO[bytes]) -> None:
        start = file.read(4)
        file.seek(0)
        if start[:1] == b"\x80":  # how a pickle begins
            raise DataError(f"{self.path}: is a pickle, which is never opened; save {self.wanted} with numpy.savez")
        if start != b"PK\x03\x04":  # how a zip file begins
            raise DataError(f"{self.path}: damaged or no NumPy archive; write it again with numpy.savez")

    def _damaged(self, reason: str) -> DataError:
        return DataError(f"{self.path}: damaged or no NumPy archive ({reason}); write it again with numpy.savez")


@contextmanager
def open_archive(path: Path, wanted: str) -> Iterator[Archive]:
    """Open an npz file; what a hostile or damaged one makes the readers raise becomes an error that names the file.

    Args:
        path: The file.
        wanted: What it must hold, for messages.

    Raises:
        DataError: If it is missing, no regular file, damaged, encrypted or pickled.
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
        raise DataError(f"{path}: damaged or no NumPy archive ({reason}); write it again with numpy.savez") from error
