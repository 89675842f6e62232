"""Run the stages of an experiment in order, skipping those that are complete."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from qkd.config import RunConfig
from qkd.engines.engine import current
from qkd.failures import ConfigError, UsageError
from qkd.files import read_json
from qkd.progress import Progress
from qkd.roles.stored import changed_sources, described_otherwise
from qkd.run.folder import RunFolder, manifest_of

Stage: TypeAlias = Callable[[RunFolder, Progress], None]

NEEDS: Mapping[str, tuple[str, ...]] = {
    "teacher": (),
    "search": (),
    "distill": ("teacher", "search"),
    "export": ("teacher", "distill"),
    "bench": ("export",),
    "report": ("teacher", "search", "distill", "export", "bench"),
}


TRAINS = ("teacher", "search", "distill")  # stages that several devices share; the first process runs the others
FOLDERS = {"teacher": ("teacher",), "distill": ("student", "generator")}  # with the checkpoints of a stage's trainings
LOOKS = ("teacher", "search", "distill", "export")  # stages that load the images and check them themselves


def refuse_clients(config: RunConfig) -> None:
    """Raise if a config is for federated training, which has different stages.

    Raises:
        UsageError: If it has a section ``federated``.
    """
    if config.federated is not None:
        raise UsageError(f"{config.name}: the config has a section `federated`: use `qkd federate`")


def look_ahead(
    config: RunConfig, folder: Path, names: Sequence[str], check_files: Callable[[], object], progress: Progress
) -> None:
    """Find faults that would otherwise show late: missing files, and phases that cannot be trained.

    Args:
        config: The experiment.
        folder: Its run folder, which need not exist.
        names: The stages that are to run.
        check_files: Raises a ``ConfigError`` if the config names a file that does not exist.
        progress: Where to say that training is tried.

    Raises:
        ConfigError: If a new run's files are missing.
        ValueError: And others of :func:`qkd.pipeline.dryrun.check_distillation`.
    """
    try:
        check_files()
    except ConfigError:  # a run that exists may not need the file anymore
        if folder.exists():
            return
        raise
    if "distill" in names and not has_begun(folder, "distill"):
        from qkd.pipeline.dryrun import check_distillation  # imports torchvision, Brevitas and ONNX

        check_distillation(config, progress)


def run_stages(
    run: RunFolder, names: Sequence[str], progress: Progress, stages: Mapping[str, Stage] | None = None
) -> None:
    """Run stages in the given order, skipping those that are complete.

    The data set is compared once with the one that the run was started with: by the first stage, or before it if that
    stage is complete or reads no images. If several processes train, all of them call this.

    Args:
        run: The run folder, open.
        names: Which stages; those that they need must be complete or among them.
        progress: Reports which stage runs.
        stages: Name -> stage; the toolkit's own if None (others bring their own images, if any).

    Raises:
        qkd.data.DataError: If the data set is not the one that the run was started with.
        UsageError: If a stage needs one that is neither complete nor requested.
        ValueError: If a file of the run cannot be written under its name.
        OSError: If a file of the run or of the data set cannot be read or written.
    """
    engine = current()
    for index, name in enumerate(names):
        looks = stages is None and index == 0
        reason = engine.first(lambda name=name, looks=looks: _why_to_run(run, name, progress, looks=looks))  # type: ignore[misc]
        if not reason:
            progress.stage(name, "already complete")
            continue
        progress.stage(name, "" if reason == "not run" else reason)
        stage = (stages or _own_stages())[name]
        if name in TRAINS:
            stage(run, progress)
        else:
            engine.first(lambda stage=stage: stage(run, progress))  # type: ignore[misc]
        engine.wait()


def _why_to_run(run: RunFolder, name: str, progress: Progress, *, looks: bool) -> str:
    """Return why a stage is not complete; empty if it is. With ``looks``, check the images if the stage will not."""
    _require(run, name)
    reason = _why_incomplete(run, name)
    target = _target_without_proof(run) if name == "export" and not reason else ""
    if target:
        from export.targets.sessions import unusable  # imports onnx

        missing = unusable(target)
        reason = "" if missing else f"{target} is installed now, and has not run student.{target}.onnx yet"
    if looks and not (reason and name in LOOKS):
        _check_images(run, progress)
    if not reason:
        _drop_leftovers(run, name)
        if target:
            progress.warn(f"student.{target}.onnx: {missing}, so only ONNX Runtime ran the file")
        if name == "bench":
            from qkd.report.findings.measurements import failed_devices

            for failure in failed_devices(run.path):
                progress.warn(failure)
        if name == "teacher" and (warning := changed_sources(run.path, run.config)):
            progress.warn(warning)
    return reason


def _why_incomplete(run: RunFolder, name: str) -> str:
    """Return why a stage is not complete; the search also if it describes a schedule that nobody will train by,
    the measurement also if its devices have other entries in the devices file."""
    reason = run.why_incomplete(name)
    if not reason and name == "bench":
        from qkd.bench.device_file import changed_device  # needed only where a run has measured
        from qkd.report.findings.measurements import replaced_record

        changed = changed_device(run.path / "bench", run.config.bench.on, run.config.bench.devices)
        reason = changed or replaced_record(run.path)
    if not reason and name == "search" and not run.is_complete("distill"):
        reason = described_otherwise(run.path, run.config)
    return reason


def _target_without_proof(run: RunFolder) -> str:
    """Return the target of the run's export if its runtime has never run the file; empty if it has, or cannot."""
    target = run.config.export.chosen_target
    if target is None or target.is_onnxruntime:
        return ""
    from export.targets.sessions import SESSIONS  # imports onnx

    try:
        parity = read_json(run.path / "export" / f"parity.{target.name}.json")
    except (OSError, ValueError):
        return ""
    is_record = isinstance(parity, Mapping)  # a damaged one is reported by its reader
    return target.name if target.name in SESSIONS and is_record and parity.get("runtime") is None else ""


