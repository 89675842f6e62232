"""Reads a float network as a graph in which every node is a module of the closed set, with its shape and path."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn

from quantizers.graph.form.kinds import OUTPUT, kind_of
from quantizers.graph.form.refusal import RewriteError as RewriteError
from quantizers.graph.proving.batches import require_same_of_more
from quantizers.graph.proving.repeated import require_same_in_eval, require_same_in_training
from quantizers.graph.proving.same_gradients import require_same_gradients
from quantizers.graph.recording.copying import example_images, input_name, private_copy, require_images
from quantizers.graph.recording.effective import computed_weights
from quantizers.graph.recording.gradients import without_idle_stops
from quantizers.graph.recording.modes import joined, live_nodes, output_of
from quantizers.graph.recording.outcome import Recording
from quantizers.graph.recording.reach import freeze_unreached
from quantizers.graph.recording.recorder import Recorder
from quantizers.graph.recording.ties import require_no_ties
from quantizers.graph.simplify import simplify

EVAL_IMAGES, TRAIN_IMAGES = 2, 3  # different, to reveal what depends on their number
MOVED_BY = 0.3  # standard deviation of the change of small parameters, and of batch norm's factors, in training mode
JITTERED_VALUES = 2**14  # largest parameter that is jittered: affine parameters, biases, slopes, layer scales


class Traced:
    """A float network as a graph.

    Args:
        recording: The recorded network, with both modes joined, simplified.
        batch: Number of images of the example.
        computed: The learned tensors that the network computes with functions that its student does not have.
    """

    def __init__(self, recording: Recording, batch: int, computed: Sequence[str] = ()) -> None:
        self.computed = computed
        self.graph, self.modules, self.outputs = recording.graph, recording.modules, recording.outputs
        self.result = recording.result
        for node in self.graph.nodes:
            module = self.module(node)
            node.meta["kind"] = str(node.op) if module is None else kind_of(module)
            if node.op != OUTPUT:
                node.meta["shape"] = (batch, *node.meta["shape"][1:])

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, or None."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def path(self, node: fx.Node) -> str:
        """Return the path of a node's module, or the node's name within the scope it was traced in."""
        return str(node.meta["path"])


def trace(model: nn.Module, example_inputs: Tensor, *, verify: bool = True) -> Traced:
    """Return ``model`` as a graph of canonical modules; the model itself is not changed.

    The network runs twice on images like the example: in eval mode, and, on another number of images and with its
    small parameters perturbed at random, in training mode. This fixes the sizes, reveals what depends on values or on
    the number of images, and keeps differences from hiding behind a parameter that starts at zero.

    Args:
        model: The network.
        example_inputs: Images as the network takes them.
        verify: Whether to compare every step with what torch computes.

    Raises:
        RewriteError: If the images are unsuitable, the network fails on them, an operation has no low-bit form, or the
            two runs are different functions.
    """
    require_images(example_inputs)
    root = private_copy(model)
    name = input_name(root)
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    has_gradients = freeze_unreached(root, example_images(example_inputs, TRAIN_IMAGES, device))
    evaluated = Recorder(root.eval(), check=verify).run(example_images(example_inputs, EVAL_IMAGES, device), name)
    _require_finite(evaluated)
    if verify and not _refused(evaluated):
        require_same_in_eval(root, example_images(example_inputs, EVAL_IMAGES, device), evaluated.result)
    with _jittered(root), torch.random.fork_rng(devices=[]):
        images = example_images(example_inputs, TRAIN_IMAGES, device)
        twin = copy.deepcopy(root, {id(p): p for p in root.parameters()}).train()  # running it may change buffers
        recorder = Recorder(root.train(), check=verify, gradients=has_gradients)
        trained = recorder.run(images.clone(), name)
        if verify and not _refused(trained):
            require_same_in_training(twin, images)
        require_no_ties(trained, recorder.pen)
        if verify and has_gradients:
            require_same_gradients(twin, trained, images, recorder.flow.notes)
        computed = computed_weights(trained, recorder.pen)
        without_idle_stops(trained)
    recording = joined(evaluated, trained)
    if verify:
        with _jittered(root):
            require_same_of_more(twin.train(), images)
            require_same_of_more(twin.eval(), images)
    simplify(recording)
    return Traced(recording, len(example_inputs), computed)


def _require_finite(recording: Recording) -> None:
    """Raise if a step has an infinite or NaN constant: its outputs may be finite after a ReLU, but no grid holds it."""
    for node in live_nodes(recording.graph, output_of(recording.graph)):
        module = recording.modules[str(node.target)] if node.op == "call_module" else nn.Identity()
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(tensor.is_floating_point() and not bool(tensor.detach().isfinite().all()) for tensor in tensors):
            site = f" ({node.meta['site']})" if node.meta.get("site") else ""
            raise RewriteError(
                f"{node.meta['path']}{site}: computes with a constant that is infinite or NaN, which no grid holds; "
                "use finite values (a mask as factors of 0 and 1, say)"
            )


def _refused(recording: Recording) -> bool:
    """Return whether the output depends on a refused operation, which is more informative than other checks."""
    return any("refused" in node.meta for node in live_nodes(recording.graph, output_of(recording.graph)))


@contextlib.contextmanager
def _jittered(root: nn.Module) -> Iterator[None]:
    """Perturb small parameters at random within the block, as residual branches often start at a factor of zero.

    Frozen ones keep their values: they are constants, on which both modes must agree.
    """
    generator = torch.Generator().manual_seed(0)
    small = [p for p in root.parameters() if p.requires_grad and p.numel() <= JITTERED_VALUES]
    before = [(p, p.detach().clone()) for p in small]
    try:
        for parameter, value in before:
            noise = torch.randn(value.shape, generator=generator).to(value)
            parameter.data.copy_(value + MOVED_BY * noise)
        yield
    finally:
        for parameter, value in before:
            parameter.data.copy_(value)
