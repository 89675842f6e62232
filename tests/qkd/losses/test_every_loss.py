"""Every loss, attacked alike: types, sides that get a gradient, order, what is not a number, and degenerate inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from qkd import losses
from qkd.losses.choices import DIVERGENCES, KERNELS
from qkd.losses.stable import LABELS as INTEGER
from qkd.terms import LOSSES
from qkd.terms.head_graph import MultiHeadGraph
from qkd.terms.method_losses import METHOD_LOSSES

BATCH, CLASSES = 6, 5
ORDER = torch.tensor([3, 1, 5, 0, 2, 4])
LABELS = torch.tensor([0, 1, 2, 3, 4, 1])
Argument = Tensor | list[Tensor]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A loss with arguments: which are constants, and whether images may change places."""

    name: str
    arguments: tuple[Argument, ...]
    options: dict[str, Any] = field(default_factory=dict)
    constants: tuple[int, ...] = ()
    ordered: bool = True
    wrapped: Callable[..., Tensor] | None = None

    def __call__(self, *arguments: Argument) -> Tensor:
        function = self.wrapped or getattr(losses, self.name)
        return function(*arguments, **self.options)  # type: ignore[no-any-return]

    @property
    def has_module(self) -> bool:
        return "module" in self.options


STUDENT, TEACHER, FAR = drawn(0, BATCH, CLASSES), drawn(1, BATCH, CLASSES), drawn(2, 4, CLASSES)
MAPS, OTHERS, IMAGES = drawn(3, BATCH, 3, 4, 4), drawn(4, BATCH, 7, 4, 4), drawn(5, BATCH, 2, 4, 4)
STAGES = [[drawn(seed, BATCH, 3, 4, 4), drawn(seed + 1, BATCH, 4, 2, 2), drawn(seed + 2, BATCH, 6)] for seed in (6, 9)]
ONE = torch.tensor(0.7, dtype=torch.float64)
JOINT = [[drawn(seed, 4 * BATCH, 4 * CLASSES)] for seed in (12, 13)]
HOT = {"temperature": 3.0}
torch.manual_seed(0)
GRAPH = MultiHeadGraph([3, 4, 6], [3, 4, 6], heads=2).double().eval()


def rdskd(images: Tensor, logits: Tensor) -> Tensor:
    return losses.rdskd_generator_loss(images, logits).total


def sampled(feature: Tensor, weights: Tensor, targets: Tensor, constants: Tensor) -> Tensor:
    every = losses.every_class(CLASSES)
    return losses.sampled_soft_target_loss(feature, weights, None, targets, every, constants)


