"""Tiles of 16 rows, the form that the CPU kernels read quantised weights in: NumPy, which is its definition.

Rows lie side by side, so that each lane of a register has a row of its own. A word is 32 bits of a row: four
int8 codes, or eight of MXFP4. A matrix is one record: words (tiles, words of a row, 16), scales (tiles,
scales of a row, 16), then zeros up to a whole cache line. Rows that fill up the last tile are zeros, too.
"""

from dataclasses import dataclass

import numpy as np

from gptoss_lite.kernels.cpu import Array

TILE_ROWS = 16
LINE = 64  # bytes of a cache line
WORD = 4  # bytes
# Nibbles of an MXFP4 word: code i of a block's eight is at 2i in a checkpoint; in a tile, low halves of its
# four bytes are codes 0 to 3 and high halves 4 to 7.
_HALVES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class Layout:
    """The size of one matrix in tiles: where its codes and its scales lie in a record.

    row_bytes: of a row's codes, a multiple of 16. row_scales: scales of a row, of scale_bytes each.
    """

    rows: int
    row_bytes: int
    row_scales: int
    scale_bytes: int
    is_mxfp4: bool

    @property
    def tiles(self) -> int:
        """Tiles of 16 rows."""
        return -(-self.rows // TILE_ROWS)

    @property
    def code_bytes(self) -> int:
        """Bytes of codes; the scales begin after them."""
        return self.tiles * TILE_ROWS * self.row_bytes

    @property
    def scales_end(self) -> int:
        """Bytes of codes and scales; zeros come after them."""
        return self.code_bytes + self.tiles * TILE_ROWS * self.row_scales * self.scale_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of a record."""
        return -(-self.scales_end // LINE) * LINE

    def codes(self, records: Array) -> Array:
        """View the codes of records uint8 (..., nbytes) -> uint8 (..., tiles, words, 16, 4)."""
        codes = records[..., : self.code_bytes]
        return codes.reshape(*records.shape[:-1], self.tiles, self.row_bytes // WORD, TILE_ROWS, WORD)

    def scales(self, records: Array) -> Array:
        """View the scales of records uint8 (..., nbytes) -> uint8 or uint16 (..., tiles, row_scales, 16)."""
        scales = records[..., self.code_bytes : self.scales_end].view(f"u{self.scale_bytes}")
        return scales.reshape(*records.shape[:-1], self.tiles, self.row_scales, TILE_ROWS)


def pack_codes(codes: Array, is_mxfp4: bool) -> Array:
    """Pack the bytes of rows' codes, uint8 (N, multiple of 16) -> uint8 (tiles, words, 16, 4)."""
    rows = _to_halves(codes) if is_mxfp4 else codes
    return _beside(rows.reshape(len(rows), -1, WORD))


def unpack_codes(packed: Array, rows: int, is_mxfp4: bool) -> Array:
    """Undo `pack_codes` -> uint8 (rows, bytes)."""
    codes = packed.swapaxes(1, 2).reshape(len(packed) * TILE_ROWS, -1)[:rows]
    return _from_halves(codes) if is_mxfp4 else codes


def pack_scales(scales: Array) -> Array:
    """Pack the scales of rows, uint8 or uint16 (N, S) -> (tiles, S, 16)."""
    return _beside(scales)


def unpack_scales(packed: Array, rows: int) -> Array:
    """Undo `pack_scales` -> (rows, S)."""
    return packed.swapaxes(1, 2).reshape(len(packed) * TILE_ROWS, -1)[:rows]


def _beside(rows: Array) -> Array:
    """Put what each sixteen rows have at one place side by side: (N, S, ...) -> (tiles, S, 16, ...)."""
    tiles = -(-len(rows) // TILE_ROWS)
    padded = np.zeros((tiles * TILE_ROWS, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    beside: Array = padded.reshape(tiles, TILE_ROWS, *rows.shape[1:]).swapaxes(1, 2)
    return beside


def _to_halves(codes: Array) -> Array:
    """Bring each eight codes of a checkpoint into a tile's order; uint8 (..., multiple of 4)."""
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, len(_HALVES))[:, _HALVES]
    return _joined(nibbles, codes)


def _from_halves(codes: Array) -> Array:
    nibbles = np.empty((codes.size // WORD, len(_HALVES)), np.uint8)
    nibbles[:, _HALVES] = np.stack([codes & 15, codes >> 4], axis=-1).reshape(nibbles.shape)
    return _joined(nibbles, codes)


def _joined(nibbles: Array, like: Array) -> Array:
    bytes_: Array = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    return bytes_.reshape(like.shape)
