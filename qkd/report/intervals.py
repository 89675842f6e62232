"""Estimate how precisely the difference of two accuracies is known, on the same or on different images."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from qkd.report.caveats import NORMAL_95, wilson


def pack_answers(is_right: npt.NDArray[np.bool_]) -> str:
    """Return which images a net gets right as text: one bit each, eight to a byte, in hexadecimal digits."""
    return np.packbits(is_right).tobytes().hex()


def unpack_answers(text: str, images: int) -> npt.NDArray[np.bool_] | None:
    """Return what :func:`pack_answers` packed; None if the text is not for that number of images."""
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    except ValueError:
        return None
    return bits[:images].astype(bool) if len(bits) == -(-images // 8) * 8 else None


def paired_difference(ours: npt.NDArray[np.bool_], theirs: npt.NDArray[np.bool_]) -> dict[str, float]:
    r"""Return how much more accurate one net is than another on the same images.

    .. math:: (b - c) / (n + 2) \pm z \sqrt{b + c + 1 - (b - c)^2 / (n + 2)} / (n + 2)

    with :math:`b` images that only the first gets right, and :math:`c` that only the second gets right. It is the
    interval of half an image more in each of the four cells: without them, two nets that differ on few images, or on
    none, would seem to be known exactly. The difference itself is :math:`(b - c) / n`.

    Args:
        ours: Which images the first gets right.
        theirs: Likewise for the second.

    Returns:
        ``value``, ``half_width`` (95 %) and the interval's ends ``low`` and ``high`` (within -1 and 1) as fractions,
        and both counts.

    References:
        Agresti, Min, Simple improved confidence intervals for comparing matched proportions, 2005.
    """
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    count, apart = len(ours), only_ours - only_theirs
    half = NORMAL_95 * math.sqrt(only_ours + only_theirs + 1 - apart * apart / (count + 2)) / (count + 2)
    middle = apart / (count + 2)
    return {
        "value": apart / count,
        "half_width": half,
        "low": max(-1.0, middle - half),
        "high": min(1.0, middle + half),
        "only_student": only_ours,
        "only_teacher": only_theirs,
    }


def unpaired_interval(ours: float, theirs: float, counts: tuple[int, int]) -> tuple[float, float]:
    r"""Return the 95 % interval of a difference of proportions, from Wilson's intervals (Newcombe's method 10).

    .. math:: d - \sqrt{(p_1 - l_1)^2 + (u_2 - p_2)^2}, \quad d + \sqrt{(u_1 - p_1)^2 + (p_2 - l_2)^2}

    Args:
        ours: First proportion, 0..1.
        theirs: Second proportion.
        counts: Number of observations of each, positive.

    References:
        Newcombe, Interval estimation for the difference between independent proportions, 1998.
    """
    (low, high), (their_low, their_high) = wilson(ours, counts[0]), wilson(theirs, counts[1])
    apart = ours - theirs
    return apart - math.hypot(ours - low, their_high - theirs), apart + math.hypot(high - ours, theirs - their_low)
