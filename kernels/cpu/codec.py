"""The codecs of quant, compiled to the same bits; one thread, without the interpreter's lock.

Arrays are contiguous; x is float32 (R, K), K a multiple of 32, and groups lie within a row.
"""

import numpy as np
from numba import njit

from gptoss_lite.kernels.cpu import Array

_BLOCK, _BLOCK_BYTES = 32, 16
_HIGHEST = 252  # the last scale byte at which every code is a float32
_HALF, _ONE, _TWO, _FOUR, _SIX = (np.float32(value) for value in (0.5, 1, 2, 4, 6))
# A float plus 1.5 * 2^23 steps is rounded to whole steps, ties to even; for float64 it takes 1.5 * 2^52.
_ROUND, _ROUND64 = np.float32(1.5 * 2**23), 1.5 * 2**52
_LARGEST = 127.0  # int8 code


@njit(nogil=True, cache=True, boundscheck=False)
def _error(magnitude, factor, weights, terms):  # type: ignore[no-untyped-def]
    """Add up w * (a - q)^2 for magnitudes times a power of two, in units of the magnitudes."""
    for i in range(_BLOCK):
        a = magnitude[i] * factor
        step = _HALF if a < _TWO else (_ONE if a < _FOUR else _TWO)
        q = (a + _ROUND * step) - _ROUND * step
        difference = np.float64(a - (q if q < _SIX else _SIX))
        terms[i] = difference * difference * np.float64(weights[i])
    for i in range(16):
        terms[i] += terms[i + 16]
    for i in range(8):
        terms[i] += terms[i + 8]
    for i in range(4):
        terms[i] += terms[i + 4]
    for i in range(2):
        terms[i] += terms[i + 2]
    return (terms[0] + terms[1]) / (np.float64(factor) * np.float64(factor))


@njit(nogil=True, cache=True, boundscheck=False)
def _shift(magnitude, largest, byte, weights, weighted, terms):  # type: ignore[no-untyped-def]
    """Choose how far to go from OCP's exponent: see quant.mxfp4 for which can win."""
    chosen = 0
    if not (weighted or largest > np.float32(7) or largest < np.float32(4.5)):
        return chosen
    least = _error(magnitude, _ONE, weights, terms)
    if largest > np.float32(7) and byte < _HIGHEST:
        error = _error(magnitude, _HALF, weights, terms)
        if error < least:
            least, chosen = error, 1
    if weighted or largest < np.float32(4.5):
        factor = _ONE
        for down in range(1, 1 + min(byte, 3 if weighted else 1)):
            factor *= _TWO
            error = _error(magnitude, factor, weights, terms)
            if error < least:
                least, chosen = error, -down
    return chosen


@njit(nogil=True, cache=True, boundscheck=False)
def encode_mxfp4(
    x: Array, search: bool, weighted: bool, weights: Array, blocks: Array, scales: Array
) -> bool:
    """Write blocks uint8 (R, K/32, 16) and scales uint8 (R, K/32); return whether all of x is finite.

    weights float32 (K,): for a search, ones unless `weighted`.
    """
    bits = x.view(np.uint32)
    magnitude, terms = np.empty(_BLOCK, np.float32), np.empty(_BLOCK, np.float64)
    codes = np.empty(_BLOCK, np.uint32)
    exponent = np.empty(1, np.int32)
    power = exponent.view(np.float32)
    largest_bits = np.uint32(0)
    for r in range(scales.shape[0]):
        for b in range(scales.shape[1]):
            start = _BLOCK * b
            block_bits = np.uint32(0)
            for i in range(_BLOCK):
                block_bits = max(block_bits, bits[r, start + i] & np.uint32(0x7FFFFFFF))
            largest_bits = max(largest_bits, block_bits)
            byte = int(max(block_bits >> np.uint32(23), np.uint32(2))) - 2
            exponent[0] = (254 - byte) << 23
            inverse = power[0]  # 2^(127 - byte)
            for i in range(_BLOCK):
                magnitude[i] = abs(x[r, start + i]) * inverse
            if search:
                exponent[0] = np.int32(block_bits)
                largest = power[0] * inverse
                w = weights[start : start + _BLOCK]
                shift = _shift(magnitude, largest, byte, w, weighted, terms)
                if shift != 0:
                    byte += shift
                    exponent[0] = (127 - shift) << 23
                    for i in range(_BLOCK):
                        magnitude[i] *= power[0]
            scales[r, b] = byte
            for i in range(_BLOCK):
                a = magnitude[i]
                step = _HALF if a < _TWO else (_ONE if a < _FOUR else _TWO)
                q = (a + _ROUND * step) - _ROUND * step
                q = q if q < _SIX else _SIX
                # Codes 0 to 4 are the values doubled, 4 to 6 those plus 2, 6 and 7 their halves plus 4.
                code = q * _TWO if a < _TWO else (q + _TWO if a < _FOUR else q * _HALF + _FOUR)
                codes[i] = np.uint32(np.int32(code)) | (bits[r, start + i] >> np.uint32(31)) << np.uint32(3)
            for j in range(_BLOCK_BYTES):
                blocks[r, b, j] = codes[2 * j] | codes[2 * j + 1] << np.uint32(4)
    return bool(largest_bits < np.uint32(0x7F800000))


