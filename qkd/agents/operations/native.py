"""The engine's work on a CPU as one compiled function: image by image, one operation after another.

On a CPU, a 32x32 image fits into the L1 cache, and the cost of a batched engine is the number of its calls. If there
is a C++ compiler, this source is compiled once per machine (into the user's cache folder) and called once per
batch; without one, the batched engine does the same work, bit for bit. ``QKD_NATIVE=0`` switches it off.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkd.agents.operations.counting import IntArray
from qkd.agents.operations.source import FLAGS, SOURCE
from quantizers.native.building import loaded_library

NOTHING, AFFINE, CUT, TABLE, EQUALIZE, AUTOCONTRAST, CONTRAST, COLOR, SHARPNESS = range(9)  # codes of the source


def run(
    images: Tensor,
    fill: Tensor,
    codes: IntArray,
    maps: IntArray,
    factors: npt.NDArray[np.float32],
    tables: Tensor,
    table_rows: IntArray,
    boxes: IntArray,
    windows: IntArray | None,
    *,
    has_cut: bool,
) -> Tensor:
    """Return augmented images; requires that :func:`load` returns a function.

    Args:
        images: uint8 on the CPU, shape ``[batch, channels, height, width]``.
        fill: uint8, shape ``[channels]``.
        codes: Operation of each round, shape ``[batch, rounds]``.
        maps: Fixed-point affine maps, shape ``[batch, rounds, 6]``.
        factors: Factors of the enhancing operations, shape ``[batch, rounds]``.
        tables: uint8, shape ``[n, 256]``.
        table_rows: Row indices into ``tables``, shape ``[batch, rounds]``.
        boxes: Squares ``(x0, x1, y0, y1)`` to cut out, the last one at the very end, shape ``[batch, rounds + 1, 4]``.
        windows: ``(x, y, is_flipped)`` of the final crop, shape ``[batch, 3]``; None for no crop and no flip.
        has_cut: Whether the last box of each image is cut out.
    """
    function = load()
    if function is None:
        raise RuntimeError("the compiled engine is not available")
    source = images.contiguous()
    result = torch.empty_like(source)
    batch, channels, height, width = source.shape
    arrays: Sequence[Any] = (codes, maps, factors, table_rows, boxes, windows if windows is not None else codes)
    codes, maps, factors, table_rows, boxes, window = (np.ascontiguousarray(one) for one in arrays)
    function(
        source.data_ptr(), result.data_ptr(), batch, channels, height, width, codes.shape[1], codes.ctypes.data,
        maps.ctypes.data, factors.ctypes.data, tables.data_ptr(), table_rows.ctypes.data, boxes.ctypes.data,
        window.ctypes.data, fill.data_ptr(), int(windows is not None), int(has_cut),
        torch.get_num_threads(),
    )  # fmt: skip
    return result


@functools.lru_cache(maxsize=1)
def load() -> Any:
    """Return the compiled function, or None if there is no compiler or it is switched off."""
    without = "augmentation on the CPU is several times slower"
    library = loaded_library("augment", SOURCE, FLAGS, without=without, parallel=True)
    return None if library is None else bound(library)


def bound(library: ctypes.CDLL) -> Any:
    """Return the function of a compiled library."""
    function = library.qkd_augment
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, pointer, *[number] * 5, *[pointer] * 8, *[number] * 3]
    function.restype = None
    return function
