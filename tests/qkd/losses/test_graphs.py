"""MHGD and RKD on logits: naive formulas, what is trained by which loss, gradients, features of nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.losses import (
    graph_attention_loss,
    graph_divergence,
    logit_relation_loss,
    multi_head_graph_loss,
    singular_vector_loss,
)
from qkd.losses.singular import aligned_vectors, main_direction
from qkd.terms.head_graph import MultiHeadGraph, PairAttention, PairEstimator

BATCH = 5
SHAPES = ((4, 3, 3), (6, 2, 2), (5, 2, 2))
WIDTHS = tuple(shape[0] for shape in SHAPES)


def features(seed: int, shapes=SHAPES, dtype: torch.dtype = torch.float64, batch: int = BATCH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(batch, *shape, generator=generator, dtype=dtype) + 0.05 for shape in shapes]


def graph_module(students=WIDTHS, dtype: torch.dtype = torch.float64, heads: int = 2) -> MultiHeadGraph:
    torch.manual_seed(0)
    module = MultiHeadGraph(students, WIDTHS, heads=heads).to(dtype)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d):  # neither their start nor what a batch would give
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 2.0)
            part.num_batches_tracked += 1  # as after training
    return module


def gradients(parts: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in parts.parameters()]


# --- MHGD


def naive_graph(attention: PairAttention, later: Tensor, before: Tensor) -> Tensor:
    def head(rows: Tensor, linear: nn.Linear, norm: nn.BatchNorm1d) -> Tensor:
        rows = rows @ linear.weight.T + linear.bias
        return (rows - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias

    senders = head(later, attention.sender, attention.sender_norm)
    receivers = head(before, attention.receiver, attention.receiver_norm)
    inner = senders.shape[1] // attention.heads
    parts = [slice(h * inner, (h + 1) * inner) for h in range(attention.heads)]
    return torch.stack([torch.tanh(senders[:, part] @ receivers[:, part].T) for part in parts])


@torch.no_grad()
def test_it_is_the_naive_formula_on_running_statistics() -> None:
    students, teachers, module = features(0), features(1), graph_module()
    vectors = [aligned_vectors(s, t) for s, t in zip(students, teachers, strict=True)]
    expected = 0.0
    for i, attention in enumerate(module.attention, start=1):
        ours, theirs = (naive_graph(attention, vectors[i][role], vectors[i - 1][role]) for role in (0, 1))
        for h in range(2):
            for row in range(BATCH):
                p, q = ours[h, row].softmax(0), theirs[h, row].softmax(0)
                expected += float((p * (p / q).log()).sum())
    assert expected > 1e-4
    assert multi_head_graph_loss(students, teachers, module=module).item() == pytest.approx(expected, rel=1e-9)


def test_sizes_are_those_published() -> None:
    module = MultiHeadGraph(WIDTHS, WIDTHS)
    assert [part.sender.out_features for part in module.attention] == [4 * ((4 + 6) // 2), 4 * ((6 + 5) // 2)]
    graphs = module.graphs([torch.randn(3, width) for width in WIDTHS], learns=False)
    assert [tuple(graph.shape) for graph in graphs] == [(4, 3, 3)] * 2
    assert all(bool((graph.abs() < 1).all()) for graph in graphs)


def test_divergence_by_hand() -> None:
    student = torch.tensor([[[0.0, math.log(3)]]])  # probabilities 1/4, 3/4
    teacher = torch.tensor([[[0.0, 0.0]]])  # 1/2, 1/2
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert graph_divergence(student, teacher).item() == pytest.approx(expected, rel=1e-6)
    assert graph_divergence(student.repeat(2, 3, 1), teacher.repeat(2, 3, 1)).item() == pytest.approx(6 * expected)


def test_equal_features_scale_and_sign_give_nothing() -> None:
    teachers, module = features(1), graph_module()
    assert multi_head_graph_loss(teachers, teachers, module=module).item() == pytest.approx(0, abs=1e-15)
    changed = [-1e4 * map_.flip(2) for map_ in teachers]
    assert multi_head_graph_loss(changed, teachers, module=module).item() == pytest.approx(0, abs=1e-12)
    students = features(0)
    expected = multi_head_graph_loss(students, teachers, module=module).item()
    turned = [-teachers[0], *teachers[1:]]
    assert multi_head_graph_loss(students, turned, module=module).item() == pytest.approx(expected, rel=1e-9)


def test_the_attention_is_a_constant_of_the_loss_and_its_statistics_stand_still() -> None:
    students, teachers, module = [map_.requires_grad_() for map_ in features(0)], features(1), graph_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    multi_head_graph_loss(students, teachers, module=module).backward()
    assert all(gradient is None for gradient in gradients(module))
    assert all(map_.grad is not None and bool(map_.grad.any()) for map_ in students)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_gradient_of_the_graph_loss() -> None:
    shapes = ((4, 2, 1), (6, 1, 2), (5, 1, 1))
    students, teachers, module = features(0, shapes, batch=3), features(1, shapes, batch=3), graph_module()
    students = [map_.requires_grad_() for map_ in students]
    assert torch.autograd.gradcheck(lambda *maps: multi_head_graph_loss(maps, teachers, module=module), students)


def test_adapters_learn_from_the_graph_loss_alone() -> None:
    students = features(0, ((2, 3, 3), (6, 2, 2), (3, 2, 2)), torch.float32)
    teachers, module = features(1, dtype=torch.float32), graph_module((2, 6, 3), torch.float32)
    multi_head_graph_loss(students, teachers, module=module).backward()
    assert [gradient is not None and bool(gradient.any()) for gradient in gradients(module.adapters)] == [True, True]
    module.zero_grad()
    graph_attention_loss(teachers, module=module).backward()
    assert gradients(module.adapters) == [None, None]


def test_an_attention_for_other_widths_is_refused() -> None:
    with pytest.raises(ValueError, match=r"for features of \(3, 6, 2\) channels, got \(4, 6, 5\)"):
        graph_attention_loss(features(1, dtype=torch.float32), module=MultiHeadGraph((3, 6, 2), (3, 6, 2)))


def test_an_attention_that_never_learned_is_refused_unless_it_is_meant_to_be_random() -> None:
    torch.manual_seed(0)
    module = MultiHeadGraph(WIDTHS, WIDTHS).double()
    assert not module.is_trained
    with pytest.raises(
        ValueError, match="attention of multi_head_graph was never trained: let a phase with graph_attent"
    ):
        multi_head_graph_loss(features(0), features(1), module=module)
    assert multi_head_graph_loss(features(0), features(1), module=module, attention="random").item() > 0
    graph_attention_loss(features(1), module=module)
    assert module.is_trained
    multi_head_graph_loss(features(0), features(1), module=module)


def test_with_the_singular_vectors_loss_it_is_the_sum() -> None:
    students, teachers, module = features(0), features(1), graph_module()
    graphs = multi_head_graph_loss(students, teachers, module=module)
    vectors = singular_vector_loss(students, teachers)
    both = multi_head_graph_loss(students, teachers, module=module, singular_weight=0.3)
    torch.testing.assert_close(both, graphs + 0.3 * vectors)


# --- the attention's own loss


@torch.no_grad()
def test_attention_loss_is_the_naive_formula() -> None:
    teachers, module = features(1), graph_module().eval()
    vectors = [main_direction(map_) for map_ in teachers]
    expected, squares = 0.0, 0.0
    for i, (attention, estimator) in enumerate(zip(module.attention, module.estimators, strict=True), start=1):
        graph = naive_graph(attention, vectors[i], vectors[i - 1])
        read = estimator.read(vectors[i - 1]).unflatten(1, (2, -1))
        joined = torch.stack([(graph[h] @ read[:, h]) / BATCH for h in range(2)], dim=1).flatten(1)
        guess = estimator.write(estimator.norm(estimator.mix(joined)).relu())
        expected += float((1 - functional.cosine_similarity(guess, vectors[i])).mean())
        for linear in (attention.sender, attention.receiver, estimator.read, estimator.mix, estimator.write):
            squares += float(linear.weight.square().sum())
    found = graph_attention_loss(teachers, module=module)
    assert found.item() == pytest.approx(expected + 5e-4 * squares, rel=1e-9)
    assert graph_attention_loss(teachers, module=module, weight_decay=0.0).item() == pytest.approx(expected, rel=1e-9)


def test_attention_learns_and_notes_statistics() -> None:
    teachers, module = features(1, dtype=torch.float32, batch=16), graph_module(dtype=torch.float32)
    mean = module.attention[0].sender_norm.running_mean.clone()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    start = graph_attention_loss(teachers, module=module.eval()).item()
    module.train()
    for _ in range(60):
        optimizer.zero_grad()
        graph_attention_loss(teachers, module=module).backward()
        optimizer.step()
    assert graph_attention_loss(teachers, module=module.eval()).item() < 0.7 * start
    assert not torch.equal(module.attention[0].sender_norm.running_mean, mean)


def test_gradient_of_the_attention_loss_reaches_every_weight() -> None:
    teachers, module = features(1), graph_module()
    torch.manual_seed(0)
    graph_attention_loss(teachers, module=module).backward()
    trained = [*gradients(module.attention), *gradients(module.estimators)]
    assert all(gradient is not None and bool(gradient.any()) for gradient in trained)
    weight = module.attention[0].sender.weight

    def loss(value: Tensor) -> Tensor:
        with torch.no_grad():
            weight.copy_(value)
        return graph_attention_loss(teachers, module=module)

    for part in module.estimators:
        part.dropout = 0.0  # the same at each call
    step, at = 1e-6, weight.detach().clone()
    module.zero_grad()
    loss(at).backward()
    assert weight.grad is not None
    found = float(weight.grad[0, 0])
    nudge = torch.zeros_like(at)
    nudge[0, 0] = step
    with torch.no_grad():
        numeric = float(loss(at + nudge) - loss(at - nudge)) / (2 * step)
    assert found == pytest.approx(numeric, rel=1e-5)


def test_heads_are_dropped_for_each_image_in_training_only() -> None:
    torch.manual_seed(0)
    estimator = PairEstimator(3, 4, heads=4, dropout=0.5)
    graph, before = torch.rand(4, 8, 8), torch.rand(8, 4)
    assert torch.equal(estimator.eval()(graph, before), estimator(graph, before))
    estimator.train()
    torch.manual_seed(1)
    first = estimator(graph, before)
    torch.manual_seed(1)
    assert torch.equal(first, estimator(graph, before))
    assert not torch.equal(first, estimator(graph, before))


# --- RKD on logits


def test_logit_relations_are_the_naive_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(BATCH, 7, generator=generator, dtype=torch.float64) for _ in range(2))

    def relations(z: Tensor) -> tuple[Tensor, Tensor]:
        x = z / z.norm(dim=1, keepdim=True)
        squares = (x[:, None] - x[None]).square().sum(2)
        apart = squares.clamp_min(1e-12).sqrt()
        away = functional.normalize(x[None] - x[:, None], dim=2)
        return apart / (apart[apart > 0].mean() + 1e-8), torch.einsum("ijd,ikd->ijk", away, away)

    (d, a), (e, b) = relations(student), relations(teacher)
    expected = 50 * functional.huber_loss(d, e) + 100 * functional.huber_loss(a, b)
    torch.testing.assert_close(logit_relation_loss(student, teacher), expected, rtol=1e-9, atol=0)


def test_logit_relations_by_hand() -> None:
    # Two images: distances 2 and sqrt(2) over their means 1 and 1/sqrt(2) are the same; so are the angles.
    student = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    assert logit_relation_loss(student, teacher).item() == pytest.approx(0, abs=1e-8)
    # Three on the axes (all sqrt(2) apart) against a pair of opposites and one between: 2, sqrt(2), sqrt(2).
    student, teacher = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0]]), torch.eye(3)
    root = math.sqrt(2)
    means = (4 + 4 * root) / 9, 6 * root / 9
    distance = (
        2 * (0.5 * (2 / means[0] - root / means[1]) ** 2 + 2 * 0.5 * (root / means[0] - root / means[1]) ** 2) / 9
    )
    cosines = (root / 2, root / 2, 0.0)  # at the corners; in a regular triangle 1/2 each
    angle = 2 * sum(0.5 * (cosine - 0.5) ** 2 for cosine in cosines) / 27
    assert logit_relation_loss(student, teacher).item() == pytest.approx(50 * distance + 100 * angle, rel=1e-4)
    assert logit_relation_loss(student, teacher, angle_weight=0).item() == pytest.approx(50 * distance, rel=1e-4)


def test_logit_relations_ignore_size_and_rotation_and_have_a_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(BATCH, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    sizes = torch.tensor([[1.0], [2.0], [1e3], [0.1], [7.0]], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    assert logit_relation_loss(sizes * teacher @ rotation, teacher).item() == pytest.approx(0, abs=1e-18)
    constant = teacher.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: logit_relation_loss(z, constant), student.requires_grad_())
    logit_relation_loss(student, constant).backward()
    assert constant.grad is None


# --- features and logits of nothing

HOSTILE = {
    "zeros": lambda rows: rows * 0,
    "constant": lambda rows: rows * 0 + 0.7,
    "huge": lambda rows: rows * 1e4,
    "one hot": lambda rows: torch.zeros_like(rows).index_fill_(1, torch.tensor([1]), 1.0),
}


@pytest.mark.parametrize("student_kind", HOSTILE)
@pytest.mark.parametrize("teacher_kind", HOSTILE)
def test_losses_and_gradients_are_finite_for_any_input(student_kind: str, teacher_kind: str) -> None:
    students = [HOSTILE[student_kind](map_).requires_grad_() for map_ in features(0, dtype=torch.float32)]
    teachers = [HOSTILE[teacher_kind](map_) for map_ in features(1, dtype=torch.float32)]
    module = graph_module(dtype=torch.float32)
    loss = multi_head_graph_loss(students, teachers, module=module) + graph_attention_loss(teachers, module=module)
    logits = students[0].flatten(1)
    loss = loss + logit_relation_loss(logits, teachers[0].flatten(1))
    loss.backward()
    assert loss.dtype == torch.float32 and math.isfinite(loss.item())
    found = [*(map_.grad for map_ in students), *gradients(module.attention), *gradients(module.estimators)]
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in found)


def test_reduced_precision_does_not_reach_the_graphs() -> None:
    students, teachers = features(0, dtype=torch.float32), features(1, dtype=torch.float32)
    module = graph_module(dtype=torch.float32)
    expected = multi_head_graph_loss(students, teachers, module=module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = multi_head_graph_loss(students, teachers, module=module)
    assert torch.equal(found, expected)


# --- refusals


def test_what_they_refuse() -> None:
    module = graph_module()
    with pytest.raises(ValueError, match="at least 2, got 1 and 1"):
        multi_head_graph_loss(features(0)[:1], features(1)[:1], module=module)
    with pytest.raises(ValueError, match="at least 2, got 1 and 1"):
        graph_attention_loss(features(1)[:1], module=module)
    with pytest.raises(ValueError, match="at least 2 images in a batch, got 1"):
        graph_attention_loss(features(1, batch=1), module=module)
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative, got -1"):
        graph_attention_loss(features(1), module=module, weight_decay=-1.0)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        MultiHeadGraph([4], [4])
    with pytest.raises(ValueError, match="heads must be at least 1, got heads=0"):
        MultiHeadGraph([4, 4], [4, 4], heads=0)
    with pytest.raises(ValueError, match="needs its attention as module="):
        multi_head_graph_loss(features(0), features(1))
    with pytest.raises(ValueError, match="needs its attention as module="):
        graph_attention_loss(features(1))
    with pytest.raises(ValueError, match="singular_weight must be finite and not negative, got -1"):
        multi_head_graph_loss(features(0), features(1), module=module, singular_weight=-1.0)
    with pytest.raises(ValueError, match="attention must be one of trained, random, got 'released'"):
        multi_head_graph_loss(features(0), features(1), module=module, attention="released")
    with pytest.raises(ValueError, match=r"of the same shape \[batch, classes\]"):
        logit_relation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="angle_weight must be finite"):
        logit_relation_loss(torch.zeros(2, 3), torch.zeros(2, 3), angle_weight=math.nan)
