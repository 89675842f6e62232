"""Fill in what a short config leaves out because its other keys determine it: a training, its length, a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qkd.config.recipes.table import with_recipe
from qkd.failures import ConfigError

# Same as in quantizers.spec, which needs PyTorch to import; a test keeps them equal.
PRESETS: Mapping[str, Mapping[str, int]] = {
    "fast": {"weight_bits": 2, "act_bits": 2, "first_bits": 8, "last_bits": 8, "sum_bits": 8},
}
TUNING_LR = 0.01  # training from trained weights: a tenth of the rate from random ones


def filled(data: Mapping[str, Any], *, is_stored: bool = False) -> dict[str, Any]:
    """Return raw config data with these keys filled in; the schema reports values of the wrong type.

    Args:
        data: Nested mappings and lists.
        is_stored: Whether it is a run's own config, which has every key: what a recipe sets today, and did not when the
            run began, is not its.

    Raises:
        ConfigError: If a width is given that differs from the preset's.

    Example:
        >>> filled({"teacher": {"net": "resnet20"}})["teacher"]
        {'net': 'resnet20', 'train': {}}
    """
    result = _without_teacher(data)
    if isinstance(teacher := result.get("teacher"), Mapping):
        result["teacher"] = _trained(teacher)
    if isinstance(student := result.get("student"), Mapping):
        student = _with_presets(_long_enough(student))
        result["student"] = student if is_stored else with_recipe(student)
    if isinstance(section := result.get("data"), Mapping) and isinstance(teacher, Mapping):
        result["data"] = _of_the_net(section, teacher.get("net"))
    return result


def _without_teacher(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data; for a federated run, with an untrained teacher of the student's net.

    Raises:
        ConfigError: If no net is named.
    """
    student = data.get("student")
    if not data.get("federated") or "teacher" in data or not isinstance(student, Mapping):
        return dict(data)
    if not student.get("net"):
        raise ConfigError(["config.student.net: missing; a federated run has no teacher to take the net from"])
    options = {key: student[key] for key in ("net", "net_options") if key in student}
    return {**data, "teacher": {**options, "untrained": True}}


def _trained(teacher: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the training if nothing else gives the teacher its weights, with a lower rate for fine-tuning.

    A teacher from another run or an untrained one has no training, nor does one whose weights are used unchanged.
    """
    is_settled = any(teacher.get(key) for key in ("train", "untrained", "run")) or teacher.get("train") == {}
    if is_settled:
        return teacher
    if teacher.get("weights") is None:
        return {**teacher, "train": {}}
    return {**teacher, "train": {"lr": TUNING_LR}} if teacher.get("head", "keep") != "keep" else teacher


def _long_enough(student: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the number of epochs from those of the phases."""
    phases, train = student.get("phases"), student.get("train", {})
    if not isinstance(phases, list) or not phases or not isinstance(train, Mapping) or "epochs" in train:
        return student
    lengths = [phase.get("epochs") if isinstance(phase, Mapping) else None for phase in phases]
    numbers = [length for length in lengths if type(length) is int]
    return {**student, "train": {**train, "epochs": sum(numbers)}} if len(numbers) == len(lengths) else student


def _with_presets(student: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fill in the widths of ``quant.preset`` for the student and for other nets in its training."""
    result = dict(student)
    if "quant" in student:
        result["quant"] = _with_preset(student["quant"], "config.student.quant")
    for key, section in student.items():  # other low-bit nets in the student's training
        if isinstance(section, Mapping) and "quant" in section:
            quant = _with_preset(section["quant"], f"config.student.{key}.quant")
            result[key] = {**section, "quant": quant}
    return result


def _with_preset(quant: Any, where: str) -> Any:
    widths = PRESETS.get(str(quant.get("preset"))) if isinstance(quant, Mapping) else None
    if widths is None:
        return quant
    faults = [
        f"{where}.{key}: got {quant[key]!r}, but preset {quant['preset']} has {bits}; leave one of them out"
        for key, bits in widths.items()
        if key in quant and quant[key] != bits
    ]
    if faults:
        raise ConfigError(faults)
    return {**widths, **quant}


def _of_the_net(section: Mapping[str, Any], net: object) -> Mapping[str, Any]:
    """Resolve `preprocess: torchvision` to the teacher's net, if that is torchvision's."""
    is_open = section.get("preprocess") == "torchvision" and isinstance(net, str) and net.startswith("torchvision/")
    return {**section, "preprocess": net} if is_open else section
