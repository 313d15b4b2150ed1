"""The experts of a step: tokens sorted by expert, two products, and the weighted sum onto the residual."""

from typing import NamedTuple

import numpy as np

from gptoss_lite.kernels.cuda.launch import gemm, moe, routing
from gptoss_lite.kernels.cuda.layout import CHUNK
from gptoss_lite.kernels.cuda.runtime import Array, Runtime
from gptoss_lite.ops.base import Linear
from gptoss_lite.ops.cuda.scratch import Scratch


class Tiles(NamedTuple):
    """Runs of sorted pairs that one expert computes together: int32 (n,), and how many there are, (1,)."""

    expert: Array
    start: Array
    rows: Array
    count: Array


def add(
    runtime: Runtime, scratch: Scratch, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear,
    limit: float, x: Array, decodes: int,
) -> None:  # fmt: skip
    """Add to x float32 (T, hidden) the weighted sum of each token's experts; the first `decodes` rows decode.

    h operands (T, hidden padded); ids int32 (T, k), -1 for none; weights float32 (T, k).
    """
    most = moe.MAX_PAIRS // ids.shape[1]
    parts = [(slice(start, min(start + most, decodes)), moe.TOKENS) for start in range(0, decodes, most)]
    if decodes < len(x):
        parts.append((slice(decodes, len(x)), gemm.TOKENS))
    for rows, tile in parts:
        _add_alike(runtime, scratch, h[rows], ids[rows], weights[rows], gate_up, down, limit, x[rows], tile)


def _add_alike(
    runtime: Runtime, scratch: Scratch, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear,
    limit: float, x: Array, tile: int,
) -> None:  # fmt: skip
    """Do so for rows that all are decode rows (tiles of 8) or all prefill rows (of 64)."""
    up, out = gate_up.weight, down.weight
    pairs, k, bf16 = ids.size, ids.shape[1], out.layout.bf16
    order, place, tiles = _group(runtime, scratch, ids, len(up.table), tile)
    inner = scratch.rows("inner", (pairs, out.layout.chunks * CHUNK), np.uint16, k)
    if tile == moe.TOKENS:
        moe.gate_up_decode(
            runtime, h, up.table, up.layout, gate_up.bias, order, *tiles, inner, limit=limit, bf16_out=bf16
        )
        moe.down_decode(runtime, inner, out.table, out.layout, down.bias, *tiles, place, weights, x)
        return
    gemm.moe_gate_up_prefill(
        runtime, h, up.table, up.layout, gate_up.bias, order, *tiles, inner, limit=limit, bf16_out=bf16
    )
    y = scratch.rows("y", (pairs, x.shape[1]), np.float32, k)
    gemm.moe_down_prefill(runtime, inner, out.table, out.layout, down.bias, *tiles, y)
    gemm.combine(runtime, y, place, weights, x)


def _group(
    runtime: Runtime, scratch: Scratch, ids: Array, experts: int, tile: int
) -> tuple[Array, Array, Tiles]:
    """Sort pairs (token, choice) by expert: each one's token, where each went (T, k), and the tiles."""
    pairs, k = ids.size, ids.shape[1]
    if len(ids) == 1:  # nothing to sort: each choice of the one token is a tile of its own
        number = np.arange(pairs, dtype=np.int32)
        start = scratch.filled("one_token_start", number)
        rows = scratch.filled("one_token_rows", np.ones_like(number))
        count = scratch.filled("one_token_count", np.array([pairs], np.int32))
        order = scratch.filled("one_token_order", np.zeros_like(number))
        return order, start.reshape(1, -1), Tiles(ids.reshape(-1), start, rows, count)
    most = routing.tile_capacity(pairs, experts, tile)
    order = scratch.rows("order", (pairs,), np.int32, k)
    place = scratch.rows("place", ids.shape, np.int32)
    tiles = Tiles(
        scratch.rows("tile_expert", (most,), np.int32, k),
        scratch.rows("tile_start", (most,), np.int32, k),
        scratch.rows("tile_rows", (most,), np.int32, k),
        scratch.array("tile_count", (1,), np.int32),
    )
    routing.group(runtime, ids, order, place, *tiles, experts=experts, tile=tile)
    return order, place, tiles
