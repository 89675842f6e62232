"""Stages in order: skipped where complete, refused where something is missing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from qkd.cli import STAGE_NAMES
from qkd.config.binding import bind
from qkd.failures import UsageError
from qkd.files.yaml_text import parse_yaml
from qkd.pipeline.running import NEEDS, Stage, has_begun, run_stages
from qkd.progress import Progress
from qkd.run.folder import RunFolder
from qkd.training.checkpoint import Checkpoint, CheckpointStore

CONFIG = parse_yaml(
    "name: small\ndata: {name: digits}\nteacher: {net: resnet8, train: {epochs: 1}}\n"
    "student: {quant: {weight_bits: 2, act_bits: 2}, train: {epochs: 1}}\n"
)


class Recorder:
    """Stages that write one file each and remember the order."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def stage(self, name: str) -> Stage:
        def run(folder: RunFolder, progress: Progress) -> None:
            self.ran.append(name)
            file = folder.folder(name) / "made"
            file.write_text(name)
            inputs = [folder.path / need / "made" for need in NEEDS[name]]
            folder.complete(name, [file], inputs)

        return run

    def stages(self) -> dict[str, Stage]:
        return {name: self.stage(name) for name in STAGE_NAMES}


def run_all(path: Path, recorder: Recorder, names: tuple[str, ...] = STAGE_NAMES) -> str:
    stream = io.StringIO()
    with RunFolder.open(bind(CONFIG), runs_dir=path) as run:
        run_stages(run, names, Progress(stream), recorder.stages())
    return stream.getvalue()


def test_stages_run_once_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    run_all(tmp_path, recorder)
    assert recorder.ran == list(STAGE_NAMES)
    text = run_all(tmp_path, recorder)
    assert recorder.ran == list(STAGE_NAMES)
    assert text.count("already complete") == len(STAGE_NAMES)


def test_a_change_runs_the_stage_and_what_follows_from_it(tmp_path: Path) -> None:
    recorder = Recorder()
    run_all(tmp_path, recorder)
    (tmp_path / "small" / "distill" / "made").write_text("changed")
    text = run_all(tmp_path, recorder)
    assert recorder.ran[len(STAGE_NAMES) :] == ["distill"], "it was made again unchanged: what follows still holds"
    assert "distill: distill/made has changed" in text


def test_a_single_stage_needs_the_earlier_ones(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(
        UsageError, match=r"teacher \(not run\), search \(not run\); run `qkd run .*small --until search`"
    ):
        run_all(tmp_path, recorder, ("distill",))
    run_all(tmp_path, recorder, ("teacher",))
    run_all(tmp_path, recorder, ("search",))
    run_all(tmp_path, recorder, ("distill",))
    assert recorder.ran == ["teacher", "search", "distill"]


def test_every_stage_is_known_everywhere() -> None:
    from qkd.stages import STAGES

    assert list(STAGES) == list(NEEDS) == list(STAGE_NAMES)


def test_a_training_has_begun_with_its_first_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not has_begun(folder, "distill")
    (folder / "teacher" / "checkpoint").mkdir(parents=True)
    assert not has_begun(folder, "distill") and has_begun(folder, "teacher")
    (folder / "student" / "widths-0" / "checkpoint").mkdir(parents=True)
    assert has_begun(folder, "distill")
    run_all(tmp_path, Recorder())
    assert has_begun(tmp_path / bind(CONFIG).name, "distill")


@pytest.mark.parametrize("is_kept", [False, True])
def test_checkpoints_that_a_kill_left_behind_are_deleted(tmp_path: Path, is_kept: bool) -> None:  # noqa: FBT001
    """Right after its manifest, a stage is complete and its checkpoints are still there."""
    recorder = Recorder()
    run_all(tmp_path, recorder)
    config = bind(CONFIG)
    place = tmp_path / config.name / "student" / "checkpoint"
    CheckpointStore(place, warn=lambda _: None).save(1, Checkpoint({"w": torch.ones(2)}, {}))
    if is_kept:
        train = config.student.train.model_copy(update={"keep_checkpoint": True})
        config = config.model_copy(update={"student": config.student.model_copy(update={"train": train})})
    with RunFolder.open(config, runs_dir=tmp_path) as run:
        run_stages(run, STAGE_NAMES, Progress(io.StringIO()), recorder.stages())
    assert place.exists() == is_kept
