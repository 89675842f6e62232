"""Training steps that are more than a student beside a fixed teacher."""

from qkd.distill.methods.co_study import CoStudyStep

__all__ = ["CoStudyStep"]
