"""Keys of a student: rules for low bits, earlier widths, learning from itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.config.experiment import StudentConfig

STEPS = ("rotations", "peers", "adaptation", "method")  # keys of a student that define the training step


def low_bit_faults(student: StudentConfig) -> list[str]:
    """Return the incompatible settings of a student.

    Args:
        student: Its keys are each valid by themselves.

    Returns:
        A sentence with the keys for each.
    """
    return [*_rule_faults(student), *_width_faults(student), *_self_faults(student), *_float_agent_faults(student)]


def _float_agent_faults(student: StudentConfig) -> list[str]:
    agent = student.float_agent
    if agent is None:
        return []
    faults = []
    if student.float_train is None:
        faults.append("`float_agent` is for `float_train`, which is missing")
    if agent.policy in ("search", "teacher", "file"):
        faults.append(f"`float_agent.policy` must name a self-contained policy, got `{agent.policy}`")
    distilled = [key for key in ("data_free", "adaptation") if getattr(student, key) is not None]
    if agent.cutmix_probability and distilled:
        faults.append(f"`float_agent` cannot use CutMix with {distilled[0]}, whose images have no labels to mix")
    return faults


def _rule_faults(student: StudentConfig) -> list[str]:
    rules, faults = student.low_bit, []
    if rules.places_weights and student.quant.weight_quantizer == "dorefa":
        faults.append(
            "`low_bit.dampening` and `low_bit.oscillation_thresholds` need `quant.weight_quantizer` lsq or stats, got "
            "dorefa, whose codes have no fixed positions among the weights"
        )
    if rules.reestimate_batches and student.bn == "frozen_teacher":
        faults.append("`low_bit.reestimate_batches` needs `bn: train`: with frozen_teacher, the teacher's are kept")
    if rules.transition_rate is not None and student.bn == "frozen_teacher":
        faults.append(
            "`low_bit.transition_rate` needs `bn: train`: with frozen_teacher, all weights train at the schedule's rate"
        )
    return faults


def _width_faults(student: StudentConfig) -> list[str]:
    if not student.widths:
        return []
    used = [f"`{key}`" for key in (*STEPS, "auxiliary", "data_free") if getattr(student, key) is not None]
    faults = [f"`widths` cannot be combined with {', '.join(used)}: they use only `terms`"] if used else []
    if any(phase.teacher_terms is not None or phase.meta is not None for phase in student.phases):
        faults.append(
            "`widths` cannot be combined with `teacher_terms` or `meta` in `phases`: they need a fixed teacher"
        )
    return faults


def _self_faults(student: StudentConfig) -> list[str]:
    if student.self_distillation is None:
        return []
    used = [f"`{key}`" for key in STEPS if getattr(student, key) is not None]
    faults = (
        [f"`self_distillation` cannot be combined with {', '.join(used)}, which define another step"] if used else []
    )
    if student.quant.act_bits >= 8:
        faults.append("`self_distillation` needs `quant.act_bits` below 8: the copy differs only in finer activations")
    if all(phase.teacher_terms or phase.meta or phase.combine != "sum" or phase.trains == "modules"
           for phase in student.phases) and student.phases:  # fmt: skip
        faults.append("`self_distillation` needs a phase that trains the student on a sum of terms")
    return faults
