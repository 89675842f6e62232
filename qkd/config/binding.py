"""Bind a YAML file and ``key.path=value`` overrides to a :class:`~qkd.config.RunConfig`, all faults at once."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from qkd.config.bind_faults import Fault, describe, place, plain_faults, schema_faults
from qkd.config.borrowed import borrowed_run, form_faults, has_config, with_borrowed_teacher
from qkd.config.conflicts import idle_faults
from qkd.config.data import DataConfig
from qkd.config.experiment import RunConfig
from qkd.config.filling import filled
from qkd.config.recipes.table import without_recipe
from qkd.failures import MOST_FAULTS, first_of
from qkd.failures import ConfigError as ConfigError
from qkd.files.user_paths import user_path
from qkd.files.yaml_text import DEEPEST, YamlError, parse_yaml, read_yaml
from qkd.foreign import nearest
from qkd.foreign.shown import shown_line
from qkd.moved import in_new_spelling
from qkd.nets.own.copies import resolved_nets

Bound = TypeVar("Bound", bound=BaseModel)
MOST_NAMED = 6  # shipped configs in a message
OF_RECIPES = ("student.recipe", "student.quant")  # keys on which it depends what a recipe sets
Check: TypeAlias = Callable[[Mapping[str, Any]], Iterable[Fault]]
"""A further check of the raw data; yields a :data:`~qkd.config.bind_faults.Fault` for each problem."""
Checks: TypeAlias = Iterable[Check]


def shipped_folder() -> Path:
    """Return the folder of the shipped configs: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configs by name, e.g. ``digits/w2a2``, in alphabetical order.

    Each is in the folder of its data set; ``devices.yaml`` next to these folders is not an experiment.
    """
    folder = shipped_folder()
    files = sorted(path for path in folder.rglob("*.yaml") if path.parent != folder)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def find_config(name: str) -> Path:
    """Return the config file that a name refers to: a path, or the name of a shipped config.

    Args:
        name: ``my/experiment.yaml``, ``digits/w2a2`` or ``configs/digits/w2a2.yaml`` (the last two from any folder).

    Raises:
        ConfigError: If there is no such file; near matches among the shipped configs are named.
    """
    path, is_folder = Path(name), os.path.isdir(name)
    if os.path.exists(name) and not is_folder:
        return path
    shipped = shipped_configs()
    short = os.path.splitext(name)[0].removeprefix("./").removeprefix("configs/")
    if not path.is_absolute() and short in shipped:
        return shipped[short]
    what = "is a folder, not a config file" if is_folder else "no such config file"
    if is_folder and (path / "config.yaml").is_file():
        inside = shown_line(str(path / "config.yaml"))
        raise ConfigError([f"{shown_line(name)}: {what}; did you mean the config in it, `{inside}`?"])
    if path.name and not path.suffix and path.with_suffix(".yaml").is_file():
        raise ConfigError([f"{shown_line(name)}: {what}; did you mean `{shown_line(name)}.yaml`?"])
    below = (key for key in shipped if key.startswith(f"{short}/"))
    near = sorted(below, key=lambda key: (key.count("/"), key)) or _near(short, shipped)
    named = " or ".join(f"`{key}`" for key in near[:MOST_NAMED])
    lists = "`qkd ls configs` lists the shipped ones"
    hint = f"did you mean {named}?" if near else lists
    hint += f" ({lists})" if len(near) > MOST_NAMED else ""
    hint += "; `qkd init FOLDER` writes one for a folder of images" if is_folder else ""
    raise ConfigError([f"{shown_line(name)}: {what}; {hint}"])


def read_config(path: Path) -> dict[str, Any]:
    """Return the raw content of a config file.

    Raises:
        ConfigError: If it cannot be read, is not YAML, repeats a key or is not a group of keys.
    """
    try:
        data: Any = read_yaml(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from error
    except YamlError as error:
        raise ConfigError([f"{path}: {fault}" for fault in error.faults]) from error
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds {describe(data)}"
        raise ConfigError([f"{path}: {found}; a config is a group of keys such as `name: my-run`"])
    return data


def bind(data: Mapping[str, Any], *, checks: Checks = (), new: Checks = (), is_stored: bool = False) -> RunConfig:
    """Return the typed config of raw data.

    Args:
        data: Nested mappings and lists, as YAML gives them.
        checks: Further checks of the raw data; their faults are reported with those of the schema.
        new: Further ones, of new configs only: older versions accepted what they refuse.
        is_stored: Whether it is a run's own config, which has every key.

    Raises:
        ConfigError: With every fault: unknown, missing, ill-typed or bad keys, each with its path.
    """
    faults: list[Fault] = []
    config: RunConfig | None = None
    data = filled(data, is_stored=is_stored)
    try:
        data = in_new_spelling(data)
        config = bind_section(RunConfig, data)
    except ValidationError as error:
        faults += schema_faults(error, data, RunConfig)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError([f"config: holds a value that is not plain data: {error}"]) from error
    if config is not None and not is_stored:
        faults += idle_faults(config)
    faults += plain_faults(data)
    if len(faults) <= MOST_FAULTS:  # otherwise, fix these before looking for files
        due = [*checks, *(() if is_stored else new)]
        faults += [fault for check in due for fault in check(data)]
    if faults or config is None:
        lines = dict.fromkeys(f"{place('config', where)}: {what}" for where, what in faults)
        raise ConfigError(first_of(list(lines)))
    return config


def bind_section(schema: type[Bound], data: Mapping[str, Any]) -> Bound:
    """Return the typed section of raw data.

    JSON mode is strict about types (a quoted "3" is not a number) yet takes lists and text for tuples and paths.

    Raises:
        pydantic.ValidationError: If it does not fit the schema.
        TypeError, ValueError: If a value cannot be written as JSON.
    """
    return schema.model_validate_json(json.dumps(data), strict=True)


def bind_argument(schema: type[Bound], data: Mapping[str, Any], name: str) -> Bound:
    """Return the typed section that a function was given as an argument.

    Args:
        schema: The section.
        data: Its keys.
        name: Of the argument, for messages.

    Raises:
        ConfigError: With every fault, each with its path, as in a config.
        TypeError: If a value is not plain data.
    """
    try:
        return bind_section(schema, data)
    except ValidationError as error:
        lines = dict.fromkeys(f"{place(name, where)}: {what}" for where, what in schema_faults(error, data, schema))
        raise ConfigError(first_of(list(lines))) from None


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return ``data`` with overrides set; ``data`` is not changed.

    Args:
        data: Raw content of a config.
        overrides: ``key.path=value``; the value is YAML, and a number in the path is a list index.

    Raises:
        ConfigError: For every override that is not of this form or whose path leads nowhere.
    """
    result = copy.deepcopy(dict(data))
    faults = []
    for text in overrides:
        key, equals, value = text.partition("=")
        try:
            if not equals or not all(key.split(".")) or key.count(".") >= DEEPEST:
                raise ValueError("must be key.path=value, e.g. student.train.epochs=3")
            [(key, parsed)] = in_new_spelling({key: parse_yaml(value)}).items()
            _set(result, key.split("."), parsed)
        except ValueError as error:
            faults.append(f"override `{shown_line(text, 80)}`: {error}")
    if faults:
        raise ConfigError(first_of(faults))
    return result


