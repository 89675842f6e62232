"""The table of losses that belong to a method (of generators, images, a teacher) and are not terms of a student."""

from __future__ import annotations

from dataclasses import dataclass

_DAFL = "Chen et al. 2019, DAFL"
_CMI = "Fang et al. 2021, CMI"
_DI = "Yin et al. 2020, DeepInversion"
_FEDGEN = "Zhu et al. 2021, FedGen"
_HSAKD = "Yang et al. 2021, HSAKD"
_JOINT = "arXiv 2005.07839, joint distillation and domain adaptation"
_RDSKD = "Han et al. 2021, RDSKD"
_ZSKD = "Nayak et al. 2019, ZSKD"


@dataclass(frozen=True)
class MethodLoss:
    """A row of :data:`METHOD_LOSSES`.

    Args:
        name: Name of its function in :mod:`qkd.losses`.
        summary: One line for `qkd ls losses`.
        source: Where it is published.
    """

    name: str
    summary: str
    source: str


METHOD_LOSSES: dict[str, MethodLoss] = {
    "adapted_student": MethodLoss(
        "adapted_student_loss", "student: source labels, soft targets on both domains", _JOINT
    ),
    "adapting_teacher": MethodLoss(
        "adapting_teacher_loss", "teacher: source labels, and features that are alike in both domains", _JOINT
    ),
    "batch_norm": MethodLoss("batch_norm_loss", "images: statistics at each batch norm of the teacher", _DI),
    "branch_soft_target": MethodLoss(
        "branch_soft_target_loss", "branches: soft targets, summed over the branches", _HSAKD
    ),
    "class_balance": MethodLoss(
        "class_balance_loss", "generator: equally frequent classes; logarithm to base e or 10", _DAFL
    ),
    "class_logits": MethodLoss(
        "class_logits_loss",
        "client: mean logits of all clients for a class",
        "Jeong et al. 2018, FedDistill",
    ),
    "cmi": MethodLoss("cmi_inversion_loss", "images: inversion and contrast", _CMI),
    "competition": MethodLoss("competition_loss", "images: a student differs from the teacher (adaptive form)", _DI),
    "contrastive": MethodLoss(
        "contrastive_loss", "images: distinguishable from each other and from earlier ones", _CMI
    ),
    "dafl": MethodLoss("dafl_generator_loss", "generator: one-hot outputs, balanced classes, large features", _DAFL),
    "data_impression": MethodLoss(
        "data_impression_loss", "images: outputs match targets drawn from class similarities", _ZSKD
    ),
    "decision_adversarial": MethodLoss(
        "decision_adversarial_loss", "images: both nets predict the same class with different probabilities", _CMI
    ),
    "deep_inversion": MethodLoss("deep_inversion_loss", "images: a class, batch-norm statistics, smoothness", _DI),
    "dfq": MethodLoss(
        "dfq_generator_loss",
        "generator: disagreement, batch-norm statistics, balanced classes",
        "Choi et al. 2020, DFQ",
    ),
    "disagreement": MethodLoss(
        "disagreement_loss",
        "generator: images on which student and teacher differ",
        "ZSKT, DFAD, DFQ: divergence or distance",
    ),
    "feature_activation": MethodLoss("feature_activation_loss", "generator: large features", _DAFL),
    "fedgen_client": MethodLoss("fedgen_client_loss", "client: labels, and latents of the server's generator", _FEDGEN),
    "fedgen_generator": MethodLoss(
        "fedgen_generator_loss", "generator of latents: clients' last layers predict the class", _FEDGEN
    ),
    "gdfq_generator": MethodLoss(
        "gdfq_generator_loss", "generator: a class and batch-norm statistics", "Xu et al. 2020, GDFQ"
    ),
    "image_diversity": MethodLoss("image_diversity_loss", "generator: distant images with close outputs", _RDSKD),
    "joint_label": MethodLoss("joint_label_loss", "branches: labels of class and orientation together", _HSAKD),
    "latent_diversity": MethodLoss(
        "latent_diversity_loss", "generator of latents: distant noise gives distant latents", _FEDGEN
    ),
    "mean_discrepancy": MethodLoss(
        "mean_discrepancy_loss", "features of two domains: squared MMD, biased", "Gretton et al. 2012"
    ),
    "mode_seeking": MethodLoss(
        "mode_seeking_loss", "generator: different latents give different images", "Mao et al. 2019, MSGAN"
    ),
    "mskd": MethodLoss("mskd_generator_loss", "generator: DAFL's loss with mode seeking", "MSKD (our reading)"),
    "one_hot": MethodLoss("one_hot_loss", "generator: the teacher is confident about each image", _DAFL),
    "proximal": MethodLoss(
        "proximal_loss", "client: weights stay near those that the server sent", "Li et al. 2020, FedProx"
    ),
    "rdskd": MethodLoss("rdskd_generator_loss", "generator: increases are penalized exponentially", _RDSKD),
    "sampled_soft_target": MethodLoss(
        "sampled_soft_target_loss",
        "student: soft targets over very many classes, estimated from a sample of them",
        "ours; importance weights as in arXiv 2503.16870",
    ),
    "total_variation": MethodLoss("total_variation_loss", "images: neighboring pixels are alike", _DI),
}
