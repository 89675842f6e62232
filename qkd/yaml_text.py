"""Read YAML as data: numbers as people write them, no repeated keys, nothing executed."""

from __future__ import annotations

import re
from typing import Any

import yaml

_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_INT = re.compile(r"^[-+]?[0-9]+$")
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+[eE][-+]?[0-9]+
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class YamlError(ValueError):
    """A text that is not YAML, or YAML that says something twice; ``faults`` holds one line each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: ``off`` and ``no`` are text, ``1e-3`` is a number, dates are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.faults: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.faults.append(f"line {line}: a key must be a word, not a list or a group of keys")
                return {}
            if key.value in first_lines:
                self.faults.append(f"line {line}: key `{key.value}` again; it is on line {first_lines[key.value]} too")
            first_lines.setdefault(key.value, line)
        return {str(key.value): self.construct_object(value, deep=True) for key, value in node.value}

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number, in decimal whatever it starts with."""
        return int(self.construct_scalar(node))

    def construct_yaml_map(self, node: yaml.MappingNode) -> Any:
        """Build a mapping in one go, with its keys as text."""
        data: dict[str, Any] = {}
        yield data
        data.update(self.construct_mapping(node, deep=True))


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Plain scalars follow YAML 1.2 (``1e-3`` is a number, ``off`` is text); keys are text.

    Args:
        text: The whole document.

    Raises:
        YamlError: If the text is not YAML, holds more than one document, or repeats a key.
    """
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise YamlError([_syntax_fault(error)]) from error
    except RecursionError as error:
        raise YamlError(["nested too deeply"]) from error
    if loader.faults:
        raise YamlError(loader.faults)
    return value


def _syntax_fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None:
        return f"not YAML: {problem}"
    return f"line {mark.line + 1}, column {mark.column + 1}: not YAML: {problem}"