LATENTS, SHARES = drawn(20, BATCH, 3), torch.softmax(drawn(30, 2, CLASSES), 0)
CASES = [
    Case("cross_entropy_loss", (STUDENT, LABELS), {"label_smoothing": 0.1}),
    Case("soft_target_loss", (STUDENT, TEACHER), HOT, (1,)),
    Case("logit_square_loss", (STUDENT, TEACHER), HOT, (1,)),
    Case("logit_distance_loss", (STUDENT, TEACHER), {}, (1,)),
    Case("decoupled_loss", (STUDENT, TEACHER, LABELS), HOT, (1,)),
    Case("teacher_confidence_loss", (STUDENT, TEACHER, LABELS), HOT, (1,)),
    Case("class_relation_loss", (STUDENT, LABELS, drawn(14, CLASSES, 4)), HOT, (2,)),
    Case("top_classes_loss", (STUDENT, TEACHER), {**HOT, "classes": 2}, (1,)),
    Case("top_classes_loss", (STUDENT, TEACHER), {**HOT, "classes": 2, "remainder": "renormalize"}, (1,)),
    Case("filtered_soft_target_loss", (STUDENT, TEACHER, LABELS), HOT, (1,)),
    Case("filtered_soft_target_loss", (STUDENT, TEACHER, LABELS), {**HOT, "criterion": "close"}, (1,)),
    Case("gdfq_student_loss", (STUDENT, TEACHER, LABELS), {}, (1,)),
    Case("logit_relation_loss", (STUDENT, TEACHER), {}, (1,)),
    Case("hint_loss", (MAPS, drawn(15, BATCH, 3, 4, 4)), {}, (1,)),
    Case("attention_transfer_loss", (MAPS, OTHERS), {}, (1,)),
    Case("similarity_preserving_loss", (MAPS, OTHERS), {}, (1,)),
    Case("distance_relation_loss", (MAPS, OTHERS), {}, (1,)),
    Case("angle_relation_loss", (MAPS, OTHERS), {}, (1,)),
    Case("probabilistic_transfer_loss", (MAPS, OTHERS), {}, (1,)),
    Case("information_flow_loss", (MAPS, OTHERS), {}, (1,)),
    *(Case("information_flow_loss", (MAPS, OTHERS), {"kernel": one}, (1,)) for one in KERNELS),
    *(Case("information_flow_loss", (MAPS, OTHERS), {"divergence": one}, (1,)) for one in DIVERGENCES),
    Case("singular_vector_loss", tuple(STAGES), {}, (1,)),
    Case("multi_head_graph_loss", tuple(STAGES), {"module": GRAPH, "attention": "random"}, (1,)),
    Case("graph_attention_loss", (STAGES[1],), {"module": GRAPH}, (0,)),
    Case("lipschitz_loss", tuple(STAGES), {}, (1,)),
    Case("joint_label_loss", (JOINT[0], LABELS), {}, (), ordered=False),
    Case("branch_soft_target_loss", tuple(JOINT), HOT, (1,)),
    Case("mean_discrepancy_loss", (MAPS, drawn(16, 4, 3, 4, 4))),
    Case("mean_discrepancy_loss", (MAPS, drawn(16, 4, 3, 4, 4)), {"kernel": "linear"}),
    Case("adapting_teacher_loss", (TEACHER, LABELS, ONE), {"progress": 0.4}),
    Case("adapted_student_loss", (STUDENT, FAR, TEACHER, drawn(17, 4, CLASSES), LABELS), {"progress": 0.4}, (2, 3)),
    Case(
        "sampled_soft_target_loss",
        (drawn(18, BATCH, 4), drawn(19, CLASSES, 4), torch.log_softmax(TEACHER, 1), drawn(21, BATCH)),
        {}, (2, 3), wrapped=sampled,
    ),
    Case("fedgen_client_loss", (STUDENT, LABELS, FAR, LABELS[:4], TEACHER), {"weight": 0.7}, (4,)),
    Case(
        "fedgen_generator_loss", (drawn(27, 2, BATCH, CLASSES), LABELS, SHARES, drawn(28, BATCH, 2), LATENTS),
        {}, (2,), ordered=False,
    ),
    Case("latent_diversity_loss", (drawn(28, BATCH, 2), LATENTS)),
    Case("class_logits_loss", (STUDENT, LABELS, drawn(29, CLASSES, CLASSES), SHARES[0]), {}, (2, 3)),
    Case("proximal_loss", tuple(STAGES), {"mu": 0.3}, (1,)),
    Case("one_hot_loss", (TEACHER,)),
    Case("class_balance_loss", (TEACHER,)),
    Case("feature_activation_loss", (OTHERS,)),
    Case("image_diversity_loss", (IMAGES, TEACHER), ordered=False),
    Case("mode_seeking_loss", (IMAGES, LATENTS), ordered=False),
    Case("rdskd_generator_loss", (IMAGES, TEACHER), ordered=False, wrapped=rdskd),
    Case("batch_norm_loss", ([MAPS], [drawn(22, 3)], [drawn(23, 3).square()]), {}, (1, 2)),
    Case("batch_norm_loss", ([MAPS], [drawn(22, 3)], [drawn(23, 3).square()]), {"form": "squares"}, (1, 2)),
    Case("total_variation_loss", (IMAGES,)),
    Case("total_variation_loss", (IMAGES,), {"form": "magnitudes"}),
    Case("contrastive_loss", (drawn(24, BATCH, 4), drawn(25, BATCH, 4)), {}, (1,)),
    Case("disagreement_loss", (STUDENT, TEACHER)),
    Case("disagreement_loss", (STUDENT, TEACHER), {"measure": "distance"}),
    Case("decision_adversarial_loss", (STUDENT, TEACHER)),
    Case("competition_loss", (STUDENT, TEACHER)),
    Case("data_impression_loss", (TEACHER, torch.softmax(drawn(26, BATCH, CLASSES), 1)), {}, (1,)),
    Case("dafl_generator_loss", (TEACHER, OTHERS)),
    Case("mskd_generator_loss", (IMAGES, LATENTS, TEACHER, OTHERS), ordered=False),
    Case("dfq_generator_loss", (STUDENT, TEACHER, ONE)),
    Case("gdfq_generator_loss", (TEACHER, LABELS, ONE)),
    Case(
        "deep_inversion_loss", (IMAGES, TEACHER, LABELS, ONE, STUDENT),
        {"competition_weight": 1.0, "norm_weight": 0.1},
    ),
    Case("cmi_inversion_loss", (TEACHER, LABELS, ONE, ONE, ONE)),
]  # fmt: skip


