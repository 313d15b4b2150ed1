"""From a checkpoint's weights on the device to fragment order, equal to what layout.py packs byte for byte.

Each function packs one matrix, or a run of its tiles. `order` int32 (tiles * 16,) names the row of the
source that each packed row is, -1 for padding: what layout.plain_rows, gate_up_rows or rope_rows return, or a
run of whole tiles of it, less the first row that the source has. `first_tile` says where that run goes.
"""

from typing import Any

import numpy as np

from gptoss_lite.kernels.cuda.launch.arguments import require
from gptoss_lite.kernels.cuda.layout import (
    BLOCK,
    MXFP4_HALF_SCALES,
    MXFP4_SCALE_OFFSET,
    TILE_ROWS,
    Format,
    Layout,
    Table,
)
from gptoss_lite.kernels.cuda.runtime import Array, Runtime, i32
from gptoss_lite.kernels.cuda.source import Kernel

_THREADS = 256


def pack_dense(
    rt: Runtime, source: Array, order: Array, layout: Layout, target: Array, *, fp16: bool = False,
    first_tile: int = 0,
) -> None:  # fmt: skip
    """Pack (rows, K) of bf16 bits, of fp16 bits where `fp16` says so, or of float32.

    source: uint16 or float32; target: uint8 (layout.nbytes,). Values are rounded to the layout's operand
    type, to the nearest, ties to even.
    """
    is_float32 = source.dtype == np.float32
    require("source", source, np.float32 if is_float32 else np.uint16, None, layout.columns)
    tiles = _check(layout, Format.DENSE, order, target, first_tile)
    kind = Table.FLOAT32 if is_float32 else Table.FP16 if fp16 else Table.BF16
    threads = tiles * layout.chunks * 4 * 32
    shape = layout.columns, tiles, layout.chunks, kind, int(layout.bf16)
    codes, _ = _parts(layout, target, first_tile)
    _launch(rt, "pack_dense", threads, [source, order, codes, *map(i32, shape)])


def pack_int8(
    rt: Runtime, codes: Array, scales: Array, order: Array, layout: Layout, target: Array, *,
    first_tile: int = 0,
) -> None:  # fmt: skip
    """Pack codes int8 (rows, K) and their scales (rows, K / group).

    scales: the bits of bf16 (layout.scale_bf16) or fp16, uint16; or E8M0 bytes, uint8, which become bf16.
    """
    e8m0 = scales.dtype == np.uint8
    groups = layout.columns // layout.group
    require("codes", codes, np.int8, None, layout.columns)
    require("scales", scales, np.uint8 if e8m0 else np.uint16, codes.shape[0], groups)
    if e8m0 and not layout.scale_bf16:
        raise ValueError("scales are E8M0: layout.scale_bf16 must be True, as they are stored as bf16")
    tiles = _check(layout, Format.INT8, order, target, first_tile)
    threads = tiles * (layout.chunks * 2 * 32 + layout.scale_units * 8)
    shape = layout.columns, tiles, layout.chunks, groups, layout.scale_units, int(e8m0)
    parts = _parts(layout, target, first_tile)
    _launch(rt, "pack_int8", threads, [codes, scales, order, *parts, *map(i32, shape)])


def pack_mxfp4(
    rt: Runtime, blocks: Array, scales: Array, order: Array, layout: Layout, target: Array, *,
    first_tile: int = 0,
) -> None:  # fmt: skip
    """Pack blocks uint8 (rows, K / 32, 16) and E8M0 scales uint8 (rows, K / 32).

    With fp16 operands, blocks whose scale is below 2^-28 become zero: see ranges.mxfp4_fits_half.
    """
    units = layout.columns // BLOCK
    require("blocks", blocks, np.uint8, None, units, BLOCK // 2)
    require("scales", scales, np.uint8, blocks.shape[0], units)
    tiles = _check(layout, Format.MXFP4, order, target, first_tile)
    threads = tiles * layout.chunks * (32 + 8)
    smallest, offset = (0, 0) if layout.bf16 else (MXFP4_HALF_SCALES[0], MXFP4_SCALE_OFFSET)
    shape = layout.columns, tiles, layout.chunks, smallest, offset
    parts = _parts(layout, target, first_tile)
    _launch(rt, "pack_mxfp4", threads, [blocks, scales, order, *parts, *map(i32, shape)])


def _check(layout: Layout, format: Format, order: Array, target: Array, first_tile: int) -> int:
    """Check what all formats have in common, and return the number of tiles to pack."""
    require("order", order, np.int32, None)
    require("target", target, np.uint8, layout.nbytes)
    if layout.format is not format or layout.columns % BLOCK:
        raise ValueError(f"{layout}: must be {format.name} of a multiple of {BLOCK} columns")
    tiles, rest = divmod(int(order.shape[0]), TILE_ROWS)
    if rest or not 0 <= first_tile <= first_tile + tiles <= layout.tiles:
        raise ValueError(
            f"order has {order.shape[0]} rows from tile {first_tile} on: must be whole tiles of {TILE_ROWS},"
            f" and {layout.tiles} tiles at most"
        )
    return tiles


def _parts(layout: Layout, target: Array, first_tile: int) -> tuple[Array, Array]:
    """Return the codes and the scales in `target` from a tile on; where there are no scales, anything."""
    codes = first_tile * (layout.code_bytes // layout.tiles)
    scales = layout.code_bytes + first_tile * layout.scale_units * 32
    return target[codes:], target[scales:] if layout.scale_units else target


def _launch(rt: Runtime, name: str, threads: int, args: list[Any]) -> None:
    if threads:
        rt.launch(Kernel("repack.cu", name), (-(-threads // _THREADS),), _THREADS, args)
