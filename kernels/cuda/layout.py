"""Fragment order, the form that the CUDA kernels read weights in: packing in NumPy, which is its definition.

Tiles of 16 rows, chunks of 64 columns, see weights.cuh. A matrix is one run of bytes: codes, then scales.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TILE_ROWS = 16
CHUNK = 64  # columns
BLOCK = 32  # columns that one scale of MXFP4 covers
HEAD_DIM = 64  # of all attention heads
BLOCK_TOKENS = 16  # positions in a block of the cache
MAX_K = 8  # experts that a token may choose
_EIGHT = (0, 4, 1, 5, 2, 6, 3, 7)  # operand order
MXFP4_SCALE_OFFSET = 14  # fp16 operands hold code * 2^-14
# Where weights.cuh finds code i of four in a 16-bit half: the shift of its sign, the shift of its magnitude.
_CODE_BITS = ((15, 9), (12, 6), (14, 3), (13, 0))


class Format(IntEnum):
    """How weights are stored; the name is the kernels' -D definition less WEIGHTS_."""

    DENSE = 0
    INT8 = 1
    MXFP4 = 2


class Table(IntEnum):
    """The type of natural rows: embeddings, weights to pack, or scales; as in table.cuh."""

    BF16 = 0
    FP16 = 1
    FLOAT32 = 2
    INT8 = 3
    MXFP4 = 4
    E8M0 = 5


