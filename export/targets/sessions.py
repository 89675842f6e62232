"""Open a file with the runtime that it was written for, behind the two methods of an ONNX Runtime session."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from export.scratch import scratch_folder

Arrays = Mapping[str, npt.NDArray[Any]]


class Session(Protocol):
    """A file opened by a runtime.

    Attributes:
        version: The runtime's name and version.
    """

    version: str

    def run(self, names: Sequence[str], feeds: Arrays) -> list[npt.NDArray[Any]]:
        """Return the named outputs for one batch."""


class OpenVinoSession:
    """A file in OpenVINO, on the CPU in float32: its default on some processors is bfloat16, which rounds codes.

    Args:
        content: The serialized model.
        threads: At least 1.
    """

    def __init__(self, content: bytes, threads: int) -> None:
        openvino = _openvino()
        self.version = f"openvino {str(openvino.__version__).split('-')[0]}"
        with scratch_folder(room=len(content)) as folder:
            path = folder / "model.onnx"
            path.write_bytes(content)
            model = openvino.Core().read_model(str(path))
            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
            self._compiled = openvino.Core().compile_model(model, "CPU", settings)

    def run(self, names: Sequence[str], feeds: Arrays) -> list[npt.NDArray[Any]]:
        """Return the named outputs for one batch."""
        found = self._compiled(dict(feeds))
        return [np.asarray(found[name]) for name in names]


class OpenCvSession:
    """A file in OpenCV's dnn module.

    Args:
        content: The serialized model.
        threads: At least 1.
    """

    def __init__(self, content: bytes, threads: int) -> None:
        self._cv2 = _opencv()
        self.version = f"opencv {self._cv2.__version__}"
        self._cv2.setNumThreads(threads)
        self._content = np.frombuffer(content, np.uint8)
        self._net: Any = None
        self._shapes: list[tuple[int, ...]] = []

    def run(self, names: Sequence[str], feeds: Arrays) -> list[npt.NDArray[Any]]:
        """Return the named outputs for one batch."""
        shapes = [values.shape for values in feeds.values()]
        if self._net is None or shapes != self._shapes:  # buffers keep the first batch's size
            self._net, self._shapes = self._cv2.dnn.readNetFromONNX(self._content), shapes
        for name, values in feeds.items():
            self._net.setInput(values, name)
        return [np.array(self._net.forward(name)) for name in names]


class TvmSession:
    """A file compiled by TVM, for each batch size that it sees.

    Args:
        content: The serialized model.
        threads: Unused: TVM's own thread pool follows ``TVM_NUM_THREADS``.
    """

    def __init__(self, content: bytes, threads: int) -> None:  # noqa: ARG002
        self._tvm = _tvm()
        self.version = f"tvm {self._tvm.__version__}"
        self._model = onnx.load_from_string(content)
        self._machines: dict[tuple[tuple[int, ...], ...], Any] = {}

    def run(self, names: Sequence[str], feeds: Arrays) -> list[npt.NDArray[Any]]:
        """Return the named outputs for one batch."""
        key = tuple(values.shape for values in feeds.values())
        if key not in self._machines:
            self._machines[key] = self._compiled({name: list(values.shape) for name, values in feeds.items()})
        found = self._machines[key]["main"](*(self._tvm.runtime.tensor(values) for values in feeds.values()))
        found = [found] if hasattr(found, "numpy") else list(found)
        by_name = dict(zip((entry.name for entry in self._model.graph.output), found, strict=True))
        return [by_name[name].numpy() for name in names]

    def _compiled(self, shapes: dict[str, list[int]]) -> Any:
        relax = importlib.import_module("tvm.relax")
        frontend = importlib.import_module("tvm.relax.frontend.onnx")
        module = frontend.from_onnx(self._model, shape_dict=shapes, keep_params_in_input=False)
        return relax.VirtualMachine(self._tvm.compile(module, target="llvm"), self._tvm.cpu())


class IreeSession:
    """A file compiled by IREE for this processor; one image or many, the batch stays dynamic.

    Args:
        content: The serialized model.
        threads: Unused: the local-sync driver has one.
    """

    def __init__(self, content: bytes, threads: int) -> None:  # noqa: ARG002
        runtime = _iree()
        self.version = f"iree {_version(IREE)}"
        self._names = [entry.name for entry in onnx.load_from_string(content).graph.output]
        self._module = runtime.load_vm_flatbuffer(_compiled_by_iree(content), driver="local-sync")
        names = [name for name in self._module.vm_module.function_names if "__init" not in name]
        self._function = self._module[next(name for name in names if not name.endswith("$async"))]

    def run(self, names: Sequence[str], feeds: Arrays) -> list[npt.NDArray[Any]]:
        """Return the named outputs for one batch."""
        found = self._function(*feeds.values())
        found = list(found) if isinstance(found, (tuple, list)) else [found]
        by_name = dict(zip(self._names, found, strict=True))
        return [np.asarray(by_name[name]) for name in names]


@lru_cache(maxsize=1)  # a file is opened again for other batches; compilation takes seconds
def _compiled_by_iree(content: bytes) -> bytes:
    """Return IREE's program of a file. Its ONNX importer runs here: a separate process would take half of the time."""
    importer = importlib.import_module("iree.compiler.tools.import_onnx.__main__")
    compiler = importlib.import_module("iree.compiler.tools")
    with scratch_folder(room=2 * len(content)) as folder:  # as text, the weights are longer
        source, text = folder / "model.onnx", folder / "model.mlir"
        source.write_bytes(content)
        try:
            importer.main(importer.parse_arguments([str(source), "-o", str(text)]))
            return bytes(compiler.compile_file(str(text), extra_args=IREE_OPTIONS))
        except Exception as error:  # importer and compiler have no common exception class
            raise RuntimeError(f"IREE refuses the file: {str(error).strip()[-400:]}") from error


