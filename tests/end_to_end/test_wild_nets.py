"""Three hundred wild nets: none is silently another function, none fails once ``prepare`` took it."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import beside
import pytest
import torch

import quantizers
from quantizers import QuantSpec, RewriteError

HERE = Path(__file__).parent
checks, wild_nets = beside.load(HERE / "field_checks.py"), beside.load(HERE / "wild_nets.py")
pytestmark = [pytest.mark.filterwarnings("ignore:Using padding='same'"), pytest.mark.usefixtures("eager")]
NETS, FAST_NETS = 300, 6


def drops(net: Any) -> bool:
    """Tell whether the net's training mode is random."""
    shared = {step.options.get("module") for step in net.steps}
    return any(step.name == "dropout" for step in net.steps) or bool(shared & {"dropout", "dropout2d"})


def check_refusal(error: RewriteError) -> None:
    """A refusal opens with a node or a layer, or names file and line."""
    assert re.match(r"[\w.]+: .{20,}", str(error), re.DOTALL) or re.search(r"\.py:\d+", str(error)), error


def check(seed: int, folder: Path) -> str:
    """Check the net of a seed; return ``refused`` or ``exact``."""
    net = wild_nets.wild_net(seed)
    bits = (2, 4, 4)[seed % 3]
    torch.manual_seed(seed + 1)
    batches = [torch.randn(8, *net.image_shape) for _ in range(2)]
    try:
        student = quantizers.prepare(net, QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=batches[0][:2])
    except RewriteError as error:
        check_refusal(error)
        return "refused"
    x = torch.randn(3, *net.image_shape)
    is_random = drops(net)
    # dropout may stand where nothing reads it, so only nets without it are compared in training mode
    is_plain = not is_random and net.ending != "log_softmax"
    checks.check_same_function(student, wild_nets.wild_net(seed), x, drops=False, in_training=is_plain)
    quantizers.calibrate(student, batches)
    checks.train_a_step(student, batches[0])
    checks.check_file(student, x, folder / "student.onnx", ("ort", "qcdq")[seed % 2])
    return "exact"


@pytest.mark.parametrize("seed", range(FAST_NETS))
def test_net(seed: int, tmp_path: Path) -> None:
    check(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: Counter[str] = Counter()
    faults = []
    for seed in range(NETS):
        try:
            seen[check(seed, tmp_path)] += 1
        except Exception as error:  # counted: one fault must not hide the others
            kind = "silently different" if isinstance(error, checks.Differs) else "failed after prepare"
            seen[kind] += 1
            faults.append(f"seed {seed}, {kind}: {type(error).__name__}: {error}")
    with capsys.disabled():
        print("\nwild nets:", ", ".join(f"{count} {what}" for what, count in seen.items()))
    assert not faults, "\n".join(faults)
    assert seen["exact"] > NETS // 2, "most wild nets should work"


def test_the_generator_draws_every_operation() -> None:
    """Fifty nets use all operations, and a seed gives one net."""
    names = {step.name for seed in range(50) for step in wild_nets.wild_net(seed).steps}
    assert names == set(wild_nets.OPERATIONS)
    one, other = wild_nets.wild_net(3), wild_nets.wild_net(3)
    assert one.listing() == other.listing()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
