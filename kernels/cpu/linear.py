"""Products of rows of activations with one matrix, or with a stack of dense ones.

A weight is read once a call, however many rows there are, and a result's arithmetic depends on nothing else
in the call, nor on the number of threads. Kernels are made for a kind of CPU, and compiled at first use.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit, prange

from gptoss_lite.kernels.cpu import isa
from gptoss_lite.kernels.cpu.activations import room_for
from gptoss_lite.kernels.cpu.tile import DENSE_ROWS, ROWS, dense_tile, dense_tokens, tile

SPAN = 4  # tiles of packed weights in a task
_DENSE_SPAN = 32  # rows of dense weights in a task
_CACHED_ROWS = 16  # rows of float32 activations that stay in the second-level cache


@njit(boundscheck=False)
def _write(out, added, residual, first, rows, column, columns, y):  # type: ignore[no-untyped-def]
    """Write a tile's results to y, with what is added to them."""
    for t in range(rows):
        for i in range(columns):
            value = out[t, i]
            if len(added):
                value += added[column + i]
            if len(residual):
                value += residual[first + t, column + i]
            y[first + t, column + i] = value


@cache
def linear_packed(kind: isa.ISA, format: str, activations: str) -> Callable[..., None]:
    """Make the product with a matrix in layout cpu-r16-v1.

    format: "mxfp4" or "int8". activations: "accurate", in 16 bits, or "int8".
    """
    key, wide = isa.key(kind.name, format, activations), kind.tokens
    scale_bytes = 1 if format == "mxfp4" else 2

    @njit(parallel=True, cache=True, boundscheck=False)
    def linear(  # type: ignore[no-untyped-def]
        record, code_bytes, groups, group_blocks, is_fp16, codes, scales, starts, added, residual, y
    ):
        """Write y = x @ weight.T + added + residual.

        record uint8 (bytes,): codes, and after code_bytes of them scales, `groups` a row, each of
        group_blocks * 32 columns. codes, scales, starts: x, as `quantized` returns it. added float32 (N,) or
        (0,), residual (R, N) or (0, 0), y float32 (R, N).
        """
        R = len(y)
        tiles = (y.shape[1] + ROWS - 1) // ROWS
        tile_codes, tile_scales = code_bytes // tiles, groups * ROWS * scale_bytes
        for task in prange((tiles + SPAN - 1) // SPAN):
            out = np.empty((wide, ROWS), np.float32)
            for index in range(task * SPAN, min((task + 1) * SPAN, tiles)):
                for row in range(0, R, wide):
                    rows = min(wide, R - row)
                    tile(
                        key, room_for(rows, wide), record, index * tile_codes,
                        code_bytes + index * tile_scales, is_fp16, codes, scales, starts, row, out, 0,
                        groups, group_blocks,
                    )  # fmt: skip
                    columns = min(ROWS, y.shape[1] - index * ROWS)
                    _write(out, added, residual, row, rows, index * ROWS, columns, y)

    return linear


@cache
def linear_dense(kind: isa.ISA, format: str) -> Callable[..., None]:
    """Make the product with dense matrices; format: "bf16" or "float32"."""
    key, wide = isa.key(kind.name, format), dense_tokens(kind)

    @njit(parallel=True, cache=True, boundscheck=False)
    def linear(weight, groups, starts, x, added, residual, y, column):  # type: ignore[no-untyped-def]
        """Write y[r] = weight[groups[g]] @ x[r] + added + residual[r] for r in starts[g]:starts[g + 1].

        The results are columns of y, and of what is added, from `column` on. weight (E, N, K) holding the
        bits of bf16 as uint16 or of float32 as uint32, groups int32 (G,), starts int32 (G + 1,), x float32
        (R, K). The others as in the product with packed weights.
        """
        N, K = weight.shape[1:]
        tasks = (N + _DENSE_SPAN - 1) // _DENSE_SPAN
        for task in prange(len(groups) * tasks):
            group, first = task // tasks, task % tasks * _DENSE_SPAN
            out = np.empty((wide, DENSE_ROWS), np.float32)
            for begin in range(starts[group], starts[group + 1], _CACHED_ROWS):
                end = min(begin + _CACHED_ROWS, starts[group + 1])
                for n in range(first, min(first + _DENSE_SPAN, N), DENSE_ROWS):
                    at = (groups[group] * N + n) * K
                    for r in range(begin, end, wide):
                        count = min(wide, end - r)
                        rows = min(DENSE_ROWS, N - n)
                        dense_tile(key, weight, at, rows, x, r, count, out)
                        _write(out, added, residual, r, count, column + n, rows, y)

    return linear
