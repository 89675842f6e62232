"""Look whether what only a low-bit training has goes together with the rest of a student."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.config.experiment import StudentConfig

METHODS = ("rotations", "peers", "auxiliary", "data_free", "adaptation", "method")  # keys with own steps or images


def low_bit_faults(student: StudentConfig) -> list[str]:
    """Return what does not go together, a sentence each with the keys.

    Args:
        student: The section, each key of it valid by itself.
    """
    return [*_rule_faults(student), *_width_faults(student), *_self_faults(student)]


def _rule_faults(student: StudentConfig) -> list[str]:
    rules, faults = student.low_bit, []
    if rules.places_weights and student.quant.weight_quantizer == "dorefa":
        faults.append(
            "`low_bit.dampening` and `low_bit.oscillation_thresholds` need `quant.weight_quantizer` lsq or stats, got "
            "dorefa, whose weights have no place of their own for a code"
        )
    if rules.reestimate_batches and student.bn == "frozen_teacher":
        faults.append("`low_bit.reestimate_batches` goes with `bn: train`: with frozen_teacher the teacher's stay")
    return faults


def _width_faults(student: StudentConfig) -> list[str]:
    if not student.widths:
        return []
    used = [f"`{key}`" for key in METHODS if getattr(student, key) is not None]
    faults = [f"`widths` go without {', '.join(used)}: they train the student on its `terms` alone"] if used else []
    if any(phase.teacher_terms is not None or phase.meta is not None for phase in student.phases):
        faults.append("`widths` go without `teacher_terms` and `meta` in `phases`: the teacher is fixed on the way")
    return faults


def _self_faults(student: StudentConfig) -> list[str]:
    if student.self_distillation is None:
        return []
    used = [
        f"`{key}`" for key in METHODS if key not in ("auxiliary", "data_free") and getattr(student, key) is not None
    ]
    faults = [f"`self_distillation` goes without {', '.join(used)}, which bring another step"] if used else []
    if student.quant.act_bits >= 8:
        faults.append("`self_distillation` needs `quant.act_bits` below 8: the copy differs in finer activations alone")
    if all(phase.teacher_terms or phase.meta or phase.combine != "sum" or phase.trains == "modules"
           for phase in student.phases) and student.phases:  # fmt: skip
        faults.append("`self_distillation` is for phases that sum terms for the student, and no phase does")
    return faults