def name_of(case: Case) -> str:
    words = [str(value) for value in case.options.values() if not isinstance(value, torch.nn.Module)]
    return "-".join([case.name, *words])


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=name_of)


EACH = each(CASES)
WITHOUT_MODULE = each([case for case in CASES if not case.has_module])  # a module has one type
ORDERED = each([case for case in CASES if case.ordered])  # others compare two halves, or rows of one image


def mapped(argument: Argument, change: Callable[[Tensor], Tensor]) -> Argument:
    """Return an argument with its floating tensors changed."""
    if isinstance(argument, list):
        return [change(one) if one.is_floating_point() else one for one in argument]
    return change(argument) if argument.is_floating_point() else argument


def tensors(argument: Argument) -> list[Tensor]:
    return argument if isinstance(argument, list) else [argument]


def leaves(case: Case, change: Callable[[Tensor], Tensor] = lambda one: one) -> list[Argument]:
    """Return the case's arguments, changed, as leaves that want a gradient."""
    return [mapped(one, lambda tensor: change(tensor).clone().requires_grad_()) for one in case.arguments]


def gradient(tensor: Tensor) -> Tensor | None:
    return tensor.grad.to_dense() if tensor.grad is not None and tensor.grad.is_sparse else tensor.grad


def with_one_changed(case: Case, change: Callable[[Tensor], Tensor]) -> list[tuple[str, list[Argument]]]:
    """Return the arguments with each floating tensor changed in turn, with its place."""
    found = []
    for place, argument in enumerate(case.arguments):
        for index, tensor in enumerate(tensors(argument)):
            if tensor.is_floating_point():
                made = list(case.arguments)
                copy = list(tensors(argument))
                copy[index] = change(tensor)
                made[place] = copy if isinstance(argument, list) else copy[0]
                found.append((f"argument {place}.{index}", made))
    return found


def test_no_loss_is_left_out() -> None:
    known = {name for name in losses.__all__ if name.endswith("_loss")}
    assert {case.name for case in CASES} == known
    listed = {row.name for row in (*LOSSES.values(), *METHOD_LOSSES.values())}
    assert known - listed == set(), "each is listed by `qkd ls losses`"


@EACH
def test_double_precision_stays(case: Case) -> None:
    value = case(*case.arguments)
    assert value.dtype == torch.float64 and value.shape == () and bool(value.isfinite())


@WITHOUT_MODULE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_halves_are_computed_in_single_precision(case: Case, dtype: torch.dtype) -> None:
    value = case(*(mapped(one, lambda tensor: tensor.to(dtype)) for one in case.arguments))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(case(*case.arguments).item(), rel=0.05, abs=0.01)


@EACH
def test_the_gradient_flows_into_the_sides_that_learn_and_no_other(case: Case) -> None:
    arguments = leaves(case)
    value = case(*arguments)
    if value.requires_grad:
        value.backward()
    for place, argument in enumerate(arguments):
        for tensor in (one for one in tensors(argument) if one.is_floating_point()):
            found = gradient(tensor)
            assert (found is None) == (place in case.constants or case.constants == (0,))
            assert found is None or bool(found.isfinite().all())


@EACH
def test_whole_numbers_are_refused(case: Case) -> None:
    for where, arguments in with_one_changed(case, lambda one: (3 * one).round().long()):
        with pytest.raises(ValueError, match=r"must be floating, got int64"):
            pytest.fail(f"{where}: {case(*arguments)}")
    assert INTEGER == ("labels", "other_labels", "generated_labels")


@EACH
def test_what_is_not_a_number_is_not_hidden(case: Case) -> None:
    def spoiled(tensor: Tensor) -> Tensor:
        made = tensor.clone()
        made.view(-1)[0] = math.nan
        return made

    for where, arguments in with_one_changed(case, spoiled):
        assert not bool(case(*arguments).isfinite()), where


