"""The results of a run: a summary of the run folder, as a table, a page and a text file."""

from export.moved import by_old_spelling
from qkd.report.page import RunRecord, render_page
from qkd.report.searches import SearchRecord
from qkd.report.summary import LayerRow, ModelRow, RunSummary, read_json, summarize
from qkd.report.text import render_text

__getattr__ = by_old_spelling(__name__)
__all__ = [
    "LayerRow",
    "ModelRow",
    "RunRecord",
    "RunSummary",
    "SearchRecord",
    "read_json",
    "render_page",
    "render_text",
    "summarize",
]