def load_config(name: str | Path, overrides: Iterable[str] = (), *, checks: Checks = (), new: Checks = ()) -> RunConfig:
    """Return the config of a file with overrides.

    Args:
        name: A path, or the name of a shipped config such as ``digits/w2a2``. Net files in it are looked
            for next to it (those in overrides: in the current folder). Without ``name``, the run is named after it.
        overrides: ``key.path=value`` texts.
        checks: Passed on to :func:`bind`.
        new: Likewise.

    Raises:
        ConfigError: With every fault that was found.
    """
    path, overrides = find_config(str(name)), list(overrides)
    data = resolved_nets(in_new_spelling(read_config(path)), path.parent)
    is_stored = _is_of_a_run(path)
    if is_stored and any(text.startswith(OF_RECIPES) for text in overrides) and isinstance(data.get("student"), dict):
        data, is_stored = {**data, "student": without_recipe(data["student"])}, False
    data = {"name": name_of(path), **apply_overrides(data, overrides)}
    overridden = [text.partition("=")[0] for text in overrides]
    whole = _with_teacher(resolved_nets(data, Path()), shown_line(str(path)), overridden)
    config = bind(whole, checks=checks, new=new, is_stored=is_stored)
    _require_same_form(config)
    return config


def name_of(path: Path) -> str:
    """Return the name of a run whose config has none, from the file's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-") or "run"


def _with_teacher(data: dict[str, Any], file: str, overridden: Sequence[str]) -> dict[str, Any]:
    """Return raw data with the settings of another run's teacher (``teacher.run``) filled in."""
    run = borrowed_run(data)
    if run is None:
        return data
    if has_config(run):
        folder = user_path(run)
        theirs = in_new_spelling(read_config(folder / "config.yaml"), is_stored=True)
        return with_borrowed_teacher(data, resolved_nets(theirs, folder), file=file, overridden=overridden)
    if "net" in data["teacher"]:  # as in a run folder, where they are already filled in
        return data
    raise ConfigError([f"config.teacher.run: {shown_line(run)} is not a run folder: it has no config.yaml"])


