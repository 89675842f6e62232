"""Training steps that are more than a student and a fixed teacher on one batch."""

from qkd.distill.methods.branched import BranchClassifier, BranchedNet
from qkd.distill.methods.rotations import BranchStep, PeerStep, RotationStep

__all__ = ["BranchClassifier", "BranchStep", "BranchedNet", "PeerStep", "RotationStep"]
