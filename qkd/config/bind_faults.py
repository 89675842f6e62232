"""Describe the faults that pydantic finds in a config: where, what was wrong, what was found, what to do."""

from __future__ import annotations

import functools
import itertools
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qkd.config.foreign import foreign_hint
from qkd.foreign import LONGEST_NAME, nearest
from qkd.foreign.shown import shown_line

Fault: TypeAlias = tuple[tuple[str | int, ...], str]
"""Where (keys and indices from the root) and what."""

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path (text)",
    "tuple": "a list",
    "list": "a list",
    "dict": "a group of keys",
    "model": "a group of keys",
    "finite": "a finite number",
}


_PATTERNS = {  # pattern of the schema -> its words
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "consist of letters a to z, digits, `.`, `_` and `-`, and begin with a letter or "
    "digit",
    r"^[A-Za-z0-9_-]{1,40}$": "consist of up to 40 letters a to z, digits, `_` and `-`",
    r"^(auto|cpu|cuda(:\d+)?)$": "be auto, cpu, cuda or cuda:N",
    r"^(keep|new(:[A-Za-z0-9_.]+)?)$": "be keep, new or new:LAYER",
    r"^torchvision(/[A-Za-z0-9_]+)?$": "be torchvision or torchvision/NET",
}
UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")  # in text of a config: no path or name has them
LONGEST_LIST = 1024  # entries of a list or keys of a group
MOST_WORDED = 200  # faults of one file that are worded; more than are listed


def place(root: str, where: Iterable[str | int]) -> str:
    """Return a place in a file as messages show it: dotted, on one line."""
    return ".".join([root, *(shown_line(str(key), LONGEST_NAME) for key in where)])


def plain_faults(data: object, where: tuple[str | int, ...] = ()) -> list[Fault]:
    """Return the faults of raw data that do not depend on its schema.

    These are control characters in text (keys or values), and lists that are too long.
    """
    if isinstance(data, str):
        found = UNSHOWN.search(data)
        return [(where, f"holds the control character {shown_line(found[0])}")] if found else []
    if isinstance(data, Mapping):
        pairs: Iterable[tuple[Any, Any]] = data.items()
        odd: list[Fault] = [
            ((*where, key), "is a key with control characters") for key in data if UNSHOWN.search(str(key))
        ]
    elif isinstance(data, list | tuple):
        pairs, odd = enumerate(data), []
    else:
        return []
    if len(data) > LONGEST_LIST:
        odd.append((where, f"has {len(data):,} entries; at most {LONGEST_LIST:,} are allowed"))
    shown = itertools.islice(pairs, LONGEST_LIST)
    return [*odd, *(fault for key, value in shown for fault in plain_faults(value, (*where, key)))]


def describe(value: object) -> str:
    """Return a found value as messages show it: text is quoted, groups and lists are described."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        names = ", ".join(shown_line(str(key), LONGEST_NAME) for key in itertools.islice(value, 4))
        return f"a group of keys ({names}{', ...' if len(value) > 4 else ''})"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean `x`?``, or the list of known names if none is close."""
    names = list(known)
    near = nearest(name, names)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"known: {', '.join(names)}" if names else "nothing is known here"


def schema_faults(error: ValidationError, data: Mapping[str, Any], schema: type[BaseModel]) -> list[Fault]:
    """Return the faults of a failed validation, in the order of the file's keys as far as pydantic keeps it.

    Args:
        error: What pydantic raised.
        data: The raw data it looked at.
        schema: The root model, for the keys that are known at each place.
    """
    faults: dict[tuple[str | int, ...], str] = {}
    found = error.errors(include_url=False)
    for detail in found[:MOST_WORDED]:
        where = tuple(detail["loc"])
        if where[-1:] == ("[key]",):  # pydantic's mark for a mapping's key
            expected = detail.get("ctx", {}).get("expected")
            wrong = f"unknown key; must be {expected}" if expected else f"a key {_word(detail, schema)}"
            faults.setdefault(where[:-1], wrong)
            continue
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # short of entries that are valid: those that are not have their own faults
        inside = _inside(where, data, is_missing=detail["type"] in ("missing", "extra_forbidden"))
        if inside != where:  # pydantic names the alternatives of a union in the path: one fault for all of them
            faults.setdefault(inside, f"must be a number, text, or true or false, got {describe(detail['input'])}")
        else:
            faults.setdefault(where, _word(detail, schema))
    unworded = [((*detail["loc"],), "wrong, like those before") for detail in found[MOST_WORDED:]]
    return [*faults.items(), *unworded]


