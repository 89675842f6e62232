"""Whole-or-nothing files: a write is complete under its name or has left what was there untouched.

Errors: :class:`DamagedFileError` (a ``ValueError``) for content that is not what was written; ``OSError`` with the
path, the cause and a way out where the disk refuses; ``ValueError`` for pickled files, which are never opened.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

TEMPORARY_MARK = ".partial-"  # in the name of every unfinished file; `remove_unfinished` looks for it

_FACTS = "facts"  # header entry with all metadata as JSON
_WAY_OUT = {
    errno.ENOSPC: "free some space there, or choose another --runs-dir; what was written before is untouched",
    errno.EDQUOT: "your quota is used up: free some space, or choose another --runs-dir",
    errno.EACCES: "make the folder writable for you, or choose another --runs-dir",
    errno.EPERM: "make the folder writable for you, or choose another --runs-dir",
    errno.EROFS: "the file system is read-only: choose another --runs-dir",
    errno.ENOTDIR: "a file is where a folder is needed: move it away, or choose another --runs-dir or name",
    errno.EEXIST: "a file is where a folder is needed: move it away, or choose another --runs-dir or name",
    errno.EISDIR: "a folder is where a file is needed: move it away",
}


class DamagedFileError(ValueError):
    """A file does not hold what was once written: it is truncated, altered or not of its format."""


def make_folder(path: Path) -> Path:
    """Create a folder and its parents where they are missing.

    Args:
        path: The folder.

    Returns:
        ``path``.

    Raises:
        OSError: If it cannot be created; the message names the path, the cause and a way out.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explain(error, "create the folder", path) from error
    return path


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file whole or not at all, and return its SHA-256.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed; then the folder is
    flushed, so that the new name survives a power cut.

    Args:
        path: Where to; an existing file is replaced. Its folder must exist.
        data: The content.

    Returns:
        The SHA-256 of ``data``, 64 hexadecimal digits.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an earlier file of this name is untouched.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        unfinished = path.parent / f".{path.name}{TEMPORARY_MARK}{secrets.token_hex(4)}"
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        temporary = unfinished
        try:
            _write_all(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(unfinished, path)
        temporary = None
        _flush_folder(path.parent)
    except OSError as error:
        raise _explain(error, "write", path) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write UTF-8 text whole or not at all; return and raise as :func:`write_bytes`."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> str:
    """Write a value as indented JSON, whole or not at all; return and raise as :func:`write_bytes`.

    Raises:
        ValueError: If ``value`` holds NaN or an infinity, which JSON does not know.
    """
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write named tensors in the safetensors format, whole or not at all; return and raise as :func:`write_bytes`.

    Args:
        path: Where to.
        tensors: Name -> tensor, on any device, of any memory format; views and shared storage are copied.
        metadata: Strings kept in the header. Equal content gives equal bytes.
    """
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    # one entry, since the library writes several in an order that changes from call to call
    header = {_FACTS: json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    return write_bytes(path, safetensors.torch.save(plain, header))


def read_verified(path: Path, sha256: str) -> bytes:
    """Read a file and check that it is the one that was written.

    Args:
        path: The file.
        sha256: Expected SHA-256, 64 hexadecimal digits.

    Returns:
        Its content.

    Raises:
        DamagedFileError: If the hash differs.
        ValueError: If the file is pickled.
        OSError: If it cannot be read.
    """
    data = Path(path).read_bytes()
    refuse_pickle(path, data)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DamagedFileError(
            f"{path}: truncated or altered: its SHA-256 is {found[:12]}..., written was {sha256[:12]}..."
        )
    return data


def parse_safetensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """Return the tensors of safetensors bytes read from ``path`` (named in errors only).

    Raises:
        DamagedFileError: If the bytes are not a whole safetensors file.
        ValueError: If they are pickled.
    """
    refuse_pickle(path, data)
    try:
        return dict(safetensors.torch.load(data))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); restore or delete it") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not a whole safetensors file.
        ValueError: If it is pickled (``torch.save``): such files are never opened.
    """
    return parse_safetensors(path, Path(path).read_bytes())


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings in the header of a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not a whole safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); restore or delete it") from error
    return dict(json.loads(header[_FACTS])) if _FACTS in header else header


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{path}: not JSON ({error}); restore or delete it") from error


def refuse_pickle(path: Path, data: bytes) -> None:
    """Raise if the bytes look like a pickle or a ``torch.save`` archive.

    Raises:
        ValueError: If ``data`` starts like a pickle (protocol 2 and later), or like the zip that ``torch.save`` writes.
    """
    is_pickle = len(data) > 1 and data[0] == 0x80 and 2 <= data[1] <= 5
    if is_pickle or data[:4] == b"PK\x03\x04":
        raise ValueError(
            f"{path}: is a pickled file, which can run code when opened, and is refused; only safetensors are read. "
            f"Convert weights with safetensors.torch.save_file(torch.load(..., weights_only=True), ...), "
            f"or delete a checkpoint of this kind"
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Delete what interrupted writes left in these folders (files under a temporary name)."""
    for folder in folders:
        for path in folder.glob(f".*{TEMPORARY_MARK}*"):
            path.unlink(missing_ok=True)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):  # 1 MiB at a time
        digest.update(block)
    return digest.hexdigest()


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _explain(error: OSError, action: str, path: Path) -> OSError:
    number = error.errno or 0
    cause = error.strerror or str(error)
    if number == errno.ENOENT:
        way_out = f"the folder {path.parent} is missing: create it, or choose another --runs-dir"
    else:
        way_out = _WAY_OUT.get(number, "see whether the disk and the folder are in order")
    return OSError(number, f"cannot {action} {path}: {cause}; {way_out}")
