"""The weighted sum of losses described by a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qkd.config import TermConfig
from qkd.engines.engine import current
from qkd.terms.loss_table import LOSSES, LossEntry
from qkd.terms.modules import ModuleBank
from qkd.terms.taps import PRE_QUANT
from qkd.terms.term_checks import check_terms


@dataclass(frozen=True)
class Outputs:
    """The outputs of a step's forward passes.

    Args:
        student_logits: Shape ``[batch, classes]``.
        labels: Shape ``[batch]``, int64.
        teacher_logits: Shape ``[batch, classes]``; None if no term needs the teacher.
        student_features: Tap (float module path) -> tensor.
        teacher_features: Tap -> tensor.
        class_weights: Weights of the teacher's last layer, shape ``[classes, features]``; None if no term reads them.
        other_labels: Second labels of mixed images, int64, shape ``[batch]``; None if images are not mixed.
        other_share: Their share of each label, shape ``[batch]``.
    """

    student_logits: Tensor
    labels: Tensor
    teacher_logits: Tensor | None = None
    student_features: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_features: Mapping[str, Tensor] = field(default_factory=dict)
    class_weights: Tensor | None = None
    other_labels: Tensor | None = None
    other_share: Tensor | None = None


@dataclass(frozen=True)
class Weighted:
    """The value of terms on one batch.

    Args:
        total: The weighted sum, shape ``[]``, with its graph.
        parts: Each term's value before weighting, shape ``[]``.
        task: The weighted sum of the terms that do not need a teacher; None if there are none.
        knowledge: The weighted sum of those that do; None if there are none.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    task: Tensor | None
    knowledge: Tensor | None


@dataclass(frozen=True)
class Term:
    """A loss that is ready to be computed.

    Args:
        name: Name of its part; a loss that occurs twice gets a number as suffix.
        config: Weight, decay and taps.
        entry: Its row of the table.
        options: Keyword arguments.
        modules: One per pair of taps for a pairwise loss, otherwise one; None if not needed; empty for a loss without.
    """

    name: str
    config: TermConfig
    entry: LossEntry
    options: Mapping[str, Any]
    modules: tuple[nn.Module | None, ...] = ()

    def weight(self, epoch: int) -> float:
        """Return its weight in an epoch of its phase, from 0."""
        return self.config.weight * self.config.decay**epoch


