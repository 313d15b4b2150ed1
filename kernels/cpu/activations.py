"""Activations as the tiles take them: RMSNorm, and integer codes by blocks for packed weights.

A row of activations is quantised 32 columns at a time: a code is what the column comes to in units of the
block's largest magnitude / 32512 in two bytes, or / 127 in one. Rows lie in chunks of as many as a tile
multiplies at once, the blocks of a chunk in turn and in each block all of its rows; some chunks have fewer
rows than they have room for, and what the room left holds does not matter.
"""

import math
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils

from gptoss_lite.kernels.cpu import Array, isa
from gptoss_lite.kernels.cpu.irtools import (
    addresses,
    call,
    integers,
    load,
    moved,
    splat,
    spread,
    store,
    writes_ir,
)
from gptoss_lite.kernels.cpu.program import Steps
from gptoss_lite.kernels.cpu.workers import TASK, Operands, array

BLOCK = 32
_SMALLEST = 0x0D000000  # bits of about 4e-31: a block of smaller values is all zeros

_ROWS = 4  # that a task normalises
_LANES = 16  # of a vector, which a CPU with shorter registers computes in parts
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS, _BYTES = (ir.VectorType(kind, _LANES) for kind in (_I32, _F32, ir.IntType(8)))

_NORMALISE = Operands(
    array(types.float32, 2),  # x
    array(types.float32, 1),  # weight
    types.float64,  # eps
    array(types.float32, 2),  # y
)
_read_normalise = _NORMALISE.read
_QUANTISE = Operands(
    array(types.float32, 2),  # x
    array(types.float32, 1),  # weight of the norm; none without one
    types.float64,  # eps
    types.int64,  # wide
    types.int64,  # passes
    types.float64,  # unit
    types.int64,  # bias
    array(types.int8, 1),  # codes
    array(types.float32, 1),  # scales
    array(types.int32, 1),  # starts
)
_read_quantise = _QUANTISE.read


def operand(kind: isa.ISA, format: str, activations: str) -> tuple[int, float, int]:
    """Say how activations are quantised for weights of a format: passes, unit and bias of `quantize`."""
    passes = 1 if activations == "int8" else 2
    return (passes, 0.5, kind.mxfp4_bias) if format == "mxfp4" else (passes, 1.0, kind.int8_bias)


