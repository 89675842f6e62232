"""Copies of a user's nets in a run folder, named by hash, so that a run can be opened without the originals."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qkd.files import make_folder, sha256_of, write_bytes
from qkd.foreign.user_code import code_hash, file_of, source_of, sources_of
from qkd.moved import FREE_FORM
from qkd.nets.own.spelling import parse_net, with_file

FOLDER = "nets"  # in a run folder
_DIGITS = 12  # of the hash in a name: enough to distinguish versions of one file
_KEPT = re.compile(rf"(?:^|.*/)({FOLDER}/[^/]+-[0-9a-f]{{{_DIGITS}}}/[^/]+\.py)")
_UP = 6  # folders above a weights file in which to look for the run's copies

ROLES = ("teacher", "student")  # groups of a config that name nets under the key `net`, at any depth


def change_nets(data: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return raw config data with each net changed; values that are not text are left to the schema."""
    return {key: _changed(value, change) if key in ROLES else value for key, value in data.items()}


def resolved_nets(data: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return raw config data in which the files of nets are absolute.

    Args:
        data: As in a config file.
        folder: What relative paths are relative to: the config's own folder.
    """
    base = Path(folder).resolve()
    return change_nets(data, lambda net: with_file(net, lambda file: base / file))


def keep_net(net: str, folder: Path) -> str:
    """Copy the file of a net, and the modules that it imports from its own folder, into a run folder.

    Args:
        net: As a config spells it; a net that is not in a file is returned unchanged.
        folder: The run folder.

    Returns:
        The net with the copy as its file.

    Raises:
        ValueError: If the file is not Python.
        OSError: If a file cannot be read or written.
    """

    def kept(file: Path) -> Path:
        home = folder / FOLDER / f"{file.stem}-{code_hash(file)[:_DIGITS]}"
        for name, source in sources_of(file).items():
            if not (home / name).is_file():
                make_folder((home / name).parent)
                write_bytes(home / name, source.read_bytes())
        return home / file.name

    return with_file(net, kept)


def portable_net(net: str) -> str:
    """Return a net as files of a run spell it: its copy relative to the run folder, so that the run can be moved."""

    def relative(file: Path) -> Path:
        match = _KEPT.fullmatch(file.as_posix())
        return file if match is None else Path(match[1])

    return with_file(net, relative)


def located_net(net: str, near: Path) -> str:
    """Return a net named in a file of a run, with the copy in that run's folder as its file.

    Args:
        net: As returned by :func:`portable_net`.
        near: The file that names it.
    """

    def found(file: Path) -> Path:
        homes = (parent / file for parent in list(near.resolve().parents)[:_UP])
        return next((home for home in homes if home.is_file()), file)

    return with_file(net, lambda file: file if file.is_absolute() else found(file))


def kept_files(net: str) -> list[Path]:
    """Return the files of a net's copy in a run folder; empty if it has no copy."""
    name = parse_net(net).name
    file = file_of(name) if ":" in name else None
    if file is None or _KEPT.fullmatch(file.as_posix()) is None:
        return []
    return [file.parent / name for name in sources_of(file)]


def module_hash(net: str) -> str | None:
    """Return the SHA-256 of the module of ``package.module:name``; None if the net is not spelled that way."""
    spelling = parse_net(net)
    if not spelling.is_own or file_of(spelling.name) is not None:
        return None
    source = source_of(spelling.name)
    return None if source is None else sha256_of(source)


def same_net(one: str, other: str) -> bool:
    """Return whether two spellings mean the same net: the same text, or files with the same content."""
    if one == other:
        return True
    try:
        return with_file(one, _by_content) == with_file(other, _by_content)
    except (OSError, ValueError):  # one is missing, so they cannot be compared
        return False


def _by_content(file: Path) -> Path:
    return Path(f"{code_hash(file)}.py")


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: change(inner) if key == "net" and isinstance(inner, str) else inner if key in FREE_FORM
        else _changed(inner, change)
        for key, inner in value.items()
    }  # fmt: skip
