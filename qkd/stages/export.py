"""The export stage: student and float nets as ONNX files, and the student's file proven equal to the student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from export import ExportedModel, ParityReport, check_parity, export_float, export_onnx
from qkd.config import DataConfig
from qkd.data import Splits, iterate, load_splits, normalise
from qkd.files import write_json
from qkd.progress import Progress, Tracker
from qkd.rundir import RunFolder
from qkd.stages.layers import layer_rows
from qkd.stages.models import WEIGHTS, load_float_twin, load_student, load_teacher
from qkd.stages.sample import write_run_sample
from qkd.training import cpu_threads
from quantizers import Student

TOP1_OFF = 1.0  # the file must do what the student does, image by image
TOP1_ON = 0.999  # a runtime's optimisations may round a tie the other way now and then


def run(run: RunFolder, progress: Progress) -> None:
    """Write ``export/``: the ONNX files, a sample for devices, and the comparison on every test image.

    Raises:
        export.ExportError: If a net cannot become an ONNX file.
        export.ParityError: If the file's class differs from the student's on any test image (optimisations off). The
            files and the comparison stay, the stage is not complete.
    """
    with cpu_threads(run.config.threads):
        splits = load_splits(run.config.data, seed=run.config.seed)
        example = _example(splits)
        folder, student = run.folder("export"), load_student(run)
        nets = float_nets(run)
        files = _write_models(run, student, nets, example, folder, progress)
        files.append(write_run_sample(folder, {"student": student, **nets}, splits))
        report = _compare(student, folder / "student.onnx", splits, run.config.data, progress)
        files += _write_comparison(folder, student, report)
    _judge(report, progress)
    run.complete("export", files, _inputs(run))


def float_nets(run: RunFolder) -> dict[str, nn.Module]:
    """Return the float nets that are exported: ``teacher``, and ``float`` where the student's twin is another net."""
    nets = {"teacher": load_teacher(run)}
    has_own = (run.path / "student" / "float" / WEIGHTS).exists()
    twin = load_float_twin(run) if has_own or run.config.student_net != run.config.teacher.net else None
    return nets if twin is None else {**nets, "float": twin}


def _write_models(
    run: RunFolder,
    student: fx.GraphModule,
    nets: Mapping[str, nn.Module],
    example: Tensor,
    folder: Path,
    progress: Progress,
) -> list[Path]:
    settings = run.config.export
    exported = {
        "student": export_onnx(student, example, folder / "student.onnx", flavour=settings.flavour, pack=settings.pack)
    }
    for warning in exported["student"].warnings:
        progress.warn(warning)
    for name, net in nets.items():
        exported[name] = export_float(net, example, folder / f"{name}.onnx")
    write_json(folder / "export.json", {name: _facts(model) for name, model in exported.items()})
    progress.say(", ".join(f"{name}.onnx {model.size_bytes:,} bytes" for name, model in exported.items()))
    return [folder / "export.json", *(model.path for model in exported.values())]


def _facts(model: ExportedModel) -> dict[str, Any]:
    return {**model.to_json(), "path": model.path.name}  # the folder may move


def _compare(student: fx.GraphModule, path: Path, splits: Splits, data: DataConfig, progress: Progress) -> ParityReport:
    with progress.track(len(splits.test), "parity", "images") as tracker:
        return check_parity(student, path, _test_batches(splits, data, tracker))


def _write_comparison(folder: Path, student: fx.GraphModule, report: ParityReport) -> list[Path]:
    parity = {**report.to_json(), "passed": report.off.top1_agreement >= TOP1_OFF and not report.all_zero}
    write_json(folder / "parity.json", parity)
    write_json(folder / "layers.json", {"layers": layer_rows(cast(Student, student), report)})
    return [folder / "parity.json", folder / "layers.json"]


def _judge(report: ParityReport, progress: Progress) -> None:
    for note in report.notes:
        progress.warn(note)
    report.raise_if_worse(min_top1_off=TOP1_OFF, min_top1_on=0.0)
    progress.say(f"parity: the same class on all {report.images} test images")
    if report.on.top1_agreement < TOP1_ON:
        progress.warn(
            f"with ONNX Runtime's optimisations on, {report.on.differing} of {report.images} images get another class"
        )


def _inputs(run: RunFolder) -> list[Path]:
    candidates = (run.path / folder / WEIGHTS for folder in ("teacher", "student", "student/float"))
    return [path for path in candidates if path.exists()]


def _example(splits: Splits) -> Tensor:
    images, _ = splits.test.batch(torch.arange(min(2, len(splits.test))), "cpu")
    return normalise(images, splits.mean, splits.std)


def _test_batches(splits: Splits, data: DataConfig, tracker: Tracker) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.arange(len(splits.test))
    for images, labels in iterate(
        splits.test, order, data.eval_batch_size, "cpu", drop_last=False, workers=data.workers
    ):
        yield normalise(images, splits.mean, splits.std), labels
        tracker.update(len(labels))
