"""Atomic file writes: a write is either complete under its name or leaves the old file untouched.

Errors: :class:`DamagedFileError` (a ``ValueError``) for content that is not what was written; ``OSError`` with the
path, the cause and a remedy if the disk fails; ``ValueError`` for pickled files, which are never opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from export.atomic import TEMPORARY_MARK, replace_file
from qkd.files.reading import delete_file, may_write
from qkd.foreign.opening import open_regular, read_regular, read_text

if TYPE_CHECKING:
    from torch import Tensor

MOST_TENSOR_BYTES = 64 << 30  # per file of tensors; checked before it is read
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_FACTS = "facts"  # header entry that holds all metadata as JSON
_WAY_OUT = {
    errno.ENOSPC: "free some space there, or choose another --runs-dir; files already written are untouched",
    errno.EDQUOT: "your quota is used up: free some space, or choose another --runs-dir",
    errno.EACCES: "make the folder writable for you, or choose another --runs-dir",
    errno.EPERM: "make the folder writable for you, or choose another --runs-dir",
    errno.EROFS: "the file system is read-only: choose another --runs-dir",
    errno.ENOTDIR: "a file is where a folder is needed: move it away, or choose another --runs-dir or name",
    errno.EEXIST: "a file is where a folder is needed: move it away, or choose another --runs-dir or name",
    errno.EISDIR: "a folder is where a file is needed: move it away",
}


class DamagedFileError(ValueError):
    """A file is damaged: truncated, altered, or not in its format."""


def inside(folder: Path, name: str | os.PathLike[str]) -> Path:
    """Return the path of a file in a folder from a name in a manifest or record, which may be anything.

    Args:
        folder: The folder.
        name: Relative to it.

    Returns:
        ``folder / name``, which is within ``folder`` even after all symbolic links are followed.

    Raises:
        ValueError: If it is not: the name is absolute or uses ``..`` to leave it, or a link on the way leads out.
    """
    path = Path(folder) / name
    try:
        resolved, root = path.resolve(), Path(folder).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links; a NUL in the name
        raise ValueError(f"{str(path)!r}: cannot be resolved ({error}); delete it") from error
    if root != resolved and root not in resolved.parents:
        raise ValueError(
            f"{path}: leads out of {folder}, to {resolved}; move the file into it, and delete the link or entry"
        )
    return path


def refuse_links_out(folder: Path) -> None:
    """Raise if a folder contains a symbolic link that leads out of it, since files are written and deleted there.

    Args:
        folder: Searched recursively; links are not followed.

    Raises:
        ValueError: Naming the link and where it leads.
    """
    for parent, folders, files in os.walk(folder):  # does not follow links
        for name in (*folders, *files):
            if os.path.islink(os.path.join(parent, name)):
                inside(folder, os.path.relpath(os.path.join(parent, name), folder))


def make_folder(path: Path) -> Path:
    """Create a folder and any missing parents.

    Args:
        path: The folder.

    Returns:
        ``path``.

    Raises:
        OSError: If it cannot be created; the message states the path, the cause and a remedy.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _explain(error, "create the folder", path) from error
    return path


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file atomically, and return its SHA-256.

    Args:
        path: Where to; an existing file is replaced. Its folder must exist.
        data: The content.

    Returns:
        The SHA-256 of ``data``, 64 hexadecimal digits.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an earlier file of this name is untouched.
        ValueError: If the name is a device's, a pipe's or a socket's, or links to one.
    """
    try:
        if may_write():
            replace_file(Path(path), data)
    except OSError as error:
        raise _explain(error, "write", Path(path)) from error
    return hashlib.sha256(data).hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write UTF-8 text atomically.

    Args:
        path: Where to; an existing file is replaced. Its folder must exist.
        text: The content.

    Returns:
        The SHA-256 of the file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an earlier file of this name is untouched.
        ValueError: If the path is a device, a pipe or a socket, or links to one, or the text contains half of a
            surrogate pair.
    """
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> str:
    """Write a value as indented JSON, atomically.

    Args:
        path: Where to; an existing file is replaced. Its folder must exist.
        value: Anything that :mod:`json` can write.

    Returns:
        The SHA-256 of the file's bytes, 64 hexadecimal digits.

    Raises:
        ValueError: If ``value`` contains NaN or an infinity, which JSON does not support, or the path is a device, a
            pipe or a socket, or links to one.
        OSError: If the disk is full or the folder cannot be written; an earlier file of this name is untouched.
        TypeError: If ``value`` contains an object that JSON cannot represent.
    """
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write named tensors in the safetensors format, atomically.

    Args:
        path: Where to.
        tensors: Name -> tensor, on any device, of any memory format; views and shared storage are copied.
        metadata: Strings to keep in the header. Equal content gives equal bytes.

    Returns:
        The SHA-256 of the file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an earlier file of this name is untouched.
        ValueError: If the name is a device's, a pipe's or a socket's, or links to one.
    """
    import safetensors.torch  # imports torch, which nothing else here needs

    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    # one entry, since the library writes several entries in an order that varies between calls
    header = {_FACTS: json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    return write_bytes(path, safetensors.torch.save(plain, header))


def read_verified(path: Path, sha256: str) -> bytes:
    """Read a file and check that it is unchanged since it was written.

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
    data = read_regular(path, MOST_TENSOR_BYTES)
    refuse_pickle(path, data)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DamagedFileError(
            f"{path}: truncated or altered: its SHA-256 is {found[:12]}..., but {sha256[:12]}... was written"
        )
    return data


