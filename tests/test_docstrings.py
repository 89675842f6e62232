"""Docstrings are complete, say what the code does, and their examples run."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import doctest
import importlib
import inspect
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qkd.config import Section
from qkd.failures import UsageError
from qkd.files.yaml_text import YamlError

ROOT = Path(__file__).resolve().parent.parent
OURS = ("quantizers", "export", "qkd")
MODULES = sorted(path for top in OURS for path in (ROOT / top).rglob("*.py"))
PACKAGES = [".".join(path.parent.relative_to(ROOT).parts) for path in MODULES if path.name == "__init__.py"]
# Calls of the standard library that reach for the disk: what calls them may raise OSError.
TOUCHES_DISK = {
    "iterdir", "mkdir", "open", "read_bytes", "read_text", "rename", "rglob", "rmdir", "stat", "symlink_to", "unlink",
    "write_bytes", "write_text",
}  # fmt: skip
# Errors that a caller cannot cause: guards against mistakes in our own code, which no exported function need name.
GUARDS = {
    "ArraySplit.__init__": {"ValueError"},  # the reader has counted the labels
    "MemorySplit.__init__": {"TypeError", "ValueError"},  # readers give uint8 and int64
    "Op.__post_init__": {"ValueError"},  # a search moves within the range
    "Policy.__post_init__": {"TypeError"},  # must consist of Op values
    "_content": {"ValueError"},  # of a schedule file, whose faults are collected before
    "stratified_quotas": {"ValueError"},  # the config has checked the fraction, and limits are cut to what is there
    "channel_statistics": {"ValueError"},  # of no images: the readers refuse an empty set
    "optimized_graph": {"FileNotFoundError", "ValueError"},  # of a graph in memory, on one thread
    "program_of_view": {"TypeError"},  # two passes disagree about a view
}
SECONDS_AT_MOST = 20  # of an example; they take tenths of a second, but the machine may be busy
# Functions without a Raises section: no argument of the stated type makes them fail.
RAISE_NOTHING = {
    "export.targets.target_names",
    "export.cost.cost_of_program",
    "export.flavors.without_custom_operators",
    "export.lowbit.availability",
    "export.sample_size",
    "qkd.checking.name_faults",
    "qkd.checking.term_use_faults",
    "qkd.config.conflicts.data_free_faults",
    "qkd.config.conflicts.federated_faults",
    "qkd.config.conflicts.idle_faults",
    "qkd.config.conflicts.low_bit_faults",
    "qkd.config.conflicts.method_faults",
    "qkd.cli.build_parser",
    "qkd.data.changes",
    "qkd.data.sampling_note",
    "qkd.losses.right_singular_vectors",
    "qkd.files.may_write",
    "qkd.files.only_reading",
    "qkd.foreign.clean_output",
    "qkd.foreign.is_regular",
    "qkd.foreign.nearest",
    "qkd.foreign.raw_stream",
    "qkd.foreign.shown",
    "qkd.foreign.shown_line",
    "qkd.nets.net_hint",
    "qkd.report.render_page",
    "qkd.report.render_text",
    "qkd.search.cost_report",
    "qkd.search.explore",
    "qkd.search.first_round",
    "qkd.search.published_cost",
    "qkd.search.start_policy",
    "qkd.terms.check_terms",
    "qkd.testing.synthetic_images",
    "qkd.testing.synthetic_splits",
    "qkd.training.learning_rate",
    "qkd.training.supervised_step",
    "quantizers.act_quantizers",
    "quantizers.batch_statistics",
    "quantizers.is_fused",
    "quantizers.is_grid_record",
    "quantizers.quant_layers",
    "quantizers.quantizer_scales",
    "quantizers.set_fused",
    "quantizers.unquantized",
    "quantizers.view.grid_of",
}
TENSORS = ("Tensor", "Tensor | None", "torch.Tensor")
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|References|Note|See also):$", re.MULTILINE)


def exported(wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the wanted objects that some `__all__` lists, each under the first name that it has."""
    found: dict[int, tuple[str, Any]] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        if hasattr(module, "PLACES"):  # old names, for a release
            continue
        for name in module.__all__:
            one = getattr(module, name)
            if wanted(one):
                found.setdefault(id(one), (f"{package}.{name}", one))
    return dict(found.values())


def is_function(one: Any) -> bool:
    return inspect.isfunction(inspect.unwrap(one)) if callable(one) and not inspect.isclass(one) else False


def is_class(one: Any) -> bool:
    return inspect.isclass(one) and not getattr(one, "_is_protocol", False) and one.__module__.split(".")[0] in OURS


