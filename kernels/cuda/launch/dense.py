"""Embedding, RMSNorm, and the products of decode with packed matrices that are not experts'."""

import numpy as np

from gptoss_lite.kernels.cuda.launch.arguments import matrix, require
from gptoss_lite.kernels.cuda.layout import (
    BLOCK,
    BLOCK_TOKENS,
    CHUNK,
    HEAD_DIM,
    TILE_ROWS,
    Layout,
    Table,
    padded,
)
from gptoss_lite.kernels.cuda.runtime import Array, Runtime, f32, i32
from gptoss_lite.kernels.cuda.source import Kernel

COLUMNS = 8  # tokens that a block multiplies
_EMBED_THREADS = 128
_NORM_THREADS = 256
_OUT_THREADS = 512
_LM_HEAD_TILES = 8  # that a block makes


def _require_hidden(hidden: int) -> None:
    if hidden % BLOCK:
        raise ValueError(f"hidden is {hidden}: must be a multiple of {BLOCK}")


def _groups(columns: int) -> int:
    return -(-columns // COLUMNS)


def _staged_bytes(columns: int, hidden: int) -> int:
    """Count the shared memory of a block's normalised rows, as norm.cuh lays them out."""
    return min(columns, COLUMNS) * (padded(hidden) + 32) * 2


def embed(
    rt: Runtime, table: Array, tokens: Array, drawn: Array, positions: Array, inv_freq: Array, x: Array,
    angles: Array, *, concentration: float, fp16: bool, scales: Array | None = None,
) -> None:  # fmt: skip
    """Look up tokens, and compute the rotation of their positions.

    table (vocab, hidden): float32, or in uint16 the bits of bf16, of fp16 where `fp16` says so; or with
    scales, codes int8 (vocab, hidden) or MXFP4 blocks uint8 (vocab, hidden / 32, 16). scales (vocab, hidden /
    group): E8M0 bytes, or for int8 bits in uint16 likewise. Both lie in device or pinned memory.
    tokens int32 (T,), where -1 - r stands for drawn[r], int32 (R,); positions int32 (T,), -1 for an empty
    row, which gets zeros; inv_freq float32 (32,). x float32 (T, hidden); angles float32 (T, 64): the cosines
    of the 32 angles float32(position * inv_freq), then the sines, both times the concentration.
    """
    T, hidden = x.shape
    require("x", x, np.float32, None, None)
    _require_hidden(hidden)
    types = _require_table(table, scales, hidden, fp16)
    require("tokens", tokens, np.int32, T)
    require("drawn", drawn, np.int32, None)
    require("positions", positions, np.int32, T)
    require("inv_freq", inv_freq, np.float32, HEAD_DIM // 2)
    require("angles", angles, np.float32, T, HEAD_DIM)
    if T == 0:
        return
    addresses = [np.uint64(0 if part is None else rt.address(part)) for part in (table, scales)]
    args = [*addresses, tokens, drawn, positions, inv_freq, x, angles]
    group = hidden if scales is None else hidden // scales.shape[1]
    scalars = [i32(hidden), *map(i32, types), i32(group), f32(concentration)]
    rt.launch(Kernel("embed.cu", "embed"), (T,), _EMBED_THREADS, args + scalars)


def _require_table(table: Array, scales: Array | None, hidden: int, fp16: bool) -> tuple[Table, Table]:
    """Check a table to look tokens up in -> its type, and that of its scales where it has some."""
    sixteen_bits = Table.FP16 if fp16 else Table.BF16
    if scales is None:
        is_float32 = table.dtype == np.float32
        require("table", table, np.float32 if is_float32 else np.uint16, None, hidden)
        return Table.FLOAT32 if is_float32 else sixteen_bits, sixteen_bits
    e8m0 = scales.dtype == np.uint8
    if table.dtype == np.uint8:
        require("table", table, np.uint8, None, hidden // BLOCK, BLOCK // 2)
        require("scales", scales, np.uint8, table.shape[0], hidden // BLOCK)
        return Table.MXFP4, Table.E8M0
    require("table", table, np.int8, None, hidden)
    require("scales", scales, np.uint8 if e8m0 else np.uint16, table.shape[0], None)
    if scales.shape[1] == 0 or hidden % (BLOCK * scales.shape[1]):
        raise ValueError(
            f"scales are {scales.shape[1]} a row of {hidden}: each must be for a multiple of {BLOCK} columns"
        )
    return Table.INT8, Table.E8M0 if e8m0 else sixteen_bits


def rms_norm(
    rt: Runtime, x: Array, rows: Array | None, weight: Array, out: Array, *, eps: float, bf16: bool
) -> None:
    """Normalise rows of x float32 (T, hidden) into operands.

    rows int32 (R,): which, or None for all in order; weight float32 (hidden,). out operands uint16 (R, hidden
    padded to 64), bf16 or fp16.
    """
    R, hidden = out.shape[0], x.shape[1]
    require("x", x, np.float32, None if rows is not None else R, None)
    _require_hidden(hidden)
    if rows is not None:
        require("rows", rows, np.int32, R)
    require("weight", weight, np.float32, hidden)
    require("out", out, np.uint16, None, padded(hidden))
    if R == 0:
        return
    kernel = Kernel("norm.cu", "rms_norm", (("OPERAND_BF16", 1),) if bf16 else ())
    rt.launch(kernel, (R,), _NORM_THREADS, [x, rows, weight, out, i32(hidden), f32(eps)])


def qkv_decode(
    rt: Runtime, x: Array, norm_weight: Array, packed: Array, layout: Layout, bias: Array, angles: Array,
    positions: Array, table: Array, keys: Array, values: Array, q: Array, *, eps: float, kv_fp16: bool,
) -> None:  # fmt: skip
    """Normalise, project, rotate; append keys and values to the cache. One row per sequence.

    x float32 (S, hidden); norm_weight float32 (hidden,); packed uint8 (layout.nbytes,), its (H + 2 Hk) * 64
    rows in the order of layout.rope_rows; bias float32 in natural order; angles float32 (S, 64); positions
    int32 (S,), -1 for an empty row, whose q is zeros; table int32 (S, W); keys and values uint16 (blocks, Hk,
    16, 64) of bf16, or fp16. q float32 (S, H, 64).
    """
    S, hidden = x.shape
    heads, key_heads = q.shape[1], keys.shape[1]
    rows = (heads + 2 * key_heads) * HEAD_DIM
    require("x", x, np.float32, None, None)
    _require_hidden(hidden)
    require("norm_weight", norm_weight, np.float32, hidden)
    _require_matrix(packed, layout, rows, hidden)
    require("bias", bias, np.float32, rows)
    require("angles", angles, np.float32, S, HEAD_DIM)
    require("positions", positions, np.int32, S)
    require("table", table, np.int32, S, None)
    require("keys", keys, np.uint16, None, None, BLOCK_TOKENS, HEAD_DIM)
    require("values", values, np.uint16, *keys.shape)
    require("q", q, np.float32, S, heads, HEAD_DIM)
    if S == 0:
        return
    kernel = Kernel("qkv.cu", "qkv_decode", layout.defines + ((("KV_FP16", 1),) if kv_fp16 else ()))
    args = [x, norm_weight, packed, bias, angles, positions, table, keys, values, q]
    shape = [i32(S), i32(hidden), i32(heads), i32(key_heads), i32(table.shape[1]), *matrix(layout), f32(eps)]
    grid = (layout.tiles * _groups(S),)
    rt.launch(kernel, grid, _NORM_THREADS, args + shape, _staged_bytes(S, hidden))


def out_proj_decode(rt: Runtime, a: Array, packed: Array, layout: Layout, bias: Array, x: Array) -> None:
    """Add the projection of attention to the residual stream: x += a W^T + bias, in place.

    a operands uint16 (S, K padded to 64); packed uint8 (layout.nbytes,), its rows in natural order; bias
    float32 (hidden,); x float32 (S, hidden).
    """
    S, hidden = x.shape
    require("a", a, np.uint16, S, layout.chunks * CHUNK)
    _require_matrix(packed, layout, hidden, layout.columns)
    require("bias", bias, np.float32, hidden)
    require("x", x, np.float32, None, None)
    if S == 0:
        return
    args = [a, packed, bias, x, i32(S), i32(hidden), *matrix(layout)]
    kernel = Kernel("out_proj.cu", "out_proj_decode", layout.defines)
    rt.launch(kernel, (layout.tiles * _groups(S),), _OUT_THREADS, args)


def lm_head_decode(
    rt: Runtime, x: Array, rows: Array, norm_weight: Array, packed: Array, layout: Layout,
    logits: Array | None, best: Array | None, temperature: Array | None = None, seed: Array | None = None,
    choice: Array | None = None, positions: Array | None = None, *, eps: float,
) -> None:  # fmt: skip
    """Normalise the wanted rows and project them onto the vocabulary; draw a token where `best` is given.

    x float32 (T, hidden); rows int32 (R,), -1 for an empty row; norm_weight float32 (hidden,); packed uint8
    (layout.nbytes,), its rows in natural order. logits float32 (R, vocab), zeros for empty rows, or None.
    best uint64 (R,): raised to the largest key of each row's tokens (see philox.cuh), or None; it needs
    temperature float32, seed uint64, choice and positions int32, each (R,).
    """
    R, hidden, vocab = rows.shape[0], x.shape[1], layout.rows
    require("x", x, np.float32, None, None)
    _require_hidden(hidden)
    require("rows", rows, np.int32, None)
    require("norm_weight", norm_weight, np.float32, hidden)
    _require_matrix(packed, layout, vocab, hidden)
    if logits is not None:
        require("logits", logits, np.float32, R, vocab)
    if best is not None:
        if temperature is None or seed is None or choice is None or positions is None:
            raise ValueError("best needs temperature, seed, choice and positions")
        require("best", best, np.uint64, R)
        require("temperature", temperature, np.float32, R)
        require("seed", seed, np.uint64, R)
        require("choice", choice, np.int32, R)
        require("positions", positions, np.int32, R)
    if R == 0:
        return
    args = [x, rows, norm_weight, packed, logits, best, temperature, seed, choice, positions]
    shape = [i32(R), i32(hidden), i32(vocab), *matrix(layout), f32(eps)]
    grid = (-(-layout.tiles // _LM_HEAD_TILES) * _groups(R),)
    kernel = Kernel("lm_head.cu", "lm_head_decode", layout.defines)
    rt.launch(kernel, grid, _NORM_THREADS, args + shape, _staged_bytes(R, hidden))


def _require_matrix(packed: Array, layout: Layout, rows: int, columns: int) -> None:
    """Check a packed matrix, and that its size is what the other arrays say."""
    require("packed", packed, np.uint8, layout.nbytes)
    if layout.tiles != -(-rows // TILE_ROWS) or layout.columns != columns:
        raise ValueError(f"packed is ({layout.rows}, {layout.columns}): must be ({rows}, {columns})")
