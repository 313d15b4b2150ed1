"""The MXFP4 codec on plain arrays: 32 four-bit floats (E2M1) share one power of two (E8M0).

Source: OCP Microscaling Formats (MX) Specification 1.0. A code is sign, two exponent bits, one mantissa bit;
byte b of a block holds code 2b in its low nibble and code 2b+1 in its high nibble, as gpt-oss stores them.
"""

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import rows
from gptoss_lite.quant.formats import BLOCK

BLOCK_BYTES = BLOCK // 2
E8M0_BIAS = 127
E8M0_NAN = 255
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E8M0 = (*(2.0 ** (byte - E8M0_BIAS) for byte in range(E8M0_NAN)), float("nan"))
HIGHEST = E8M0_NAN - 3  # the last scale byte at which every code is a float32: 6 * 2^125
SUSPECT = HIGHEST + 1  # from here on, codes decide

_E2M1_MAX_EXPONENT = 2  # 6.0 = 1.5 * 2^2
_MIDPOINTS = tuple((low + high) / 2 for low, high in pairwise(E2M1[:8]))
_CHUNK = 1 << 18  # scales looked at together
_ABS, _INF = 0x7FFFFFFF, 0x7F800000  # float32 bit patterns


def encode(
    array: NDArray[Any], search: bool = False, weights: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Quantise to MXFP4: by the rule of the OCP specification, or with the least squared error.

    OCP's shared exponent is floor(log2(max|x|)) - 2, at least -127; values round to the nearest code, ties to
    the even one, and those beyond 6 become 6. A block of zeros gets scale byte 0. A search takes another
    exponent where it makes the block's sum of w * (x - q)^2 less: one higher or one lower, with weights up to
    three lower; of equals, OCP's or the one next to it. Either way, what `decode` returned comes back as the
    same values.

    array: float16, bfloat16 or float32, (..., K) with K a multiple of 32; any strides will do. weights: how
    much an error in each column counts, such as the mean square of what the column multiplies: float32 (K,)
    or, for a stack (..., N, K), (..., K); all ones if None.
    Returns blocks uint8 (..., K/32, 16) and scales uint8 (..., K/32).
    Raises FormatError on another dtype or shape, on NaN or infinity, naming the position, and on weights that
    do not fit or are negative.
    """
    rows.check(array)
    weights = check_weights(array, search, weights)
    if array.ndim == 1:
        blocks, scales = encode(array[None], search, weights)
        return blocks[0], scales[0]
    blocks, scales = empty(array.shape)
    for index in rows.chunks(array.shape):
        x = rows.load(array, index)
        bits = x.view(np.uint32).reshape(*scales[index].shape, BLOCK)
        largest = (bits & np.uint32(_ABS)).max(axis=2)  # magnitudes order as their bit patterns do
        if largest.max(initial=0) >= _INF:
            raise rows.not_finite(array, index)
        # The biased float32 exponent less 2 is the E8M0 byte; subnormals (exponent 0) get the smallest scale.
        byte = np.maximum((largest >> 23).astype(np.int32) - _E2M1_MAX_EXPONENT, 0)
        inverse = np.ldexp(np.float32(1), E8M0_BIAS - byte)  # a normal number, so the product is exact
        magnitude = np.abs(x).reshape(bits.shape) * inverse[:, :, None]
        if search:
            shift = _search(magnitude, byte, None if weights is None else weights[index[:-1]])
            byte += shift
            magnitude *= np.ldexp(np.float32(1), -shift)[:, :, None]
        code = _nearest(magnitude) | (bits >> 31).astype(np.uint8) << 3
        scales[index] = byte
        blocks[index] = code[:, :, 0::2] | code[:, :, 1::2] << 4
    return blocks, scales


def check_weights(
    array: NDArray[Any], search: bool, weights: NDArray[np.float32] | None
) -> NDArray[np.float32] | None:
    """Bring the weights of a search to the shape (..., K) of a stack; raises FormatError on others."""
    if weights is None:
        return None
    if not search:
        raise FormatError("weights are given, but no search is made: give search=True")
    wanted = (*array.shape[:-2], array.shape[-1])
    if weights.shape not in (wanted, wanted[-1:]):
        raise FormatError(f"weights {weights.shape} do not fit {array.shape}: give one for each column")
    if weights.dtype != np.float32 or not (np.isfinite(weights) & (weights >= 0)).all():
        raise FormatError("weights must be float32, finite and not negative")
    return np.broadcast_to(weights, wanted)


def empty(shape: tuple[int, ...]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Make room for the blocks and scales of an array (..., K)."""
    scales = np.empty((*shape[:-1], shape[-1] // BLOCK), np.uint8)
    return np.empty((*scales.shape, BLOCK_BYTES), np.uint8), scales


def _nearest(magnitude: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round to codes 0 to 7."""
    code = np.zeros(magnitude.shape, np.uint8)
    for below, midpoint in enumerate(_MIDPOINTS):  # a tie goes up where the code below is odd
        code += magnitude >= midpoint if below % 2 else magnitude > midpoint
    return code


# With OCP's scale, the largest magnitude m of a block lies from 4 to 8. One exponent higher, the grid has no
# point below 8 that OCP's lacks, so this can win only where m > 7, which is nearer to 8 than to 6. One lower,
# only what is below 1 gains, each square 1/16 at most, and m becomes 3: without weights that can win only
# where m < 4.5. Nothing further down can, as m would err by more than all the rest gains; with weights, which
# may make little of m, it can.
def _search(
    magnitude: NDArray[np.float32], byte: NDArray[np.int32], weights: NDArray[np.float32] | None
) -> NDArray[np.int32]:
    """Choose how far to go from OCP's exponents (R, B), by magnitudes (R, B, 32) in units of OCP's scale."""
    w = 1.0 if weights is None else weights.astype(np.float64).reshape(-1, BLOCK)
    largest = magnitude.max(axis=2, initial=0)
    least = _error(magnitude, 0, w)
    chosen = np.zeros_like(byte)
    for shift in (1, -1) if weights is None else (1, -1, -2, -3):
        can_win = largest > 7 if shift > 0 else (largest < 4.5) | (weights is not None)
        error = _error(magnitude, shift, w)
        better = can_win & (error < least) & (byte + shift >= 0) & (byte + shift <= HIGHEST)
        least[better], chosen[better] = error[better], shift
    return chosen


def _error(
    magnitude: NDArray[np.float32], shift: int, weights: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Add up the weighted squared errors of each block with exponents so much higher than OCP's.

    The order is one that vectors can take, and kernels.cpu.codec does: halves upon halves.
    """
    scaled = magnitude * np.float32(2.0**-shift)
    difference = scaled - np.asarray(E2M1, np.float32)[_nearest(scaled)]
    terms = difference.astype(np.float64) ** 2 * weights
    while (half := terms.shape[-1] // 2) > 0:
        terms = terms[..., :half] + terms[..., half:]
    total: NDArray[np.float64] = terms[..., 0] * 4.0**shift
    return total


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
        chunk = flat[start : start + _CHUNK]
        if chunk.max() < SUSPECT:
            continue
        suspects = start + np.flatnonzero(chunk >= SUSPECT)
        largest = np.maximum(codes[suspects] & 0x07, codes[suspects] >> 4 & 0x07).max(axis=1)
        # Below 2^128 stay 3.0 (code 5) times 2^126 and 1.5 (code 3) times 2^127; of 255, nothing does.
        limit = np.array([5, 3, -1])[flat[suspects] - np.uint8(SUSPECT)]
        if (bad := suspects[largest > limit]).size:
            return tuple(int(i) for i in np.unravel_index(bad[0], scales.shape))
    return None
