"""The sections of the schema that single distillation methods need."""

from __future__ import annotations

from pydantic import Field, model_validator

from qkd.config_types import Bits, NonNegative, Positive, Section


class PeerConfig(Section):
    """A net that learns beside the student and from it; thrown away in the end."""

    net: str | None = Field(None, description="absent: the student's net")
    weight_bits: Bits | None = Field(None, description="absent, with act_bits: full precision")
    act_bits: Bits | None = Field(None, description="other keys are those of student.quant")
    taps: tuple[str, ...] | None = Field(None, description="its modules for student.peers.taps; absent: the same names")

    @model_validator(mode="after")
    def _bits_come_together(self) -> PeerConfig:
        if (self.weight_bits is None) != (self.act_bits is None):
            raise ValueError("give `weight_bits` and `act_bits`, or neither for full precision")
        return self


class PeersConfig(Section):
    """A student ensemble: the student and its peers learn from labels, from their average and from the first peer."""

    nets: tuple[PeerConfig, ...] = Field(min_length=1, description="the peers; the first one's features are the goal")
    taps: tuple[str, ...] = Field((), description="modules of the student whose features meet the first peer's")
    temperature: Positive = Field(3.0, description="of the soft targets from the average")
    label_weight: NonNegative = Field(0.7, description="of the cross-entropies")
    feature_weight: NonNegative = Field(0.15, description="of the squared differences of features")
    ensemble_weight: NonNegative = Field(0.15, description="of the soft targets from the average")
    lr_factor: Positive = Field(1.0, description="the peers' learning rate, as a factor of the student's")

    @model_validator(mode="after")
    def _taps_pair_up(self) -> PeersConfig:
        for index, peer in enumerate(self.nets):
            if peer.taps is not None and len(peer.taps) != len(self.taps):
                raise ValueError(f"nets[{index}].taps names {len(peer.taps)} modules, but `taps` {len(self.taps)}")
        return self
