"""KD-SVD: the naive formula, freedom of sign and scale, gradients, equal and missing singular values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qkd.losses import aligned_vectors, right_singular_vectors, singular_vector_loss
from qkd.losses.singular import _by_powers, _matrix, main_direction
from qkd.terms.width_adapters import WidthAdapters

BATCH = 3
SHAPES = ((4, 5, 5), (6, 3, 3), (9, 2, 2))  # the last two are wider than high, as deep features of small images are


def features(seed: int, shapes=SHAPES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, *shape, generator=generator, dtype=dtype).relu() for shape in shapes]


def naive_vector(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return one image's aligned vectors from full decompositions."""
    ours, theirs = (torch.linalg.svd(map_.flatten(1).T)[2] for map_ in (student, teacher))
    target = theirs[0] if theirs[0].sum() > 0 else -theirs[0]
    cosines = ours[: min(4, *student.flatten(1).shape)] @ target
    best = int(cosines.abs().argmax())
    return ours[best] * cosines[best].sign(), target


def naive_loss(students: list[Tensor], teachers: list[Tensor]) -> float:
    total = 0.0
    for image in range(BATCH):
        pairs = [naive_vector(s[image], t[image]) for s, t in zip(students, teachers, strict=True)]
        for (s, t), (s_before, t_before) in zip(pairs[1:], pairs[:-1], strict=True):
            for d in range(len(s)):
                for e in range(len(s_before)):
                    ours, theirs = (s[d] - s_before[e]) ** 2, (t[d] - t_before[e]) ** 2
                    total += (math.exp(-ours / 8) - math.exp(-theirs / 8)) ** 2
    return total


def test_it_is_the_naive_formula_with_other_heights_and_widths() -> None:
    students = features(0, ((4, 6, 2), (6, 2, 2), (9, 3, 3)))
    teachers = features(1)
    expected = naive_loss(students, teachers)
    assert expected > 1e-3
    assert singular_vector_loss(students, teachers).item() == pytest.approx(expected, rel=1e-10)


def test_by_hand() -> None:
    # One position: the vector is the feature itself, of length 1: (0.6, 0.8) after (1), against (1, 0) after (1).
    students = [torch.tensor([[[[2.0]]]]), torch.tensor([[[[3.0]], [[4.0]]]])]
    teachers = [torch.tensor([[[[5.0]]]]), torch.tensor([[[[7.0]], [[0.0]]]])]
    kernel = [math.exp(-0.16 / 8), math.exp(-0.04 / 8)], [1.0, math.exp(-1 / 8)]
    expected = sum((a - b) ** 2 for a, b in zip(*kernel, strict=True))
    assert singular_vector_loss(students, teachers).item() == pytest.approx(expected, rel=1e-5)
    flat = [map_.flatten(1) for map_ in students], [map_.flatten(1) for map_ in teachers]
    assert singular_vector_loss(*flat).item() == pytest.approx(expected, rel=1e-5)


def test_the_likest_of_the_candidates_is_taken_and_turned() -> None:
    axes = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    axes = axes * axes.sum(0).sign()  # each column adds up to something positive
    sizes = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    student = (torch.diag(sizes) @ axes.T).T[None, :, :, None]  # singular vectors: the axes, by size
    for place in range(5):
        teacher = (-7 * axes[:, place])[None, :, None, None]
        vector, target = aligned_vectors(student, teacher)
        torch.testing.assert_close(target[0], axes[:, place])
        wanted = axes[:, place] if place < 4 else torch.zeros(5, dtype=torch.float64)  # the fifth is no candidate
        if place < 4:
            torch.testing.assert_close(vector[0], wanted)
        else:
            assert abs(float(vector[0] @ target[0])) < 1e-12


