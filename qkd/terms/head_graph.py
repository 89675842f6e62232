"""The attention of MHGD: how the images of a batch relate, seen by several heads, and the estimator that trains it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.losses.choices import HEADS
from qkd.terms.width_adapters import WidthAdapters

HEAD_DROPOUT = 0.5  # ours: the published share is not known


class PairAttention(nn.Module):
    r"""Relate the images of a batch by two neighboring features: :math:`\tanh(S_h R_h^T)` for each head h.

    S and R are a linear map with batch norm of the later and of the earlier feature's vectors.

    Args:
        width: Channels of the later feature.
        width_before: Channels of the earlier one.
        heads: Number of heads; each has ``(width + width_before) // 2`` outputs.
    """

    def __init__(self, width: int, width_before: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * ((width + width_before) // 2)
        self.sender, self.receiver = nn.Linear(width, inner), nn.Linear(width_before, inner)
        self.sender_norm, self.receiver_norm = nn.BatchNorm1d(inner), nn.BatchNorm1d(inner)

    def forward(self, vectors: Tensor, before: Tensor, *, learns: bool) -> Tensor:
        """Return the graph, ``[heads, batch, batch]``, in (-1, 1); a row for each image as a sender.

        Args:
            vectors: Of the later feature, ``[batch, width]``.
            before: Of the earlier one, ``[batch, width_before]``.
            learns: True: batch norm on the batch's statistics, gradients reach the weights. False: running statistics,
                the weights are constants; gradients reach the vectors only.
        """
        senders = _by_heads(_project(vectors, self.sender, self.sender_norm, learns=learns), self.heads)
        receivers = _by_heads(_project(before, self.receiver, self.receiver_norm, learns=learns), self.heads)
        return torch.tanh(senders @ receivers.mT)


class PairEstimator(nn.Module):
    """Predict the later feature's vectors from the earlier one's, passed on along a graph.

    Each head hands every image the graph-weighted mean of what it reads from all images' earlier vectors; a linear map
    with batch norm and ReLU, and one more linear map, make the prediction of it. Heads are dropped at random, each
    for each image by itself, so that every head learns something. The published description says no more than
    "estimator with head dropout"; the form is ours.

    Args:
        width: Channels of the later feature.
        width_before: Channels of the earlier one.
        heads: Those of the graph.
        dropout: Share of heads that is dropped in training.
    """

    def __init__(self, width: int, width_before: int, *, heads: int, dropout: float = HEAD_DROPOUT) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        inner = heads * ((width + width_before) // 2)
        self.read, self.mix, self.write = (
            nn.Linear(width_before, inner),
            nn.Linear(inner, width),
            nn.Linear(width, width),
        )
        self.norm = nn.BatchNorm1d(width)

    def forward(self, graph: Tensor, before: Tensor) -> Tensor:
        """Return predictions ``[batch, width]``, of any length.

        Args:
            graph: Shape ``[heads, batch, batch]``.
            before: Shape ``[batch, width_before]``.
        """
        messages = graph @ _by_heads(self.read(before), self.heads) / graph.shape[-1]
        kept = functional.dropout(torch.ones_like(messages[:, :, :1]), self.dropout, self.training)
        joined = (messages * kept).transpose(0, 1).flatten(1)
        return self.write(functional.relu(_normalized(self.mix(joined), self.norm, learns=self.training)))  # type: ignore[no-any-return]


class MultiHeadGraph(nn.Module):
    """What MHGD trains and keeps beside the student: attention and estimator of each pair of neighboring taps.

    Args:
        student_widths: Channels of the student's tapped features, in the order of the net, at least two.
        teacher_widths: Channels of the teacher's; attention works on these. Where widths differ, a learned map
            (:class:`~qkd.terms.width_adapters.WidthAdapters`) comes first.
        heads: Number of heads.

    Raises:
        ValueError: If there are fewer than two widths, not as many of one as of the other, or no head.
    """

    def __init__(self, student_widths: Sequence[int], teacher_widths: Sequence[int], *, heads: int = HEADS) -> None:
        super().__init__()
        if len(teacher_widths) < 2:
            raise ValueError(f"a graph relates neighboring features: need at least 2, got {len(teacher_widths)}")
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads=}")
        self.adapters = WidthAdapters(student_widths, teacher_widths)
        pairs = list(zip(teacher_widths[1:], teacher_widths[:-1], strict=True))
        self.attention = nn.ModuleList(PairAttention(*pair, heads=heads) for pair in pairs)
        self.estimators = nn.ModuleList(PairEstimator(*pair, heads=heads) for pair in pairs)

    @property
    def is_trained(self) -> bool:
        """Whether the attention has learned from a batch at all."""
        return bool(self.get_buffer("attention.0.sender_norm.num_batches_tracked"))

    def graphs(self, vectors: Sequence[Tensor], *, learns: bool) -> list[Tensor]:
        """Return the graph of each pair of neighbors, ``[heads, batch, batch]``; see :class:`PairAttention`."""
        with torch.autocast(vectors[0].device.type, enabled=False):
            return [
                attention(later, before, learns=learns)
                for attention, later, before in zip(self.attention, vectors[1:], vectors[:-1], strict=True)
            ]

    def predictions(self, graphs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return what each estimator makes of a graph and the earlier vectors, ``[batch, width]``."""
        with torch.autocast(vectors[0].device.type, enabled=False):
            return [
                estimator(graph, before)
                for estimator, graph, before in zip(self.estimators, graphs, vectors[:-1], strict=True)
            ]

    def weights(self) -> list[Tensor]:
        """Return the matrices of attention and estimators (no biases, norms or adapters)."""
        parts = (*self.attention.parameters(), *self.estimators.parameters())
        return [parameter for parameter in parts if parameter.dim() > 1]


def _project(rows: Tensor, linear: nn.Linear, norm: nn.BatchNorm1d, *, learns: bool) -> Tensor:
    weight, bias = (linear.weight, linear.bias) if learns else (linear.weight.detach(), linear.bias.detach())
    return _normalized(functional.linear(rows, weight, bias), norm, learns=learns)


def _normalized(rows: Tensor, norm: nn.BatchNorm1d, *, learns: bool) -> Tensor:
    """Apply batch norm in the form asked for, whatever mode the module is in."""
    weight, bias = (norm.weight, norm.bias) if learns else (norm.weight.detach(), norm.bias.detach())
    if learns and norm.num_batches_tracked is not None:
        norm.num_batches_tracked += 1
    return functional.batch_norm(
        rows, norm.running_mean, norm.running_var, weight, bias, learns, norm.momentum or 0.0, norm.eps
    )


def _by_heads(rows: Tensor, heads: int) -> Tensor:
    """Return ``[batch, heads * inner]`` as ``[heads, batch, inner]``."""
    return rows.reshape(len(rows), heads, -1).transpose(0, 1)
