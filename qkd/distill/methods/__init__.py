"""Training steps that are more than a student beside a fixed teacher."""

from qkd.distill.methods.branched import BranchClassifier, BranchedNet
from qkd.distill.methods.co_study import CoStudyStep
from qkd.distill.methods.ensemble import EnsembleTeacher
from qkd.distill.methods.meta import MetaRates, MetaStep
from qkd.distill.methods.meta_gradient import MetaGradient, meta_gradient
from qkd.distill.methods.meta_schedule import MetaSchedule
from qkd.distill.methods.peers import StudentEnsembleStep
from qkd.distill.methods.quiz import Quiz
from qkd.distill.methods.rotations import BranchStep, PeerStep, RotationStep

__all__ = [
    "BranchClassifier",
    "BranchStep",
    "BranchedNet",
    "CoStudyStep",
    "EnsembleTeacher",
    "MetaGradient",
    "MetaRates",
    "MetaSchedule",
    "MetaStep",
    "PeerStep",
    "Quiz",
    "RotationStep",
    "StudentEnsembleStep",
    "meta_gradient",
]
