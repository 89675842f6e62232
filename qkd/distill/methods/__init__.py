"""Training steps that are more than a student beside a fixed teacher."""

from qkd.distill.methods.co_study import CoStudyStep
from qkd.distill.methods.ensemble import EnsembleTeacher
from qkd.distill.methods.peers import StudentEnsembleStep

__all__ = ["CoStudyStep", "EnsembleTeacher", "StudentEnsembleStep"]
