"""Two processes train what one does: the same gradients, statistics and results, up to the order of sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from beside import load
from torch import Tensor

from qkd.engines.launching import member_environment
from qkd.files import read_safetensors
from qkd.terms.loss_table import LOSSES
from qkd.testing import write_npz_set
from quantizers import is_fused, set_fused

MEMBERS = Path(__file__).with_name("members.py")
members = load(MEMBERS)
ROOT = Path(__file__).resolve().parents[3]
FAST = [name for name in members.CHECKS if not name.startswith("method")]
METHODS = [name for name in members.CHECKS if name.startswith("method")]
# Sums of float32 in another order: of two halves, and not of one batch; after 8 steps of a float net at a rate of 0.1.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}


def together(folder: Path, wanted: list[str]) -> dict[str, Tensor]:
    """Return what two processes have found, after seeing that both have found the same."""
    write_npz_set(folder / "data")
    out = folder / "found.safetensors"
    environments = [member_environment(rank, 2, folder, {**os.environ, "PYTHONPATH": str(ROOT)}) for rank in (0, 1)]
    started = [
        subprocess.Popen(
            [sys.executable, str(MEMBERS), str(out), str(folder), *wanted],
            env={**environment, "OMP_NUM_THREADS": "1", "QKD_FUSED": "0"},
            stderr=subprocess.PIPE,
        )
        for environment in environments
    ]
    said = [process.communicate(timeout=600)[1].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    sums = [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in (0, 1)]
    assert sums[0] == sums[1], "both processes have the same weights, bit for bit"
    return read_safetensors(out)


def alone(folder: Path, wanted: list[str]) -> dict[str, Tensor]:
    write_npz_set(folder / "data")
    before = is_fused(), torch.get_num_threads()
    try:
        return members.results(folder, wanted)  # type: ignore[no-any-return]
    finally:
        set_fused(enabled=before[0])
        torch.set_num_threads(before[1])


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    yield together(tmp_path_factory.mktemp("two"), FAST), alone(tmp_path_factory.mktemp("one"), FAST)


@pytest.mark.parametrize("check", [name for name in FAST if name != "apart"])
def test_two_processes_find_what_one_does(both: tuple[dict[str, Tensor], dict[str, Tensor]], check: str) -> None:
    two, one = ({name: value for name, value in found.items() if name.startswith(f"{check}|")} for found in both)
    assert two.keys() == one.keys() != set()
    for name, value in one.items():
        torch.testing.assert_close(
            two[name].double(), value.double(), **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_resumed_training_of_two_processes_ends_with_the_same_bits(both: tuple[dict[str, Tensor], object]) -> None:
    two, _ = both
    resumed = {name.partition("|")[2]: value for name, value in two.items() if name.startswith("resumed|")}
    assert resumed
    for name, value in resumed.items():
        assert torch.equal(value, two[f"unbroken|{name}"]), name


def test_batch_norm_apart_is_another_training(both: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    two, one = both
    name = "apart|stem.1.weight"
    assert 1e-4 < (two[name] - one[name]).abs().max() < 0.1
    assert torch.equal(one[name], one["unbroken|stem.1.weight"]), "on one device it is all the same"


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return together(tmp_path_factory.mktemp("two"), METHODS), alone(tmp_path_factory.mktemp("one"), METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("check", METHODS)
def test_every_method_is_shared(methods: tuple[dict[str, Tensor], dict[str, Tensor]], check: str) -> None:
    """The first epoch's loss agrees closely; later ones as low-bit codes allow, which a hair's breadth turns over."""
    two, one = ({name.partition("|")[2]: value for name, value in found.items() if name.startswith(f"{check}|")}
                for found in methods)  # fmt: skip
    torch.testing.assert_close(two["first loss"], one["first loss"], rtol=2e-3, atol=0)
    torch.testing.assert_close(two["last loss"], one["last loss"], rtol=5e-2, atol=0)
    assert two.get("schedule") == one.get("schedule")


def test_every_loss_that_compares_images_says_so() -> None:
    """The mean over two halves of a batch is the loss of the whole where images are not compared, and only there."""
    halves, whole = halved(), members.every_loss(Path())
    for loss, entry in LOSSES.items():
        if f"{loss}/value" in whole:
            is_mean = torch.allclose(halves[loss], whole[f"{loss}/value"], rtol=1e-5, atol=1e-7)
            assert is_mean != entry.compares_images, loss


def halved() -> dict[str, Tensor]:
    own = members.mine
    try:
        found = []
        for part in (slice(0, 4), slice(4, 8)):
            members.mine = lambda rows, part=part: rows[part]
            found.append(members.every_loss(Path()))
    finally:
        members.mine = own
    return {loss: (found[0][f"{loss}/value"] + found[1][f"{loss}/value"]) / 2
            for loss in LOSSES if f"{loss}/value" in found[0]}  # fmt: skip
