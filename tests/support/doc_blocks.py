"""The code blocks of a page, each with its language and, where it is not run, the reason that the page states."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
SHELL = "bash"


@dataclass(frozen=True)
class Block:
    """A block of a page: where it begins, its language, its text, and why it is not run (empty where it is)."""

    page: str
    line: int
    language: str
    text: str
    reason: str


def pages_of_docs() -> list[Path]:
    """Return the pages under `docs/`, those that a build of the documentation writes left out."""
    return [page for page in sorted((ROOT / "docs").rglob("*.md")) if "generated" not in page.parts]


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page that have a language; those without are pictures and output."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.name, text.count("\n", 0, match.start()) + 1, match["language"], match["text"], match["reason"] or ""
        )
        for match in _BLOCK.finditer(text)
        if match["language"]
    ]


def commands_of(text: str) -> list[list[str]]:
    """Return the `qkd` commands of a shell block as words; comments are left out."""
    import shlex

    lines = re.sub(r"\\\n", " ", text).splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("qkd ")]
    return [line[1:] for line in words]
