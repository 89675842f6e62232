"""The runtimes that a student can be exported for: what each requires of a file, and of the student."""

from export.targets.table import TARGETS, Limit, Target, find_target, target_names

__all__ = ["TARGETS", "Limit", "Target", "find_target", "target_names"]
