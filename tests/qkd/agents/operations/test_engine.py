"""The batched engine against Pillow, one image at a time: bit for bit, on photographs, digits and extremes."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor

from qkd.agents import PBA_OPERATIONS
from qkd.agents.operations import engine as engine_module
from qkd.agents.operations import native
from qkd.agents.operations.counting import SampleDraws
from qkd.agents.operations.drawing import NONE, Drawn
from qkd.agents.operations.engine import Finish, augment, check_images
from qkd.agents.operations.pending import PendingBatch
from qkd.agents.policies.spaces import PBA, RANDAUGMENT, TRIVIAL_WIDE, Space

SIGNED = ("Rotate", "TranslateX", "TranslateY", "ShearX", "ShearY")


@pytest.fixture(params=["compiled", "batched"], autouse=True)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run every test with both engines."""
    if request.param == "batched":
        monkeypatch.setattr(native, "load", lambda: None)
    elif native.load() is None:
        pytest.skip("no C++ compiler")
    return str(request.param)


POINT = tuple(name for name in PBA_OPERATIONS if name not in (*SIGNED, "Cutout"))
# Published values at levels 0..9 for 32x32 images, written out.
DEGREES = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27)
BITS = (4, 4, 4, 3, 3, 2, 2, 2, 1, 1)
THRESHOLDS = (256, 231, 205, 180, 154, 128, 103, 77, 52, 26)
FILL = (125, 123, 114)


@functools.cache
def photographs(height: int, width: int, count: int) -> Tensor:
    """Return random pieces of two photographs, and four extreme images: black, white, two values, a ramp."""
    rng = np.random.default_rng(0)
    photos = load_sample_images().images
    pieces = []
    for index in range(count):
        photo = photos[index % 2]
        top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
        pieces.append(photo[top : top + height, left : left + width])
    ramp = np.arange(height * width * 3).reshape(height, width, 3) % 256
    pieces += [np.zeros_like(pieces[0]), np.full_like(pieces[0], 255), np.where(ramp % 2, 3, 250), ramp]
    return torch.from_numpy(np.stack(pieces).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


@functools.cache
def digits(side: int, count: int) -> Tensor:
    """Return gray digits, enlarged to ``side``, and a black and a white image."""
    small = (load_digits().images[:count] * 255 / 16).round().astype(np.uint8)
    large = [np.array(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)) for image in small]
    large += [np.zeros_like(large[0]), np.full_like(large[0], 255)]
    return torch.from_numpy(np.stack(large)).unsqueeze(1)


def image_sets() -> list[Tensor]:
    return [photographs(32, 32, 12), photographs(24, 40, 4), digits(28, 10), digits(8, 10), photographs(2, 2, 4)]


def to_pillow(image: Tensor) -> Image.Image:
    array = image.numpy()
    return Image.fromarray(array[0] if array.shape[0] == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))


def from_pillow(image: Image.Image) -> Tensor:
    array = torch.from_numpy(np.array(image))
    return array.unsqueeze(0) if array.dim() == 2 else array.permute(2, 0, 1)


def by_pillow(image: Tensor, name: str, level: int, sign: int) -> Tensor:
    """Apply one operation with Pillow; pixels in proportion to a side of 32."""
    picture = to_pillow(image)
    fill = FILL[0] if picture.mode == "L" else FILL
    factor = level * 1.8 / 10 + 0.1

    def affine(*matrix: float) -> Image.Image:
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)

    results = {
        "Rotate": lambda: picture.rotate(sign * DEGREES[level], fillcolor=fill),
        "TranslateX": lambda: affine(1, 0, sign * int(level * picture.width / 32), 0, 1, 0),
        "TranslateY": lambda: affine(1, 0, 0, 0, 1, sign * int(level * picture.height / 32)),
        "ShearX": lambda: affine(1, sign * level * 0.3 / 10, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, sign * level * 0.3 / 10, 1, 0),
        "Brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "Color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "Contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "Sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "Posterize": lambda: ImageOps.posterize(picture, BITS[level]),
        "Solarize": lambda: ImageOps.solarize(picture, THRESHOLDS[level]),
        "Invert": lambda: ImageOps.invert(picture),
        "Equalize": lambda: ImageOps.equalize(picture),
        "AutoContrast": lambda: ImageOps.autocontrast(picture),
    }
    return from_pillow(results[name]())


def by_engine(images: Tensor, names: list[list[str]], levels: list[list[int]], seed: int = 0) -> Tensor:
    kinds = np.array([[PBA_OPERATIONS.index(name) for name in row] for row in names])
    fill = torch.tensor(FILL[: images.shape[1]], dtype=torch.uint8)
    return augment(images, Drawn(kinds, np.array(levels)), draws_of(images, seed), fill)


def draws_of(images: Tensor, seed: int = 0) -> SampleDraws:
    return SampleDraws(seed, np.arange(len(images)))


