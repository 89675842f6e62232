"""The teacher of a run: trained, taken from a file, or copied from another run."""

from qkd.roles.teacher.borrowed import borrow_teacher
from qkd.roles.teacher.role import teacher_parts, teacher_role

__all__ = ["borrow_teacher", "teacher_parts", "teacher_role"]
