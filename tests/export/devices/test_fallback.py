"""A provider that fails in a run is not replaced by the CPU's, in comparisons and in measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from export.devices.onboard import runner
from export.runtime import open_session

CPU = "CPUExecutionProvider"


class Failing:
    """An onnxruntime session whose native part fails like a plugin provider in its first run."""

    runs = 0

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, *_: Any) -> Any:
        Failing.runs += 1
        raise onnxruntime.capi.onnxruntime_pybind11_state.EPFail("the provider failed")


@pytest.fixture
def net(tmp_path: Path) -> Path:
    port = onnx.helper.make_tensor_value_info
    ends = [port(name, onnx.TensorProto.FLOAT, [1, 3]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "net", ends[:1], ends[1:])
    opsets = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "n.onnx")
    return tmp_path / "n.onnx"


def by_toolkit(path: Path) -> Any:
    return open_session(path, optimize=True)


def by_runner(path: Path) -> Any:
    entry = {"name": "n", "provider": CPU}
    return runner.open_session(onnxruntime, str(path), {"threads": 1, "spinning": False}, entry)


@pytest.mark.parametrize("opened", [by_toolkit, by_runner])
def test_the_failure_is_seen(net: Path, opened: Any, capsys: pytest.CaptureFixture[str]) -> None:
    feeds = {"x": np.ones((1, 3), np.float32)}
    tempting = onnxruntime.InferenceSession(str(net), providers=[CPU])
    tempting._sess = Failing(tempting._sess)
    assert np.array_equal(tempting.run(None, feeds)[0], feeds["x"]), "by default, another session answers"
    assert "Falling back" in capsys.readouterr().out
    session = opened(net)
    session._sess = Failing(session._sess)
    Failing.runs = 0
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.EPFail):
        session.run(None, feeds)
    assert Failing.runs == 1 and "Falling back" not in "".join(capsys.readouterr())
