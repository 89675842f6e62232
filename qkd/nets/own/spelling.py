"""How a net is spelled: a built-in name, torchvision's, or user code, followed by options of its builder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkd.foreign.user_code import file_of, is_place

_SPELLING = re.compile(r"(?P<name>[^{]+)(?P<options>\{.*\})?", re.DOTALL)


@dataclass(frozen=True)
class NetSpelling:
    """A net: what builds it, and the options it is built with.

    Args:
        name: ``resnet20``, ``torchvision/resnet18``, ``path/to/file.py:function`` or ``package.module:name``.
        options: Keyword arguments of the builder, beside classes, channels and size of the images.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the one text that means this net: the name, and the options as JSON behind it."""
        return self.name + (json.dumps(self.options, sort_keys=True) if self.options else "")

    @property
    def is_own(self) -> bool:
        """Whether it is code that the person brings."""
        return is_place(self.name)

    @property
    def title(self) -> str:
        """What people read: of a path, the file's name alone."""
        file = file_of(self.name) if self.is_own else None
        return str(self if file is None else NetSpelling(f"{file.name}:{self.name.rpartition(':')[2]}", self.options))


def parse_net(text: str) -> NetSpelling:
    """Return the net that a text spells.

    Args:
        text: A name, perhaps with options as JSON behind it.

    Raises:
        ValueError: If the options are not JSON.

    Example:
        >>> parse_net('mynet.py:build{"width": 2}')
        NetSpelling(name='mynet.py:build', options={'width': 2})
    """
    match = _SPELLING.fullmatch(text)
    if match is None:
        raise ValueError(f"must be the name of a net, got {text!r}")
    try:
        options = json.loads(match["options"] or "{}")
    except ValueError as error:
        raise ValueError(f"net {text!r}: the options after the name must be JSON: {error}") from error
    return NetSpelling(match["name"], options)


def spelled(name: str, options: Mapping[str, Any]) -> str:
    """Return a name with options (those that stand behind it give way) as one text."""
    net = parse_net(name)
    return str(NetSpelling(net.name, {**net.options, **options}))


def net_title(text: str) -> str:
    """Return what people read of a net: of a path, the file's name alone."""
    return parse_net(text).title


def with_file(text: str, change: Callable[[Path], Path]) -> str:
    """Return a net with another file, where it has one; a text that spells no net is said where names are looked up."""
    try:
        net = parse_net(text)
    except ValueError:
        return text
    file = file_of(net.name) if net.is_own else None
    if file is None:
        return text
    return str(NetSpelling(f"{change(file).as_posix()}:{net.name.rpartition(':')[2]}", net.options))
