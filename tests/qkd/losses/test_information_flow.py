"""Information flow modeling: every kernel and divergence against its formula, its invariances, and its hazards."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qkd.losses import information_flow_loss
from qkd.losses.given import teacher_in_graph
from qkd.losses.information_flow import DIVERGENCES, KERNELS

BATCH = 6
SINGLE = [kernel for kernel in KERNELS if kernel != "combined"]


def feature(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_probabilities(f: Tensor, kernel: str, sigma: float) -> Tensor:
    rows = f.reshape(len(f), -1)
    apart = ((rows[:, None] - rows[None]).square().sum(2) + 1e-6).sqrt()
    norms = rows.norm(dim=1) + 1e-6
    matrix = {
        "cosine": (rows @ rows.T / (norms[:, None] * norms[None]) + 1) / 2,
        "t": 1 / (1 + apart),
        "rbf": (-apart / sigma).exp(),
        "adaptive_rbf": (-apart / apart.mean()).exp(),
        "cauchy": 1 / (1 + apart**2 / sigma**2),
    }[kernel]
    return matrix / matrix.sum(1, keepdim=True)


def naive_divergence(p: Tensor, q: Tensor, divergence: str) -> Tensor:
    return {
        "jeffreys": (p - q) * (p.log() - q.log()),
        "kl": p * (1e-6 + p / (1e-6 + q)).log(),
        "abs": (p - q).abs(),
        "squared": (p - q) ** 2,
        "exponential": p * (p.log() - q.log()) ** 2,
        "kagan": (p - q) ** 2 / p,
    }[divergence].mean()


def naive(student: Tensor, teacher: Tensor, kernel: str, divergence: str, sigma: float = 1.0) -> Tensor:
    p, q = (naive_probabilities(f, kernel, sigma) for f in (teacher, student))
    return naive_divergence(p, q, divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_kernel_is_the_naive_formula(divergence: str) -> None:
    student, teacher = feature(0, BATCH, 3, 2, 2), feature(1, BATCH, 5)
    for sigma in (1.0, 2.5):
        parts = {kernel: naive(student, teacher, kernel, divergence, sigma) for kernel in SINGLE}
        for kernel, expected in {**parts, "combined": parts["cosine"] + parts["t"]}.items():
            options = {"kernel": kernel, "divergence": divergence, "sigma": sigma}
            found = information_flow_loss(student, teacher, **options)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
            rows = information_flow_loss(student, teacher, reduction="row_mean", **options)
            torch.testing.assert_close(rows, BATCH * expected, rtol=1e-9, atol=1e-15)


def test_two_images_by_hand() -> None:
    # teacher: distance 1, so the T kernel is 1/(1 + 1) beside 1 on the diagonal; student: distance 3
    teacher, student = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[0.0], [3.0]]).double()
    at_zero = 1 / (1 + 1e-3)
    p, q = 0.5 / (0.5 + at_zero), 0.25 / (0.25 + at_zero)
    rest = (1 - p, 1 - q)
    wanted = ((p - q) * math.log(p / q) + (rest[0] - rest[1]) * math.log(rest[0] / rest[1])) / 2
    assert information_flow_loss(student, teacher, kernel="t").item() == pytest.approx(wanted, rel=1e-6)
    wanted = (abs(p - q) + abs(rest[0] - rest[1])) / 2
    found = information_flow_loss(student, teacher, kernel="t", divergence="abs").item()
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_zero_on_itself_rotation_and_order_of_the_batch(kernel: str, divergence: str) -> None:
    options = {"kernel": kernel, "divergence": divergence}
    student, teacher = feature(0, BATCH, 8), feature(1, BATCH, 8)
    rotation = torch.linalg.qr(feature(2, 8, 8)).Q
    itself = information_flow_loss(teacher, teacher, **options).item()
    assert (itself == 0) if divergence != "kl" else (abs(itself) < 2e-5), "kl is off by its epsilon"
    turned = information_flow_loss(teacher @ rotation, teacher, **options).item()
    assert abs(turned - itself) < 1e-13
    found = information_flow_loss(student, teacher, **options)
    assert found.item() > 0
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(information_flow_loss(student[order], teacher[order], **options), found)
    if divergence in ("jeffreys", "abs", "squared"):
        torch.testing.assert_close(information_flow_loss(teacher, student, **options), found, rtol=1e-12, atol=0)


def test_which_kernels_see_scale() -> None:
    teacher = feature(1, BATCH, 8)
    for kernel in KERNELS:
        scaled = information_flow_loss(2 * teacher, teacher, kernel=kernel).item()
        ignores = kernel in ("cosine", "adaptive_rbf")
        assert (scaled < 1e-8) if ignores else (scaled > 1e-5), f"{kernel}: {scaled}"
        assert information_flow_loss(2 * teacher, teacher, kernel=kernel, normalize=True).item() < 1e-12


def test_jeffreys_ignores_neither_side_and_kl_only_the_unlikely() -> None:
    teacher, student = feature(0, BATCH, 8), feature(1, BATCH, 8)
    p, q = (naive_probabilities(f, "cosine", 1.0) for f in (teacher, student))
    both = (p * (p / q).log()).mean() + (q * (q / p).log()).mean()
    torch.testing.assert_close(information_flow_loss(student, teacher, kernel="cosine"), both, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients(kernel: str, divergence: str) -> None:
    student, teacher = feature(0, 4, 2, 2).requires_grad_(), feature(1, 4, 2, 2).requires_grad_()

    def loss(s: Tensor) -> Tensor:
        return information_flow_loss(s, teacher, kernel=kernel, divergence=divergence)

    value = loss(student)
    assert value.shape == () and value.dtype == torch.float64
    if kernel != "adaptive_rbf":  # its sigma is a constant to the gradient, not to a difference quotient
        assert torch.autograd.gradcheck(loss, student, atol=1e-6)
    value.backward()
    assert teacher.grad is None and bool(student.grad.any())


def test_the_adaptive_width_is_a_constant() -> None:
    student, teacher = feature(0, 4, 3).requires_grad_(), feature(1, 4, 3)
    apart = ((student[:, None] - student[None]).square().sum(2) + 1e-6).sqrt()
    matrix = (-apart / apart.detach().mean()).exp()
    q, p = matrix / matrix.sum(1, keepdim=True), naive_probabilities(teacher, "adaptive_rbf", 1.0)
    (expected,) = torch.autograd.grad(naive_divergence(p, q, "jeffreys"), student)
    (found,) = torch.autograd.grad(information_flow_loss(student, teacher, kernel="adaptive_rbf"), student)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-15)


@pytest.mark.parametrize("kind", ["zero", "some zero", "constant", "huge", "one hot", "opposite", "equal pairs"])
def test_degenerate_features_stay_finite(kind: str) -> None:
    plain = feature(0, BATCH, 2, 3, 3, dtype=torch.float32)
    some_zero = plain.clone()
    some_zero[::2] = 0
    one_hot = torch.zeros_like(plain)
    one_hot[:, 0, 1, 1] = 1
    made = {
        "zero": torch.zeros_like(plain), "some zero": some_zero, "constant": torch.full_like(plain, 3.0),
        "huge": 1e4 * plain, "one hot": one_hot, "opposite": torch.cat([plain[:3], -plain[:3]]),
        "equal pairs": plain[:3].repeat(2, 1, 1, 1),
    }[kind]  # fmt: skip
    for kernel in KERNELS:
        for divergence in DIVERGENCES:
            for normalize in (False, True):
                for student, teacher in ((made, plain), (plain, made), (made, made)):
                    leaf = student.clone().requires_grad_()
                    value = information_flow_loss(
                        leaf, teacher, kernel=kernel, divergence=divergence, normalize=normalize
                    )
                    value.backward()
                    finite = bool(value.isfinite()) and bool(leaf.grad.isfinite().all())
                    assert finite and value.dtype == torch.float32, (kernel, divergence, normalize)


def test_probabilities_that_underflow_still_pull() -> None:
    near, far = feature(0, BATCH, 4, dtype=torch.float32), 1e3 * feature(1, BATCH, 4, dtype=torch.float32)
    leaf = far.requires_grad_()
    value = information_flow_loss(leaf, near, kernel="rbf")
    value.backward()
    assert value.item() > 1, "the logarithm of exp(-1000) is -1000, not minus infinity"
    assert bool(leaf.grad.any(dim=1).all())


@pytest.mark.parametrize("shapes", [((4, 2, 2, 2), (3, 2, 2, 2)), ((4,), (4,))])
def test_refused_features(shapes) -> None:
    with pytest.raises(ValueError, match="features"):
        information_flow_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kernel": "rbff"}, "kernel must be one of adaptive_rbf, cauchy, combined, cosine, rbf, t, got 'rbff'"),
        ({"divergence": "js"}, "divergence must be one of abs, exponential, jeffreys, kagan, kl, squared, got 'js'"),
        ({"reduction": "sum"}, "reduction must be one of mean, row_mean"),
        ({"sigma": 0.0}, r"sigma must be positive and finite, got sigma=0\.0"),
        ({"sigma": math.inf}, "sigma must be positive"),
    ],
)
def test_refused_options(options, match: str) -> None:
    f = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=match):
        information_flow_loss(f, f, **options)


def test_the_adaptive_width_of_a_teacher_that_learns_is_part_of_it() -> None:
    """MetaDistil's gradient is that of the whole loss by the teacher; a constant width made it thrice that."""
    student, teacher = feature(0, 4, 3), feature(1, 4, 3).requires_grad_()

    def loss(t: Tensor) -> Tensor:
        with teacher_in_graph():
            return information_flow_loss(student, t, kernel="adaptive_rbf")

    assert torch.autograd.gradcheck(loss, teacher, atol=1e-6)
