"""The export stage: student and float nets as ONNX files, with the student's files proven equal to the student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from export import (
    ExportedModel,
    ExportError,
    ParityError,
    ParityReport,
    Preprocessing,
    check_parity,
    cost_of_file,
    export_float,
    export_onnx,
)
from export.lowbit.sessions import low_bit_for
from export.targets.sessions import SESSIONS, unusable
from qkd.config import DataConfig, RunConfig
from qkd.data import Splits, iterate, normalize
from qkd.files import sha256_of, write_json
from qkd.predicting.feeding import PIXELS, preprocessing_of, write_beside
from qkd.predicting.predictions import write_predictions
from qkd.progress import Progress, Tracker
from qkd.report.records import read_record
from qkd.roles.guide import TAUGHT, load_taught
from qkd.roles.images import run_images
from qkd.roles.layers import layer_rows
from qkd.roles.nets import load_float_twin, load_student, load_teacher, why_no_twin
from qkd.roles.sample import write_run_sample
from qkd.run.folder import RunFolder
from qkd.stages.kept import Kept, keep_proven, parity_file
from qkd.training import cpu_threads
from qkd.training.assembly import WEIGHTS


def run(run: RunFolder, progress: Progress) -> None:
    """Write ``export/``: the ONNX files, what they contain and cost, a sample for devices, and the comparison.

    ``student.onnx`` is always the file for ONNX Runtime, which the bench stage runs. If the config sets another flavor,
    that is written next to it (``student.qonnx.onnx``), and so is a file that takes uint8 pixels
    (``student.uint8.onnx``) if preprocessing is included; both are also compared on every test image. Files that an
    earlier export wrote for another runtime are kept if they are of the same student
    (:func:`~qkd.stages.kept.keep_proven`). ``labels.txt``, ``preprocess.json`` and ``predict.py`` are for the user of
    the files. If the low-bit execution provider is useful on this machine and takes some nodes of a file, its outputs
    are compared with those of the CPU provider.

    Raises:
        export.ExportError: If a net cannot be exported to ONNX, or a layer stays in float and the config is strict.
        ImportError: If the flavor is ``qonnx``, and qonnx is not installed.
        export.ParityError: If a file is not proven to be the student (``ParityReport.faults``). The files and the
            comparison are kept, but the stage is not complete.
    """
    with cpu_threads(run.config.threads):
        splits = run_images(run, progress)
        folder, student = run.folder("export"), load_student(run)
        kept = keep_proven(run, student_files(run.config), progress)
        nets = float_nets(run)
        if why := why_no_twin(run):
            progress.warn(f"float.onnx is left out: {why}")
        files = [*kept.files, *_write_models(run, student, nets, splits, kept, progress)]
        files += write_beside(folder, preprocessing_of(run.config, splits))
        files.append(
            write_run_sample(folder, {"student": student, **nets}, splits, preprocessing_of(run.config, splits))
        )
        reports = {}
        for name in student_files(run.config):
            reports[name] = compare_file(student, folder / f"{name}.onnx", splits, run.config, progress)
            files.append(write_parity(folder, name, reports[name]))  # at once: a runtime may end the whole process
        files += write_predictions(run, splits)
        write_json(folder / "layers.json", {"layers": layer_rows(student, reports["student"])})
    for name, report in reports.items():
        judge_file(name, report, progress)
    run.complete("export", [*files, folder / "layers.json"], _inputs(run))


class StudentFile(NamedTuple):
    """The kind of a student's file: its flavor, and its target if it has one."""

    flavor: str
    target: str | None = None


def student_files(config: RunConfig) -> dict[str, StudentFile]:
    """Return the student's files by name without suffix, with their kind; ``student``, for ONNX Runtime, is first."""
    target, flavor = config.export.chosen_target, config.export.file_flavor
    if target is None or target.is_onnxruntime:
        own = StudentFile(flavor, None if target is None else target.name)
        files = {"student": own} if flavor == "ort" else {"student": StudentFile("ort"), f"student.{flavor}": own}
    else:
        own = StudentFile(flavor, target.name)
        files = {"student": StudentFile("ort"), f"student.{target.name}": own}
    if config.export.preprocess == "inside":
        files[f"{[*files][-1]}.{PIXELS}"] = own
    return files


