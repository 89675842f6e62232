"""Distillation losses: pure functions of tensors with keyword-only scalars.

All tensors except labels are floating point. Half precision is computed in float32, float64 in float64. Logarithms
are natural unless an option says otherwise. NaNs in the inputs give NaN in the result, so that training stops
and reports where.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.losses.branches import branch_soft_target_loss, joint_label_loss
    from qkd.losses.data_free.contrast import contrastive_loss
    from qkd.losses.data_free.disagreement import (
        competition_loss,
        decision_adversarial_loss,
        disagreement_loss,
        logit_distance_loss,
    )
    from qkd.losses.data_free.diversity import exponential_increment, image_diversity_loss, mode_seeking_loss
    from qkd.losses.data_free.image_priors import batch_norm_loss, total_variation_loss
    from qkd.losses.data_free.impressions import class_similarity, data_impression_loss, dirichlet_concentrations
    from qkd.losses.data_free.objectives import (
        RdskdLoss,
        cmi_inversion_loss,
        dafl_generator_loss,
        deep_inversion_loss,
        dfq_generator_loss,
        gdfq_generator_loss,
        gdfq_student_loss,
        mskd_generator_loss,
        rdskd_generator_loss,
    )
    from qkd.losses.data_free.outputs import class_balance_loss, feature_activation_loss, one_hot_loss
    from qkd.losses.features import attention_transfer_loss, hint_loss
    from qkd.losses.federated.clients import class_logits_loss, class_mean_logits, proximal_loss
    from qkd.losses.federated.generation import (
        fedgen_client_loss,
        fedgen_generator_loss,
        fedgen_weight,
        label_shares,
        latent_diversity_loss,
    )
    from qkd.losses.graphs import (
        graph_attention_loss,
        graph_divergence,
        logit_relation_loss,
        multi_head_graph_loss,
    )
    from qkd.losses.information_flow import information_flow_loss
    from qkd.losses.levels import (
        class_relation_loss,
        class_relation_targets,
        equivalent_label_smoothing,
        gradient_rescaling,
        teacher_confidence_loss,
        top_classes_loss,
    )
    from qkd.losses.logits import cross_entropy_loss, decoupled_loss, logit_square_loss, soft_target_loss
    from qkd.losses.relations import (
        angle_relation_loss,
        distance_relation_loss,
        probabilistic_transfer_loss,
        similarity_preserving_loss,
    )
    from qkd.losses.singular import aligned_vectors, right_singular_vectors, singular_vector_loss
    from qkd.losses.transfer.adaptation import (
        adapted_student_loss,
        adapting_teacher_loss,
        discrepancy_weight,
        student_share,
    )
    from qkd.losses.transfer.discrepancy import mean_discrepancy_loss
    from qkd.losses.transfer.gradient_filter import filtered_soft_target_loss
    from qkd.losses.transfer.lipschitz import lipschitz_constants, lipschitz_loss
    from qkd.losses.transfer.sampled import (
        SampledClasses,
        class_proposal,
        draw_classes,
        estimated_log_normalizers,
        every_class,
        sampled_soft_target_loss,
    )
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = [
    "RdskdLoss",
    "SampledClasses",
    "adapted_student_loss",
    "adapting_teacher_loss",
    "aligned_vectors",
    "angle_relation_loss",
    "attention_transfer_loss",
    "batch_norm_loss",
    "branch_soft_target_loss",
    "class_balance_loss",
    "class_logits_loss",
    "class_mean_logits",
    "class_proposal",
    "class_relation_loss",
    "class_relation_targets",
    "class_similarity",
    "cmi_inversion_loss",
    "competition_loss",
    "contrastive_loss",
    "cross_entropy_loss",
    "dafl_generator_loss",
    "data_impression_loss",
    "decision_adversarial_loss",
    "decoupled_loss",
    "deep_inversion_loss",
    "dfq_generator_loss",
    "dirichlet_concentrations",
    "disagreement_loss",
    "discrepancy_weight",
    "distance_relation_loss",
    "draw_classes",
    "equivalent_label_smoothing",
    "estimated_log_normalizers",
    "every_class",
    "exponential_increment",
    "feature_activation_loss",
    "fedgen_client_loss",
    "fedgen_generator_loss",
    "fedgen_weight",
    "filtered_soft_target_loss",
    "gdfq_generator_loss",
    "gdfq_student_loss",
    "gradient_rescaling",
    "graph_attention_loss",
    "graph_divergence",
    "hint_loss",
    "image_diversity_loss",
    "information_flow_loss",
    "joint_label_loss",
    "label_shares",
    "latent_diversity_loss",
    "lipschitz_constants",
    "lipschitz_loss",
    "logit_distance_loss",
    "logit_relation_loss",
    "logit_square_loss",
    "mean_discrepancy_loss",
    "mode_seeking_loss",
    "mskd_generator_loss",
    "multi_head_graph_loss",
    "one_hot_loss",
    "probabilistic_transfer_loss",
    "proximal_loss",
    "rdskd_generator_loss",
    "right_singular_vectors",
    "sampled_soft_target_loss",
    "similarity_preserving_loss",
    "singular_vector_loss",
    "soft_target_loss",
    "student_share",
    "teacher_confidence_loss",
    "top_classes_loss",
    "total_variation_loss",
]
