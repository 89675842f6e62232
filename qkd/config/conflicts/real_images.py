"""Keys that need real images, which data-free distillation rules out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.config.experiment import RunConfig


def data_free_faults(config: RunConfig) -> list[str]:
    """Return the settings that need real images, which ``student.data_free`` rules out.

    Args:
        config: Its keys are each valid by themselves.

    Returns:
        A sentence with the keys for each.
    """
    student = config.student
    if student.data_free is None:
        return []
    agent = student.agent
    wrong = {
        f"student.view: must be `same` with data_free, got `{student.view}`: there are no raw images": (
            student.view != "same"
        ),
        f"student.agent: policy `{agent.policy}` does not work with data_free: name one that changes single images, or "
        f"`none` (a search scores real validation images; CutMix needs the next images)": (
            agent.policy in ("search", "teacher") or bool(agent.cutmix_probability)
        ),
        "student.rotations: cannot be combined with data_free: the teacher's branches learn from real images": (
            student.rotations is not None
        ),
        "student.phases: meta and teacher_terms cannot be combined with data_free: images are "
        "made from a teacher that does not change": any(
            phase.meta is not None or phase.teacher_terms is not None for phase in student.phases
        ),
        "student.auxiliary: cannot be combined with data_free: images are made from the net that teaches the student, "
        "and the auxiliary would need them first": student.auxiliary is not None,
        "bench.int8_baseline: cannot be used with data_free: it calibrates on real images": config.bench.int8_baseline,
    }
    return [fault for fault, is_there in wrong.items() if is_there]
