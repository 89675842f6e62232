"""Open ONNX files with ONNX Runtime, with every setting explicit."""

from __future__ import annotations

import importlib.util
from os import PathLike
from pathlib import Path
from typing import Any

import onnx

CPU = "CPUExecutionProvider"
RECORDS_CLAIMS = "session.record_ep_graph_assignment_info"  # onnxruntime 1.24 and newer


def runtime() -> Any:
    """Return the ``onnxruntime`` module.

    Raises:
        ImportError: If it is not installed, or damaged; the message says how to get it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        if (interrupt := _interrupt_in(error)) is not None:  # its compiled module turns one into an ImportError
            raise interrupt from None
        if not _is_installed():
            raise ImportError("this needs onnxruntime: pip install onnxruntime") from error
        raise ImportError(f"onnxruntime is installed, but cannot be imported ({error}); reinstall it") from error
    return onnxruntime


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("onnxruntime") is not None
    except ValueError:  # its import is blocked
        return False


def _interrupt_in(error: BaseException | None) -> KeyboardInterrupt | None:
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def load_model(path: str | PathLike[str]) -> onnx.ModelProto:
    """Return the model in a file.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is damaged, or not an ONNX file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no model file at {path}")
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf's exceptions share no public base
        raise ValueError(f"{path}: it is not an ONNX file, or it is damaged ({error}); export it again") from error
    if not model.graph.node:
        raise ValueError(f"{path}: it is an ONNX file without a graph; export it again")
    return model


def open_session(
    model: bytes | str | PathLike[str],
    *,
    optimize: bool,
    threads: int = 1,
    provider: str = CPU,
    spinning: bool = True,
    optimized_path: Path | None = None,
    records_claims: bool = False,
) -> Any:
    """Return an inference session.

    Args:
        model: A file, or a serialized model.
        optimize: Whether to apply all graph optimizations, or none.
        threads: Intra-op threads, at least 1; nodes run one after another.
        provider: Name of the execution provider, registered if it is a plugin; the CPU runs the nodes that it leaves.
        spinning: Whether idle threads spin, which is fast but slows down everything else that runs.
        optimized_path: Where the optimized graph is saved, if anywhere.
        records_claims: Whether :func:`claimed_nodes` will be called on the session.

    Raises:
        ValueError: If ``threads`` is below 1, the installed onnxruntime lacks the provider, or the file is damaged.
        FileNotFoundError: If the file does not exist.
        ImportError: If onnxruntime is missing.
    """
    ort = runtime()
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    devices = plugin_devices(ort, provider)
    if not devices and provider not in ort.get_available_providers():
        raise ValueError(f"provider {provider!r} is not in this onnxruntime; it has {ort.get_available_providers()}")
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise FileNotFoundError(f"no model file at {model}")
    options = ort.SessionOptions()
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    options.log_severity_level = 4  # failures are raised anyway; do not report them on stderr as well
    if records_claims:
        options.add_session_config_entry(RECORDS_CLAIMS, "1")
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    # without it, a session whose provider fails opens another on the CPU and gives that one's outputs
    chosen: dict[str, Any] = {"enable_fallback": 0}
    if devices:
        options.add_provider_for_devices(devices, {})
    else:
        chosen["providers"] = [provider] if provider == CPU else [provider, CPU]
    if isinstance(model, bytes):
        return ort.InferenceSession(model, options, **chosen)
    try:
        return ort.InferenceSession(str(model), options, **chosen)
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise ValueError(f"{model}: ONNX Runtime cannot load it ({error}); export it again") from error


def plugin_devices(ort: Any, provider: str) -> list[Any]:
    """Return the devices of a registered plugin provider that this onnxruntime selects by device, not by name.

    Args:
        ort: The module onnxruntime.
        provider: Name of the execution provider.

    Returns:
        What ``SessionOptions.add_provider_for_devices`` takes (onnxruntime 1.23 and some later versions need it);
        empty if the name is enough, or there is no such provider.
    """
    if provider in ort.get_available_providers() or not hasattr(ort, "get_ep_devices"):
        return []
    return [device for device in ort.get_ep_devices() if device.ep_name == provider]


def claimed_nodes(session: Any, provider: str) -> frozenset[str] | None:
    """Return the names, as in the file, of the nodes of a session's graph that a provider claimed.

    Args:
        session: Opened with ``records_claims``.
        provider: Name of the execution provider.

    Returns:
        Their names; None if this onnxruntime does not report them (before 1.24).
    """
    tell = getattr(session, "get_provider_graph_assignment_info", None)
    if tell is None:
        return None
    return frozenset(node.name for part in tell() if part.ep_name == provider for node in part.get_nodes())
