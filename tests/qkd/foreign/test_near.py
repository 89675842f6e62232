"""Names that are nearly right."""

from __future__ import annotations

import pytest

from qkd.foreign import nearest


@pytest.mark.parametrize(
    ("name", "found"),
    [("resnet2O", ["resnet20"]), ("ResNet20", ["resnet20"]), ("kd", []), ("resnet20" * 9, []), ("", [])],
)
def test_the_nearest_name(name: str, found: list[str]) -> None:
    assert nearest(name, ["resnet20", "lenet5"]) == found


def test_the_likeliest_is_first_and_no_more_than_asked_for() -> None:
    assert nearest("w2a3", ["w2a2", "w4a4", "w2a3x"], most=2) == ["w2a3x", "w2a2"]