OPENCV, OLDEST_OPENCV = "opencv-python-headless>=5", 5
IREE = "iree-base-compiler[onnx]"
IREE_OPTIONS = [
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-llvmcpu-target-cpu=host",
]
SESSIONS: dict[str, Callable[[bytes, int], Session]] = {
    "iree": IreeSession,
    "opencv": OpenCvSession,
    "openvino": OpenVinoSession,
    "tvm": TvmSession,
}


def open_in(runtime: str, content: bytes, threads: int = 1) -> Session:
    """Return a file opened by another runtime than ONNX Runtime.

    Args:
        runtime: ``iree``, ``opencv``, ``openvino`` or ``tvm``.
        content: The serialized model.
        threads: At least 1; some runtimes ignore it.

    Returns:
        What runs it.

    Raises:
        ValueError: If the runtime is not one of these.
        ImportError: If it is not installed, too old, or cannot be imported; the message says how to get it.
        RuntimeError: If its compiler refuses the file.
    """
    require_known(runtime)
    return SESSIONS[runtime](content, threads)


def require_known(runtime: str) -> None:
    """Raise if no file can be opened in a runtime by :func:`open_in`.

    Raises:
        ValueError: If so.
    """
    if runtime not in SESSIONS:
        raise ValueError(f"runtime must be one of {', '.join(SESSIONS)}, got {runtime!r}")


def unusable(runtime: str) -> str:
    """Return why no file can be opened in a runtime here: it is missing, too old or damaged; empty if it can.

    Args:
        runtime: A key of :data:`SESSIONS`. It is imported.
    """
    try:
        _IMPORTS[runtime]()
    except ImportError as error:
        return str(error)
    return ""


def _is_there(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # of the package that the module is in; an import that is blocked
        return False
    return spec is not None and spec.origin is not None  # an empty folder of that name has no origin


def _required(module: str, package: str) -> ModuleType:
    if sys.modules.get(module) is None and not _is_there(module):
        raise ImportError(f"this needs {module}, which is missing: pip install '{package}'")
    try:
        return importlib.import_module(module)
    except Exception as error:  # damaged packages raise all kinds of errors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImportError(
            f"{module} is installed, but cannot be imported ({reason}); reinstall it: pip install '{package}'"
        ) from error


def _opencv() -> ModuleType:
    cv2 = _required("cv2", OPENCV)
    version = str(cv2.__version__)
    if int(version.partition(".")[0]) < OLDEST_OPENCV:
        raise ImportError(f"opencv {version} is installed, but such files need OpenCV 5: pip install '{OPENCV}'")
    return cv2


def _iree() -> ModuleType:
    _required("iree.compiler", IREE)
    return _required("iree.runtime", "iree-base-runtime")


def _openvino() -> ModuleType:
    return _required("openvino", "openvino")


def _tvm() -> ModuleType:
    return _required("tvm", "apache-tvm")


_IMPORTS: dict[str, Callable[[], ModuleType]] = {"iree": _iree, "opencv": _opencv, "openvino": _openvino, "tvm": _tvm}


def _version(package: str) -> str:
    return metadata.version(package.partition("[")[0])
