"""Fragment order on the CPU, as kernels/cuda/layout.py defines it; one thread, without Python's lock.

Tiles of 16 rows, chunks of 64 columns. A pair of rows g and g + 8 of a tile is done at a time, by way of two
buffers as long as a padded row, which stay in the first-level cache.
"""

import numpy as np
from numba import njit

from gptoss_lite.kernels.cpu import Array

_ROWS, _PAIRS, _CHUNK, _BLOCK = 16, 8, 64, 32
_LOW, _HIGH = np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFF00000000)
_WORD, _BIAS = np.uint64(32), np.uint64(0x8080808080808080)
# For spreading the bytes of a 32-bit word over the even bytes of 64 bits, and back.
_BYTE, _TWO_BYTES = np.uint64(8), np.uint64(16)
_SPREAD_TWO, _SPREAD_ONE = np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF)


def _every_half(bits: int) -> np.uint64:
    return np.uint64(bits * 0x0001000100010001)


# Where a code of four in a 16-bit half has its sign and its magnitude, as checkpoints have it and in order.
_N0, _N1, _N2, _N3 = (_every_half(bits) for bits in (0x0008, 0x0080, 0x0800, 0x8000))
_M0, _M1, _M2, _M3 = (_every_half(bits) for bits in (0x0007, 0x0070, 0x0700, 0x7000))
_P0, _P1, _P2, _P3 = (_every_half(bits) for bits in (0x8000, 0x1000, 0x4000, 0x2000))
_Q0, _Q1, _Q2, _Q3 = (_every_half(bits) for bits in (0x0E00, 0x01C0, 0x0038, 0x0007))
_2, _3, _5, _9, _12 = (np.uint64(n) for n in (2, 3, 5, 9, 12))


@njit(inline="always")
def _recode(w):  # type: ignore[no-untyped-def]
    """Bring sixteen codes of a checkpoint into the kernels' order, each four in their own 16 bits."""
    signs = (w & _N0) << _12 | (w & _N1) << _5 | (w & _N2) << _3 | (w & _N3) >> _2
    return signs | (w & _M0) << _9 | (w & _M1) << _2 | (w & _M2) >> _5 | (w & _M3) >> _12


@njit(inline="always")
def _recode_back(w):  # type: ignore[no-untyped-def]
    signs = (w & _P0) >> _12 | (w & _P1) >> _5 | (w & _P2) >> _3 | (w & _P3) << _2
    return signs | (w & _Q0) >> _9 | (w & _Q1) >> _2 | (w & _Q2) << _5 | (w & _Q3) << _12


@njit(inline="always")
def _shuffle(w):  # type: ignore[no-untyped-def]
    """Bring eight bytes into operand order, 0 4 1 5 2 6 3 7, and add 128 to each."""
    low, high = w & _LOW, w >> _WORD
    low = (low | low << _TWO_BYTES) & _SPREAD_TWO
    high = (high | high << _TWO_BYTES) & _SPREAD_TWO
    low = (low | low << _BYTE) & _SPREAD_ONE
    high = (high | high << _BYTE) & _SPREAD_ONE
    return (low | high << _BYTE) ^ _BIAS


@njit(inline="always")
def _shuffle_back(w):  # type: ignore[no-untyped-def]
    w ^= _BIAS
    low, high = w & _SPREAD_ONE, w >> _BYTE & _SPREAD_ONE
    low = (low | low >> _BYTE) & _SPREAD_TWO
    high = (high | high >> _BYTE) & _SPREAD_TWO
    low = (low | low >> _TWO_BYTES) & _LOW
    high = (high | high >> _TWO_BYTES) & _LOW
    return low | high << _WORD


@njit(inline="always")
def _take_row(source, row, buffer):  # type: ignore[no-untyped-def]
    """Copy a row into a buffer and fill that up with zeros; row -1 is zeros."""
    filled = 0
    if row >= 0:
        filled = source.shape[1]
        for i in range(filled):
            buffer[i] = source[row, i]
    buffer[filled:] = 0


@njit(inline="always")
def _put_row(buffer, row, target):  # type: ignore[no-untyped-def]
    if row >= 0:
        for i in range(target.shape[1]):
            target[row, i] = buffer[i]


