"""Trains several seeds of one net in parallel on one device, each step one replay of a CUDA graph.

A lane is a seed: its weights, optimizer, images and stream. All lanes share one compiled step; before a lane's graph
is captured, the shared net's tensors are pointed at the lane's memory, which the graph keeps from then on. On a CPU,
and with graphs off, the same step runs without a graph, one lane after another.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qkd.config import TrainConfig
from qkd.losses.logits import cross_entropy_loss, soft_target_loss
from qkd.training.job import Moment
from qkd.training.low_bit.step_sizes import BoundedStepSizes
from qkd.training.optimizer import build_optimizer
from quantizers import quantizer_scales

from images import CropFlip  # isort: skip - next to this file

NOW = Moment(rate=1.0, peak=1.0, done=0.0, steps=1)  # a bound of step sizes does not depend on time
WARM_UP_STEPS = 3  # the first one compiles; in the next ones libraries choose their algorithms


@dataclass(frozen=True)
class How:
    """The arithmetic and machinery of a step.

    Args:
        bf16: Autocast to bfloat16; the trained weights stay float32.
        compiled: Compile forward and backward pass with `torch.compile`.
        graphs: Replay each step as one CUDA graph (CUDA devices only).
        channels_last: Memory format of the images.
    """

    bf16: bool = True
    compiled: bool = True
    graphs: bool = True
    channels_last: bool = True

    def describe(self) -> str:
        """Return a short name."""
        parts = ["bf16" if self.bf16 else "float32", "compiled" if self.compiled else "eager"]
        return "+".join([*parts, *(["graph"] if self.graphs else []), *(["nhwc"] if self.channels_last else [])])


@dataclass(frozen=True)
class Terms:
    """The loss: ``labels`` times cross-entropy plus ``teacher`` times soft targets at ``temperature``."""

    labels: float = 1.0
    teacher: float = 0.0
    temperature: float = 4.0


@dataclass(frozen=True)
class Totals:
    """Results of an epoch: mean loss per batch, and the fraction of images classified correctly."""

    loss: float
    accuracy: float


class Lane:
    """One seed.

    Args:
        student: The net to train.
        teacher: Its teacher; None if no term needs one.
        data: Images on the device.
        batch_size: Images per step.
        seed: Seed of order, crops and flips.
        config: Momentum and weight decay.
        table: Logits ``[views * n, classes]`` of a teacher that all lanes share, for every view of every image.
        bound: Largest relative change of a learned step size in one step; None for no limit.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, data: CropFlip, batch_size: int, seed: int,
        config: TrainConfig, table: Tensor | None = None, bound: float | None = None,
    ) -> None:  # fmt: skip
        device = data.padded.device
        self.student, self.teacher, self.data, self.batch_size, self.config = student, teacher, data, batch_size, config
        self.memory = [tensor.data for tensor in _tensors(student, teacher)]
        self.generator = torch.Generator(device).manual_seed(seed)
        shape = (batch_size, data.padded.shape[1], data.height, data.width)
        self.images = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.table, self.bound = table, bound
        self.target = (
            None if table is None else torch.zeros(batch_size, table.shape[1], dtype=table.dtype, device=device)
        )
        self.lr = torch.zeros((), device=device)
        self.sums = torch.zeros(2, device=device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.optimizer: torch.optim.Optimizer | None = None
        self.bounded: BoundedStepSizes | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def steps(self) -> int:
        """Return the number of full batches in an epoch."""
        return len(self.data) // self.batch_size

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Run a block on the lane's stream."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream):
            yield

    def state(self) -> list[Tensor]:
        """Return copies of everything that a step changes."""
        return [tensor.clone() for tensor in [*self.memory, self.sums]]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Restore a state in place, and reset momentum."""
        for tensor, kept in zip([*self.memory, self.sums], state, strict=True):
            tensor.copy_(kept)
        for slot in self.optimizer.state.values() if self.optimizer else []:
            if slot.get("momentum_buffer") is not None:
                slot["momentum_buffer"].zero_()


class Lanes:
    """Seeds that are trained together.

    Args:
        lanes: Lanes of nets with the same structure.
        terms: The loss.
        normal: Factor and shift of the pixels.
        how: Arithmetic and machinery.
    """

    def __init__(self, lanes: Sequence[Lane], terms: Terms, normal: tuple[Tensor, Tensor], how: How) -> None:
        self.lanes, self.terms, self.normal, self.how = list(lanes), terms, normal, how
        self.student, self.teacher = lanes[0].student, lanes[0].teacher
        self.device = normal[0].device
        self._loss: Callable[..., tuple[Tensor, Tensor]] = self._measure
        if how.compiled:
            torch._dynamo.reset()  # the compiler keeps only a few versions of a function
            self._loss = torch.compile(self._measure, dynamic=False)
        self._uses_graphs = how.graphs and self.device.type == "cuda"

    def prepare(self) -> float:
        """Compile, warm up and capture every lane without training; return the seconds it took."""
        start = time.perf_counter()
        for lane in self.lanes:
            self._bind(lane)
            state = lane.state()
            self._synchronize()
            with lane.active():
                lane.optimizer = _optimizer(self.student, lane)
                if lane.bound is not None and (scales := list(quantizer_scales(self.student))):
                    lane.bounded = BoundedStepSizes(scales, lane.bound)
                pixels, labels, places = lane.data.epoch(lane.generator, lane.batch_size)
                lane.images.copy_(pixels)
                lane.labels.copy_(labels)
                if lane.table is not None and lane.target is not None:
                    lane.target.copy_(lane.table[places])
                for _ in range(WARM_UP_STEPS):
                    self._step(lane)
            self._synchronize()
            if self._uses_graphs:
                lane.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(lane.graph, stream=lane.stream):
                    self._step(lane)
            with torch.no_grad(), lane.active():
                lane.restore(state)
            self._synchronize()
        return time.perf_counter() - start

    def step_seconds(self, *, least_s: float, least_steps: int = 10) -> float:
        """Return the measured seconds of one step of all lanes; weights are restored afterward."""
        states = [lane.state() for lane in self.lanes]
        done, start = 0, time.perf_counter()
        self._synchronize()
        while done < least_steps or time.perf_counter() - start < least_s:
            for _ in range(10):
                for lane in self.lanes:
                    with lane.active():
                        self._advance(lane)
            done += 10
            self._synchronize()  # otherwise the host would run ahead of the device
        seconds = (time.perf_counter() - start) / done
        for lane, state in zip(self.lanes, states, strict=True):
            with torch.no_grad(), lane.active():
                lane.restore(state)
        self._synchronize()
        return seconds

    def epoch(self, rate: Callable[[int], float]) -> list[Totals]:
        """Train every lane for one epoch; the host waits for the device once, at the end.

        Args:
            rate: Step of the epoch -> learning rate.
        """
        steps = self.lanes[0].steps
        parts = []
        for lane in self.lanes:
            with lane.active():
                lane.sums.zero_()
                pixels, labels, places = lane.data.epoch(lane.generator, steps * lane.batch_size)
                targets = labels if lane.table is None else lane.table[places]
                parts.append([part.split(lane.batch_size) for part in (pixels, labels, targets)])
        for step in range(steps):
            lr = rate(step)
            for lane, (pixels, labels, targets) in zip(self.lanes, parts, strict=True):
                with lane.active():
                    lane.images.copy_(pixels[step])
                    lane.labels.copy_(labels[step])
                    if lane.target is not None:
                        lane.target.copy_(targets[step])
                    lane.lr.fill_(lr)
                    self._advance(lane)
        return [self._totals(lane, steps) for lane in self.lanes]

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of the first lane's loss on its first images, omitting parameters without one."""
        lane = self.lanes[0]
        self._bind(lane)
        images, labels, _ = lane.data.epoch(lane.generator, lane.batch_size)
        self.student.zero_grad(set_to_none=True)
        loss, _ = self._loss(self.student, self.teacher, images, labels, lane.target)
        loss.backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad.clone() for name, p in self.student.named_parameters() if p.grad is not None}
        self.student.zero_grad(set_to_none=True)
        return found

    def close(self) -> None:
        """Release the graphs, and give every net its own memory back."""
        self._synchronize()
        for lane in self.lanes:
            lane.graph = None
        self._bind(self.lanes[0])

    def _advance(self, lane: Lane) -> None:
        if lane.graph is not None:
            lane.graph.replay()
            return
        self._bind(lane)
        self._step(lane)

    def _step(self, lane: Lane) -> None:
        assert lane.optimizer is not None  # noqa: S101 - `prepare` made it
        lane.optimizer.zero_grad(set_to_none=True)
        loss, right = self._loss(self.student, self.teacher, lane.images, lane.labels, lane.target)
        loss.backward()  # type: ignore[no-untyped-call]
        _align_gradients(self.student)
        if lane.bounded is not None:
            lane.bounded.before(NOW)
        lane.optimizer.step()
        if lane.bounded is not None:
            lane.bounded.after(NOW)
        lane.sums.add_(torch.stack((loss.detach(), right)))

    def _measure(
        self, student: nn.Module, teacher: nn.Module | None, images: Tensor, labels: Tensor, target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        factor, shift = self.normal
        x = images.float() * factor - shift
        if self.how.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.how.bf16, cache_enabled=False):
            logits = student(x)
            loss = self.terms.labels * cross_entropy_loss(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    target = teacher(x)
            if target is not None:
                loss = loss + self.terms.teacher * soft_target_loss(logits, target, temperature=self.terms.temperature)
        return loss, (logits.detach().argmax(1) == labels).sum().float()

    def _totals(self, lane: Lane, steps: int) -> Totals:
        with lane.active():
            loss, right = lane.sums.tolist()
        return Totals(loss / steps, right / (steps * lane.batch_size))

    def _bind(self, lane: Lane) -> None:
        for tensor, memory in zip(_tensors(self.student, self.teacher), lane.memory, strict=True):
            tensor.data = memory

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@torch.no_grad()
def logit_table(
    teacher: nn.Module, data: CropFlip, normal: tuple[Tensor, Tensor], how: How, *, batch: int = 2000
) -> Tensor:
    """Return a teacher's logits for every view of every image, ``[views * n, classes]``, in bfloat16.

    With only crops and mirroring an image has few views, so a teacher that several students share computes each of
    them once.
    """
    factor, shift = normal

    def compute(pixels: Tensor) -> Tensor:
        x = (pixels.float() * factor - shift).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=how.bf16):
            return teacher(x).to(torch.bfloat16)

    if how.compiled:
        torch._dynamo.reset()
        compute = torch.compile(compute, dynamic=False)
    views = (data.view(index) for index in range(data.views))
    return torch.cat([compute(part.contiguous()) for view in views for part in view.split(min(batch, len(data)))])


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weights of all layers, by name."""
    named = net.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.dim() >= 2 and name.endswith(".weight")}


def least_change(net: nn.Module, before: dict[str, Tensor]) -> tuple[str, float]:
    """Return the layer whose weights changed least since ``before``, and by how much, relative to their norm."""
    changes = {
        name: float((value - before[name]).norm() / before[name].norm().clamp_min(1e-12))
        for name, value in weights_of(net).items()
    }
    return min(changes.items(), key=lambda item: item[1])


def _tensors(student: nn.Module, teacher: nn.Module | None) -> list[Tensor]:
    nets = [student] if teacher is None else [student, teacher]
    return [tensor for net in nets for tensor in (*net.parameters(), *net.buffers())]


def _align_gradients(net: nn.Module) -> None:
    """Give each gradient the strides of its parameter, as fused optimizers require: they differ in axes of size 1."""
    for parameter in net.parameters():
        grad = parameter.grad
        if grad is None or grad.stride() == parameter.stride():
            continue
        axes = zip(parameter.shape, grad.stride(), parameter.stride(), strict=True)
        if all(size == 1 or mine == its for size, mine, its in axes):
            parameter.grad = grad.as_strided(parameter.size(), parameter.stride())
        else:
            parameter.grad = torch.empty_like(parameter).copy_(grad)


def _optimizer(student: nn.Module, lane: Lane) -> torch.optim.Optimizer:
    """Build SGD with the toolkit's groups and its rate as a tensor that a captured graph rereads at every step."""
    groups = build_optimizer(student, lane.config, quantizer_scales(student)).param_groups
    return torch.optim.SGD(
        [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups],
        lr=lane.lr, momentum=lane.config.momentum, nesterov=True, fused=True,
    )  # fmt: skip
