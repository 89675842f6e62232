"""The shape of the code: which way imports point, what modules are called, and that importing is free."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from export.moved import OLD_NAMES

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {"quantizers": set(), "export": {"quantizers"}, "qkd": {"quantizers", "export"}}  # of ours, beside itself
OUTSIDE = {
    "torch", "torchvision", "brevitas", "onnx", "onnxruntime", "onnxscript", "numpy", "pydantic", "yaml", "safetensors",
    "sklearn", "tqdm", "PIL", "setuptools", "qonnx", "ray", "jinja2", "markupsafe", "matplotlib", "argcomplete",
    "flwr", "simplejpeg",
}  # fmt: skip
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}
LINES_AT_MOST = 450
RUNNER_LINES = 650  # one file by purpose: it is copied to devices alone
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
PACKAGES = sorted(path.parent for path in MODULES if path.name == "__init__.py")


CALLABLE_ROOMS = {"qkd": {"run", "distill"}}  # rooms that can be called, see qkd/api


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.Module) -> set[str]:
    """Return the top-level names of every import, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add((node.module or "").split(".")[0])
    return names


def constants_then_classes(name: str) -> tuple[int, str]:
    """Sort as isort does: CONSTANTS, Classes, functions."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_the_guards_see_the_code() -> None:
    assert len(MODULES) > 50
    assert {"qkd", "qkd.stages", "quantizers", "export"} <= {dotted(path) for path in PACKAGES}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_module(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    package = path.relative_to(ROOT).parts[0]
    ours = imported(tree) & set(MAY_IMPORT) - {package}
    assert ours <= MAY_IMPORT[package], f"{package} must not import {ours - MAY_IMPORT[package]}"
    assert "tests" not in imported(tree)
    assert path.stem not in OUTSIDE | VAGUE, "a module has its own name"
    assert ast.get_docstring(tree), "a module opens with a sentence"
    assert ast.get_docstring(tree).splitlines()[0].endswith((".", "?")), "its first line is a sentence"  # type: ignore[union-attr]
    assert len(text.splitlines()) <= (RUNNER_LINES if path.name == "runner.py" else LINES_AT_MOST)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_what_a_module_imports_from_outside_is_a_dependency(path: Path) -> None:
    known = OUTSIDE | set(MAY_IMPORT) | set(sys.stdlib_module_names) | {"__future__", "pydantic_core"}
    assert imported(ast.parse(path.read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda folder: ".".join(folder.relative_to(ROOT).parts))
def test_a_package_exports_what_it_says(folder: Path) -> None:
    name = dotted(folder)
    module = importlib.import_module(name)
    names = list(module.__all__)
    assert names in (sorted(names), sorted(names, key=constants_then_classes)), "sorted"
    assert len(set(module.__all__)) == len(module.__all__)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # old names warn on access
        assert [one for one in module.__all__ if not hasattr(module, one)] == []
    body = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
    on_demand = [node for node in body if isinstance(node, ast.If)]
    # `from room import name` gives whichever was imported last: the export, or a module of that name
    parts = {one.stem for one in folder.glob("*.py")} | {one.parent.name for one in folder.glob("*/__init__.py")}
    assert not on_demand or parts & set(names) <= CALLABLE_ROOMS.get(dotted(folder / "__init__.py"), set())
    for node in on_demand:
        assert ast.unparse(
            node.test
        ) == "TYPE_CHECKING" and "__getattr__, __dir__ = on_demand(__name__)" in ast.unparse(node)
        body = [*(other for other in body if other is not node), *node.body]
    kinds = {type(node).__name__ for node in body}
    assert kinds <= {"Expr", "ImportFrom", "Assign", "AnnAssign"}, "re-exports, tables and __all__, nothing else"
    brought = {alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom)
               for alias in node.names if (node.module or "").startswith(name)}  # fmt: skip
    public = {one for one in brought if not isinstance(getattr(module, one), types.ModuleType)}
    assert public <= set(module.__all__), "everything brought up from below is listed"


@pytest.mark.parametrize("name", ["qkd.distill", "qkd.distill.losses", "qkd.distill.methods"])
def test_the_names_of_a_room_that_has_moved_are_found_for_a_release(name: str) -> None:
    """Every old name still works, and says where it is now."""
    module = importlib.import_module(name)
    assert list(module.PLACES) == module.__all__ != []
    for one, place in module.PLACES.items():
        new = OLD_NAMES.get(place, {}).get(one, one)
        with pytest.warns(DeprecationWarning, match=f"{name}.{one} is {place}.{new} now"):
            assert getattr(module, one) is getattr(importlib.import_module(place), new)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


GUARD = """
import builtins, logging, sys
sys.modules["onnxruntime"] = None  # importing it fails
import torch
def refuse(*args, **kwargs):
    raise AssertionError("importing must not touch CUDA")
