"""Which onnxruntime computes wrongly where."""

from __future__ import annotations

import pytest

from export.versions import AMX, arithmetic_note, range_note


@pytest.mark.parametrize(
    ("version", "is_faulty"),
    [("1.20.1", False), ("1.21.0", True), ("1.23.2", True), ("1.24.4", True), ("1.25.0", False), ("1.32.0", False),
     ("2.0", False), ("qonnx 1.0", False), ("not installed", False), (None, False)],
)  # fmt: skip
def test_integers_on_amx(version: str | None, is_faulty: bool) -> None:  # noqa: FBT001
    assert bool(arithmetic_note(version, {AMX, "avx2"})) == is_faulty
    assert arithmetic_note(version, {"avx2", "avx512_vnni"}) == ""


def test_the_note_says_what_to_install() -> None:
    note = arithmetic_note("1.23.2", [AMX])
    assert "1.23.2" in note and "use 1.25 or later" in note and "26324" in note


def test_a_range_of_versions_names_only_those_that_fail() -> None:
    assert "onnxruntime 1.21 to 1.24 multiplies" in range_note((1, 17), ["head"])
    assert "(here head)" in range_note((1, 17), ["head"])
    assert "onnxruntime 1.24 multiplies" in range_note((1, 24), ["head"])
    assert range_note((1, 25), ["head"]) == ""
