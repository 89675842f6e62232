"""What ``qkd diagnose`` does: measure a teacher on its training images, and say which known failure it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkd.analysis.diagnosis import (
    REFERENCE_TEMPERATURE,
    Finding,
    Knowledge,
    class_relations,
    find_failures,
    geometry_agreement,
    teacher_knowledge,
)
from qkd.analysis.outputs import NetOutputs, last_linear, read_outputs, some_images
from qkd.config import RunConfig, TermConfig
from qkd.data import Splits, load_splits
from qkd.data.superclasses import superclasses
from qkd.failures import ConfigError, UsageError
from qkd.files import write_bytes, write_text
from qkd.losses.stable import unit_rows
from qkd.nets import build_net, load_weights
from qkd.nets.imagenet import weights_file
from qkd.nets.own.spelling import net_title
from qkd.progress import Progress
from qkd.report.records import read_metrics
from qkd.report.table import align
from qkd.report.teacher_picture import teacher_picture
from qkd.roles.guide import load_followed
from qkd.roles.images import stored_images
from qkd.roles.nets import load_student, sizes_of
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.run.target import run_folder, runs_in
from qkd.seeding import stream
from qkd.terms.rescaling import (
    DEFAULT_TEMPERATURE,
    LEAST_DOUBT,
    image_gradients,
    rescaling_facts,
    soft_targets,
    summarize,
)
from qkd.terms.taps import why_no_features
from qkd.training import cpu_threads
from qkd.training.assembly import WEIGHTS
from qkd.training.precision import choose_device
from qkd.units import percent
from quantizers.layers import QuantLinearBn

ENDINGS = (".svg", ".png")
BINS = 20
MOST_PAIR_IMAGES = 5000  # for the geometry: 100 classes have 4,851 pairs per image
SHOWN_EPOCHS = 8  # in the text; JSON and picture have all
ROWS = {
    "confidence_mean": "p_t, mean",
    "confidence_std": "p_t, std",
    "equivalent_smoothing": "equivalent label smoothing",
    "entropy": "entropy, nats",
    "instance_information": "instance information, nats",
    "relation_information": "class-relation information, nats",
    "relation_spread": "class correlations, std",
    "within_contrast": "correlation within superclasses",
    "between_contrast": "correlation between superclasses",
    "contrast": "superclass contrast",
    "uniform_share": "uniform share, median",
}
W_COLUMNS = {
    "w_mean": "mean",
    "w_std": "std",
    "w_share": f"of images with 1 - q_t >= {LEAST_DOUBT:g}",
    "w_total": "of the sum of all gradients",
}


@dataclass(frozen=True)
class Diagnosis:
    """What ``qkd diagnose`` found.

    Args:
        name: Of the experiment.
        net: What the student follows: the teacher's net; for an ensemble, an auxiliary or a co-trained
            teacher, it says so.
        images: Training images that were read.
        accuracy: Of the teacher on them, a fraction.
        plain: What it says at temperature 1.
        softened: At the temperature of the distillation.
        findings: Known failures.
        geometry: Whose layer -> share of agreeing pairs with its rows ``as_is`` and at ``unit_norm``.
        rescaling: :math:`w_t` of the finished student on these images; None without student or soft targets.
        epochs: ``epoch`` and :math:`w_t` in each epoch of the student's training, as far as logged.
        notes: What could not be determined, and why.
        files: What was written.
    """

    name: str
    net: str
    images: int
    accuracy: float
    plain: Knowledge
    softened: Knowledge
    findings: tuple[Finding, ...]
    geometry: Mapping[str, Mapping[str, float]]
    rescaling: Mapping[str, float | None] | None
    epochs: tuple[Mapping[str, float | None], ...]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "name": self.name,
            "net": self.net,
            "images": self.images,
            "accuracy": self.accuracy,
            "temperatures": [self.plain.to_json(), self.softened.to_json()],
            "findings": [finding.to_json() for finding in self.findings],
            "geometry": {name: dict(row) for name, row in self.geometry.items()},
            "rescaling": None if self.rescaling is None else dict(self.rescaling),
            "epochs": [dict(row) for row in self.epochs],
            "notes": list(self.notes),
            "files": [str(path) for path in self.files],
        }

    def to_text(self) -> str:
        """Return tables, then what is wrong."""
        head = (
            f"{self.name}: teacher {self.net}, {percent(self.accuracy)} of {self.images:,} training images "
            f"right (without augmentation)"
        )
        blocks = [head, align(self._knowledge_rows())]
        if self.geometry:
            rows = [[name, "", *(percent(row[key]) for key in ("as_is", "unit_norm"))]
                    for name, row in self.geometry.items()]  # fmt: skip
            blocks.append(align([["nearer classes are likelier", "", "rows unchanged", "rows of norm 1"], *rows]))
        if self.rescaling is not None or self.epochs:
            blocks.append(align(self._rescaling_rows()))
        blocks += [f"note: {note}" for note in self.notes]
        blocks.append("\n".join(f"found: {one.sentence}" for one in self.findings) or "found: no known failure")
        return "\n\n".join([*blocks, *(f"wrote {path}" for path in self.files)])

    def _knowledge_rows(self) -> list[list[str]]:
        columns = (self.plain.to_json(), self.softened.to_json())
        rows = [["soft targets at temperature", "", *(f"{column['temperature']:g}" for column in columns)]]
        for name, words in ROWS.items():
            values = [column[name] for column in columns]
            if None not in values:
                rows.append([words, "", *(f"{value:.4g}" for value in values)])
        return rows

    def _rescaling_rows(self) -> list[list[str]]:
        rows = [["gradient re-scaling w_t", "", *W_COLUMNS.values()]]
        step = max(1, -(-len(self.epochs) // SHOWN_EPOCHS))
        shown = [row for index, row in enumerate(self.epochs) if (len(self.epochs) - 1 - index) % step == 0]
        rows += [[f"epoch {row['epoch']:.0f}", "", *_w_cells(row)] for row in shown]
        if self.rescaling is not None:
            rows.append(["finished student", "", *_w_cells(self.rescaling)])
        return rows


def _w_cells(row: Mapping[str, float | None]) -> list[str]:
    values = [(name, row[name]) for name in W_COLUMNS]
    return [percent(value) if name == "w_share" else "-" if value is None else f"{value:.3f}" for name, value in values]


def diagnose_target(
    target: str,
    *,
    runs_dir: Path,
    overrides: Sequence[str],
    load: Callable[[], RunConfig],
    limit: int | None = None,
    temperature: float | None = None,
    out: Path | None = None,
    progress: Progress,
) -> Diagnosis:
    """Return what a run's (or a config's) teacher says, and draw it if requested.

    Training images are read without augmentation; test images never are.

    Args:
        target: A run folder, the name of one in ``runs_dir``, or a config: its run in ``runs_dir``, or the teacher's
            weights that it names.
        runs_dir: Folder of run folders.
        overrides: ``key=value``, for a config only.
        load: Loads the config.
        limit: At most this many images (stratified, seeded); None: all.
        temperature: Of the distillation; None: the one of the config's terms.
        out: ``.svg`` or ``.png`` file.
        progress: Counts images.

    Raises:
        UsageError: If a run is given overrides, there is no trained teacher, ``out`` has another ending, or a number
            is out of range.
        ValueError: If data or weights cannot be used.
        FileNotFoundError: If a run has no teacher yet.
        OSError: If ``out`` cannot be written.
    """
    if out is not None and out.suffix not in ENDINGS:
        raise UsageError(f"--out must end in .svg or .png, got {out}")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"--out: there is no folder {out.parent}; create it, or name another")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise UsageError(f"--temperature must be positive and finite, got {temperature}")
    if limit is not None and limit < 2:
        raise UsageError(f"--limit must be at least 2, got {limit}")
    folder = run_folder(target, runs_dir)
    if folder is not None and overrides:
        raise UsageError(f"{target} is not a config, so {overrides[0]} has nothing to change; name a config instead")
    config = _loaded(target, runs_dir, load) if folder is None else stored_config(folder)
    folder = _matching_run(config, runs_dir) if folder is None else folder
    if config.federated is not None:
        raise UsageError(f"{target}: a federated run has no teacher to diagnose")
    with cpu_threads(config.threads):
        return _Subject(config, folder, limit, temperature, progress).diagnose(out)


def _loaded(target: str, runs_dir: Path, load: Callable[[], RunConfig]) -> RunConfig:
    try:
        return load()
    except ConfigError as error:
        if Path(target).is_file():  # a config with faults
            raise
        raise UsageError(f"{error}; nor is it a run: {runs_in(runs_dir)}") from error


class _Subject:
    """The nets of one experiment, and the images to measure them on."""

    def __init__(
        self, config: RunConfig, folder: Path | None, limit: int | None, temperature: float | None, progress: Progress
    ) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.device = choose_device(config.device)
        self.splits: Splits = (
            load_splits(config.data, seed=config.seed) if folder is None else stored_images(config, folder)
        )
        generator = stream(config.seed, "diagnose", "images")
        self.indices = some_images(self.splits.train, limit, generator)
        self.targets = soft_targets(_terms(config))
        own = DEFAULT_TEMPERATURE if self.targets is None else self.targets.temperature
        self.temperature = own if temperature is None else temperature
        self.groups = superclasses(self.splits.classes)
        self.notes: list[str] = []
        self._is_teacher = False

    def diagnose(self, out: Path | None) -> Diagnosis:
        teacher, net = self._teacher()
        told = self._read(teacher, "teacher", {})
        logits, labels = told.logits.double(), told.labels
        plain, reference, softened = (
            teacher_knowledge(logits, labels, temperature=value, superclasses=self.groups)
            for value in (1.0, REFERENCE_TEMPERATURE, self.temperature)
        )
        geometry = self._geometry("teacher", teacher, told, told.logits)
        rescaling = self._student(told, geometry)
        diagnosis = Diagnosis(
            name=self.config.name,
            net=net,
            images=len(labels),
            accuracy=float((logits.argmax(1) == labels).double().mean()),
            plain=plain,
            softened=softened,
            findings=find_failures(plain, reference, softened, label_smoothing=self._smoothing()),
            geometry=geometry,
            rescaling=rescaling,
            epochs=self._epochs(),
            notes=tuple(self.notes),
            files=() if out is None else (out,),
        )
        if out is not None:
            self._draw(diagnosis, logits, labels, out)
        return diagnosis

    def _teacher(self) -> tuple[nn.Module, str]:
        """Return what the student follows (a teacher, an ensemble, an auxiliary), and its description in words."""
        if self.folder is not None:
            followed = load_followed(RunFolder(self.config, self.folder))
            self.notes += [followed.note] if followed.note else []
            self._is_teacher = followed.is_teacher
            return followed.model, followed.words
        own = self.config.teacher
        if own.train is not None or own.weights is None:
            raise UsageError(
                f"{self.config.name} has no trained teacher yet: run `qkd teacher` with this config first "
                f"(or name its run, or see --runs-dir)"
            )
        name = self.config.teacher_net
        net = build_net(name, **sizes_of(self.splits))
        load_weights(net, weights_file(own.weights, name))
        return net, net_title(name)

    def _smoothing(self) -> float | None:
        """Return what the teacher was trained with; None if unknown, as of weights that were given."""
        train = self.config.teacher.train
        return train.label_smoothing if self._is_teacher and train is not None else None

    def _read(self, model: nn.Module, role: str, tap_paths: Mapping[str, str]) -> NetOutputs:
        model.to(self.device)
        with self.progress.track(len(self.indices), f"{role}, training images", "images") as tracker:
            return read_outputs(
                model, self.splits.train, self.splits, self.config.data, self.device,
                indices=self.indices, tap_paths=tap_paths, role=role, tracker=tracker,
            )  # fmt: skip

    def _student(self, told: NetOutputs, geometry: dict[str, dict[str, float]]) -> Mapping[str, float | None] | None:
        """Add the student's geometry, and return its re-scaling of gradients, or None without a student."""
        if self.folder is None or not (self.folder / "student" / WEIGHTS).is_file():
            return None
        student = load_student(RunFolder(self.config, self.folder))
        found = self._read(student, "student", student.tap_paths)
        geometry |= self._geometry("student", student, found, told.logits)
        if self.targets is None:
            self.notes.append("the student's loss has no soft targets at its logits: no w_t")
            return None
        gradients = image_gradients(found.logits.double(), told.logits.double(), told.labels, self.targets)
        return summarize({name: float(value) for name, value in rescaling_facts(*gradients).items()})

    def _geometry(
        self, role: str, model: nn.Module, found: NetOutputs, teacher_logits: Tensor
    ) -> dict[str, dict[str, float]]:
        if len(self.splits.classes) < 3 or found.features is None or found.features.dim() != 2:
            self.notes.append(
                f"geometry of the {role}: needs 3 classes and a linear layer that reads one row per image"
            )
            return {}
        if why_no_features(model):
            self.notes.append(f"geometry of the {role}: an ensemble has no last layer")
            return {}
        part = slice(None) if len(found.labels) <= MOST_PAIR_IMAGES else _some_rows(found.labels, self.config.seed)
        features, logits, labels = found.features[part], teacher_logits[part], found.labels[part]
        return {
            name: {
                "as_is": geometry_agreement(features, weights, logits, labels),
                "unit_norm": geometry_agreement(features, unit_rows(weights), logits, labels),
            }
            for name, weights in self._last_weights(role, model).items()
        }

    def _last_weights(self, role: str, model: nn.Module) -> dict[str, Tensor]:
        """Return the last layer's weights, ``[classes, features]``; a student's both as deployed and in float."""
        example = torch.zeros(1, *self.splits.image_shape)
        layer = last_linear(model, example.to(self.device), role=role)
        if not isinstance(layer, QuantLinearBn):
            return {role: layer.weight.detach().cpu()}
        return {
            f"{role}, as deployed": layer.deployed()[0].detach().cpu(),
            f"{role}, float weights": layer.weight.detach().cpu(),
        }

    def _epochs(self) -> tuple[Mapping[str, float | None], ...]:
        """Return what the student's training logged of w_t."""
        file = None if self.folder is None else self.folder / "student" / "metrics.jsonl"
        if file is None or not file.is_file():
            return ()
        rows = [(row.get("epoch"), row.get("facts") or {}) for row in read_metrics(file)]
        found = tuple({"epoch": epoch, **summarize(facts)} for epoch, facts in rows if "w_counted" in facts)
        if rows and not found and self.targets is not None:
            self.notes.append(f"{file} has no w_t: this student was trained before it was logged")
        return found

    def _draw(self, diagnosis: Diagnosis, logits: Tensor, labels: Tensor, out: Path) -> None:
        order = list(range(logits.shape[1]))
        if self.groups is not None:
            order.sort(key=lambda label: (self.groups or ())[label])
        relations = class_relations(logits, temperature=self.temperature)[order][:, order]
        labeled = {f"temperature {value:g}": _histogram(logits, labels, value)
                    for value in (diagnosis.plain.temperature, diagnosis.softened.temperature)}  # fmt: skip
        picture = teacher_picture(
            f"{diagnosis.name}: teacher {diagnosis.net}",
            confidences=labeled,
            relations=relations.tolist(),
            relations_label=f"temperature {self.temperature:g}",
            classes=[self.splits.classes[label] for label in order],
            rescaling=diagnosis.epochs,
        )
        if out.suffix == ".svg":
            write_text(out, picture.to_svg() + "\n")
        else:
            write_bytes(out, picture.to_png())


