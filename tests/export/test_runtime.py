"""Importing ONNX Runtime: missing, damaged, and interrupted while it loads are three different things."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest

from export import runtime as module


def importing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    real = builtins.__import__

    def fail(name: str, *given: Any, **named: Any) -> Any:
        if name == "onnxruntime":
            raise error
        return real(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", fail)


def test_a_missing_one_is_to_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="^this needs onnxruntime: pip install onnxruntime$"):
        module.runtime()


def test_a_damaged_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    importing(monkeypatch, ImportError("libstdc++.so.6: version not found"))
    with pytest.raises(ImportError, match=r"is installed, but cannot be imported \(libstdc.*; reinstall it"):
        module.runtime()


@pytest.mark.parametrize("link", ["__cause__", "__context__"])
def test_an_interrupt_while_it_loads_stays_one(monkeypatch: pytest.MonkeyPatch, link: str) -> None:
    """Its compiled module turns it into an ImportError: `qkd bench` said that onnxruntime was missing."""
    error, between = ImportError("initialization failed"), RuntimeError()
    setattr(between, link, KeyboardInterrupt())
    error.__cause__ = between
    importing(monkeypatch, error)
    with pytest.raises(KeyboardInterrupt):
        module.runtime()
