"""What ``qkd match`` does: propose which teacher layer each student layer should follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qkd.analysis.matching import LayerMatch, class_information, flow_divergence, match_layers
from qkd.analysis.outputs import read_outputs, some_images
from qkd.failures import UsageError
from qkd.nets import build_net
from qkd.nets.branches import stage_names
from qkd.progress import Progress
from qkd.report.table import align
from qkd.roles.guide import Followed, load_followed
from qkd.roles.images import stored_images
from qkd.roles.nets import load_float_twin, load_student, sizes_of
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.run.target import require_run_folder
from qkd.seeding import stream
from qkd.terms.taps import Taps, tap_paths_of, why_no_features
from qkd.training import cpu_threads
from qkd.training.assembly import WEIGHTS
from qkd.training.precision import choose_device
from qkd.units import percent

DEFAULT_LIMIT = 2000  # a first layer has some 10,000 features per image
POOLED = "flatten"  # module path of the pooled features in this toolkit's residual nets


@dataclass(frozen=True)
class MatchReport:
    """What ``qkd match`` found.

    Args:
        name: Of the run.
        images: Training images that were read.
        student: Which form of it: ``low-bit`` or ``float``.
        teacher: Description of what the student follows.
        flows: Role -> tap -> information about the class.
        matches: The proposal, one line per layer of the student.
        note: What is not final about the followed net.
    """

    name: str
    images: int
    student: str
    teacher: str
    flows: Mapping[str, Mapping[str, float]]
    matches: tuple[LayerMatch, ...]
    note: str = ""

    @property
    def taps(self) -> list[list[str]]:
        """Return the pairs in the form of a loss term."""
        return [[one.student, one.teacher] for one in self.matches]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "name": self.name,
            "images": self.images,
            "student": self.student,
            "teacher": self.teacher,
            "information": {role: dict(flow) for role, flow in self.flows.items()},
            "matches": [asdict(one) for one in self.matches],
            "divergence": flow_divergence(self.matches),
            "taps": self.taps,
            "note": self.note,
        }

    def to_text(self) -> str:
        """Return a table of layers, one of pairs, and the pairs in the form of a config."""
        rows = [[role, tap, percent(value)] for role, flow in self.flows.items() for tap, value in flow.items()]
        pairs = ", ".join(f"[{student}, {teacher}]" for student, teacher in self.taps)
        return "\n".join([
            f"{self.name}: how well each layer tells the classes apart ({self.student} student, teacher: "
            f"{self.teacher}), by the nearest class mean on {self.images:,} training images (without augmentation; "
            f"each half scored with the means of the other)",
            align([["net", "layer", "accuracy"], *rows]),
            "each layer of the student with the teacher's nearest one, the last with the last "
            f"(sum of squared differences {flow_divergence(self.matches):.4f}):",
            f"taps: [{pairs}]",
            *([f"note: {self.note}"] if self.note else []),
        ])  # fmt: skip


def match_target(
    target: str,
    *,
    runs_dir: Path,
    student_taps: Sequence[str] | None = None,
    teacher_taps: Sequence[str] | None = None,
    limit: int = DEFAULT_LIMIT,
    progress: Progress,
) -> MatchReport:
    """Return which layer of its teacher (or auxiliary) each student layer should follow, by what they say.

    Args:
        target: A run folder, or the name of one in ``runs_dir``.
        runs_dir: Folder of run folders.
        student_taps: Module paths (of the float net), from the input to the output; None: the stages of a residual
            net, and its pooled features.
        teacher_taps: Likewise, of the teacher.
        limit: At most this many training images (stratified, seeded).
        progress: Counts images.

    Raises:
        UsageError: If there is no such run, it lacks a net, a number is out of range, or taps must be named.
        ValueError: If data or weights cannot be used, or a tap names no module.
    """
    if limit < 1:
        raise UsageError(f"--limit must be at least 1, got {limit}")
    folder = require_run_folder(target, runs_dir)
    run = RunFolder(stored_config(folder), folder)
    with cpu_threads(run.config.threads):
        teacher, (student, form) = _followed(run), _student(run)
        reader = _Reader(run, limit, progress)
        sides = {
            "student": (student, reader.taps("student", student, run.config.student_net, student_taps)),
            "teacher": (teacher.model, reader.taps("teacher", teacher.model, teacher.net, teacher_taps)),
        }
        flows = {role: reader.flow(role, *side) for role, side in sides.items()}
        matches = match_layers(*flows.values())
        return MatchReport(run.config.name, len(reader.places), form, teacher.words, flows, matches, teacher.note)


def _followed(run: RunFolder) -> Followed:
    if run.config.federated is not None:
        raise UsageError(f"{run.path}: a federated run has no teacher to match layers with")
    if not (run.path / "teacher" / WEIGHTS).is_file():
        raise UsageError(f"{run.path} has no teacher yet: run `qkd teacher` with its config first")
    followed = load_followed(run)
    if why_no_features(followed.model):
        why = f" ({followed.note})" if followed.note else ""
        raise UsageError(f"{run.path}: {followed.words}, has no layers to follow{why}")
    return followed


def _student(run: RunFolder) -> tuple[nn.Module, str]:
    if (run.path / "student" / WEIGHTS).is_file():
        return load_student(run), "low-bit"
    has_own = (run.path / "student" / "float" / WEIGHTS).is_file()
    twin = load_float_twin(run) if has_own else None
    if twin is None:
        raise UsageError(
            f"{run.path} has no student yet: run `qkd distill` with its config first "
            f"(with one loss for now; the float student that it trains first is enough)"
        )
    return twin, "float"


class _Reader:
    """Measures what layers of a run's nets say about the class, on the same training images."""

    def __init__(self, run: RunFolder, limit: int, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.device = choose_device(run.config.device)
        self.splits = stored_images(run.config, run.path)
        self.places = some_images(self.splits.train, limit, stream(run.config.seed, "match", "images"))

    def taps(self, role: str, net: nn.Module, name: str, taps: Sequence[str] | None) -> tuple[str, ...]:
        """Return the taps of a role's net, all there; without any named, those of its kind of net (``qkd ls nets``)."""
        names = self._default_taps(role, name) if taps is None else tuple(taps)
        Taps(net, names, translate=tap_paths_of(net), role=role)  # before any image is read: is each a module?
        return names

    def flow(self, role: str, net: nn.Module, names: Sequence[str]) -> dict[str, float]:
        """Return tap -> information of a role's net."""
        paths = tap_paths_of(net)
        net.to(self.device)
        found = {}
        with self.progress.track(len(names) * len(self.places), f"{role}, layers", "images") as tracker:
            for tap in names:  # one at a time: features of all layers at once would be gigabytes
                read = read_outputs(
                    net, self.splits.train, self.splits, self.run.config.data, self.device,
                    indices=self.places, tap=tap, tap_paths=paths, role=role, tracker=tracker,
                )  # fmt: skip
                if read.features is not None:  # always, of a tap that is named
                    found[tap] = class_information(read.features.to(self.device), read.labels.to(self.device))
        return found

    def _default_taps(self, role: str, name: str) -> tuple[str, ...]:
        net = build_net(name, **sizes_of(self.splits))
        stages = stage_names(net)
        if not stages:
            some = ", ".join([path for path, _ in net.named_modules() if path][:8])
            raise UsageError(f"name the {role}'s layers, from input to output (--{role}-taps); {name} has {some}, ...")
        return (*stages, POOLED)
