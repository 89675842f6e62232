"""What a network does outside of torch, or by chance, and images that prove nothing, are refused by name."""

from __future__ import annotations

import copy
import io
import logging
import logging.handlers
import pickle
import queue
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from export.lowering.model import INPUT
from quantizers import QuantSpec, RewriteError, Student, prepare
from quantizers.graph.recording.outside import one_thread

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WAYS_OUT = r"draw outside the network|use a dropout or stochastic depth layer|take it from shapes|with torch operations"


class Body(nn.Module):
    """Two convolutions around an operation under test."""

    def __init__(self, operation: Callable[[Body, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.gamma = nn.Parameter(torch.tensor(0.3))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self, F.relu(self.conv(x))))


def _prepared(net: nn.Module, images: Tensor = IMAGE) -> Student:
    return prepare(net, QuantSpec(), example_inputs=images)


def _skipped(draw: Callable[[], bool]) -> Callable[[Body, Tensor], Tensor]:
    """Return a block that training skips by chance; here it never does, so both modes look alike."""

    def operation(m: Body, x: Tensor) -> Tensor:
        return x if m.training and draw() else x + m.inner(x)

    return operation


def _written_by_numpy(m: Body, x: Tensor) -> Tensor:
    y = m.inner(x)
    values = y.detach().numpy()
    np.maximum(values, 0, out=values)
    return y


PYTHONS, NUMPYS = random.Random(0), np.random.default_rng(0)


def _helper() -> float:
    return NUMPYS.random()


OPERATIONS: dict[str, tuple[Callable[[Body, Tensor], Tensor], str]] = {
    "random.random": (_skipped(lambda: random.random() > 2), "Body|conv|inner.*random numbers from Python or NumPy"),
    "numpy.random": (_skipped(lambda: np.random.rand() > 2), "Body|conv|inner.*random numbers from Python or NumPy"),
    "a global random.Random": (_skipped(lambda: PYTHONS.random() > 2), "random numbers"),
    "a global generator of numpy": (_skipped(lambda: NUMPYS.random() > 2), "random numbers"),
    "a generator behind a function": (_skipped(lambda: _helper() > 2), "random numbers"),
    "a generator in a closure": (_skipped(random.Random(0).random), "random numbers"),
    "a generator made in forward": (lambda m, x: m.inner(x) * np.random.default_rng().random(), "two passes in eval"),
    "torch.rand": (_skipped(lambda: torch.rand(1).item() > 2), r"Body: .*drawn at random at test_outside\.py:\d+"),
    "torch.bernoulli": (
        _skipped(lambda: torch.equal(torch.bernoulli(torch.full((1,), 0.5)), torch.tensor([3.0]))),
        r"Body: .*drawn at random at test_outside\.py:\d+",
    ),
    "allclose": (lambda m, x: x if torch.allclose(x, x + 1) else m.inner(x), r"tensor values at test_outside\.py:\d+"),
    "tolist": (lambda m, x: x if x.mean().tolist() > 99 else m.inner(x), r"tensor values at test_outside\.py:\d+"),
    "numpy": (lambda m, x: x if x.numpy().mean() > 99 else m.inner(x), r"leave torch at test_outside\.py:\d+"),
    "asarray": (lambda m, x: x if np.asarray(x).mean() > 9 else m.inner(x), r"leave torch at test_outside\.py:\d+"),
    "numpy in place": (_written_by_numpy, r"leave torch at test_outside\.py:\d+"),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_cannot_be_recorded_is_refused_with_its_place(name: str) -> None:
    operation, place = OPERATIONS[name]
    with pytest.raises(RewriteError, match=place) as caught:
        _prepared(Body(operation))
    caught.match(WAYS_OUT)


@pytest.mark.parametrize("name", ["unsqueeze_", "squeeze_", "transpose_", "swapaxes_", "swapdims_", "t_", "resize_"])
def test_shapes_changed_in_place_are_refused(name: str) -> None:
    """A gate that is open on the example images would be taken for a constant, and its layer dropped."""
    given = {"squeeze_": (0,), "t_": (), "resize_": (8, 2, 1, 1), "unsqueeze_": (-1,)}.get(name, (0, 1))

    def operation(m: Body, x: Tensor) -> Tensor:
        gate = F.hardsigmoid(m.inner(x).mean((2, 3)) * 0 + 5)
        gate = gate[:1] if name == "squeeze_" else gate
        shape = gate.shape
        getattr(gate, name)(*given)
        return x * gate.reshape(shape)[:, :, None, None]

    known = "transpose_" if name.startswith("swap") else name
    with pytest.raises(RewriteError, match=rf"\(test_outside.py:\d+\): {known} changes a tensor's shape in place"):
        _prepared(Body(operation))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    net = Body(lambda m, x: m.inner(x))
    with torch.no_grad():
        net.inner.weight[0, 0] = value
    with pytest.raises(RewriteError, match=r"inner\.weight: has values that are not finite"):
        _prepared(net)


def test_a_layer_that_is_named_twice_is_compared() -> None:
    """Two slices written in place share their moves."""

    def operation(m: Body, x: Tensor) -> Tensor:
        y = m.inner(x)
        first, second = y[:, :4], y[:, 4:]
        first.mul_(0.5)
        second.sub_(1.0)
        return torch.cat([first * second, first], 1)

    _prepared(Body(operation))


def test_a_generator_that_the_network_holds_is_watched() -> None:
    net = Body(lambda m, x: x * 2 if m.dice.random() > 2 else x)
    net.dice = np.random.default_rng(0)
    with pytest.raises(RewriteError, match="random numbers"):
        _prepared(net)


def test_the_module_that_draws_is_named() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if random.random() > 2 else x

    with pytest.raises(RewriteError, match=r"^1\.0: forward draws"):
        _prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(Drawing(), nn.ReLU()), nn.Conv2d(8, 2, 1)))


