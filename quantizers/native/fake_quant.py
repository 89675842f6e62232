"""Calls to the compiled arithmetic of quantizers: what it accepts, and where to find it."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from quantizers.native.building import loaded_library
from quantizers.native.norm_source import NORM_SOURCE
from quantizers.native.source import BLOCK, FLAGS, SOURCE

_ALL = SOURCE + NORM_SOURCE
_TYPES = (torch.float32, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


class NativeQuant:
    """The functions of a compiled library.

    Args:
        library: From :func:`load`.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._quantize, self._gradients = library.qkd_quantize, library.qkd_gradients
        self._quantize_rows, self._gradients_rows = library.qkd_quantize_rows, library.qkd_gradients_rows
        self._quantize.argtypes = [pointer, pointer, number, *[pointer] * 3, number, number]
        self._gradients.argtypes = [*[pointer] * 3, number, *[pointer] * 5, *[number] * 3]
        self._quantize_rows.argtypes = [pointer, pointer, number, number, *[pointer] * 3]
        self._gradients_rows.argtypes = [*[pointer] * 3, number, number, *[pointer] * 5]
        for function in (self._quantize, self._gradients, self._quantize_rows, self._gradients_rows):
            function.restype = None
        self.norm_statistics, self.normalize = library.qkd_norm_statistics, library.qkd_normalize
        self.norm_gradients, self.norm_finish = library.qkd_norm_gradients, library.qkd_norm_finish
        self.norm_statistics.argtypes = [pointer, *[number] * 4, *[pointer] * 4, number, number]
        self.normalize.argtypes = [pointer, pointer, *[number] * 3, *[pointer] * 3, number, number]
        self.norm_gradients.argtypes = [
            *[pointer] * 3, *[number] * 4, pointer, pointer, number, *[pointer] * 5, number, number,
        ]  # fmt: skip
        self.codes = library.qkd_codes
        self.codes.argtypes, self.codes.restype = [pointer, pointer, number, pointer, number, number], number
        self.norm_finish.argtypes = [*[pointer] * 3, *[number] * 3, pointer, number, number]
        self.norm_moments, self.norm_table, self.norm_ends = (
            library.qkd_norm_moments, library.qkd_norm_table, library.qkd_norm_ends,
        )  # fmt: skip
        real = ctypes.c_double
        self.norm_moments.argtypes = [*[pointer] * 3, real, number, pointer, pointer]
        self.norm_table.argtypes = [*[pointer] * 4, real, real, number, number, *[pointer] * 3]
        self.norm_ends.argtypes = [*[pointer] * 5, real, number, number, pointer]
        for function in (
            self.norm_statistics, self.normalize, self.norm_gradients, self.norm_finish, self.norm_moments,
            self.norm_table, self.norm_ends,
        ):  # fmt: skip
            function.restype = None

    @staticmethod
    def takes(x: Tensor, *settings: Tensor) -> bool:
        """Return whether this computes values of this kind: float32 or bfloat16 on CPU, with float32 settings there."""
        return (
            type(x) in _PLAIN  # not the compiler's fake tensors
            and x.device.type == "cpu"
            and x.dtype in _TYPES
            and all(one.dtype is torch.float32 and one.device.type == "cpu" for one in settings)
        )

    def quantize(self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return a dense row of values on the grid of one step size, in the dtype of ``x``."""
        out = torch.empty_like(x)
        self._quantize(
            x.data_ptr(), out.data_ptr(), x.numel(), scale.data_ptr(), low.data_ptr(), high.data_ptr(),
            x.dtype is torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def gradients(
        self, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, residual: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the gradient of a dense row ``x`` (in its dtype, like ``grad``) and the summed terms of the step's."""
        grad_x, total = torch.empty_like(grad), torch.empty((), dtype=torch.float32)
        sums = torch.empty(2 * (x.numel() // BLOCK + 1), dtype=torch.float32)
        self._gradients(
            grad.data_ptr(), x.data_ptr(), grad_x.data_ptr(), x.numel(), scale.data_ptr(), low.data_ptr(),
            high.data_ptr(), sums.data_ptr(), total.data_ptr(), x.dtype is torch.bfloat16, residual,
            torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, total

    def quantize_rows(self, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Return float32 rows, ``[rows, values]``, on grids with one step size per row."""
        x, scale = x.contiguous(), scale.contiguous()
        out = torch.empty_like(x)
        self._quantize_rows(x.data_ptr(), out.data_ptr(), *x.shape, scale.data_ptr(), low.data_ptr(), high.data_ptr())
        return out

    def gradients_rows(
        self, grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of float32 rows, and the summed terms of each step's, shape ``[rows]``."""
        grad, x, scale = grad.contiguous(), x.contiguous(), scale.contiguous()
        grad_x, totals = torch.empty_like(grad), torch.empty(x.size(0), dtype=torch.float32)
        sums = torch.empty(2 * (x.size(1) // BLOCK + 1), dtype=torch.float32)
        self._gradients_rows(
            grad.data_ptr(), x.data_ptr(), grad_x.data_ptr(), *x.shape, scale.data_ptr(), low.data_ptr(),
            high.data_ptr(), sums.data_ptr(), totals.data_ptr(),
        )  # fmt: skip
        return grad_x, totals


def tree_sum(terms: Tensor) -> Tensor:
    """Return the sum over the last axis in the order of the compiled kernel, which adds halves to halves.

    Args:
        terms: Shape ``[..., values]``; float32, or float64 for inputs of that type.

    Returns:
        Shape ``[...]``. The order depends only on the number of terms, not on threads or vector widths.
    """
    blocks = -(-terms.size(-1) // BLOCK)
    if blocks == 0:
        return terms.sum(-1)
    padded = torch.nn.functional.pad(terms, (0, blocks * BLOCK - terms.size(-1)))
    sums = _halved(padded.view(*terms.shape[:-1], blocks, BLOCK))
    return _halved(torch.nn.functional.pad(sums, (0, (1 << (blocks - 1).bit_length()) - blocks)))


def _halved(terms: Tensor) -> Tensor:
    while terms.size(-1) > 1:
        half = terms.size(-1) // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms.squeeze(-1)


def load() -> NativeQuant | None:
    """Return the compiled functions, or None without a compiler or with ``QKD_NATIVE=0``."""
    library = loaded_library("fake-quant", _ALL, FLAGS, without="PyTorch's compiler is tried", parallel=True)
    return None if library is None else _functions(library)


@functools.lru_cache(maxsize=2)
def _functions(library: ctypes.CDLL) -> NativeQuant:
    return NativeQuant(library)
