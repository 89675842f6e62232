"""Measures whether a bfloat16 convolution gains from integer codes, scaled afterward, instead of scaled values.

    python benchmarks/code_products.py --json benchmarks/results/code_products.json

Codes of 2 to 8 bits are exact in bfloat16, scaled values are rounded. For 2 and 4 bits: the relative error against
float64 of the output after batch norm, of the gradient of the input, and of the gradient of the weights; then the CPU
time of a forward and backward pass (64 images, 16 channels, 32x32, channels last, one thread).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from qkd.cli.options.values import output_file

ROUNDS = 9


def errors(bits: int, *, on_codes: bool) -> dict[str, float]:
    """Return relative errors of one layer in bfloat16, against the same in float64."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.randint(0, 2**bits, (16, 32, 16, 16), generator=generator).double()
    weight = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (32, 32, 3, 3), generator=generator).double()
    steps = torch.tensor(0.2371).double(), (torch.rand(32, generator=generator) * 0.1 + 0.05).double()
    grad = torch.randn(16, 32, 16, 16, generator=generator).double()
    exact = _layer(x, weight, steps, grad, torch.float64, on_codes=False)
    found = _layer(x, weight, steps, grad, torch.bfloat16, on_codes=on_codes)
    names = ("output", "input_gradient", "weight_gradient")
    parts = zip(names, found, exact, strict=True)
    return {name: round(float((one - other).norm() / other.norm()), 5) for name, one, other in parts}


def _layer(
    x: Tensor, weight: Tensor, steps: tuple[Tensor, Tensor], grad: Tensor, dtype: torch.dtype, *, on_codes: bool
) -> list[Tensor]:
    rows = steps[1].view(-1, 1, 1, 1)
    given = (x, weight) if on_codes else (x * steps[0], weight * rows)
    a, b = (one.to(dtype).requires_grad_() for one in given)
    wide = torch.promote_types(dtype, torch.float32)
    out = F.conv2d(a, b, padding=1)
    if on_codes:
        out = (out.to(wide) * (steps[0] * steps[1]).view(1, -1, 1, 1).to(wide)).to(dtype)
    normalized = F.batch_norm(out.to(wide), None, None, training=True)
    normalized.backward(grad.to(wide))
    assert a.grad is not None and b.grad is not None  # noqa: S101
    grads = a.grad.double(), b.grad.double()
    if on_codes:
        grads = grads[0] / steps[0], grads[1] / rows
    return [normalized.detach().double(), *grads]


def times() -> dict[str, float]:
    """Return milliseconds of a forward and backward pass with and without the scaling."""
    last = torch.channels_last
    x = torch.randn(64, 16, 32, 32).bfloat16().contiguous(memory_format=last).requires_grad_()
    weight, scale = torch.randn(16, 16, 3, 3).bfloat16().requires_grad_(), torch.rand(1, 16, 1, 1).bfloat16()
    grad = torch.randn(64, 16, 32, 32).bfloat16().contiguous(memory_format=last)
    return {
        "scaled_values_ms": _least_ms(lambda: F.conv2d(x, weight, padding=1).backward(grad)),
        "codes_ms": _least_ms(lambda: (F.conv2d(x, weight, padding=1) * scale).backward(grad)),
    }


def _least_ms(action: Callable[[], Any]) -> float:
    action()
    took = []
    for _ in range(ROUNDS):
        start = time.process_time()
        action()
        took.append(time.process_time() - start)
    return round(min(took) * 1e3, 2)


def main() -> None:
    """Measure, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"scaled values": False, "codes": True}
    found = {
        "relative_error": {
            f"{bits} bits, {name}": errors(bits, on_codes=codes) for bits in (2, 4) for name, codes in kinds.items()
        },
        "least_of_rounds": times(),
        "torch": torch.__version__, "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
