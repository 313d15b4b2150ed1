"""Tiles of 16 rows as kernels/cpu/layout.py defines them, at the speed of memory; without Python's lock.

What moves is four words of four rows at a time, in registers of 16 bytes that every CPU has. Natural rows may
begin at any address.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from gptoss_lite.kernels.cpu import Array

_ROWS, _LINE = 16, 64  # of a tile; bytes of a word of all its rows
_STEP = 16  # bytes of a row that are turned at a time
_VECTOR = ir.VectorType(ir.IntType(32), 4)
# Two exchanges bring codes c0 to c7 of a word, a nibble each, into the order c0 c4 c1 c5 c2 c6 c3 c7: of its
# inner bytes, then of the inner nibbles of both halves. In reverse they undo it.
_BYTES, _NIBBLES = (8, 0x0000FF00), (4, 0x00F000F0)


def _turner(exchanges: tuple[tuple[int, int], ...]) -> Any:
    """Make an operation that moves four words of four rows, turned round, exchanging bits on the way.

    It takes the address of the first row and bytes to the next, and the same of where they go.
    """

    @intrinsic
    def turn(typing, source, source_step, target, target_step):  # type: ignore[no-untyped-def]
        def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            def pointer(base: Any, step: Any, row: int) -> Any:
                offset = builder.mul(step, ir.Constant(step.type, row))
                return builder.inttoptr(builder.add(base, offset), _VECTOR.as_pointer())

            def mixed(a: Any, b: Any, *order: int) -> Any:
                return builder.shuffle_vector(a, b, ir.Constant(_VECTOR, order))

            def every(bits: int) -> Any:
                return ir.Constant(_VECTOR, [bits] * 4)

            base, step, target, target_step = arguments
            rows = []
            for row in range(4):
                words = builder.load(pointer(base, step, row), align=1)
                for shift, mask in exchanges:
                    # Bits under the mask change places with those that much further up.
                    differing = builder.and_(
                        builder.xor(words, builder.lshr(words, every(shift))), every(mask)
                    )
                    words = builder.xor(words, builder.or_(differing, builder.shl(differing, every(shift))))
                rows.append(words)
            low = [mixed(*rows[i : i + 2], 0, 4, 1, 5) for i in (0, 2)]
            high = [mixed(*rows[i : i + 2], 2, 6, 3, 7) for i in (0, 2)]
            turned = [mixed(*pair, *order) for pair in (low, high) for order in ((0, 1, 4, 5), (2, 3, 6, 7))]
            for row, words in enumerate(turned):
                builder.store(words, pointer(target, target_step, row), align=1)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp, types.intp), build

    return turn


_turn = _turner(())
_turn_to_halves = _turner((_BYTES, _NIBBLES))
_turn_from_halves = _turner((_NIBBLES, _BYTES))


def pack_codes(source: Array, is_mxfp4: bool, target: Array) -> None:
    """Write the codes of whole tiles, uint8 (tiles, 16 * B), from rows uint8 (N, B), B a multiple of 16.

    Rows that the last tile has over N are zeros.
    """
    length, whole = source.shape[1], len(source) // _ROWS
    _pack_codes(source.ctypes.data, length, whole, is_mxfp4, target.ctypes.data)
    if whole < len(target):
        last = _filled_up(source[whole * _ROWS :])
        _pack_codes(last.ctypes.data, length, 1, is_mxfp4, target[whole].ctypes.data)


def unpack_codes(source: Array, is_mxfp4: bool, target: Array) -> None:
    """Undo `pack_codes`: target uint8 (N, B) is written."""
    length, whole = target.shape[1], len(target) // _ROWS
    _unpack_codes(source.ctypes.data, length, whole, is_mxfp4, target.ctypes.data)
    if whole < len(source):
        last = np.empty((_ROWS, length), np.uint8)
        _unpack_codes(source[whole].ctypes.data, length, 1, is_mxfp4, last.ctypes.data)
        target[whole * _ROWS :] = last[: len(target) - whole * _ROWS]


def pack_scales(source: Array, target: Array) -> None:
    """Write the scales of whole tiles (tiles, S, 16) from rows (N, S), uint8 or uint16, read-only.

    Rows that the last tile has over N are zeros.
    """
    whole = len(source) // _ROWS
    _pack_scales(source, target[:whole])
    if whole < len(target):
        last = _filled_up(source[whole * _ROWS :])
        last.flags.writeable = False
        _pack_scales(last, target[whole:])


def _filled_up(rows: Array) -> Array:
    """Copy the rows of a last tile, with zeros for those that it lacks."""
    tile = np.zeros((_ROWS, rows.shape[1]), rows.dtype)
    tile[: len(rows)] = rows
    return tile


@intrinsic
def _ask_for(typing, address):  # type: ignore[no-untyped-def]
    """Have a cache line fetched."""

    def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read_and_keep = [ir.Constant(flag, bits) for bits in (0, 3, 1)]
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), *to_read_and_keep])
        return context.get_dummy_value()

    return types.void(types.intp), build


@njit(nogil=True, cache=True, boundscheck=False)
def _pack_codes(source: int, length: int, tiles: int, is_mxfp4: bool, target: int) -> None:
    """Pack rows of so many bytes between two addresses.

    CPUs do not see from sixteen rows read side by side that the next tile's follow: it is asked for.
    """
    for tile in range(tiles):
        first = tile * _ROWS * length
        for start in range(0, length, _STEP):
            ahead = source + first + _ROWS * (length + start)
            for line in range(0, _ROWS * _STEP, _LINE):
                _ask_for(ahead + line)  # type: ignore[call-arg]
            for row in range(0, _ROWS, 4):
                at, to = source + first + row * length + start, target + first + _ROWS * start + 4 * row
                if is_mxfp4:
                    _turn_to_halves(at, length, to, _LINE)
                else:
                    _turn(at, length, to, _LINE)


@njit(nogil=True, cache=True, boundscheck=False)
def _unpack_codes(source: int, length: int, tiles: int, is_mxfp4: bool, target: int) -> None:
    """Undo `_pack_codes`."""
    for tile in range(tiles):
        first = tile * _ROWS * length
        for start in range(0, length, _STEP):
            for row in range(0, _ROWS, 4):
                at, to = source + first + _ROWS * start + 4 * row, target + first + row * length + start
                if is_mxfp4:
                    _turn_from_halves(at, _LINE, to, length)
                else:
                    _turn(at, _LINE, to, length)


@njit(nogil=True, cache=True, boundscheck=False)
def _pack_scales(source: Array, target: Array) -> None:
    for tile in range(target.shape[0]):
        for unit in range(target.shape[1]):
            for row in range(_ROWS):
                target[tile, unit, row] = source[tile * _ROWS + row, unit]


@njit(nogil=True, cache=True, boundscheck=False)
def unpack_scales(source: Array, target: Array) -> None:
    """Undo `pack_scales`: target (N, S) is written; source is read-only."""
    for row in range(target.shape[0]):
        for unit in range(target.shape[1]):
            target[row, unit] = source[row // _ROWS, unit, row % _ROWS]