def _inside(where: tuple[str | int, ...], data: Any, *, is_missing: bool) -> tuple[str | int, ...]:
    """Return the part of ``where`` that exists in the data (with the last key, if that is what is missing)."""
    for depth, key in enumerate(where):
        if is_missing and depth == len(where) - 1:
            return where
        if isinstance(data, Mapping) and key in data:
            data = data[str(key)]
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            return where[:depth]
    return where


def _word(detail: ErrorDetails, schema: type[BaseModel]) -> str:
    kind, found = detail["type"], describe(detail["input"])
    context: dict[str, Any] = detail.get("ctx", {})
    if kind == "missing":
        is_entry = detail["loc"] and isinstance(detail["loc"][-1], int)
        return "missing: the list is too short" if is_entry else "missing, and it has no default"
    if kind == "extra_forbidden":
        return _unknown_key(tuple(detail["loc"]), schema)
    if kind == "literal_error":
        return f"must be {context['expected']}, got {found}"
    if kind == "value_error":
        return str(context.get("error", detail["msg"]))
    if kind == "string_pattern_mismatch":
        return f"must {_PATTERNS.get(context['pattern'], 'match ' + context['pattern'])}, got {found}"
    bound = _bound(kind, context)
    if bound is not None:
        return f"must be {bound}, got {found}"
    expected = _TYPES.get(kind.split("_")[0])
    return f"must be {expected}, got {found}" if expected else f"{detail['msg']}, got {found}"


def _bound(kind: str, context: Mapping[str, Any]) -> str | None:
    if kind == "greater_than":
        return "positive" if context["gt"] == 0 else f"greater than {context['gt']:g}"
    if kind == "greater_than_equal":
        return "zero or positive" if context["ge"] == 0 else f"at least {context['ge']:g}"
    if kind == "less_than":
        return f"less than {context['lt']:g}"
    if kind == "multiple_of":
        return f"a multiple of {context['multiple_of']:g}"
    if kind in ("too_short", "too_long"):
        word, count = ("least", context["min_length"]) if kind == "too_short" else ("most", context["max_length"])
        return f"a list of at {word} {count:,}"
    if kind == "string_too_long":
        return f"at most {context['max_length']:,} characters long"
    if kind == "less_than_equal":
        return f"at most {context['le']:g}"
    return None


def _unknown_key(where: tuple[str | int, ...], schema: type[BaseModel]) -> str:
    key = str(where[-1])
    if hint := foreign_hint(key):
        return f"unknown key; {hint}"
    known = list(_section(where[:-1], schema).model_fields)
    near = nearest(key, known)
    homes = [path for path in _known_paths(schema) if path.rpartition(".")[2] == key]
    if homes:  # the same name in another place is likelier than a similar one here
        return f"unknown key here; did you mean `{'` or `'.join(homes)}`?"
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    return f"unknown key; known here: {', '.join(known)}"


def _section(where: tuple[str | int, ...], schema: type[BaseModel]) -> type[BaseModel]:
    for key in where:
        if isinstance(key, str) and key in schema.model_fields:
            schema = next(iter(models_in(schema.model_fields[key].annotation)), schema)
    return schema


@functools.cache
def _known_paths(schema: type[BaseModel]) -> tuple[str, ...]:
    return tuple(_all_paths(schema))


def _all_paths(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted path of every key of groups (items of lists are left out: their index is not known)."""
    paths = []
    for name, field in schema.model_fields.items():
        paths.append(prefix + name)
        if typing.get_origin(field.annotation) is not tuple:
            for model in models_in(field.annotation):
                paths += _all_paths(model, f"{prefix}{name}.")
    return paths


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the groups of keys in an annotation: ``tuple[TermConfig, ...] | None`` holds ``TermConfig``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]
