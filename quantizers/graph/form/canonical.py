"""The closed set of modules that a float graph is spelled with before it is planned and rewritten.

PyTorch has many spellings of one operation. The front end turns each of them into exactly one module of this list, so
that planning, rewriting, the integer view and every export flavor only handle a short, closed set:

===========  ===========================================================================================
kind         modules
===========  ===========================================================================================
conv         ``nn.Conv2d`` with zero padding
linear       ``nn.Linear`` on ``[batch, ..., features]``
norm         ``nn.BatchNorm2d`` on 4-d, ``nn.BatchNorm1d`` on 2-d tensors
affine       :class:`Affine`
relu         ``nn.ReLU``, ``nn.ReLU6``, ``nn.Hardtanh`` with ``min_val == 0``
add, mul     ``layers.Sum``, ``layers.Product``: two operands that broadcast
cat          ``layers.Concat``
maxpool      ``nn.MaxPool2d``
avgpool      ``nn.AvgPool2d``
adaptive     ``nn.AdaptiveAvgPool2d`` with both sizes given
mean         ``layers.GlobalAveragePool``
function     elementwise activation modules of torch (``nn.SiLU``, ``nn.PReLU``, ...)
pass         identity in eval mode: ``nn.Dropout``, ``nn.Dropout2d``, ``StochasticDepth``, :class:`StopGradient`
shape        the moves below and ``nn.Flatten``, which move values without computing any
final        ``nn.Softmax`` / ``nn.LogSoftmax`` whose value only the output reads
===========  ===========================================================================================

Every node of the canonical graph except placeholder and output is a ``call_module`` of one of these. The batch is
axis 0 of every tensor, and no move touches it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class Affine(nn.Module):
    """A factor and an offset per channel (axis 1): ``y = x * scale + shift``.

    Args:
        scale: Factors, ``[channels]`` floating, or one, ``[1]``.
        shift: Offsets, likewise.
        learned: Whether scale and shift, respectively, train (a layer scale); else they are constants of the network.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, *, learned: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        self.learned = learned
        for name, value, trains in zip(("scale", "shift"), (scale, shift), learned, strict=True):
            if trains:
                self.register_parameter(name, nn.Parameter(value.detach().clone()))
            else:
                self.register_buffer(name, value.detach().clone())

    @property
    def is_identity(self) -> bool:
        """Return whether it is a constant that changes nothing."""
        return not any(self.learned) and bool((self.scale == 1).all()) and bool((self.shift == 0).all())

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.scale.reshape(shape) + self.shift.reshape(shape)


class StopGradient(nn.Module):
    """Identity that blocks gradients in training mode, for ``detach()`` and ``torch.no_grad()`` in the network."""

    def forward(self, x: Tensor) -> Tensor:
        return x.detach() if self.training else x


class Move(nn.Module):
    """Moves values without computing any, so its output is on the grid of its input."""


class Reshape(Move):
    """Another shape of the same values.

    Args:
        shape: Sizes after the batch axis. These are fixed; the batch can be of any size.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], *self.shape)


class Permute(Move):
    """Axes in another order.

    Args:
        order: The source axis of each axis; the first is 0.
    """

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        self.order = tuple(int(axis) for axis in order)

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Slice(Move):
    """A range along one axis.

    Args:
        axis: Axis, positive.
        start: First index, not negative.
        end: One past the last index, not above the size.
        step: Distance of indices, positive.
    """

    def __init__(self, axis: int, start: int, end: int, step: int = 1) -> None:
        super().__init__()
        self.axis, self.start, self.end, self.step = axis, start, end, step

    def forward(self, x: Tensor) -> Tensor:
        return x[(slice(None),) * self.axis + (slice(self.start, self.end, self.step),)]


class Gather(Move):
    """Chosen indices along one axis, in a chosen order (flip, shuffle, nearest neighbors).

    Args:
        axis: Axis, positive.
        indices: Source index of each index, not negative.
    """

    indices: Tensor

    def __init__(self, axis: int, indices: Sequence[int]) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("indices", torch.tensor([int(index) for index in indices]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.axis, self.indices)


class Pad(Move):
    """Zeros before and after each axis.

    Args:
        before: Zeros before each axis, batch first (always 0); none is negative.
        after: Zeros after each axis, likewise.
    """

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        super().__init__()
        self.before, self.after = tuple(map(int, before)), tuple(map(int, after))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(reversed(self.before), reversed(self.after), strict=True)
        return F.pad(x, [size for pair in pairs for size in pair])


class Expand(Move):
    """Values repeated along axes of size 1.

    Args:
        shape: Sizes after the batch axis.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.expand(x.shape[0], *self.shape)