@EACH
def test_the_layout_in_memory_is_nothing_to_it(case: Case) -> None:
    def strided(tensor: Tensor) -> Tensor:
        return tensor if tensor.dim() < 2 else tensor.transpose(0, -1).contiguous().transpose(0, -1)

    found = case(*(mapped(one, strided) for one in case.arguments))
    assert found.item() == pytest.approx(case(*case.arguments).item(), rel=1e-10, abs=1e-12)


@ORDERED
def test_the_order_of_images_is_nothing_to_it(case: Case) -> None:
    def turned(tensor: Tensor) -> Tensor:
        return tensor[ORDER] if tensor.dim() and len(tensor) == BATCH else tensor

    arguments = [[turned(one) for one in part] if isinstance(part, list) else turned(part) for part in case.arguments]
    assert case(*arguments).item() == pytest.approx(case(*case.arguments).item(), rel=1e-9, abs=1e-12)


def without_first(tensor: Tensor) -> Tensor:
    if not tensor.dim():
        return tensor
    keep = (torch.arange(len(tensor)) > 0).to(tensor.dtype)
    return tensor * keep.view(-1, *[1] * (tensor.dim() - 1))


def in_opposite_directions(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return tensor
    signs = torch.where(torch.arange(len(tensor)) % 2 == 0, 1, -1).to(tensor.dtype)
    return (tensor[:1] * signs.view(-1, *[1] * (tensor.dim() - 1))).clone()


DEGENERATE: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "one image of zeros": without_first,
    "equal or opposite": in_opposite_directions,
    "ten thousand times": lambda tensor: tensor * 1e4,
    "1e-30 times": lambda tensor: tensor * 1e-30,
    "a grid of 2 bits": lambda tensor: tensor.round().clamp(-1, 1),
}


@EACH
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_degenerate_inputs_are_finite_in_value_and_gradient(case: Case, kind: str, dtype: torch.dtype) -> None:
    dtype = torch.float64 if case.has_module else dtype
    if case.wrapped is sampled and kind == "ten thousand times":
        return  # exponentials of logits are estimated: without good normalizers they overflow
    arguments = leaves(case, lambda tensor: DEGENERATE[kind](tensor).to(dtype))
    value = case(*arguments)
    if value.requires_grad:
        value.backward()
    found = [gradient(tensor) for argument in arguments for tensor in tensors(argument)]
    assert bool(value.isfinite()) and all(bool(one.isfinite().all()) for one in found if one is not None)


@ORDERED
def test_a_single_image_is_finite(case: Case) -> None:
    def first(tensor: Tensor) -> Tensor:
        return tensor[:1] if tensor.dim() and len(tensor) == BATCH else tensor

    arguments = [[first(one) for one in part] if isinstance(part, list) else first(part) for part in case.arguments]
    made = [mapped(one, lambda tensor: tensor.clone().requires_grad_()) for one in arguments]
    value = case(*made)
    if value.requires_grad:
        value.backward()
    found = [gradient(tensor) for argument in made for tensor in tensors(argument)]
    assert bool(value.isfinite()) and all(bool(one.isfinite().all()) for one in found if one is not None)


@pytest.mark.parametrize("name", ["soft_target_loss", "logit_square_loss", "logit_distance_loss"])
def test_a_single_class_has_nothing_to_tell(name: str) -> None:
    options = {} if name == "logit_distance_loss" else HOT
    value = getattr(losses, name)(torch.ones(3, 1), torch.ones(3, 1), **options)
    assert value.item() == 0
    needs_two = [losses.decoupled_loss, losses.teacher_confidence_loss]
    for loss in needs_two:
        with pytest.raises(ValueError, match="at least 2 classes, got 1"):
            loss(torch.ones(3, 1), torch.ones(3, 1), torch.zeros(3, dtype=torch.int64), temperature=1.0)


PAIRS = [case for case in CASES if case.constants == (1,) and len(case.arguments) in (2, 3)]


@each(PAIRS)
def test_shapes_that_would_broadcast_are_refused(case: Case) -> None:
    """A teacher of one image would spread over all of the student's, without a word."""
    teacher = case.arguments[1]
    for change in (lambda one: one[:1], lambda one: one[None], lambda one: one[:0]):
        made = [change(one) for one in teacher] if isinstance(teacher, list) else change(teacher)
        with pytest.raises(ValueError, match=r"shape|batch|features|branch|views"):
            case(case.arguments[0], made, *case.arguments[2:])


