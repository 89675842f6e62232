"""What an agent does, as values: operations, policies of operations, and schedules of policies over the epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qkd.foreign import nearest

# In the order in which the published 60-integer policies list them (CPython 2.7's hash order of the PBA dictionary).
PBA_OPERATIONS = (
    "Rotate",
    "TranslateX",
    "TranslateY",
    "Brightness",
    "Color",
    "Invert",
    "Sharpness",
    "Posterize",
    "ShearX",
    "Solarize",
    "ShearY",
    "Equalize",
    "AutoContrast",
    "Cutout",
    "Contrast",
)
LEVELS = 10  # magnitudes 0..9


def operation_fault(name: object) -> str | None:
    """Return what is wrong with the name of an operation, with the nearest known one, or None."""
    if isinstance(name, str) and name in PBA_OPERATIONS:
        return None
    near = nearest(str(name), PBA_OPERATIONS)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(PBA_OPERATIONS)}"
    return f"unknown operation {name!r}{hint}"


def probability_fault(value: object) -> str | None:
    """Return what is wrong with a probability, or None."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(float(str(value))) and 0 <= float(str(value)) <= 1:
        return None
    return f"must be a probability from 0 to 1, got {value!r}"


def magnitude_fault(value: object) -> str | None:
    """Return what is wrong with a magnitude, or None."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LEVELS:
        return None
    return f"must be an integer magnitude from 0 to {LEVELS - 1}, got {value!r}"


def epochs_fault(value: object) -> str | None:
    """Return what is wrong with a number of epochs, or None."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return None
    return f"must be a positive number of epochs, got {value!r}"


@dataclass(frozen=True)
class Op:
    """One operation of a policy.

    Args:
        name: One of ``PBA_OPERATIONS``.
        probability: That it is applied when drawn, 0..1.
        magnitude: Level, integer 0..9; `qkd.agents.policies.magnitudes` says what it means for each operation.

    Raises:
        ValueError: If a field is out of its range or the name is unknown.
    """

    name: str
    probability: float
    magnitude: int

    def __post_init__(self) -> None:
        """Check the fields."""
        faults = {
            "name": operation_fault(self.name),
            "probability": probability_fault(self.probability),
            "magnitude": magnitude_fault(self.magnitude),
        }
        found = [f"{field}: {fault}" for field, fault in faults.items() if fault]
        if found:
            raise ValueError(f"Op({self.name!r}): {'; '.join(found)}")


@dataclass(frozen=True)
class Policy:
    """Operations among which an image's are drawn: none, one or two of them, in random order (`PolicyDraws`).

    Args:
        ops: Can be empty (no operation), and can contain an operation more than once.

    Raises:
        TypeError: If ``ops`` holds anything but `Op` values.
    """

    ops: tuple[Op, ...] = ()

    def __post_init__(self) -> None:
        """Take any sequence of operations; keep a tuple."""
        object.__setattr__(self, "ops", tuple(self.ops))
        if not all(isinstance(op, Op) for op in self.ops):
            raise TypeError(f"a Policy must consist of Op values, got {self.ops!r}")


@dataclass(frozen=True)
class Segment:
    """A stretch of epochs with one policy.

    Args:
        epochs: Length, positive.
        policy: What is done in them.

    Raises:
        ValueError: If ``epochs`` is not a positive integer.
    """

    epochs: int
    policy: Policy

    def __post_init__(self) -> None:
        """Check the length."""
        fault = epochs_fault(self.epochs)
        if fault:
            raise ValueError(f"Segment: epochs: {fault}")


@dataclass(frozen=True)
class Schedule:
    """Policies over the epochs of a training.

    Args:
        segments: One or more, in order; pairs ``(epochs, policy)`` are accepted, too.

    Raises:
        ValueError: If there are no segments, or one is out of range.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        """Take any sequence of segments or pairs; keep a tuple of segments."""
        made = tuple(one if isinstance(one, Segment) else Segment(*one) for one in self.segments)
        if not made:
            raise ValueError("a Schedule needs at least one segment of (epochs, policy)")
        object.__setattr__(self, "segments", made)

    @property
    def epochs(self) -> int:
        """Length in epochs."""
        return sum(segment.epochs for segment in self.segments)

    def stretched(self, total_epochs: int) -> Schedule:
        """Return the schedule for a training of ``total_epochs``.

        Each segment gets ``int(epochs * total_epochs / self.epochs)`` epochs, in integers; the last policy fills what
        is left at the end. Segments that vanish are left out.

        Raises:
            ValueError: If ``total_epochs`` is not positive.

        References:
            The role-kd release (arXiv 2004.08861) and PBA (Ho et al., arXiv 1905.05393) stretch schedules this way.
        """
        fault = epochs_fault(total_epochs)
        if fault:
            raise ValueError(f"total_epochs: {fault}")
        lengths = [segment.epochs * total_epochs // self.epochs for segment in self.segments]
        lengths[-1] += total_epochs - sum(lengths)
        pairs = zip(lengths, self.segments, strict=True)
        return Schedule(tuple(Segment(length, segment.policy) for length, segment in pairs if length))

    def at(self, epoch: int, total_epochs: int | None = None) -> Policy:
        """Return the policy of an epoch.

        Args:
            epoch: Counts from 0.
            total_epochs: Length of the training; the schedule is stretched to it. None: its own length.

        Raises:
            ValueError: If ``epoch`` is not within the training.
        """
        total_epochs = self.epochs if total_epochs is None else total_epochs
        if not 0 <= epoch < total_epochs:
            raise ValueError(
                f"epoch must be 0..{total_epochs - 1} for a training of {total_epochs} epochs, got {epoch=}"
            )
        for segment in self.stretched(total_epochs).segments:
            if epoch < segment.epochs:
                return segment.policy
            epoch -= segment.epochs
        return self.segments[-1].policy
