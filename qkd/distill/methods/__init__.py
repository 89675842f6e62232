"""Training steps that are more than a student beside a fixed teacher."""

from qkd.distill.methods.ensemble import EnsembleTeacher

__all__ = ["EnsembleTeacher"]
