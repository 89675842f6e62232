"""Images in four orientations, with their labels and rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.stable import in_full_precision

TURNS = 4  # 0, 90, 180, 270 degrees


def turn_images(images: Tensor) -> Tensor:
    """Return every image turned counter-clockwise by 0, 90, 180 and 270 degrees, with its four turns adjacent.

    Args:
        images: Shape ``[batch, channels, side, side]``.

    Returns:
        Shape ``[4 * batch, channels, side, side]``, same type and memory format; row ``4 * i + r`` is image ``i``
        turned by ``90 * r`` degrees.

    Raises:
        ValueError: If the images are not square: turned by 90 degrees they would have another shape.

    Example:
        >>> turn_images(torch.tensor([[[[1, 2], [3, 4]]]]))[:, 0].tolist()
        [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"only square images [batch, channels, side, side] keep their shape when turned by 90 degrees, "
            f"got {tuple(images.shape)}; crop or resize them to squares, or train without rotations"
        )
    turned = torch.stack([torch.rot90(images, turn, (2, 3)) for turn in range(TURNS)], dim=1).flatten(0, 1)
    by_channel = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return turned.contiguous(memory_format=torch.channels_last) if by_channel else turned


def joint_labels(labels: Tensor) -> Tensor:
    r"""Return the labels of class and orientation together, :math:`4 y + r`, in the order of :func:`turn_images`.

    Args:
        labels: True classes :math:`y` of ``classes``, shape ``[batch]``, int64.

    Returns:
        Shape ``[4 * batch]``, int64, in ``0 .. 4 * classes - 1``.

    Raises:
        ValueError: If ``labels`` are not ``[batch]``.

    Example:
        >>> joint_labels(torch.tensor([3, 0])).tolist()
        [12, 13, 14, 15, 0, 1, 2, 3]
    """
    if labels.dim() != 1:
        raise ValueError(f"need labels [batch], got {tuple(labels.shape)}")
    return (TURNS * labels.unsqueeze(1) + torch.arange(TURNS, device=labels.device)).flatten()


def upright(rows: Tensor) -> Tensor:
    """Return the rows of the images that were not turned, in order.

    Args:
        rows: Shape ``[4 * batch, ...]``, in the order of :func:`turn_images`.

    Returns:
        Shape ``[batch, ...]``, a view.

    Raises:
        ValueError: If the number of rows is not a multiple of four.
    """
    if rows.dim() == 0 or len(rows) % TURNS:
        raise ValueError(f"need four rows per image, got shape {tuple(rows.shape)}")
    return rows[::TURNS]


@in_full_precision
def class_log_probabilities(joint_logits: Tensor) -> Tensor:
    r"""Return what joint logits say about the class alone: :math:`\log \sum_r \sigma(z)_{4 k + r}`.

    Args:
        joint_logits: :math:`z`, shape ``[rows, 4 * classes]``, floating.

    Returns:
        Shape ``[rows, classes]``; the exponentials of a row sum to 1.

    Raises:
        ValueError: If the last dimension is not a multiple of four.
    """
    if joint_logits.dim() != 2 or joint_logits.shape[1] % TURNS:
        raise ValueError(f"need joint logits [rows, 4 * classes], got {tuple(joint_logits.shape)}")
    by_class = functional.log_softmax(joint_logits, dim=1).reshape(len(joint_logits), -1, TURNS)
    return by_class.logsumexp(dim=2)
