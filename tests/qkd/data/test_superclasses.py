"""The superclasses of CIFAR-100 against a second form of the published table, and other sets."""

from __future__ import annotations

from qkd.data.superclasses import CIFAR100_SUPERCLASSES, superclasses

# The superclass of each class in alphabetical order of the classes, as `coarse_labels` number them.
BY_NUMBER = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10,
    12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16,
    12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14,
    13,
]  # fmt: skip


def test_the_table_is_the_published_one() -> None:
    names = [name for group in CIFAR100_SUPERCLASSES.values() for name in group]
    assert len(CIFAR100_SUPERCLASSES) == 20 and {len(group) for group in CIFAR100_SUPERCLASSES.values()} == {5}
    assert len(set(names)) == 100
    assert superclasses(sorted(names)) == tuple(BY_NUMBER)


def test_other_sets_have_none() -> None:
    assert superclasses([str(digit) for digit in range(10)]) is None
    assert superclasses(["cloud", "sea", "airplane"]) is None
    assert superclasses(["cloud", "sea"]) is None  # one superclass: nothing to compare with
    assert superclasses(["cloud", "wolf"]) is None  # no two classes share one
    assert superclasses(["wolf", "cloud", "sea"]) == (8, 10, 10)
