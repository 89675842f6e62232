"""What the shell completes: configs, keys of configs, and the parser's options (extra [completion])."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from export.extras import COMPLETION

ASKED = "_ARGCOMPLETE"  # set by the shell's completion while it asks


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell's completion request, if there is one, and exit.

    Args:
        parser: Of all commands.

    Raises:
        SystemExit: With code 2 if it asks, and the package that answers is not installed.
    """
    if ASKED not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        parser.error(f"completion: argcomplete is missing: {COMPLETION}")
    argcomplete.autocomplete(parser)


def configs(prefix: str, **_: object) -> Iterator[str]:
    """Yield what can be a config: files, folders, shipped ones.

    Args:
        prefix: What is typed already.
    """
    from qkd.config.binding import shipped_configs

    folder = Path(prefix).parent if not prefix.endswith("/") else Path(prefix)
    if folder.is_dir():
        found = sorted(path for path in folder.iterdir() if path.is_dir() or path.suffix in (".yaml", ".yml"))
        yield from (f"{path}/" if path.is_dir() else str(path) for path in found)
    yield from shipped_configs()


def overrides(prefix: str, **_: object) -> Iterator[str]:
    """Yield the keys of a config, each followed by its `=`.

    Args:
        prefix: What is typed already.
    """
    from qkd.config.explaining import explained

    keys = (key for key in explained().keys if not key.is_group and "[]" not in key.path)
    yield from (f"{key.path}=" for key in keys if key.path.startswith(prefix.partition("=")[0]))