FUNCTIONS = exported(is_function)
CLASSES = exported(is_class)


def sections(text: str) -> dict[str, str]:
    """Return the sections of a docstring in Google's style, by title."""
    parts = SECTION.split(inspect.cleandoc(text))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def texts_of(section: str) -> dict[str, str]:
    """Return what a section says of each name: `a, b: Text` names two."""
    pattern = r"^ {4}([\w.*`]+(?:, [\w.*`]+)*)(?: \([^)]*\))?:(.*(?:\n {8,}.*)*)"
    found = re.findall(pattern, section, re.MULTILINE)
    return {name.strip("*`"): text for names, text in found for name in names.split(", ")}


def entries(section: str) -> list[str]:
    return list(texts_of(section))


class Errors:
    """Which errors leave a function, read from its code and from that of the functions of ours that it calls."""

    def __init__(self) -> None:
        self._known: dict[Any, frozenset[type[BaseException]]] = {}
        self.guards_met: set[tuple[str, str]] = set()

    def of(self, function: Any) -> frozenset[type[BaseException]]:
        function = inspect.unwrap(function)
        if function not in self._known:
            self._known[function] = frozenset()  # a circle adds nothing
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
            names = {**vars(builtins), **function.__globals__}
            found = self._walk(tree.body[0].body, names)  # type: ignore[attr-defined]
            guarded = {error for error in found if error.__name__ in GUARDS.get(function.__qualname__, ())}
            self.guards_met |= {(function.__qualname__, error.__name__) for error in guarded}
            self._known[function] = frozenset(found - guarded)
        return self._known[function]

    def _walk(self, nodes: list[Any], names: dict[str, Any]) -> set[type[BaseException]]:
        found: set[type[BaseException]] = set()
        for node in nodes:
            if isinstance(node, ast.Try):
                caught = tuple(error for handler in node.handlers for error in self._caught(handler, names))
                found |= {error for error in self._walk(node.body, names) if not issubclass(error, caught)}
                found |= self._walk([*node.handlers, *node.orelse, *node.finalbody], names)
                continue
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                continue  # raises when it is called, not here
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                module = importlib.import_module(node.module or "")
                names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
            if isinstance(node, ast.Raise) and node.exc is not None:
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                error = value_of(raised, names)
                if inspect.isclass(error) and issubclass(error, BaseException):
                    found.add(error)
            if isinstance(node, ast.Call):
                found |= self._called(node, names)
            found |= self._walk(list(ast.iter_child_nodes(node)), names)
        return found

    def _called(self, node: ast.Call, names: dict[str, Any]) -> frozenset[type[BaseException]]:
        called = value_of(node.func, names)
        if called is builtins.open or (called is None and getattr(node.func, "attr", "") in TOUCHES_DISK):
            return frozenset({OSError})
        if is_class(called) and not issubclass(called, BaseException):
            made = [getattr(called, name, None) for name in ("__init__", "__post_init__")]
            return frozenset(error for one in made if inspect.isfunction(one) and ours(one) for error in self.of(one))
        return self.of(called) if is_function(called) and ours(called) else frozenset()

    @staticmethod
    def _caught(handler: ast.ExceptHandler, names: dict[str, Any]) -> Iterator[type[BaseException]]:
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        for kind in kinds:
            value = value_of(kind, names)
            yield from value if isinstance(value, tuple) else [value] if inspect.isclass(value) else []


def ours(function: Any) -> bool:
    function = inspect.unwrap(function)
    is_written = Path(function.__code__.co_filename).is_relative_to(ROOT)  # a dataclass makes its own __init__
    return is_written and str(function.__module__).split(".")[0] in OURS


