"""A net with auxiliary branches on its tapped features, run together without being one module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qkd.losses.stable import widened
from qkd.losses.turns import class_log_probabilities
from qkd.terms.taps import Taps


@dataclass(frozen=True)
class BranchedOutput:
    """Outputs of a net and its branches.

    Args:
        logits: Logits of the net, shape ``[rows, classes]``.
        branches: Joint logits of each branch, shape ``[rows, 4 * classes]``.
    """

    logits: Tensor
    branches: tuple[Tensor, ...]


class BranchedNet:
    """A net and its branches. The net does not reference them: they run in forward hooks, registered by :meth:`tapped`.

    Args:
        net: Gives logits ``[rows, classes]``.
        branches: One module per tap: feature map -> joint logits ``[rows, 4 * classes]``.
        taps: Module paths of the (float) net, from the input to the output.
        tap_paths: Float module path -> path within ``net``; None if the paths are the same.
        role: ``teacher`` or ``student``, for errors.

    Raises:
        ValueError: If a tap does not name a module, two taps read the same module, or there are not as many branches
            as taps.
    """

    def __init__(
        self,
        net: nn.Module,
        branches: nn.ModuleList,
        taps: Sequence[str],
        *,
        tap_paths: Mapping[str, str] | None = None,
        role: str = "model",
    ) -> None:
        if len(branches) != len(taps):
            raise ValueError(f"the {role} needs one branch per tap, got {len(branches)} branches and {len(taps)} taps")
        self.net, self.branches, self.paths = net, branches, tuple(taps)
        self._taps = Taps(net, taps, translate=tap_paths, role=role)

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Register the forward hooks for the duration of a block."""
        with self._taps:
            yield

    def __call__(self, images: Tensor, *, backbone_learns: bool = True) -> BranchedOutput:
        """Run net and branches on images ``[rows, channels, height, width]``, within :meth:`tapped`.

        Args:
            images: Normalized.
            backbone_learns: Whether gradients flow from the branches (and logits) into the net.
        """
        with nullcontext() if backbone_learns else torch.no_grad():
            logits = self.net(images)
            features = self._taps.take()
        joint = [branch(features[path]) for path, branch in zip(self.paths, self.branches, strict=True)]
        return BranchedOutput(widened(logits), tuple(widened(one) for one in joint))


class BranchClassifier(nn.Module):
    """The class predictions of a finished net's branches; the net itself is not part of this module.

    Args:
        branched: Net and branches. The net does not change: its mode, parameters and buffers do not belong to this
            module.
    """

    def __init__(self, branched: BranchedNet) -> None:
        super().__init__()
        self.branches = branched.branches
        self._branched = (branched,)  # a tuple hides it from state_dict, train() and the optimizer

    @property
    def branched(self) -> BranchedNet:
        """Return net and branches."""
        return self._branched[0]

    def forward(self, images: Tensor) -> Tensor:
        """Return log probabilities ``[batch, classes]`` of upright images: of the branches' mean over orientations."""
        with self.branched.tapped():
            return mean_log_probabilities(self.branched(images, backbone_learns=False).branches)


def mean_log_probabilities(branches: Sequence[Tensor]) -> Tensor:
    """Return the log of the branches' mean class probabilities, ``[rows, classes]``."""
    each = torch.stack([class_log_probabilities(joint) for joint in branches])
    return each.logsumexp(0) - torch.log(torch.tensor(float(len(branches))))