def test_equal_features_sign_scale_and_order_of_positions_do_not_matter() -> None:
    teachers = features(1)
    assert singular_vector_loss(teachers, teachers).item() == pytest.approx(0, abs=1e-24)
    changed = [-3 * map_.flip(2).flip(3) for map_ in teachers]
    assert singular_vector_loss(changed, teachers).item() == pytest.approx(0, abs=1e-24)
    students = features(0)
    expected = singular_vector_loss(students, teachers).item()
    signs = (1e-3, -1e4, -1.0)
    turned = [map_ * sign for map_, sign in zip(teachers, signs, strict=True)]
    assert expected > 1e-3
    assert singular_vector_loss(students, turned).item() == pytest.approx(expected, rel=1e-10)
    assert singular_vector_loss(students[:2], [-teachers[0], teachers[1]]).item() == pytest.approx(
        singular_vector_loss(students[:2], teachers[:2]).item(), rel=1e-10
    )


def test_a_rotation_of_positions_keeps_the_vectors_and_one_of_channels_turns_them() -> None:
    feature = features(0)[0]
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    turned = torch.einsum("bchw,cd->bdhw", feature, rotation)
    before, after = main_direction(feature), main_direction(turned)
    assert (before @ rotation * after).sum(1).abs().tolist() == pytest.approx([1.0] * BATCH, abs=1e-12)


@pytest.mark.parametrize("shape", [(4, 3, 3), (5, 2, 2), (5, 1, 1), (3, 1, 3)])
def test_vectors_are_those_of_a_full_decomposition(shape: tuple[int, int, int]) -> None:
    feature = torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.svd(feature.flatten(2).mT, full_matrices=False)[2][:, :4]
    found = right_singular_vectors(feature, 4)
    assert found.shape == expected.shape
    torch.testing.assert_close((found * expected).sum(2).abs(), torch.ones(expected.shape[:2], dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 2, 2), (5, 1, 3), (4, 2, 2), (3, 1, 1)])
def test_the_gradient_is_that_of_the_decomposition(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()
    other = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: right_singular_vectors(x, 4).square(), feature)
    assert torch.autograd.gradcheck(lambda x: aligned_vectors(x, other)[0], feature)


def test_the_gradient_of_the_loss_and_none_to_the_teacher() -> None:
    shapes = ((3, 2, 2), (4, 2, 1))  # moved off zero: at a zero singular value there is no derivative
    students = [(map_ + 0.1 * map_.cos()).requires_grad_() for map_ in features(0, shapes)]
    teachers = [map_.requires_grad_() for map_ in features(1, shapes)]
    assert torch.autograd.gradcheck(lambda *maps: singular_vector_loss(maps, teachers), students)
    singular_vector_loss(students, teachers).backward()
    assert all(map_.grad is None for map_ in teachers)


def test_what_stays_in_the_kernel_counts_in_the_gradient() -> None:
    """A matrix of rank 1 whose vector leaves its span: a naive thin gradient would be zero."""
    feature = torch.tensor([[[[2.0]], [[0.0]]]], dtype=torch.float64, requires_grad=True)
    right_singular_vectors(feature, 1)[0, 0, 1].backward()
    assert feature.grad is not None
    assert feature.grad.flatten().abs().tolist() == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 6, 6), (12, 3, 3), (5, 1, 1)])
def test_the_teachers_vector_by_powers_is_that_of_a_decomposition(shape: tuple[int, int, int], dtype) -> None:
    feature = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    feature[0] = 0
    feature[1] *= 1e-30 if dtype == torch.float32 else 1e-200
    found = _by_powers(_matrix(feature))
    assert found is not None and not found[0].any()
    expected = right_singular_vectors(feature, 1)[:, 0]
    torch.testing.assert_close(found, expected * expected.sum(1, keepdim=True).sign(), rtol=0, atol=1e-6)
    if dtype == torch.float64:
        torch.testing.assert_close(found, expected * expected.sum(1, keepdim=True).sign(), rtol=0, atol=1e-13)


def test_powers_give_up_where_they_could_be_wrong() -> None:
    slow = torch.eye(4)[None] + torch.diag(torch.tensor([0, 0, 0, 1e-6]))  # singular values that are all but equal
    assert _by_powers(slow) is None
    assert main_direction(slow[..., None]).abs().argmax() == 3
    assert _by_powers(torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])) is None  # a start of ones would miss (1, -1)
    assert _by_powers(torch.tensor([[[math.nan, 1.0], [1.0, 1.0]]])) is None