def value_of(node: Any, names: dict[str, Any]) -> Any:
    """Return what a name or a dotted name stands for, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = value_of(node.value, names)
        return getattr(owner, node.attr, None) if inspect.ismodule(owner) or inspect.isclass(owner) else None
    return None


ERRORS = Errors()


def documented(function: Any) -> dict[str, Any]:
    """Return the names under Raises, each with the class that it stands for (None where there is no such class)."""
    function = inspect.unwrap(function)
    reachable = {error.__name__: error for error in ERRORS.of(function)}
    known = {**vars(builtins), **reachable, **OUR_ERRORS}
    names = entries(sections(function.__doc__ or "").get("Raises", ""))
    return {name: known.get(name.rpartition(".")[2]) for name in names}


OUR_ERRORS = {one.__name__: one for one in CLASSES.values() if issubclass(one, BaseException)} | {
    one.__name__: one for one in (UsageError, YamlError, UnicodeDecodeError)
}


def test_the_guards_see_the_code() -> None:
    assert len(FUNCTIONS) > 120
    assert len(CLASSES) > 80
    assert {"export.export_onnx", "quantizers.prepare", "qkd.nets.build_net"} <= set(FUNCTIONS)


def test_sections_and_entries_are_read() -> None:
    text = """Return one.

    Args:
        a: First, with
            a second line: of text.
        *rest: Others.

    Raises:
        ValueError: If it is.
    """
    found = sections(text)
    assert list(found) == ["Args", "Raises"]
    assert entries(found["Args"]) == ["a", "rest"]
    assert entries(found["Raises"]) == ["ValueError"]
    assert texts_of(found["Args"]) == {"a": " First, with\n        a second line: of text.", "rest": " Others."}


def _fails(way: str) -> None:
    if way == "caught":
        with_care()
    raise KeyError(way)


def with_care() -> None:
    try:
        raise ValueError("inside")
    except ValueError:
        Path("missing").read_text(encoding="utf-8")


def test_errors_are_followed_into_what_a_function_calls_and_not_past_what_it_catches(monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ours", lambda function: True)
    assert Errors().of(_fails) == {KeyError, OSError}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_all_of_it(name: str) -> None:
    function = inspect.unwrap(FUNCTIONS[name])
    said = sections(function.__doc__ or "")
    signature = inspect.signature(function)
    assert (function.__doc__ or "").splitlines()[0].endswith((".", "?")), "its first line is a sentence"
    assert entries(said.get("Args", "")) == list(signature.parameters), "Args names every parameter, in their order"
    gives = signature.return_annotation not in ("None", None)
    assert bool({"Returns", "Yields"} & set(said)) == gives, "Returns or Yields, where there is something"
    assert ("Raises" in said) != (name in RAISE_NOTHING), "Raises, or a line in RAISE_NOTHING"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tensor_comes_with_its_shape(name: str) -> None:
    function = inspect.unwrap(FUNCTIONS[name])
    said = texts_of(sections(function.__doc__ or "").get("Args", ""))
    tensors = [one.name for one in inspect.signature(function).parameters.values() if one.annotation in TENSORS]
    assert [one for one in tensors if not re.search(r"[Ss]hape|\[|[Ll]ikewise", said[one])] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_names_the_errors_that_leave_it(name: str) -> None:
    said = documented(FUNCTIONS[name])
    assert [word for word, error in said.items() if error is None] == [], "names of errors"
    named = tuple(said.values())
    assert sorted(error.__name__ for error in ERRORS.of(FUNCTIONS[name]) if not issubclass(error, named)) == []


def test_no_list_of_exceptions_is_longer_than_it_must_be() -> None:
    for function in FUNCTIONS.values():
        ERRORS.of(function)
    assert {(name, error) for name, errors in GUARDS.items() for error in errors} == ERRORS.guards_met
    assert set(FUNCTIONS) >= RAISE_NOTHING


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_says_what_it_holds(name: str) -> None:
    kind = CLASSES[name]
    assert kind.__doc__, "a docstring"
    said = sections(kind.__doc__)
    named = entries(said.get("Args", "")) + entries(said.get("Attributes", ""))
    if issubclass(kind, Section):
        told = {key for key, field in kind.model_fields.items() if field.description or is_class(field.annotation)}
        assert set(kind.model_fields) == told, "a sentence a key, but for sections, which have their own"
    elif dataclasses.is_dataclass(kind):
        assert sorted(named) == sorted(field.name for field in dataclasses.fields(kind) if field.init), "every field"
    elif "__init__" in vars(kind) and not issubclass(kind, BaseException):
        assert named == list(inspect.signature(kind).parameters), "every argument, in order"


def examples() -> dict[str, doctest.DocTest]:
    """Return every docstring with examples, by the name of what it describes."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found: dict[str, doctest.DocTest] = {}
    for path in MODULES:
        if ">>>" not in path.read_text(encoding="utf-8"):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found |= {test.name: test for test in finder.find(importlib.import_module(name), name) if test.examples}
    return found


EXAMPLES = examples()


def test_examples_are_found() -> None:
    lines = sum(path.read_text(encoding="utf-8").count("    >>> ") for path in MODULES)
    assert sum(len(test.examples) for test in EXAMPLES.values()) == lines > 30, "every >>> is run"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_shows_what_happens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    started = time.perf_counter()
    runner.run(EXAMPLES[name], out=said.append, clear_globs=False)
    assert not said, "".join(said)
    assert time.perf_counter() - started < SECONDS_AT_MOST
