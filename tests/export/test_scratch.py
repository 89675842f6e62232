"""Temporary folders without room: the error names the folder and the way out, not the model or the compiler."""

from __future__ import annotations

import contextlib
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from export import ExportError, export_float, export_int8_baseline, write_view
from export.devices.connections.address import Device
from export.devices.links import LocalLink
from export.scratch import scratch_folder
from export.writing import write_whole

NO_ROOM = r"qkd-.*: free some space there, or set TMPDIR to a folder that has room"


@contextlib.contextmanager
def no_room(limit: int = 600) -> Iterator[None]:
    """Let no file grow beyond a few bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def message(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}"


def test_a_folder_is_removed_and_other_errors_pass(tmp_path: Path) -> None:
    with scratch_folder() as folder:
        (folder / "a").write_bytes(b"1")
    assert not folder.exists()
    with pytest.raises(ValueError, match="^of the caller$"), scratch_folder() as folder:
        raise ValueError("of the caller")
    assert not folder.exists()


@pytest.mark.parametrize("error", [RuntimeError("serialization failed"), OSError(27, "File too large")])
def test_whatever_fails_in_a_full_folder_the_folder_is_named(error: Exception) -> None:
    with pytest.raises(OSError, match="File too large") as caught, no_room(), scratch_folder() as folder:
        raise error
    assert caught.value.filename == str(folder) and caught.value.__cause__ is error
    assert not folder.exists()


def test_room_is_what_the_caller_needs() -> None:
    with pytest.raises(RuntimeError), no_room(1000), scratch_folder(room=1000):
        raise RuntimeError
    with pytest.raises(OSError, match="TMPDIR"), no_room(1000), scratch_folder(room=1001):
        raise RuntimeError


def test_an_export_does_not_blame_the_graph(residual, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="TMPDIR") as caught, no_room():
        write_view(residual, [(1, 3, 8, 8)], tmp_path / "n.onnx")
    assert caught.value.filename.startswith(tempfile.gettempdir())
    assert not list(tmp_path.iterdir())


def test_an_int8_baseline_does_not_blame_the_float_file(tmp_path: Path) -> None:
    source = tmp_path / "float.onnx"
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 10))
    export_float(net.eval(), torch.zeros(2, 3, 4, 4), source)
    with pytest.raises(OSError, match="TMPDIR"), no_room():
        export_int8_baseline(source, np.zeros((4, 3, 4, 4), np.float32), tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_a_benchmark_names_the_folder_of_its_job() -> None:
    link = LocalLink(Device("local"))
    with pytest.raises(OSError, match="TMPDIR"), no_room():
        link.run({"models": ["m" * 2000]}, {}, None)


def test_a_file_that_cannot_be_written_has_a_reason_without_a_number(residual, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^cannot write .*/n\.onnx: File too large$"), no_room():
        write_whole(tmp_path / "n.onnx", b"1" * 2000)
