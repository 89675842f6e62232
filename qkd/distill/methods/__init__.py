"""Old names of the subpackages of `qkd.methods`."""

from qkd.moved import moved

PLACES = {
    "BranchClassifier": "qkd.methods.rotations.branched",
    "BranchStep": "qkd.methods.rotations.step",
    "BranchedNet": "qkd.methods.rotations.branched",
    "CoStudyStep": "qkd.methods.co_study.step",
    "EnsembleTeacher": "qkd.methods.ensemble.average",
    "MetaGradient": "qkd.methods.meta_distil.gradient",
    "MetaRates": "qkd.methods.meta_distil.step",
    "MetaSchedule": "qkd.methods.meta_distil.schedule",
    "MetaStep": "qkd.methods.meta_distil.step",
    "PeerStep": "qkd.methods.rotations.step",
    "Quiz": "qkd.methods.meta_distil.quiz",
    "RotationStep": "qkd.methods.rotations.step",
    "StudentEnsembleStep": "qkd.methods.peers.step",
    "meta_gradient": "qkd.methods.meta_distil.gradient",
}

__getattr__ = moved("qkd.distill.methods", PLACES)
__all__ = list(PLACES)