def float_nets(run: RunFolder) -> dict[str, nn.Module]:
    """Return the float nets to export: ``teacher``, and ``float`` if the student's float twin is a different net."""
    taught = load_taught(run)
    nets = {"teacher": load_teacher(run) if taught is None else taught}
    has_own = (run.path / "student" / "float" / WEIGHTS).exists()
    twin = load_float_twin(run) if has_own or run.config.student_net != run.config.teacher_net else None
    return nets if twin is None else {**nets, "float": twin}


def _write_models(
    run: RunFolder,
    student: fx.GraphModule,
    nets: Mapping[str, nn.Module],
    splits: Splits,
    kept: Kept,
    progress: Progress,
) -> list[Path]:
    folder, exported, example = run.folder("export"), {}, example_batch(splits)
    now = student_files(run.config)["student"].target or ""  # as the record spells it
    if kept.target not in (None, now):
        then = kept.target or "ONNX Runtime"
        progress.warn(f"student.onnx was exported for {then}, and is now for {now or 'ONNX Runtime'} (export.target)")
    for name, file in student_files(run.config).items():
        preprocessing = preprocessing_of(run.config, splits, name)
        exported[name] = export_student(run.config, student, example, folder / f"{name}.onnx", file, preprocessing)
        for warning in exported[name].warnings:
            progress.warn(f"{name}.onnx: {warning}" if name != "student" else warning)
    for name, net in nets.items():
        preprocessing = preprocessing_of(run.config, splits, name)
        exported[name] = export_float(net, example, folder / f"{name}.onnx", preprocessing=preprocessing)
    write_facts(folder, exported, kept)
    write_json(folder / "cost.json", cost_of_file(folder / "student.onnx").to_json())
    progress.say(", ".join(f"{name}.onnx {model.size_bytes:,} bytes" for name, model in exported.items()))
    for name in student_files(run.config):
        progress.say(f"{name}.onnx needs {exported[name].needs}{_other_runtimes(run.config)}")
    return [folder / "export.json", folder / "cost.json", *(model.path for model in exported.values())]


def _other_runtimes(config: RunConfig) -> str:
    return "" if config.export.target else "; for an older or another runtime set export.target (`qkd ls targets`)"


def export_student(
    config: RunConfig,
    student: fx.GraphModule,
    example: Tensor,
    path: Path,
    file: StudentFile,
    preprocessing: Preprocessing | None = None,
) -> ExportedModel:
    """Write the student in a flavor or for a target, packed and checked according to the config.

    Raises:
        export.ExportError: If it cannot be written, or a layer stays in float and the config is strict.
    """
    settings = config.export
    if file.flavor != "ort":  # the others have one form each
        return export_onnx(
            student, example, path, flavor=file.flavor, target=file.target, strict=settings.strict,
            preprocessing=preprocessing,
        )  # fmt: skip
    return export_onnx(
        student, example, path, pack=settings.pack, linear=settings.linear, strict=settings.strict,
        preprocessing=preprocessing, target=file.target,
    )  # fmt: skip


def write_facts(folder: Path, exported: Mapping[str, ExportedModel], kept: Kept) -> Path:
    """Write ``export.json``: one entry per written file and per file kept from an earlier export."""
    facts = {name: model_facts(model) for name, model in exported.items()}
    write_json(folder / "export.json", {**facts, **kept.facts})
    return folder / "export.json"


def model_facts(model: ExportedModel) -> dict[str, Any]:
    """Return the entry of a written file in ``export.json``."""
    takes_pixels = model.path.stem.endswith(f".{PIXELS}")
    facts = {"path": model.path.name, "sha256": sha256_of(model.path), "takes_pixels": takes_pixels}
    return {**model.to_json(), **facts}  # the path is just a name, since the folder may move


