"""Sessions as applications use them: changing batches, tiny maps, runs side by side, no compiler, old runtimes."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import beside

nets: Any = beside.load(Path(__file__).with_name("conftest.py"))
provider: Any = beside.load(Path(__file__).with_name("test_provider.py"))
ROOT = Path(__file__).resolve().parents[3]
Session = Callable[..., Any]
Claimed = Callable[[], list[list[str]]]
Nets = Callable[[int], tuple[bytes, tuple[int, int]]]


def shrinking_net(size: tuple[int, int], end: tuple[int, int]) -> bytes:
    """A net whose maps become as small as ``end`` by one stride, with 2-bit convolutions of 1x1 and 3x3 on them."""
    rng = np.random.default_rng([*size, *end])
    net = nets.NetWriter(rng)
    x = net.quantize("images", 1 / 255, 0, np.uint8, (3, *size))
    strides = [side // wanted for side, wanted in zip(size, end, strict=True)]
    real, spread = net.convolution(x, 32, step=1 / 255, bits=8, kernel=strides, pads=[0] * 4, strides=strides)
    assert net.shapes[real] == (32, *end)
    for kernel in (1, 3, 5):
        low = net.low_bit(net.quantize(real, spread / 60, 0, np.uint8, net.shapes[real]), spread, by_saturation=False)
        real, spread = net.convolution(low, 32, step=spread, bits=2, kernel=[kernel] * 2, pads=[kernel // 2] * 4,
                                       strides=[1, 1])  # fmt: skip
    last = net.quantize(real, spread / 60, 128, np.uint8, net.shapes[real])
    return bytes(net.model([net.node("Identity", [net.dequantize(last)], "out")], size))


@pytest.mark.parametrize("end", [(1, 1), (1, 5), (6, 1), (2, 2)])
def test_maps_of_few_positions(end: tuple[int, int], make_session: Session, claimed: Claimed) -> None:
    size = (end[0] * 3, end[1] * 3)
    model = shrinking_net(size, end)
    plain, ours = make_session(model, provider=False), make_session(model, provider=True)
    for batch in (1, 4):
        x = {"images": np.random.default_rng(batch).random((batch, 3, *size), np.float32)}
        expected = plain.run(None, x)[0]
        assert np.unique(expected).size > 4, "saturated: it would prove nothing"
        np.testing.assert_array_equal(ours.run(None, x)[0], expected)
    del ours
    gc.collect()
    (kinds,) = claimed()
    assert provider.low_bit_layers(kinds) == (4 if provider.has_tiles() else 3)  # the first layer is one of eight bits


def test_the_batch_may_change_from_run_to_run(random_net: Nets, make_session: Session) -> None:
    """Also none at all: an empty batch gives empty outputs, as without the provider."""
    model, size = random_net(5)
    plain, ours = make_session(model, provider=False), make_session(model, provider=True)
    for batch in (3, 1, 7, 2, 1):
        x = {"images": np.random.default_rng(batch).random((batch, 3, *size), np.float32)}
        for a, b in zip(plain.run(None, x), ours.run(None, x), strict=True):
            np.testing.assert_array_equal(a, b)
    nothing = {"images": np.empty((0, 3, *size), np.float32)}
    try:
        shapes = [one.shape for one in plain.run(None, nothing)]
    except Exception:  # onnxruntime refuses empty batches in some operators
        return
    assert [one.shape for one in ours.run(None, nothing)] == shapes


def test_two_sessions_and_many_runs_side_by_side(random_net: Nets, make_session: Session) -> None:
    """Each with its own scratch memory: eight threads, two files, batches that differ."""
    jobs = []
    for seed in (5, 9):
        model, size = random_net(seed)
        plain, ours = make_session(model, provider=False), make_session(model, provider=True, threads=2)
        for batch in (1, 2, 3, 4):
            x = {"images": np.random.default_rng([seed, batch]).random((batch, 3, *size), np.float32)}
            jobs.append((ours, x, plain.run(None, x)))

    def is_right(job: tuple[Any, Any, Any]) -> bool:
        session, x, expected = job
        found = [session.run(None, x) for _ in range(4)]
        return all(np.array_equal(a, b) for one in found for a, b in zip(one, expected, strict=True))

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(is_right, jobs)) == [True] * 8


def test_an_onnxruntime_that_takes_plugins_by_device(
    random_net: Nets, make_session: Session, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As 1.23 and 1.24 do: a registered provider is on no list of names."""
    import onnxruntime

    from export import lowbit
    from export.lowbit.provider import _say_once
    from export.runtime import open_session

    model, size = random_net(5)
    if not lowbit.availability().is_offered:
        pytest.skip(lowbit.availability().reason)
    x = {"images": np.random.default_rng(0).random((2, 3, *size), np.float32)}
    expected = make_session(model, provider=False).run(None, x)
    name = lowbit.register()
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    session = open_session(model, optimize=True, provider=name)
    assert session.get_providers() == [name, "CPUExecutionProvider"]
    for found, wanted in zip(session.run(None, x), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    _say_once.cache_clear()
    with caplog.at_level("INFO"):
        assert lowbit.providers() == ["CPUExecutionProvider"]
    assert "takes it by device, not by name" in caplog.text


FRESH = """
import logging, sys
logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stdout)
sys.modules["onnxruntime_ep_lowbit"] = None
import numpy, onnxruntime
from export import lowbit
for _ in range(2):
    session = onnxruntime.InferenceSession("net.onnx", providers=lowbit.providers())
    shape = [side if isinstance(side, int) else 1 for side in session.get_inputs()[0].shape]
    session.run(None, {"images": numpy.zeros(shape, numpy.float32)})
print(*session.get_providers())
"""


def test_a_machine_without_a_compiler_runs_everything_on_the_cpu(tmp_path: Path, random_net: Nets) -> None:
    """A separate process, with nothing on PATH and an empty cache: one line says what is missing."""
    (tmp_path / "net.onnx").write_bytes(random_net(5)[0])
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QKD", "LOWBIT", "CXX"))}
    done = subprocess.run(
        [sys.executable, "-c", FRESH], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={**kept, "PATH": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [
        "low-bit execution provider: no C++ compiler: install g++ or clang++ to build the low-bit execution provider; "
        "the CPU provider computes everything",
        "CPUExecutionProvider",
    ]


STATUS = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
GET_API = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
SOME_STATUS = 0x1000


class ApiBase(ctypes.Structure):
    """What a runtime hands to a plugin."""

    _fields_ = [("get_api", GET_API), ("get_version", ctypes.c_void_p)]


@pytest.mark.parametrize("oldest", [1, None])
def test_a_runtime_whose_interface_is_unknown_is_refused(library: ctypes.CDLL, oldest: int | None) -> None:
    """It has no version 23 of its interface: a status that says so, or none where it cannot even make one; no crash."""
    said: list[bytes] = []
    asked: list[int] = []

    def create_status(code: int, message: bytes) -> int:
        said.append(message)
        return SOME_STATUS

    make = STATUS(create_status)
    table = (ctypes.c_void_p * 1)(ctypes.cast(make, ctypes.c_void_p).value)

    def get_api(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(table) if version == oldest else None

    base, made = ApiBase(GET_API(get_api), None), ctypes.c_size_t(7)
    library.CreateEpFactories.restype = ctypes.c_void_p
    factories = (ctypes.c_void_p * 1)()
    answer = library.CreateEpFactories(
        b"x", ctypes.byref(base), None, factories, ctypes.c_size_t(1), ctypes.byref(made)
    )
    assert asked == [23, 1] and made.value == 0 and factories[0] is None
    assert answer == (SOME_STATUS if oldest else None)
    assert said == ([b"LowBitExecutionProvider needs onnxruntime 1.23 or newer"] if oldest else [])
