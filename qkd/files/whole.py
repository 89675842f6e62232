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
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from qkd.foreign.opening import open_regular, read_regular, read_text

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY_MARK = ".partial-"  # in the name of every unfinished file; `remove_unfinished` looks for it

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
    """A file does not hold what was once written: it is truncated, altered or not of its format."""


def inside(folder: Path, name: str | os.PathLike[str]) -> Path:
    """Return the path of a file within a folder, however a manifest or record spells it.

    Args:
        folder: The folder.
        name: Relative to it.

    Returns:
        ``folder / name``, which with every symbolic link followed still lies within ``folder``.

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

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed; then the folder is
    flushed, so that the new name survives a power cut.

    Args:
        path: Where to; an existing file is replaced. Its folder must exist.
        data: The content.

    Returns:
        The SHA-256 of ``data``, 64 hexadecimal digits.

    Raises:
        OSError: If the disk is full or the folder cannot be written; an earlier file of this name is untouched.
        ValueError: If the name is a device's, a pipe's or a socket's, or links to one.
    """
    path = Path(path)
    _refuse_special(path)
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
    """Return the tensors of safetensors bytes read from ``path`` (named in errors only).

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

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not a whole safetensors file.
        ValueError: If it is pickled (``torch.save``): such files are never opened.
    """
    return parse_safetensors(path, read_regular(path, MOST_TENSOR_BYTES))


def read_metadata(path: Path) -> dict[str, str]:
    """Return the strings in the header of a safetensors file.

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not a whole safetensors file.
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

    Raises:
        FileNotFoundError: If there is no such file.
        DamagedFileError: If it is not JSON.
        OSError: If it is no regular file, or too large.
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

    Raises:
        DamagedFileError: If it is not JSON, is nested beyond reason, or holds NaN, an infinity, a number of thousands
            of digits or half of a surrogate pair.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number of JSON")

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
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def remove_unfinished(folders: Iterable[Path]) -> None:
    """Delete what interrupted writes left in these folders (files under a temporary name); links are not followed."""
    for folder in folders:
        if folder.is_symlink():
            continue
        for path in folder.glob(f".*{TEMPORARY_MARK}*"):
            path.unlink(missing_ok=True)


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):  # 1 MiB at a time
        digest.update(block)
    return digest.hexdigest()


def _refuse_special(path: Path) -> None:
    """Raise if a name stands for a device, a pipe or a socket: a rename would put a file in its place."""
    try:
        mode, folder = os.stat(path).st_mode, path.parent.resolve()
    except (OSError, RuntimeError, ValueError):
        return  # new, or the write itself says what is wrong
    is_file = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    # /dev/stdout is a link of the system's, whatever it leads to
    if not is_file or folder == Path("/dev") or Path("/proc") in folder.parents:
        raise ValueError(f"{path}: is a device, a pipe or a socket, which a file would replace; name a file")


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