@njit(cache=True, nogil=True, boundscheck=False)
def pack_mxfp4(blocks: Array, scales: Array, order: Array, codes: Array, packed_scales: Array) -> None:
    """See layout.pack_mxfp4, with bf16 operands; one matrix.

    blocks uint8 (N, K / 2), scales uint8 (N, K / 32), order int32 (tiles * 16,); codes uint64 (tiles, chunks,
    8, 8), packed_scales uint8 (tiles, chunks, 8, 4) are written.
    """
    tiles, chunks = codes.shape[:2]
    bytes_ = np.empty((2, chunks * _BLOCK), np.uint8)
    words = bytes_.view(np.uint64)
    factors = np.empty((2, 2 * chunks), np.uint8)
    for tile in range(tiles):
        for g in range(_PAIRS):
            for half in range(2):
                row = order[tile * _ROWS + half * _PAIRS + g]
                _take_row(blocks, row, bytes_[half])
                _take_row(scales, row, factors[half])
                for i in range(words.shape[1]):
                    words[half, i] = _recode(words[half, i])
            for chunk in range(chunks):
                for j in range(4):  # word t of block b is half j % 2 of j = 2 b + t / 2
                    upper, lower = words[0, 4 * chunk + j], words[1, 4 * chunk + j]
                    at = 4 * (j % 2) + j // 2  # of 2 t + b
                    codes[tile, chunk, g, at] = (upper & _LOW) | lower << _WORD
                    codes[tile, chunk, g, at + 2] = upper >> _WORD | (lower & _HIGH)
                for b in range(2):
                    packed_scales[tile, chunk, g, 2 * b] = factors[0, 2 * chunk + b]
                    packed_scales[tile, chunk, g, 2 * b + 1] = factors[1, 2 * chunk + b]


@njit(cache=True, nogil=True, boundscheck=False)
def unpack_mxfp4(codes: Array, packed_scales: Array, order: Array, blocks: Array, scales: Array) -> None:
    """See layout.unpack_mxfp4; shapes as in `pack_mxfp4`, blocks and scales are written."""
    tiles, chunks = codes.shape[:2]
    words = np.empty((2, 4 * chunks), np.uint64)
    bytes_ = words.view(np.uint8)
    factors = np.empty((2, 2 * chunks), np.uint8)
    for tile in range(tiles):
        for g in range(_PAIRS):
            for chunk in range(chunks):
                for j in range(4):
                    at = 4 * (j % 2) + j // 2
                    first, second = codes[tile, chunk, g, at], codes[tile, chunk, g, at + 2]
                    words[0, 4 * chunk + j] = (first & _LOW) | second << _WORD
                    words[1, 4 * chunk + j] = first >> _WORD | (second & _HIGH)
                for b in range(2):
                    factors[0, 2 * chunk + b] = packed_scales[tile, chunk, g, 2 * b]
                    factors[1, 2 * chunk + b] = packed_scales[tile, chunk, g, 2 * b + 1]
            for half in range(2):
                row = order[tile * _ROWS + half * _PAIRS + g]
                for i in range(words.shape[1]):
                    words[half, i] = _recode_back(words[half, i])
                _put_row(bytes_[half], row, blocks)
                _put_row(factors[half], row, scales)


@njit(cache=True, nogil=True, boundscheck=False)
def pack_int8(source: Array, scales: Array, order: Array, codes: Array, packed_scales: Array) -> None:
    """See layout.pack_int8; one matrix.

    source uint8, the bytes of int8 (N, K), scales uint16 (N, K / group), order int32 (tiles * 16,); codes
    uint64 (tiles, chunks, 2, 8, 4, 2), packed_scales uint16 (tiles, units, 8, 2) are written.
    """
    tiles, chunks = codes.shape[:2]
    bytes_ = np.empty((2, chunks * _CHUNK), np.uint8)
    words = bytes_.view(np.uint64)
    factors = np.empty((2, packed_scales.shape[1]), np.uint16)
    for tile in range(tiles):
        for g in range(_PAIRS):
            for half in range(2):
                row = order[tile * _ROWS + half * _PAIRS + g]
                _take_row(source, row, bytes_[half])
                _take_row(scales, row, factors[half])
                for i in range(words.shape[1]):
                    words[half, i] = _shuffle(words[half, i])
            for chunk in range(chunks):
                for b in range(2):
                    for t in range(4):
                        for half in range(2):
                            codes[tile, chunk, b, g, t, half] = words[half, 8 * chunk + 4 * b + t]
            for unit in range(packed_scales.shape[1]):
                packed_scales[tile, unit, g, 0] = factors[0, unit]
                packed_scales[tile, unit, g, 1] = factors[1, unit]


@njit(cache=True, nogil=True, boundscheck=False)
def unpack_int8(codes: Array, packed_scales: Array, order: Array, target: Array, scales: Array) -> None:
    """See layout.unpack_int8; shapes as in `pack_int8`, target and scales are written."""
    tiles, chunks = codes.shape[:2]
    words = np.empty((2, 8 * chunks), np.uint64)
    bytes_ = words.view(np.uint8)
    factors = np.empty((2, packed_scales.shape[1]), np.uint16)
    for tile in range(tiles):
        for g in range(_PAIRS):
            for chunk in range(chunks):
                for b in range(2):
                    for t in range(4):
                        for half in range(2):
                            words[half, 8 * chunk + 4 * b + t] = codes[tile, chunk, b, g, t, half]
            for unit in range(packed_scales.shape[1]):
                factors[0, unit] = packed_scales[tile, unit, g, 0]
                factors[1, unit] = packed_scales[tile, unit, g, 1]
            for half in range(2):
                row = order[tile * _ROWS + half * _PAIRS + g]
                for i in range(words.shape[1]):
                    words[half, i] = _shuffle_back(words[half, i])
                _put_row(bytes_[half], row, target)
                _put_row(factors[half], row, scales)
