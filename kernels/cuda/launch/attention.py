"""Attention over the paged cache: decode, prefill, and rotating and storing what prefill projected."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.launch.arguments import require
from gptoss_lite.kernels.cuda.layout import BLOCK_TOKENS, HEAD_DIM
from gptoss_lite.kernels.cuda.runtime import Array, Runtime, i32
from gptoss_lite.kernels.cuda.source import Kernel

PREFILL_TILE = 64  # queries
_HEADS = 8  # query heads that a block of attention_decode takes
_WARPS = 4  # each has a counter
BLOCKS_PER_SPLIT = 16
_PART_FLOATS = _HEADS * (HEAD_DIM + 2)
_ROTATED_HEADS = 16  # that a block of rotate_append takes


def _defines(*, kv_fp16: bool, bf16_out: bool = False) -> tuple[tuple[str, int], ...]:
    flags = {"KV_FP16": kv_fp16, "OPERAND_BF16": bf16_out}
    return tuple((name, 1) for name, wanted in flags.items() if wanted)


def _require_cache(keys: Array, values: Array, table: Array) -> int:
    """Check the cache and return the number of key heads."""
    require("keys", keys, np.uint16, None, None, BLOCK_TOKENS, HEAD_DIM)
    require("values", values, np.uint16, *keys.shape)
    require("table", table, np.int32, None, None)
    return int(keys.shape[1])


def _require_shared(H: int, Hk: int) -> int:
    """Check that key heads have equally many query heads, and return how many."""
    if H % Hk:
        raise ValueError(f"q has {H} heads: must be a multiple of the {Hk} key heads")
    return H // Hk


def decode_workspace(S: int, H: int, Hk: int, splits: int) -> tuple[int, int]:
    """Count what `attention_decode` needs: float32 of partial results, and uint32 counters."""
    groups = S * Hk * -(-H // Hk // _HEADS)
    return groups * splits * _PART_FLOATS, groups * _WARPS


def attention_decode(
    rt: Runtime, q: Array, keys: Array, values: Array, table: Array, positions: Array, sinks: Array,
    out: Array, partial: Array, counters: Array, *, window: int, splits: int, bf16_out: bool, kv_fp16: bool,
) -> None:  # fmt: skip
    """Attend with one query per sequence, over the keys up to its own position.

    q float32 (S, H, 64); keys and values uint16 (blocks, Hk, 16, 64); table int32 (S, W); positions int32
    (S,), -1 for an empty row; sinks float32 (H,); out operands uint16 (S, H * 64). window: visible keys, 0
    for all. A sequence's keys are split one part per 256, at most `splits`. partial and counters: see
    `decode_workspace`; the counters are zero before the first use, and left zero.
    """
    Hk = _require_cache(keys, values, table)
    S, H, _ = q.shape
    heads_per_key = _require_shared(H, Hk)
    require("q", q, np.float32, S, H, HEAD_DIM)
    require("table", table, np.int32, S, None)
    require("positions", positions, np.int32, S)
    require("sinks", sinks, np.float32, H)
    require("out", out, np.uint16, S, H * HEAD_DIM)
    require("partial", partial, np.float32, None)
    require("counters", counters, np.uint32, None)
    floats, counts = decode_workspace(S, H, Hk, splits)
    if partial.size < floats or counters.size < counts:
        raise ValueError(
            f"partial has {partial.size} floats, counters {counters.size}: must have {floats} and {counts}"
        )
    if S == 0:
        return
    if window:  # the blocks that it touches where it fits worst
        blocks = (window + BLOCK_TOKENS - 2) // BLOCK_TOKENS + 1
        splits = min(splits, -(-blocks // BLOCKS_PER_SPLIT))
    kernel = Kernel("attention_decode.cu", "attention_decode", _defines(kv_fp16=kv_fp16, bf16_out=bf16_out))
    grid = (splits, Hk * -(-heads_per_key // _HEADS), S)
    args = [q, keys, values, table, positions, sinks, out, partial, counters]
    rt.launch(kernel, grid, 128, [*args, i32(H), i32(Hk), i32(table.shape[1]), i32(window)])


def prefill_tiles(counts: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.int32]:
    """Cut chunks of queries, laid end to end, into tiles int32 (n, 4): sequence, first row, rows, position.

    counts: queries of each sequence; positions: the position of its first.
    """
    tiles, row = [], 0
    for sequence, (count, position) in enumerate(zip(counts, positions, strict=True)):
        for start in range(0, count, PREFILL_TILE):
            tiles.append((sequence, row + start, min(PREFILL_TILE, count - start), position + start))
        row += count
    return np.array(tiles, np.int32).reshape(-1, 4)


def attention_prefill(
    rt: Runtime, q: Array, keys: Array, values: Array, table: Array, tiles: Array, sinks: Array, out: Array,
    *, window: int, bf16_out: bool, kv_fp16: bool,
) -> None:  # fmt: skip
    """Attend with chunks of consecutive queries, each over the keys up to its own position.

    q float32 (T, H, 64); keys and values uint16 (blocks, Hk, 16, 64), those of the chunks included; table
    int32 (S, W); tiles int32 (n, 4): sequence, first row in q, rows <= PREFILL_TILE, position of the first;
    sinks float32 (H,); out operands uint16 (T, H * 64), of which only rows in tiles are written. window:
    visible keys, 0 for all.
    """
    Hk = _require_cache(keys, values, table)
    T, H, _ = q.shape
    heads_per_key = _require_shared(H, Hk)
    require("q", q, np.float32, T, H, HEAD_DIM)
    require("tiles", tiles, np.int32, None, 4)
    require("sinks", sinks, np.float32, H)
    require("out", out, np.uint16, T, H * HEAD_DIM)
    if len(tiles) == 0:
        return
    kernel = Kernel("attention_prefill.cu", "attention_prefill", _defines(kv_fp16=kv_fp16, bf16_out=bf16_out))
    args = [q, keys, values, table, tiles, sinks, out]
    scalars = [i32(H), i32(Hk), i32(table.shape[1]), i32(window)]
    rt.launch(kernel, (heads_per_key, Hk, len(tiles)), 128, [*args, *scalars])


def rotate_append(
    rt: Runtime, projected: Array, angles: Array, sequences: Array, positions: Array, table: Array,
    keys: Array, values: Array, q: Array, *, kv_fp16: bool,
) -> None:  # fmt: skip
    """Rotate queries and keys, and append keys and values to the cache.

    projected float32 (T, (H + 2 Hk) * 64): heads of queries, keys, values; angles float32 (T, 64): cos, then
    sin, of the pairs (i, i + 32); sequences and positions int32 (T,), position -1 for an empty row; table
    int32 (S, W); keys and values uint16 (blocks, Hk, 16, 64); q out float32 (T, H, 64).
    """
    Hk = _require_cache(keys, values, table)
    T, H, _ = q.shape
    require("q", q, np.float32, T, H, HEAD_DIM)
    require("projected", projected, np.float32, T, (H + 2 * Hk) * HEAD_DIM)
    require("angles", angles, np.float32, T, HEAD_DIM)
    require("sequences", sequences, np.int32, T)
    require("positions", positions, np.int32, T)
    if T == 0:
        return
    kernel = Kernel("rope.cu", "rotate_append", _defines(kv_fp16=kv_fp16))
    grid = (T, -(-(H + 2 * Hk) // _ROTATED_HEADS))
    args = [projected, angles, sequences, positions, table, keys, values, q]
    rt.launch(kernel, grid, 128, [*args, i32(H), i32(Hk), i32(table.shape[1])])
