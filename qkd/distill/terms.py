"""The table of losses, and the weighted sum that a config makes of them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qkd.config import TermConfig
from qkd.distill.losses import (
    angle_relation_loss,
    attention_transfer_loss,
    class_relation_loss,
    cross_entropy_loss,
    decoupled_loss,
    distance_relation_loss,
    hint_loss,
    information_flow_loss,
    probabilistic_transfer_loss,
    similarity_preserving_loss,
    soft_target_loss,
    teacher_confidence_loss,
    top_classes_loss,
)
from qkd.distill.losses.information_flow import DIVERGENCES, KERNELS, REDUCTIONS
from qkd.distill.losses.levels import REMAINDERS


@dataclass(frozen=True)
class Option:
    """A keyword argument of a loss that a config may set.

    Args:
        kind: ``float`` (whole numbers are taken, too), ``int``, ``str`` or ``bool``.
        claim: What a value must be, as it reads after "must be".
        accepts: Whether a value of the right kind is allowed.
        default: Value where the config says nothing; None leaves it to the function.
    """

    kind: type
    claim: str
    accepts: Callable[[Any], bool]
    default: float | int | str | bool | None = None


@dataclass(frozen=True)
class LossEntry:
    """A row of :data:`LOSSES`.

    Args:
        function: The loss: tensors by position, options by keyword.
        inputs: What the tensors are, in order: fields of :class:`Outputs`, or ``student_feature`` and
            ``teacher_feature`` for a loss that is called once for each pair of taps (and summed over them).
        summary: One line for `qkd ls losses`.
        source: Where it is published.
        options: Name -> what the config may say.
    """

    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    summary: str
    source: str
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def needs_taps(self) -> bool:
        """Whether the config must name pairs of modules."""
        return "student_feature" in self.inputs

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's forward pass is needed."""
        return any(name.startswith("teacher_") for name in self.inputs)