def at_every_level(name: str, images: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """Return (image, image after the operation, level) for every image at every level, from one batch."""
    levels = [level for level in range(10) for _ in range(len(images))]
    batch = images.repeat(10, 1, 1, 1)
    made = by_engine(batch, [[name]] * len(batch), [[level] for level in levels])
    return list(zip(batch, made, levels, strict=True))


@pytest.mark.parametrize("name", POINT)
def test_an_operation_on_values_agrees_with_pillow(name: str) -> None:
    for images in image_sets():
        for image, made, level in at_every_level(name, images):
            assert torch.equal(made, by_pillow(image, name, level, 1)), (name, level, tuple(image.shape))


@pytest.mark.parametrize("name", SIGNED)
def test_a_geometric_operation_agrees_with_pillow_in_both_directions(name: str) -> None:
    for images in image_sets():
        seen = set()
        for image, made, level in at_every_level(name, images):
            matching = {sign for sign in (1, -1) if torch.equal(made, by_pillow(image, name, level, sign))}
            assert matching, (name, level, tuple(image.shape))
            seen |= {(level, sign) for sign in matching}
        assert len(seen) > 15  # both signs at nearly every level


def test_two_operations_are_applied_one_after_the_other() -> None:
    names = [name for name in PBA_OPERATIONS if name != "Cutout"]
    pairs = list(itertools.product(names, names))
    source = photographs(32, 32, 12)
    images = source[torch.arange(len(pairs)) % len(source)]
    levels = [[(3 * row) % 10, (7 * row + 2) % 10] for row in range(len(pairs))]
    made = by_engine(images, [list(pair) for pair in pairs], levels)
    changed = 0
    for image, one, pair, level in zip(images, made, pairs, levels, strict=True):
        expected = [
            by_pillow(by_pillow(image, pair[0], level[0], first), pair[1], level[1], second)
            for first in ((1, -1) if pair[0] in SIGNED else (1,))
            for second in ((1, -1) if pair[1] in SIGNED else (1,))
        ]
        assert any(torch.equal(one, other) for other in expected), (pair, level)
        changed += not torch.equal(one, image)
    assert changed > len(pairs) // 2


def test_both_directions_are_equally_likely() -> None:
    column = torch.zeros((4000, 1, 4, 32), dtype=torch.uint8)
    column[..., 16] = 255
    made = by_engine(column, [["TranslateX"]] * 4000, [[9]] * 4000)
    to_the_left = (made[:, 0, 0, 7] == 255).float().mean().item()
    assert to_the_left + (made[:, 0, 0, 25] == 255).float().mean().item() == pytest.approx(1)
    assert to_the_left == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)


