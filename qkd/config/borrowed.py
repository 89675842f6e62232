"""Settings of a teacher borrowed from another run: read from that run's config, and not overridden here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qkd.config.data import DataConfig
from qkd.failures import ConfigError
from qkd.files.user_paths import user_path
from qkd.nets.own.copies import same_net

# what changes the images that a net gets, apart from augmentation; the resize rule is last
FORM = ("image_size", "channels", "mean", "std", "preprocess", "resize", "resize_size", "interpolation")


def borrowed_run(data: Mapping[str, Any]) -> str | None:
    """Return the run folder that ``teacher.run`` names in raw config data; or None."""
    teacher = data.get("teacher")
    name = teacher.get("run") if isinstance(teacher, Mapping) else None
    return name if isinstance(name, str) else None


def with_borrowed_teacher(
    data: Mapping[str, Any], theirs: Mapping[str, Any], *, file: str = "the config", overridden: Collection[str] = ()
) -> dict[str, Any]:
    """Return raw config data with the teacher's settings of the run that it names.

    Args:
        data: Raw data whose ``teacher.run`` names a run folder.
        theirs: The raw config of that run.
        file: What messages call the file of the data.
        overridden: Keys whose values come from the command line, not the file.

    Raises:
        ConfigError: With every setting given here that differs there.
    """
    own, taken = dict(data["teacher"]), theirs.get("teacher")
    if not isinstance(taken, Mapping):
        raise ConfigError([f"config.teacher.run: {own['run']}: its config has no teacher"])
    given = {key: value for key, value in own.items() if key != "run"}
    differing = list(_contradictions(given, taken, "teacher"))
    if differing:
        raise ConfigError([_fault(*one, run=str(own["run"]), file=file, overridden=overridden) for one in differing])
    return {**data, "teacher": {**given, **taken, "run": own["run"]}}


def form_faults(ours: DataConfig, theirs: DataConfig, run: str) -> list[str]:
    """Return the settings in which a run gives images another form than the run of its teacher did.

    Args:
        ours: The ``data`` section of a config with ``teacher.run``.
        theirs: That of the other run.
        run: The other run's folder.
    """
    keys = FORM if (ours.image_size, theirs.image_size) != (None, None) else FORM[: FORM.index("resize")]
    return [
        f"config.data.{key}: {json.dumps(here)}, but the teacher of {run} has learned from images with "
        f"{json.dumps(there)}; use that, or train a teacher without teacher.run"
        for key in keys
        if (here := getattr(ours, key)) != (there := getattr(theirs, key))
    ]


def has_config(name: str) -> bool:
    """Return whether a folder has a config, as run folders do."""
    return (user_path(name) / "config.yaml").is_file()


def _is_same(key: str, value: object, taken: object) -> bool:
    if not isinstance(value, str) or not isinstance(taken, str):
        return False
    return str(user_path(value)) == taken or (key == "net" and same_net(value, taken))


def _contradictions(
    given: Mapping[str, Any], taken: Mapping[str, Any], where: str
) -> Iterator[tuple[str, object, object]]:
    """Yield key, value here and value there of each setting that differs."""
    for key, value in given.items():
        if key not in taken:
            continue  # the schema reports it as unknown
        if isinstance(value, Mapping) and isinstance(taken[key], Mapping):
            yield from _contradictions(value, taken[key], f"{where}.{key}")
        elif value != taken[key] and not _is_same(key, value, taken[key]):
            yield f"{where}.{key}", value, taken[key]


def _fault(key: str, value: object, taken: object, *, run: str, file: str, overridden: Collection[str]) -> str:
    if any(f"{key}.".startswith(f"{one}.") for one in overridden):
        where, advice = "on the command line", "leave it out, or write"
    else:
        where, advice = f"in {file}", "remove it from the file, or add to the command"
    wanted = f"{key}={taken if isinstance(taken, str) else json.dumps(taken)}"
    return f"config.{key}: {value!r} {where}, but the teacher of {run} has {taken!r}; {advice} {shlex.quote(wanted)}"
