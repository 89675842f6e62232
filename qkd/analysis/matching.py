r"""Which teacher layer each student layer should follow: layers matched by what they say about the class.

Information flow modeling describes a net by the information :math:`w_i` that each of its layers has about the class,
and lets a student's layer :math:`i` follow the teacher's layer :math:`\kappa(i)` whose information is the nearest; the
last layer follows the last.

References:
    Passalis, Tzelepi, Tefas, `Heterogeneous Knowledge Distillation Using Information Flow Modeling
    <https://arxiv.org/abs/2005.00727>`_, 2020, section 3.

Deviation: the published form of the estimate could not be read, and the released code searches nothing (it pairs layers
one to one). The estimate here, accuracy of the nearest class mean with means of other images, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_IMAGES = 2  # of a class: one in each half


@dataclass(frozen=True)
class LayerMatch:
    """A student's layer, and the teacher's layer that it should follow.

    Args:
        student: Tap of the student.
        student_information: What it says about the class, see :func:`class_information`.
        teacher: Tap of the teacher.
        teacher_information: Likewise.
    """

    student: str
    student_information: float
    teacher: str
    teacher_information: float


def class_information(features: Tensor, labels: Tensor) -> float:
    """Return how much features say about the class: the accuracy of the nearest class mean, from 0 to 1.

    Images of each class are halved in their order; each half is scored with the means of the other, so that features of
    many dimensions do not score by memory.

    Args:
        features: Shape ``[images, ...]``, floating; flattened to one row per image.
        labels: Shape ``[images]``, whole numbers from 0.

    Raises:
        ValueError: If the sizes differ, a feature is not finite, or no class has two images. Classes with one image are
            left out.
    """
    if len(features) != len(labels) or features.dim() < 2:
        raise ValueError(f"features need a row for each of {len(labels)} labels, got shape {tuple(features.shape)}")
    rows = features.flatten(1)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError("the features are not all finite; was the net trained?")
    center = rows.mean(0, dtype=torch.float64)  # distances far from the origin would lose their digits
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in range(len(torch.bincount(labels))):
        places = (labels == label).nonzero().flatten()
        if len(places) >= LEAST_IMAGES:
            halves[0].append(places[::2])
            halves[1].append(places[1::2])
    if not halves[0]:
        raise ValueError("at least one class must have two images, to score class means with")
    right = total = 0
    for known, asked in (halves, halves[::-1]):
        means = torch.stack([rows[places].mean(0, dtype=torch.float64) for places in known]) - center
        for index, places in enumerate(asked):
            nearest = torch.cdist(rows[places].double() - center, means).argmin(1)
            right += int((nearest == index).sum())
            total += len(places)
    return right / total


def match_layers(student: Mapping[str, float], teacher: Mapping[str, float]) -> tuple[LayerMatch, ...]:
    """Return for each student layer the teacher's with the nearest information; the last layer follows the last.

    Args:
        student: Tap -> information, from the input to the output.
        teacher: Likewise; of equally near layers the first is taken.

    Raises:
        ValueError: If one of them is empty.

    Example:
        >>> found = match_layers({"a": 0.5, "b": 0.8}, {"x": 0.4, "y": 0.7, "z": 0.9})
        >>> [(one.student, one.teacher) for one in found]
        [('a', 'x'), ('b', 'z')]
    """
    if not student or not teacher:
        raise ValueError("layers to match are missing: student and teacher need at least one each")
    *_, last = teacher
    found = []
    for index, (tap, information) in enumerate(student.items(), 1):
        nearest = min(teacher, key=lambda other: abs(teacher[other] - information))
        other = last if index == len(student) else nearest
        found.append(LayerMatch(tap, information, other, teacher[other]))
    return tuple(found)


def flow_divergence(matches: tuple[LayerMatch, ...]) -> float:
    r"""Return :math:`\sum_i (w_{s,i} - w_{t,\kappa(i)})^2` (the same paper): how unlike the flow of information is."""
    return sum((one.student_information - one.teacher_information) ** 2 for one in matches)
