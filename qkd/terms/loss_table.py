"""The table of losses: the names for a config, what each loss reads, and where it is published.

Rows name their functions, so a config can be checked without PyTorch: a function is imported when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qkd.losses.choices import (
    ATTENTIONS,
    CRITERIA,
    DIVERGENCES,
    FLOW_REDUCTIONS,
    HEADS,
    KERNELS,
    LEAST_TEMPERATURE,
    MOST_TEMPERATURE,
    REMAINDERS,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qkd.terms.width_adapters import WidthAdapters


@dataclass(frozen=True)
class Option:
    """A keyword argument of a loss that a config may set.

    Args:
        kind: ``float`` (also accepts whole numbers), ``int``, ``str`` or ``bool``.
        claim: What a value must be, worded to follow "must be".
        accepts: Whether a value of the right kind is allowed.
        default: Value if the config sets none; None leaves it to the function.
        beside: Another option, and its values with which this one has an effect; None if it always has.
    """

    kind: type
    claim: str
    accepts: Callable[[Any], bool]
    default: float | int | str | bool | None = None
    beside: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class FeatureShapes:
    """Feature shapes of one image, without the batch, in the order of the taps that a module is built for.

    Args:
        student: Shapes at the student's taps, e.g. ``((16, 8, 8),)``.
        teacher: Shapes at the teacher's taps.
    """

    student: tuple[tuple[int, ...], ...]
    teacher: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ModuleKind:
    """A small net that a loss is computed with, trained along with the student and then discarded.

    Terms of the same kind share a module if their taps and the named options are the same, across all phases.

    Args:
        name: Name of the kind, e.g. ``adapter``.
        build: Builds it from its taps' shapes and the term's options; gives None if these taps do not need one.
        options: Names of the options that its shape depends on; they are not passed to the loss.
    """

    name: str
    build: Callable[[FeatureShapes, Mapping[str, Any]], nn.Module | None]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class LossEntry:
    """A row of :data:`LOSSES`.

    Args:
        name: Name of the loss's function in :mod:`qkd.losses`.
        inputs: Its tensors, in order: fields of :class:`Outputs`; ``student_feature`` and ``teacher_feature`` for a
            loss that is called once per pair of taps (and summed over them); or ``student_stages`` and
            ``teacher_stages`` for a loss that is called once with the lists of all its taps, in order.
        summary: One line for `qkd ls losses`.
        source: Where it is published.
        options: Name -> what the config can set.
        module: The module it needs, if any, which the function gets as the keyword ``module``.
        least_taps: Minimum number of pairs of taps, if it reads features.
        taught_by: The loss that trains its module, in the same or an earlier phase, with the same taps; empty if it
            trains the module itself or has none.
        teaches: Whether it can give the teacher a gradient (MetaDistil); singular vectors of the teacher remain
            constants, and the gradient of a distance between logits does not depend on the teacher.
        compares_images: Whether it compares the images of a batch, so that the mean over two halves of a batch is not
            its value on the whole batch; several devices then compute it on whole batches.
        least_images: Smallest batch for which it is not 0 whatever the features are.
    """

    name: str
    inputs: tuple[str, ...]
    summary: str
    source: str
    options: Mapping[str, Option] = field(default_factory=dict)
    module: ModuleKind | None = None
    least_taps: int = 1
    taught_by: str = ""
    teaches: bool = True
    compares_images: bool = False
    least_images: int = 1

    @property
    def function(self) -> Callable[..., Tensor]:
        """The loss: tensors by position, options by keyword (imports torch)."""
        from qkd import losses

        found: Callable[..., Tensor] = getattr(losses, self.name)
        return found

    @property
    def is_pairwise(self) -> bool:
        """Whether it is called once per pair of taps."""
        return "student_feature" in self.inputs or "teacher_feature" in self.inputs

    @property
    def needs_taps(self) -> bool:
        """Whether the config must name pairs of modules."""
        return self.is_pairwise or "student_stages" in self.inputs or "teacher_stages" in self.inputs

    @property
    def needs_student(self) -> bool:
        """Whether it reads anything from the student (if not, it trains its module on the teacher alone)."""
        return any(name.startswith("student_") for name in self.inputs)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's forward pass is needed."""
        return any(name.startswith("teacher_") for name in self.inputs)

    @property
    def is_distillation(self) -> bool:
        """Whether it uses the teacher's knowledge: from a forward pass, or from its weights."""
        return self.needs_teacher or "class_weights" in self.inputs


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _is_temperature(value: float) -> bool:
    return LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE


def _is_not_negative(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _one_of(choices: Sequence[str]) -> Option:
    return Option(str, f"one of {', '.join(choices)}", lambda value: value in choices)


_HEAT = f"positive, from {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"
_TEMPERATURE = Option(float, _HEAT, _is_temperature, default=4.0)
_SCALE = Option(float, "not negative (default: temperature squared)", _is_not_negative)
_WEIGHT = Option(float, "not negative", _is_not_negative)
_FEATURES = ("student_feature", "teacher_feature")
_STAGES = ("student_stages", "teacher_stages")
_CANDIDATES = Option(int, "at least 1", lambda value: value >= 1)
_HEADS = Option(int, "at least 1", lambda value: value >= 1, default=HEADS)


def _channels(shapes: FeatureShapes) -> tuple[list[int], list[int]]:
    return [shape[0] for shape in shapes.student], [shape[0] for shape in shapes.teacher]


def _adapter(shapes: FeatureShapes, options: Mapping[str, Any]) -> nn.Module | None:
    from qkd.losses.features import build_adapter

    return build_adapter(shapes.student[0], shapes.teacher[0])


def _widths(shapes: FeatureShapes, options: Mapping[str, Any]) -> WidthAdapters | None:
    from qkd.terms.width_adapters import WidthAdapters

    student, teacher = _channels(shapes)
    return None if student == teacher else WidthAdapters(student, teacher)


def _graph(shapes: FeatureShapes, options: Mapping[str, Any]) -> nn.Module:
    from qkd.terms.head_graph import MultiHeadGraph

    return MultiHeadGraph(*_channels(shapes), heads=options["heads"])


ADAPTER = ModuleKind("adapter", _adapter)
WIDTHS = ModuleKind("widths", _widths)
GRAPH = ModuleKind("graph", _graph, ("heads",))


LOSSES: dict[str, LossEntry] = {
    "cross_entropy": LossEntry(
        "cross_entropy_loss",
        ("student_logits", "labels", "other_labels", "other_share"),
        "cross-entropy of the student with the labels",
        "Szegedy et al. 2015, section 7 (label smoothing)",
        {"label_smoothing": Option(float, "in [0, 1)", lambda value: 0 <= value < 1)},
    ),
    "soft_target": LossEntry(
        "soft_target_loss",
        ("student_logits", "teacher_logits"),
        "divergence of the student from the teacher's softened distribution",
        "Hinton et al. 2015, section 2",
        {
            "temperature": _TEMPERATURE,
            "scale": _SCALE,
            "reduction": Option(str, "batchmean or mean", lambda value: value in ("batchmean", "mean")),
        },
    ),
    "decoupled": LossEntry(
        "decoupled_loss",
        ("student_logits", "teacher_logits", "labels"),
        "soft targets in two separately weighted parts: the true class, and the other classes",
        "Zhao et al. 2022, equation 7",
        {"temperature": _TEMPERATURE, "target_weight": _WEIGHT, "others_weight": _WEIGHT, "scale": _SCALE},
    ),
    "teacher_confidence": LossEntry(
        "teacher_confidence_loss",
        ("student_logits", "teacher_logits", "labels"),
        "KD-pt: only the teacher's confidence in each image",
        "Tang et al. 2020, instance level (our reading of the form)",
        {"temperature": _TEMPERATURE, "scale": _SCALE},
    ),
    "class_relation": LossEntry(
        "class_relation_loss",
        ("student_logits", "labels", "class_weights"),
        "KD-sim: how the true class relates to the others in the teacher's last layer; needs no teacher forward pass",
        "Tang et al. 2020, domain level (our reading of the form)",
        {
            "temperature": _TEMPERATURE,
            "sharpness": Option(float, "positive", _is_positive),
            "one_hot_share": Option(float, "in [0, 1)", lambda value: 0 <= value < 1),
            "scale": _SCALE,
        },
    ),
    "top_classes": LossEntry(
        "top_classes_loss",
        ("student_logits", "teacher_logits"),
        "KD-topk: soft targets of the classes that the teacher considers most likely",
        "Tang et al. 2020",
        {
            "temperature": _TEMPERATURE,
            "classes": Option(int, "at least 1", lambda value: value >= 1, default=3),
            "remainder": _one_of(REMAINDERS),
            "scale": _SCALE,
        },
    ),
    "hint": LossEntry(
        "hint_loss",
        _FEATURES,
        "mean squared difference at pairs of taps, through a 1x1 convolution if their shapes differ",
        "Romero et al. 2015, equation 3",
        module=ADAPTER,
    ),
    "attention_transfer": LossEntry(
        "attention_transfer_loss",
        _FEATURES,
        "where in the image the features are large, at pairs of taps",
        "Zagoruyko and Komodakis 2017, section 3.1",
        {"power": Option(float, "at least 1", lambda value: math.isfinite(value) and value >= 1)},
    ),
    "similarity_preserving": LossEntry(
        "similarity_preserving_loss",
        _FEATURES,
        "which images of a batch look alike, at pairs of taps",
        "Tung and Mori 2019, equations 1 to 4",
        compares_images=True,
        least_images=2,
    ),
    "distance_relation": LossEntry(
        "distance_relation_loss",
        _FEATURES,
        "RKD-D: distances between the images of a batch, at pairs of taps",
        "Park et al. 2019, equations 5 to 8",
        compares_images=True,
        least_images=3,
    ),
    "angle_relation": LossEntry(
        "angle_relation_loss",
        _FEATURES,
        "RKD-A: angles between three images of a batch, at pairs of taps",
        "Park et al. 2019, equations 9 to 11",
        compares_images=True,
        least_images=3,
    ),
    "logit_relation": LossEntry(
        "logit_relation_loss",
        ("student_logits", "teacher_logits"),
        "RKD, distances and angles, on logits of length 1",
        "Park et al. 2019, as role-kd applies it",
        {"distance_weight": _WEIGHT, "angle_weight": _WEIGHT},
        compares_images=True,
        least_images=3,
    ),
    "singular_vector": LossEntry(
        "singular_vector_loss",
        _STAGES,
        "KD-SVD: how the first singular vectors of neighboring taps relate",
        "Lee, Kim and Song 2018",
        {"candidates": _CANDIDATES},
        module=WIDTHS,
        least_taps=2,
        teaches=False,
        compares_images=True,
    ),
    "multi_head_graph": LossEntry(
        "multi_head_graph_loss",
        _STAGES,
        "MHGD: relations between the images of a batch, by an attention that graph_attention trains on the teacher",
        "Lee and Song 2019; with singular_weight 1 MHGD-SVD of role-kd",
        {
            "heads": _HEADS,
            "candidates": _CANDIDATES,
            "attention": _one_of(ATTENTIONS),
            "singular_weight": _WEIGHT,
        },
        module=GRAPH,
        least_taps=2,
        taught_by="graph_attention",
        teaches=False,
        compares_images=True,
        least_images=2,
    ),
    "graph_attention": LossEntry(
        "graph_attention_loss",
        ("teacher_stages",),
        "trains MHGD's attention on the teacher alone, for a phase that trains modules",
        "Lee and Song 2019 (our form of the estimator)",
        {"heads": _HEADS, "weight_decay": _WEIGHT},
        module=GRAPH,
        least_taps=2,
        teaches=False,
        compares_images=True,
        least_images=2,
    ),
    "probabilistic_transfer": LossEntry(
        "probabilistic_transfer_loss",
        _FEATURES,
        "PKT: probabilities that images of a batch are neighbors, at pairs of taps",
        "Passalis and Tefas 2018, equations 3, 5 and 6",
        compares_images=True,
        least_images=2,
    ),
    "information_flow": LossEntry(
        "information_flow_loss",
        _FEATURES,
        "IFM: divergence of the probabilities that images of a batch are neighbors, at pairs of taps",
        "Passalis et al. 2020, section 3",
        {
            "kernel": _one_of(KERNELS),
            "divergence": _one_of(DIVERGENCES),
            "sigma": Option(float, "positive", _is_positive, beside=("kernel", ("rbf", "cauchy"))),
            "reduction": _one_of(FLOW_REDUCTIONS),
            "normalize": Option(bool, "true or false", lambda value: True),
        },
        compares_images=True,
        least_images=2,
    ),
    "logit_distance": LossEntry(
        "logit_distance_loss",
        ("student_logits", "teacher_logits"),
        "DFAD: mean absolute difference of logits",
        "Fang et al. 2019, data-free adversarial distillation",
        teaches=False,
    ),
    "logit_square": LossEntry(
        "logit_square_loss",
        ("student_logits", "teacher_logits"),
        "mean squared difference of logits over a temperature",
        "Ba and Caruana 2014; with a temperature as in MetaDistil",
        {"temperature": Option(float, _HEAT, _is_temperature)},
    ),
    "gdfq_student": LossEntry(
        "gdfq_student_loss",
        ("student_logits", "teacher_logits", "labels"),
        "GDFQ: the labels that images were generated for, plus soft targets divided by batch times classes",
        "Xu et al. 2020, generative data-free quantization",
        {"temperature": Option(float, _HEAT, _is_temperature, default=20.0), "divergence_weight": _WEIGHT},
    ),
    "filtered_soft_target": LossEntry(
        "filtered_soft_target_loss",
        ("student_logits", "teacher_logits", "labels"),
        "KDDG: soft targets whose gradient is 0 where the student has learned enough",
        "Wang et al. 2021; our reading of the abstract",
        {
            "temperature": _TEMPERATURE,
            "criterion": _one_of(CRITERIA),
            "threshold": Option(float, "not negative", _is_not_negative, beside=("criterion", ("close",))),
        },
    ),
    "lipschitz": LossEntry(
        "lipschitz_loss",
        _STAGES,
        "LONDON: Lipschitz constants of the blocks between neighboring taps",
        "Shang et al. 2021; our reading of the abstract",
        {"iterations": Option(int, "at least 1", lambda value: value >= 1)},
        least_taps=2,
        compares_images=True,
        least_images=2,
    ),
}
