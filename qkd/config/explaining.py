"""Every key of a config with its default and meaning, from the schema; and the schema as JSON Schema for editors."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qkd.config.bind_faults import did_you_mean, models_in
from qkd.config.experiment import RunConfig
from qkd.config.recipes.table import recipe_lines
from qkd.failures import UsageError

SCHEMA = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Key:
    """A key of a config.

    Args:
        path: Dotted; ``[]`` follows the key of a list.
        default: As in YAML; empty if it must be given, ``...`` for a group.
        about: What it means.
        is_group: Whether it has keys below it.
    """

    path: str
    default: str
    about: str
    is_group: bool = False


@dataclass(frozen=True)
class Explained:
    """What `qkd show --explain` prints."""

    keys: tuple[Key, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the keys as plain data."""
        return [{"key": key.path, "default": key.default, "about": key.about} for key in self.keys]

    def to_text(self) -> str:
        """Return one line per key, followed by its meaning."""
        lines = []
        for key in self.keys:
            head = key.path + (":" if key.is_group else f" = {key.default}" if key.default else " (required)")
            lines.append(f"{head}\n    {key.about}" if key.about else head)
        return "\n".join(lines)


def explained(where: str = "") -> Explained:
    """Return the keys of a config, or of a part of it.

    Args:
        where: Dotted, e.g. ``student.train`` or ``data.resize``; empty: all.

    Raises:
        UsageError: If there is no such key.
    """
    keys = tuple(_keys(RunConfig, ""))
    wanted = where.replace("[]", "")
    found = [key for key in keys if not wanted or f"{key.path.replace('[]', '')}.".startswith(f"{wanted}.")]
    if not found:
        places = [key.path.replace("[]", "") for key in keys]
        by_name = [place for place in places if place.rpartition(".")[2] == wanted]
        hint = f"did you mean `{'` or `'.join(by_name[:4])}`?" if by_name else did_you_mean(wanted, places)
        raise UsageError(
            f"--explain {where}: no such key; {hint if len(hint) < 400 else '`qkd show --explain` lists all keys'}"
        )
    return Explained(tuple(found))


def json_schema() -> dict[str, Any]:
    """Return the schema of config files as JSON Schema: editors complete keys and mark faults with it.

    What the toolkit fills in (``name``, the net of a teacher with ``run``) is not required.
    """
    schema = RunConfig.model_json_schema()
    schema["required"] = [name for name in schema["required"] if name != "name"]
    teacher = schema["$defs"]["TeacherConfig"]
    teacher["required"] = [name for name in teacher.get("required", []) if name != "net"]
    return {"$schema": SCHEMA, **schema}


def _keys(section: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        models = models_in(field.annotation)
        path = f"{prefix}{name}{_inner_mark(field.annotation) if models else ''}"
        inner = models[0] if models else None
        about = _about(path, field.description) or (_first_line(inner) if inner is not None else "")
        yield Key(path, "..." if inner is not None else _default(field), about, is_group=inner is not None)
        if inner is not None:
            yield from _keys(inner, f"{path}.")


def _about(path: str, description: str | None) -> str:
    """Return what a key means; for the recipe, also what it sets."""
    said = description or ""
    return "\n    ".join([said, *recipe_lines()]) if path == "student.recipe" else said


def _inner_mark(annotation: Any) -> str:
    """Return the placeholder for a list index, or for a user-defined name, in the path of a group."""
    if typing.get_origin(annotation) is tuple:
        return "[]"
    return (
        ".<name>" if any(typing.get_origin(one) is dict for one in (annotation, *typing.get_args(annotation))) else ""
    )


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if not field.is_required() else PydanticUndefined
    if value is PydanticUndefined:
        return ""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return "{}" if value == {} else str(value)


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]
