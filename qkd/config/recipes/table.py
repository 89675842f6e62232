"""What a recipe sets: student keys by bit width, each with its source; a key that is given is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A key that a recipe sets if the config leaves it out.

    Args:
        path: Dotted, below ``student``.
        value: As in YAML.
        bits: Weight bit widths that it applies to.
        why: Its description and source.
        without: Student keys that prevent it, or ``key=value`` for one value of a key: they define what
            it would change.
    """

    path: str
    value: Any
    bits: tuple[int, ...]
    why: str
    without: tuple[str, ...] = ()


OWN_LOSS = ("rotations", "peers", "auxiliary", "data_free", "adaptation", "method", "phases")
KEPT_NORM = "bn=frozen_teacher"
RECIPES: Mapping[str, tuple[Setting, ...]] = {
    "none": (),
    "default": (
        Setting(
            "terms",
            [{"loss": "soft_target", "options": {"temperature": 4.0}}],
            (2, 3, 4, 5, 6, 7, 8),
            "soft targets only, no labels: SQAKD (Zhao, Zhao 2024)",
            OWN_LOSS,
        ),
        Setting("low_bit.decay_by_bits", True, (2, 3), "1/4 of the weight decay at 2 bits, 1/2 at 3: LSQ (Esser 2020)"),
        Setting(
            "low_bit.transition_rate",
            0.005,
            (2, 3),
            "transition-rate schedule: TRS (Lee et al. 2024)",
            (KEPT_NORM,),  # which is trained at the schedule's rate
        ),
        Setting(
            "low_bit.step_size_bound",
            0.1,
            (2, 3, 4),
            "bounds the change of a step size per step: ours (gpu_ladder_cifar10.json)",
        ),
        Setting(
            "low_bit.reestimate_batches",
            50,
            (2, 3, 4, 5, 6, 7, 8),
            "batch-norm statistics re-estimated before batch norm is frozen: Nagel et al. 2022",
            ("data_free", KEPT_NORM),
        ),
    ),
}


def with_recipe(student: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a student's raw section with the keys that its recipe sets; the schema reports parts of the wrong type.

    Args:
        student: Nested mappings and lists; widths of a preset are filled in.

    Example:
        >>> made = with_recipe({"recipe": "default", "quant": {"weight_bits": 2}, "low_bit": {"decay_by_bits": False}})
        >>> made["low_bit"]
        {'decay_by_bits': False, 'transition_rate': 0.005, 'step_size_bound': 0.1, 'reestimate_batches': 50}
    """
    recipe, quant = student.get("recipe"), student.get("quant")
    if not isinstance(recipe, str) or recipe not in RECIPES or not isinstance(quant, Mapping):
        return student
    result = dict(student)
    for setting in settings_for(recipe, quant.get("weight_bits")):
        if not any(_has(student, key) for key in setting.without):
            _set(result, setting.path.split("."), setting.value)
    return result


def without_recipe(student: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a stored student's raw section without the keys that have the values of its recipe, to set them again.

    Another recipe, or other widths, set other values; what a person has chosen stays.

    Args:
        student: With every key, as a run stores it.
    """
    recipe, quant = student.get("recipe"), student.get("quant")
    if not isinstance(recipe, str) or recipe not in RECIPES or not isinstance(quant, Mapping):
        return student
    values = {setting.path: setting.value for setting in settings_for(recipe, quant.get("weight_bits"))}
    result = dict(student)
    for path in {setting.path: None for setting in RECIPES[recipe]}:
        section, _, key = path.rpartition(".")
        held = result.get(section) if section else result
        if not isinstance(held, Mapping) or key not in held:
            continue
        is_default = not held[key]  # null, false or 0: what the schema has where no recipe sets the key
        if held[key] == values.get(path) or (is_default and path not in values):
            kept = {name: value for name, value in held.items() if name != key}
            result = {**result, section: kept} if section else kept
    return result


def settings_for(recipe: str, bits: object) -> tuple[Setting, ...]:
    """Return what a recipe sets for a weight bit width.

    Args:
        recipe: A key of :data:`RECIPES`.
        bits: Of weights; for any other value, nothing is set.
    """
    return tuple(setting for setting in RECIPES[recipe] if bits in setting.bits)


def recipe_lines() -> list[str]:
    """Return what each recipe sets, one line per key."""
    return [
        f"{name}, {_widths(setting.bits)}: student.{setting.path} = {_text(setting.value)} ({setting.why})"
        for name, settings in RECIPES.items()
        for setting in settings
    ]


def _has(student: Mapping[str, Any], key: str) -> bool:
    name, _, value = key.partition("=")
    return bool(student.get(name) == value if value else student.get(name))


def _set(section: dict[str, Any], path: list[str], value: Any) -> None:
    if len(path) == 1:
        section.setdefault(path[0], value)
        return
    inner = section.get(path[0], {})
    if isinstance(inner, Mapping):
        section[path[0]] = copied = dict(inner)
        _set(copied, path[1:], value)


def _widths(bits: tuple[int, ...]) -> str:
    return f"{bits[0]} to {bits[-1]} bits"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
