"""Agents by name: what a role does to its training images, epoch by epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qkd.agents.operations.counting import SampleDraws, take_key
from qkd.agents.operations.drawing import NoDraws, OperationDraws, PolicyDraws, RandAugmentDraws, TrivialDraws
from qkd.agents.operations.engine import Finish, augment, check_images
from qkd.agents.operations.mixing import Mixed, mix_boxes
from qkd.agents.policies.builtin import pba_schedule
from qkd.agents.policies.policy import Policy, Schedule, Segment
from qkd.agents.policies.schedule_file import load_schedule
from qkd.foreign import nearest

if TYPE_CHECKING:
    from qkd.config import AgentConfig


@dataclass(frozen=True)
class Agent:
    """Turns uint8 batches into augmented ones; immutable: calls do not change its state.

    Args:
        name: The policy's name in the config.
        draws: How the operations of an image are drawn.
        epochs: Length of the training.
        mean: Of the data set, per channel, fractions 0..1: the value of exposed, padded and cut pixels.
        padding: Of the random crop that follows, in pixels; 0 is off.
        flip: Whether half of the images are mirrored afterward.
        cutout: Side in pixels of a square that is cut out last; 0 is off.
        cutmix: Probability that an image gets a box of another; 0 is off.
        leaves_last: Draw crop offsets as role-kd's released code: never the last.
    """

    name: str
    draws: OperationDraws
    epochs: int
    mean: tuple[float, ...]
    padding: int = 0
    flip: bool = False
    cutout: int = 0
    cutmix: float = 0.0
    leaves_last: bool = False

    def __call__(
        self, images: Tensor, *, generator: torch.Generator, epoch: int, samples: Tensor | None = None
    ) -> Tensor:
        """Return the batch as this agent shows it.

        The result for an image depends only on the image, the epoch, the generator's state and the image's number in
        ``samples``. It is the same on every device and for any batch size, if every batch of an epoch comes with a
        generator in the same state.

        Args:
            images: uint8, shape ``[batch, channels, height, width]``; untouched.
            generator: Is drawn from once, for the key of all further draws.
            epoch: Counts from 0.
            samples: A number for each image, such as its position in the data set, int64, shape ``[batch]``;
                default: 0, 1, 2, ..., so that batches of one epoch need generators in different states.

        Returns:
            uint8, same shape and device.

        Raises:
            TypeError: If ``images`` are not uint8.
            ValueError: If the shape, the number of channels, of ``samples``, or ``epoch`` is wrong.
        """
        check_images(images)
        if images.shape[1] != len(self.mean):
            raise ValueError(f"images have {images.shape[1]} channels, but the agent's mean has {len(self.mean)}")
        if not 0 <= epoch < self.epochs:
            raise ValueError(f"epoch must be 0..{self.epochs - 1}, got {epoch=}")
        if samples is not None and samples.shape != images.shape[:1]:
            raise ValueError(f"samples must number {len(images)} images, got shape {tuple(samples.shape)}")
        numbers = np.arange(len(images)) if samples is None else samples.cpu().numpy()
        draws = SampleDraws(take_key(generator), numbers)
        fill = torch.tensor([round(255 * value) for value in self.mean], dtype=torch.uint8, device=images.device)
        drawn = self.draws.draw(draws, epoch, self.epochs)
        return augment(images, drawn, draws, fill, Finish(self.padding, self.flip, self.cutout, self.leaves_last))

    @property
    def following(self) -> int:
        """How many images after a batch :meth:`with_labels` needs: 1 if it mixes images, else 0."""
        return 1 if self.cutmix else 0

    def with_labels(
        self, images: Tensor, labels: Tensor, *, generator: torch.Generator, epoch: int, samples: Tensor | None = None
    ) -> tuple[Tensor, Mixed | None]:
        """Return the batch as this agent shows it, and the second labels of images that have a box of another.

        A box comes from the image that comes next. In the order of an epoch, with the image after the batch behind it
        (``following``; its own row of the result is of no use), what is shown does not depend on how the epoch is cut
        into batches. In a batch by itself the last image gets its box from the first.

        Args:
            images: As for a call.
            labels: int64, shape ``[batch]``.
            generator: As for a call.
            epoch: As for a call.
            samples: As for a call.

        Returns:
            The images and labels; None instead of labels if this agent does not mix images (``cutmix`` is 0).

        Raises:
            TypeError: As a call.
            ValueError: As a call.
        """
        state = generator.get_state()
        seen = self(images, generator=generator, epoch=epoch, samples=samples)
        if not self.cutmix:
            return seen, None
        generator.set_state(state)  # the same key: these draws belong to the same images
        numbers = np.arange(len(images)) if samples is None else samples.cpu().numpy()
        return mix_boxes(seen, labels, SampleDraws(take_key(generator), numbers), self.cutmix)

    def schedule(self, epochs: int) -> Schedule | None:
        """Return the policies applied before crop, flip and cut-out, as a schedule of ``epochs`` epochs.

        ``none``, ``crop`` and ``crop_flip`` have one segment with an empty policy. ``trivial`` and ``randaugment``
        have none: a policy draws 0, 1 or 2 operations, each at its own magnitude, they draw a fixed number at any or
        at one, from other spaces. ``flatten`` takes all these policies at once, without their order.

        Raises:
            ValueError: If ``epochs`` is not positive.
        """
        if isinstance(self.draws, PolicyDraws):
            return self.draws.schedule.stretched(epochs)
        return Schedule((Segment(epochs, Policy()),)) if isinstance(self.draws, NoDraws) else None

    def describe(self) -> str:
        """Return one line for logs and reports."""
        parts = [self.name]
        parts += ["flattened"] if isinstance(self.draws, PolicyDraws) and self.draws.flatten else []
        if isinstance(self.draws, RandAugmentDraws):
            parts.append(f"{self.draws.operations} operations at magnitude {self.draws.magnitude}")
        where = " (never at the last offset)" if self.leaves_last else ""
        parts += [f"crop after padding {self.padding}{where}"] if self.padding else []
        parts += ["flip"] if self.flip else []
        parts += [f"cut-out {self.cutout}"] if self.cutout else []
        parts += [f"CutMix of {self.cutmix:.0%} of the images"] if self.cutmix else []
        return ", ".join(parts)


def _no_draws(config: AgentConfig) -> OperationDraws:
    return NoDraws()


def _trivial(config: AgentConfig) -> OperationDraws:
    return TrivialDraws()


def _randaugment(config: AgentConfig) -> OperationDraws:
    return RandAugmentDraws(config.operations, config.magnitude)


def _pba(config: AgentConfig) -> OperationDraws:
    return PolicyDraws(pba_schedule(), config.flatten)


def _from_file(config: AgentConfig) -> OperationDraws:
    if config.schedule is None:
        raise ValueError("agent.schedule: missing; policy `file` needs a schedule file")
    return PolicyDraws(load_schedule(config.schedule), config.flatten)


POLICIES: dict[str, Callable[[AgentConfig], OperationDraws]] = {
    "crop": _no_draws,
    "crop_flip": _no_draws,
    "cutmix": _no_draws,
    "file": _from_file,
    "none": _no_draws,
    "pba": _pba,
    "randaugment": _randaugment,
    "trivial": _trivial,
}


def build_agent(config: AgentConfig, *, epochs: int, mean: Sequence[float]) -> Agent:
    """Build a role's agent.

    ``none`` leaves the images alone, whatever else is set; ``crop`` never flips; all others end with crop, flip and
    cut-out as the config says.

    Args:
        config: The role's ``agent`` section.
        epochs: Length of the training, at least 1; a schedule is stretched to it.
        mean: Of the data set, per channel, fractions 0..1.

    Returns:
        The agent, for any epoch.

    Raises:
        ValueError: If the policy is unknown (with the nearest one), ``none`` comes with a cut-out or CutMix, ``epochs``
            is not positive, ``mean`` is out of range, or the schedule file is wrong (`ScheduleError`, all faults).

    Example:
        >>> from qkd.config import AgentConfig
        >>> agent = build_agent(AgentConfig(policy="crop_flip", crop_padding=2), epochs=10, mean=(0.5,))
        >>> agent.describe()
        'crop_flip, crop after padding 2, flip'
        >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
        >>> agent(images, generator=torch.Generator().manual_seed(0), epoch=0).shape
        torch.Size([4, 1, 8, 8])
    """
    if config.policy not in POLICIES:
        near = nearest(config.policy, POLICIES)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"agent.policy: unknown policy {config.policy!r}{hint}; known: {', '.join(POLICIES)}")
    if epochs < 1 or not mean or not all(0 <= value <= 1 for value in mean):
        raise ValueError(
            f"an agent needs positive epochs and a mean of fractions 0..1, got {epochs=}, mean={tuple(mean)}"
        )
    draws = POLICIES[config.policy](config)
    if config.policy == "none":
        if config.cutout:
            raise ValueError(f"agent.cutout: policy `none` changes nothing, but cutout is {config.cutout}; use `crop`")
        if config.cutmix_probability:
            raise ValueError("agent.cutmix: policy `none` changes nothing, but cutmix is set; use `crop`")
        return Agent("none", draws, epochs, tuple(mean))
    flip = config.flip and config.policy != "crop"
    finish = (config.crop_padding, flip, config.cutout, config.cutmix_probability, _leaves_last(config))
    return Agent(config.policy, draws, epochs, tuple(mean), *finish)


def agent_of_schedule(schedule: Schedule, config: AgentConfig, *, epochs: int, mean: Sequence[float]) -> Agent:
    """Return an agent that applies a given schedule, with crop, flip, cut-out and CutMix from the config.

    Args:
        schedule: Stretched to ``epochs``.
        config: Its ``policy`` and ``schedule`` are ignored.
        epochs: Length of the training.
        mean: Of the data set, per channel, fractions 0..1.
    """
    draws = PolicyDraws(schedule)
    finish = (config.crop_padding, config.flip, config.cutout, config.cutmix_probability, _leaves_last(config))
    return Agent("schedule", draws, epochs, tuple(mean), *finish)


def _leaves_last(config: AgentConfig) -> bool:
    return config.crop_offsets == "released"