def has_begun(folder: Path, name: str) -> bool:
    """Return whether a run folder holds a complete stage of a name, or a checkpoint of one of its trainings.

    Args:
        folder: The run folder; it need not exist.
        name: A stage that trains.
    """
    if manifest_of(folder, name).is_file():
        return True
    return any(place for one in FOLDERS.get(name, ()) for place in (folder / one).rglob("checkpoint"))


def _drop_leftovers(run: RunFolder, name: str) -> None:
    """Delete the checkpoints of a complete stage, which a kill right after its last file has left behind."""
    left = [place for folder in FOLDERS.get(name, ()) for place in (run.path / folder).rglob("checkpoint")]
    if left and not _keeps_checkpoint(run.config.model_dump()):
        from qkd.training.checkpoint import CheckpointStore  # imports torch

        for place in left:
            CheckpointStore(place, warn=lambda _: None).clear()


def _keeps_checkpoint(section: Any) -> bool:
    """Return whether the last checkpoint of some training is to be kept."""
    if isinstance(section, Mapping):
        return bool(section.get("keep_checkpoint")) or any(map(_keeps_checkpoint, section.values()))
    return isinstance(section, list | tuple) and any(map(_keeps_checkpoint, section))


def _own_stages() -> Mapping[str, Stage]:
    from qkd.stages import STAGES  # imports torchvision, Brevitas and ONNX: only if a stage runs

    return STAGES


def _check_images(run: RunFolder, progress: Progress) -> None:
    from qkd.roles.images import check_images

    check_images(run, progress)


def _require(run: RunFolder, name: str) -> None:
    missing = {need: why for need in NEEDS[name] if (why := _why_incomplete(run, need))}
    if missing:
        found = ", ".join(f"{need} ({why})" for need, why in missing.items())
        first = f"qkd run {shlex.quote(str(run.path))} --until {[*missing][-1]}"
        raise UsageError(
            f"stage {name} of {run.path} needs the results of earlier stages: {found}; run `{first}` (complete stages "
            f"are kept), or omit --until to run all stages"
        )
