"""Learned maps from the student's channels to the teacher's, for losses that compare channel by channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class WidthAdapters(nn.Module):
    """A 1x1 convolution without bias for each tap whose widths differ; the identity otherwise.

    Published methods compare layers of equal width and do not need one; it is our addition. It is trained with the
    student, by the same loss, and discarded after the training.

    Args:
        student_widths: Channels of the student's features, in order.
        teacher_widths: Channels of the teacher's features.

    Raises:
        ValueError: If the numbers of widths differ.

    Example:
        >>> adapters = WidthAdapters([8, 16], [8, 32])
        >>> [tuple(feature.shape) for feature in adapters([torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 2, 2)])]
        [(2, 8, 4, 4), (2, 32, 2, 2)]
    """

    def __init__(self, student_widths: Sequence[int], teacher_widths: Sequence[int]) -> None:
        super().__init__()
        if len(student_widths) != len(teacher_widths):
            raise ValueError(
                f"student and teacher must have the same number of widths, got {len(student_widths)} and "
                f"{len(teacher_widths)}"
            )
        self.maps = nn.ModuleList(
            nn.Identity() if student == teacher else nn.Linear(student, teacher, bias=False)
            for student, teacher in zip(student_widths, teacher_widths, strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return features with the teacher's widths, ``[batch, channels, ...]`` each."""
        return [_mapped(feature, adapter) for feature, adapter in zip(features, self.maps, strict=True)]


def _mapped(feature: Tensor, adapter: nn.Module) -> Tensor:
    if isinstance(adapter, nn.Identity):
        return feature
    with torch.autocast(feature.device.type, enabled=False):
        return adapter(feature.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]
