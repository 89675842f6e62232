"""The compiled engine gives the batched engine's bits, whatever it was compiled for and however many threads it has."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qkd.agents import PBA_OPERATIONS
from qkd.agents.operations import native
from qkd.agents.operations.counting import SampleDraws
from qkd.agents.operations.drawing import NONE, Drawn
from qkd.agents.operations.engine import Finish, augment
from qkd.agents.operations.source import FLAGS, SOURCE
from qkd.agents.policies.spaces import PBA, RANDAUGMENT, TRIVIAL_WIDE, Space
from quantizers.native.building import cpp_compiler

SPACES = pytest.mark.parametrize("space", [PBA, RANDAUGMENT, TRIVIAL_WIDE], ids=lambda space: space.name)
SIZES = ((3, 61, 83), (3, 20, 17), (1, 40, 70), (4, 9, 90), (3, 3, 1), (3, 1, 40))
NARROW = [(channels, height, width) for channels in (1, 3) for height in (2, 3, 8) for width in (*range(2, 18), 24, 31)]
GUARD = 64  # bytes on each side of a buffer that nobody may write to


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if native.load() is None:
        pytest.skip("no C++ compiler")


def images_of(shape: tuple[int, ...], count: int = 40) -> Tensor:
    """Return smooth images with noise: operations that count values have something to count."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.linspace(0, 7, shape[-1]).sin() + torch.linspace(0, 5, shape[-2]).cos().unsqueeze(1)
    noise = torch.rand((count, *shape), generator=generator)
    return ((waves + 2) * 50 + noise * 50).to(torch.uint8)


def augmented(images: Tensor, space: Space) -> Tensor:
    """Return images after four operations each and a full ending, all drawn from one seed."""
    rng, count = np.random.default_rng(5), len(images)
    names = [PBA_OPERATIONS.index(name) for name in space.operations if name != "Identity"]
    drawn = Drawn(rng.choice([NONE, *names], (count, 4)), rng.integers(space.levels, size=(count, 4)), space)
    fill = torch.tensor((125, 123, 114, 9)[: images.shape[1]], dtype=torch.uint8)
    return augment(images, drawn, SampleDraws(3, np.arange(count)), fill, Finish(padding=3, flip=True, cutout=4))


@SPACES
@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
def test_images_of_any_size_are_those_of_the_batched_engine(
    space: Space, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(shape)
    compiled = augmented(images, space)
    monkeypatch.setattr(native, "load", lambda: None)
    assert torch.equal(augmented(images, space), compiled)


@pytest.mark.parametrize("processor", ["x86-64-v4", "x86-64-v3", "x86-64"])
def test_a_processor_with_fewer_instructions_gets_the_same_bits(
    processor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"compiles for x86, but this is {platform.machine()}")
    if processor == "x86-64-v4" and "avx512bw" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has no AVX-512")
    if processor == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has no AVX2")
    source, library = tmp_path / "augment.cpp", tmp_path / "augment.so"
    source.write_text(SOURCE, encoding="utf-8")
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in FLAGS]
    subprocess.run([str(cpp_compiler()), *flags, str(source), "-o", str(library)], check=True)
    wanted = [augmented(images_of(SIZES[0]), space) for space in (PBA, RANDAUGMENT, TRIVIAL_WIDE)]
    function = native.bound(ctypes.CDLL(str(library)))
    monkeypatch.setattr(native, "load", lambda: function)
    for space, one in zip((PBA, RANDAUGMENT, TRIVIAL_WIDE), wanted, strict=True):
        assert torch.equal(augmented(images_of(SIZES[0]), space), one)


@SPACES
def test_threads_do_not_change_a_bit(space: Space) -> None:
    images, before = images_of(SIZES[0]), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(augmented(images, space))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


@pytest.mark.parametrize("threads", [1, 3])
def test_narrow_images_are_those_of_the_batched_engine(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines shorter than what is copied at once must not reach another channel, or an image of another thread."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        made = [sheared(images_of(shape, 48)) for shape in NARROW]
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(native, "load", lambda: None)
    for shape, one in zip(NARROW, made, strict=True):
        assert torch.equal(sheared(images_of(shape, 48)), one), shape


@pytest.mark.parametrize("shape", NARROW, ids=lambda shape: "x".join(map(str, shape)))
def test_nothing_is_written_beside_the_result(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last image of a batch ends where the buffer ends."""
    function, images, written = native.load(), images_of(shape, 1), []

    def guarded(source: int, result: int, *rest: Any) -> None:
        size = images[0].numel()
        buffer = np.full(size + 2 * GUARD, 77, np.uint8)
        function(source, buffer.ctypes.data + GUARD, *rest)
        ctypes.memmove(result, buffer.ctypes.data + GUARD, size)
        written.append(np.delete(buffer, np.arange(GUARD, GUARD + size)))

    monkeypatch.setattr(native, "load", lambda: guarded)
    for seed in range(20):
        sheared(images, seed)
    assert len(written) == 20
    assert all((guards == 77).all() for guards in written)


def sheared(images: Tensor, seed: int = 5) -> Tensor:
    """Return images after one geometric operation each."""
    rng, count = np.random.default_rng(seed), len(images)
    kinds = [PBA_OPERATIONS.index(name) for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")]
    drawn = Drawn(rng.choice(kinds, (count, 1)), rng.integers(10, size=(count, 1)))
    fill = torch.tensor((125, 123, 114)[: images.shape[1]], dtype=torch.uint8)
    return augment(images, drawn, SampleDraws(seed, np.arange(count)), fill)


def test_values_of_many_pixels_are_summed_without_overflow() -> None:
    """Contrast mixes with the mean: of a white image that is white, however large the image is."""
    images = torch.full((1, 3, 300, 300), 255, dtype=torch.uint8)
    kinds = np.array([[PBA_OPERATIONS.index("Contrast")]])
    fill = torch.zeros(3, dtype=torch.uint8)
    made = augment(images, Drawn(kinds, np.array([[9]])), SampleDraws(0, np.arange(1)), fill)
    assert torch.equal(made, images)
