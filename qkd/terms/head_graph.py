"""MHGD's attention, by which several heads relate the images of a batch, and the estimator that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.engines.engine import current
from qkd.losses.choices import HEADS
from qkd.terms.width_adapters import WidthAdapters

HEAD_DROPOUT = 0.5  # our choice: the published share is unknown


class PairAttention(nn.Module):
    r"""Relate the images of a batch by two neighboring features: :math:`\tanh(S_h R_h^T)` for each head h.

    S and R are linear maps with batch norm of the later and the earlier feature's vectors.

    Args:
        width: Channels of the later feature.
        width_before: Channels of the earlier feature.
        heads: Number of heads; each has ``(width + width_before) // 2`` outputs.
    """

    def __init__(self, width: int, width_before: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * ((width + width_before) // 2)
        self.sender, self.receiver = nn.Linear(width, inner), nn.Linear(width_before, inner)
        self.sender_norm, self.receiver_norm = nn.BatchNorm1d(inner), nn.BatchNorm1d(inner)

    def forward(self, vectors: Tensor, before: Tensor, *, learns: bool) -> Tensor:
        """Return the graph, ``[heads, batch, batch]``, in (-1, 1), with one row per image as a sender.

        Args:
            vectors: Vectors of the later feature, ``[batch, width]``.
            before: Vectors of the earlier feature, ``[batch, width_before]``.
            learns: If True, batch norm uses the batch's statistics and gradients reach the weights. If False, it uses
                running statistics, the weights are constants, and gradients reach only the vectors.
        """
        senders = _by_heads(_project(vectors, self.sender, self.sender_norm, learns=learns), self.heads)
        receivers = _by_heads(_project(before, self.receiver, self.receiver_norm, learns=learns), self.heads)
        return torch.tanh(senders @ receivers.mT)


class PairEstimator(nn.Module):
    """Predict the later feature's vectors from the earlier feature's, passed along a graph.

    Each head gives every image the graph-weighted mean of what it reads from all images' earlier vectors. A linear map
    with batch norm and ReLU and another linear map predict from it. Heads are dropped at random, independently for each
    image, so that every head learns something. The published description only says "estimator with head dropout"; the
    form is our own.

    Args:
        width: Channels of the later feature.
        width_before: Channels of the earlier feature.
        heads: Number of heads of the graph.
        dropout: Share of heads dropped in training.
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
        """Return predictions ``[batch, width]``, with any norm.

        Args:
            graph: Shape ``[heads, batch, batch]``.
            before: Shape ``[batch, width_before]``.
        """
        messages = graph @ _by_heads(self.read(before), self.heads) / graph.shape[-1]
        kept = functional.dropout(torch.ones_like(messages[:, :, :1]), self.dropout, self.training)
        joined = (messages * kept).transpose(0, 1).flatten(1)
        return self.write(functional.relu(_normalized(self.mix(joined), self.norm, learns=self.training)))  # type: ignore[no-any-return]


class MultiHeadGraph(nn.Module):
    """What MHGD trains along with the student: attention and estimator for each pair of neighboring taps.

    Args:
        student_widths: Channels of the student's tapped features, in network order, at least two.
        teacher_widths: Channels of the teacher's, which the attention works on. If widths differ, a learned map
            (:class:`~qkd.terms.width_adapters.WidthAdapters`) comes first.
        heads: Number of heads.

    Raises:
        ValueError: If there are fewer than two widths, the numbers of widths differ, or ``heads`` is less than 1.
    """

    def __init__(self, student_widths: Sequence[int], teacher_widths: Sequence[int], *, heads: int = HEADS) -> None:
        super().__init__()
        if len(teacher_widths) < 2:
            raise ValueError(f"a graph relates neighboring features, so it needs at least 2, got {len(teacher_widths)}")
        if heads < 1:
            raise ValueError(f"heads must be at least 1, got {heads=}")
        self.adapters = WidthAdapters(student_widths, teacher_widths)
        pairs = list(zip(teacher_widths[1:], teacher_widths[:-1], strict=True))
        self.attention = nn.ModuleList(PairAttention(*pair, heads=heads) for pair in pairs)
        self.estimators = nn.ModuleList(PairEstimator(*pair, heads=heads) for pair in pairs)

    @property
    def is_trained(self) -> bool:
        """Whether the attention has learned from at least one batch."""
        return bool(self.get_buffer("attention.0.sender_norm.num_batches_tracked"))

    def check_widths(self, widths: Sequence[int]) -> None:
        """Raise unless the teacher's features have the channels that the attention is for.

        Raises:
            ValueError: If they do not.
        """
        pairs = [cast(PairAttention, pair) for pair in self.attention]
        known = (pairs[0].receiver.in_features, *(pair.sender.in_features for pair in pairs))
        if tuple(widths) != known:
            raise ValueError(f"the attention is for features of {known} channels, got {tuple(widths)}")

    def graphs(self, vectors: Sequence[Tensor], *, learns: bool) -> list[Tensor]:
        """Return the graph of each pair of neighbors, ``[heads, batch, batch]``; see :class:`PairAttention`."""
        with torch.autocast(vectors[0].device.type, enabled=False):
            return [
                attention(later, before, learns=learns)
                for attention, later, before in zip(self.attention, vectors[1:], vectors[:-1], strict=True)
            ]

    def predictions(self, graphs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return each estimator's prediction from a graph and the earlier vectors, ``[batch, width]``."""
        with torch.autocast(vectors[0].device.type, enabled=False), current().same_draws():
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
    """Apply batch norm in the requested form, whatever the module's mode."""
    weight, bias = (norm.weight, norm.bias) if learns else (norm.weight.detach(), norm.bias.detach())
    if learns and norm.num_batches_tracked is not None:
        norm.num_batches_tracked += 1
    return functional.batch_norm(
        rows, norm.running_mean, norm.running_var, weight, bias, learns, norm.momentum or 0.0, norm.eps
    )


def _by_heads(rows: Tensor, heads: int) -> Tensor:
    """Return ``[batch, heads * inner]`` as ``[heads, batch, inner]``."""
    return rows.reshape(len(rows), heads, -1).transpose(0, 1)
