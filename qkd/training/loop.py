"""The training loop: move data, augment, normalize, call the step, the optimizer and the log; resume bit for bit.

Every random draw comes from a stream named by role, epoch and step, so a checkpoint needs no generator state: the step
that follows it draws what it would have drawn anyway.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qkd.data.splits import Split
from qkd.engines.engine import agree, alone, current
from qkd.progress import Progress, Tracker
from qkd.seeding import derive
from qkd.training.arithmetic.choice import Choice, decided, unraced
from qkd.training.arithmetic.precision import choose_precision
from qkd.training.averaging import WeightAverage
from qkd.training.checkpoint import Checkpoint, CheckpointStore
from qkd.training.epochs.best import BestWeights
from qkd.training.epochs.log import EpochLog, epoch_line
from qkd.training.evaluate import accuracy
from qkd.training.finite import TrainingError, diagnose, non_finite_weights
from qkd.training.job import Batch, FitResult, Job, Moment, Phase, StepResult
from qkd.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from qkd.training.origin import asked_of, kernels_of, other_kernels, other_settings, settings_of
from qkd.training.source import source_of
from qkd.training.state import RULE, below, collect, fill, restore

SHOW_EVERY_STEPS = 10  # showing a value synchronizes a CUDA device
SMALLEST_LOSS_SCALE = 2.0**-14  # below it, float16 gradients are broken rather than too small


def fit(job: Job, progress: Progress, begin: Callable[[], None] = lambda: None) -> FitResult:
    """Train, resuming from the last good checkpoint in ``job.folder`` if there is one.

    Afterward the model has its last weights, or the averaged ones if averaging is on.

    Args:
        job: What to train and how.
        progress: Shows rate and time left.
        begin: Called if there is no checkpoint, to initialize the model (e.g. by calibration).

    Returns:
        Times and metrics.

    Raises:
        TrainingError: If loss, gradient or weights are not finite; names the step, term and layer.
        ValueError: If phases and epochs do not fit, the training set is empty, or the checkpoint was made from
            something else.
        OSError: If a checkpoint or the metrics cannot be written.
    """
    devices = [job.device] if job.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # the loop seeds the global generators (dropout) at every step
        trainer = Trainer(job, progress)
        trainer.start(begin)
        return trainer.run()


@dataclass
class _Position:
    """The position of a training; all of it is saved in checkpoints."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """A training at some step: it advances by epochs, and its whole state can be saved and restored.

    :func:`fit` runs one to its end with files; a search alternates many (``equip``, ``restore``, ``train_epoch``,
    ``state``). Callers must fork PyTorch's global generators, since each step seeds them (dropout).

    Args:
        job: What to train and how.
        progress: Where to report.

    Raises:
        ValueError: If phases and epochs do not fit, the training set is empty, or several devices cannot share a batch.
    """

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress, self.engine = job, progress, current()
        self.source = source_of(job)
        self.batch_size = min(job.data.batch_size, self.source.images)
        if self.batch_size == 0:
            raise ValueError("the training set is empty: lower data.val_fraction, or use another data set")
        self.engine.share(self.batch_size, self.source.images)  # fail here rather than at the first batch
        self.steps = self.source.images // self.batch_size
        if sum(phase.epochs for phase in job.phases) != job.config.epochs:
            raise ValueError(f"the epochs of the phases do not add up to train.epochs={job.config.epochs}")
        self._compute_as(unraced(asked_of(job)))
        self.store = CheckpointStore(job.folder / "checkpoint", progress.warn)
        self.log = EpochLog(job.folder, job.role, job.log)
        self.best = BestWeights() if job.config.keep == "best" else None
        self.at = _Position()
        self.sums: dict[str, Tensor] = {}
        self.saved_at = time.monotonic()
        self.kernels_then: object = None  # those of the checkpoint it resumes from, until they are compared

    def _compute_as(self, choice: Choice) -> None:
        self.arithmetic, self.format = choice, choice.torch_format
        self.precision, note = choose_precision(choice.precision, self.job.device)
        if note:
            self.progress.warn(note)
        self.job.model.to(memory_format=self.format)

    def start(self, begin: Callable[[], None]) -> None:
        """Restore the last good checkpoint, or start from the beginning."""
        checkpoint = self.store.load()
        seen = None if checkpoint is None else [checkpoint.state["epoch"], checkpoint.state["step"]]
        agree({"checkpoint (epoch, step)": seen, "images": self.source.images}, self.engine, self.job.role)
        if checkpoint is None:
            begin()
            self._be_alike()
        self._choose(None if checkpoint is None else checkpoint.state)
        self.equip()
        if checkpoint is None:
            self._save()
        else:
            self._require_same_origin(checkpoint.state)
            self.restore(checkpoint)
            self.kernels_then = checkpoint.state.get("kernels")
            self._say_where()
        self._write_metrics()

    def _choose(self, state: Mapping[str, Any] | None) -> None:
        choice = decided(asked_of(self.job), self.batch_size, self.source.images, state)
        is_same = (choice.precision, choice.torch_format) == (self.arithmetic.precision, self.format)
        if is_same:  # already set up, with its note shown
            self.arithmetic = choice
        else:
            self._compute_as(choice)
        if choice.step_ms:
            self.progress.say(f"{self.job.role}: {choice.told()}")

    def equip(self) -> None:
        """Build optimizer, loss scaler and averages for the model in its present state."""
        joined = [partner for partner in self.job.partners if partner.optimizer is None]
        self.optimizer = build_optimizer(self.job.model, self.job.config, self.job.scales(), joined)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(self.job.device.type, enabled=self.precision.needs_scaler)
        self.rules = self.job.rules(self.optimizer)
        decay = self.job.config.ema_decay
        self.average = WeightAverage(self.job.model, decay) if decay else None

    def run(self) -> FitResult:
        epochs = self.job.config.epochs
        left = (epochs - self.at.epoch) * self.steps - self.at.step
        if left > 0 or self.at.epoch < epochs:
            first = self.at.epoch + 1
            label = f"{self.job.role}, " + (f"epochs {first} to {epochs}" if first < epochs else f"epoch {epochs}")
            with self.progress.track(left * self.batch_size, label, "images") as tracker:
                while self.at.epoch < epochs:
                    self.train_epoch(tracker)
                    self._save()
                    self._write_metrics()
        if self.average is not None:
            self.average.copy_to(self.job.model)
        if self.best is not None and self.best.epoch is not None:
            fill(self.job.model, self.best.tensors)
            self._renew_statistics(self.best.epoch)
        seconds = max(self.at.seconds, 1e-9)
        images = epochs * self.steps * self.batch_size
        kept = None if self.best is None else self.best.epoch
        return FitResult(epochs, self.at.seconds, images / seconds, tuple(self.at.rows), kept)

    def _renew_statistics(self, epoch: int) -> None:
        """Give the weights of an epoch, from 1, the statistics that a later phase began with for its own."""
        first = 0
        for phase in self.job.phases:
            if phase.renews_statistics and epoch <= first:
                phase.begin()
                return
            first += phase.epochs

    def train_epoch(self, tracker: Tracker) -> None:
        """Train to the end of the current epoch, and score the validation images, if there are any.

        Raises:
            TrainingError: If loss, gradient or weights are not finite.
        """
        job, at = self.job, self.at
        phase, first = self._phase_and_first_epoch()
        job.model.train()
        phase.enter()
        if (at.epoch, at.step) == (first, 0):
            phase.begin()
            if phase.renews_statistics and self.average is not None:
                self.average.renew_statistics(job.model)
        with phase.hold(), self.engine.training(self._nets()):
            self._steps(phase, self.source.batches(at.epoch, at.step, self.batch_size), tracker)
        self._be_alike()  # with unsynchronized batch norm, the first process's running statistics are used
        lr = phase.lr_factor * learning_rate(job.config, (at.epoch + 1) * self.steps - 1, self.steps)
        at.rows.append(self._row(phase, lr))
        self._offer(at.rows[-1]["val_accuracy"])
        shown = {name: at.rows[-1][name] for name in ("train_accuracy", "val_accuracy")}
        tracker.update(0, **{name: value for name, value in shown.items() if value is not None})
        self.progress.epoch(tracker, epoch_line(job.role, at.rows[-1], job.config.epochs))
        at.epoch, at.step, at.epoch_seconds, self.sums = at.epoch + 1, 0, 0.0, {}

    def _steps(self, phase: Phase, batches: Iterable[Batch], tracker: Tracker) -> None:
        clock = time.monotonic()
        for batch in batches:
            loss = self._step(phase, replace(batch, images=batch.images.contiguous(memory_format=self.format)))
            self.at.step += 1
            self._tell_of_other_kernels()
            now = time.monotonic()
            self.at.epoch_seconds += now - clock
            self.at.seconds += now - clock
            show = self.at.step % SHOW_EVERY_STEPS == 0
            tracker.update(self.batch_size, **({"epoch": self.at.epoch + 1, "batch loss": float(loss)} if show else {}))
            if self.engine.decide(now - self.saved_at >= self.job.config.checkpoint_every_s):
                self._save()
            clock = time.monotonic()

    def _step(self, phase: Phase, batch: Batch) -> Tensor:
        lr = phase.lr_factor * learning_rate(self.job.config, self.at.epoch * self.steps + self.at.step, self.steps)
        set_learning_rate(self.optimizer, lr)
        moment = self._moment(phase, lr)
        result = self._forward(phase, batch)
        self.optimizer.zero_grad(set_to_none=True)
        phase.backward(batch, result, self.scaler.scale)
        loss = result.loss.detach().clone()
        self.engine.average([*self._gradients(), loss])
        self._require_finite(phase, batch, result, loss)
        for rule in self.rules:
            rule.before(moment)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for rule in self.rules:
            rule.after(moment)
        if self.average is not None:
            self.average.update(self.job.model, self.at.epoch * self.steps + self.at.step)
        self._count(result, batch.labels if batch.mixed is None else batch.mixed.main(batch.labels))
        return loss

    def _moment(self, phase: Phase, lr: float) -> Moment:
        peak, total = self.job.config.lr, self.job.config.epochs * self.steps
        return Moment(lr / peak, peak, (self.at.epoch * self.steps + self.at.step) / total, total, phase.settles)

    def _forward(self, phase: Phase, batch: Batch) -> StepResult:
        self.engine.step_seed = derive(self.job.seed, self.job.role, "model", batch.epoch, batch.step)
        others = (self.engine.rank,) if self.engine.rank else ()  # else all would use the same dropout masks
        torch.manual_seed(derive(self.job.seed, self.job.role, "model", batch.epoch, batch.step, *others))
        with self.precision.context(enabled=phase.allows_autocast):
            return phase.step(batch)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _require_finite(self, phase: Phase, batch: Batch, result: StepResult, loss: Tensor) -> None:
        """Clip the gradient if requested, and stop before a non-finite one reaches the weights."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(self._gradients())
        limit = self.job.config.clip_grad_norm
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        finite = torch.isfinite(loss)
        if self.precision.needs_scaler:  # the scaler handles an overflow, unless scaling down does not help
            finite = finite & (self.scaler.get_scale() > SMALLEST_LOSS_SCALE)
        else:
            finite = finite & torch.isfinite(norm)
        if not bool(finite):
            raise self._failure(phase, batch, loss, norm, is_here=not bool(torch.isfinite(result.loss)))

    def _failure(self, phase: Phase, batch: Batch, loss: Tensor, norm: Tensor, *, is_here: bool) -> TrainingError:
        def rerun() -> tuple[Tensor, Mapping[str, Tensor]]:
            repeated = self._forward(phase, batch)
            return repeated.loss, repeated.terms

        with alone():  # each process inspects its own images
            own = diagnose({self.job.role: self.job.model, **self.job.others}, rerun)
        found = [json.loads(text) for text in self.engine.texts(json.dumps([is_here, *own]))]
        _, term, layer, facts = max(found, key=lambda one: bool(one[0]))  # from the process with the broken loss
        return TrainingError(
            f"{self.job.role}: loss {float(loss):.6g}, gradient norm {float(norm):.6g} at epoch {batch.epoch + 1}, "
            f"step {batch.step + 1} of {self.steps} ({phase.name}); run again with hooks: {facts}. "
            f"The weights before this step are kept in the last checkpoint; lower train.lr, raise "
            f"train.warmup_epochs or set train.clip_grad_norm, and give the run another name",
            epoch=batch.epoch + 1,
            step=batch.step + 1,
            term=term,
            layer=layer,
        )

    def _count(self, result: StepResult, labels: Tensor) -> None:
        right = (result.logits.detach().argmax(1) == labels).sum()
        values = {"images": torch.tensor(len(labels)), "right": right, "loss": result.loss * len(labels)}
        values.update({f"term/{name}": value * len(labels) for name, value in result.terms.items()})
        values.update({f"fact/{name}": value * len(labels) for name, value in result.facts.items()})
        for name, value in self.engine.sums(values).items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _row(self, phase: Phase, lr: float) -> dict[str, Any]:
        sums = {name: float(value) for name, value in self.sums.items()}
        images = sums["images"]
        means = {name: value / images for name, value in sums.items()}
        terms, facts = (
            {name.removeprefix(kind): value for name, value in means.items() if name.startswith(kind)}
            for kind in ("term/", "fact/")
        )
        for rule in self.rules:
            facts.update(rule.facts())
        return {
            "epoch": self.at.epoch + 1,
            "phase": phase.name,
            "lr": lr,
            "train_loss": means["loss"],
            "train_accuracy": means["right"],
            "val_accuracy": self.score(self.job.splits.val),
            "terms": terms,
            **({"facts": facts} if facts else {}),
            "seconds": self.at.epoch_seconds,
            "images_per_second": images / max(self.at.epoch_seconds, 1e-9),
        }

    def score(self, split: Split) -> float | None:
        """Return the accuracy on a split in eval mode, with the averaged weights if there are any."""
        job = self.job
        context = self.average.applied(job.model) if self.average is not None else nullcontext()
        with context:
            return accuracy(job.model, split, job.splits, job.data, job.device)

    def _offer(self, val_accuracy: float | None) -> None:
        if self.best is None or val_accuracy is None:
            return
        with self.average.applied(self.job.model) if self.average is not None else nullcontext():
            self.best.offer(self.job.model, epoch=self.at.epoch + 1, accuracy=val_accuracy)

    def _nets(self) -> list[torch.nn.Module]:
        return [self.job.model, *(partner.module for partner in self.job.partners)]

    def _be_alike(self) -> None:
        """Copy the first process's nets to all processes."""
        self.engine.copy_first(self._nets())

    def _phase_and_first_epoch(self) -> tuple[Phase, int]:
        """Return the phase of the current epoch, and the phase's first epoch."""
        first = 0
        for phase in self.job.phases:
            if self.at.epoch < first + phase.epochs:
                return phase, first
            first += phase.epochs
        raise ValueError(f"no phase for epoch {self.at.epoch + 1}")

    def state(self) -> Checkpoint:
        """Return everything that a training needs to resume.

        Raises:
            TrainingError: If weights are not finite.
        """
        broken = non_finite_weights(self.job.model)
        for partner in self.job.partners:
            broken += [f"{partner.name}.{name}" for name in non_finite_weights(partner.module)]
        if broken:
            raise TrainingError(
                f"{self.job.role}: weights are not finite after epoch {self.at.epoch + 1}, step {self.at.step}: "
                f"{', '.join(broken[:3])}; no checkpoint is written, the last one is kept; lower train.lr, raise "
                f"train.warmup_epochs or set train.clip_grad_norm, and give the run another name",
                epoch=self.at.epoch + 1,
                step=self.at.step,
                layer=broken[0],
            )
        tensors = collect(self.job.model, self.optimizer, self.average, self.job.partners)
        tensors.update({f"sum/{name}": value for name, value in self.sums.items()})
        for rule in self.rules:
            tensors.update({f"{RULE}{rule.name}/{name}": value for name, value in rule.state().items()})
        best, best_state = ({}, None) if self.best is None else self.best.state()
        tensors.update(best)
        state = {
            "fingerprint": dict(self.job.fingerprint),
            "epoch": self.at.epoch,
            "step": self.at.step,
            "seconds": self.at.seconds,
            "epoch_seconds": self.at.epoch_seconds,
            "rows": self.at.rows,
            "sums": list(self.sums),
            "scaler": self.scaler.state_dict(),
            "arithmetic": self.arithmetic.to_json(),
            **({} if best_state is None else {"best": best_state}),
        }
        return Checkpoint(tensors, state)

    def _save(self) -> None:
        made = self.state()
        facts = {"settings": settings_of(self.job, self.batch_size), "kernels": kernels_of(self.job)}
        checkpoint = Checkpoint(made.tensors, {**made.state, **facts})
        self.store.save(self.at.epoch * (self.steps + 1) + self.at.step, checkpoint)
        self.saved_at = time.monotonic()

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore what :meth:`state` returned, bit for bit.

        Raises:
            ValueError: If the checkpoint belongs to another model.
        """
        state = checkpoint.state
        restore(checkpoint.tensors, self.job.model, self.optimizer, self.average, self.job.partners)
        for rule in self.rules:
            rule.load(below(checkpoint.tensors, f"{RULE}{rule.name}/"))
        self.at = _Position(
            state["epoch"], state["step"], state["seconds"], state["epoch_seconds"], list(state["rows"])
        )
        self.sums = {name: checkpoint.tensors[f"sum/{name}"].to(self.job.device) for name in state["sums"]}
        if self.best is not None and "best" in state:
            self.best.load(checkpoint.tensors, state["best"], self.job.device)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def _say_where(self) -> None:
        place = f"after step {self.at.step} of" if self.at.step else "at the start of"
        where = f"{place} epoch {self.at.epoch + 1}" if self.at.epoch < self.job.config.epochs else "at the end"
        self.progress.say(f"{self.job.role}: resuming from the checkpoint {where}")

    def _tell_of_other_kernels(self) -> None:
        """Report, once a step has run, which kernels differ from those before the interruption."""
        for change in other_kernels(self.kernels_then, kernels_of(self.job)) if self.kernels_then else ():
            self.progress.warn(f"{self.job.role}: {change}; results may now differ in the last bits")
        self.kernels_then = None

    def _require_same_origin(self, state: Mapping[str, Any]) -> None:
        origin, now = state["fingerprint"], dict(self.job.fingerprint)
        changed = sorted(name for name in origin.keys() | now.keys() if origin.get(name) != now.get(name))
        if changed:
            raise ValueError(
                f"{self.store.folder}: the checkpoint was made from other inputs ({', '.join(changed)} changed since); "
                f"restore them, or delete {self.job.folder} to train again"
            )
        changed = other_settings(state.get("settings"), settings_of(self.job, self.batch_size))
        if changed:
            raise ValueError(
                f"{self.store.folder}: the checkpoint was made with other settings ({'; '.join(changed)}): is it of "
                f"another run? Restore them, or delete {self.job.folder} to train again"
            )

    def _write_metrics(self) -> None:
        self.log.write(self.at.rows)
