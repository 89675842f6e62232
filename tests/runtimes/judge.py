"""Build small students, export each for a target, and judge the files there; prints a JSON line a student.

python judge.py parity TARGET           compare with the student in the runtime, which this Python must have
python judge.py write TARGET FOLDER     write NAME.onnx and NAME.npz (images, logits) for a program that has less
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import quantizers
from export import check_parity, export_onnx
from export.targets import find_target
from export.targets.sessions import open_in
from quantizers import QuantSpec, Student, calibrate, prepare

SIZE, CLASSES, IMAGES = 12, 10, 8


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """Two residual blocks, the second on a smaller image: two convolutions meet in one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*block(3, 8), nn.ReLU())
        self.first = nn.Sequential(*block(8, 8), nn.ReLU(), *block(8, 8))
        self.pool, self.act, self.act2 = nn.MaxPool2d(2), nn.ReLU(), nn.ReLU()
        self.second, self.side = nn.Sequential(*block(8, 12, stride=2)), nn.Sequential(*block(8, 12, 1, 2))
        self.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.pool(self.act(x + self.first(x)))
        return self.end(self.act2(self.side(x) + self.second(x)))


class Linears(nn.Module):
    """Linear layers in a row, the first two with biases of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * SIZE * SIZE, 24),
            nn.ReLU(),
            nn.Linear(24, 24),
            nn.ReLU(),
            nn.Linear(24, CLASSES),
        )
        nn.init.zeros_(self.layers[1].bias)
        nn.init.zeros_(self.layers[3].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Depthwise(nn.Module):
    """Depthwise convolutions, ReLU6 and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*block(3, 8), nn.ReLU())
        self.deep = nn.Sequential(*block(8, 8, groups=8), nn.ReLU6())
        self.wide = nn.Sequential(*block(8, 8, 1), nn.ReLU())
        self.down = nn.Sequential(*block(16, 16, stride=2, groups=16), nn.ReLU6(), *block(16, 12, 1))
        self.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.end(self.down(torch.cat([self.deep(x), self.wide(x)], 1)))


class Even(nn.Module):
    """Means of an even number of values, so that an operand is put on another eight-bit grid first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        self.act2, self.small, self.mean = nn.ReLU(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.end = nn.Sequential(nn.Flatten(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.end(self.mean(self.act2(self.deep(x))) + self.mean(self.small(x)))


class Bottleneck(nn.Module):
    """Padded depthwise convolutions of codes with a zero point, behind linear bottlenecks, in planes of 7x7 and 6x6."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 6), nn.ReLU()]  # 7x7 from here on
        layers += [*block(8, 8, 1), *block(8, 8, groups=8), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 2), *block(8, 8, 5, groups=8), nn.ReLU()]  # 6x6
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Padded(nn.Module):
    """Paddings as wide as the kernel: of one input channel, of single pixels, and of both with a stride."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 8, 5, padding=6), nn.ReLU()]
        layers += [nn.Conv2d(8, 1, 1, padding=1), nn.ReLU(), nn.Conv2d(1, 8, 3, 2, padding=(2, 3)), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 1, 2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


NETS = {
    "residual": Residual, "linears": Linears, "depthwise": Depthwise, "even": Even, "bottleneck": Bottleneck,
    "padded": Padded,
}  # fmt: skip
BITS = (8, 4, 2)
COMPILED = ("iree", "tvm")  # a graph a layer takes them seconds, so codes are compared at one width


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def student_of(name: str, bits: int, *, symmetric: bool = False) -> Student:
    torch.manual_seed(0)
    net = NETS[name]()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    spec = QuantSpec(weight_bits=bits, act_bits=bits, symmetric=symmetric)
    student = prepare(net.eval(), spec, images(2, 0))
    calibrate(student, images(32, 1))
    return student.eval()


def students(*, symmetric: bool = False) -> Iterator[tuple[str, Student]]:
    for name in NETS:
        for bits in BITS:
            yield f"{name}-w{bits}a{bits}", student_of(name, bits, symmetric=symmetric)


def parity(target: str, folder: Path) -> None:
    """Judge every student in the runtime: by check_parity, and one image at a time against all at once."""
    for name, student in students():
        path = export_onnx(student, images(2, 0), folder / f"{name}.onnx", target=target).path
        layers = 0 if target in COMPILED and "w4a4" not in name else IMAGES
        report = check_parity(student, path, [images(IMAGES, 2)], runtime=target, layer_images=layers)
        session = open_in(target, path.read_bytes())
        batch = images(IMAGES, 2).numpy()
        together = session.run(["logits"], {"images": batch})[0]
        session = open_in(target, path.read_bytes())
        alone = np.concatenate([session.run(["logits"], {"images": batch[n : n + 1]})[0] for n in range(IMAGES)])
        said = {"name": name, "faults": report.faults, "runtime": report.runtime and report.runtime.runtime}
        said |= {"apart": float(np.abs(together - alone).max()), "quantizers": len(report.runtime.layers)}
        print(json.dumps(said), flush=True)


def write(target: str, folder: Path) -> None:
    """Write every student's file, and images with the student's logits."""
    is_symmetric = any(limit.key == "symmetric" for limit in find_target(target).limits)
    for name, student in students(symmetric=is_symmetric):
        with torch.no_grad():
            logits = student(images(IMAGES, 2))
        exported = export_onnx(student, images(2, 0), folder / f"{name}.onnx", target=target)
        np.savez(folder / f"{name}.npz", images=images(IMAGES, 2).numpy(), logits=logits.numpy())
        (folder / f"{name}.images").write_bytes(images(IMAGES, 2).numpy().tobytes())
        (folder / f"{name}.logits").write_bytes(logits.numpy().tobytes())
        print(json.dumps({"name": name, "needs": exported.needs}), flush=True)


if __name__ == "__main__":
    import tempfile

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    quantizers.set_fused(enabled=False)
    if sys.argv[1] == "write":
        write(sys.argv[2], Path(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as place:
            parity(sys.argv[2], Path(place))