def weighted(case: Case) -> list[str]:
    """Return the names of a loss's keyword-only weights."""
    parameters = inspect.signature(getattr(losses, case.name)).parameters.values()
    names = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    return [name for name in names if name.endswith("weight") or name in ("alpha", "beta", "eta", "mu")]


WEIGHTED = [(case, name) for case in CASES for name in weighted(case)]


@pytest.mark.parametrize(("case", "name"), WEIGHTED, ids=[f"{name_of(case)}-{name}" for case, name in WEIGHTED])
def test_weights_that_are_negative_or_no_numbers_are_refused(case: Case, name: str) -> None:
    if case.wrapped is not None:
        pytest.fail(f"{case.name} has weights, but its case takes none")
    function = getattr(losses, case.name)
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"{name} must be finite and not negative, got {value}"):
            function(*case.arguments, **{**case.options, name: value})


def test_weights_are_found() -> None:
    assert len(WEIGHTED) > 20


@EACH
def test_parts_that_are_no_scalars_are_refused(case: Case) -> None:
    """A vector among the parts of a sum would make the loss a vector."""
    for place, argument in enumerate(case.arguments):
        if isinstance(argument, Tensor) and not argument.dim():
            made = [*case.arguments[:place], argument.repeat(BATCH), *case.arguments[place + 1 :]]
            with pytest.raises(ValueError, match="must be a scalar"):
                case(*made)


@EACH
def test_images_without_numbers_are_refused(case: Case) -> None:
    def emptied(tensor: Tensor) -> Tensor:
        return tensor[..., :0] if tensor.dim() > 1 else tensor

    if case.name == "proximal_loss":
        return  # of parameters, which may be empty
    with pytest.raises(ValueError):
        case(*(mapped(one, emptied) for one in case.arguments))


def test_opposite_features_do_not_make_a_logarithm_of_a_negative_number() -> None:
    """Rounding takes the cosine of opposite rows below -1: in float32 by more than the loss's epsilon."""
    generator = torch.Generator().manual_seed(3)
    for size in range(2, 40):
        row = torch.randn(1, size, generator=generator)
        student = torch.cat([row, -row]).requires_grad_()
        value = losses.probabilistic_transfer_loss(student, torch.ones(2, 3))
        value.backward()
        assert bool(value.isfinite()) and student.grad is not None and bool(student.grad.isfinite().all())


def test_what_does_not_fit_is_named_before_anything_is_summed() -> None:
    logits, maps = torch.zeros(4, 3), torch.zeros(2, 3, 4, 4)
    labels, part = torch.zeros(4, dtype=torch.int64), torch.tensor(0.0)
    with pytest.raises(ValueError, match="one batch"):
        losses.dafl_generator_loss(logits, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="one batch"):
        losses.deep_inversion_loss(maps, logits, labels, part)
    with pytest.raises(ValueError, match="one batch"):
        losses.mode_seeking_loss(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="even number of images"):
        losses.mode_seeking_loss(torch.zeros(4, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"need features \[batch, \.\.\.\]"):
        losses.mean_discrepancy_loss(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="same classes"):
        losses.adapted_student_loss(logits, logits[:, :2], logits, logits[:, :2], labels, progress=0.5)
    with pytest.raises(ValueError, match="at least one client"):
        empty = torch.zeros(0, 4, 3), torch.zeros(0, 3)
        losses.fedgen_generator_loss(empty[0], labels, empty[1], logits, logits)
    with pytest.raises(ValueError, match="class_weights must not be negative"):
        losses.class_logits_loss(logits, labels, torch.zeros(3, 3), torch.tensor([1.0, -1.0, 0.0]))
    with pytest.raises(ValueError, match="the batch is empty"):
        losses.class_proposal(logits[:0], logits[:0])
    with pytest.raises(ValueError, match="must be a scalar"):
        losses.exponential_increment(torch.zeros(3), 0.0)
    for name in ("start", "least"):
        with pytest.raises(ValueError, match=f"{name} must be finite and not negative"):
            losses.fedgen_weight(1, **{name: -1.0})
