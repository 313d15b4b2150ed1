"""Whether a matrix can be the fp16 operand of a product: its numbers in range, and what is lost negligible.

fp16 holds up to 65504, in full precision (11 bits) down to 2^-14 and in steps of 2^-24 below: rounding to it
is off by 2^-25 at most where numbers are small. Everything here reads a matrix row chunk by row chunk.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.layout import MXFP4_HALF_SCALES

Array = npt.NDArray[Any]

_LARGEST = 65504.0
_TYPICAL = 2.0**-13  # root mean square from which on 2^-25 is at most 2^-12 of a weight: bf16's own is 2^-8
_INT8_CODES = 127
_CHUNK = 1 << 20  # numbers converted at a time
# The E8M0 byte that makes 2^-14; that from which on all codes are exact in fp16: 0.5 * 2^(104 - 127) = 2^-24.
_MXFP4_NORMAL, _MXFP4_EXACT = 113, 104


def dense_fits_half(weights: Array) -> bool:
    """Tell whether fp16 keeps a matrix (..., N, K) of bfloat16, or its bits in uint16, float16 or float32.

    Every magnitude must be at most 65504, and the root mean square at least 2^-13, so that the error of the
    smallest, 2^-25, is under 2^-12 of a typical weight: a sixteenth of what bf16 rounding had done to it. A
    matrix of zeros fits; so does float16, whatever it holds, and float32 that is exact in fp16.
    """
    if weights.dtype == np.float16:
        return True
    squares, count = 0.0, 0
    for values in _chunks(weights):
        if not float(np.abs(values).max(initial=0)) <= _LARGEST:
            return False
        squares += float(np.dot(values, values))
        count += values.size
    if squares >= _TYPICAL**2 * count:
        return True
    return all(bool((values.astype(np.float16) == values).all()) for values in _chunks(weights))


def mxfp4_fits_half(scales: Array) -> bool:
    """Tell whether fp16 keeps MXFP4 with these E8M0 scales, uint8 of any shape; 255 has been refused before.

    The largest byte must be at most 128: the kernels store it + 14 as an fp16 number of its own, 2^15. Blocks
    below byte 99 become zero, and prefill, which multiplies a scale in, rounds those below 104 to steps of
    2^-24. Both are off by 2^-25 at most. So either the largest byte is at least 113, where codes are
    multiples of 2^-15; or no byte is below 104, where all is exact.
    """
    if scales.size == 0:
        return True
    return int(scales.max()) <= MXFP4_HALF_SCALES[1] and (
        int(scales.max()) >= _MXFP4_NORMAL or int(scales.min()) >= _MXFP4_EXACT
    )


def int8_fits_half(scales: Array) -> bool:
    """Tell whether fp16 keeps int8 codes of these scales: bfloat16 (or its bits), float16 or E8M0 (uint8).

    127 times the largest must be at most 65504. Decode applies a scale in float32; prefill rounds it to fp16,
    which is off by 2^-25 at most where it is below 2^-14: the root mean square of the scales must be at least
    2^-13, so that this is under 2^-12 of what a typical one is worth, or all be multiples of 2^-24, which
    fp16 has.
    """
    squares, count, exact = 0.0, 0, True
    for values in _chunks(scales):
        if not float(np.abs(values).max(initial=0)) * _INT8_CODES <= _LARGEST:
            return False
        exact = exact and bool((np.ldexp(values, 24) % 1 == 0).all())
        squares += float(np.dot(values, values))
        count += values.size
    return exact or squares >= _TYPICAL**2 * count


def _chunks(array: Array) -> Iterator[Array]:
    """Yield a matrix or a stack of them as flat float32, about _CHUNK numbers at a time."""
    rows = array.reshape(-1, array.shape[-1]) if array.flags.c_contiguous else array
    step = max(1, _CHUNK // max(1, rows[:1].size))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        if part.dtype == np.uint8:  # E8M0
            yield np.ldexp(np.float32(1), part.reshape(-1).astype(np.int32) - 127)
        elif part.dtype == np.uint16:  # the bits of bf16
            yield part.reshape(-1).view(ml_dtypes.bfloat16).astype(np.float32)
        else:
            yield part.astype(np.float32).ravel(order="K")  # in memory's own order, for speed