@njit(nogil=True, cache=True, boundscheck=False)
def decode_mxfp4(blocks: Array, factors: Array, values: Array, out: Array) -> None:
    """Write out (n, 32), the bits of bf16 as uint16 or of float32 as uint32, from blocks uint8 (n, 16).

    factors float32 (n,); values float32 (16,) by code.
    """
    shift = np.uint32(32 - 8 * out.itemsize)
    scaled = np.empty(len(values), np.float32)
    bits = scaled.view(np.uint32)
    for n in range(len(factors)):
        for code in range(len(values)):
            scaled[code] = values[code] * factors[n]
        for j in range(_BLOCK_BYTES):
            pair = blocks[n, j]
            out[n, 2 * j] = bits[pair & 15] >> shift
            out[n, 2 * j + 1] = bits[pair >> 4] >> shift


@njit(nogil=True, cache=True, boundscheck=False)
def largest_int8(x: Array, largest: Array) -> None:
    """Write largest float32 (R, G): max|x| of each group, NaN above all."""
    bits, found = x.view(np.uint32), largest.view(np.uint32)
    length = x.shape[1] // largest.shape[1]
    for r in range(largest.shape[0]):
        for g in range(largest.shape[1]):
            group_bits = np.uint32(0)
            for k in range(g * length, (g + 1) * length):
                group_bits = max(group_bits, bits[r, k] & np.uint32(0x7FFFFFFF))
            found[r, g] = group_bits


@njit(nogil=True, cache=True, boundscheck=False)
def encode_int8(x: Array, divisor: Array, codes: Array) -> None:
    """Write codes int8 (R, K): x / divisor rounded, ties to even; divisor float64 (R, G)."""
    length = x.shape[1] // divisor.shape[1]
    for r in range(divisor.shape[0]):
        for g in range(divisor.shape[1]):
            for k in range(g * length, (g + 1) * length):
                quotient = np.float64(x[r, k]) / divisor[r, g]
                code = (min(max(quotient, -_LARGEST), _LARGEST) + _ROUND64) - _ROUND64
                codes[r, k] = np.int8(np.int32(code))


@njit(nogil=True, cache=True, boundscheck=False)
def decode_int8(codes: Array, factors: Array, out: Array) -> None:
    """Write out (n, L), the bits of bf16 as uint16, rounded, or of float32 as uint32.

    codes int8 (n, L); factors float32 (n,).
    """
    narrow = out.itemsize == 2
    value = np.empty(_BLOCK, np.float32)
    bits = value.view(np.uint32)
    for n in range(len(factors)):
        for k in range(0, codes.shape[1], _BLOCK):
            for i in range(_BLOCK):
                value[i] = np.float32(codes[n, k + i]) * factors[n]
            if narrow:
                for i in range(_BLOCK):
                    odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
                    # Rounding could carry a NaN over into zero.
                    half = np.uint32(0x7FFF) + odd if value[i] == value[i] else np.uint32(0)
                    out[n, k + i] = (bits[i] + half) >> np.uint32(16)
            else:
                for i in range(_BLOCK):
                    out[n, k + i] = bits[i]


@njit(nogil=True, cache=True, boundscheck=False)
def row_errors(x: Array, q: Array, squared: Array, squared_error: Array) -> float:
    """Write float64 sums (R,) of x^2 and (x - q)^2; return the largest |x - q|; q float32 (R, K).

    Column k adds to lane k mod 32, one after another, and halves of the lanes are added to each other.
    """
    lanes, wrong = np.empty(_BLOCK, np.float64), np.empty(_BLOCK, np.float64)
    largest = np.zeros(_BLOCK, np.float64)
    for r in range(x.shape[0]):
        lanes[:] = 0
        wrong[:] = 0
        for k in range(0, x.shape[1], _BLOCK):
            for i in range(_BLOCK):
                value = np.float64(x[r, k + i])
                difference = value - np.float64(q[r, k + i])
                lanes[i] += value * value
                wrong[i] += difference * difference
                largest[i] = max(largest[i], abs(difference))
        half = _BLOCK // 2
        while half:
            for i in range(half):
                lanes[i] += lanes[i + half]
                wrong[i] += wrong[i + half]
            half //= 2
        squared[r], squared_error[r] = lanes[0], wrong[0]
    return float(largest.max())