def _is_positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _is_not_negative(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _one_of(choices: Sequence[str]) -> Option:
    return Option(str, f"one of {', '.join(choices)}", lambda value: value in choices)


_TEMPERATURE = Option(float, "positive", _is_positive, default=4.0)
_SCALE = Option(float, "not negative (absent: temperature squared)", _is_not_negative)
_WEIGHT = Option(float, "not negative", _is_not_negative)
_FEATURES = ("student_feature", "teacher_feature")

LOSSES: dict[str, LossEntry] = {
    "cross_entropy": LossEntry(
        cross_entropy_loss,
        ("student_logits", "labels"),
        "student against the labels",
        "Szegedy et al. 2015, section 7 (label smoothing)",
        {"label_smoothing": Option(float, "in [0, 1)", lambda value: 0 <= value < 1)},
    ),
    "soft_target": LossEntry(
        soft_target_loss,
        ("student_logits", "teacher_logits"),
        "student against the teacher's softened distribution",
        "Hinton et al. 2015, section 2",
        {
            "temperature": _TEMPERATURE,
            "scale": _SCALE,
            "reduction": Option(str, "batchmean or mean", lambda value: value in ("batchmean", "mean")),
        },
    ),
    "decoupled": LossEntry(
        decoupled_loss,
        ("student_logits", "teacher_logits", "labels"),
        "soft targets in two parts: the true class, and the others among themselves",
        "Zhao et al. 2022, equation 7",
        {"temperature": _TEMPERATURE, "target_weight": _WEIGHT, "others_weight": _WEIGHT, "scale": _SCALE},
    ),
    "teacher_confidence": LossEntry(
        teacher_confidence_loss,
        ("student_logits", "teacher_logits", "labels"),
        "KD-pt: how sure the teacher is of each image, and nothing else",
        "Tang et al. 2020, instance level (our reading of the form)",
        {"temperature": _TEMPERATURE, "scale": _SCALE},
    ),
    "class_relation": LossEntry(
        class_relation_loss,
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
        top_classes_loss,
        ("student_logits", "teacher_logits"),
        "KD-topk: soft targets of the classes that the teacher thinks likeliest",
        "Tang et al. 2020",
        {
            "temperature": _TEMPERATURE,
            "classes": Option(int, "at least 1", lambda value: value >= 1, default=3),
            "remainder": _one_of(REMAINDERS),
            "scale": _SCALE,
        },
    ),
    "hint": LossEntry(
        hint_loss, _FEATURES, "mean squared difference at pairs of taps of one shape", "Romero et al. 2015, equation 3"
    ),
    "attention_transfer": LossEntry(
        attention_transfer_loss,
        _FEATURES,
        "where in the image features are large, at pairs of taps",
        "Zagoruyko and Komodakis 2017, section 3.1",
        {"power": Option(float, "at least 1", lambda value: math.isfinite(value) and value >= 1)},
    ),
    "similarity_preserving": LossEntry(
        similarity_preserving_loss,
        _FEATURES,
        "which images of a batch look alike, at pairs of taps",
        "Tung and Mori 2019, equations 1 to 4",
    ),
    "distance_relation": LossEntry(
        distance_relation_loss,
        _FEATURES,
        "RKD-D: how far images of a batch lie apart, at pairs of taps",
        "Park et al. 2019, equations 5 to 8",
    ),
    "angle_relation": LossEntry(
        angle_relation_loss,
        _FEATURES,
        "RKD-A: angles that three images of a batch form, at pairs of taps",
        "Park et al. 2019, equations 9 to 11",
    ),
    "probabilistic_transfer": LossEntry(
        probabilistic_transfer_loss,
        _FEATURES,
        "PKT: probabilities that images of a batch are neighbours, at pairs of taps",
        "Passalis and Tefas 2018, equations 3, 5 and 6",
    ),
    "information_flow": LossEntry(
        information_flow_loss,
        _FEATURES,
        "IFM: divergence of the probabilities that images of a batch are neighbours, at pairs of taps",
        "Passalis et al. 2020, section 3",
        {
            "kernel": _one_of(KERNELS),
            "reduction": _one_of(REDUCTIONS),
            "divergence": _one_of(DIVERGENCES),
            "sigma": Option(float, "positive", _is_positive),
            "normalize": Option(bool, "true or false", lambda value: True),
        },
    ),
}


@dataclass(frozen=True)
class Outputs:
    """What a step's forward passes gave.

    Args:
        student_logits: Shape ``[batch, classes]``.
        labels: Shape ``[batch]``, int64.
        teacher_logits: Shape ``[batch, classes]``; None where no term needs the teacher.
        student_features: Tap (float module path) -> tensor.
        teacher_features: Tap -> tensor.
        class_weights: Of the teacher's last layer, shape ``[classes, features]``; None where no term reads them.
    """

    student_logits: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None
    student_features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)
    class_weights: Tensor | None = None