torch.cuda._lazy_init = refuse
before = torch.get_rng_state(), torch.get_num_threads(), torch.is_grad_enabled()
real_open = builtins.open
def watched(file, mode="r", *args, **kwargs):
    if any(letter in mode for letter in "wax+"):
        raise AssertionError(f"importing must not write {file}")
    return real_open(file, mode, *args, **kwargs)
builtins.open = watched
handlers = list(logging.getLogger().handlers)
import importlib
importlib.import_module(sys.argv[1])
assert torch.equal(before[0], torch.get_rng_state()), "importing must not seed or draw"
assert torch.get_num_threads() == before[1] and torch.is_grad_enabled() == before[2]
assert logging.getLogger().handlers == handlers, "importing must not set up logging"
"""


@pytest.mark.parametrize("name", ["export", "qkd.cli", "qkd.stages", "quantizers"])
def test_importing_is_free(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", GUARD, name], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_no_module_of_ours_sets_a_warnings_filter_or_a_seed_at_import() -> None:
    found = []
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for call in ast.walk(node) if isinstance(node, ast.Expr | ast.Assign) else ():
                name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
                if name in ("warnings.filterwarnings", "warnings.simplefilter", "torch.manual_seed", "random.seed"):
                    found.append(f"{dotted(path)}: {name}")
    assert found == []


def test_the_command_line_helps_without_torch() -> None:
    modules = modules_after("qkd.cli.build_parser().format_help()")
    assert "qkd.cli" in modules
    assert modules & {"torch", "pydantic", "numpy", "yaml", "onnxruntime", "jinja2", "matplotlib"} == set()


HEAVY = {"torch", "torchvision", "brevitas", "onnx", "onnxruntime", "numpy"}  # each takes tenths of seconds, or seconds


@pytest.mark.parametrize(
    "words",
    [
        ["validate", "configs/digits/rolewise.yaml"],
        ["validate", "digits/methods/mhgd", "bench.on=[local, ssh://board]"],
        ["validate", "digits/w2a2", "teacher.net=resnet-18", "student.agent.policy=pbq", "data.name=digitz"],
        ["validate", "digits/data-free/cmi"],
        ["validate", "digits/domains/adaptation"],
        ["show", "digits/w2a2"],
        ["ls", "nets"],
        ["ls", "losses"],
        ["ls", "policies"],
        ["ls", "configs"],
    ],
    ids=" ".join,
)
def test_a_config_is_checked_and_names_are_listed_without_torch(words: list[str]) -> None:
    modules = modules_after(f"assert qkd.cli.main({words}) == {2 if 'data.name=digitz' in words else 0}")
    assert "pydantic" in modules
    assert modules & HEAVY == set()


def modules_after(code: str) -> set[str]:
    """Return what a fresh process has imported after a line of code."""
    code = f"import contextlib, io, sys; import qkd.cli\nwith contextlib.redirect_stdout(io.StringIO()): {code}\n" \
           "print(sorted(sys.modules))"  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    return set(ast.literal_eval(done.stdout))


def test_sub_commands_are_short() -> None:
    files = sorted((ROOT / "qkd" / "cli" / "commands").glob("*.py"))
    nodes = [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]
    commands = [node for node in nodes if isinstance(node, ast.FunctionDef)
                and [argument.annotation and ast.unparse(argument.annotation) for argument in node.args.args]
                == ["argparse.Namespace"]]  # fmt: skip
    assert len(commands) >= 15
    assert [node.name for node in commands if (node.end_lineno or 0) - node.lineno >= 16] == []


def calls(name: str) -> list[str]:
    """Return the modules of the product that call something by its name, once for each call."""
    found = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name:
                found.append(dotted(path))
    return found


def test_a_job_is_built_in_one_place() -> None:
    assert calls("Job") == ["qkd.training.assembly"]


# identifiers and strings that name a method or a key that asks for one
METHOD_NAMES = {
    "DataFree", "data_free",
    "EnsembleTeacher", "auxiliary", "co_study", "ensemble", "is_turned", "meta", "meta_distil", "peers", "rotations",
    "teacher_branches", "teacher_terms",
}  # fmt: skip
METHODS = ROOT / "qkd" / "methods"
MAY_NAME_METHODS = {
    "qkd.config.experiment", "qkd.config.methods", "qkd.config.training",  # the schema
    "qkd.config.conflicts.idle", "qkd.config.conflicts.real_images",
    "qkd.config.conflicts.roles", "qkd.config.conflicts.student",
    "qkd.config.recipes.table",  # which keys a recipe leaves alone
    "qkd.methods.table",
    "qkd.distill.methods", "qkd.moved",  # old names, for a release
}  # fmt: skip
HOMONYMS = {
    ("qkd.cli", "meta"),
    ("qkd.losses.branches", "teacher_branches"),
    ("qkd.nets.torchvision_nets", "meta"),
    ("qkd.training.arithmetic.folded", "meta"),
}  # what torch.fx calls what it knows of a node


def names_in(tree: ast.Module) -> set[str]:
    """Return identifiers, attributes, keyword arguments and short strings; docstrings are left out."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)) | ast.arg(arg=name):
                found.add(name)
            case ast.Constant(value=str(text)) if len(text) < 40:
                found |= set(text.replace("[]", "").replace("/", ".").split("."))
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.alias(name=name):
                found |= set(name.split("."))
            case _:
                pass
    return found


