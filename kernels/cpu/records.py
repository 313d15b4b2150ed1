"""Records of tiles as kernels/cpu/layout.py has them, written and read: compiled where there is Numba."""

import math
from types import ModuleType

import numpy as np

from gptoss_lite.kernels.cpu import Array, layout
from gptoss_lite.kernels.cpu.layout import LINE, TILE_ROWS, Layout


def room(shape: tuple[int, ...]) -> Array:
    """Make room for records: uint8 of a shape, which begins at a cache line."""
    size = math.prod(shape)
    bytes_ = np.empty(size + LINE, np.uint8)
    start = -bytes_.ctypes.data % LINE
    return bytes_[start : start + size].reshape(shape)


def write(form: Layout, first: int, codes: Array, scales: Array, record: Array) -> None:
    """Write whole tiles from tile `first` on, and after the last one what fills up the record.

    codes: uint8 (N, row_bytes), the bytes of 16 rows a tile, or as many as the matrix has left; scales: uint8
    or uint16 (N, row_scales); record: uint8 (nbytes,).
    """
    tiles = slice(first, first - (-len(codes) // TILE_ROWS))
    to, to_scales = form.codes(record)[tiles], form.scales(record)[tiles]
    if (compiled := _compiled()) is None:
        to[:] = layout.pack_codes(codes, form.is_mxfp4)
        to_scales[:] = layout.pack_scales(scales)
    else:
        compiled.pack_codes(np.ascontiguousarray(codes), form.is_mxfp4, to.reshape(len(to), -1))
        compiled.pack_scales(_frozen(np.ascontiguousarray(scales)), to_scales)
    if tiles.stop == form.tiles:
        record[form.scales_end :] = 0


def read_codes(form: Layout, records: Array) -> Array:
    """Take the codes of records uint8 (E, nbytes) back: uint8 (E, rows, row_bytes)."""
    codes = np.empty((len(records), form.rows, form.row_bytes), np.uint8)
    compiled = _compiled()
    for record, rows in zip(records, codes, strict=True):
        packed = form.codes(record)
        if compiled is None:
            rows[:] = layout.unpack_codes(packed, form.rows, form.is_mxfp4)
        else:
            compiled.unpack_codes(packed.reshape(form.tiles, -1), form.is_mxfp4, rows)
    return codes


def read_scales(form: Layout, records: Array) -> Array:
    """Take the scales of records uint8 (E, nbytes) back: uint8 or uint16 (E, rows, row_scales)."""
    scales = np.empty((len(records), form.rows, form.row_scales), f"u{form.scale_bytes}")
    compiled = _compiled()
    for record, rows in zip(records, scales, strict=True):
        packed = form.scales(record)
        if compiled is None:
            rows[:] = layout.unpack_scales(packed, form.rows)
        else:
            compiled.unpack_scales(_frozen(packed), rows)
    return scales


def _frozen(array: Array) -> Array:
    """View an array as read-only, as mapped ones are: so a kernel is compiled once for all."""
    view = array.view()
    view.flags.writeable = False
    return view


def _compiled() -> ModuleType | None:
    """Return the compiled way; None beside a GPU, where Numba may be missing, or have nowhere to write."""
    try:
        from gptoss_lite.kernels.cpu import rowtiles
    except (ImportError, RuntimeError):
        return None
    return rowtiles
