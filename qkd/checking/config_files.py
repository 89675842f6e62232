"""Check that the files (and the one optional package) that a config needs exist, before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from export.extras import QONNX, TENSORBOARD
from export.targets import TARGETS
from qkd.config.bind_faults import Fault
from qkd.config.borrowed import borrowed_run
from qkd.files.user_paths import looked_in, user_path
from qkd.run.folder import manifest_of

CONTENT = {"npz": "train.npz and test.npz", "folder": "train/<class>/ and test/<class>/"}  # data set -> what path holds


def file_faults(data: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each file or folder in raw config data that is missing, and for each fault of a schedule.

    A flavor whose executor is not installed is also a fault: it would only show up after the training.

    The contents of data and weight files are checked when they are loaded (``--dry-run``).

    Args:
        data: Nested mappings and lists; the schema reports missing values and wrong types.

    Yields:
        A place in the config and what is wrong there.

    Raises:
        OSError: If an existing file cannot be read.
    """
    yield from _data_faults(_group(data, "data"))
    yield from _device_faults(_group(data, "bench"))
    run = borrowed_run(data)
    if run is not None and not manifest_of(user_path(run), "teacher").is_file():
        yield ("teacher", "run"), f"{run} has no complete teacher: run `qkd teacher` with its config first"
    for role in ("teacher", "student"):
        weights = _group(data, role).get("weights")
        if isinstance(weights, str) and weights != "imagenet" and not user_path(weights).is_file():
            yield (role, "weights"), f"no such file: {weights}{looked_in(weights)}"
        agent = _group(_group(data, role), "agent")
        if agent.get("policy") == "file" and isinstance(agent.get("schedule"), str):
            yield from (
                ((role, "agent", "schedule"), fault) for fault in _schedule_faults(user_path(agent["schedule"]))
            )
    if _group(data, "log").get("tensorboard") is True and find_spec("tensorboard") is None:
        yield ("log", "tensorboard"), f"TensorBoard is missing: {TENSORBOARD}"
    if find_spec("qonnx") is None:
        yield from _qonnx_faults(_group(data, "export"))


def _qonnx_faults(export: Mapping[str, Any]) -> Iterator[Fault]:
    target = TARGETS.get(str(export.get("target")))
    if export.get("flavor") == "qonnx":
        yield ("export", "flavor"), f"`qonnx` is proven with qonnx's executor, which is missing: {QONNX}"
    elif target is not None and target.flavor == "qonnx":
        yield ("export", "target"), f"`{target.name}` is proven with qonnx's executor, which is missing: {QONNX}"


def _device_faults(section: Mapping[str, Any]) -> Iterator[Fault]:
    from qkd.bench.device_file import resolve_devices
    from qkd.failures import ConfigError

    names, file = section.get("on", ["local"]), section.get("devices")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return  # the schema says so
    try:
        resolve_devices(names, user_path(file) if isinstance(file, str) else None)
    except ConfigError as error:
        yield from ((("bench", "on"), fault) for fault in error.faults)


def _data_faults(section: Mapping[str, Any]) -> Iterator[Fault]:
    name, path = section.get("name"), section.get("path")
    if not isinstance(name, str) or name not in CONTENT:
        return
    if path is None:
        yield ("data", "path"), f"missing; data set `{name}` needs a folder with {CONTENT[name]}"
    elif isinstance(path, str) and not user_path(path).is_dir():
        yield (
            ("data", "path"),
            f"no such folder: {path}{looked_in(path)}; data set `{name}` needs one with {CONTENT[name]}",
        )
    elif isinstance(path, str) and (fault := _content_fault(name, user_path(path))):
        yield ("data", "path"), fault


def _content_fault(name: str, folder: Path) -> str:
    """Return what keeps a folder from being a data set, as far as its entries tell; the files are not read."""
    from qkd.data import DataError
    from qkd.data.sets.arrays import ARCHIVES
    from qkd.data.sets.folder import is_hidden
    from qkd.data.sets.layout import layout_of

    try:
        if name == "npz":
            lacking = [file for file in ARCHIVES if not (folder / file).is_file()]
            return f"{folder} has no {' and no '.join(lacking)}; data set `npz` needs both" if lacking else ""
        train = layout_of(folder, is_hidden).train
        if not any(one.is_dir() and not is_hidden(one.name) for one in train.iterdir()):
            return f"{train} has no class folders; data set `folder` needs one with {CONTENT[name]}, or <class>/ alone"
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{folder}: cannot be read ({error.strerror or error})"
    return ""


def _schedule_faults(path: Path) -> list[str]:
    from qkd.agents.policies.schedule_file import ScheduleError, load_schedule

    try:
        load_schedule(path)
    except ScheduleError as error:
        return str(error).splitlines()
    return []


def _group(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key)
    return value if isinstance(value, Mapping) else {}
