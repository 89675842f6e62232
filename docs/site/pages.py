"""Writes the documentation's page for each distillation method, from tables, docstrings, configs and results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOPICS = "@TOPICS@"
LISTED = ("index", "quickstart", "expectations", "feeding", "lowbit", "fast_students")  # elsewhere in the index
EVERYWHERE = ("cross_entropy", "soft_target")  # most configs use them beside what they are about


def topic_pages(docs: Path) -> list[str]:
    """Return the names of the pages of topics that are there, beside those that the index lists by itself."""
    return sorted(path.stem for path in docs.glob("*.md") if path.stem not in LISTED)


def write_method_pages(folder: Path) -> list[Path]:
    """Write a page for each loss that terms may name and for each method with its own key, and their index.

    Args:
        folder: Is emptied first.

    Returns:
        The pages.
    """
    import yaml

    from qkd.methods.table import METHODS
    from qkd.terms import LOSSES

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    advice = yaml.safe_load((ROOT / "docs" / "methods" / "when.yaml").read_text(encoding="utf-8"))
    used = _configs()
    written = []
    for name, loss in LOSSES.items():
        body = [f"# `{name}`", f"{_sentence(loss.summary)} Source: {loss.source}.", *_when(advice, name)]
        body += [*_documented("autofunction", f"qkd.losses.{loss.function.__name__}"), *_options(loss.options)]
        written.append(_write(folder / f"{name}.md", body + _configured(used.get(name, ()))))
    for name, method in METHODS.items():
        if not method.asked_by:
            continue
        body = [f"# `{name}`", f"{_sentence(method.about)} Key of a config: `{method.asked_by}`.", *_when(advice, name)]
        body += _documented("autoclass", method.place.replace(":", "."))
        written.append(_write(folder / f"{name}.md", body + _configured(used.get(name, ()))))
    _write(folder / "index.md", ["# All methods", _index(written)])
    return written


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _when(advice: Mapping[str, str], name: str) -> list[str]:
    return [f"**When to use it.** {advice[name]}"] if name in advice else []


def _documented(directive: str, target: str) -> list[str]:
    """Return a directive of autodoc, with formula, shapes, errors and sources from the docstring."""
    extra = "\n   :no-members:" if directive == "autoclass" else ""
    return ["## Definition", f"```{{eval-rst}}\n.. {directive}:: {target}\n   :no-index:{extra}\n```"]


def _options(options: Mapping[str, Any]) -> list[str]:
    if not options:
        return []
    rows = [
        f"| `{name}` | {option.claim} | {'' if option.default is None else f'`{option.default}`'} |"
        for name, option in options.items()
    ]
    return ["## Options in a config", "\n".join(["| option | must be | default |", "|---|---|---|", *rows])]


def _configured(configs: tuple[str, ...] | list[str]) -> list[str]:
    """Return configs that use it, and their rows of the comparison."""
    found = []
    for name in configs:
        text = (ROOT / "configs" / "digits" / "methods" / f"{name}.yaml").read_text(encoding="utf-8")
        found += [f"## `qkd run digits/methods/{name}`", f"```yaml\n{text.rstrip()}\n```"]
    rows = [row for name in configs for row in _rows(name)]
    if rows:
        head = ["| config | bits | accuracy | to plain distillation | time of a step |", "|---|---|---|---|---|"]
        found += ["## In the comparison", _BUDGET, "\n".join([*head, *rows])]
    return found


_BUDGET = (
    "ResNet-20 to ResNet-8 on 4,000 images of Fashion-MNIST, 4 epochs, three seeds, nothing tuned "
    "(`benchmarks/results/methods.json`, by `python benchmarks/methods.py`; [what the whole table says](../index.md)). "
    "Time is relative to plain distillation."
)


def _rows(name: str) -> list[str]:
    found = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text(encoding="utf-8"))
    rows = []
    for row in found["table"]:
        if row["method"] != name or "mean" not in row:
            continue
        bits = f"w{row['bits']}a{row['bits']}"
        step = found["steps"].get(f"{name}-{bits}", {}).get("time_ratio")
        accuracy = f"{100 * row['mean']:.2f} ± {100 * row['stdev']:.2f} %"
        gain = f"{100 * row['to_kd']:+.2f} ± {100 * row['to_kd_stdev']:.2f} points"
        rows.append(f"| {name} | {bits.upper()} | {accuracy} | {gain} | {'' if step is None else f'{step:.2f}'} |")
    return rows


def _configs() -> dict[str, list[str]]:
    """Return loss or method -> names of the shipped configs that are about it."""
    from qkd.config.binding import load_config
    from qkd.methods.table import METHODS, methods_of

    places = {entry.place: name for name, entry in METHODS.items()}
    found: dict[str, list[str]] = {"cross_entropy": ["plain", "label_smoothing"], "soft_target": ["soft_targets"]}
    for path in sorted((ROOT / "configs" / "digits" / "methods").glob("*.yaml")):
        config = load_config(str(path))
        terms = [*config.student.terms, *(term for phase in config.student.phases for term in phase.terms or ())]
        names = {term.loss for term in terms} - set(EVERYWHERE)
        kinds = [type(method) for method in methods_of(config)]
        names |= {places.get(f"{kind.__module__}:{kind.__name__}", "") for kind in kinds}
        for name in names - {"", "plain"}:
            found.setdefault(name, []).append(path.stem)
    return found


def _index(written: list[Path]) -> str:
    names = "\n".join(path.stem for path in written)
    return f":::{{toctree}}\n:maxdepth: 1\n\n{names}\n:::"


def _write(path: Path, parts: list[str]) -> Path:
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path