HOSTILE = {
    "zeros": lambda map_: map_ * 0,
    "constant": lambda map_: map_ * 0 + 0.7,
    "huge": lambda map_: map_ * 1e4,
    "beyond squares": lambda map_: map_ * 1e30,
    "tiny": lambda map_: map_ * 1e-30,
    "one hot": lambda map_: torch.zeros_like(map_).index_fill_(1, torch.tensor([1]), 1.0),
    "one value": lambda map_: (map_ * 0).index_put_((torch.arange(len(map_)), torch.tensor(0)), torch.tensor(1.0)),
    "equal singular values": lambda map_: torch.eye(map_.shape[1])[None, :, :, None].repeat(len(map_), 1, 1, 1),
    "one image of zeros": lambda map_: map_ * (torch.arange(len(map_)) > 0).float()[:, None, None, None],
}


@pytest.mark.parametrize("student_kind", HOSTILE)
@pytest.mark.parametrize("teacher_kind", ["zeros", "huge", "one hot", "equal singular values"])
def test_loss_and_gradient_are_finite_for_any_features(student_kind: str, teacher_kind: str) -> None:
    students = [HOSTILE[student_kind](map_).requires_grad_() for map_ in features(0, dtype=torch.float32)]
    teachers = [HOSTILE[teacher_kind](map_) for map_ in features(1, dtype=torch.float32)]
    loss = singular_vector_loss(students, teachers)
    loss.backward()
    assert loss.dtype == torch.float32 and math.isfinite(loss.item())
    for map_ in students:
        assert map_.grad is not None and bool(map_.grad.isfinite().all())
        if student_kind == "zeros":
            assert not map_.grad.any()


def test_features_that_are_not_finite_are_not_hidden() -> None:
    students, teachers = features(0, dtype=torch.float32), features(1, dtype=torch.float32)
    students[1][0, 0, 0, 0] = math.nan
    assert math.isnan(singular_vector_loss(students, teachers).item())


def test_it_teaches() -> None:
    teachers = features(1)
    students = [map_.requires_grad_() for map_ in features(0)]
    optimizer = torch.optim.Adam(students, lr=0.05)
    start = singular_vector_loss(students, teachers).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss = singular_vector_loss(students, teachers)
        loss.backward()
        optimizer.step()
    assert loss.item() < start / 20


def test_adapters_bridge_widths_and_learn() -> None:
    torch.manual_seed(0)
    students, teachers = features(0, ((4, 3, 3), (5, 2, 2)), torch.float32), features(1, SHAPES[:2], torch.float32)
    adapters = WidthAdapters([4, 5], [4, 6])
    assert [tuple(parameter.shape) for parameter in adapters.parameters()] == [(6, 5)]
    singular_vector_loss(students, teachers, module=adapters).backward()
    (parameter,) = adapters.parameters()
    assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
    assert adapters(students)[0] is students[0]
    with pytest.raises(ValueError, match="student and teacher must have the same number of widths, got 1 and 2"):
        WidthAdapters([1], [1, 2])


@pytest.mark.parametrize(
    ("students", "teachers", "candidates", "message"),
    [
        (SHAPES[:1], SHAPES[:1], 4, "at least 2, got 1 and 1"),
        (SHAPES, SHAPES[:2], 4, "student and teacher need the same number of features, at least 2, got 3 and 2"),
        (
            SHAPES[:2],
            (SHAPES[0], (7, 3, 3)),
            4,
            "6 channels and the teacher's 7: tap layers of the same width, or give",
        ),
        (SHAPES, SHAPES, 0, "candidates must be at least 1 and an integer, got 0"),
    ],
)
def test_what_it_refuses(students, teachers, candidates: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        singular_vector_loss(features(0, students), features(1, teachers), candidates=candidates)


def test_batches_that_differ_are_refused() -> None:
    students = [features(0)[0], features(0)[1][:2]]
    with pytest.raises(ValueError, match="batches of 2, 3"):
        singular_vector_loss(students, students)
    with pytest.raises(ValueError, match="of one batch"):
        singular_vector_loss(features(0), [map_[:1] for map_ in features(1)])
