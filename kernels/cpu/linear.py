"""Products of rows of activations with one matrix, or with a stack of dense ones.

A weight is read once a step, however many rows there are, and a result's arithmetic depends on nothing else
in the step, nor on the number of threads. Kernels are made for a kind of CPU, and compiled at first use.
"""

from functools import cache
from typing import Any, TypeAlias

import numpy as np
from numba import cfunc, njit, types

from gptoss_lite.kernels.cpu import Array, isa
from gptoss_lite.kernels.cpu.activations import room_for
from gptoss_lite.kernels.cpu.program import Steps
from gptoss_lite.kernels.cpu.tile import DENSE_ROWS, ROWS, dense_tile, dense_tokens, tile
from gptoss_lite.kernels.cpu.workers import TASK, Operands, array

Packed: TypeAlias = tuple[Array, int, int, int, bool]

SPAN = 4  # tiles of packed weights in a task
_DENSE_SPAN = 32  # rows of dense weights in a task
_FEW = 8  # tasks that a small matrix is divided into, if it is large enough
_CACHED_ROWS = 16  # rows of float32 activations that stay in the second-level cache
NOTHING, NO_ROWS = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)

_PACKED = Operands(
    array(types.uint8, 1),  # record
    types.int64,  # code bytes
    types.int64,  # groups
    types.int64,  # blocks in a group
    types.boolean,  # is_fp16
    array(types.int8, 1),  # codes
    array(types.float32, 1),  # scales
    array(types.int32, 1),  # starts
    array(types.float32, 1),  # added
    array(types.float32, 2),  # residual
    array(types.float32, 2),  # y
    array(types.float32, 4),  # results of a task's tiles, of each thread
)
_read_packed = _PACKED.read


_DENSE = Operands(
    array(types.uint8, 3),  # bytes of the weight
    array(types.int32, 1),  # groups
    array(types.int32, 1),  # starts
    array(types.float32, 2),  # x
    array(types.float32, 1),  # added
    array(types.float32, 2),  # residual
    array(types.float32, 2),  # y
    types.int64,  # column
    types.int64,  # span
    array(types.float32, 3),  # results of a tile, of each thread
)
_read_dense = _DENSE.read


def linear_packed(
    steps: Steps, kind: isa.ISA, format: str, activations: str, weight: Packed,
    rows: tuple[Array, Array, Array], y: Array, added: Array = NOTHING, residual: Array = NO_ROWS,
) -> None:  # fmt: skip
    """Write y = x @ weight.T + added + residual.

    format: "mxfp4" or "int8". activations: "accurate", in 16 bits, or "int8". weight: a record uint8 (bytes,)
    in layout cpu-r16-v1; bytes of codes, after which scales lie; scales of a row, blocks of 32 columns that
    share one, and whether they are fp16. rows: x, as `quantized` returns it for these. added float32 (N,),
    residual and y float32 (R, N).
    """
    tasks = -(-y.shape[1] // (ROWS * SPAN))
    # A task that made an array of its own would count references to it, which locks: see `workers`.
    own = steps.room("tiles", (steps.threads, SPAN, kind.tokens, ROWS))
    work = _make_packed(kind, format, activations)
    steps.add(work, tasks, _PACKED, *weight, *rows, added, residual, y, own)


def linear_dense(
    steps: Steps, kind: isa.ISA, format: str, weight: Array, groups: Array, starts: Array, x: Array, y: Array,
    column: int = 0, added: Array = NOTHING, residual: Array = NO_ROWS,
) -> None:  # fmt: skip
    """Write y[r] = weight[groups[g]] @ x[r] + added + residual[r] for r in starts[g]:starts[g + 1].

    The results are columns of y, and of what is added, from `column` on. format: "bf16" or "float32", whose
    bits weight (E, N, K) holds as uint16 or uint32. groups int32 (G,), starts int32 (G + 1,), x float32 (R,
    K). The others as in the product with packed weights.
    """
    N = weight.shape[1]
    span = max(DENSE_ROWS, min(_DENSE_SPAN, N // _FEW // DENSE_ROWS * DENSE_ROWS))
    own = steps.room("dense tile", (steps.threads, dense_tokens(kind), DENSE_ROWS))
    steps.add(
        _make_dense(kind, format), len(groups) * -(-N // span), _DENSE,
        weight.view(np.uint8), groups, starts, x, added, residual, y, column, span, own,
    )  # fmt: skip


@njit(boundscheck=False)
def _write(out, added, residual, first, rows, column, columns, y):  # type: ignore[no-untyped-def]
    """Write a tile's results to y, with what is added to them."""
    for t in range(rows):
        row = np.uint64(first + t)  # no index is looked at for being negative
        for i in range(columns):
            n = np.uint64(column + i)
            value = out[t, i]
            if len(added):
                value += added[n]
            if len(residual):
                value += residual[row, n]
            y[row, n] = value


@cache
def _make_packed(kind: isa.ISA, format: str, activations: str) -> Any:
    key, wide = isa.key(kind.name, format, activations), kind.tokens
    scale_bytes = 1 if format == "mxfp4" else 2

    @cfunc(TASK, cache=True, error_model="numpy")
    def multiply(place, task, worker):  # type: ignore[no-untyped-def]
        (
            record, code_bytes, groups, group_blocks, is_fp16, codes, scales, starts, added, residual, y, own,
        ) = _read_packed(key, place)  # fmt: skip
        R = len(y)
        tiles = (y.shape[1] + ROWS - 1) // ROWS
        tile_codes, tile_scales = code_bytes // tiles, groups * ROWS * scale_bytes
        first, last = task * SPAN, min((task + 1) * SPAN, tiles)
        out = own[worker]
        for row in range(0, R, wide):
            rows = min(wide, R - row)
            for i in range(last - first):
                tile(
                    key, room_for(rows, wide), record, (first + i) * tile_codes,
                    code_bytes + (first + i) * tile_scales, is_fp16, codes, scales, starts, row, out,
                    i * wide * ROWS, groups, group_blocks,
                )  # fmt: skip
            for i in range(last - first):  # together: lines of y and of what is added are fetched at once
                column = (first + i) * ROWS
                _write(out[i], added, residual, row, rows, column, min(ROWS, y.shape[1] - column), y)

    return multiply


@cache
def _make_dense(kind: isa.ISA, format: str) -> Any:
    key, wide = isa.key(kind.name, format), dense_tokens(kind)

    @cfunc(TASK, cache=True, error_model="numpy")
    def multiply(place, task, worker):  # type: ignore[no-untyped-def]
        weight, groups, starts, x, added, residual, y, column, span, own = _read_dense(key, place)
        N, K = weight.shape[1], x.shape[1]
        tasks = (N + span - 1) // span
        group, first = task // tasks, task % tasks * span
        out = own[worker]
        for begin in range(starts[group], starts[group + 1], _CACHED_ROWS):
            end = min(begin + _CACHED_ROWS, starts[group + 1])
            for n in range(first, min(first + span, N), DENSE_ROWS):
                at = (groups[group] * N + n) * K
                for r in range(begin, end, wide):
                    count = min(wide, end - r)
                    rows = min(DENSE_ROWS, N - n)
                    dense_tile(key, weight, at, rows, x, r, count, out)
                    _write(out, added, residual, r, count, column + n, rows, y)

    return multiply
