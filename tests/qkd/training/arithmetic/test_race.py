"""The race itself: every candidate runs, and nothing of the model or of random generators changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qkd.testing import TinyNet
from qkd.training.arithmetic import native
from qkd.training.arithmetic.native import cpu_flags, has_native_bf16
from qkd.training.arithmetic.race import is_misread_in_channels_last, race
from quantizers import QuantSpec, calibrate, prepare

CPU = torch.device("cpu")
ALL = [("float32", "contiguous"), ("float32", "channels_last"), ("bf16", "contiguous"), ("bf16", "channels_last")]


def nets() -> list[nn.Module]:
    images = torch.randn(4, 1, 8, 8)
    net = TinyNet(dropout=0.2)
    student = prepare(net, QuantSpec(weight_bits=2, act_bits=2), example_inputs=images)
    calibrate(student, [images])
    return [net, student]


@pytest.mark.parametrize("which", [0, 1], ids=["float", "low-bit"])
def test_it_leaves_no_trace(which: int) -> None:
    torch.manual_seed(0)
    model = nets()[which].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    times = race(model, (4, 1, 8, 8), ALL, CPU)
    assert list(times) == ALL and all(ms > 0 for ms in times.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training


def test_one_candidate_alone_is_not_timed() -> None:
    assert race(nn.Linear(2, 2), (4, 1, 8, 8), ALL[:1], CPU) == {ALL[0]: 0.0}


@pytest.mark.parametrize(
    ("machine", "flags", "wanted"),
    [
        ("x86_64", {"avx2"}, False),
        ("x86_64", {"avx512f", "avx512_bf16"}, True),
        ("x86_64", {"avx512f", "amx_bf16"}, True),
        ("x86_64", {"avx512f"}, False),
        ("aarch64", {"asimd", "bf16"}, True),
        ("aarch64", {"asimd"}, False),
    ],
)
def test_bf16_is_native_where_the_processor_says_so(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: set[str], wanted: bool
) -> None:
    monkeypatch.setattr(native.platform, "machine", lambda: machine)
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert has_native_bf16(CPU) is wanted
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # as ATEN_CPU_CAPABILITY makes it
    assert has_native_bf16(CPU) is (wanted and "avx512f" not in flags)


def test_flags_are_those_of_the_first_processor(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags : fpu avx2\n\nprocessor : 1\nflags : fpu\n")
    assert cpu_flags(file) == {"fpu", "avx2"} and cpu_flags(tmp_path / "none") == frozenset()
    file.write_text("Features : asimd bf16\n")
    assert cpu_flags(file) == {"asimd", "bf16"}


class Viewing(nn.Module):
    """As many people write it: a view of what a convolution gives, which channels_last does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(256, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.conv(images).view(len(images), -1))  # type: ignore[no-any-return]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(images.flatten(1)), images


def test_what_a_net_does_not_run_in_is_left_out() -> None:
    assert list(race(Viewing(), (4, 1, 8, 8), ALL, CPU)) == [ALL[0], ALL[2]]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_net_that_cannot_race_has_no_times() -> None:
    uncopied = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(64, 3)))
    for net in (uncopied, Pair()):
        assert race(net, (4, 1, 8, 8), ALL, CPU) == {}


def test_what_pytorch_misreads_in_channels_last_is_known() -> None:
    """One channel, wide steps to the right: there PyTorch 2.14 reads behind the image on a CPU."""
    wide = nn.Sequential(nn.Conv2d(1, 8, (5, 9), stride=(1, 4)))
    others = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(1, 8, 4, stride=4), nn.Conv2d(3, 8, (5, 9), stride=(1, 4)))
    assert is_misread_in_channels_last(wide) and not is_misread_in_channels_last(others)
