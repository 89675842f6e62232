"""A pool of inverted images on disk: one file per batch, made in order, so that an interrupted pool can resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from qkd.config import AgentConfig
from qkd.config.data_free import DataFreeConfig
from qkd.data import Splits
from qkd.files import make_folder, read_json, write_json, write_text
from qkd.methods.data_free.inverting.contrast import BANK as MOST_PAIRS
from qkd.methods.data_free.inverting.contrast import Contrast
from qkd.methods.data_free.inverting.inversions import DataImpressions, DeepInversion, Inversion, Inverted
from qkd.methods.data_free.making.blind import sightless
from qkd.methods.data_free.making.generating import NAME, judged, logits_of, origin_settings, teacher_marks
from qkd.methods.data_free.making.kinds import KINDS
from qkd.methods.data_free.making.samples import SHOWN, read_arrays, to_pixels, write_arrays, write_sample
from qkd.methods.data_free.making.watching import Watched
from qkd.roles.guide import guide_of, load_guide
from qkd.training import FitResult
from qkd.training.assembly import Context, Made

FOLDER = "pool"  # in the generator's folder
BANKS = ("bank_local", "bank_global")  # features of earlier batches for the next ones
_STATE = "state/"
INVERSIONS: Mapping[str, Callable[[Watched, DataFreeConfig, Splits, int, torch.device], Inversion]] = {
    "deep_inversion": DeepInversion,
    "zskd": DataImpressions,
    "cmi": Contrast,
}


class BatchFiles:
    """The files of a pool's batches: images, and the state for the next batch.

    Args:
        place: Folder of the files.
        count: Final number of files.
    """

    def __init__(self, place: Path, count: int) -> None:
        self.place = place
        self.files = [place / f"batch_{index:05d}.npz" for index in range(count)]

    def write(self, index: int, made: Inverted, **facts: Any) -> None:
        """Write a batch atomically."""
        state = {_STATE + name: array for name, array in made.state.items()}
        write_arrays(self.files[index], images=made.images.cpu().numpy(), loss=np.float64(made.loss), **facts, **state)

    def state(self, index: int) -> dict[str, np.ndarray]:
        """Return the state that a batch continues from, always read from files: the last state and latest features."""
        files = self.files[:index]
        last = _state_of(files[-1]) if files else {}
        if not set(BANKS) <= set(last):
            return last
        states: list[dict[str, np.ndarray]] = []
        while files and sum(len(state[BANKS[0]]) for state in states) < MOST_PAIRS:
            states.insert(0, _state_of(files.pop()))
        return {**last, **{name: np.concatenate([state[name] for state in states]) for name in BANKS}}


class PoolRole:
    """The inverted images of a run.

    Args:
        context: The run; the student's teachers are already trained.
        settings: The config's ``student.data_free``.
    """

    train = None  # no net is trained, only images

    def __init__(self, context: Context, settings: DataFreeConfig) -> None:
        self.context = Context(context.run, sightless(context.splits), context.device, context.progress)
        self.settings = settings
        self.name, self.folder, self.title = NAME, NAME, NAME
        self.batches = BatchFiles(self.place, batches_of(settings))

    @property
    def place(self) -> Path:
        """Return the folder of its batches."""
        return self.context.run.path / self.folder / FOLDER

    def agent(self) -> AgentConfig:
        """Return an agent that does nothing."""
        return AgentConfig(policy="none")

    def make(self) -> Made:
        """Load the teacher.

        Raises:
            FileNotFoundError: If the teacher does not exist yet.
            ValueError: If the teacher's file is damaged.
        """
        context = self.context
        teacher = Watched(load_guide(context.run).to(context.device))
        return Made(
            teacher.net,
            (),
            begin=lambda: None,
            save=lambda: self._save(teacher),
            score=lambda fitted: [self._score(teacher, fitted)],
            inputs=guide_of(context.run).files,
        )

    def _save(self, teacher: Watched) -> list[Path]:
        """Make the missing batches, and return all files."""
        make_folder(self.place)
        self._hold_origin()
        settings, files = self.settings, self.files()
        inversion = INVERSIONS[settings.method](
            teacher, settings, self.context.splits, self.context.config.seed, self.context.device
        )
        missing = [index for index, path in enumerate(files) if not path.exists()]
        with self.context.progress.track(len(missing), f"{settings.method}, batches", "batches") as tracker:
            for index in missing:
                self._write(inversion, index)
                tracker.update(1)
        return [*files, self._origin, *self._shown(), self._metrics(files)]

    def files(self) -> list[Path]:
        """Return the files of its batches, whether they exist or not."""
        return self.batches.files

    def _write(self, inversion: Inversion, index: int) -> None:
        started = time.monotonic()
        made = inversion(index, size_of(self.settings, index), self.batches.state(index))
        self.batches.write(index, made)
        # not in its file, which students are made from: a batch that is lost is made again, bit for bit
        write_json(self._times, {**self._seconds(), str(index): time.monotonic() - started})

    @property
    def _times(self) -> Path:
        return self.place / "seconds.json"

    def _seconds(self) -> dict[str, float]:
        """Return batch -> seconds that it took, as far as known."""
        return read_json(self._times) if self._times.is_file() else {}

    @property
    def _origin(self) -> Path:
        return self.place / "origin.json"

    def _hold_origin(self) -> None:
        """Record what the pool is made from; reject a pool that was started from something else."""
        run = self.context.run
        now: dict[str, Any] = {
            "made from": teacher_marks(run), **origin_settings(self.context.config, self.settings)
        }  # fmt: skip
        now = json.loads(json.dumps(now))
        if self._origin.is_file() and (then := read_json(self._origin)) != now:
            changed = sorted(key for key in {**then, **now} if then.get(key) != now.get(key))
            raise ValueError(
                f"{self.place}: the pool was started from something else ({', '.join(changed)}); delete the folder to "
                f"start from scratch, or give the run another name (name=...)"
            )
        write_json(self._origin, now)

    def _shown(self) -> list[Path]:
        images = load_pool(self.files()[: -(-SHOWN // self.settings.batch_size)])[:SHOWN]
        splits = self.context.splits
        return [write_sample(self.context.run.path / self.folder, 0, to_pixels(images, splits.mean, splits.std))]

    def _metrics(self, files: list[Path]) -> Path:
        rows = []
        for index, path in enumerate(files):
            arrays = read_arrays(path)
            rows.append({"batch": index, "images": len(arrays["images"]), "loss": float(cast(float, arrays["loss"]))})
        path = self.context.run.path / self.folder / "batches.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        return path

    def _score(self, teacher: Watched, fitted: FitResult | None) -> Path:  # noqa: ARG002
        logits = logits_of(teacher, load_pool(self.files()).to(self.context.device))
        path = self.context.run.path / self.folder / "result.json"
        settings = self.settings
        steps = len(self.files()) * settings.pool_steps
        within = [read_arrays(one).get("seconds", np.float64(0)) for one in self.files()]  # as older versions wrote it
        seconds = sum(self._seconds().values()) + float(np.sum(within))
        details = {"method": settings.method, "about": KINDS[settings.method].about, "steps": steps, "seconds": seconds}
        write_json(path, {"role": NAME, **details, **judged(logits)})
        return path


def batches_of(settings: DataFreeConfig) -> int:
    """Return the final number of batches of a pool."""
    return -(-settings.pool_images // settings.batch_size)


def size_of(settings: DataFreeConfig, index: int) -> int:
    """Return how many images a batch has; the last one has the remainder."""
    return min(settings.batch_size, settings.pool_images - index * settings.batch_size)


def _state_of(path: Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(path)
    return {name.removeprefix(_STATE): array for name, array in arrays.items() if name.startswith(_STATE)}


def load_pool(files: list[Path]) -> Tensor:
    """Return the images of a pool's files, normalized, float32, on the CPU.

    Raises:
        FileNotFoundError: If one does not exist yet.
        ValueError: If one is damaged.
    """
    parts = []
    for path in files:
        images = read_arrays(path).get("images")
        if images is None or images.dtype != np.float32 or images.ndim != 4:
            raise ValueError(f"{path}: not a batch of inverted images; delete it to regenerate it")
        parts.append(torch.from_numpy(images))
    return torch.cat(parts)