class WeightedTerms:
    """The sum of weighted losses that a list of terms describes; :func:`build_terms` makes and checks it.

    A term of weight zero is left out altogether: it costs nothing and changes no bit of the result.
    """

    def __init__(self, terms: Sequence[tuple[str, TermConfig, dict[str, Any]]]) -> None:
        self._terms = tuple(term for term in terms if term[1].weight > 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in order; a loss that occurs twice has a number behind it."""
        return tuple(name for name, _, _ in self._terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether a step must run the teacher."""
        return any(LOSSES[config.loss].needs_teacher for _, config, _ in self._terms)

    @property
    def needs_class_weights(self) -> bool:
        """Whether a term reads the weights of the teacher's last layer."""
        return any("class_weights" in LOSSES[config.loss].inputs for _, config, _ in self._terms)

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Module paths of the student's float net that features are read from."""
        return _unique(pair[0] for _, config, _ in self._terms for pair in config.taps)

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Module paths of the teacher that features are read from."""
        return _unique(pair[1] for _, config, _ in self._terms for pair in config.taps)

    def __call__(self, outputs: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, shape ``[]``, and its parts before weighting, shape ``[]`` each."""
        total: Tensor | None = None
        parts: dict[str, Tensor] = {}
        for name, config, options in self._terms:
            value = _evaluate(LOSSES[config.loss], config, options, outputs)
            parts[name] = value
            weighted = value if config.weight == 1 else value * config.weight
            total = weighted if total is None else total + weighted
        if total is None:
            raise ValueError("no loss term has a positive weight")
        return total, parts


def check_terms(terms: Sequence[TermConfig], where: str = "terms") -> tuple[str, ...]:
    """Return every fault of a list of terms, each with its path; empty if they can be built.

    Args:
        terms: As the config has them.
        where: Path of the list in the config, e.g. ``student.terms``.
    """
    faults = [fault for index, term in enumerate(terms) for fault in _term_faults(term, f"{where}[{index}]")]
    if not any(term.weight > 0 for term in terms):
        faults.append(f"{where}: no term has a positive weight, so there is nothing to learn from")
    return tuple(faults)


def build_terms(terms: Sequence[TermConfig], *, label_smoothing: float = 0.0) -> WeightedTerms:
    """Build the loss that a list of terms describes.

    Args:
        terms: As the config has them.
        label_smoothing: Of cross-entropy terms that do not set their own.

    Returns:
        A callable from :class:`Outputs` to the weighted sum and its parts.

    Raises:
        ValueError: If a loss or option is unknown, an option has the wrong type or value, taps are missing or given
            where none are read, or no term has a positive weight; all faults at once.
    """
    faults = check_terms(terms)
    if faults:
        raise ValueError("the loss terms cannot be built:\n" + "\n".join(f"  {fault}" for fault in faults))
    return WeightedTerms(
        [(name, term, _options(term, label_smoothing)) for name, term in zip(_part_names(terms), terms, strict=True)]
    )


def _evaluate(entry: LossEntry, config: TermConfig, options: Mapping[str, Any], outputs: Outputs) -> Tensor:
    if not entry.needs_taps:
        return entry.function(*(_input(outputs, name) for name in entry.inputs), **options)
    values = []
    for student_path, teacher_path in config.taps:
        features = {
            "student_feature": _widen(outputs.student_features[student_path]),
            "teacher_feature": _widen(outputs.teacher_features[teacher_path]),
        }
        tensors = (features[name] if name in features else _input(outputs, name) for name in entry.inputs)
        values.append(entry.function(*tensors, **options))
    return values[0] if len(values) == 1 else sum(values[1:], values[0])


def _input(outputs: Outputs, name: str) -> Tensor:
    value = getattr(outputs, name)
    if value is None:
        raise ValueError(f"a loss term needs {name}, but the step has none: it comes from the teacher")
    return _widen(value)


def _widen(tensor: Tensor) -> Tensor:
    """Return half-precision tensors in float32: sums of exponentials and squares need the range."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor


def _options(term: TermConfig, label_smoothing: float) -> dict[str, Any]:
    entry = LOSSES[term.loss]
    options = {name: option.default for name, option in entry.options.items() if option.default is not None}
    if "label_smoothing" in entry.options:
        options["label_smoothing"] = label_smoothing
    return {**options, **term.options}


def _part_names(terms: Sequence[TermConfig]) -> list[str]:
    names: list[str] = []
    for term in terms:
        count = sum(other.loss == term.loss for other in terms[: len(names)])
        names.append(term.loss if count == 0 else f"{term.loss}_{count + 1}")
    return names


def _term_faults(term: TermConfig, where: str) -> list[str]:
    entry = LOSSES.get(term.loss)
    if entry is None:
        return [f"{where}.loss: unknown loss {term.loss!r}{_meant(term.loss, LOSSES)}"]
    faults = [fault for name, value in term.options.items() for fault in _option_faults(entry, name, value, where)]
    if entry.needs_taps and not term.taps:
        faults.append(f"{where}.taps: {term.loss} reads features: name pairs [student module, teacher module]")
    if term.taps and not entry.needs_taps:
        faults.append(f"{where}.taps: {term.loss} reads no features; remove the taps")
    return faults


def _option_faults(entry: LossEntry, name: str, value: Any, where: str) -> list[str]:
    option = entry.options.get(name)
    path = f"{where}.options.{name}"
    if option is None:
        return [f"{path}: unknown option{_meant(name, entry.options)}"]
    if not _has_kind(value, option.kind):
        return [f"{path}: must be a {option.kind.__name__}, got {value!r}"]
    return [] if option.accepts(value) else [f"{path}: must be {option.claim}, got {value!r}"]


def _has_kind(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _meant(name: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean `{close[0]}`?"
    return f"; known: {', '.join(sorted(known))}" if known else "; it has none"


def _unique(paths: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))
