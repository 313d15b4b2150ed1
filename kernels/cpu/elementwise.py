"""The small steps between the products: clamped SwiGLU, and the sum over experts."""

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, types

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

PAIRS = 16  # gates and ups that SwiGLU takes at once
_TOKENS, _COLUMNS = 4, 1024  # that are combined in a task
_FLOATS, _INTS = ir.VectorType(ir.FloatType(), PAIRS), ir.VectorType(ir.IntType(32), PAIRS)

_SWIGLU = Operands(
    array(types.float32, 2),  # x
    array(types.float32, 2),  # bias
    array(types.int32, 1),  # expert
    types.float64,  # limit
    array(types.float32, 2),  # y
)
_read_swiglu = _SWIGLU.read
_COMBINE = Operands(
    array(types.float32, 2),  # x
    array(types.float32, 2),  # y
    array(types.float32, 2),  # bias
    array(types.int32, 2),  # ids
    array(types.int64, 1),  # places
    array(types.float32, 2),  # weights
    array(types.float32, 2),  # out
)
_read_combine = _COMBINE.read


@writes_ir
def swiglu_pairs(_typing, x, first, second, added, added_at, limit, y, y_at):  # type: ignore[no-untyped-def]
    """Write gate * sigmoid(1.702 * gate) * (up + 1), clamped, of 16 gates and ups to y from y_at on.

    Gates and ups take turns, eight of each in the 16 numbers of x from element `first` on, and eight in those
    from `second` on; what is added to them lies together, from added_at on. All float32.
    """

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        arrays = addresses(context, b, signature, args)
        _, first, second, _, added_at, limit, _, y_at = args
        halves = []
        for i, at in enumerate((first, second)):
            values = load(b, moved(b, arrays[0], at, 4), _FLOATS)
            bias = load(b, moved(b, moved(b, arrays[3], added_at, 4), 4 * PAIRS * i), _FLOATS)
            halves.append(b.fadd(values, bias))
        gate, up = (
            b.shuffle_vector(*halves, ir.Constant(_INTS, list(range(parity, 2 * PAIRS, 2))))
            for parity in (0, 1)
        )
        top = spread(b, b.fptrunc(limit, ir.FloatType()), PAIRS)
        gate, up = _at_most(b, gate, top), _at_most(b, up, top)
        bottom = b.fneg(top)
        up = b.select(b.fcmp_ordered("<", up, bottom), bottom, up)
        share = b.fadd(_exponential(b, b.fmul(gate, splat(_FLOATS, -1.702))), splat(_FLOATS, 1.0))
        value = b.fmul(b.fdiv(gate, share), b.fadd(up, splat(_FLOATS, 1.0)))
        store(b, value, moved(b, arrays[6], y_at, 4))
        return context.get_dummy_value()

    integer = types.int64
    return types.void(x, integer, integer, added, integer, types.float64, y, integer), generate


def _at_most(b: ir.IRBuilder, x: Any, top: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, top), top, x)


def _exponential(b: ir.IRBuilder, x: Any) -> Any:
    """Compute e^x to 2e-7 for x from -87 to 87, and what these come to beyond them.

    2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Moshier, Cephes' expf).
    """
    x = _at_most(b, x, splat(_FLOATS, 87.0))
    x = b.select(b.fcmp_ordered("<", x, splat(_FLOATS, -87.0)), splat(_FLOATS, -87.0), x)
    n = call(b, "llvm.rint.v16f32", _FLOATS, b.fmul(x, splat(_FLOATS, 1.44269504)))
    r = _multiply_add(b, n, splat(_FLOATS, -0.693359375), x)
    r = _multiply_add(b, n, splat(_FLOATS, 2.12194440e-4), r)
    p = splat(_FLOATS, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = _multiply_add(b, p, r, splat(_FLOATS, coefficient))
    p = b.fadd(_multiply_add(b, p, b.fmul(r, r), r), splat(_FLOATS, 1.0))
    exponent = b.shl(integers(b, n, _INTS), splat(_INTS, 23))
    return b.bitcast(b.add(b.bitcast(p, _INTS), exponent), _FLOATS)


def _multiply_add(b: ir.IRBuilder, x: Any, y: Any, z: Any) -> Any:
    return call(b, "llvm.fmuladd.v16f32", _FLOATS, x, y, z)


def swiglu(steps: Steps, x: Array, bias: Array, expert: Array, limit: float, y: Array) -> None:
    """Write clamped SwiGLU of interleaved gate and up columns.

    x float32 (R, 2 I), bias float32 (E, 2 I), expert int32 (R,) whose bias each row takes, y float32 (R, I).
    """
    steps.add(_make_swiglu(), len(x), _SWIGLU, x, bias, expert, limit, y)


def combine(
    steps: Steps, x: Array, y: Array, bias: Array, ids: Array, places: Array, weights: Array, out: Array
) -> None:
    """Add to each token the weighted results of its experts, in the order of the router's choice.

    x and out float32 (T, K), y float32 (R, K), bias float32 (E, K), ids int32 (T, k), places int64 (T * k,):
    which row of `y` holds choice c of token t, weights float32 (T, k).
    """
    T, K = x.shape
    tasks = -(-T // _TOKENS) * -(-K // _COLUMNS)
    steps.add(_make_combine(), tasks, _COMBINE, x, y, bias, ids, places, weights, out)


@cache
def _make_swiglu() -> Any:
    key = isa.key()

    @cfunc(TASK, cache=True, error_model="numpy")
    def gate(place, r, worker):  # type: ignore[no-untyped-def]
        """Take a row."""
        x, bias, expert, limit, y = _read_swiglu(key, place)
        inner = y.shape[1]
        pairs, added = np.zeros(2 * PAIRS, np.float32), np.zeros(2 * PAIRS, np.float32)
        found = np.empty(PAIRS, np.float32)
        for first in range(0, inner, PAIRS):
            count = min(PAIRS, inner - first)
            if count == PAIRS:
                at, added_at = 2 * (r * inner + first), 2 * (expert[r] * inner + first)
                swiglu_pairs(x, at, at + PAIRS, bias, added_at, limit, y, r * inner + first)
                continue
            for i in range(2 * count):
                pairs[i], added[i] = x[r, 2 * first + i], bias[expert[r], 2 * first + i]
            swiglu_pairs(pairs, 0, PAIRS, added, 0, limit, found, 0)
            for i in range(count):
                y[r, first + i] = found[i]

    return gate


@cache
def _make_combine() -> Any:
    key = isa.key()

    @cfunc(TASK, cache=True, error_model="numpy")
    def add(place, task, worker):  # type: ignore[no-untyped-def]
        """Take some columns of some tokens."""
        x, y, bias, ids, places, weights, out = _read_combine(key, place)
        T, K = x.shape
        k = ids.shape[1]
        parts = (K + _COLUMNS - 1) // _COLUMNS
        first, begin = task // parts * _TOKENS, task % parts * _COLUMNS
        end = min(begin + _COLUMNS, K)
        for t in range(first, min(first + _TOKENS, T)):
            total = out[t, begin:end]  # loops over views from 0 on become vector code
            total[:] = 0
            for c in range(k):
                found, added = y[places[t * k + c], begin:end], bias[ids[t, c], begin:end]
                weight = weights[t, c]
                for n in range(len(total)):
                    total[n] += weight * (found[n] + added[n])
            before = x[t, begin:end]
            for n in range(len(total)):
                total[n] += before[n]

    return add
