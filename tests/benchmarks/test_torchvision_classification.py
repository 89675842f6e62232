"""The table of torchvision's classification list: complete, honest, and what the program makes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quantizers

ROOT = Path(__file__).resolve().parents[2]
# Layer norm and attention have no low-bit form; every other net of the list is purely convolutional.
REFUSED_FAMILIES = ("convnext", "maxvit", "swin", "vit")


@pytest.fixture(scope="module")
def table() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import torchvision_classification as module
    finally:
        sys.path.pop(0)
    return module


def test_the_page_is_what_the_rows_say(table: Any) -> None:
    rows = table.read_rows(table.RESULTS)
    assert {(row.net, row.bits) for row in rows} <= {(name, bits) for name in table.nets() for bits in (4, 2)}
    assert table.RESULTS.with_suffix(".md").read_text() == table.table(rows)


def test_rows_keep_the_commit_they_were_made_with(table: Any, tmp_path: Path) -> None:
    """And every row has the versions it was made with, too."""
    row = table.read_rows(table.RESULTS)[0]
    assert all(kept.commit and kept.versions for kept in table.read_rows(table.RESULTS))
    table.write_rows(tmp_path / "n.json", [replace(row, commit="1234567")])
    assert [made.commit for made in table.read_rows(tmp_path / "n.json")] == ["1234567"]
    assert "packages of 1234567;" in (tmp_path / "n.md").read_text()


@pytest.mark.slow
def test_the_table_has_every_net_in_both_widths(table: Any) -> None:
    """Red until the program has been through the whole list."""
    rows = table.read_rows(table.RESULTS)
    missing = {(name, bits) for name in table.nets() for bits in (4, 2)} - {(row.net, row.bits) for row in rows}
    assert not missing, f"{len(missing)} rows were not run: python benchmarks/torchvision_classification.py"


def test_every_purely_convolutional_net_is_exact(table: Any) -> None:
    for row in table.read_rows(table.RESULTS):
        wanted = table.REFUSED if row.net.startswith(REFUSED_FAMILIES) else table.EXACT
        assert row.verdict == wanted, row
        assert row.reason if wanted == table.REFUSED else row.codes > 0, row


def test_the_page_shows_what_differs(table: Any) -> None:
    """A net that is not exact is on the page with its reason, and missing rows are not called exact."""
    row = table.Row("resnet18", 4, table.DIFFERS, "codes | differ", 64, 4, 11_000_000, 10, 1.0, "1234567", "torch 1")
    page = table.table([row])
    assert "| resnet18 | 11.0 M | 64 | differs | not run | codes \\| differ |" in page
    assert "0 exact, 0 refused, 1 differs" in page


def test_rows_are_kept_whole(table: Any, tmp_path: Path) -> None:
    row = table.Row("vit_b_16", 2, table.REFUSED, "why", 224, 4, 1, 0, 0.5, "1234567", "torch 1")
    rows = [row, replace(row, net="alexnet", bits=4), replace(row, bits=4)]
    table.write_rows(tmp_path / "rows.json", rows)
    assert [(r.net, r.bits) for r in table.read_rows(tmp_path / "rows.json")] == [
        ("alexnet", 4), ("vit_b_16", 4), ("vit_b_16", 2),
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits"),
    [("shufflenet_v2_x0_5", 4), ("mobilenet_v3_small", 2), ("mnasnet0_5", 2), ("regnet_y_400mf", 4), ("vit_b_32", 4),
     ("swin_t", 2), ("convnext_tiny", 4)],
)  # fmt: skip
def test_a_row_is_what_the_program_makes(table: Any, name: str, bits: int) -> None:
    before = quantizers.is_fused()
    quantizers.set_fused(enabled=False)
    try:
        made = table.make_row(name, bits)
    finally:
        quantizers.set_fused(enabled=before)
    kept = next(row for row in table.read_rows(table.RESULTS) if (row.net, row.bits) == (name, bits))
    assert (made.verdict, made.parameters, made.pixels) == (kept.verdict, kept.parameters, kept.pixels)
