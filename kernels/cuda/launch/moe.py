"""The two products of the experts in decode, for tiles of up to 8 tokens that chose the same expert."""

import numpy as np

from gptoss_lite.kernels.cuda.launch.arguments import matrix, require, require_tiles
from gptoss_lite.kernels.cuda.layout import CHUNK, MAX_K, TILE_ROWS, Layout, padded
from gptoss_lite.kernels.cuda.runtime import Array, Runtime, f32, i32
from gptoss_lite.kernels.cuda.source import Kernel

TOKENS = 8  # columns of a product: the most that a tile of the grouping arrays may have
MAX_PAIRS = 512  # (token, choice) pairs that down_decode has room for
_GATE_UP_THREADS, _DOWN_THREADS = 128, 512


def gate_up_decode(
    rt: Runtime, h: Array, table: Array, layout: Layout, bias: Array, order: Array, tile_expert: Array,
    tile_start: Array, tile_rows: Array, count: Array, out: Array, *, limit: float, bf16_out: bool,
) -> None:  # fmt: skip
    """Multiply tokens with the gate and up rows of their experts, and take the clamped SwiGLU of the two.

    h operands (T, hidden padded to 64); table uint64 (E,): addresses of matrices packed in the order of
    layout.gate_up_rows, so that layout.rows is 2 * I padded to 128; bias float32 (E, 2 I), gate and up in
    turn. order int32 (pairs,): the token of each sorted place; tile_* int32 (n,): up to 8 places of one
    expert each, or of none, which is -1; count int32 (1,): how many of them are in use. out operands (pairs,
    I padded to 64) in sorted order, their padding too: bf16 where bf16_out says so, else fp16, which is the
    type of the next product and may not be this one's.
    """
    E, inner = table.shape[0], bias.shape[1] // 2
    require("h", h, np.uint16, None, layout.chunks * CHUNK)
    require("table", table, np.uint64, None)
    require("bias", bias, np.float32, E, 2 * inner)
    require("order", order, np.int32, None)
    require_tiles(tile_expert, tile_start, tile_rows, count)
    require("out", out, np.uint16, order.shape[0], padded(inner))
    if layout.tiles * 8 != out.shape[1]:
        raise ValueError(f"layout has {layout.rows} rows: must be 2 * {inner} padded to {2 * out.shape[1]}")
    slots = tile_expert.shape[0]
    if slots == 0:
        return
    arrays = table, bias, h, order, tile_expert, tile_start, tile_rows, count, out
    rt.launch(
        Kernel("moe_decode.cu", "gate_up_decode", layout.defines),
        (layout.tiles, slots),
        _GATE_UP_THREADS,
        [*arrays, f32(limit), i32(inner), *matrix(layout), i32(bf16_out)],
    )


def down_decode(
    rt: Runtime, inner: Array, table: Array, layout: Layout, bias: Array, tile_expert: Array,
    tile_start: Array, tile_rows: Array, count: Array, place: Array, weights: Array, x: Array,
) -> None:  # fmt: skip
    """Add to x float32 (T, hidden) the weighted sum of each token's experts, in order of choice.

    inner operands (pairs, I padded to 64) in sorted order, as gate_up_decode made them; table uint64 (E,):
    addresses of matrices packed in the order of layout.plain_rows; bias float32 (E, hidden); tile_* and count
    as for gate_up_decode. place int32 (T, k): where each pair lies in sorted order, -1 for none; weights
    float32 (T, k). T * k is 512 at most, k 8.
    """
    T, hidden = x.shape
    k, pairs = place.shape[1], inner.shape[0]
    require("inner", inner, np.uint16, None, layout.chunks * CHUNK)
    require("table", table, np.uint64, None)
    require("bias", bias, np.float32, table.shape[0], hidden)
    require_tiles(tile_expert, tile_start, tile_rows, count)
    require("place", place, np.int32, T, None)
    require("weights", weights, np.float32, T, k)
    require("x", x, np.float32, T, None)
    if pairs > MAX_PAIRS or k > MAX_K or hidden > layout.tiles * TILE_ROWS:
        raise ValueError(
            f"{pairs} pairs, k {k}, hidden {hidden} of a matrix of {layout.rows} rows: must be at most"
            f" {MAX_PAIRS}, {MAX_K} and its rows"
        )
    if T == 0:
        return
    arrays = table, bias, inner, tile_expert, tile_start, tile_rows, count, place, weights, x
    rt.launch(
        Kernel("moe_decode.cu", "down_decode", layout.defines),
        (layout.tiles,),
        _DOWN_THREADS,
        [*arrays, i32(hidden), *matrix(layout), i32(T), i32(k)],
        shared_memory=pairs * TILE_ROWS * 4,
    )
