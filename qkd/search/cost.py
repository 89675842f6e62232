"""The cost of a search and of the published one: images trained on, images validated, seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qkd.search.journal import Journal
from qkd.search.population import finalists_of, round_lengths
from qkd.units import times_as_many

# The published search (role-kd's logs): 16 members, 200 epochs of 31 steps of 128 from 4,000 images, and 359 full
# batches of 128 from 46,000 validation images after every epoch.
PUBLISHED_MEMBERS, PUBLISHED_EPOCHS, PUBLISHED_INTERVAL, BATCH = 16, 200, 3, 128
PUBLISHED_TRAIN, PUBLISHED_VAL = 4_000, 46_000


@dataclass(frozen=True)
class Cost:
    """Images read by a search.

    Args:
        trained_images: Images used in training steps.
        validated_images: Images read to score members.
    """

    trained_images: int
    validated_images: int


@dataclass(frozen=True)
class CostReport:
    """The cost of a run's search, compared with the published one.

    Args:
        role: The role whose agent was searched.
        run: The cost counted in this run.
        run_every_epoch: What the same run would have validated if it had scored after every epoch, as published.
        seconds: Time spent in members' turns, summed over the members.
        published: The cost of the published code.
        ours_at_published: The published setting in this toolkit, which scores at perturbation points only.
    """

    role: str
    run: Cost
    run_every_epoch: Cost
    seconds: float
    published: Cost
    ours_at_published: Cost

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, with both ratios."""
        return {
            **asdict(self),
            "run_validates_less_by": _ratio(self.run_every_epoch, self.run),
            "published_validates_more_by": _ratio(self.published, self.ours_at_published),
        }

    def to_text(self) -> str:
        """Return the report as one line of text."""
        return (
            f"{self.role}'s search: {self.run.trained_images:,} images trained, {self.run.validated_images:,} "
            f"validated in {self.seconds:.0f} s; scoring every epoch, as published, would have validated "
            f"{times_as_many(_ratio(self.run_every_epoch, self.run))}"
        )


def published_cost() -> Cost:
    """Return the cost of the published search.

    Returns:
        12.7 million training images and 147 million validation images.
    """
    turns = PUBLISHED_MEMBERS * PUBLISHED_EPOCHS
    return Cost(turns * (PUBLISHED_TRAIN // BATCH) * BATCH, turns * (PUBLISHED_VAL // BATCH) * BATCH)


def cost_of_setting(
    *, members: int, epochs: int, interval_epochs: int, train_images: int, val_images: int, batch_size: int
) -> Cost:
    """Return the cost of a search in this toolkit if no member diverges.

    Members are scored only at the end of a round, and only the finalists take part in the last round.
    """
    lengths = round_lengths(epochs, interval_epochs)
    finalists = finalists_of(members, len(lengths))
    an_epoch = (train_images // batch_size) * batch_size
    trained = (members * sum(lengths[:-1]) + finalists * lengths[-1]) * an_epoch
    return Cost(trained, (members * (len(lengths) - 1) + finalists) * val_images)


def ours_at_published() -> Cost:
    """Return the cost of the published setting in this toolkit."""
    return cost_of_setting(
        members=PUBLISHED_MEMBERS, epochs=PUBLISHED_EPOCHS, interval_epochs=PUBLISHED_INTERVAL,
        train_images=PUBLISHED_TRAIN, val_images=PUBLISHED_VAL, batch_size=BATCH,
    )  # fmt: skip


def cost_report(journal: Journal, val_images: int) -> CostReport:
    """Return what a search has cost so far.

    Args:
        journal: The search.
        val_images: Number of images used to score a member once.

    Returns:
        Images read to train and to score members, seconds, and the same for the published search.
    """
    scores = [(member.score, length) for population, length in zip(journal.rounds, journal.lengths, strict=False)
              for member in population if member.score is not None]  # fmt: skip
    trained = sum(score.trained_images for score, _ in scores)
    validated = sum(score.validated_images for score, _ in scores)
    every_epoch = sum(length * val_images for score, length in scores if score.validated_images)
    return CostReport(
        role=journal.role,
        run=Cost(trained, validated),
        run_every_epoch=Cost(trained, every_epoch),
        seconds=sum(score.seconds for score, _ in scores),
        published=published_cost(),
        ours_at_published=ours_at_published(),
    )


def _ratio(more: Cost, less: Cost) -> float:
    return more.validated_images / less.validated_images if less.validated_images else 0.0
