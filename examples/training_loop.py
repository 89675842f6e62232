"""Distill a 2-bit student with a training loop written in plain PyTorch, export it, and check the file.

    python examples/training_loop.py                 # about a minute: scikit-learn's digits, no download

Everything between `prepare` and `export_onnx` is an ordinary PyTorch program: a student is a module with parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from export import check_parity, export_onnx, measure_latency
from qkd.losses import soft_target_loss
from quantizers import QuantSpec, calibrate, freeze_batch_norm, prepare, settle

BATCH = 64


def build_net() -> nn.Module:
    """Return the network: any convolutional classifier will do."""

    def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

    body = nn.Sequential(stage(1, 16, 1), stage(16, 32, 2), stage(32, 64, 2))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def batches_of(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches in random order."""
    for rows in torch.randperm(len(images)).split(BATCH):
        yield images[rows], labels[rows]


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images that a network classifies correctly, in eval mode."""
    with torch.no_grad():
        return float((net.eval()(images).argmax(1) == labels).float().mean())


def train(
    net: nn.Module, data: tuple[Tensor, Tensor], epochs: int, lr: float, teacher: nn.Module | None = None
) -> None:
    """Train a network on labels and, if there is a teacher, on its soft targets."""
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        net.train()
        if teacher is not None and epoch == epochs - max(1, epochs // 5):
            freeze_batch_norm(net)  # from here on the student trains exactly what the file will compute
        for images, labels in batches_of(*data):
            logits = net(images)
            loss = functional.cross_entropy(logits, labels)
            if teacher is not None:
                with torch.no_grad():
                    targets = teacher(images)
                loss = 0.1 * loss + 0.9 * soft_target_loss(logits, targets, temperature=4.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


def main() -> None:
    """Train a teacher, distill a student, export it, and compare both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("digits-w2a2.onnx"))
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().div(8).sub(1).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    seen, test = (images[:1437], labels[:1437]), (images[1437:], labels[1437:])

    teacher = build_net()
    train(teacher, seen, options.epochs, lr=0.1)
    student = prepare(teacher.eval(), QuantSpec(weight_bits=2, act_bits=2), example_inputs=images[:2])
    calibrate(student, [images[:256]])
    train(student, seen, options.epochs, lr=0.02, teacher=teacher)
    settle(student)

    export_onnx(student.eval(), images[:1], options.out)
    report = check_parity(student, options.out, [test[0]])
    latency = measure_latency(options.out, threads=1)
    print(f"teacher {accuracy(teacher, *test):.1%}, student {accuracy(student, *test):.1%}")
    print(f"{options.out}: {options.out.stat().st_size:,} bytes, median {latency.median_ms:.3f} ms")
    print("the file computes what the student computes" if report.passed else "\n".join(report.faults))


if __name__ == "__main__":
    main()