def test_nothing_outside_its_folder_names_a_method() -> None:
    naming = {
        dotted(path): [
            name
            for name in sorted(names_in(ast.parse(path.read_text(encoding="utf-8"))) & METHOD_NAMES)
            if not any(name == other and dotted(path).startswith(module) for module, other in HOMONYMS)
        ]
        for path in MODULES
        if path.is_relative_to(ROOT / "qkd") and METHODS not in path.parents[1:]
    }
    assert {name: found for name, found in naming.items() if found and name not in MAY_NAME_METHODS} == {}
    assert {name for name in MAY_NAME_METHODS if not naming[name]} == set(), "no longer needed"


ROOMS_AT_MOST = 14


@pytest.mark.parametrize("folder", PACKAGES, ids=dotted)
def test_a_room_holds_few_modules(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) <= ROOMS_AT_MOST


def imports_of(path: Path, names: set[str]) -> set[str]:
    """Return the modules of ours that a module imports, in functions too; for types alone only where a package does.

    A package's own ``TYPE_CHECKING`` block is what it imports on demand (`export/on_demand.py`).
    """
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {full[name] if full[name] in names else str(node.module) for name in full}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and path.name != "__init__.py":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)
    return found & names


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return the nodes of a circle; empty if there is none."""
    rest = dict(arrows)
    while free := [node for node, targets in rest.items() if not targets & set(rest)]:
        for node in free:
            del rest[node]
    return sorted(rest)


def room(module: str) -> str:
    """Return the folder of a module; the front door of a package is a room by itself."""
    is_door = module in {dotted(folder) for folder in PACKAGES} or module.endswith("__main__")
    return f"{module} (door)" if is_door else module.rpartition(".")[0]


def test_neither_modules_nor_rooms_import_each_other_in_a_circle() -> None:
    names = {dotted(path) for path in MODULES}
    modules = {dotted(path): imports_of(path, names) - {dotted(path)} for path in MODULES}
    assert sum(map(len, modules.values())) > 1000, "the imports are seen"
    assert "torch" not in modules and "qkd.roles.nets" in modules["qkd.pipeline.dryrun"]
    assert circle(modules) == []
    rooms: dict[str, set[str]] = {room(name): set() for name in names}
    for name, targets in modules.items():
        rooms[room(name)] |= {room(target) for target in targets} - {room(name)}
    assert circle(rooms) == []


def test_a_circle_is_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
