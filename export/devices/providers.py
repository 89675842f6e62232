"""Which execution providers models are measured with, and what each measurement is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.lowbit.provider import PROVIDER as LOW_BIT
from export.runtime import CPU

AUTO = "auto"
SHORT = {"cpu": CPU, "lowbit": LOW_BIT}  # what a user may write for onnxruntime's names
SUFFIX = "ExecutionProvider"
RUNTIMES = {"openvino": "OpenVINO"}  # runtimes besides ONNX Runtime that a device can measure with, and their titles


@dataclass(frozen=True)
class Entry:
    """A model under a provider: what takes a turn.

    Args:
        model: Name of the model.
        provider: By onnxruntime's name.
        is_optional: Whether it is left out, without an error, if the low-bit provider is not offered.
        is_beside: Whether the same model also runs on the CPU provider: then a file of which the low-bit provider takes
            nothing is left out here; otherwise the CPU provider runs it here, too.
        is_alone: Whether models run under this provider only.
    """

    model: str
    provider: str
    is_optional: bool = False
    is_beside: bool = False
    is_alone: bool = False

    @property
    def title(self) -> str:
        """The name of its figures."""
        return titled(self.model, self.provider, is_alone=self.is_alone)


def titled(model: str, provider: str, *, is_alone: bool = False) -> str:
    """Return the name of a model under a provider: ``student``, ``student, low-bit provider``.

    Args:
        model: Its name.
        provider: By onnxruntime's name.
        is_alone: Whether models run under this provider only; then its name is left out, except for the low-bit one.
    """
    if provider == LOW_BIT:
        return f"{model}, low-bit provider"
    if provider in RUNTIMES:
        return f"{model}, {RUNTIMES[provider]}"
    return model if provider == CPU or is_alone else f"{model}, {provider.removesuffix(SUFFIX)} provider"


def provider_names(words: Sequence[str]) -> tuple[str, ...]:
    """Return providers by onnxruntime's names, or ``auto``, for what a user wrote.

    Args:
        words: ``auto``, ``cpu``, ``lowbit`` or names; each may be several, separated by commas.

    Raises:
        ValueError: If there is none, one is named twice, or ``auto`` is combined with others.
    """
    parts = [part.strip() for word in words for part in word.split(",")]
    names = tuple(SHORT.get(part, part) for part in parts if part)
    if not names:
        raise ValueError("no provider is named; give auto, cpu, lowbit or a name of onnxruntime's")
    if len(set(names)) < len(names):
        raise ValueError(f"a provider is named twice: {', '.join(parts)}")
    if AUTO in names and len(names) > 1:
        raise ValueError(f"auto chooses the providers by itself and cannot be combined with others: {', '.join(parts)}")
    return names


def entries_of(models: Sequence[str], providers: Sequence[str]) -> tuple[Entry, ...]:
    """Return what takes turns: every model under every provider.

    Args:
        models: Their names.
        providers: Of :func:`provider_names`.

    Raises:
        ValueError: If two of them would have the same name.
    """
    is_auto = tuple(providers) == (AUTO,)
    names = (CPU, LOW_BIT) if is_auto else tuple(providers)
    entries = tuple(
        Entry(model, name, is_auto and name == LOW_BIT, CPU in names, len(names) == 1)
        for model in models
        for name in names
    )
    titles = [entry.title for entry in entries]
    if twice := sorted({title for title in titles if titles.count(title) > 1}):
        raise ValueError(f"two measurements would be called {twice[0]!r}; rename the model")
    return entries


def as_job(entry: Entry, number: int, file: str) -> dict[str, Any]:
    """Return an entry as the runner takes it.

    Args:
        entry: The entry.
        number: Its place, the key of its answer, since a device's texts are cleaned, names too.
        file: Name of the file on the device.
    """
    nothing = "leave out" if entry.is_beside else "cpu"
    return {
        "name": entry.model, "title": entry.title, "key": str(number), "file": file, "provider": entry.provider,
        "optional": entry.is_optional, "where_nothing": nothing if entry.provider == LOW_BIT else "run",
    }  # fmt: skip


def left_out(answer: Mapping[str, Any], entries: Sequence[Entry]) -> dict[int, str]:
    """Return the places of entries that were not measured, and why; only those that may be left out.

    Args:
        answer: The runner's.
        entries: In order.
    """
    return _told(answer, "left_out", [entry.provider == LOW_BIT and entry.is_beside for entry in entries])


def failed_entries(answer: Mapping[str, Any], entries: Sequence[Entry]) -> dict[int, str]:
    """Return the places of entries that could not be measured although others were, and why.

    Args:
        answer: The runner's.
        entries: In order.
    """
    return _told(answer, "not_measured", [entry.provider != CPU for entry in entries])


def _told(answer: Mapping[str, Any], key: str, may: Sequence[bool]) -> dict[int, str]:
    """Return the reasons that a runner gives, by place; only for places that may have one."""
    told = answer.get(key)
    if not isinstance(told, Mapping):
        return {}
    return {number: str(told[str(number)]) for number, it_may in enumerate(may) if it_may and str(number) in told}
