"""Atomic file writes: a write is either complete under its name or leaves the old file untouched.

Errors: :class:`DamagedFileError` (a ``ValueError``) for content that is not what was written; ``OSError`` with the
path, the cause and a way out where the disk refuses; ``ValueError`` for pickled files, which are never opened.
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

MOST_TENSOR_BYTES = 64 << 30  # of one file of tensors; checked before it is read
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
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
    """A file is damaged: truncated, altered, or not in its format."""


def inside(folder: Path, name: str | os.PathLike[str]) -> Path:
    """Return the path of a file within a folder, however a manifest or record spells it.

    Args:
        folder: The folder.
        name: Relative to it.

    Returns:
        ``folder / name``, which with every symbolic link followed is still within ``folder``.

    Raises:
        ValueError: If it does not: the name is absolute, climbs out, or a link on the way leads out.
    """
    path = Path(folder) / name
    try:
        resolved, root = path.resolve(), Path(folder).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links; a NUL in the name
        raise ValueError(f"{str(path)!r}: leads nowhere ({error}); delete it") from error
    if root != resolved and root not in resolved.parents:
        raise ValueError(
            f"{path}: leads out of {folder}, to {resolved}; move the file in, and delete the link or entry"
        )
    return path


def refuse_links_out(folder: Path) -> None:
    """Raise if anything below a folder is a symbolic link that leads out of it: files are written and deleted there.

    Args:
        folder: Everything below it is looked at; links are not followed.

    Raises:
        ValueError: Naming the link and where it leads.
    """
    for parent, folders, files in os.walk(folder):  # does not follow links
        for name in (*folders, *files):
            if os.path.islink(os.path.join(parent, name)):
                inside(folder, os.path.relpath(os.path.join(parent, name), folder))


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
    """Write UTF-8 text whole or not at all.

    Args:
        path: Where to; an existing file is replaced. Its folder must exist.
        text: The content.

    Returns:
        The SHA-256 of the file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an earlier file of this name is untouched.
        ValueError: If the name is a device's, a pipe's or a socket's, or links to one, or the text holds half of a
            surrogate pair.
    """
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> str:
    """Write a value as indented JSON, whole or not at all.

    Args:
        path: Where to; an existing file is replaced. Its folder must exist.
        value: What :mod:`json` can write.

    Returns:
        The SHA-256 of the file's bytes, 64 hexadecimal digits.

    Raises:
        ValueError: If ``value`` holds NaN or an infinity, which JSON does not know, or the name is a
            device's, a pipe's or a socket's, or links to one.
        OSError: If the disk is full or the folder cannot be written; an earlier file of this name is untouched.
        TypeError: If ``value`` holds what JSON cannot.
    """
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write named tensors in the safetensors format, whole or not at all.

    Args:
        path: Where to.
        tensors: Name -> tensor, on any device, of any memory format; views and shared storage are copied.
        metadata: Strings kept in the header. Equal content gives equal bytes.

    Returns:
        The SHA-256 of the file's bytes, 64 hexadecimal digits.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an earlier file of this name is untouched.
        ValueError: If the name is a device's, a pipe's or a socket's, or links to one.
    """
    import safetensors.torch  # brings torch, which nothing else here needs

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
    data = read_regular(path, MOST_TENSOR_BYTES)
    refuse_pickle(path, data)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DamagedFileError(
            f"{path}: truncated or altered: its SHA-256 is {found[:12]}..., written was {sha256[:12]}..."
        )
    return data


def parse_safetensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """Return the tensors of safetensors bytes.

    Args:
        path: Names the bytes in errors.
        data: The file's content.

    Returns:
        Name -> tensor, on the CPU.

    Raises:
        DamagedFileError: If the bytes are not a whole safetensors file.
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
        DamagedFileError: If it is not a whole safetensors file.
        ValueError: If it is pickled (``torch.save``): such files are never opened.
        OSError: If it is not a regular file, too large, or cannot be read.
    """
    return parse_safetensors(path, read_regular(path, MOST_TENSOR_BYTES))


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings in the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        Name -> text; empty where there are none.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not a whole safetensors file.
        OSError: If it is not a regular file, or cannot be read.
    """
    with open_regular(path):  # safetensors would wait for a named pipe
        pass
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise DamagedFileError(f"{path}: not a whole safetensors file ({error}); restore or delete it") from error
    facts = parse_json(path, header[_FACTS]) if _FACTS in header else header
    if not isinstance(facts, dict) or not all(isinstance(value, str) for value in facts.values()):
        raise DamagedFileError(f"{path}: its header's facts are not names with texts; restore or delete it")
    return facts


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Args:
        path: The file.

    Returns:
        What :func:`parse_json` gives.

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
    """Return the value of a JSON text, as strictly as we write it: finite numbers, text that can be written again.

    Args:
        where: Names the text in errors: a file, or a file and a line.
        text: The JSON.

    Returns:
        Dictionaries, lists, text, numbers, booleans and None.

    Raises:
        DamagedFileError: If it is not JSON, is nested beyond reason, or holds NaN, an infinity, a number of thousands
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
        path: Names the bytes in errors.
        data: The file's content, or its first four bytes.

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
    """Return the SHA-256 of a file.

    Args:
        path: The file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: If there is no such file, it is no regular file, or it cannot be read.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Delete what interrupted writes left in these folders (files under a temporary name).

    Args:
        folders: Each by itself, not what is below it; links are not followed.

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
        way_out = _WAY_OUT.get(number, "see whether the disk and the folder are in order")
    return OSError(number, f"cannot {action} {path}: {cause}; {way_out}")