def test_constants_from_numpy_and_seeded_orders_are_none_of_these() -> None:
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3)).tolist()
    _prepared(Body(lambda m, x: m.inner(x)[:, order] * torch.from_numpy(np.full((8, 1, 1), 0.5, np.float32))))


IMAGES = {
    "NaN": (IMAGE * float("nan"), "NaN or infinity"),
    "infinity": (IMAGE / 0, "NaN or infinity"),
    "integers": ((IMAGE * 9).int(), r"torch\.int32.*float images"),
    "sparse": (IMAGE.to_sparse(), r"sparse_coo.*dense"),
    "none": (IMAGE[:0], "holds no images"),
    "a number": (IMAGE[0, 0, 0, 0], r"shape \(\).*a batch of images"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_prove_nothing_are_refused(name: str) -> None:
    images, message = IMAGES[name]
    with pytest.raises(RewriteError, match=f"example_inputs.*{message}"):
        _prepared(Body(lambda m, x: m.inner(x)), images)


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bfloat16": (lambda: nn.Conv2d(3, 8, 3).bfloat16(), r"^weight: is torch\.bfloat16.*model\.float\(\)"),
    "half": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).half(), r"^0\.weight: is torch\.float16.*float32"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3)), r"^0\.weight: has no shape yet.*call the network"),
    "meta": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, device="meta")), r"^0\.weight: has no values.*load"),
}


@pytest.mark.parametrize("name", NETS)
def test_weights_that_cannot_be_computed_with_are_refused(name: str) -> None:
    net, message = NETS[name]
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16}.get(name, torch.float32)
    with pytest.raises(RewriteError, match=message):
        _prepared(net(), IMAGE.to(dtype))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_script_is_refused_with_its_path() -> None:
    script = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()))
    with pytest.raises(RewriteError, match=r"^1: runs in TorchScript.*pass the Python modules"):
        _prepared(nn.Sequential(nn.Conv2d(3, 8, 3), script, nn.Conv2d(8, 2, 1)))


@pytest.mark.filterwarnings("ignore:every parameter")
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_frozen_factor_is_a_constant(is_whole: bool) -> None:
    """Small parameters move between the two runs of ``prepare``; what is frozen is a constant, and must not."""
    net = Body(lambda m, x: x + m.gamma * m.inner(x))
    net.gamma.requires_grad_(False)
    if is_whole:
        net.requires_grad_(False)
    student = _prepared(net)
    assert student.state_dict()["inner.weight"].requires_grad is False
    assert not any(p.requires_grad for p in student.parameters() if is_whole and p.ndim > 1)


class StochasticDepth(nn.Module):
    """The published form, of the name that torchvision's has: the branch is scaled in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else 0.5 * x


def test_a_module_is_not_taken_for_torchvisions_by_its_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), StochasticDepth(), nn.ReLU(), nn.Conv2d(8, 2, 1))
    with pytest.raises(RewriteError, match=r"train\(\).*eval\(\)"):
        _prepared(net)


class Stem(nn.Module):
    """A layer that the network runs without gradients, as people freeze a backbone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem, self.norm = how, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.how != "no_grad"):
            y = F.relu(self.norm(self.stem(x)))
        return self.head(y.detach() if self.how == "detach" else y)


