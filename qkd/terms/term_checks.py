"""Check whether loss terms can be built: losses, options and taps against the table of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qkd.config import TermConfig
from qkd.config.bind_faults import did_you_mean
from qkd.terms.loss_table import LOSSES, LossEntry

KINDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}


def check_terms(terms: Sequence[TermConfig], where: str = "terms") -> tuple[str, ...]:
    """Return all faults of a list of terms, each with its path; empty if they can be built.

    Args:
        terms: The terms in the config.
        where: Path of the list in the config, e.g. ``student.terms``.

    Returns:
        One sentence per fault, with its path.
    """
    faults = [fault for index, term in enumerate(terms) for fault in _term_faults(term, f"{where}[{index}]")]
    if not any(term.weight > 0 for term in terms):
        faults.append(f"{where}: no term has a positive weight, so there is nothing to learn from")
    return tuple(faults)


def use_faults(term: TermConfig, where: str, batch_size: int | None, *, mixes: bool = False) -> list[str]:
    """Return what a term that can be built would do without effect, or could not do, each with its path.

    Args:
        term: The term in the config.
        where: Its path.
        batch_size: Images of a training batch; None if it is not known.
        mixes: Whether images are mixed, so that each has two labels.
    """
    entry = LOSSES.get(term.loss)
    if entry is None or not term.weight:
        return []
    faults = []
    if batch_size is not None and batch_size < entry.least_images:
        faults.append(
            f"{where}.loss: {term.loss} compares the images of a batch, and is 0 for fewer than {entry.least_images}, "
            f"but batches have {batch_size}"
        )
    for name in term.options.keys() & entry.options.keys():
        beside = entry.options[name].beside
        if beside is not None and term.options.get(beside[0]) not in beside[1]:
            faults.append(
                f"{where}.options.{name}: {term.loss} reads it with {beside[0]} {' or '.join(beside[1])} only, got "
                f"{term.options.get(beside[0], 'its default')}; remove it"
            )
    if term.tap != "quantized" and entry.needs_taps and not entry.needs_student:
        faults.append(f"{where}.tap: {term.loss} reads the teacher's features only; remove `tap`")
    if mixes and "labels" in entry.inputs and "other_labels" not in entry.inputs:
        faults.append(
            f"{where}.loss: {term.loss} reads one label per image, but images mixed by CutMix have two; use "
            f"cross_entropy, or an agent without CutMix"
        )
    return faults


def _term_faults(term: TermConfig, where: str) -> list[str]:
    entry = LOSSES.get(term.loss)
    if entry is None:
        return [f"{where}.loss: unknown loss {term.loss!r}{_meant(term.loss, LOSSES)}"]
    faults = [fault for name, value in term.options.items() for fault in _option_faults(entry, name, value, where)]
    if entry.needs_taps and not term.taps:
        faults.append(f"{where}.taps: {term.loss} reads features: name pairs [student module, teacher module]")
    elif entry.needs_taps and len(term.taps) < entry.least_taps:
        faults.append(f"{where}.taps: {term.loss} relates taps: name at least {entry.least_taps}, got {len(term.taps)}")
    if term.taps and not entry.needs_taps:
        faults.append(f"{where}.taps: {term.loss} does not read features; remove the taps")
    if term.tap != "quantized" and not entry.needs_taps:
        faults.append(f"{where}.tap: {term.loss} does not read features; remove `tap`")
    return faults


def _option_faults(entry: LossEntry, name: str, value: Any, where: str) -> list[str]:
    option = entry.options.get(name)
    path = f"{where}.options.{name}"
    if option is None:
        return [f"{path}: unknown option{_meant(name, entry.options)}"]
    if not _has_kind(value, option.kind):
        return [f"{path}: must be {KINDS[option.kind]}, got {value!r}"]
    return [] if option.accepts(value) else [f"{path}: must be {option.claim}, got {value!r}"]


def _has_kind(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _meant(name: str, known: Mapping[str, object]) -> str:
    return f"; {did_you_mean(name, sorted(known))}" if known else "; it has no options"
