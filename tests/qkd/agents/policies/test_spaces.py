"""RandAugment's and TrivialAugment's spaces against torchvision on Pillow images: every operation at random levels."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from qkd.agents import PBA_OPERATIONS
from qkd.agents.operations.counting import SampleDraws, Use
from qkd.agents.operations.drawing import Drawn
from qkd.agents.operations.engine import augment
from qkd.agents.policies.spaces import GEOMETRIC, RANDAUGMENT, TRIVIAL_WIDE, Space

THEIRS = {RANDAUGMENT: v2.RandAugment, TRIVIAL_WIDE: v2.TrivialAugmentWide}
FILL = (125, 123, 114)
TIES_AT_MOST = 0.001  # share of pixels whose source is on a border between two, where the last bit of a sine decides
NAMES = [name for name in RANDAUGMENT.operations if name != "Identity"]


@functools.cache
def pictures(side: int, channels: int) -> Tensor:
    """Return real images: pieces of photographs, or enlarged digits."""
    rng = np.random.default_rng(side)
    if channels == 1:
        small = (load_digits().images[:62] * 255 / 16).round().astype(np.uint8)
        large = [np.array(Image.fromarray(one).resize((side, side), Image.Resampling.BILINEAR)) for one in small]
        return torch.from_numpy(np.stack(large)).unsqueeze(1)
    pieces = []
    for index in range(62):
        photo = load_sample_images().images[index % 2]
        top, left = rng.integers(photo.shape[0] - side), rng.integers(photo.shape[1] - side)
        pieces.append(photo[top : top + side, left : left + side])
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).contiguous()


def ours(space: Space, name: str, images: Tensor, levels: np.ndarray, key: int) -> tuple[Tensor, np.ndarray]:
    """Return the images after an operation at a level each, and the signs that were drawn."""
    draws = SampleDraws(key, np.arange(len(images)))
    kinds = np.full((len(images), 1), PBA_OPERATIONS.index(name))
    fill = torch.tensor(FILL[: images.shape[1]], dtype=torch.uint8)
    made = augment(images, Drawn(kinds, levels[:, None], space), draws, fill)
    return made, draws.integers(2, Use.SIGNS, 1)[:, 0]


def theirs(space: Space, name: str, image: Tensor, level: int, sign: int) -> Tensor:
    """Apply torchvision's operation of that name at that level and sign to a Pillow image."""
    agent = THEIRS[space]()
    make, is_signed = agent._AUGMENTATION_SPACE[name]
    values = make(31, *image.shape[-2:])
    magnitude = 0.0 if values is None else float(values[level])
    # torchvision moves the picture by what it draws, we move where it is read from: the signs are opposite.
    flips = -1 if name in ("TranslateX", "TranslateY") else 1
    magnitude *= flips * sign if is_signed else 1
    array = image.numpy()
    picture = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    fill = {Image.Image: list(FILL[: len(array)]) if len(array) > 1 else FILL[0]}
    made = np.array(agent._apply_image_or_video_transform(picture, name, magnitude, InterpolationMode.NEAREST, fill))
    return torch.from_numpy(made).unsqueeze(0) if made.ndim == 2 else torch.from_numpy(made).permute(2, 0, 1)


def differing(space: Space, name: str, images: Tensor, read: Callable[[Tensor, Tensor], None]) -> float:
    """Return the share of differing pixels over random levels, every level at both signs on average twice."""
    levels = np.random.default_rng(1).permutation(np.repeat(np.arange(31), 2))
    made, signs = ours(space, name, images, levels, key=7)
    wrong = 0
    for image, one, level, sign in zip(images, made, levels, signs, strict=True):
        expected = theirs(space, name, image, int(level), 1 - 2 * int(sign))
        wrong += int((one != expected).any(0).sum())
        read(image, one)
    return wrong / images[:, 0].numel()


@pytest.mark.parametrize("space", [RANDAUGMENT, TRIVIAL_WIDE], ids=lambda space: space.name)
@pytest.mark.parametrize(("side", "channels"), [(32, 3), (45, 3), (32, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_agrees_with_torchvision(space: Space, name: str, side: int, channels: int) -> None:
    changed: list[bool] = []
    share = differing(space, name, pictures(side, channels), lambda old, new: changed.append(not torch.equal(old, new)))
    print(f"{space.name} {name}, {side}x{side}x{channels}: {share:.3%} of pixels differ")
    assert share <= (TIES_AT_MOST if name in GEOMETRIC else 0)
    assert sum(changed) > 10 or (name == "Color" and channels == 1) or name == "AutoContrast"


def test_translations_of_trivialaugment_shrink_with_small_images() -> None:
    assert [TRIVIAL_WIDE.meaning("TranslateX", 30, 1, side) for side in (8, 32, 224)] == [8, 32, 32]
    assert [RANDAUGMENT.meaning("TranslateX", 30, -1, side) for side in (8, 32, 331)] == [-3, -14, -150]
