"""The identity of a run: the settings that its trainings depend on. Changing any other redoes the later stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from qkd.config.training import SAVING
from qkd.nets.own.copies import same_net

# where it runs, how fast, how it is saved, and where its images are (their identity is in data.json)
FREE = {
    "name", "device", "threads",
    "data.path", "data.root", "data.download", "data.workers", "data.eval_batch_size",
    "log.csv", "log.tensorboard",
    "search.engine", "search.workers", "search.gpus_per_worker", "search.address", "search.worker_failures",
    "federated.engine", "federated.workers",
}  # fmt: skip
CHOSEN = {"precision", "memory_format"}  # auto: whatever was chosen when a training began, as its checkpoints record
BEHIND = ("export", "bench")  # stages after the trainings, each with a section of that name


def leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """Yield the dotted path and value of every leaf of nested groups and lists."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that identify a run: dotted key -> plain value.

    Args:
        values: A config as plain data.
    """
    return {key: value for key, value in leaves(dict(values)) if not _is_free(key)}


def different_settings(one: BaseModel, other: BaseModel) -> Mapping[str, tuple[str, str]]:
    """Return the settings that make two configs different runs, each with both values as text.

    A net that was copied into a run folder is the same as the file that it was copied from.

    Args:
        one: The config of a run.
        other: Likewise.
    """
    then, now = (identity(config.model_dump(mode="json", warnings=False)) for config in (one, other))
    nets = [key for key in then if key.endswith(".net") and same_net(str(then[key]), str(now.get(key)))]
    for values in (then, now):
        for key in nets:
            values.pop(key, None)
    return differences(then, now)


def stage_settings(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a stage's files depend on: the run's identity, and its own section if it has one.

    Args:
        stage: Its name.
        values: A config as plain data.

    Returns:
        Nested, as in the config.
    """
    own = {stage: values[stage]} if stage in BEHIND and stage in values else {}
    return {**_pruned(values, ""), **own}


def changes(then: Any, now: Any, where: str = "") -> dict[str, tuple[str, str]]:
    """Return the values that have changed, as a message shows them; keys that only one side has are ignored.

    So a version that adds a key accepts what an older one made. Lists are compared as a whole.

    Args:
        then: Plain data.
        now: Likewise.
        where: Dotted path of both.
    """
    if isinstance(then, dict) and isinstance(now, dict):
        parts = [changes(then[key], now[key], f"{where}.{key}".lstrip(".")) for key in then if key in now]
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        parts = [changes(*pair, f"{where}[{index}]") for index, pair in enumerate(zip(then, now, strict=True))]
    else:
        return {} if then == now or takes_what_was_chosen(where, now) else {where: (repr(then), repr(now))}
    return {key: pair for part in parts for key, pair in part.items()}


def takes_what_was_chosen(key: str, now: Any) -> bool:
    """Return whether a setting accepts whatever a run began with: an arithmetic that is left to `auto`.

    Args:
        key: Dotted.
        now: Its value in the config that is to continue the run.
    """
    return now == "auto" and key.rpartition(".")[2] in CHOSEN


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return, for each key that differs, both values as a message shows them.

    Args:
        old: Dotted key -> plain value.
        new: Likewise.
    """
    missing = object()
    pairs = {key: (old.get(key, missing), new.get(key, missing)) for key in sorted(old.keys() | new.keys())}
    return {
        key: (_text(before, missing), _text(after, missing))
        for key, (before, after) in pairs.items()
        if before != after and not takes_what_was_chosen(key, after)
    }


def _text(value: Any, missing: object) -> str:
    return "absent" if value is missing else repr(value)


def _pruned(value: Mapping[str, Any], where: str) -> dict[str, Any]:
    places = {key: f"{where}.{key}".lstrip(".") for key in value}
    return {
        key: _pruned(inner, places[key]) if isinstance(inner, dict) else inner
        for key, inner in value.items()
        if not _is_free(places[key])
    }


def _is_free(key: str) -> bool:
    first, last = key.partition(".")[0], key.rpartition(".")[2]
    return key in FREE or first in BEHIND or last in SAVING
