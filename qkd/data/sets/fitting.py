"""Rules, by name, for resizing an image of any size to the input size of a net."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

Size = tuple[int, int]  # width and height in pixels, in Pillow's order

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_NAME = re.compile(r"(?P<rule>crop|stretch|pad)(?::(?P<resize>[0-9]{1,5}))?(?::(?P<how>bilinear|bicubic))?")


@dataclass(frozen=True)
class Fit:
    """A resize rule.

    Args:
        rule: ``crop``: resize so that the image covers the target size, then crop the center; ``stretch``: resize both
            sides and ignore the aspect ratio; ``pad``: resize so that the whole image fits, and center it on black.
        resize_size: Only for ``crop``: length in pixels of the shorter side before the center crop, as torchvision's
            ``Resize(N)`` and ``CenterCrop`` round and cut, also of images that have the target size already; None for
            the shortest that covers the target size.
        interpolation: ``bilinear`` or ``bicubic``, both with antialiasing when they downsample.

    Example:
        >>> Fit("crop", 256).name, Fit.named("crop:256:bicubic").interpolation
        ('crop:256', 'bicubic')
    """

    rule: str = "crop"
    resize_size: int | None = None
    interpolation: str = "bilinear"

    @property
    def name(self) -> str:
        """The rule as one word: ``crop``, ``crop:256``, ``stretch:bicubic``."""
        parts = [self.rule, *([] if self.resize_size is None else [str(self.resize_size)])]
        return ":".join([*parts, *([] if self.interpolation == "bilinear" else [self.interpolation])])

    @classmethod
    def named(cls, name: str) -> Fit:
        """Return the rule with this name.

        Raises:
            ValueError: If there is no such rule.
        """
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"must be crop, stretch or pad, optionally with a size and interpolation, got {name!r}")
        return cls(match["rule"], None if match["resize"] is None else int(match["resize"]), match["how"] or "bilinear")

    def resized(self, size: Size, wanted: Size) -> Size:
        """Return the size that an image is resized to before cropping or padding."""
        return _RESIZED[self.rule](self, size, wanted)

    def placed(self, size: Size, wanted: Size) -> tuple[Size, Size]:
        """Return the resized size, and where in it the kept window begins (negative for black padding).

        An image that already has the target size does not change, unless there is a ``resize_size``.
        """
        if size == wanted and self.resize_size is None:
            return size, (0, 0)
        made = self.resized(size, wanted)
        if self.rule == "pad":
            return made, (-((wanted[0] - made[0]) // 2), -((wanted[1] - made[1]) // 2))
        if self.resize_size is not None:  # to the even pixel, as torchvision does
            return made, (round((made[0] - wanted[0]) / 2), round((made[1] - wanted[1]) / 2))
        return made, ((made[0] - wanted[0]) // 2, (made[1] - wanted[1]) // 2)

    def __call__(self, image: Image.Image, wanted: Size) -> Image.Image:
        """Return an image of the target size."""
        if image.size == wanted and self.resize_size is None:
            return image
        size, (left, top) = self.placed(image.size, wanted)
        # Columns, then rows: in a single call, Pillow picks the faster order, by a rule that changed in version 13.
        made = image.resize((size[0], image.size[1]), INTERPOLATIONS[self.interpolation])
        made = made.resize(size, INTERPOLATIONS[self.interpolation])
        if self.rule == "pad":
            ground = Image.new(made.mode, wanted)
            ground.paste(made, (-left, -top))
            return ground
        return made.crop((left, top, left + wanted[0], top + wanted[1]))


def _covering(fit: Fit, size: Size, wanted: Size) -> Size:
    # the kept share of the resized image is the same for all images: the smaller one of the two sides if the target
    # size is not square
    if fit.resize_size is not None and wanted[0] == wanted[1]:
        shorter, least = max(fit.resize_size, wanted[0]), min(size)
        return int(shorter * size[0] / least), int(shorter * size[1] / least)
    factor = max(wanted[0] / size[0], wanted[1] / size[1])
    if fit.resize_size is not None:
        factor *= max(1.0, fit.resize_size / min(wanted))
    return max(wanted[0], round(size[0] * factor)), max(wanted[1], round(size[1] * factor))


def _stretched(fit: Fit, size: Size, wanted: Size) -> Size:  # noqa: ARG001
    return wanted


def _fitting(fit: Fit, size: Size, wanted: Size) -> Size:  # noqa: ARG001
    factor = min(wanted[0] / size[0], wanted[1] / size[1])
    return min(wanted[0], max(1, round(size[0] * factor))), min(wanted[1], max(1, round(size[1] * factor)))


_RESIZED: Mapping[str, Callable[[Fit, Size, Size], Size]] = {"crop": _covering, "stretch": _stretched, "pad": _fitting}
