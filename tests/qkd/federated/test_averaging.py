"""Averages of states: weights, batch norm, quantizer scales, and what is no number to average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qkd.federated.averaging import UnlikeStatesError, average_states
from qkd.testing.small import TinyNet
from quantizers import QuantSpec, Student, calibrate, prepare

ACT = "relu.act_quant.fused_activation_quant_proxy.tensor_quant"


def student(seed: int) -> Student:
    torch.manual_seed(0)
    made = prepare(TinyNet(), QuantSpec(weight_bits=4, act_bits=4), example_inputs=torch.zeros(2, 1, 8, 8))
    generator = torch.Generator().manual_seed(seed)
    calibrate(made, [torch.randn(8, 1, 8, 8, generator=generator) * (1 + seed) for _ in range(2)])
    return made


def states(count: int = 3) -> list[dict[str, Tensor]]:
    return [dict(student(seed).state_dict()) for seed in range(count)]


def test_one_client_comes_back_bit_for_bit() -> None:
    state = states(1)[0]
    made = average_states([state], [17])
    assert {*made} == {*state} and all(torch.equal(made[name], state[name]) for name in state)


def test_equal_states_stay_what_they_are() -> None:
    state = states(1)[0]
    made = average_states([state] * 3, [1, 2, 4])
    assert all(torch.equal(made[name], state[name]) for name in state)


def test_weights_batch_norm_and_scales_are_weighted_means() -> None:
    given = states()
    made = average_states(given, [1, 1, 2])
    names = [name for name in made if name.endswith((".weight", "running_mean", "running_var", "tensor_quant.scale"))]
    assert len(names) > 12 and any("running_var" in name for name in names)
    for name in names:
        a, b, c = (state[name].double() for state in given)
        expected = 0.25 * a + 0.25 * b + 0.5 * c
        assert torch.allclose(made[name].double(), expected, rtol=1e-6, atol=1e-9), name
    moved = [name for name in names if "scale" in name and not torch.equal(given[0][name], made[name])]
    assert moved, "scales of clients differ, and so does their mean"


def test_a_student_runs_on_the_average() -> None:
    """Zero points are averaged to whole numbers, and the grid keeps its codes."""
    given, net = states(), student(0)
    made = average_states(given, [3, 1, 1])
    ends = [name for name in made if name.endswith((".low", ".high"))]
    assert ends and all(torch.equal(made[name], made[name].round()) for name in ends)
    for name in ends:
        if name.endswith(".low"):
            high = name.removesuffix("low") + "high"
            assert torch.equal(made[high] - made[name], given[0][high] - given[0][name])
    net.load_state_dict(made)
    assert bool(net.eval()(torch.randn(2, 1, 8, 8)).isfinite().all())


def test_zero_points_are_rounded_and_keep_the_span() -> None:
    low, high = (f"x.tensor_quant.{end}" for end in ("low", "high"))
    given = [{low: torch.tensor(-3.0), high: torch.tensor(12.0)}, {low: torch.tensor(-8.0), high: torch.tensor(7.0)}]
    made = average_states(given, [1, 2])  # -6.33
    assert (made[low].item(), made[high].item()) == (-6, 9)
    other = [given[0], {low: torch.tensor(-3.0), high: torch.tensor(0.0)}]
    with pytest.raises(UnlikeStatesError, match=r"grids of \[16, 4\] codes differ"):
        average_states(other, [1, 1])


def test_a_step_has_no_sign() -> None:
    """A learned scale that has crossed zero means the same step; averaged with its sign it would cancel."""
    name = "conv.weight_quant.tensor_quant.scale"
    made = average_states([{name: torch.tensor([0.5])}, {name: torch.tensor([-0.3])}], [1, 1])
    assert made[name].item() == pytest.approx(0.4)


def test_integers_have_rules() -> None:
    given = [
        {"bn.num_batches_tracked": torch.tensor(3), "q.calibrated": torch.tensor(True), "rows": torch.tensor([1, 2])},
        {"bn.num_batches_tracked": torch.tensor(9), "q.calibrated": torch.tensor(False), "rows": torch.tensor([1, 2])},
    ]
    made = average_states(given, [1, 1])
    assert int(made["bn.num_batches_tracked"]) == 9 and not bool(made["q.calibrated"])
    assert made["rows"].tolist() == [1, 2]
    given[1]["rows"] = torch.tensor([1, 3])
    with pytest.raises(UnlikeStatesError, match="rows: integers that no rule averages differ between clients"):
        average_states(given, [1, 1])


def test_grids_of_other_widths_are_refused() -> None:
    name = f"{ACT}.grid_record"
    given = [{name: torch.tensor([4, 0, 0])}, {name: torch.tensor([2, 0, 0])}]
    with pytest.raises(UnlikeStatesError, match="records of grids differ"):
        average_states(given, [1, 1])


def test_what_is_no_average() -> None:
    with pytest.raises(ValueError, match="one non-negative weight per state"):
        average_states([], [])
    with pytest.raises(ValueError, match="one non-negative weight per state"):
        average_states([{"w": torch.zeros(1)}], [0])
    with pytest.raises(UnlikeStatesError, match="w differ"):
        average_states([{"w": torch.zeros(1)}, {"w": torch.zeros(2)}], [1, 1])
