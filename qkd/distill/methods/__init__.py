"""Training steps that are more than a student beside a fixed teacher."""

from qkd.distill.methods.branched import BranchClassifier, BranchedNet
from qkd.distill.methods.co_study import CoStudyStep
from qkd.distill.methods.ensemble import EnsembleTeacher
from qkd.distill.methods.peers import StudentEnsembleStep
from qkd.distill.methods.rotations import BranchStep, PeerStep, RotationStep

__all__ = [
    "BranchClassifier",
    "BranchStep",
    "BranchedNet",
    "CoStudyStep",
    "EnsembleTeacher",
    "PeerStep",
    "RotationStep",
    "StudentEnsembleStep",
]
