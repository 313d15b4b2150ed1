"""Matrix products over rows grouped by expert, of dense, MXFP4 or int8 weights as checkpoints store them.

A dense product is one group. Four output rows at a time are decoded into a few KiB of float32 that stay in
the first-level cache, then multiplied with every row of `x` in their group: a weight is decoded once a call,
and a result's arithmetic never depends on what else is in the call.
"""

import numpy as np
from numba import njit, prange

from gptoss_lite.kernels.cpu import Array

ROWS = 4  # output rows decoded together: enough independent sums to keep the multipliers busy
TASK = 32  # output rows per parallel task, a multiple of ROWS
# Only what lets a dot product become vector code; infinities and NaN keep their meaning.
_DOT = {"contract", "reassoc", "nsz"}


@njit(inline="always", fastmath=_DOT)
def _dot4(rows, x, y, row, column, count):  # type: ignore[no-untyped-def]
    """Write the products of four decoded rows (4, K) with `x[row]`; `count` of them are wanted."""
    s0 = s1 = s2 = s3 = np.float32(0)
    for k in range(x.shape[1]):
        value = x[row, k]
        s0 += rows[0, k] * value
        s1 += rows[1, k] * value
        s2 += rows[2, k] * value
        s3 += rows[3, k] * value
    y[row, column] = s0
    if count > 1:
        y[row, column + 1] = s1
    if count > 2:
        y[row, column + 2] = s2
    if count > 3:
        y[row, column + 3] = s3


@njit(parallel=True, cache=True, fastmath=_DOT, boundscheck=False)
def linear_dense(x: Array, weight: Array, groups: Array, starts: Array, y: Array) -> None:
    """Write `y[r] = weight[groups[g]] @ x[r]` for r in starts[g]:starts[g + 1].

    x float32 (R, K), weight (E, N, K) holding the bits of bf16 as uint16 or of float32 as uint32, groups
    int32 (G,), starts int32 (G + 1,), y float32 (R, N).
    """
    N, K = weight.shape[1:]
    shift = np.uint32(32 - 8 * weight.itemsize)  # bf16 is the upper half of a float32
    tasks = (N + TASK - 1) // TASK
    for task in prange(len(groups) * tasks):
        group = task // tasks
        expert = groups[group]
        bits = np.zeros((ROWS, K), np.uint32)
        rows = bits.view(np.float32)
        first = (task % tasks) * TASK
        for n in range(first, min(first + TASK, N), ROWS):
            count = min(ROWS, N - n)
            for i in range(count):
                for k in range(K):
                    bits[i, k] = np.uint32(weight[expert, n + i, k]) << shift
            for r in range(starts[group], starts[group + 1]):
                _dot4(rows, x, y, r, n, count)


@njit(parallel=True, cache=True, fastmath=_DOT, boundscheck=False)
def linear_mxfp4(
    x: Array, blocks: Array, scales: Array, values: Array, groups: Array, starts: Array, y: Array
) -> None:
    """Write `y[r] = dequantised[groups[g]] @ x[r]` for r in starts[g]:starts[g + 1], from packed MXFP4.

    x float32 (R, K), blocks uint8 (E, N, K/32, 16), scales uint8 (E, N, K/32), values float32 (16,) by code,
    groups int32 (G,), starts int32 (G + 1,), y float32 (R, N).
    """
    N, B = scales.shape[1:]
    tasks = (N + TASK - 1) // TASK
    for task in prange(len(groups) * tasks):
        group = task // tasks
        expert = groups[group]
        rows = np.zeros((ROWS, B * 32), np.float32)
        exponent = np.empty(1, np.int32)
        scale = exponent.view(np.float32)
        first = (task % tasks) * TASK
        for n in range(first, min(first + TASK, N), ROWS):
            count = min(ROWS, N - n)
            for i in range(count):
                for b in range(B):
                    byte = np.int32(scales[expert, n + i, b])
                    # E8M0 is the exponent field of a float32; byte 0 is 2^-127, a subnormal.
                    exponent[0] = byte << 23 if byte > 0 else 1 << 22
                    s = scale[0]
                    for j in range(16):
                        pair = blocks[expert, n + i, b, j]
                        rows[i, 32 * b + 2 * j] = values[pair & 15] * s
                        rows[i, 32 * b + 2 * j + 1] = values[pair >> 4] * s
            for r in range(starts[group], starts[group + 1]):
                _dot4(rows, x, y, r, n, count)


@njit(parallel=True, cache=True, fastmath=_DOT, boundscheck=False)
def linear_int8(
    x: Array, codes: Array, scales: Array, shift: int, least: int, unit: float, groups: Array, starts: Array,
    y: Array,
) -> None:  # fmt: skip
    """Write `y[r] = dequantised[groups[g]] @ x[r]` for r in starts[g]:starts[g + 1], from int8 codes.

    x float32 (R, K), codes int8 (E, N, K), scales (E, N, K / group), groups int32 (G,), starts int32
    (G + 1,), y float32 (R, N). Scales are the bits of bf16 or fp16 as uint16, or E8M0 uint8: moved left by
    `shift`, at least `least`, they are those of a float32, to be multiplied by `unit`.
    """
    N, B = scales.shape[1:]
    K = codes.shape[2]
    group_size = K // B
    tasks = (N + TASK - 1) // TASK
    for task in prange(len(groups) * tasks):
        group = task // tasks
        expert = groups[group]
        rows = np.zeros((ROWS, K), np.float32)
        bits = np.empty(1, np.uint32)
        scale = bits.view(np.float32)
        first = (task % tasks) * TASK
        for n in range(first, min(first + TASK, N), ROWS):
            count = min(ROWS, N - n)
            for i in range(count):
                for b in range(B):
                    stored = np.uint32(scales[expert, n + i, b])
                    magnitude = max((stored & np.uint32(0x7FFF)) << np.uint32(shift), np.uint32(least))
                    bits[0] = magnitude | (stored & np.uint32(0x8000)) << np.uint32(16)
                    s = scale[0] * np.float32(unit)
                    for k in range(b * group_size, (b + 1) * group_size):
                        rows[i, k] = np.float32(codes[expert, n + i, k]) * s
            for r in range(starts[group], starts[group + 1]):
                _dot4(rows, x, y, r, n, count)
