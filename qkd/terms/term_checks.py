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
