"""Values of the losses of logits and features against formulas written down again in plain numpy, to 1e-9."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from qkd import losses

BATCH, CLASSES, HEAT = 6, 5, 3.0
Y = np.array([0, 1, 2, 3, 4, 1])
LABELS = torch.from_numpy(Y)
Array = np.ndarray


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENT, TEACHER, ROWS = drawn(0, BATCH, CLASSES) * 2, drawn(1, BATCH, CLASSES) * 2, drawn(2, CLASSES, 4)
MAPS, OTHERS, ALIKE = drawn(3, BATCH, 3, 4, 4), drawn(4, BATCH, 7, 4, 4), drawn(5, BATCH, 3, 4, 4)
STAGES = [[drawn(seed, BATCH, 3, 4, 4), drawn(seed + 1, BATCH, 4, 2, 2)] for seed in (6, 8)]
Z, V, W = STUDENT.numpy(), TEACHER.numpy(), ROWS.numpy()
S, T = MAPS.reshape(BATCH, -1).numpy(), OTHERS.reshape(BATCH, -1).numpy()
IS_TRUE = np.eye(CLASSES, dtype=bool)[Y]


def softmax(z: Array) -> Array:
    powers = np.exp(z - z.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


P, Q = softmax(V / HEAT), softmax(Z / HEAT)


def kl(p: Array, q: Array) -> Array:
    """Return the divergence of each row; 0 log 0 is 0."""
    return np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0).sum(-1)


def confidence() -> float:
    rho = np.where(IS_TRUE, P, (1 - P[IS_TRUE])[:, None] / (CLASSES - 1))
    return HEAT**2 * kl(rho, Q).mean()


def relation(mix: float) -> float:
    units = W / np.linalg.norm(W, axis=1, keepdims=True)
    rho = mix * np.eye(CLASSES) + (1 - mix) * softmax(units @ units.T / 0.3)
    return HEAT**2 * kl(rho[Y], Q).mean()


def top(kept: int, *, renormalize: bool) -> float:
    rho = np.empty_like(P)
    for row, p in zip(rho, P, strict=True):
        best = np.argsort(-p)[:kept]
        row[:] = 0 if renormalize else (1 - p[best].sum()) / (CLASSES - kept)
        row[best] = p[best] / p[best].sum() if renormalize else p[best]
    return HEAT**2 * kl(rho, Q).mean()


def decoupled(target: float, others: float) -> float:
    def parts(rows: Array) -> tuple[Array, Array]:
        true = rows[IS_TRUE]
        rest = rows[~IS_TRUE].reshape(BATCH, -1)
        return np.stack([true, 1 - true], 1), rest / rest.sum(1, keepdims=True)

    (p, p_rest), (q, q_rest) = parts(P), parts(Q)
    return HEAT**2 * (target * kl(p, q) + others * kl(p_rest, q_rest)).mean()


def attention(maps: Array, power: float) -> Array:
    means = (np.abs(maps) ** power).mean(1).reshape(BATCH, -1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def similar(rows: Array) -> Array:
    gram = rows @ rows.T
    return gram / np.linalg.norm(gram, axis=1, keepdims=True)


def apart(rows: Array) -> Array:
    return np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(2))


def huber(difference: Array) -> Array:
    size = np.abs(difference)
    return np.where(size < 1, 0.5 * size**2, size - 0.5)


def distances() -> float:
    relative = [d / d[d > 0].mean() for d in (apart(S), apart(T))]
    return huber(relative[0] - relative[1]).mean()


def angles(s: Array, t: Array) -> float:
    both = []
    for rows in (s, t):
        steps = rows[None] - rows[:, None]
        lengths = np.linalg.norm(steps, axis=2, keepdims=True)
        units = np.where(lengths > 0, steps / np.where(lengths > 0, lengths, 1), 0)
        both.append(np.einsum("ijd,ikd->ijk", units, units))
    return huber(both[0] - both[1]).mean()


def logit_relation() -> float:
    s, t = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (Z, V))
    relative = []
    for rows in (s, t):
        d = np.sqrt(np.maximum(apart(rows) ** 2, 1e-12))
        relative.append(d / (d.mean() + 1e-8))
    return 50 * huber(relative[0] - relative[1]).mean() + 100 * angles(s, t)


def cosine(rows: Array, epsilon: float) -> Array:
    units = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + epsilon)
    return (units @ units.T + 1) / 2


def to_one(kernel: Array) -> Array:
    return kernel / kernel.sum(1, keepdims=True)


def pkt() -> float:
    p, q = to_one(cosine(T, 1e-7)), to_one(cosine(S, 1e-7))
    return (p * np.log((p + 1e-7) / (q + 1e-7))).mean()


KERNELS: dict[str, Callable[[Array], Array]] = {
    "cosine": lambda rows: cosine(rows, 1e-6),
    "t": lambda rows: 1 / (1 + np.sqrt(apart(rows) ** 2 + 1e-6)),
    "cauchy": lambda rows: 1 / (1 + (apart(rows) ** 2 + 1e-6) / 4),
    "rbf": lambda rows: np.exp(-np.sqrt(apart(rows) ** 2 + 1e-6) / 2),
    "adaptive_rbf": lambda rows: np.exp(-np.sqrt(apart(rows) ** 2 + 1e-6) / np.sqrt(apart(rows) ** 2 + 1e-6).mean()),
}
DIVERGENCES: dict[str, Callable[[Array, Array], Array]] = {
    "jeffreys": lambda p, q: (p - q) * (np.log(p) - np.log(q)),
    "kl": lambda p, q: p * np.log(1e-6 + p / (1e-6 + q)),
    "abs": lambda p, q: np.abs(p - q),
    "squared": lambda p, q: (p - q) ** 2,
    "exponential": lambda p, q: p * (np.log(p) - np.log(q)) ** 2,
    "kagan": lambda p, q: (p - q) ** 2 / p,
}


def flow(kernel: str, divergence: str) -> float:
    names = ("cosine", "t") if kernel == "combined" else (kernel,)
    return sum(DIVERGENCES[divergence](to_one(KERNELS[one](T)), to_one(KERNELS[one](S))).mean() for one in names)


def singular() -> float:
    """KD-SVD with one candidate: each side's first right singular vector, the teacher's with a positive sum."""

    def vectors(stages: list[Tensor], others: list[Array] | None) -> list[Array]:
        found = []
        for index, stage in enumerate(stages):
            matrices = np.moveaxis(stage.numpy().reshape(*stage.shape[:2], -1), 1, 2)
            first = np.stack([np.linalg.svd(one)[2][0] for one in matrices])
            guide = np.ones_like(first) if others is None else others[index]
            found.append(first * np.sign((first * guide).sum(1, keepdims=True)))
        return found

    teacher = vectors(STAGES[1], None)
    student = vectors(STAGES[0], teacher)
    graphs = [np.exp(-((v[1][:, :, None] - v[0][:, None, :]) ** 2) / 8) for v in (student, teacher)]
    return ((graphs[0] - graphs[1]) ** 2).sum()


def cross_entropy(smoothing: float) -> float:
    labels = (1 - smoothing) * IS_TRUE + smoothing / CLASSES
    return -(labels * np.log(softmax(Z))).sum(1).mean()


CASES: dict[str, tuple[Callable[[], Tensor], Callable[[], float]]] = {
    "cross_entropy": (lambda: losses.cross_entropy_loss(STUDENT, LABELS), lambda: cross_entropy(0)),
    "smoothed": (
        lambda: losses.cross_entropy_loss(STUDENT, LABELS, label_smoothing=0.2), lambda: cross_entropy(0.2),
    ),
    "soft_target": (
        lambda: losses.soft_target_loss(STUDENT, TEACHER, temperature=HEAT), lambda: HEAT**2 * kl(P, Q).mean(),
    ),
    "soft_target, bare": (
        lambda: losses.soft_target_loss(STUDENT, TEACHER, temperature=HEAT, scale=1), lambda: kl(P, Q).mean(),
    ),
    "soft_target, mean": (
        lambda: losses.soft_target_loss(STUDENT, TEACHER, temperature=HEAT, reduction="mean"),
        lambda: HEAT**2 * kl(P, Q).sum() / Z.size,
    ),
    "logit_square": (
        lambda: losses.logit_square_loss(STUDENT, TEACHER, temperature=HEAT), lambda: ((Z - V) ** 2).mean() / HEAT**2,
    ),
    "logit_distance": (lambda: losses.logit_distance_loss(STUDENT, TEACHER), lambda: np.abs(Z - V).mean()),
    "decoupled": (
        lambda: losses.decoupled_loss(
            STUDENT, TEACHER, LABELS, temperature=HEAT, target_weight=0.5, others_weight=8
        ),
        lambda: decoupled(0.5, 8),
    ),
    "teacher_confidence": (
        lambda: losses.teacher_confidence_loss(STUDENT, TEACHER, LABELS, temperature=HEAT), confidence,
    ),
    "class_relation": (
        lambda: losses.class_relation_loss(STUDENT, LABELS, ROWS, temperature=HEAT), lambda: relation(0),
    ),
    "class_relation, mixed": (
        lambda: losses.class_relation_loss(STUDENT, LABELS, ROWS, temperature=HEAT, one_hot_share=0.4),
        lambda: relation(0.4),
    ),
    "top_classes": (
        lambda: losses.top_classes_loss(STUDENT, TEACHER, temperature=HEAT, classes=2),
        lambda: top(2, renormalize=False),
    ),
    "top_classes, renormalized": (
        lambda: losses.top_classes_loss(STUDENT, TEACHER, temperature=HEAT, classes=2, remainder="renormalize"),
        lambda: top(2, renormalize=True),
    ),
    "gdfq_student": (
        lambda: losses.gdfq_student_loss(STUDENT, TEACHER, LABELS, temperature=HEAT, divergence_weight=0.5),
        lambda: cross_entropy(0) + 0.5 * HEAT**2 * kl(P, Q).sum() / Z.size,
    ),
    "filtered_soft_target": (
        lambda: losses.filtered_soft_target_loss(STUDENT, TEACHER, LABELS, temperature=HEAT),
        lambda: HEAT**2 * kl(P, Q).mean(),
    ),
    "hint": (lambda: losses.hint_loss(MAPS, ALIKE), lambda: ((MAPS - ALIKE).numpy() ** 2).mean()),
    "attention_transfer": (
        lambda: losses.attention_transfer_loss(MAPS, OTHERS),
        lambda: ((attention(MAPS.numpy(), 2) - attention(OTHERS.numpy(), 2)) ** 2).mean(),
    ),
    "attention_transfer, cubes": (
        lambda: losses.attention_transfer_loss(MAPS, OTHERS, power=3),
        lambda: ((attention(MAPS.numpy(), 3) - attention(OTHERS.numpy(), 3)) ** 2).mean(),
    ),
    "similarity_preserving": (
        lambda: losses.similarity_preserving_loss(MAPS, OTHERS), lambda: ((similar(S) - similar(T)) ** 2).sum() / 36,
    ),
    "distance_relation": (lambda: losses.distance_relation_loss(MAPS, OTHERS), distances),
    "angle_relation": (lambda: losses.angle_relation_loss(MAPS, OTHERS), lambda: angles(S, T)),
    "logit_relation": (lambda: losses.logit_relation_loss(STUDENT, TEACHER), logit_relation),
    "probabilistic_transfer": (lambda: losses.probabilistic_transfer_loss(MAPS, OTHERS), pkt),
    "singular_vector": (lambda: losses.singular_vector_loss(*STAGES, candidates=1), singular),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_formula(name: str) -> None:
    compute, expected = CASES[name]
    value = compute()
    assert value.dtype == torch.float64 and value.item() == pytest.approx(float(expected()), abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kernel", [*KERNELS, "combined"])
def test_information_flow_is_its_formula(kernel: str, divergence: str) -> None:
    value = losses.information_flow_loss(MAPS, OTHERS, kernel=kernel, divergence=divergence, sigma=2.0)
    assert value.item() == pytest.approx(float(flow(kernel, divergence)), abs=1e-9, rel=1e-9)
    by_row = losses.information_flow_loss(
        MAPS, OTHERS, kernel=kernel, divergence=divergence, sigma=2.0, reduction="row_mean"
    )
    assert by_row.item() == pytest.approx(BATCH * value.item(), rel=1e-12)
