"""How Sphinx builds the documentation: `make docs` (warnings are errors, links between pages are checked)."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

SITE = Path(__file__).resolve().parent
DOCS = SITE.parent
sys.path.insert(0, str(SITE))
sys.path.insert(0, str(DOCS.parent))

import pages  # noqa: E402  - beside this file, which is not a package

project = "qkd-toolkit"
author = "the qkd-toolkit authors"
release = re.findall(r'^version = "(.+)"$', (DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"), re.M)[0]
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
root_doc = "index"
exclude_patterns = ["site/*"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_ambiguous"]

autodoc_typehints = "signature"
autodoc_member_order = "alphabetical"
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"qkd-toolkit {release}"
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"


def _fill(app: Any, name: str, source: list[str]) -> None:
    """Put what is generated into a page as it is read: pages of topics into the index."""
    if name == root_doc:
        source[0] = source[0].replace(pages.TOPICS, "\n".join(pages.topic_pages(DOCS)))


def _always_index(app: Any, *_: Any) -> list[str]:
    """Read the index in every build: a page of a topic may have come since the last one."""
    return [root_doc]


def setup(app: Any) -> dict[str, bool]:
    """Write a page for each method and connect what fills in others."""
    pages.write_method_pages(DOCS / "methods" / "generated")
    app.connect("env-get-outdated", _always_index)
    app.connect("source-read", _fill)
    return {"parallel_read_safe": False}
