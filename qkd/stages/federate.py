"""The stages of a federated run: rounds of training, and the export of the global student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from export import cost_of_file, export_float
from qkd.config import FederatedConfig, RunConfig
from qkd.data import Splits
from qkd.failures import UsageError
from qkd.federated.engines import run_local
from qkd.federated.engines.server import Server
from qkd.federated.engines.worker import Worker
from qkd.federated.federation import Federation
from qkd.federated.report import FederatedReport, read_report, write_rounds
from qkd.files import write_json
from qkd.predicting.feeding import preprocessing_of, write_beside
from qkd.progress import Progress
from qkd.roles.images import run_images
from qkd.roles.layers import layer_rows
from qkd.roles.nets import load_float, load_student, net_facts, save_net, sizes_of
from qkd.roles.outcome import score, write_outcome
from qkd.roles.sample import write_run_sample
from qkd.run.folder import RunFolder
from qkd.stages.export import (
    compare_file,
    example_batch,
    export_student,
    judge_file,
    student_files,
    write_facts,
    write_parity,
)
from qkd.stages.kept import Kept, keep_proven
from qkd.training import cpu_threads
from qkd.training.assembly import WEIGHTS
from qkd.training.checkpoint import CheckpointStore
from qkd.training.precision import choose_device
from qkd.training.state import fill
from quantizers import Student, settle

FOLDER = "federated"


def federate(run: RunFolder, progress: Progress) -> FederatedReport:
    """Run the stages that are not complete, resuming at the current round.

    Args:
        run: The open run folder; its config has a section ``federated``.
        progress: Where to report.

    Returns:
        The outcome.

    Raises:
        UsageError: If the config has no section ``federated``.
        ValueError: If the data, a net or the settings cannot be used.
        FederationError: If every client fails in a round.
        export.ParityError: If the file is not proven to be the student.
        OSError: If a file cannot be read or written.
    """
    clients = clients_of(run.config)
    for name, stage in FEDERATED.items():
        why = run.why_incomplete(name)
        progress.stage(name, {"": "already complete", "not run": ""}.get(why, why))
        if name == "federate" and not why:  # a kill right after its last file leaves them behind
            _checkpoints(run, progress).clear()
        if why:
            with cpu_threads(run.config.threads):
                stage(run, progress)
    return read_report(run.path, run.config.name, clients.model_dump(mode="json"))


def clients_of(config: RunConfig) -> FederatedConfig:
    """Return the section ``federated`` of a config; to be asked for before a run folder is opened, which changes it.

    Raises:
        UsageError: If it has none.
    """
    if config.federated is None:
        raise UsageError("the config has no section `federated`: use `qkd run`, or set there how clients train")
    return config.federated


def train(run: RunFolder, progress: Progress) -> None:
    """Run every round, resuming if needed; write ``federated/`` and ``student/``."""
    device = choose_device(run.config.device)
    splits = run_images(run, progress).to(device)
    federation = Federation(run.config, splits, device)
    folder = run.folder(FOLDER)
    write_json(folder / "clients.json", {"classes": list(splits.classes), "images": federation.label_counts.tolist()})
    store = _checkpoints(run, progress)
    server = Server(federation, store, progress)
    server.resume()
    _drive(server, progress)
    files = [folder / "clients.json", *write_rounds(folder, server.rows), *_save(run, server, splits)]
    run.complete("federate", files)
    store.clear()


def _checkpoints(run: RunFolder, progress: Progress) -> CheckpointStore:
    return CheckpointStore(run.path / FOLDER / "checkpoint", progress.warn)


def _drive(server: Server, progress: Progress) -> None:
    if server.federation.settings.engine == "local":
        run_local(server, Worker(server.federation).answer, progress)
        return
    from qkd.federated.engines.flower import run_flower  # an extra

    run_flower(server, progress)


def _save(run: RunFolder, server: Server, splits: Splits) -> list[Path]:
    """Settle the global net's scales, write it and score it again, since settling may move single codes."""
    config, net = run.config, server.strategy.net
    fill(net, server.model)
    if isinstance(net, Student):
        settle(net)
    folder, settings = run.folder("student"), server.federation.settings
    save_net(folder / WEIGHTS, net, net_facts(config.student_net, **sizes_of(splits)))
    bits = {} if settings.precision == "float" else config.student.quant.model_dump(include={"weight_bits", "act_bits"})
    details = {"start": "weights" if config.student.weights else "random", "rounds": settings.rounds, **bits}
    outcome = score("student", config.student_net, net, splits, config.data, None, **details)
    return [folder / WEIGHTS, write_outcome(folder, outcome)]


def export(run: RunFolder, progress: Progress) -> None:
    """Write ``export/``: the global student as ONNX, proven equal to it; a float net is written without a proof."""
    splits = run_images(run, progress)
    folder = run.folder("export")
    if run.config.federated is not None and run.config.federated.precision == "float":
        files = _export_float(run, splits, folder)
    else:
        files = _export_student(run, splits, folder, progress)
    run.complete("export", [*files, *write_beside(folder, preprocessing_of(run.config, splits))],
                 [run.path / "student" / WEIGHTS])  # fmt: skip


def _export_float(run: RunFolder, splits: Splits, folder: Path) -> list[Path]:
    net, preprocessing = load_float(run.path / "student" / WEIGHTS), preprocessing_of(run.config, splits, "student")
    made = export_float(net, example_batch(splits), folder / "student.onnx", preprocessing=preprocessing)
    return [made.path, write_facts(folder, {"student": made}, Kept([], {}))]


def _export_student(run: RunFolder, splits: Splits, folder: Path, progress: Progress) -> list[Path]:
    kept = keep_proven(run, student_files(run.config), progress)
    student, example, files, exported, reports = load_student(run), example_batch(splits), [*kept.files], {}, {}
    for name, file in student_files(run.config).items():
        preprocessing = preprocessing_of(run.config, splits, name)
        made = export_student(run.config, student, example, folder / f"{name}.onnx", file, preprocessing)
        for warning in made.warnings:
            progress.warn(f"{name}.onnx: {warning}")
        exported[name], reports[name] = made, compare_file(student, made.path, splits, run.config, progress)
        files += [made.path, write_parity(folder, name, reports[name])]
    files.append(write_facts(folder, exported, kept))
    write_json(folder / "cost.json", cost_of_file(folder / "student.onnx").to_json())
    write_json(folder / "layers.json", {"layers": layer_rows(student, reports["student"])})
    for name, report in reports.items():
        judge_file(name, report, progress)
    sample = write_run_sample(folder, {"student": student}, splits, preprocessing_of(run.config, splits))
    return [*files, folder / "cost.json", folder / "layers.json", sample]


FEDERATED: Mapping[str, Callable[[RunFolder, Progress], None]] = {"federate": train, "export": export}