def _matching_run(config: RunConfig, runs_dir: Path) -> Path | None:
    """Return the run of a config if it exists and has a teacher, else None.

    Raises:
        UsageError: If it exists, but with another teacher, data set or seed.
    """
    folder = run_folder(config.name, runs_dir)
    if folder is None or not (folder / "teacher" / WEIGHTS).is_file():
        return None
    stored = stored_config(folder)
    for key in ("seed", "data", "teacher"):
        if getattr(stored, key) != getattr(config, key):
            raise UsageError(
                f"{folder} holds a run with another `{key}` than this config has; name that run instead, "
                f"or give the config another name (name=...)"
            )
    return folder


def _terms(config: RunConfig) -> Sequence[TermConfig]:
    """Return the loss terms of the student's first phase with soft targets, or its own if there is none."""
    phases = [config.student.terms if phase.terms is None else phase.terms for phase in config.student.phases]
    return next((terms for terms in phases if soft_targets(terms) is not None), config.student.terms)


def _some_rows(labels: Tensor, seed: int) -> Tensor:
    return torch.randperm(len(labels), generator=stream(seed, "diagnose", "pairs"))[:MOST_PAIR_IMAGES]


def _histogram(logits: Tensor, labels: Tensor, temperature: float) -> list[int]:
    confidence = (logits / temperature).softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return torch.histc(confidence, BINS, 0.0, 1.0).long().tolist()
