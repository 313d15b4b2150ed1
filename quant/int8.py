"""The int8 codec on plain arrays: signed codes of which a group in each row shares a scale; no zero point."""

from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import rows
from gptoss_lite.quant.formats import BLOCK, Scales
from gptoss_lite.quant.mxfp4 import E8M0, E8M0_BIAS

LARGEST = 127  # codes are -127 to 127: a number and its negative are equally well off
SCALE_DTYPES: dict[Scales, np.dtype[Any]] = {
    "bf16": np.dtype(bfloat16),
    "float16": np.dtype(np.float16),
    "e8m0": np.dtype(np.uint8),
}

# The largest scales of which 127 still is a float32; for fp16, simply its largest number.
_LARGEST_SCALE = {"bf16": 129 * 2.0**114, "float16": 65504.0, "e8m0": 2.0**121}
# The bits of a scale that are its magnitude, and these of the largest one.
_LARGEST_BITS = {
    "bf16": (np.uint16(0x7FFF), 0x7C01), "float16": (np.uint16(0x7FFF), 0x7BFF), "e8m0": (np.uint8(0xFF), 248)
}  # fmt: skip
_CHUNK = 1 << 18  # scales looked at together
_SMALLEST_SCALE = {"bf16": 2.0**-133, "float16": 2.0**-24, "e8m0": 2.0**-E8M0_BIAS}


def encode(
    array: NDArray[Any], group: int | None = BLOCK, scales: Scales = "bf16"
) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Quantise to int8: the scale is stored first, then codes are rounded against the scale as stored.

    The scale is max|x| / 127 of the group, rounded to the nearest bf16 or fp16, or for E8M0 up to a power of
    two; codes are x / scale rounded to the nearest, ties to even, -127 and 127 at most. A group of zeros gets
    scale zero, the smallest for E8M0. What MXFP4 holds comes out exactly with groups of 32 and E8M0 scales,
    all but halves of the smallest scale, 2^-127.

    array: float16, bfloat16 or float32, (..., K), any strides; group: a multiple of 32 that divides K, or
    None for the whole row; scales: "bf16", "float16" or "e8m0".
    Returns codes int8 (..., K) and scales bfloat16, float16 or uint8 (..., K / group).
    Raises FormatError on another dtype, shape, group or kind of scales, on NaN and infinity, and on numbers
    beyond what fp16 scales reach, naming the position.
    """
    length = check(array, group, scales)
    if array.ndim == 1:
        codes, stored = encode(array[None], group, scales)
        return codes[0], stored[0]
    codes, stored = empty(array.shape, length, scales)
    for index in rows.chunks(array.shape):
        x = rows.load(array, index).reshape(*stored[index].shape, length)
        largest = np.abs(x).max(axis=2, initial=0)
        if not np.isfinite(largest).all():
            raise rows.not_finite(array, index)
        stored[index], divisor = choose_scales(largest, scales)
        # float64: a quotient next to a tie is not rounded onto it.
        code = np.clip(np.rint(x / divisor[:, :, None]), -LARGEST, LARGEST)
        codes[index] = code.astype(np.int8).reshape(codes[index].shape)
    return codes, stored


def check(array: NDArray[Any], group: int | None, scales: Scales) -> int:
    """Raise FormatError unless an array can be quantised so; return the columns that share a scale."""
    rows.check(array)
    if scales not in SCALE_DTYPES:
        raise FormatError(f"unknown scales {scales!r}: choose bf16, float16 or e8m0")
    length = max(array.shape[-1], BLOCK) if group is None else group
    if length < BLOCK or length % BLOCK or array.shape[-1] % length:
        raise FormatError(
            f"cannot quantise shape {array.shape} in groups of {length}:"
            f" give a multiple of {BLOCK} that divides {array.shape[-1]}"
        )
    return length


def empty(shape: tuple[int, ...], length: int, scales: Scales) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """Make room for the codes and scales of an array (..., K), in groups of `length`."""
    stored = np.empty((*shape[:-1], shape[-1] // length), SCALE_DTYPES[scales])
    return np.empty(shape, np.int8), stored


def choose_scales(largest: NDArray[np.float32], scales: Scales) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Choose the scales of groups by their largest magnitudes: as stored, and what to divide the group by.

    Raises FormatError on numbers beyond what fp16 scales reach.
    """
    if scales == "float16" and largest.max(initial=0) > LARGEST * _LARGEST_SCALE[scales]:
        raise FormatError(f"cannot quantise {largest.max()} with float16 scales: choose bf16")
    scale = _scale(largest, scales)
    return scale, np.where(largest > 0, factors(scale), 1).astype(np.float64)


def decode(codes: Any, scales: Any, xp: Any = np) -> Any:
    """Expand int8 codes to float32: the reference that every kernel is tested against.

    codes: int8 (..., K); scales: bfloat16, float16 or E8M0 uint8 (..., K / group), arrays of `xp` (NumPy or
    CuPy). Returns float32 (..., K), each value code * scale.
    """
    groups = codes.astype(xp.float32).reshape(*scales.shape, -1 if scales.size else BLOCK)
    groups *= factors(scales, xp)[..., None]
    return groups.reshape(codes.shape)


def factors(scales: Any, xp: Any = np) -> Any:
    """Widen scales to float32: bfloat16, float16 or E8M0 uint8, an array of `xp` (NumPy or CuPy)."""
    if scales.dtype == np.uint8:
        return xp.asarray(E8M0, dtype=xp.float32)[scales]
    return scales.astype(xp.float32)


def invalid_scale(scales: NDArray[Any]) -> tuple[int, ...] | None:
    """Find the first scale that is not finite, or takes 127 beyond float32; None where none does.

    scales: bfloat16, float16 or E8M0 uint8. Returns a position.
    """
    kind = next(kind for kind, dtype in SCALE_DTYPES.items() if dtype == scales.dtype)
    bad = invalid_bits(scales.reshape(-1).view(f"u{scales.itemsize}"), kind)
    return None if bad is None else tuple(int(i) for i in np.unravel_index(bad, scales.shape))


def invalid_bits(bits: NDArray[Any], scales: Scales) -> int | None:
    """Find the first of such scales by their bits, uint8 or uint16 (n,): its index, None where none is."""
    magnitude, largest = _LARGEST_BITS[scales]
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if chunk.max() <= largest:  # so none is negative, either
            continue
        magnitudes = chunk & magnitude
        if magnitudes.max() > largest:
            return start + int((magnitudes > largest).argmax())
    return None


def _scale(largest: NDArray[np.float32], scales: Scales) -> NDArray[Any]:
    """Choose the scale of groups by their largest magnitude, as it is stored."""
    if scales == "e8m0":
        mantissa, exponent = np.frexp(largest)  # mantissa in [0.5, 1)
        exponent += np.where(mantissa > LARGEST / 128, 1, 0) - 7
        highest = int(np.log2(_LARGEST_SCALE[scales]))
        byte = np.clip(exponent, -E8M0_BIAS, highest) + E8M0_BIAS
        return np.where(largest > 0, byte, 0).astype(np.uint8)
    ideal = np.clip(largest / np.float32(LARGEST), _SMALLEST_SCALE[scales], _LARGEST_SCALE[scales])
    chosen: NDArray[Any] = np.where(largest > 0, ideal, 0).astype(np.float32).astype(SCALE_DTYPES[scales])
    return chosen