def compare_file(
    student: fx.GraphModule, path: Path, splits: Splits, config: RunConfig, progress: Progress
) -> ParityReport:
    """Return the comparison of a student with one of its files on every test image."""
    preprocessing = preprocessing_of(config, splits, path.stem)
    flavor, target = student_files(config).get(path.stem, StudentFile("ort"))
    foreign = target if target in SESSIONS else None
    provider = None if foreign or flavor == "qonnx" else low_bit_for(path)
    missing = unusable(foreign) if foreign else ""
    runtime = foreign if foreign and not missing else None
    if missing:
        progress.warn(f"{path.name}: {missing}, so only ONNX Runtime ran the file")
    with progress.track(len(splits.test), "parity", "images") as tracker:
        batches = _test_batches(splits, config.data, tracker)
        if not preprocessing.is_inside:
            batches = ((normalize(images, splits.mean, splits.std), labels) for images, labels in batches)
        return check_parity(student, path, batches, preprocessing=preprocessing, provider=provider, runtime=runtime)


def write_parity(folder: Path, name: str, report: ParityReport) -> Path:
    """Write the comparison of a file, given by its name without the suffix; return its path."""
    path = parity_file(folder, name)
    write_json(path, report.to_json())
    return path


def judge_file(name: str, report: ParityReport, progress: Progress) -> None:
    """Report the result of a comparison.

    Raises:
        export.ParityError: If the file is not proven to be the student.
    """
    for note in report.notes:
        progress.warn(f"{name}.onnx: {note}")
    try:
        report.raise_if_worse()
    except ParityError as error:
        raise ParityError(f"{name}.onnx is not proven to be the student, do not use it: {error}", report) from error
    progress.say(f"parity of {name}.onnx: {_outcome(report)}")
    if report.provider is not None:
        progress.say(f"{name}.onnx: {report.provider.sentence}")
    if report.runtime is not None:
        progress.say(f"{name}.onnx: {report.runtime.sentence}")
    for side, compared in (("off", report.off), ("on", report.on)):
        if compared.differing:
            ties = f" ({compared.ties} of them where the student's two best logits are equal)" if compared.ties else ""
            differing = f"{compared.differing} of {report.images} images get a different class{ties}"
            progress.warn(f"{name}.onnx: with ONNX Runtime's optimizations {side}, {differing}")


def _outcome(report: ParityReport) -> str:
    same = report.images - report.off.differing
    images = f"all {same}" if same == report.images else f"{same} of {report.images}"
    codes = sum(layer.values for layer in report.layers)
    return f"the same class on {images} test images, {codes:,} codes of {len(report.layers)} quantizers equal"


def _inputs(run: RunFolder) -> list[Path]:
    candidates = (run.path / folder / WEIGHTS for folder in ("teacher", TAUGHT, "student", "student/float"))
    return [path for path in candidates if path.exists()]


def example_batch(splits: Splits) -> Tensor:
    """Return the normalized images that exports are traced with: two test images, or one if there is only one."""
    images, _ = splits.test.batch(torch.arange(min(2, len(splits.test))), "cpu")
    return normalize(images, splits.mean, splits.std)


def _test_batches(splits: Splits, data: DataConfig, tracker: Tracker) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.arange(len(splits.test))
    for images, labels in iterate(
        splits.test, order, data.eval_batch_size, "cpu", drop_last=False, workers=data.workers
    ):
        yield images, labels
        tracker.update(len(labels))


def require_integer_layers(run: RunFolder) -> None:
    """Raise if a layer of an export stayed in float, whatever the config allowed at the time.

    Raises:
        export.ExportError: Naming the layers, and why.
    """
    exported = read_record(run.path / "export" / "export.json")
    faults = [
        f"{name}.onnx: {fault}"
        for name in student_files(run.config)
        for fault in exported.get(name, {}).get("fall_backs", [])
    ]
    if faults:
        raise ExportError("layers stay in float:\n  " + "\n  ".join(faults))
