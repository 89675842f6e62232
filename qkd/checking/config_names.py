"""Check that the names in a config are known, and that its loss terms and phases can be built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from qkd.checking.names import table
from qkd.config import AgentConfig, PhaseConfig, RunConfig, Section, TermConfig
from qkd.config.bind_faults import Fault, describe, did_you_mean, models_in
from qkd.config.binding import bind_section
from qkd.foreign.user_code import place_fault
from qkd.methods.phase_checks import phase_faults, set_keys
from qkd.methods.table import config_faults, faults_of, own_method
from qkd.nets import net_hint
from qkd.nets.own.spelling import NetSpelling, parse_net
from qkd.terms.term_checks import check_terms, use_faults

Place: TypeAlias = tuple[str | int, ...]


def name_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each unknown name in raw config data, and for loss terms that cannot be built.

    Args:
        data: Nested mappings and lists; the schema reports missing values and wrong types.

    Yields:
        A place in the config and what is wrong there.
    """
    yield from _unknown(data, ("data", "name"), "data set", "datasets")
    for where, schema in sections(data):
        fields = schema.model_fields
        if "net" in fields:
            yield from _unknown(data, (*where, "net"), "net", "nets")
        if schema is AgentConfig:
            yield from _unknown(data, (*where, "policy"), "agent policy", "policies")
        for key in fields:
            if TermConfig in models_in(fields[key].annotation):
                yield from _term_faults(data, (*where, key))
        if "phases" in fields and "terms" in fields:
            yield from _phase_faults(data, where, schema)
    yield from _method_faults(data)


def term_use_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield what in the loss terms of a new config has no effect, or cannot be computed; older runs may have such keys.

    Args:
        data: Nested mappings and lists; faults of the schema and unknown names are reported elsewhere.

    Yields:
        A place in the config and what is wrong there.
    """
    try:
        config = bind_section(RunConfig, data)
    except (ValidationError, TypeError, ValueError, RecursionError):
        return
    mixes = bool(config.student_agent.cutmix_probability)
    for where, schema in sections(data):
        lists = [key for key, field in schema.model_fields.items() if TermConfig in models_in(field.annotation)]
        found = [((*where, key, index), term) for key in lists for index, term in _terms_of(data, (*where, key))]
        for place, term in found:
            for line in use_faults(term, "", config.data.batch_size, mixes=mixes):
                path, _, what = line.partition(": ")
                yield (*place, *path.split(".")[1:]), what


def _terms_of(data: Mapping[str, Any], where: Place) -> Iterator[tuple[int, TermConfig]]:
    """Yield the index and the term of each valid one in a list of raw config data."""
    raw = _get(data, where)
    for place, term in enumerate(raw if isinstance(raw, list) else []):
        try:
            yield place, TermConfig.model_validate(term)
        except ValidationError:
            continue  # the schema says what is wrong with this one


def sections(data: Any, schema: type[Section] = RunConfig, where: Place = ()) -> Iterator[tuple[Place, type[Section]]]:
    """Yield the place of each section that raw config data holds, with its schema, outer ones first.

    Args:
        data: Nested mappings and lists; the schema reports anything that is not a group of keys.
        schema: Of the outermost.
        where: Its place.
    """
    if not isinstance(data, Mapping):
        return
    yield where, schema
    for key, field in schema.model_fields.items():
        inner = [model for model in models_in(field.annotation) if issubclass(model, Section)]
        value = data.get(key)
        items = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, item in items if inner else ():
            yield from sections(item, inner[0], (*where, key) if index is None else (*where, key, index))


def _method_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield what methods find wrong with a config that can be bound, and what is wrong with one of the user's."""
    where, name, kind = ("student", "method"), _get(data, ("student", "method")), None
    if isinstance(name, str):
        try:
            kind = own_method(name)  # a user's file, which may import anything
        except ValueError as error:
            yield where, str(error).removeprefix("student.method: ")
            return
    try:
        config = bind_section(RunConfig, data)
    except ValidationError:
        return  # the schema says what is wrong
    yield from (_placed(line, ("student",)) for line in config_faults(config))
    if kind is None:
        return
    if not kind.reads_images and config.bench.int8_baseline:
        yield (
            ("bench", "int8_baseline"),
            f"true calibrates on training images, which method {name} does not read (reads_images); use false",
        )
    try:
        yield from (_placed(line, where) for line in faults_of(kind(config)))
    except ValueError as error:  # what a class says about its options
        yield ("student", "method_options"), str(error)
    except Exception as error:
        yield where, f"{name} fails to look at the config: {type(error).__name__}: {error}"


def _placed(line: str, otherwise: Place) -> Fault:
    """Return a fault at the key that its line begins with."""
    key, colon, what = line.partition(": ")
    return (tuple(key.split(".")), what) if colon and " " not in key else (otherwise, line)


def _unknown(data: Mapping[str, Any], where: tuple[str | int, ...], kind: str, table_name: str) -> Iterator[Fault]:
    name = _get(data, where)
    if table_name == "nets" and isinstance(name, str):
        net = parsed(name)
        if isinstance(net, str) or net.is_own:
            fault = net if isinstance(net, str) else place_fault(net.name)
            if fault:
                yield where, fault
            return
        name = net.name
    if isinstance(name, str) and name not in (known := table(table_name)):
        hint = _net_hint(name, known) if table_name == "nets" else did_you_mean(name, known)
        hint = f"`qkd ls {table_name}` lists them" if hint.startswith("known: ") and len(known) > 20 else hint
        yield where, f"unknown {kind} {describe(name)}; {hint}"


def parsed(name: str) -> NetSpelling | str:
    """Return the net that a text names, or what is wrong with it."""
    try:
        return parse_net(name)
    except ValueError as error:
        return str(error)


def _net_hint(name: str, known: Mapping[str, str]) -> str:
    return net_hint(name, list(known)) or did_you_mean(name, known)


def _term_faults(data: Mapping[str, Any], where: tuple[str | int, ...]) -> Iterator[Fault]:
    raw = _get(data, where)
    if not isinstance(raw, list):
        return
    found = list(_terms_of(data, where))
    places, terms = [place for place, _ in found], [term for _, term in found]
    if not terms:
        return
    for line in check_terms(terms, "terms"):
        path, _, what = line.partition(": ")
        keys = [int(key) if key.isdecimal() else key for key in path.replace("[", ".").replace("]", "").split(".")[1:]]
        if keys:
            yield (*where, places[int(keys[0])], *keys[1:]), what
        elif len(terms) == len(raw):  # of the list as a whole
            yield where, what


def _phase_faults(data: Mapping[str, Any], where: Place, schema: type[Section]) -> Iterator[Fault]:
    """Yield what is wrong with the phases of a distilled net, or with its default phase."""
    section = _get(data, where)
    raw, terms = section.get("phases"), section.get("terms")
    try:
        phases = [PhaseConfig.model_validate(phase) for phase in raw or [{"epochs": 1}]]
        own = schema.model_fields["terms"].default
        own = own if terms is None else TypeAdapter(tuple[TermConfig, ...]).validate_python(terms)
    except (ValidationError, TypeError):
        return  # the schema says what is wrong
    for index, key, what in phase_faults(own, phases, keys=set_keys(section)):
        yield ((*where, "phases", index, key) if raw else (*where, "terms")), what


def _get(data: Any, where: tuple[str | int, ...]) -> Any:
    for key in where:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):  # not there, or no group or list: the schema says so
            return None
    return data