def padded(columns: int) -> int:
    """Round up to whole chunks: how long a row of operands is."""
    return -(-columns // CHUNK) * CHUNK


@dataclass(frozen=True, slots=True)
class Layout:
    """The size and the form of one packed matrix, logical shape (rows, columns).

    group: columns that share a scale, for INT8. bf16: both operands of the products are bf16, else fp16.
    scale_bf16: INT8 scales are bf16, else fp16.
    """

    format: Format
    rows: int
    columns: int
    group: int = BLOCK
    bf16: bool = False
    scale_bf16: bool = False

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.rows // TILE_ROWS)

    @property
    def chunks(self) -> int:
        """Chunks of 64 columns."""
        return -(-self.columns // CHUNK)

    @property
    def group_blocks(self) -> int:
        """Blocks of 32 columns that share a scale."""
        return self.group // BLOCK

    @property
    def scale_units(self) -> int:
        """Scale words that each pair of rows of a tile has."""
        match self.format:
            case Format.INT8:
                return -(-2 * self.chunks // self.group_blocks)
            case Format.MXFP4:
                return self.chunks
        return 0

    @property
    def code_bytes(self) -> int:
        """Bytes of codes: 16, 8 or 4 bits each."""
        vectors = {Format.DENSE: 4, Format.INT8: 2, Format.MXFP4: 1}[self.format]
        return self.tiles * self.chunks * vectors * 512

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.code_bytes + self.tiles * self.scale_units * 8 * 4

    @property
    def defines(self) -> tuple[tuple[str, int], ...]:
        """What the kernels that read this matrix are compiled with."""
        flags = {
            f"WEIGHTS_{self.format.name}": True,
            "OPERAND_BF16": self.bf16,
            "SCALE_BF16": self.scale_bf16,
        }
        return tuple((name, 1) for name, wanted in flags.items() if wanted)


def plain_rows(rows: int) -> Array:
    """Name the source row of each packed row: as they come; int32 (tiles * 16,), -1 for padding."""
    order = np.full(-(-rows // TILE_ROWS) * TILE_ROWS, -1, np.int32)
    order[:rows] = np.arange(rows)
    return order


def gate_up_rows(intermediate: int) -> Array:
    """Order gate0, up0, gate1, ... so that a lane has a gate (row g) and its up (row g + 8).

    The tile count is even, so that the result has a whole number of chunks of 64 columns: that is
    ceil(intermediate / 64) * 8 tiles, the surplus rows -1.
    """
    pairs = np.arange(-(-intermediate // CHUNK) * CHUNK, dtype=np.int32).reshape(-1, 1, 8)
    order = 2 * pairs + np.array([[0], [1]], np.int32)  # (tiles, gate | up, 8)
    return np.where(order < 2 * intermediate, order, -1).reshape(-1).astype(np.int32)


def rope_rows(heads: int, head_dim: int) -> Array:
    """Order the rows of each head so that a lane has both of a pair that RoPE rotates: i and i + half."""
    half = np.arange(head_dim // 2, dtype=np.int32).reshape(-1, 1, 8)
    head = (half + np.array([[0], [head_dim // 2]], np.int32)).reshape(-1)
    return (np.arange(heads, dtype=np.int32)[:, None] * head_dim + head).reshape(-1).astype(np.int32)


def _take_rows(array: Array, order: Array) -> Array:
    """Gather rows (..., R, C) -> (..., len(order), C), zeros for -1."""
    taken = array[..., np.maximum(order, 0), :]
    taken[..., order < 0, :] = 0
    return taken


def _put_rows(array: Array, order: Array) -> Array:
    """Undo `_take_rows`."""
    natural = np.empty((*array.shape[:-2], int(order.max()) + 1, array.shape[-1]), array.dtype)
    natural[..., order[order >= 0], :] = array[..., order >= 0, :]
    return natural


def _pad_columns(array: Array, columns: int) -> Array:
    widths = [(0, 0)] * (array.ndim - 1) + [(0, columns - array.shape[-1])]
    return np.pad(array, widths)


def _fragments(values: Array) -> Array:
    """Turn (..., rows, columns) into (..., tile, chunk, block, half, g, t, eight in operand order)."""
    *outer, rows, columns = values.shape
    split = values.reshape(*outer, rows // TILE_ROWS, 2, 8, columns // CHUNK, 2, 4, 8)[..., _EIGHT]
    n = len(outer)  # axes now: tile, half, g, chunk, block, t, eight
    return split.transpose(*range(n), n, n + 3, n + 4, n + 1, n + 2, n + 5, n + 6)


def pack_dense(layout: Layout, bits: Array, order: Array) -> Array:
    """Pack the bits of fp16 or bf16 values, uint16 (E, N, K) -> uint8 (E, layout.nbytes)."""
    values = _fragments(_pad_columns(_take_rows(bits, order), layout.chunks * CHUNK))
    split = values.reshape(*values.shape[:-1], 2, 2, 2)
    # axes: E, tile, chunk, block, half, g, t, mma, pair, low | high -> ..., mma, g, t, pair, half, low | high
    packed = np.ascontiguousarray(split.transpose(0, 1, 2, 3, 7, 5, 6, 8, 4, 9))
    return packed.reshape(len(bits), -1).view(np.uint8)


def pack_int8(layout: Layout, codes: Array, scales: Array, order: Array) -> Array:
    """Pack int8 codes (E, N, K) and the bits of their scales uint16 (E, N, K / group)."""
    biased = _pad_columns(_take_rows(codes, order), layout.chunks * CHUNK).view(np.uint8) ^ np.uint8(128)
    values = _fragments(biased).swapaxes(-4, -3).swapaxes(-3, -2)  # ..., block, g, t, half, eight
    packed = np.ascontiguousarray(values).reshape(len(codes), -1)
    return np.concatenate([packed, _pack_int8_scales(layout, scales, order)], axis=1)


def _pack_int8_scales(layout: Layout, scales: Array, order: Array) -> Array:
    scales = _pad_columns(_take_rows(scales, order), layout.scale_units)
    scales = scales.reshape(len(scales), -1, 2, 8, layout.scale_units)  # E, tile, half, g, unit
    return np.ascontiguousarray(scales.transpose(0, 1, 4, 3, 2)).reshape(len(scales), -1).view(np.uint8)


def unpack_int8(layout: Layout, packed: Array, order: Array) -> tuple[Array, Array]:
    """Undo `pack_int8`: uint8 (E, layout.nbytes) -> codes int8 (E, N, K), bits of scales uint16."""
    E = len(packed)
    values = packed[:, : layout.code_bytes].reshape(E, layout.tiles, layout.chunks, 2, 8, 4, 2, 8)
    # axes: E, tile, chunk, block, g, t, half, eight -> E, tile, half, g, chunk, block, t, eight
    natural = values[..., np.argsort(_EIGHT)].transpose(0, 1, 6, 4, 2, 3, 5, 7) ^ np.uint8(128)
    codes = natural.reshape(E, len(order), -1).view(np.int8)
    return _put_rows(codes[..., : layout.columns], order), unpack_int8_scales(layout, packed, order)


def unpack_int8_scales(layout: Layout, packed: Array, order: Array) -> Array:
    """Take the scales alone out of what `pack_int8` returned: bits uint16 (E, N, K / group)."""
    words = np.ascontiguousarray(packed[:, layout.code_bytes :]).view(np.uint16)
    words = words.reshape(len(packed), layout.tiles, layout.scale_units, 8, 2)
    natural = words.transpose(0, 1, 4, 3, 2).reshape(len(packed), len(order), layout.scale_units)
    return _put_rows(natural[..., : layout.columns // layout.group], order)


def pack_mxfp4(layout: Layout, blocks: Array, scales: Array, order: Array) -> Array:
    """Pack blocks uint8 (E, N, K / 32, 16) and E8M0 scales uint8 (E, N, K / 32).

    With fp16 operands the caller has seen that `mxfp4_fits_half(scales)`; blocks below 2^-28 become zero.
    """
    E, N, units, _ = blocks.shape
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(E, N, units, BLOCK)
    if not layout.bf16:
        small = scales < MXFP4_HALF_SCALES[0]
        codes = np.where(small[..., None], 0, codes)
        scales = np.where(small, MXFP4_HALF_SCALES[0], scales) + np.uint8(MXFP4_SCALE_OFFSET)
    codes = _pad_columns(_take_rows(codes.reshape(E, N, -1), order), layout.chunks * CHUNK)
    split = codes.reshape(E, -1, 2, 8, layout.chunks, 2, 4, 2, 4).astype(np.uint16)
    halves = np.zeros(split.shape[:-1], np.uint16)
    for i, (sign, magnitude) in enumerate(_CODE_BITS):
        code = split[..., i]
        halves |= (code >> 3) << np.uint16(sign) | (code & 7) << np.uint16(magnitude)
    # axes: E, tile, half, g, chunk, block, t, low | high -> E, tile, chunk, g, t, block, half, low | high
    words = np.ascontiguousarray(halves.transpose(0, 1, 4, 3, 6, 5, 2, 7)).reshape(E, -1).view(np.uint8)
    return np.concatenate([words, _pack_mxfp4_scales(layout, scales.astype(np.uint8), order)], axis=1)


def _pack_mxfp4_scales(layout: Layout, scales: Array, order: Array) -> Array:
    scales = _pad_columns(_take_rows(scales, order), 2 * layout.chunks)
    scales = scales.reshape(len(scales), -1, 2, 8, layout.chunks, 2)  # E, tile, half, g, chunk, block
    return np.ascontiguousarray(scales.transpose(0, 1, 4, 3, 5, 2)).reshape(len(scales), -1)


def unpack_mxfp4(layout: Layout, packed: Array, order: Array) -> tuple[Array, Array]:
    """Undo `pack_mxfp4` for bf16 operands, which loses nothing: blocks (E, N, K / 32, 16) and scales."""
    E = len(packed)
    halves = np.ascontiguousarray(packed[:, : layout.code_bytes]).view(np.uint16)
    halves = halves.reshape(E, layout.tiles, layout.chunks, 8, 4, 2, 2, 2)
    # axes: E, tile, chunk, g, t, block, half, low | high -> E, tile, half, g, chunk, block, t, low | high
    halves = halves.transpose(0, 1, 6, 3, 2, 5, 4, 7)
    codes = [
        (halves >> np.uint16(sign) & 1) << 3 | halves >> np.uint16(magnitude) & 7
        for sign, magnitude in _CODE_BITS
    ]
    pairs = [(low | high << 4).astype(np.uint8) for low, high in (codes[:2], codes[2:])]
    blocks = np.stack(pairs, axis=-1).reshape(E, len(order), 2 * layout.chunks, BLOCK // 2)
    natural = blocks[..., : layout.columns // BLOCK, :].reshape(E, len(order), -1)
    scales = unpack_mxfp4_scales(layout, packed, order)
    return _put_rows(natural, order).reshape(*scales.shape, BLOCK // 2), scales


def unpack_mxfp4_scales(layout: Layout, packed: Array, order: Array) -> Array:
    """Take the scales alone out of what `pack_mxfp4` returned: uint8 (E, N, K / 32)."""
    scales = packed[:, layout.code_bytes :].reshape(len(packed), layout.tiles, layout.chunks, 8, 2, 2)
    natural = scales.transpose(0, 1, 5, 3, 2, 4).reshape(len(packed), len(order), 2 * layout.chunks)
    return _put_rows(natural[..., : layout.columns // BLOCK], order)


def mxfp4_filled(layout: Layout, order: Array) -> Array:
    """Mark which scales of what `pack_mxfp4` returns are no padding: uint8 (scales of a matrix,), 1 or 0."""
    ones = np.ones((1, int(order.max()) + 1, layout.columns // BLOCK), np.uint8)
    filled: Array = _pack_mxfp4_scales(layout, ones, order)[0]
    return filled


def mxfp4_to_half(layout: Layout, packed: Array, filled: Array) -> tuple[Array, Array]:
    """Turn what `pack_mxfp4` returned for bf16 operands into what it returns for fp16.

    packed: uint8 (layout.nbytes,), one matrix, of which `mxfp4_filled` says what is no padding -> its codes,
    which may be a view, and its scales.
    """
    codes, scales = packed[: layout.code_bytes], packed[layout.code_bytes :]
    smallest = np.uint8(MXFP4_HALF_SCALES[0])
    small = (scales < smallest) & (filled != 0)
    if small.any():
        words = codes.copy().view(np.uint32).reshape(-1, 4, 4)  # rows g of a chunk; t; block and half
        words *= ~small.reshape(-1, 1, 4)
        codes = words.reshape(-1).view(np.uint8)
    return codes, filled * (np.maximum(scales, smallest) + np.uint8(MXFP4_SCALE_OFFSET))


# Scale bytes that fp16 operands can represent: 2^(s + 14 - 127) is a normal fp16 number.
MXFP4_HALF_SCALES = (99, 128)


def to_bits(x: Array, bf16: bool) -> Array:
    """Round to float32 and to the bits of bf16 or fp16, to the nearest, ties to even: uint16."""
    x = np.ascontiguousarray(x, np.float32)
    if not bf16:
        return x.astype(np.float16).view(np.uint16)
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bits(bits: Array, bf16: bool) -> Array:
    """Widen the bits of bf16 or fp16 to float32."""
    if bf16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32)


def operands(x: Array, bf16: bool = False) -> Array:
    """Round float32 rows (T, K) to operands: uint16 (T, K padded to 64), operand order."""
    values = _pad_columns(np.asarray(x, np.float32), padded(x.shape[-1]))
    return to_bits(values.reshape(*values.shape[:-1], -1, 8)[..., _EIGHT].reshape(values.shape), bf16)


def from_operands(bits: Array, columns: int, bf16: bool = False) -> Array:
    """Undo `operands`: uint16 (T, padded) -> float32 (T, columns)."""
    values = from_bits(bits, bf16)
    inverse = np.argsort(_EIGHT)
    natural = values.reshape(*values.shape[:-1], -1, 8)[..., inverse].reshape(values.shape)
    return natural[..., :columns]
