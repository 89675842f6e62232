"""Keys of the teacher and of the student: an ensemble has no features and does not learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.config.experiment import StudentConfig, TeacherConfig


def method_faults(teacher: TeacherConfig, student: StudentConfig) -> list[str]:
    """Return the incompatible settings: an ensemble has no features and does not learn; an auxiliary net is fixed.

    Args:
        teacher: Valid by itself.
        student: Valid by itself.

    Returns:
        A sentence with the keys for each.
    """
    learner, where = (student, "student") if student.auxiliary is None else (student.auxiliary, "student.auxiliary")
    terms = [*learner.terms, *(term for phase in learner.phases for term in phase.terms or ())]
    faults = [
        f"{where}: {term.loss} has taps, but teacher.members is {teacher.members}, and an ensemble has no features: "
        f"use losses on logits, or one member"
        for term in terms if term.taps and term.weight > 0 and teacher.members > 1
    ]  # fmt: skip
    if student.quiz_images is not None:
        faults += ["student.phases: meta needs teacher.members 1"] if teacher.members > 1 else []
        faults += ["student.phases: meta cannot be combined with student.auxiliary"] if student.auxiliary else []
    if any(phase.teacher_terms is not None for phase in student.phases):
        faults += ["student.phases: teacher_terms needs teacher.members 1"] if teacher.members > 1 else []
        faults += (
            ["student.phases: teacher_terms cannot be combined with student.auxiliary"] if student.auxiliary else []
        )
    if student.peers is not None and any(phase.peers and phase.teacher_terms for phase in student.phases):
        faults.append("student.phases: a phase can have teacher_terms or peers, not both; set `peers: false` there")
    return faults
