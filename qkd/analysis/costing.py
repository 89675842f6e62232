"""Find the target of ``qkd cost``, and show its cost as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import CostReport, cost_of_file, cost_of_student
from qkd.config import RunConfig
from qkd.config.binding import load_config
from qkd.data import image_shape
from qkd.failures import UsageError
from qkd.image_size import height_width
from qkd.nets import build_net
from qkd.report.table import align
from qkd.report.text import cost_rows
from qkd.roles.nets import load_student, prepare_student
from qkd.run.folder import RunFolder
from qkd.run.target import run_folder
from qkd.seeding import global_stream
from qkd.training.assembly import WEIGHTS
from qkd.units import bytes_text
from quantizers.student import act_quantizers

LAYER_HEAD = ["layer", "kind", "output", "weight bits", "input bits", "parameters", "MACs", "BOPs", "weights"]


@dataclass(frozen=True)
class CostTable:
    """A cost as ``qkd cost`` prints it: totals next to those of the FP32 twin, and layers if requested."""

    report: CostReport
    has_layers: bool

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return self.report.to_json()

    def to_text(self) -> str:
        """Return the tables as text."""
        parts = [
            f"{self.report.name}, one image",
            align([[label, "", *figures] for label, *figures in cost_rows(self.report.to_json())]),
        ]
        if self.report.file_bytes is not None:
            parts.append(f"file: {bytes_text(self.report.file_bytes)}")
        if self.has_layers:
            parts += ["", align(_layers(self.report))]
        return "\n".join(parts)


def cost_of_target(
    target: str, *, runs_dir: Path, overrides: Sequence[str], load: Callable[[], RunConfig]
) -> CostReport:
    """Return the cost of an ONNX file, of a run's student, or of the student that a config describes.

    Args:
        target: A file ``*.onnx``; a run folder, or the name of one in ``runs_dir``; else a config.
        runs_dir: Folder of run folders.
        overrides: ``key=value``, for a config only.
        load: Loads the config.

    Raises:
        UsageError: If there are overrides for something that is finished, or a run has no student yet.
        FileNotFoundError: If the file does not exist.
        ValueError: If a file cannot be read, or the student cannot be built.
    """
    folder = run_folder(target, runs_dir)
    if overrides and (folder is not None or target.endswith(".onnx")):
        raise UsageError(f"{target} is not a config, so {overrides[0]} has nothing to change; name a config instead")
    if target.endswith(".onnx"):
        return cost_of_file(target)
    return _cost_of_config(load()) if folder is None else _cost_of_run(folder)


def _cost_of_run(folder: Path) -> CostReport:
    file = folder / "export" / "student.onnx"
    if file.is_file():
        return cost_of_file(file)
    if not (folder / "student" / WEIGHTS).is_file():
        raise UsageError(f"{folder} has no student yet (run `qkd distill`); name its config to count before training")
    run = RunFolder(load_config(folder / "config.yaml"), folder)
    return cost_of_student(load_student(run), name=run.config.name)


def _cost_of_config(config: RunConfig) -> CostReport:
    """Build the student with random weights and arbitrary scales: its cost does not depend on them."""
    shape = image_shape(config.data)
    with global_stream(config.seed, "cost"):
        net = build_net(config.student_net, classes=shape.classes, channels=shape.channels, image_size=shape.image_size)
        student = prepare_student(config, net, (shape.channels, *height_width(shape.image_size)))
    for quantizer in act_quantizers(student).values():
        quantizer.quant.mark_calibrated()
    return cost_of_student(student, name=config.name)


def _layers(report: CostReport) -> list[list[str]]:
    return [LAYER_HEAD] + [
        [
            layer.name,
            layer.kind,
            "x".join(map(str, layer.output_shape)),
            str(layer.weight_bits),
            str(layer.input_bits),
            *(f"{value:,}" for value in (layer.parameters, layer.macs, layer.bops)),
            bytes_text(layer.weight_bytes),
        ]
        for layer in report.layers
    ]
