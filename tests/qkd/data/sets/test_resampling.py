"""Compiled resizing against Pillow, bit for bit: any size, any window, any processor it is compiled for."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qkd.data.sets import images, resampling
from qkd.data.sets.fitting import INTERPOLATIONS, Fit
from qkd.data.sets.images import decode
from quantizers.native.building import cpp_compiler

SIZES = ((1, 1), (2, 40), (40, 2), (13, 17), (16, 16), (33, 64), (90, 31))


@pytest.fixture
def resize() -> Any:
    if resampling.load() is None:
        pytest.skip("no C++ compiler")
    return resampling.load()


def picture(height: int, width: int, channels: int) -> np.ndarray:
    shape = (height, width, 3)[: 2 if channels == 1 else 3]
    return np.random.default_rng(height * 100 + width).integers(0, 256, shape, dtype=np.uint8)


def by_pillow(image: np.ndarray, size: tuple[int, int], how: str) -> Tensor:
    """Return planes of an image whose columns are resized first, and its rows second."""
    made = Image.fromarray(image)
    for step in ((size[0], image.shape[0]), size):
        made = made.resize(step, INTERPOLATIONS[how])
    return torch.from_numpy(np.array(made).reshape(size[1], size[0], -1)).permute(2, 0, 1)


def compiled(resize: Any, image: np.ndarray, size: tuple[int, int], how: str) -> Tensor:
    out = torch.empty((1 if image.ndim == 2 else 3, size[1], size[0]), dtype=torch.uint8)
    resampling.resize_window(resize, image, size, (0, 0), how, out)
    return out


@pytest.mark.parametrize("how", INTERPOLATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_pillow(resize: Any, how: str, channels: int) -> None:
    for height, width in SIZES:
        image = picture(height, width, channels)
        for size in SIZES:
            assert torch.equal(compiled(resize, image, size, how), by_pillow(image, size, how)), (image.shape, size)


@pytest.mark.parametrize("how", INTERPOLATIONS)
def test_white_stays_white_and_edges_overshoot_to_the_limits(resize: Any, how: str) -> None:
    white = np.full((30, 41, 3), 255, dtype=np.uint8)
    assert (compiled(resize, white, (17, 19), how) == 255).all()
    edges = np.where(np.arange(60) // 5 % 2, 255, 0).astype(np.uint8)[None].repeat(40, 0)
    assert torch.equal(compiled(resize, edges, (83, 70), how), by_pillow(edges, (83, 70), how))


@pytest.mark.parametrize("corner", [(0, 0), (5, 3), (23, 19), (-4, -6), (-40, 0), (60, 2)])
def test_a_window_is_that_piece_of_the_whole_on_black(resize: Any, corner: tuple[int, int]) -> None:
    image, size = picture(50, 70, 3), (41, 37)
    whole = np.zeros((200, 200, 3), dtype=np.uint8)
    whole[80:117, 80:121] = compiled(resize, image, size, "bilinear").permute(1, 2, 0).numpy()
    left, top = corner
    wanted = torch.from_numpy(whole[80 + top : 100 + top, 80 + left : 104 + left]).permute(2, 0, 1)
    out = torch.empty((3, 20, 24), dtype=torch.uint8)
    resampling.resize_window(resize, image, size, corner, "bilinear", out)
    assert torch.equal(out, wanted)


def test_rows_that_are_apart_are_read_where_they_are(resize: Any) -> None:
    image = picture(60, 70, 3)
    piece = image[7:43, 11:50]
    assert torch.equal(
        compiled(resize, piece, (20, 21), "bicubic"), compiled(resize, piece.copy(), (20, 21), "bicubic")
    )


@pytest.mark.parametrize("processor", ["x86-64-v3", "x86-64"])
def test_a_processor_with_fewer_instructions_gets_the_same_bits(resize: Any, processor: str, tmp_path: Path) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"compiles for x86, but this is {platform.machine()}")
    if processor == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("this processor has no AVX2")
    source, library = tmp_path / "resize.cpp", tmp_path / "resize.so"
    source.write_text(resampling.SOURCE, encoding="utf-8")
    flags = [f"-march={processor}" if flag == "-march=native" else flag for flag in resampling.FLAGS]
    subprocess.run([str(cpp_compiler()), *flags, str(source), "-o", str(library)], check=True)
    other, image = resampling.bound(ctypes.CDLL(str(library))), picture(50, 70, 3)
    for how in INTERPOLATIONS:
        assert torch.equal(compiled(other, image, (41, 37), how), compiled(resize, image, (41, 37), how))


@pytest.mark.parametrize("rule", ["crop", "crop:30", "crop:29:bicubic", "stretch", "pad:bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
def test_files_have_the_same_pixels_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, channels: int
) -> None:
    for number, (height, width) in enumerate([(20, 27), (27, 20), (24, 24), (70, 9), (61, 40)]):
        for is_gray, suffix in ((True, "png"), (False, "png"), (False, "jpg"), (True, "jpg")):
            path = tmp_path / f"{number}.{suffix}"
            Image.fromarray(picture(height, width, 1 if is_gray else 3)).save(path)
            made = []
            for load in (resampling.load, lambda: None):
                with monkeypatch.context() as patch:
                    patch.setattr(images.resampling, "load", load)
                    made.append(decode(path, channels=channels, image_size=24, fit=Fit.named(rule)))
            assert torch.equal(*made) and made[0].shape == (channels, 24, 24)
