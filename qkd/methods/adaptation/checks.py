"""Config checks of joint distillation and domain adaptation. Does not import PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

from qkd.config import DEFAULT_TERMS, RunConfig


def config_faults(config: RunConfig) -> Iterator[str]:
    """Yield config faults for the method, one per line with its key."""
    student, phases = config.student, config.student.phases
    wrong = {
        "data.domains: missing; student.adaptation needs an unlabeled domain (data.unseen_domain)": (
            config.data.domains is None
        ),
        f"teacher.members: must be 1 with student.adaptation, got {config.teacher.members}: it compares the features "
        f"of a single net": config.teacher.members > 1,
        "student.terms: student.adaptation brings its own loss; give `terms` to the phases without it, not here": (
            student.terms != DEFAULT_TERMS
        ),
        f"student.view: must be `same` with student.adaptation, got `{student.view}`: both nets see the same images": (
            student.view != "same"
        ),
        "student.agent: CutMix mixes labels, but images of the unseen domain have no labels": bool(
            student.agent.cutmix_probability
        ),
        "student.phases: meta and teacher_terms cannot be combined with student.adaptation: all train the teacher": any(
            phase.meta is not None or phase.teacher_terms is not None for phase in phases
        ),
        "student.phases: every phase has its own `terms`, so none would adapt; leave one without them": bool(phases)
        and all(phase.terms is not None for phase in phases),
        **{
            f"student.{key}: cannot be combined with student.adaptation: both bring a step or a teacher": value
            is not None
            for key, value in dict(student).items()
            if key in ("rotations", "peers", "auxiliary", "data_free")
        },
    }
    return (fault for fault, is_there in wrong.items() if is_there)
