"""Run a graph of Quant nodes with qonnx's own executor, behind the two methods of an ONNX Runtime session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from export.extras import QONNX
from export.runtime import load_model

NODE_IR_VERSION = 8  # from 2021; every onnxruntime loads it, and none checks whether it fits the operator set


def qonnx_version() -> str:
    """Return the version of the installed qonnx.

    Raises:
        ImportError: If it is not installed; says how to get it.
    """
    try:
        import qonnx.core.onnx_exec  # noqa: F401
    except ImportError as error:
        raise ImportError(f"files of flavor 'qonnx' are run by qonnx's executor, which is missing: {QONNX}") from error
    from importlib import metadata

    return metadata.version("qonnx")


@contextmanager
def runtime_readable_models() -> Iterator[None]:
    """Let qonnx execute nodes even if the installed onnx is newer than the installed onnxruntime.

    qonnx 1.0 wraps each node in a model of onnx's own newest IR version, which onnxruntime refuses if it is the
    older of the two. Inside this block these models have the oldest version that their operator set allows.
    """
    from qonnx.core import onnx_exec

    original = onnx_exec.qonnx_make_model

    def make(graph: onnx.GraphProto, **settings: Any) -> onnx.ModelProto:
        model: onnx.ModelProto = original(graph, **settings)
        model.ir_version = NODE_IR_VERSION
        return model

    onnx_exec.qonnx_make_model = make
    try:
        yield
    finally:
        onnx_exec.qonnx_make_model = original


class QuantSession:
    """A qonnx file, ready to run on batches of any size; any of its tensors can be requested.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is not an ONNX file, or it is damaged.
        ImportError: If qonnx is missing.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.version = qonnx_version()
        self._model = load_model(path)
        self._wrappers: dict[int, Any] = {}
        self._last: tuple[dict[str, bytes], dict[str, Any]] | None = None

    def get_inputs(self) -> list[SimpleNamespace]:
        """Return the inputs with ``name`` and ``shape``, as ONNX Runtime does."""
        return [
            SimpleNamespace(name=entry.name, shape=[dim.dim_value for dim in entry.type.tensor_type.shape.dim])
            for entry in self._model.graph.input
        ]

    def run(self, names: Sequence[str], feeds: Mapping[str, npt.NDArray[np.float32]]) -> list[npt.NDArray[Any]]:
        """Return the named tensors for one batch.

        Args:
            names: Outputs, or any tensors between.
            feeds: Input -> values; the batch may have any size.

        Raises:
            ValueError: If qonnx cannot run the graph.
        """
        from qonnx.core.onnx_exec import execute_onnx

        key = {name: values.tobytes() for name, values in feeds.items()}
        if self._last is None or self._last[0] != key:  # slow node by node, so the same batch is run once
            batch = len(next(iter(feeds.values())))
            try:
                with runtime_readable_models():
                    context = execute_onnx(self._wrapper(batch), dict(feeds), return_full_exec_context=True)
            except Exception as error:  # whatever its nodes raise
                raise ValueError(f"qonnx cannot run the graph: {error}") from error
            self._last = key, context
        return [np.asarray(self._last[1][name]) for name in names]

    def _wrapper(self, batch: int) -> Any:
        """Return qonnx's wrapper of the model with this batch size, every shape inferred by qonnx."""
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.transformation.infer_shapes import InferShapes

        if batch not in self._wrappers:
            model = onnx.ModelProto()
            model.CopyFrom(self._model)
            del model.graph.value_info[:]
            for entry in model.graph.input:
                entry.type.tensor_type.shape.dim[0].dim_value = batch
            for entry in model.graph.output:
                entry.type.tensor_type.ClearField("shape")
            self._wrappers = {batch: ModelWrapper(model).transform(InferShapes())}
        return self._wrappers[batch]
