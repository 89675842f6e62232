"""Measure with OpenVINO: a session with the methods of ONNX Runtime's that the runner calls.

The runner loads this file where a job names it. Like the runner it imports nothing from the toolkit.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any


class Session:
    """A file compiled by OpenVINO for the CPU, in float32: bfloat16, its default on some CPUs, rounds codes.

    Args:
        path: The file.
        threads: Threads of inference.
    """

    def __init__(self, path: str, threads: int) -> None:
        openvino = importlib.import_module("openvino")
        core = openvino.Core()
        model = core.read_model(path)
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._core, self._model, self._settings = core, model, settings
        self._requests: dict[tuple[int, ...], Any] = {}
        self._prepared: Any = None
        self._request: Any = None

    def get_inputs(self) -> list[SimpleNamespace]:
        """Return the inputs with name, type and shape; a free axis is None."""
        return [_end(entry) for entry in self._model.inputs]

    def get_outputs(self) -> list[SimpleNamespace]:
        """Return the outputs likewise."""
        return [_end(entry) for entry in self._model.outputs]

    def compile_for(self, shapes: dict[str, Any]) -> None:
        """Compile for inputs of these shapes, so that the first inference need not."""
        self._compiled({name: tuple(shape) for name, shape in shapes.items()})

    def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        """Return the named outputs of arrays."""
        self._prepare(feeds)
        self._request.infer()
        return [self._request.get_tensor(name).data.copy() for name in names]

    def run_with_ort_values(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
        """Compute the outputs of prepared inputs; the first call with them copies their values."""
        if self._prepared is not feeds:
            self._prepare({name: value.numpy() for name, value in feeds.items()})
            self._prepared = feeds
        self._request.infer()
        return [self._request.get_tensor(name).data for name in names]

    def _prepare(self, arrays: dict[str, Any]) -> None:
        openvino = importlib.import_module("openvino")
        self._prepared = None
        self._request = self._compiled({name: tuple(values.shape) for name, values in arrays.items()})
        for name, values in arrays.items():
            self._request.set_tensor(name, openvino.Tensor(values))

    def _compiled(self, shapes: dict[str, tuple[int, ...]]) -> Any:
        """Compile for these shapes, once each: OpenVINO is faster if it knows them."""
        shape = next(iter(shapes.values()))
        if shape not in self._requests:
            model = self._model.clone()
            model.reshape({name: list(sizes) for name, sizes in shapes.items()})
            self._requests[shape] = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        return self._requests[shape]


def _end(entry: Any) -> SimpleNamespace:
    shape = [size.get_length() if size.is_static else None for size in entry.get_partial_shape()]
    stored = str(entry.get_element_type())
    found = "float" if "f32" in stored or "float32" in stored else "other"
    return SimpleNamespace(name=entry.get_any_name(), type=f"tensor({found})", shape=shape)
