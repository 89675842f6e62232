"""The methods by name: location, the config key that requests each, and how others can add one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from qkd.config import PhaseConfig, RunConfig, TermConfig
from qkd.config.bind_faults import did_you_mean
from qkd.config.sections import Section
from qkd.files import sha256_of
from qkd.foreign.user_code import load_place

if TYPE_CHECKING:
    from qkd.methods.method import Method
    from qkd.methods.phase_checks import PhaseRule
    from qkd.methods.report_row import Row

GROUP = "qkd.methods"  # entry points of packages that provide methods


@dataclass(frozen=True)
class Entry:
    """A row of the table.

    Args:
        place: ``module:Class``; imported if a config requests it.
        asked_by: The key that requests it, with ``[]`` for the entries of a list; empty if every run has it.
        about: One line for people, with its source.
        rows: ``module:function`` that returns its rows in the report; empty if it has none.
        record: ``module:Class``, the schema of its part of a ``result.json``.
        phases: ``module:function`` that returns its rule of a phase (:class:`qkd.methods.phase_checks.PhaseRule`).
        faults: ``module:function`` that yields config faults; empty if the schema covers everything.
    """

    place: str
    asked_by: str
    about: str
    rows: str = ""
    record: str = ""
    phases: str = ""
    faults: str = ""


METHODS = {  # in the order in which they are consulted
    "data_free": Entry(
        "qkd.methods.data_free.method:DataFree",
        "student.data_free",
        "no real images: RDSKD, DAFL, GDFQ, DeepInversion, ZSKD, CMI, ZSKT, DFAD, DFQ, Fast-DFKD, ... or noise",
        record="qkd.methods.data_free.making.rows:MadeRecord",
        faults="qkd.methods.data_free.config_checks:config_faults",
    ),
    "ensemble": Entry(
        "qkd.methods.ensemble.method:Ensemble",
        "teacher.members",
        "an ensemble teacher, or self-distillation with one net for both (Allen-Zhu, Li 2020)",
        "qkd.methods.ensemble.rows:ensemble_rows",
        record="qkd.methods.ensemble.rows:EnsembleRecord",
    ),
    "auxiliary": Entry(
        "qkd.methods.auxiliary.method:Auxiliary",
        "student.auxiliary",
        "a net between teacher and student, of the student's topology (Passalis et al. 2020)",
        "qkd.methods.auxiliary.rows:auxiliary_rows",
    ),
    "adaptation": Entry(
        "qkd.methods.adaptation.method:Adaptation",
        "student.adaptation",
        "joint distillation and domain adaptation: source labels only (arXiv 2005.07839)",
        phases="qkd.methods.adaptation.phases:adaptation_phase",
        faults="qkd.methods.adaptation.checks:config_faults",
    ),
    "co_study": Entry(
        "qkd.methods.co_study.method:CoStudy",
        "student.phases[].teacher_terms",
        "co-study: teacher and student learn from each other (Kim et al. 2019, QKD)",
        phases="qkd.methods.co_study.phases:co_study_phase",
    ),
    "meta_distil": Entry(
        "qkd.methods.meta_distil.method:MetaDistil",
        "student.phases[].meta",
        "MetaDistil: a quiz teaches the teacher (Zhou, Xu, McAuley 2022)",
        phases="qkd.methods.meta_distil.phases:meta_phase",
    ),
    "peers": Entry(
        "qkd.methods.peers.method:Peers",
        "student.peers",
        "a student ensemble: nets of several widths or bits learn together (Walawalkar et al. 2020)",
        "qkd.methods.peers.rows:peer_rows",
        record="qkd.methods.peers.rows:PeersRecord",
        phases="qkd.methods.peers.phases:peer_phase",
    ),
    "rotations": Entry(
        "qkd.methods.rotations.method:Rotations",
        "student.rotations",
        "HSSAKD: joint labels of class and rotation, branches, offline or online (Yang et al. 2021)",
    ),
    "widths": Entry(
        "qkd.methods.widths.method:Widths",
        "student.widths",
        "progressive bit widths: for example, train the student at 4 bits before 2 (Zhuang et al. 2018)",
    ),
    "stochastic_precision": Entry(
        "qkd.methods.stochastic_precision.method:StochasticPrecision",
        "student.self_distillation",
        "SPEQ: the student learns from itself with more precise activations (Boo et al. 2021)",
    ),
    "plain": Entry("qkd.methods.plain.method:Plain", "", "a student with a fixed teacher: a weighted sum of terms"),
}


def reads_images(config: RunConfig) -> bool:
    """Return whether the student of a config may learn from the run's training images.

    A method of the user's own whose file is gone by now is taken to read them, as most do.
    """
    kinds = [
        _resolve(entry.place) for entry in METHODS.values() if not entry.asked_by or _is_set(config, entry.asked_by)
    ]
    if config.student.method is not None:
        with suppress(ValueError, OSError, ImportError):
            kinds.append(own_method(config.student.method))
    return all(kind.reads_images for kind in kinds)


def methods_of(config: RunConfig) -> tuple[Method, ...]:
    """Return new objects of the methods that a config requests: the user's own first, plain distillation last.

    Raises:
        ValueError: If ``student.method`` cannot be found or is not a method, or a method finds a fault in the config.
    """
    places = [entry.place for entry in METHODS.values() if not entry.asked_by or _is_set(config, entry.asked_by)]
    own = [] if config.student.method is None else [own_method(config.student.method)]
    methods = tuple(kind(config) for kind in (*own, *(_resolve(place) for place in places)))
    faults = [fault for method in methods for fault in faults_of(method)]
    if faults:
        raise ValueError("the method cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
    return methods


def own_method(name: str) -> type[Method]:
    """Return a method from outside this package.

    Args:
        name: ``path/to/file.py:Class``, ``package.module:Class``, or the name of an entry point of group
            ``qkd.methods``.

    Raises:
        ValueError: If there is none, or it is not a :class:`~qkd.methods.method.Method`.
    """
    from qkd.methods.method import Method

    try:
        found = load_place(name) if ":" in name else _entry_point(name)
    except Exception as error:  # it is the user's file, so report whatever it raises
        raise ValueError(f"student.method: {name} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"student.method: {name} is not a class derived from qkd.methods.method.Method")
    return found


def faults_of(method: Method) -> Iterator[str]:
    """Yield what a method finds wrong with its config, and the options that it does not have if it lists its own."""
    known = method.option_names
    if known is not None:
        for name in sorted(set(method.config.student.method_options) - set(known)):
            hint = did_you_mean(name, known)
            yield f"student.method_options.{name}: {type(method).__name__} has no such option; {hint}"
    found = method.faults()
    yield from [found] if isinstance(found, str) else found


def method_mark(config: RunConfig) -> dict[str, str]:
    """Return the hash of the file of a run's own method: a changed file means a different training."""
    name = config.student.method
    if name is None:
        return {}
    return {"method": sha256_of(Path(sys.modules[own_method(name).__module__].__file__ or ""))}


