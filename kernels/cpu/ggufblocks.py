"""MXFP4 blocks between ggml's order and ours; one thread, without the interpreter's lock."""

import numpy as np
from numba import njit

from gptoss_lite.kernels.cpu import Array

_BLOCK = 16  # bytes of codes


@njit(cache=True, nogil=True, boundscheck=False)
def take_apart(raw: Array, blocks: Array, scales: Array) -> None:
    """See gptoss_lite.quant.ggufblocks.take_apart; all uint8."""
    for n in range(len(raw)):
        scales[n] = raw[n, 0]
        for j in range(_BLOCK // 2):
            even, odd = raw[n, 1 + 2 * j], raw[n, 2 + 2 * j]
            blocks[n, j] = (even & np.uint8(15)) | (odd << np.uint8(4))
            blocks[n, j + _BLOCK // 2] = (even >> np.uint8(4)) | (odd & np.uint8(240))


@njit(cache=True, nogil=True, boundscheck=False)
def put_together(blocks: Array, scales: Array, raw: Array) -> None:
    """See gptoss_lite.quant.ggufblocks.put_together; all uint8."""
    for n in range(len(blocks)):
        raw[n, 0] = scales[n]
        for j in range(_BLOCK // 2):
            low, high = blocks[n, j], blocks[n, j + _BLOCK // 2]
            raw[n, 1 + 2 * j] = (low & np.uint8(15)) | (high << np.uint8(4))
            raw[n, 2 + 2 * j] = (low >> np.uint8(4)) | (high & np.uint8(240))