def quantized(
    steps: Steps,
    kind: isa.ISA,
    format: str,
    activations: str,
    x: Array,
    norm: tuple[Array, float] | None = None,
) -> tuple[Array, Array, Array]:
    """Quantise rows x float32 (R, K) for weights of a format -> codes, scales and starts, see `quantize`.

    They lie in chunks of as many as a tile of this ISA multiplies at once: row r is in the chunk that begins
    at slot r // tokens * tokens. norm: weight and eps of an RMSNorm that they go through before, see
    `rms_norm`.
    """
    wide = kind.tokens
    passes, unit, bias = operand(kind, format, activations)
    chunks, columns = -(-len(x) // wide), x.shape[1]
    codes = steps.room("codes", (chunks * wide * columns * passes,), np.int8)
    scales = steps.room("scales", (chunks * wide * columns // BLOCK,))
    starts = steps.room("starts", scales.shape, np.int32)
    weight, eps = (np.zeros(0, np.float32), 0.0) if norm is None else norm
    steps.add(
        _make_quantise(), len(x), _QUANTISE, x, weight, eps, wide, passes, unit, bias, codes, scales, starts
    )
    return codes, scales, starts


def rms_norm(steps: Steps, x: Array, weight: Array, eps: float) -> Array:
    """Compute x / sqrt(mean(x^2) + eps) * weight; x float32 (R, K), weight float32 (K,)."""
    y = steps.room("normalised", x.shape)
    steps.add(_make_normalise(), -(-len(x) // _ROWS), _NORMALISE, x, weight, eps, y)
    return y


@njit(fastmath={"contract", "reassoc", "nsz"}, boundscheck=False)
def _normalise(x, row, weight, eps, y, target):  # type: ignore[no-untyped-def]
    K = len(weight)
    squares = np.float32(0)
    for k in range(K):
        squares += x[row, k] * x[row, k]
    factor = np.float32(1.0 / math.sqrt(squares / K + eps))
    for k in range(K):
        y[target, k] = x[row, k] * factor * weight[k]


@cache
def _make_normalise() -> Any:
    key = isa.key()

    @cfunc(TASK, cache=True, error_model="numpy")
    def normalise(place, task, worker):  # type: ignore[no-untyped-def]
        x, weight, eps, y = _read_normalise(key, place)
        for r in range(task * _ROWS, min((task + 1) * _ROWS, len(x))):
            _normalise(x, r, weight, eps, y, r)

    return normalise


@writes_ir
def quantize_block(_typing, x, at, passes, unit, bias, codes, scales, starts, block):  # type: ignore[no-untyped-def]
    """Quantise the 32 numbers of x from element `at` on: the block-th block of codes, scales and starts.

    x float32. passes: 1 for codes of one byte, 2 for two, high bytes before low ones. A scale is multiplied
    by `unit`, and that of zeros is 1; a start is -bias times the sum of the block's codes. NaN and infinities
    end up in the scale, and so in every result.
    """

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        arrays = addresses(context, b, signature, args)
        _, at, passes, unit, bias, _, _, _, block = args
        source = moved(b, arrays[0], at, 4)
        halves = [load(b, moved(b, source, 64 * half), _FLOATS) for half in range(2)]
        magnitudes = [b.and_(b.bitcast(half, _INTS), splat(_INTS, 0x7FFFFFFF)) for half in halves]
        larger = b.icmp_unsigned(">", *magnitudes)
        largest = call(b, "llvm.vector.reduce.umax.v16i32", _I32, b.select(larger, *magnitudes))
        span = b.bitcast(largest, _F32)
        is_byte = b.icmp_signed("==", passes, ir.Constant(_I64, 1))
        top = b.select(is_byte, ir.Constant(_F32, 127.0), ir.Constant(_F32, 32512.0))
        is_zero = b.icmp_unsigned("<=", largest, ir.Constant(_I32, _SMALLEST))
        inverse = spread(b, b.select(is_zero, ir.Constant(_F32, 0.0), b.fdiv(top, span)), _LANES)
        rounded = []
        for half in halves:
            nearest = call(b, "llvm.rint.v16f32", _FLOATS, b.fmul(half, inverse))
            rounded.append(integers(b, nearest, _INTS))
        place = moved(b, arrays[5], b.mul(block, passes), BLOCK)
        total = cgutils.alloca_once(b, _I32)
        with b.if_else(is_byte) as (one, two):
            with one:
                for i, code in enumerate(rounded):
                    store(b, b.trunc(code, _BYTES), moved(b, place, _LANES * i))
                b.store(_sum(b, rounded), total)
            with two:
                codes = []
                for i, code in enumerate(rounded):
                    high = b.ashr(b.add(code, splat(_INTS, 128)), splat(_INTS, 8))
                    above = b.shl(high, splat(_INTS, 8))
                    low = b.sub(code, above)
                    least = splat(_INTS, -127)  # -128 has no opposite
                    low = b.select(b.icmp_signed("<", low, least), least, low)
                    store(b, b.trunc(high, _BYTES), moved(b, place, _LANES * i))
                    store(b, b.trunc(low, _BYTES), moved(b, place, BLOCK + _LANES * i))
                    codes.append(b.add(above, low))
                b.store(_sum(b, codes), total)
        scale = b.fmul(b.fdiv(b.select(is_zero, top, span), top), b.fptrunc(unit, _F32))
        store(b, scale, moved(b, arrays[6], block, 4))
        start = b.mul(b.neg(b.trunc(bias, _I32)), b.load(total))
        store(b, start, moved(b, arrays[7], block, 4))
        return context.get_dummy_value()

    integer = types.int64
    kinds = x, integer, integer, types.float64, integer, codes, scales, starts, integer
    return types.void(*kinds), generate


def _sum(b: ir.IRBuilder, pair: list[Any]) -> Any:
    return call(b, "llvm.vector.reduce.add.v16i32", _I32, b.add(*pair))


@njit(boundscheck=False)
def quantize(
    x: Array, row: int, passes: int, unit: float, bias: int, codes: Array, scales: Array, starts: Array,
    place: int, room: int,
) -> None:  # fmt: skip
    """Quantise x[row], float32 (K,), into its place in a chunk; see `quantize_block`.

    codes int8, scales float32 and starts int32 are flat. The row's first block is the one at `place` among
    all blocks of all rows, the next lies `room` further.
    """
    K = x.shape[1]
    for b in range(K // BLOCK):
        quantize_block(x, row * K + b * BLOCK, passes, unit, bias, codes, scales, starts, place + b * room)


@njit(boundscheck=False)
def room_for(rows: int, wide: int) -> int:
    """How many rows the smallest tile takes that takes so many: 1, 2, 4 or `wide`."""
    if rows <= 2:
        return rows
    return min(4, wide) if rows <= 4 else wide


@cache
def _make_quantise() -> Any:
    key = isa.key()

    @cfunc(TASK, cache=True, error_model="numpy")
    def quantise(place, row, worker):  # type: ignore[no-untyped-def]
        """Quantise a row."""
        x, weight, eps, wide, passes, unit, bias, codes, scales, starts = _read_quantise(key, place)
        K, first = x.shape[1], row // wide * wide  # of the chunk
        room, at = room_for(min(wide, len(x) - first), wide), first * (K // BLOCK) + row - first
        if len(weight):
            normalised = np.empty((1, K), np.float32)
            _normalise(x, row, weight, eps, normalised, 0)
            quantize(normalised, 0, passes, unit, bias, codes, scales, starts, at, room)
        else:
            quantize(x, row, passes, unit, bias, codes, scales, starts, at, room)

    return quantise
