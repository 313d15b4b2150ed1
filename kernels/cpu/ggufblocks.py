"""MXFP4 blocks between ggml's order and ours; one thread, without the interpreter's lock."""

import numpy as np
from numba import njit

from gptoss_lite.kernels.cpu import Array

_BLOCK = 16  # bytes of codes
_GROUP = 8  # blocks that ggml's 17 bytes each make whole words of, 17 of them

_LOW, _HIGH = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0xF0F0F0F0F0F0F0F0)
_PAIRS, _SINGLES = np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF)
_HALF = np.uint64(0xFFFFFFFF)
_4, _8, _16, _32, _64 = (np.uint64(n) for n in (4, 8, 16, 32, 64))


@njit(cache=True, nogil=True, boundscheck=False)
def take_apart(raw: Array, blocks: Array, scales: Array) -> None:
    """See gptoss_lite.quant.ggufblocks.take_apart; all uint8."""
    for n in range(len(raw)):
        scales[n] = raw[n, 0]
        for j in range(_BLOCK // 2):
            even, odd = raw[n, 1 + 2 * j], raw[n, 2 + 2 * j]
            blocks[n, j] = (even & np.uint8(15)) | (odd << np.uint8(4))
            blocks[n, j + _BLOCK // 2] = (even >> np.uint8(4)) | (odd & np.uint8(240))


@njit(inline="always")
def _spread(x):  # type: ignore[no-untyped-def]
    """Put a blank byte behind each of the four lower bytes of a word."""
    x = (x | x << _16) & _PAIRS
    return (x | x << _8) & _SINGLES


@njit(cache=True, nogil=True, boundscheck=False)
def put_together(words: Array, scales: Array, out: Array) -> None:
    """See gptoss_lite.quant.ggufblocks.put_together, in words, for the sake of whole stores.

    words uint64 (8 m, 2), the blocks; scales uint8 (8 m,); out uint64 (17 m,), ggml's bytes.
    """
    at = 0
    for first in range(0, len(words), _GROUP):
        pending = np.uint64(0)  # bytes that do not make a word yet, as many as blocks came before
        for i in range(_GROUP):
            low, high = words[first + i, 0], words[first + i, 1]
            even = (low & _LOW) | (high & _LOW) << _4
            odd = (low >> _4 & _LOW) | (high & _HIGH)
            left = _spread(even & _HALF) | _spread(odd & _HALF) << _8
            right = _spread(even >> _32) | _spread(odd >> _32) << _8
            shift = np.uint64(8 * i)
            pending |= np.uint64(scales[first + i]) << shift
            if i == _GROUP - 1:
                out[at], out[at + 1], out[at + 2] = pending, left, right
                at += 3
            else:
                shift += _8
                out[at] = pending | left << shift
                out[at + 1] = left >> (_64 - shift) | right << shift
                pending = right >> (_64 - shift)
                at += 2