def _is_of_a_run(path: Path) -> bool:
    """Return whether a config is one that a run stores, beside what it was started with."""
    try:
        beside = json.loads((path.parent / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return path.name == "config.yaml" and isinstance(beside, dict) and "packages" in beside


def _require_same_form(config: RunConfig) -> None:
    """Raise unless the teacher of another run (``teacher.run``) has learned from images of this config's form."""
    run = config.teacher.run
    if run is None or not has_config(str(run)):
        return
    theirs = in_new_spelling(read_config(user_path(run) / "config.yaml"), is_stored=True).get("data")
    try:
        there = DataConfig.model_validate(theirs)
    except ValidationError:  # of another version: the stage that copies the teacher says what is wrong
        return
    if faults := form_faults(config.data, there, shown_line(str(run))):
        raise ConfigError(faults)


def config_text(config: BaseModel) -> str:
    """Return a bound config as YAML, every key with its value; binding it again gives an equal config."""
    return plain_text(config.model_dump(mode="json"))


def plain_text(values: Mapping[str, Any]) -> str:
    """Return plain data as YAML, its keys in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _near(name: str, shipped: Iterable[str]) -> list[str]:
    names = list(shipped)
    by_stem = [key for key in names if key.rpartition("/")[2] == name.rpartition("/")[2]]
    return nearest(name, names, most=3) or by_stem[:3]


def _set(data: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set ``data[keys[0]][keys[1]]... = value``, creating groups of keys along the way."""
    at: Any = data
    for depth, key in enumerate(keys):
        here = ".".join(keys[:depth]) or "config"
        last = depth == len(keys) - 1
        if isinstance(at, list):
            at = _descend_list(at, key, here, last=last, value=value)
        elif isinstance(at, dict):
            if last:
                at[key] = value
            elif at.get(key) is None:
                if keys[depth + 1].isdecimal():
                    raise ValueError(f"`{'.'.join(keys[: depth + 1])}` is not in the file; give the whole list")
                at[key] = {}
            at = at[key]
        else:
            raise ValueError(f"`{here}` is {describe(at)}, which has no keys")


def _descend_list(items: list[Any], key: str, here: str, *, last: bool, value: Any) -> Any:
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(items):
        raise ValueError(
            f"`{here}` is a list of {len(items)}; `{shown_line(key, 40)}` is not an index from 0 to {len(items) - 1}"
        )
    if last:
        items[int(key)] = value
    return items[int(key)]
