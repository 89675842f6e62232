"""Read YAML as plain data: numbers as people write them, no repeated keys, no code execution, bounded size.

The expanded size is bounded during reading: an alias counts as much as the node that it refers to, so text that expands
to more than ``MOST_VALUES`` values is refused at the alias that exceeds the limit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from qkd.failures import first_of
from qkd.foreign.opening import read_text
from qkd.foreign.shown import shown_line

MOST_BYTES = 1_000_000  # per file; the schedule of a search of 10,000 epochs takes a third of that
MOST_VALUES = 100_000  # keys, values, groups and lists, with aliases expanded
MOST_CHARACTERS = 4_000_000  # of all of them together, with aliases expanded
DEEPEST = 32  # levels; a config has eight
MOST_DIGITS = 60  # per number; more than any 64-bit number has

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_INT = re.compile(r"^[-+]?[0-9]+\Z")
_TEXT = re.compile(r"^[^\ud800-\udfff]*\Z")
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class YamlError(ValueError):
    """Text that is not YAML, or YAML with repeated keys; ``faults`` has one line for each fault."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that this reader does not accept."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(None, None, problem, mark)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: ``off`` and ``no`` are text, ``1e-3`` is a number, dates are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {}  # for plain data only; any other tag is a fault

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.faults: list[str] = []
        self.values, self.characters, self.level = 0, 0, 0
        self.deepest = 0  # deepest level reached within the node being read
        self.sizes: dict[int, tuple[int, int, int]] = {}  # of a whole node: values, characters, levels

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Read a node and count its contents; an alias counts as the node that it refers to."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                raise _Refused(
                    f"the recursive alias *{event.anchor} refers to a node that contains it", event.start_mark
                )
            self._count(*self.sizes[id(node)], event.start_mark)
            return node
        before, outer, self.deepest = (self.values, self.characters), self.deepest, self.level
        self._count(1, len(getattr(event, "value", "")), 0, event.start_mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        self.sizes[id(node)] = (self.values - before[0], self.characters - before[1], self.deepest - self.level)
        self.deepest = max(outer, self.deepest)
        return node

    def _count(self, values: int, characters: int, levels: int, mark: Any) -> None:
        self.values, self.characters = self.values + values, self.characters + characters
        self.deepest = max(self.deepest, self.level + levels)
        if self.deepest >= DEEPEST:
            raise _Refused(f"nested deeper than {DEEPEST} levels", mark)
        if self.values > MOST_VALUES or self.characters > MOST_CHARACTERS:
            raise _Refused(f"holds more than {MOST_VALUES:,} values or {MOST_CHARACTERS:,} characters "
                                "(aliases are counted in full each time)", mark)  # fmt: skip

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.faults.append(f"line {line}: a key must be a word, not a list or a group of keys")
                return {}
            if key.value in first_lines:
                self.faults.append(
                    f"line {line}: repeated key `{shown_line(key.value, 60)}`, also on line {first_lines[key.value]}"
                )
            first_lines.setdefault(key.value, line)
        return {str(key.value): self.construct_object(value, deep=True) for key, value in node.value}

    def construct_int(self, node: yaml.Node) -> int:
        """Return a whole number, always read as decimal, even with leading zeros."""
        return int(self._number(node, _INT, "a whole number"))

    def construct_float(self, node: yaml.Node) -> float:
        """Return a number."""
        text = self._number(node, _FLOAT, "a number").lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))

    def construct_bool(self, node: yaml.Node) -> bool:
        """Return true or false."""
        return self._scalar(node, _BOOL, "true or false").lower() == "true"

    def construct_null(self, node: yaml.Node) -> None:
        """Return None."""
        self._scalar(node, _NULL, "null")

    def construct_text(self, node: yaml.Node) -> str:
        """Return text that can be encoded: without halves of surrogate pairs."""
        return self._scalar(node, _TEXT, "text without halves of surrogate pairs")

    def construct_list(self, node: yaml.Node) -> list[Any]:
        """Return a list."""
        if not isinstance(node, yaml.SequenceNode):
            raise _Refused("tagged as a list, but it is not one", node.start_mark)
        return [self.construct_object(item, deep=True) for item in node.value]

    def _number(self, node: yaml.Node, pattern: re.Pattern[str], what: str) -> str:
        text = self._scalar(node, pattern, what)
        if len(text) > MOST_DIGITS:
            problem = f"a number of {len(text):,} characters; at most {MOST_DIGITS} are allowed"
            raise _Refused(problem, node.start_mark)
        return text

    def _scalar(self, node: yaml.Node, pattern: re.Pattern[str], what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not pattern.match(node.value):
            found = shown_line(repr(node.value), 40) if isinstance(node, yaml.ScalarNode) else "something else"
            raise _Refused(f"tagged as {what}, but it is {found}", node.start_mark)
        return str(node.value)

    def construct_yaml_map(self, node: yaml.MappingNode) -> Any:
        """Build a mapping in one go, with its keys as text."""
        if not isinstance(node, yaml.MappingNode):
            raise _Refused("tagged as a group of keys, but it is not one", node.start_mark)
        data: dict[str, Any] = {}
        yield data
        data.update(self.construct_mapping(node, deep=True))

    def refuse_tag(self, node: yaml.Node) -> Any:
        """Raise, since the tag does not denote plain data."""
        tag = shown_line(str(node.tag).replace("tag:yaml.org,2002:", "!!"), 40)
        raise _Refused(f"not plain YAML data: the tag {tag}", node.start_mark)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
for _tag, _construct in {
    "map": _Loader.construct_yaml_map,
    "seq": _Loader.construct_list,
    "str": _Loader.construct_text,
    "int": _Loader.construct_int,
    "float": _Loader.construct_float,
    "bool": _Loader.construct_bool,
    "null": _Loader.construct_null,
}.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct)
_Loader.add_constructor(None, _Loader.refuse_tag)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Plain scalars follow YAML 1.2 (``1e-3`` is a number, ``off`` is text); keys are always text.

    Args:
        text: The whole document.

    Raises:
        YamlError: If the text is not YAML, has more than one document, repeats a key, or exceeds a limit.
    """
    if len(text) > MOST_BYTES:
        raise YamlError([f"has {len(text):,} characters; at most {MOST_BYTES:,} are read"])
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        raise YamlError([_syntax_fault(error)]) from error
    except (ValueError, OverflowError) as error:
        mark = loader.get_mark()
        where = f"line {mark.line + 1}, column {mark.column + 1}"
        raise YamlError([f"{where}: not YAML: an escape for a character that does not exist ({error})"]) from error
    if loader.faults:
        raise YamlError(first_of(loader.faults))
    return value


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file.

    Raises:
        YamlError: As for :func:`parse_yaml`.
        UnicodeDecodeError: If it is not UTF-8.
        OSError: If it cannot be read, is not a regular file, or is larger than ``MOST_BYTES``.
    """
    return parse_yaml(read_text(path, MOST_BYTES))


def _syntax_fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    kind = "" if isinstance(error, _Refused) else "not YAML: "
    if mark is None:
        return f"{kind}{problem}"
    return f"line {mark.line + 1}, column {mark.column + 1}: {kind}{problem}"
