"""Keep names of rooms and modules that have moved, for a release: each use of one warns and says where it is now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from export.moved import OldModules, by_old_name


def moved(old: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds what was its own in the modules where it is now.

    Args:
        old: Dotted name of the module.
        places: Public name -> dotted name of the module that has it.

    Returns:
        A function that returns a name's value, with a DeprecationWarning, and raises AttributeError for any other name.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        text = f"{old}.{name} is {places[name]}.{name} now; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(places[name]), name)

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