@pytest.mark.parametrize("how", ["no_grad", "detach", "neither"])
def test_what_no_gradient_reaches_is_frozen(how: str) -> None:
    net = Stem(how)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    student = _prepared(net)
    learns = {name for name, p in student.named_parameters() if p.requires_grad}
    assert "head.weight" in learns
    assert ("stem.weight" in learns) is (how == "neither")
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    norms = [m for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 1 and (id(norms[0].weight) in trained) is (how == "neither")
    assert all(torch.equal(weights[name], p) and p.requires_grad for name, p in net.named_parameters())
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_a_single_image_is_told_to_take_a_batch_axis() -> None:
    with pytest.raises(RewriteError, match=r"fails on example_inputs: .*example_inputs\[None\]"):
        _prepared(Body(lambda m, x: m.inner(x)), IMAGE[0])


def test_what_fails_in_training_only_says_so() -> None:
    def heads(m: Body, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 99) if m.training else x

    with pytest.raises(RewriteError, match=r"in train\(\): .*images of the size it trains on"):
        _prepared(Body(heads))


@torch.library.custom_op("qkd_tests::twice", mutates_args=())
def _twice(x: Tensor) -> Tensor:
    return x * 2


def _saved(gate: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(gate, file)
    file.seek(0)
    loaded: Tensor = torch.load(file)
    return loaded


def _copied_storage(gate: Tensor) -> Tensor:
    made = torch.zeros(gate.shape)
    made.untyped_storage().copy_(gate.untyped_storage())
    return made


def _in_thread(gate: Tensor) -> Tensor:
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(gate + 0))
    thread.start()
    thread.join()
    return made[0]


def _in_pool(gate: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: gate + 0).result()


def _scaled(x: Tensor, y: Tensor) -> Tensor:
    made = x.clone()
    made[:, :4] = y[:, :4]
    return made.mul_(y)


UNSEEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "deepcopy": (copy.deepcopy, r"leave torch at test_outside\.py:\d+ \(__deepcopy__\)"),
    "pickle": (
        lambda gate: pickle.loads(pickle.dumps(gate)),  # noqa: S301 - its own
        r"leave torch at test_outside\.py:\d+ \(untyped_storage\)",
    ),
    "torch.save": (_saved, "leave torch"),
    "a storage": (_copied_storage, r"leave torch at .*\(untyped_storage\)"),
    "a thread": (_in_thread, r"another thread or process at test_outside\.py:\d+"),
    "an executor": (_in_pool, "another thread or process"),
    "apply_": (lambda gate: gate.apply_(lambda value: 2 * value), r"leave torch at .*\(apply_\)"),
    "map_": (lambda gate: torch.zeros(gate.shape).map_(gate, lambda _, value: value), r"leave torch at .*\(map_\)"),
    "a gradient": (lambda gate: torch.func.grad(lambda g: (g**2).sum())(gate), "transform of torch.func"),
    "sparse": (lambda gate: gate.to_sparse().to_dense(), "to_sparse has no low-bit form"),
    "several at once": (lambda gate: torch._foreach_mul_([gate], 1.0) or gate, "into several tensors"),
    "a custom operation": (_twice, "twice has no low-bit form"),
}


def _gated(of: Callable[[Tensor], Tensor]) -> Body:
    """Return a network whose gate is closed on the example images, so that its layer looks like a constant."""
    net = Body(lambda m, x: x + of(F.relu(m.inner(x)).mean((2, 3), keepdim=True)))
    nn.init.constant_(net.inner.bias, -9.0)
    return net


@pytest.mark.parametrize("name", UNSEEN)
def test_values_that_go_out_of_sight_are_no_constants(name: str) -> None:
    way, message = UNSEEN[name]
    with pytest.raises(RewriteError, match=message):
        _prepared(_gated(lambda gate: way(gate.detach())))


def test_a_pool_that_runs_already_is_refused() -> None:
    with ThreadPool(1) as pool, pytest.raises(RewriteError, match="another thread or process"):
        _prepared(_gated(lambda gate: pool.map(lambda g: g + 0, [gate])[0]))


def _swallowed(gate: Tensor) -> Tensor:
    try:
        return _in_thread(gate)
    except Exception:
        return torch.zeros_like(gate)


def _without_numpy(gate: Tensor) -> Tensor:
    try:
        return torch.from_numpy(gate.numpy() * 1)
    except Exception:
        return torch.zeros_like(gate)