@pytest.mark.parametrize(("level", "side"), [(0, 0), (1, 2), (5, 10), (9, 18)])
def test_cutout_removes_a_square_around_a_point_of_the_image(level: int, side: int) -> None:
    images = torch.zeros((2000, 3, 32, 32), dtype=torch.uint8)
    made = by_engine(images, [["Cutout"]] * 2000, [[level]] * 2000)
    assert torch.equal(made.amax(dim=(2, 3)), torch.tensor(FILL, dtype=torch.uint8).expand(2000, 3) * (side > 0))
    is_cut = made[:, 0] > 0
    heights, widths = is_cut.any(2).sum(1), is_cut.any(1).sum(1)
    assert torch.equal(is_cut.sum((1, 2)), heights * widths)  # a filled rectangle
    if side:
        assert int(heights.max()) == int(widths.max()) == side
        assert int(heights.min()) >= side // 2  # the center is inside, so at least half is
        # An end row is covered by side / 2 of the 32 centers, give or take the even side's half pixel.
        assert is_cut[:, 16].any(1).float().mean().item() == pytest.approx(side / 32, abs=0.06)
        assert is_cut[:, 0].any(1).float().mean().item() == pytest.approx((side // 2 + 1) / 32, abs=0.06)


def test_small_images_get_small_squares() -> None:
    made = by_engine(torch.zeros((500, 1, 8, 8), dtype=torch.uint8), [["Cutout"]] * 500, [[9]] * 500)
    assert int((made > 0).sum((1, 2, 3)).max()) == 4 * 4  # 18 * 8 // 32


def test_exposed_pixels_take_the_mean_and_later_operations_see_them() -> None:
    images = torch.zeros((8, 3, 32, 32), dtype=torch.uint8)
    made = by_engine(images, [["TranslateX", "Invert"]] * 8, [[4, 0]] * 8)
    inverted = 255 - torch.tensor(FILL, dtype=torch.uint8).view(3, 1, 1)
    exposed = (made != 255).any(1)
    assert torch.equal(exposed.sum((1, 2)), torch.full((8,), 4 * 32))
    assert torch.equal(made, torch.where(exposed.unsqueeze(1), inverted, 255).to(torch.uint8))


def test_color_leaves_gray_images_alone() -> None:
    images = digits(28, 10)
    assert torch.equal(by_engine(images, [["Color"]] * 12, [[9]] * 12), images)


def test_other_numbers_of_channels_work() -> None:
    images = torch.randint(256, (15, 2, 16, 16), dtype=torch.uint8)
    made = by_engine(images, [[name] for name in PBA_OPERATIONS], [[9]] * 15)
    assert made.shape == images.shape


def test_no_operation_leaves_an_image_alone_and_the_input_is_untouched() -> None:
    images = photographs(32, 32, 12)
    before = images.clone()
    kinds = np.full((len(images), 2), NONE)
    kinds[0] = PBA_OPERATIONS.index("Invert"), NONE
    fill = torch.tensor(FILL, dtype=torch.uint8)
    made = augment(images, Drawn(kinds, np.zeros_like(kinds)), draws_of(images), fill)
    assert torch.equal(images, before)
    assert torch.equal(made[1:], before[1:])
    assert torch.equal(made[0], 255 - before[0])


def test_memory_format_and_empty_batches_do_not_matter() -> None:
    images = photographs(32, 32, 12)
    names, levels = [["Rotate", "Equalize"]] * len(images), [[5, 0]] * len(images)
    strided = images.to(memory_format=torch.channels_last)
    assert torch.equal(by_engine(strided, names, levels), by_engine(images, names, levels))
    empty = np.zeros((0, 2), dtype=np.int64)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    assert augment(images[:0], Drawn(empty, empty), draws_of(images[:0]), fill).shape == (0, 3, 32, 32)


def finished(images: Tensor, fill: Tensor, finish: Finish) -> Tensor:
    nothing = np.zeros((len(images), 0), dtype=np.int64)
    return augment(images, Drawn(nothing, nothing), draws_of(images), fill, finish)


def test_finishing_crops_every_offset_and_flips_half() -> None:
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(4000, 1, 8, 8).contiguous()
    fill = torch.tensor([200], dtype=torch.uint8)
    made = finished(images, fill, Finish(padding=2, flip=True))
    padded = torch.full((12, 12), 200, dtype=torch.uint8)
    padded[2:10, 2:10] = images[0, 0]
    expected = {}
    for top, left, flip in itertools.product(range(5), range(5), (False, True)):
        window = padded[top : top + 8, left : left + 8]
        expected[bytes((window.flip(1) if flip else window).contiguous().numpy())] = (top, left, flip)
    seen = [expected[bytes(one.numpy())] for one in made[:, 0]]
    assert set(seen) == set(expected.values())
    assert sum(flip for _, _, flip in seen) / 4000 == pytest.approx(0.5, abs=0.04)
    for offset in range(5):
        assert sum(top == offset for top, _, _ in seen) / 4000 == pytest.approx(0.2, abs=0.03)


def test_finishing_cuts_a_square_of_the_size_asked_for() -> None:
    images = torch.zeros((500, 1, 32, 32), dtype=torch.uint8)
    fill = torch.tensor([9], dtype=torch.uint8)
    made = finished(images, fill, Finish(cutout=5))
    assert int((made > 0).sum((1, 2, 3)).max()) == 25
    assert torch.equal(finished(images, fill, Finish()), images)


def test_images_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match=r"uint8 images, got torch.float32"):
        check_images(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"got shape \(3, 8, 8\)"):
        check_images(torch.zeros(3, 8, 8, dtype=torch.uint8))


class EagerBatch(PendingBatch):
    """A batch on which nothing waits: every map and every table is done at once."""

    def add_maps(self, rows: np.ndarray, maps: Tensor) -> None:
        super().add_maps(rows, maps)
        self.settle(rows)

    def add_tables(self, rows: np.ndarray, tables: Tensor) -> None:
        super().add_tables(rows, tables)
        self.settle(rows)


@pytest.mark.parametrize("space", [PBA, RANDAUGMENT, TRIVIAL_WIDE], ids=lambda space: space.name)
@pytest.mark.parametrize("source", image_sets(), ids=lambda images: "x".join(map(str, images.shape[1:])))
def test_composed_operations_are_the_operations_one_after_the_other(
    space: Space, source: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    images = source[torch.arange(300) % len(source)]
    names = [PBA_OPERATIONS.index(name) for name in space.operations if name != "Identity"]
    drawn = Drawn(rng.choice([NONE, *names], (300, 5)), rng.integers(space.levels, size=(300, 5)), space)
    fill = torch.tensor(FILL[: images.shape[1]], dtype=torch.uint8)
    finish = Finish(padding=3, flip=True, cutout=3)
    made = augment(images, drawn, draws_of(images), fill, finish)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(engine_module, "PendingBatch", EagerBatch)
    assert torch.equal(augment(images, drawn, draws_of(images), fill, finish), made)
