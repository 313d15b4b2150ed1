"""The MXFP4 codec on plain arrays: 32 four-bit floats (E2M1) share one power of two (E8M0).

Source: OCP Microscaling Formats (MX) Specification 1.0. A code is sign, two exponent bits, one mantissa bit;
byte b of a block holds code 2b in its low nibble and code 2b+1 in its high nibble, as gpt-oss stores them.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.quant.formats import BLOCK

BLOCK_BYTES = BLOCK // 2
E8M0_BIAS = 127
E8M0_NAN = 255
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0 = (*(2.0 ** (byte - E8M0_BIAS) for byte in range(E8M0_NAN)), float("nan"))

_E2M1_MAX_EXPONENT = 2  # 6.0 = 1.5 * 2^2
_MIDPOINTS = tuple((low + high) / 2 for low, high in pairwise(E2M1[:8]))
_CHUNK = 1 << 18  # weights converted at a time: about 4 MB of scratch, which stays in cache
_ABS, _INF = 0x7FFFFFFF, 0x7F800000  # float32 bit patterns


def encode(array: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Quantise to MXFP4 by the rule of the OCP specification.

    The shared exponent is floor(log2(max|x|)) - 2, at least -127; values round to the nearest code, ties to
    the even one, and those beyond 6 become 6. A block of zeros gets scale byte 0. Encoding what `decode`
    returned gives the same values again.

    array: float16, bfloat16 or float32, (..., K) with K a multiple of 32; any strides will do.
    Returns blocks uint8 (..., K/32, 16) and scales uint8 (..., K/32).
    Raises FormatError on another dtype or shape, and on NaN or infinity, naming the position.
    """
    if array.dtype.name not in ("float16", "bfloat16", "float32"):
        raise FormatError(f"cannot quantise dtype {array.dtype.name}: give float16, bfloat16 or float32")
    if array.ndim == 0 or array.shape[-1] % BLOCK:
        raise FormatError(f"cannot quantise shape {array.shape}: the last axis must be divisible by {BLOCK}")
    if array.ndim == 1:
        blocks, scales = encode(array[None])
        return blocks[0], scales[0]
    scales = np.empty((*array.shape[:-1], array.shape[-1] // BLOCK), np.uint8)
    blocks = np.empty((*scales.shape, BLOCK_BYTES), np.uint8)
    for index in _row_chunks(array.shape):
        x = np.ascontiguousarray(array[index], np.float32).reshape(-1, BLOCK)
        bits = x.view(np.uint32)
        largest = (bits & np.uint32(_ABS)).max(axis=1)  # magnitudes order as their bit patterns do
        if largest.max(initial=0) >= _INF:
            raise FormatError(f"cannot quantise {_first_not_finite(array, index)}: numbers must be finite")
        # The biased float32 exponent less 2 is the E8M0 byte; subnormals (exponent 0) get the smallest scale.
        scale = np.maximum((largest >> 23).astype(np.int32) - _E2M1_MAX_EXPONENT, 0)
        inverse = np.ldexp(np.float32(1), E8M0_BIAS - scale)  # a normal number, so the product is exact
        magnitude = np.abs(x) * inverse[:, None]
        code = (bits >> 31).astype(np.uint8) << 3
        for below, midpoint in enumerate(_MIDPOINTS):  # a tie goes up where the code below is odd
            code += magnitude >= midpoint if below % 2 else magnitude > midpoint
        scales[index] = scale.reshape(scales[index].shape)
        blocks[index] = (code[:, 0::2] | code[:, 1::2] << 4).reshape(blocks[index].shape)
    return blocks, scales


def decode(blocks: Any, scales: Any, xp: Any = np) -> Any:
    """Expand MXFP4 codes to float32: the reference that every kernel is tested against.

    blocks: uint8 (..., K/32, 16); scales: uint8 (..., K/32), both arrays of `xp` (NumPy or CuPy).
    Returns float32 (..., K), each value code * 2^(scale - 127), exact; scale byte 255 gives NaN.
    """
    codes = xp.stack([blocks & 0x0F, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = xp.asarray(E2M1, dtype=xp.float32)[codes]
    values *= xp.asarray(E8M0, dtype=xp.float32)[scales][..., None]
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


def invalid_scale(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> tuple[int, ...] | None:
    """Find the first scale that is NaN, or takes a value of its block beyond float32; None where none does.

    blocks: uint8 (..., K/32, 16); scales: uint8 (..., K/32), both contiguous. Returns a position in `scales`.
    """
    flat, codes = scales.reshape(-1), blocks.reshape(-1, BLOCK_BYTES)
    for start in range(0, flat.size, _CHUNK):
        suspects = start + np.flatnonzero(flat[start : start + _CHUNK] >= E8M0_NAN - 2)
        largest = np.maximum(codes[suspects] & 0x07, codes[suspects] >> 4 & 0x07).max(axis=1)
        # Below 2^128 stay 3.0 (code 5) times 2^126 and 1.5 (code 3) times 2^127; of 255, nothing does.
        limit = np.array([5, 3, -1])[flat[suspects] - np.uint8(E8M0_NAN - 2)]
        if (bad := suspects[largest > limit]).size:
            return tuple(int(i) for i in np.unravel_index(bad[0], scales.shape))
    return None


def _row_chunks(shape: tuple[int, ...]) -> Iterator[tuple[int | slice, ...]]:
    """Index runs of whole rows, about _CHUNK weights each, that together cover an array (..., N, K)."""
    *leading, rows, columns = shape
    step = max(1, _CHUNK // max(columns, 1))
    for outer in np.ndindex(*leading):
        for start in range(0, rows, step):
            yield (*outer, slice(start, start + step))


def _first_not_finite(array: NDArray[Any], index: tuple[int | slice, ...]) -> str:
    """Describe the first NaN or infinity of a chunk by its value and its position in the whole array."""
    part = array[index].astype(np.float32)
    row, column = np.argwhere(~np.isfinite(part))[0].tolist()
    *outer, rows = index
    start = rows.start if isinstance(rows, slice) else rows
    return f"{part[row, column]} at {(*outer, start + row, column)}"
