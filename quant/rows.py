"""Arrays to be quantised, a run of rows at a time, so that little scratch is needed."""

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.quant.formats import BLOCK

Rows: TypeAlias = tuple[int | slice, ...]

CHUNK = 1 << 17  # weights converted at a time: half a MB of float32, which stays in cache


def check(array: NDArray[Any]) -> None:
    """Raise FormatError unless an array's dtype and shape can be quantised."""
    if array.dtype.name not in ("float16", "bfloat16", "float32"):
        raise FormatError(f"cannot quantise dtype {array.dtype.name}: give float16, bfloat16 or float32")
    if array.ndim == 0 or array.shape[-1] % BLOCK:
        raise FormatError(f"cannot quantise shape {array.shape}: the last axis must be divisible by {BLOCK}")


def chunks(shape: tuple[int, ...]) -> Iterator[Rows]:
    """Index runs of whole rows, about CHUNK weights each, that together cover an array (..., N, K)."""
    *leading, rows, columns = shape
    step = max(1, CHUNK // max(columns, 1))
    for outer in np.ndindex(*leading):
        for start in range(0, rows, step):
            yield (*outer, slice(start, start + step))


def load(array: NDArray[Any], index: Rows) -> NDArray[np.float32]:
    """Read a run of rows of an array of any strides -> float32 (R, K), contiguous."""
    # As plain integers: NumPy copies those of a turned matrix twice as fast as it does bfloat16.
    bits = np.ascontiguousarray(array.view(f"u{array.itemsize}")[index])
    return bits.view(array.dtype).astype(np.float32, copy=False)


def not_finite(array: NDArray[Any], index: Rows) -> FormatError:
    """Make the error for a run of rows that holds NaN or infinity: the first, and where in `array` it is."""
    part = load(array, index)
    row, column = np.argwhere(~np.isfinite(part))[0].tolist()
    *outer, rows = index
    start = rows.start if isinstance(rows, slice) else rows
    place = (*outer, start + row, column)
    return FormatError(f"cannot quantise {part[row, column]} at {place}: numbers must be finite")
