"""The targets by name: the form of file that each runtime computes exactly, and what it requires of a student.

Nothing here imports onnx or PyTorch, so that a config is checked at once. What was tried, and with which versions, is
in docs/runtimes.md; ``tests/runtimes/`` runs each of them in a separate environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from export.versions import OLDEST, Version, version_text

ONNXRUNTIME = "onnxruntime"
_WITH_VERSION = re.compile(rf"{ONNXRUNTIME}\s*(?:>=|==)\s*(\d{{1,3}})\.(\d{{1,3}})(?:\.\d{{1,4}})?")


@dataclass(frozen=True)
class Limit:
    """What a target requires of one setting of the student.

    Args:
        key: A field of ``quantizers.QuantSpec``, which is a key of a config's ``quant``.
        value: What it must be.
        reason: Why.
    """

    key: str
    value: object
    reason: str


@dataclass(frozen=True)
class Target:
    """A runtime, and the form of file that it computes exactly.

    Args:
        name: As users write it.
        about: Its description, in a few words.
        tried: Package and version that the tests run it with.
        flavor: Flavor of the graph.
        pack: How weights are stored: ``auto``, ``packed`` or ``int8``.
        linear: Form of linear layers: ``auto`` or ``gemm``.
        opset: Version of the operator set; None for the oldest that the storage allows.
        rewrites: Names of the changes to the written graph (``export.targets.rewrites``), in order.
        limits: What it requires of the student's settings.
        lacks: What it computes differently, so that a student with it is refused: real functions by name
            (``quantizers.functions``), ``gelu_tanh``, ``signed_pad``: zero padding of a grid below zero, and
            ``pad_of_6_axes``, which a transposed convolution with strides becomes.
        is_exact: Whether every code is the student's; else ``bound`` says how far it may be off.
        bound: How closely it reproduces the student.
        refusal: Why no file is written for it, and what to use instead; empty if one is.
        oldest: The oldest onnxruntime that must load the file; None if not requested.
    """

    name: str
    about: str
    tried: str
    flavor: str = "ort"
    pack: str = "int8"
    linear: str = "gemm"
    opset: int | None = None
    rewrites: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()
    lacks: frozenset[str] = frozenset()
    is_exact: bool = True
    bound: str = "every code equal"
    refusal: str = ""
    oldest: Version | None = None

    @property
    def is_onnxruntime(self) -> bool:
        """Whether ONNX Runtime itself runs the file, which is then ``student.onnx``."""
        return self.name.startswith(ONNXRUNTIME)

    @property
    def summary(self) -> str:
        """One line for ``qkd ls targets``."""
        if self.refusal:
            return f"{self.about}; refused: {self.refusal}"
        wants = "".join(f"; needs quant.{limit.key}: {_shown(limit.value)}" for limit in self.limits)
        return f"{self.about}: flavor {self.flavor}, {self.bound} ({self.tried}){wants}"

    def faults(self, quant: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return what of a student's settings does not suit the target: key of ``quant`` and a sentence.

        Args:
            quant: Fields of ``QuantSpec``, or the values of a config's section ``quant``.
        """
        return [
            (limit.key, f"target {self.name!r} needs {limit.key}: {_shown(limit.value)}, got "
             f"{_shown(quant.get(limit.key))}: {limit.reason}")
            for limit in self.limits if quant.get(limit.key) != limit.value
        ]  # fmt: skip


SYMMETRIC = Limit("symmetric", True, "it has no zero points, so grids must be symmetric or start at zero")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(ONNXRUNTIME, "ONNX Runtime on any processor; name the oldest version: onnxruntime>=1.17",
               "onnxruntime 1.15 to 1.32", pack="auto", linear="auto"),
        Target("onnxruntime-web", "browsers and WebAssembly in Node", "onnxruntime-web 1.30", pack="packed"),
        Target("openvino", "OpenVINO on Intel and Arm processors", "openvino 2026.4",
               rewrites=("separate_sums", "nonzero_biases", "narrow_pads"), lacks=frozenset({"hardtanh"})),
        Target("tvm", "Apache TVM's compiler (relax)", "apache-tvm 0.27"),
        Target("iree", "IREE's compiler and runtime", "iree-base-compiler 3.13", flavor="qcdq", opset=17,
               rewrites=("no_full_clips",)),
        Target("opencv", "OpenCV's dnn module (the engine of version 5)", "opencv-python-headless 5.0",
               rewrites=("float_linear_biases", "points_without_pads", "float_convolutions"),
               lacks=frozenset({"sigmoid", "gelu_tanh", "signed_pad", "pad_of_6_axes"})),
        Target("finn", "FINN's compiler for FPGAs", "qonnx 1.0; FINN itself is not run", flavor="qonnx", pack="auto",
               limits=(SYMMETRIC,), bound="every code equal in qonnx's executor"),
        Target("hls4ml", "hls4ml's compiler for FPGAs", "hls4ml 1.3", flavor="qonnx", pack="auto",
               rewrites=("between_integers",), limits=(SYMMETRIC,), bound="every code equal in its C simulation"),
        Target("litert", "LiteRT (TensorFlow Lite)", "onnx2tf", is_exact=False,
               refusal="it reads .tflite files, and converters from ONNX drop the quantizers; "
               "use onnxruntime, which runs on Android, iOS and Arm boards"),
    )
}  # fmt: skip


def target_names() -> list[str]:
    """List the names of the targets, refused ones included.

    Returns:
        The keys of ``TARGETS``, in order.
    """
    return list(TARGETS)


def find_target(text: str) -> Target:
    """Return the target that a text names.

    Args:
        text: A key of ``TARGETS``, or ``onnxruntime>=1.17`` for the oldest ONNX Runtime that must load the file.

    Returns:
        The target; with a version, stored as that version loads it.

    Raises:
        ValueError: If it does not name a target, the version is too old for any file, or the target is refused.
    """
    text = text.strip()
    if (match := _WITH_VERSION.fullmatch(text)) is not None:
        return _at_version((int(match[1]), int(match[2])))
    if text not in TARGETS:
        known = ", ".join((f"{ONNXRUNTIME}>=1.17", *TARGETS))
        raise ValueError(f"must be one of {known} (`qkd ls targets`), got {text!r}")
    target = TARGETS[text]
    if target.refusal:
        raise ValueError(f"target {text!r} is refused: {target.refusal}")
    return target


def _at_version(version: Version) -> Target:
    if version < OLDEST:
        raise ValueError(
            f"target: {ONNXRUNTIME} {version_text(version)} is too old; files need at least {version_text(OLDEST)}"
        )
    return replace(TARGETS[ONNXRUNTIME], name=f"{ONNXRUNTIME}>={version_text(version)}", oldest=version)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
