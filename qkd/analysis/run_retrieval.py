"""What ``qkd retrieve`` does: score the features of a run's nets by how well test images find training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from qkd.analysis.outputs import read_outputs, some_images
from qkd.analysis.retrieval import METRICS, TOP, Compat, RetrievalScores, score_retrieval
from qkd.data.splits import Split
from qkd.failures import UsageError
from qkd.progress import Progress
from qkd.report.table import align
from qkd.roles.guide import load_taught
from qkd.roles.images import stored_images
from qkd.roles.nets import load_student, load_teacher
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.run.target import require_run_folder
from qkd.seeding import stream
from qkd.training import cpu_threads
from qkd.training.assembly import WEIGHTS
from qkd.training.precision import choose_device
from qkd.units import percent
from quantizers import Student

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = ("teacher", "student")
HEAD = ["role", "metric", "mAP, 11 points", f"top-{TOP}", "average precision"]


@dataclass(frozen=True)
class RetrievalReport:
    """What ``qkd retrieve`` found.

    Args:
        name: Of the run.
        tap: Module path; None: the input of the last linear layer.
        compat: How precision was interpolated.
        database: Training images.
        queries: Test images.
        sizes: Role -> features per image.
        scores: Role -> metric -> scores.
    """

    name: str
    tap: str | None
    compat: Compat
    database: int
    queries: int
    sizes: Mapping[str, int]
    scores: Mapping[str, Mapping[str, RetrievalScores]]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "name": self.name,
            "tap": self.tap,
            "compat": self.compat,
            "database": self.database,
            "queries": self.queries,
            "roles": {
                role: {
                    "features": self.sizes[role],
                    **{metric: scores.to_json() for metric, scores in rows.items()},
                }
                for role, rows in self.scores.items()
            },
        }

    def to_text(self) -> str:
        """Return a table, one row per net and metric."""
        where = "the input of the last linear layer" if self.tap is None else f"the output of {self.tap}"
        sizes = ", ".join(f"{role} {size:,}" for role, size in self.sizes.items())
        lines = [
            f"{self.name}: {self.queries:,} test images are matched against {self.database:,} training images "
            f"(without augmentation), by {where} ({sizes} values)"
        ]
        rows = [[role, metric, *(percent(value) for value in scores.to_json().values())]
                for role, found in self.scores.items() for metric, scores in found.items()]  # fmt: skip
        top = min(TOP, self.database)
        lines.append(align([[cell.replace(f"top-{TOP}", f"top-{top}") for cell in HEAD], *rows]))
        if top == self.database:
            lines.append(f"note: top-{top} covers the whole database, so it only shows the classes' shares of it")
        if self.compat == "released":
            lines.append(
                "scored as the released program does: interpolated up to rank 128, precision at the nearest recall"
            )
        return "\n".join(lines)


def retrieve_target(
    target: str,
    *,
    runs_dir: Path,
    role: Role | None = None,
    tap: str | None = None,
    compat: Compat = "correct",
    limit: int | None = None,
    queries: int | None = None,
    progress: Progress,
) -> RetrievalReport:
    """Return how well features of a run's nets find images of a class.

    The database are training images without augmentation (without those kept for validation), the queries test images.

    Args:
        target: A run folder, or the name of one in ``runs_dir``.
        runs_dir: Folder of run folders.
        role: Whose features; None: of every net that the run has.
        tap: Module path (of the float net) whose output to read; None: the input of the last linear layer.
        compat: ``released``: see :func:`qkd.analysis.retrieval.score_retrieval`.
        limit: At most this many images in the database (stratified, seeded); None: all.
        queries: At most this many queries, likewise.
        progress: Counts images.

    Raises:
        UsageError: If there is no such run, it has no such net yet, or a number is out of range.
        ValueError: If data or weights cannot be used, or the tap names no module.
    """
    for option, value in (("--limit", limit), ("--queries", queries)):
        if value is not None and value < 1:
            raise UsageError(f"{option} must be at least 1, got {value}")
    folder = require_run_folder(target, runs_dir)
    run = RunFolder(stored_config(folder), folder)
    roles = _roles(folder, role)
    with cpu_threads(run.config.threads):
        return _retrieve(run, roles, tap, compat, limit, queries, progress)


def _roles(folder: Path, role: Role | None) -> tuple[Role, ...]:
    there = tuple(one for one in ROLES if (folder / one / WEIGHTS).is_file())
    if not there:
        raise UsageError(f"{folder} has no trained net yet: run `qkd teacher` or `qkd distill` with its config first")
    if role is None:
        return there
    if role not in there:
        raise UsageError(f"{folder} has no {role} yet, only a {there[0]}: run `qkd distill` with its config first")
    return (role,)


def _retrieve(
    run: RunFolder,
    roles: Sequence[Role],
    tap: str | None,
    compat: Compat,
    limit: int | None,
    queries: int | None,
    progress: Progress,
) -> RetrievalReport:
    reader = _Reader(run, tap, limit, queries, progress)
    sizes: dict[str, int] = {}
    scores: dict[str, dict[str, RetrievalScores]] = {}
    for role in roles:
        database, asked = reader.read(role)
        sizes[role] = database[0].shape[1]
        with progress.track(len(METRICS) * len(asked[0]), f"{role}, ranks", "queries") as tracker:
            scores[role] = {
                metric: score_retrieval(*database, *asked, metric=metric, compat=compat, done=tracker.update)
                for metric in METRICS
            }
    database_size, query_count = (len(reader.places[name]) for name in ("database", "queries"))
    return RetrievalReport(run.config.name, tap, compat, database_size, query_count, sizes, scores)


class _Reader:
    """Reads features of a run's nets: of the database, and of the queries."""

    def __init__(
        self, run: RunFolder, tap: str | None, limit: int | None, queries: int | None, progress: Progress
    ) -> None:
        self.run, self.tap, self.progress = run, tap, progress
        self.device = choose_device(run.config.device)
        self.splits = stored_images(run.config, run.path)
        self.parts: dict[str, Split] = {"database": self.splits.train, "queries": self.splits.test}
        self.places = {
            name: some_images(split, most, stream(run.config.seed, "retrieve", name))
            for (name, split), most in zip(self.parts.items(), (limit, queries), strict=True)
        }

    def read(self, role: Role) -> list[tuple[Tensor, Tensor]]:
        """Return features (one row per image) and labels of the database and of the queries."""
        net = self._teacher() if role == "teacher" else load_student(self.run)
        net.to(self.device)
        return [self._features(role, net, name) for name in self.parts]

    def _teacher(self) -> nn.Module:
        """Return the teacher as its student last saw it; an ensemble has no features, so its first member."""
        taught = load_taught(self.run)
        return load_teacher(self.run) if taught is None else taught

    def _features(self, role: Role, net: nn.Module, name: str) -> tuple[Tensor, Tensor]:
        paths = net.tap_paths if isinstance(net, Student) else None
        with self.progress.track(len(self.places[name]), f"{role}, {name}", "images") as tracker:
            found = read_outputs(
                net, self.parts[name], self.splits, self.run.config.data, self.device,
                indices=self.places[name], tap=self.tap, tap_paths=paths, role=role, tracker=tracker,
            )  # fmt: skip
        if found.features is None:
            raise UsageError(f"the {role} has no linear layer; name a module whose output to read (--tap)")
        return found.features.flatten(1).to(self.device), found.labels.to(self.device)
