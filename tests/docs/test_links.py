"""README and docs: links lead to files and headings that are there, tables end, the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import ROOT, pages_of_docs

TOP = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md")
PAGES = [*(ROOT / name for name in TOP), *pages_of_docs()]
LINK = re.compile(r"(?<!`)\[[^\]]*\]\((?!https?:|mailto:)([^)\s]+)\)")


def anchors_of(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    heads = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)):
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        if not place.exists() or (anchor and anchor not in anchors_of(place.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_table_ends_where_its_rows_do(page: Path) -> None:
    """Text right below a table becomes its last row."""
    lines = page.read_text(encoding="utf-8").splitlines()
    pairs = zip(lines, lines[1:], strict=False)
    assert [after for row, after in pairs if row.startswith("|") and after and after[0] not in "|<"] == []


def test_every_page_is_in_the_index() -> None:
    """Pages of topics beside it are listed by `docs/site/pages.py`; all others by name."""
    docs = ROOT / "docs"
    index = (docs / "index.md").read_text(encoding="utf-8")
    names = [str(page.relative_to(docs).with_suffix("")) for page in pages_of_docs() if page.parent != docs]
    assert len(names) > 10 and [name for name in names if f"\n{name}\n" not in index] == []
    assert "@TOPICS@" in index


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs the extra [docs] (make docs)")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "docs" / "site"), "-b", "html"]
    done = subprocess.run(
        [sys.executable, *command, "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "site")],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / "site" / "methods" / "generated" / "hint.html").read_text(encoding="utf-8")
    assert "hint_loss" in page and "When to use it" in page and "In the comparison" in page