def parse_safetensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """Return the tensors of safetensors bytes.

    Args:
        path: Shown in error messages.
        data: The file's content.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        DamagedFileError: If the bytes are not a complete safetensors file.
        ValueError: If they are pickled.
    """
    import safetensors.torch

    refuse_pickle(path, data)
    try:
        return dict(safetensors.torch.load(data))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); restore or delete it") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU.

    Args:
        path: The file.

    Returns:
        Name -> tensor.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not a complete safetensors file.
        ValueError: If it is pickled (``torch.save``): such files are never opened.
        OSError: If it is not a regular file, too large, or cannot be read.
    """
    return parse_safetensors(path, read_regular(path, MOST_TENSOR_BYTES))


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings in the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        Name -> text; empty if there are none.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not a complete safetensors file.
        OSError: If it is not a regular file, or cannot be read.
    """
    with open_regular(path):  # safetensors would block on a named pipe
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); restore or delete it") from error
    facts = parse_json(path, header[_FACTS]) if _FACTS in header else header
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise DamagedFileError(f"{path}: the metadata in its header does not map names to text; restore or delete it")
    return facts


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Args:
        path: The file.

    Returns:
        As for :func:`parse_json`.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not JSON.
        OSError: If it is not a regular file, or too large.
    """
    try:
        return parse_json(path, read_text(path))
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path}: not JSON ({error}); restore or delete it") from error


def parse_json(where: object, text: str) -> Any:
    """Return the value of a JSON text, as strictly as we write it: finite numbers, and text that can be encoded.

    Args:
        where: Shown in error messages: a file, or a file and a line.
        text: The JSON.

    Returns:
        Dictionaries, lists, text, numbers, booleans and None.

    Raises:
        DamagedFileError: If it is not JSON, is nested too deeply, or contains NaN, an infinity, a number with thousands
            of digits or half of a surrogate pair.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a JSON number")

    try:
        value = json.loads(text, parse_constant=refuse)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # escapes may be whole pairs
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DamagedFileError(f"{where}: not JSON ({reason}); restore or delete it") from error
    return value


def refuse_pickle(path: Path, data: bytes) -> None:
    """Raise if the bytes look like a pickle or a ``torch.save`` archive.

    Args:
        path: Shown in error messages.
        data: The file's content, or its first nine bytes.

    Raises:
        ValueError: If ``data`` starts like a pickle (protocol 2 or later), or like the zip that ``torch.save`` writes.
    """
    is_safetensors = data[8:9] == b"{"  # after the length of the header, which may start like a pickle
    is_pickle = len(data) > 1 and data[0] == 0x80 and 2 <= data[1] <= 5 and not is_safetensors
    if is_pickle or data[:4] == b"PK\x03\x04":
        raise ValueError(
            f"{path}: is a pickled file, which can run code when opened, and is refused; only safetensors are read. "
            f"Convert weights with safetensors.torch.save_file(torch.load(..., weights_only=True), ...), "
            f"or delete a checkpoint of this kind"
        )


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: If there is no such file, it is not a regular file, or it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Delete the files with temporary names that interrupted writes left in these folders.

    Args:
        folders: Not searched recursively; links are not followed.

    Raises:
        OSError: If a file cannot be deleted.
    """
    for folder in folders:
        if folder.is_symlink():
            continue
        for path in folder.glob(f".*{TEMPORARY_MARK}*"):
            delete_file(path)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):  # 1 MiB at a time
        digest.update(block)
    return digest.hexdigest()


def _explain(error: OSError, action: str, path: Path) -> OSError:
    number = error.errno or 0
    cause = error.strerror or str(error)
    if number == errno.ENOENT:
        way_out = f"the folder {path.parent} is missing: create it, or choose another --runs-dir"
    else:
        way_out = _WAY_OUT.get(number, "check the disk and the folder")
    return OSError(number, f"cannot {action} {path}: {cause}; {way_out}")
