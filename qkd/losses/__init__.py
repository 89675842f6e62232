"""Distillation losses: pure functions of tensors with keyword-only scalars."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.losses.branches import branch_soft_target_loss, joint_label_loss
    from qkd.losses.features import attention_transfer_loss, hint_loss
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
    from qkd.losses.logits import cross_entropy_loss, decoupled_loss, soft_target_loss
    from qkd.losses.relations import (
        angle_relation_loss,
        distance_relation_loss,
        probabilistic_transfer_loss,
        similarity_preserving_loss,
    )
    from qkd.losses.singular import aligned_vectors, right_singular_vectors, singular_vector_loss
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = [
    "aligned_vectors",
    "angle_relation_loss",
    "attention_transfer_loss",
    "branch_soft_target_loss",
    "class_relation_loss",
    "class_relation_targets",
    "cross_entropy_loss",
    "decoupled_loss",
    "distance_relation_loss",
    "equivalent_label_smoothing",
    "gradient_rescaling",
    "graph_attention_loss",
    "graph_divergence",
    "hint_loss",
    "information_flow_loss",
    "joint_label_loss",
    "logit_relation_loss",
    "multi_head_graph_loss",
    "probabilistic_transfer_loss",
    "right_singular_vectors",
    "similarity_preserving_loss",
    "singular_vector_loss",
    "soft_target_loss",
    "teacher_confidence_loss",
    "top_classes_loss",
]
