"""Products of many tokens with packed matrices, on tensor cores; and the sum of a token's experts."""

import numpy as np

from gptoss_lite.kernels.cuda.launch.arguments import matrix, require, require_tiles
from gptoss_lite.kernels.cuda.layout import CHUNK, MAX_K, TILE_ROWS, Format, Layout, padded
from gptoss_lite.kernels.cuda.runtime import Array, Runtime, f32, i32
from gptoss_lite.kernels.cuda.source import Kernel

TOKENS = 64  # that a block multiplies: the most that a tile of the grouping arrays may have
_THREADS, _ROWS = 192, 192
_WIDE_TOKENS = _WIDE_THREADS = _WIDE_ROWS = 128
_WIDE_BLOCKS = 4  # a multiprocessor: fewer leave part of the device idle
_COMBINE_THREADS = 256


def linear(
    rt: Runtime, a: Array, packed: Array, layout: Layout, order: Array, bias: Array | None, out: Array, *,
    accumulate: bool = False, wide: bool | None = None,
) -> None:  # fmt: skip
    """Multiply: out float32 (T, N) is, or with accumulate grows by, a W^T + bias.

    a operands uint16 (T, K padded to 64), bf16 where layout.bf16 says so, else fp16; packed uint8
    (layout.nbytes,); order int32 (tiles * 16,): the row of out and bias that each packed row is, -1 for
    padding; bias float32 (N,) or None. wide: take blocks of 128 tokens, which dense weights have; None takes
    them where there are enough to fill the device. The result is the same bit for bit.
    """
    T, N = a.shape[0], out.shape[1]
    require("a", a, np.uint16, None, layout.chunks * CHUNK)
    require("packed", packed, np.uint8, layout.nbytes)
    require("order", order, np.int32, layout.tiles * TILE_ROWS)
    if bias is not None:
        require("bias", bias, np.float32, N)
    require("out", out, np.float32, T, None)
    if T == 0:
        return
    rows = layout.tiles * TILE_ROWS
    grid = _blocks(T, _WIDE_TOKENS), _blocks(rows, _WIDE_ROWS)
    if wide is None:
        wide = layout.format is Format.DENSE and grid[0] * grid[1] >= _WIDE_BLOCKS * rt.multiprocessors
    name, threads = ("linear_wide", _WIDE_THREADS) if wide else ("linear", _THREADS)
    if not wide:
        grid = _blocks(T, TOKENS), _blocks(rows, _ROWS)
    shape = i32(T), i32(N), *matrix(layout), i32(accumulate)
    rt.launch(Kernel("linear.cu", name, layout.defines), grid, threads, [packed, order, bias, a, out, *shape])


def moe_gate_up_prefill(
    rt: Runtime, h: Array, table: Array, layout: Layout, bias: Array, order: Array, tile_expert: Array,
    tile_start: Array, tile_rows: Array, count: Array, out: Array, *, limit: float, bf16_out: bool,
) -> None:  # fmt: skip
    """Multiply tokens with the gate and up rows of their experts, and take the clamped SwiGLU of the two.

    h operands (T, hidden padded to 64); table uint64 (E,): addresses of matrices packed in the order of
    layout.gate_up_rows, so that layout.rows is 2 * I padded to 128; bias float32 (E, 2 I), gate and up in
    turn. order int32 (pairs,): the token of each sorted place; tile_* int32 (n,): up to 64 places of one
    expert each; count int32 (1,). out operands (pairs, I padded to 64) in sorted order, their padding too:
    bf16 where bf16_out says so, else fp16, which is the type of the next product and may not be this one's.
    """
    E, n, inner = table.shape[0], tile_expert.shape[0], bias.shape[1] // 2
    require("h", h, np.uint16, None, layout.chunks * CHUNK)
    require("table", table, np.uint64, None)
    require("bias", bias, np.float32, E, 2 * inner)
    require("order", order, np.int32, None)
    require_tiles(tile_expert, tile_start, tile_rows, count)
    require("out", out, np.uint16, None, padded(inner))
    if layout.tiles * 8 != out.shape[1]:
        raise ValueError(f"layout has {layout.rows} rows: must be 2 * {inner} padded to {2 * out.shape[1]}")
    if n == 0:
        return
    shape = i32(inner), *matrix(layout), i32(bf16_out)
    rt.launch(
        Kernel("moe_prefill.cu", "moe_gate_up_prefill", layout.defines),
        (_blocks(layout.tiles * TILE_ROWS, _ROWS), n),
        _THREADS,
        [table, bias, h, order, tile_expert, tile_start, tile_rows, count, out, f32(limit), *shape],
    )


def moe_down_prefill(
    rt: Runtime, inner: Array, table: Array, layout: Layout, bias: Array, tile_expert: Array,
    tile_start: Array, tile_rows: Array, count: Array, y: Array,
) -> None:  # fmt: skip
    """Multiply what gate_up made with the down rows of the same experts -> y float32 (pairs, hidden).

    inner operands (pairs, I padded to 64) and y are in sorted order; table uint64 (E,): addresses of matrices
    packed in the order of layout.plain_rows; bias float32 (E, hidden); tile_* and count as for gate_up.
    """
    E, n = table.shape[0], tile_expert.shape[0]
    require("inner", inner, np.uint16, None, layout.chunks * CHUNK)
    require("table", table, np.uint64, None)
    require("bias", bias, np.float32, E, layout.rows)
    require_tiles(tile_expert, tile_start, tile_rows, count)
    require("y", y, np.float32, inner.shape[0], layout.rows)
    if n == 0:
        return
    shape = i32(layout.rows), *matrix(layout)
    rt.launch(
        Kernel("moe_prefill.cu", "moe_down_prefill", layout.defines),
        (_blocks(layout.tiles * TILE_ROWS, _ROWS), n),
        _THREADS,
        [table, bias, inner, tile_expert, tile_start, tile_rows, count, y, *shape],
    )


def combine(rt: Runtime, y: Array, place: Array, weights: Array, x: Array) -> None:
    """Add the weighted sum of each token's experts to x float32 (T, hidden), in order of choice.

    y float32 (pairs, hidden) in sorted order; place int32 (T, k): the row of y, -1 for none; weights float32
    (T, k).
    """
    T, hidden = x.shape
    k = place.shape[1]
    require("y", y, np.float32, None, hidden)
    require("place", place, np.int32, T, None)
    require("weights", weights, np.float32, T, k)
    require("x", x, np.float32, T, None)
    if k > MAX_K or hidden % 4:
        raise ValueError(f"k {k}, hidden {hidden}: k must be at most {MAX_K}, hidden a multiple of 4")
    if T == 0:
        return
    quads = hidden // 4
    grid = T, _blocks(quads, _COMBINE_THREADS)
    args = [y, place, weights, x, i32(quads), i32(k)]
    rt.launch(Kernel("combine.cu", "combine"), grid, _COMBINE_THREADS, args)


def _blocks(length: int, each: int) -> int:
    return -(-length // each)