class WeightedTerms:
    """The weighted sum of losses for a list of terms; :func:`build_terms` builds and checks it.

    A term with weight zero is omitted altogether: it costs nothing and changes no bit of the result.

    Args:
        terms: Only those with positive weight are used.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self._terms = tuple(term for term in terms if term.config.weight > 0)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in order; a loss that occurs twice gets a number as suffix."""
        return tuple(term.name for term in self._terms)

    @property
    def configs(self) -> tuple[TermConfig, ...]:
        """The terms in the config, without those of weight zero."""
        return tuple(term.config for term in self._terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether a step must run the teacher."""
        return any(term.entry.needs_teacher for term in self._terms)

    @property
    def needs_student(self) -> bool:
        """Whether a term reads anything from the student."""
        return any(term.entry.needs_student for term in self._terms)

    @property
    def has_modules(self) -> bool:
        """Whether a term is computed with a trainable module."""
        return any(module is not None for term in self._terms for module in term.modules)

    @property
    def needs_class_weights(self) -> bool:
        """Whether a term reads the weights of the teacher's last layer."""
        return any("class_weights" in term.entry.inputs for term in self._terms)

    @property
    def student_taps(self) -> tuple[str, ...]:
        """Module paths of the student's float net that features are read from, as :class:`Taps` takes them."""
        return _unique(_student_tap(term, pair[0]) for term in self._terms for pair in term.config.taps)

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """Module paths of the teacher that features are read from."""
        return _unique(pair[1] for term in self._terms for pair in term.config.taps)

    def __call__(self, outputs: Outputs, *, epoch: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, shape ``[]``, and its parts before weighting, shape ``[]`` each."""
        weighted = self.weigh(outputs, epoch=epoch)
        return weighted.total, dict(weighted.parts)

    def weigh(self, outputs: Outputs, *, epoch: int = 0) -> Weighted:
        """Return the weighted sum, its parts, and its shares from the task and from the teacher's knowledge.

        Args:
            outputs: The outputs of the forward passes.
            epoch: Epoch of the phase, from 0; terms with a decay weigh less from epoch to epoch.

        Raises:
            ValueError: If no term has a positive weight, or a term reads something that the step does not have.
        """
        parts: dict[str, Tensor] = {}
        total = task = knowledge = None
        for term in self._terms:
            parts[term.name] = value = _evaluate(term, outputs)
            weight = term.weight(epoch)
            value = value if weight == 1 else value * weight
            total = value if total is None else total + value
            if term.entry.is_distillation:
                knowledge = value if knowledge is None else knowledge + value
            else:
                task = value if task is None else task + value
        if total is None:
            raise ValueError("no loss term has a positive weight")
        return Weighted(total, parts, task, knowledge)


def build_terms(
    terms: Sequence[TermConfig], *, label_smoothing: float = 0.0, bank: ModuleBank | None = None
) -> WeightedTerms:
    """Build the loss described by a list of terms.

    Args:
        terms: The terms in the config.
        label_smoothing: For cross-entropy terms that do not set their own, in ``[0, 1)``.
        bank: Builds the modules of losses that need them. If omitted, these are computed without modules.

    Returns:
        A callable from :class:`Outputs` to the weighted sum and its parts.

    Raises:
        ValueError: If a loss or option is unknown, an option has the wrong type or value, taps are missing or given
            although none are read, or no term has a positive weight; reports all faults at once.
    """
    faults = check_terms(terms)
    if faults:
        raise ValueError("the loss terms cannot be built:\n" + "\n".join(f"  {fault}" for fault in faults))
    names = _part_names(terms)
    return WeightedTerms([_build(name, term, label_smoothing, bank) for name, term in zip(names, terms, strict=True)])


def _build(name: str, term: TermConfig, label_smoothing: float, bank: ModuleBank | None) -> Term:
    entry, options = LOSSES[term.loss], _options(term, label_smoothing)
    modules: tuple[nn.Module | None, ...] = ()
    if entry.module is not None and bank is not None and term.weight > 0:
        groups = [(pair,) for pair in term.taps] if entry.is_pairwise else [term.taps]
        modules = tuple(bank.take(entry.module, pairs, options) for pairs in groups)
    return Term(name, term, entry, options, modules)


def _evaluate(term: Term, outputs: Outputs) -> Tensor:
    entry = term.entry
    if not entry.is_pairwise:
        return _call(term, 0, _stages(term, outputs), outputs)
    values = []
    for index, (student_path, teacher_path) in enumerate(term.config.taps):
        features = {
            "student_feature": outputs.student_features[_student_tap(term, student_path)],
            "teacher_feature": outputs.teacher_features[teacher_path],
        }
        values.append(_call(term, index, features, outputs))
    return values[0] if len(values) == 1 else sum(values[1:], values[0])


def _stages(term: Term, outputs: Outputs) -> dict[str, Any]:
    """Return the feature lists of a loss that reads all its taps at once; only those that it reads."""
    found = {}
    if "student_stages" in term.entry.inputs:
        found["student_stages"] = [outputs.student_features[_student_tap(term, path)] for path, _ in term.config.taps]
    if "teacher_stages" in term.entry.inputs:
        found["teacher_stages"] = [outputs.teacher_features[path] for _, path in term.config.taps]
    return found


def _student_tap(term: Term, path: str) -> str:
    return path + PRE_QUANT if term.config.tap == "pre_quant" else path


def _call(term: Term, index: int, features: Mapping[str, Any], outputs: Outputs) -> Tensor:
    inputs = term.entry.inputs
    if outputs.other_labels is not None and "labels" in inputs and "other_labels" not in inputs:
        raise ValueError(f"{term.name} reads one label per image, but mixed images (CutMix) have 2; use cross_entropy")
    tensors = [features[name] if name in features else _input(outputs, name) for name in inputs]
    module = {} if term.entry.module is None else {"module": term.modules[index] if term.modules else None}
    shaping = () if term.entry.module is None else term.entry.module.options
    options = {name: value for name, value in term.options.items() if name not in shaping}
    try:
        if not term.entry.compares_images:
            return term.entry.function(*tensors, **options, **module)
        with current().on_whole_batches():
            return term.entry.function(*map(_whole, tensors), **options, **module)
    except ValueError as error:
        taps = " and ".join(term.config.taps[index]) if term.entry.is_pairwise else ""
        raise ValueError(f"{term.name}{f' (taps {taps})' if taps else ''}: {error}") from error


def _whole(rows: Any) -> Any:
    """Return a loss's input, or a list of inputs, for the whole batch that several devices share."""
    return [current().whole(one) for one in rows] if isinstance(rows, list) else current().whole(rows)


def _input(outputs: Outputs, name: str) -> Tensor | None:
    value = getattr(outputs, name)
    if value is None and name.startswith("other_"):
        return None
    if value is None:
        raise ValueError(f"a loss term needs {name} from the teacher, but the step has none")
    return value  # type: ignore[no-any-return]


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


def _unique(paths: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))
