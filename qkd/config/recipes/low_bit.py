"""The schema of what only a low-bit training has: rules for its weights, widths on the way, a copy that teaches."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from qkd.config.sections import Bits, Epochs, NonNegative, Positive, Section

Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class LowBitConfig(Section):
    """What becomes of weights of at most 4 bits in training, beside what becomes of any weights."""

    transition_rate: Share | None = Field(
        None,
        description="share of the weights that are to change their code in a step, at the peak of the schedule, which "
        "it follows: their learning rate is found from it (TRS); absent: they have the schedule's",
    )
    decay_by_bits: bool = Field(
        False, description="weight decay times a quarter for weights of 2 bits, a half for 3 (LSQ); scales have none"
    )
    dampening: NonNegative = Field(
        0.0, description="weight of the squared distance of weights to their codes; rises from 0 over the training"
    )
    oscillation_thresholds: tuple[Share, Share] | None = Field(
        None,
        description="[first, last]: a weight whose frequency of oscillation exceeds the threshold, which goes from one "
        "to the other over the training, stays on its code; absent: none is frozen. Published: [0.04, 0.01]",
    )
    oscillation_momentum: Share = Field(0.01, description="of the running frequency of oscillation")
    reestimate_batches: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0,
        description="training batches that batch norm's statistics are estimated from anew before it is frozen, or at "
        "the end where it is not; 0: the running ones stay",
    )

    @model_validator(mode="after")
    def _one_oscillation_is_none(self) -> LowBitConfig:
        last = None if self.oscillation_thresholds is None else min(self.oscillation_thresholds)
        if last is not None and last < self.oscillation_momentum:
            raise ValueError(
                f"`oscillation_thresholds` must be at least `oscillation_momentum` ({self.oscillation_momentum}), got "
                f"{last}: a single change of direction would freeze a weight"
            )
        return self

    def tried(self, batch_size: int) -> LowBitConfig:  # noqa: ARG002
        """Return the section for a dry run: a few batches show what goes wrong."""
        return self.model_copy(update={"reestimate_batches": min(self.reestimate_batches, 2)})

    @property
    def places_weights(self) -> bool:
        """Whether it moves latent weights onto their codes, or toward them."""
        return bool(self.dampening) or self.oscillation_thresholds is not None


class WidthConfig(Section):
    """Widths that a student is trained in before its own."""

    weight_bits: Bits = Field(description="bits of weights")
    act_bits: Bits = Field(description="bits of activations; other keys are those of student.quant")
    epochs: Epochs = Field(description="length of the training in these widths")


class SelfDistillationConfig(Section):
    """SPEQ: the student learns from itself with some activations at 8 bits, drawn anew at every step."""

    weight: Positive = Field(1.0, description="of this term, beside `terms`")
    temperature: Positive = Field(2.0, description="of the probabilities that are compared; their factor is its square")
    low_share: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.5, description="chance of an activation to keep its own bits in the copy"
    )
