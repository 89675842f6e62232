"""Sibling runs: the same student at another bit width, reusing the teacher and what was made from it."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from qkd.config import LowBitConfig, RunConfig
from qkd.config.recipes.table import settings_for
from qkd.failures import UsageError
from qkd.methods.table import methods_of
from qkd.progress import Progress
from qkd.roles.stored import changed_sources, stored_config
from qkd.run.folder import RunFolder
from qkd.run.identity import different_settings, identity

WIDTHS = "student.quant."  # prefix of the keys that differ
FOLLOWS = "student.low_bit."  # prefix of keys that may differ, too, since recipes set them by the widths


def beside(config: RunConfig, runs_dir: Path, progress: Progress) -> RunConfig:
    """Return the config of the sibling run if the folder holds the same run at other bit widths.

    For example, ``qkd run data-free.yaml student.quant.weight_bits=4``, called after ``qkd run data-free.yaml``, trains
    a second student on the first one's images, in another folder named after the widths. Methods opt in to this with
    :meth:`~qkd.methods.method.Method.taken_over`. Any other config is returned unchanged; if it does not match the run
    in its folder, :meth:`~qkd.run.folder.RunFolder.open` reports that.

    Args:
        config: The experiment.
        runs_dir: Where run folders are kept.
        progress: Reports that it is another run.

    Raises:
        UsageError: If the stages to reuse are not finished in the first run.
        ValueError: If the folder's config is damaged.
    """
    folder = runs_dir / config.name
    if not (folder / "config.yaml").is_file():
        return config
    first = stored_config(folder)
    changed = different_settings(first, config)
    is_other = any(key.startswith(WIDTHS) for key in changed)
    if not is_other or not all(key.startswith((WIDTHS, FOLLOWS)) for key in changed):
        return config
    stages = next((found for one in methods_of(config) if (found := one.taken_over()) is not None), None)
    if stages is None:
        return config
    _require(RunFolder(first, folder.resolve()), ("teacher", *stages))
    name = f"{config.name}-{_suffix(config, changed)}"
    progress.say(
        f"{folder} has a student of other widths; this one goes to {runs_dir / name} and reuses "
        f"{' and '.join(('teacher', *stages))}, which are not trained again"
    )
    if warning := changed_sources(folder, first):
        progress.warn(warning)
    teacher = config.teacher.model_copy(update={"run": folder.resolve()})
    return config.model_copy(update={"name": name, "teacher": teacher})


def _require(run: RunFolder, stages: tuple[str, ...]) -> None:
    missing = {stage: why for stage in stages if (why := run.why_incomplete(stage))}
    if missing:
        found = ", ".join(f"{stage} ({why})" for stage, why in missing.items())
        finish = f"qkd run {shlex.quote(str(run.path))} --until distill"
        raise UsageError(
            f"{run.path} is a run with other widths, and this student would reuse its {' and '.join(stages)}, but they "
            f"are not finished: {found}; finish them first with `{finish}`, or give this run another name (name=...), "
            f"so that it makes its own"
        )


def _suffix(config: RunConfig, changed: Mapping[str, tuple[str, str]]) -> str:
    quant = config.student.quant
    widths = f"w{quant.weight_bits}a{quant.act_bits}"
    others = sorted(set(changed) - {f"{WIDTHS}weight_bits", f"{WIDTHS}act_bits"} - _of_the_recipe(config))
    if not others:
        return widths
    text = json.dumps([[key, changed[key][1]] for key in others])
    return f"{widths}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _of_the_recipe(config: RunConfig) -> set[str]:
    """Return the keys of low bits that have the values of the recipe for these widths, so that no name tells them."""
    student, plain = config.student, LowBitConfig()
    values = {f"{FOLLOWS}{key}": value for key, value in plain.model_dump(mode="json").items()}
    values |= {f"student.{one.path}": one.value for one in settings_for(student.recipe, student.quant.weight_bits)}
    now = identity({"student": {"low_bit": student.low_bit.model_dump(mode="json")}})
    return {key for key, value in now.items() if values.get(key) == value}