@pytest.mark.parametrize("way", [_swallowed, _without_numpy])
def test_a_refusal_that_the_network_catches_is_still_one(way: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RewriteError, match="another thread or process|leave torch"):
        _prepared(_gated(lambda gate: way(gate.detach())))


def test_work_in_a_queue_is_seen() -> None:
    """A worker that runs already starts nothing."""
    asked: queue.Queue[Tensor | None] = queue.Queue()
    answers: queue.Queue[Tensor] = queue.Queue()

    def work() -> None:
        while (gate := asked.get()) is not None:
            answers.put(gate + 0)

    worker = threading.Thread(target=work)
    worker.start()

    def way(gate: Tensor) -> Tensor:
        asked.put(gate)
        return answers.get()

    try:
        with pytest.raises(RewriteError, match="gives work to another thread or process"):
            _prepared(_gated(lambda gate: way(gate.detach())))
    finally:
        asked.put(None)
        worker.join()


def test_lines_of_a_log_may_go_through_a_queue() -> None:
    log, lines = logging.getLogger("qkd.tests.forward"), queue.Queue[Any]()
    log.addHandler(handler := logging.handlers.QueueHandler(lines))
    log.setLevel(logging.INFO)
    try:
        _prepared(Body(lambda m, x: log.info("size %s", tuple(x.shape)) or m.inner(x)))
    finally:
        log.removeHandler(handler)
    assert lines.qsize() > 0


def test_blocks_of_several_threads_put_everything_back() -> None:
    start, refused = threading.Thread.start, []

    def blocks(count: int) -> None:
        for _ in range(count):
            with one_thread(ValueError):
                try:
                    threading.Thread(target=str).start()
                except ValueError as error:
                    refused.append(str(error))

    threads = [threading.Thread(target=blocks, args=(50,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert threading.Thread.start is start and len(refused) == 200


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_writes_in_place_inside_torch_script_are_recorded() -> None:
    scaled = torch.jit.script(_scaled)
    student = _prepared(Body(lambda m, x: scaled(m.inner(x), x)))
    assert "inner" in dict(student.named_modules())


def test_a_parameter_is_not_written_through_shared_memory() -> None:
    def operation(m: Body, x: Tensor) -> Tensor:
        torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(m.inner.weight.detach())).mul_(0.99)
        return m.inner(x)

    with pytest.raises(RewriteError, match="writes into the parameter"):
        _prepared(Body(operation))


def test_what_a_processor_lacks_may_be_asked_for() -> None:
    _prepared(Body(lambda m, x: x if hasattr(x, "__cuda_array_interface__") else m.inner(x)))


def test_memory_that_two_tensors_share_is_one() -> None:
    """DLPack makes another storage of the same memory."""
    exchange = torch.utils.dlpack
    student = _prepared(_gated(lambda gate: exchange.from_dlpack(exchange.to_dlpack(gate.detach()))))
    assert "inner" in dict(student.named_modules())


def test_threads_start_again_after_prepare() -> None:
    starts = threading.Thread.start, ThreadPoolExecutor.submit
    _prepared(Body(lambda m, x: m.inner(x)))
    assert (threading.Thread.start, ThreadPoolExecutor.submit) == starts


@pytest.mark.parametrize("layer", [nn.GRU(8, 8, batch_first=True), nn.RNN(8, 8), nn.LSTM(8, 8, batch_first=True)])
def test_recurrence_is_refused_as_such(layer: nn.Module) -> None:
    def operation(m: Body, x: Tensor) -> Tensor:
        return x + m.more(x.flatten(2).transpose(1, 2))[0].mean(1)[:, :, None, None]

    net = Body(operation)
    net.more = layer
    with pytest.raises(RewriteError, match=f"more: {type(layer).__name__} has no low-bit form.*Recurrence"):
        _prepared(net)


def test_keys_that_are_one_as_text_are_refused() -> None:
    class Named(nn.Conv2d):
        def forward(self, x: Tensor) -> dict[object, Tensor]:
            y = super().forward(x)
            return {1: y, "1": y * 2}

    with pytest.raises(RewriteError, match="keys that are one as text"):
        _prepared(Named(3, 8, 3))


@pytest.mark.parametrize("key", ["", INPUT])
def test_keys_that_no_file_can_have_are_refused(key: str) -> None:
    class Named(nn.Conv2d):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {key: super().forward(x)}

    with pytest.raises(RewriteError, match=f"Named: returns a dict with the key '{key}'"):
        _prepared(Named(3, 8, 3))