def report_rows() -> Iterator[Callable[[Path, Mapping[str, Mapping[str, Any]]], list[Row]]]:
    """Yield the functions that return methods' rows in the report: run folder and results -> rows."""
    for entry in METHODS.values():
        if entry.rows:
            yield _resolve(entry.rows)


def result_shapes() -> list[type[BaseModel]]:
    """Return the schemas of the methods' parts of a ``result.json``."""
    return [_resolve(entry.record) for entry in METHODS.values() if entry.record]


def phase_rules() -> list[Callable[[PhaseConfig, Sequence[TermConfig], Collection[str]], PhaseRule]]:
    """Return the functions with each method's phase rule; none of them imports PyTorch."""
    return [_resolve(entry.phases) for entry in METHODS.values() if entry.phases]


def config_faults(config: RunConfig) -> Iterator[str]:
    """Yield config faults for the requested methods, except a user's own; does not import PyTorch."""
    for entry in METHODS.values():
        if entry.faults and _is_set(config, entry.asked_by):
            yield from _resolve(entry.faults)(config)


def _is_set(config: RunConfig, key: str) -> bool:
    """Return whether a key, or any entry of a list, differs from its default."""
    return any(value != default for value, default in _values(config, key.split(".")))


def _values(section: Section, keys: list[str]) -> Iterator[tuple[Any, Any]]:
    name = keys[0].removesuffix("[]")
    value = getattr(section, name)
    if len(keys) == 1:
        yield value, type(section).model_fields[name].default
        return
    for inner in value if keys[0].endswith("[]") else (value,):
        yield from _values(inner, keys[1:])


def _resolve(place: str) -> Any:
    """Return the object that a row of the table names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _entry_point(name: str) -> Any:
    known = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
    if name not in known:
        raise ImportError(
            f"no installed package has an entry point {name!r} in group {GROUP}"
            f"{'; there are ' + ', '.join(sorted(known)) if known else ''}; "
            f"or name a class: path/to/file.py:Class or package.module:Class"
        )
    return known[name].load()
