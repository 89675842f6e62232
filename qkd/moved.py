"""Keep old names for one release: packages and modules that have moved, British spellings of names and keys."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from export.moved import OLD_NAMES, OldModules, by_old_name, warn_of_old


def moved(old: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds its former names in the modules where they are now.

    Args:
        old: Dotted name of the module.
        places: Public name -> dotted name of the module that has it.

    Returns:
        A function that returns a name's value, with a DeprecationWarning, and raises AttributeError for any other name.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        new = OLD_NAMES.get(places[name], {}).get(name, name)
        warn_of_old(f"{old}.{name}", f"{places[name]}.{new}")
        return getattr(importlib.import_module(places[name]), new)

    return find


OLD_MODULES = by_old_name({
    ("qkd.agents", "qkd.agents.operations"): (
        "blending counting drawing engine geometry mixing native pending rows tables"
    ),
    ("qkd.agents", "qkd.agents.policies"): "builtin magnitudes policy schedule_file search_log spaces",
    ("qkd", "qkd.bench"): "bench_targets=targets device_bench=measuring device_file",
    ("qkd", "qkd.config"): "bind_faults binding",
    ("qkd", "qkd.analysis"): (
        "costing diagnosing=run_diagnosis matching=run_matching policy_tools=schedules "
        "retrieving=run_retrieval"
    ),
    ("qkd.data", "qkd.data.loading"): "load shapes",
    ("qkd.data", "qkd.data.sets"): "arrays digits folder vision",
    ("qkd.distill", "qkd.terms"): (
        "combine head_graph modules rescaling step table=loss_table taps terms=weighting width_adapters"
    ),
    ("qkd.distill", "qkd.analysis"): "diagnosis matching outputs retrieval",
    ("qkd.distill.losses", "qkd.losses"): (
        "branches checks features given graphs information_flow levels logits relations singular stable"
    ),
    ("qkd.report", "qkd.report.comparing"): "comparison",
    ("qkd.distill.methods", "qkd.methods.rotations"): "branched rotations=step",
    ("qkd.distill.methods", "qkd.methods.co_study"): "co_study=step",
    ("qkd.distill.methods", "qkd.methods.ensemble"): "ensemble=average",
    ("qkd.distill.methods", "qkd.methods.meta_distil"): (
        "meta=step meta_schedule=schedule quiz"
    ),
    ("qkd.distill.methods", "qkd.methods.peers"): "peers=step",
    ("qkd.distill", "qkd.methods"): "phase_checks",
    ("qkd.distill", "qkd.losses"): "turns",
    ("qkd", "qkd"): "doctor=machine",
    ("qkd", "qkd.pipeline"): "dryrun",
    ("qkd", "qkd.checking"): "listing=names named_files=config_files",
    ("qkd", "qkd.run"): "run_target=target rundir=folder",
    ("qkd.stages", "qkd.roles"): "layers models=nets outcome role_agents=agents sample stored views",
    ("qkd.stages", "qkd.methods.auxiliary"): "auxiliary=training",
    ("qkd.stages", "qkd.methods.peers"): "peers=nets",
    ("qkd.stages", "qkd.methods.rotations"): "rotating=branches",
    ("qkd.stages", "qkd.search"): "searching=role_search",
    ("qkd", "qkd.files"): "yaml_text",
})  # fmt: skip
sys.meta_path.append(OldModules(OLD_MODULES))

OLD_NAMES["qkd.data"] = {"normalise": "normalize"}
OLD_NAMES["qkd.report"] = {"summarise": "summarize"}
OLD_NAMES["qkd.terms"] = {"dequantised": "dequantized"}
OLD_NAMES["ExportConfig"] = {"flavour": "flavor"}
OLD_NAMES["ModelRow"] = {"agreement_optimised": "agreement_optimized"}
OLD_NAMES["RunSummary"] = {"flavours": "flavors"}

OLD_KEYS = {"flavour": "flavor", "autocast": "precision", "channels_last": "memory_format"}  # of configs
OLD_PLACES = {"config.bench.provider": "providers"}  # keys that were renamed in one place
OLD_VALUES: dict[str, dict[str | bool, str]] = {
    "tap": {"quantised": "quantized"},
    "precision": {"off": "float32", False: "float32"},
    "memory_format": {True: "channels_last", False: "contiguous"},
}
FREE_FORM = {"options", "method_options", "net_options"}  # groups whose keys are a loss's, a method's or a net's own
DEEPEST = 8  # groups within each other, in a config; more is reported as a fault


def in_new_spelling(data: Any, *, is_stored: bool = False, where: str = "config") -> Any:
    """Return raw config data with British spellings of keys and values replaced by today's.

    Args:
        data: Nested mappings and lists, which are not changed; keys may be dotted paths.
        is_stored: Whether the toolkit wrote it, in which case there is no warning.
        where: Dotted place of the data, for the warning.
    """
    if where.count(".") > DEEPEST:
        return data
    if isinstance(data, list | tuple):
        return [in_new_spelling(item, is_stored=is_stored, where=f"{where}.{at}") for at, item in enumerate(data)]
    if not isinstance(data, Mapping):
        return data
    found = {}
    for key, value in data.items():
        new = _new_key(key, where)
        new = key if new in data else new  # with both spellings, the schema reports one as unknown
        place = f"{where}.{key}"
        inner = value if key in FREE_FORM else in_new_spelling(value, is_stored=is_stored, where=place)
        found[new] = _new_value(str(new), inner)
        if not is_stored and new != key:
            warn_of_old(f"`{place}`", f"`{new}`")
        elif not is_stored and found[new] is not inner:
            warn_of_old(f"`{place}={inner}`", f"`{found[new]}`")
    return found


def json_in_first_spelling(text: str) -> str:
    """Return config data in JSON as the first version spelled it, for hashes that must stay the same."""
    for old, new in OLD_VALUES["tap"].items():
        text = text.replace(f'"tap": "{new}"', f'"tap": "{old}"')
    return text


def train_in_first_spelling(train: Mapping[str, Any]) -> dict[str, Any]:
    """Return a training's section with precision and memory format as the first version had them, for hashes.

    Members of a search train in float32 and contiguous by default, as before: ``auto`` is not a different setting.

    Args:
        train: Plain data of the section; a key that is left out is ``auto``.
    """
    precision, memory_format = train.get("precision", "auto"), train.get("memory_format", "auto")
    return {
        **{key: value for key, value in train.items() if key not in ("precision", "memory_format")},
        "autocast": "off" if precision in ("auto", "float32") else precision,
        "channels_last": memory_format == "channels_last",
    }


def _new_key(key: Any, where: str) -> Any:
    before, dot, last = str(key).rpartition(".")
    if f"{where}.{key}" in OLD_PLACES:
        return f"{before}{dot}{OLD_PLACES[f'{where}.{key}']}"
    return f"{before}{dot}{OLD_KEYS[last]}" if last in OLD_KEYS and not before.endswith(tuple(FREE_FORM)) else key


def _new_value(key: str, value: Any) -> Any:
    known = OLD_VALUES.get(key.rpartition(".")[2], {})
    return known.get(value, value) if isinstance(value, str | bool) else value
