"""What the machine can do while the kernels are timed: reading memory, and multiplying from registers.

Machines differ, and a shared one differs from minute to minute: a kernel's rate is given as a share of a
yardstick's, measured right before and after it.
"""

import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any, Literal, TypeAlias

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from gptoss_lite.kernels.cpu import isa
from gptoss_lite.yardstick import HostYardstick

Kind: TypeAlias = Literal["read", "dot", "multiply-add"]

UNITS = {"read": "GB/s", "dot": "GMAC/s", "multiply-add": "GMAC/s"}
_CHAINS = 12  # independent sums: more than the latency of an instruction times those begun in a cycle
_READ_BYTES = 1 << 29
_STEPS = 2_000_000


def rate(kind: Kind) -> float:
    """Measure a yardstick: bytes per second read by all threads, or products per second of all threads.

    dot: of signed and unsigned bytes, summed in fours as the tiles of packed weights do. multiply-add: of
    float32.
    """
    if kind == "read":
        return _memory().rate()
    threads, host = numba.get_num_threads(), isa.host()
    run = _registers(host.name, kind)
    seconds = median(_seconds(lambda: run(threads, _STEPS)) for _ in range(3))
    products = host.lanes * (4 * host.together if kind == "dot" else 1)
    return threads * _STEPS * _CHAINS * products / seconds


@cache
def _memory() -> HostYardstick:
    return HostYardstick(_READ_BYTES, numba.get_num_threads())


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@cache
def _registers(name: str, kind: Kind) -> Callable[[int, int], Any]:
    chosen = isa.by_name(name)

    def multiply(_typing, steps, seed):  # type: ignore[no-untyped-def]
        """Multiply registers `steps` times in each chain -> something that depends on all of it."""

        def generate(_context, b, _signature, args):  # type: ignore[no-untyped-def]
            lanes = ir.VectorType(ir.IntType(32), chosen.lanes)
            element = ir.FloatType() if kind == "multiply-add" else ir.IntType(32)
            sums = [cgutils.alloca_once(b, ir.VectorType(element, chosen.lanes)) for _ in range(_CHAINS)]
            for place in sums:
                b.store(ir.Constant(place.type.pointee, None), place)
            word = b.trunc(args[1], ir.IntType(32))
            whole = b.insert_element(ir.Constant(lanes, None), word, ir.Constant(ir.IntType(32), 0))
            factor = b.bitcast(whole, ir.VectorType(ir.IntType(8), 4 * chosen.lanes))
            if kind == "multiply-add":
                factor = b.sitofp(whole, ir.VectorType(element, chosen.lanes))
            with cgutils.for_range(b, args[0]):
                for place in sums:
                    b.store(one_step(b, b.load(place), factor), place)
            total = b.load(sums[0])
            for place in sums[1:]:
                add = b.fadd if kind == "multiply-add" else b.add
                total = add(total, b.load(place))
            first = b.extract_element(total, ir.Constant(ir.IntType(32), 0))
            return (
                b.fptosi(first, ir.IntType(64)) if kind == "multiply-add" else b.zext(first, ir.IntType(64))
            )

        return types.int64(types.int64, types.int64), generate

    multiplied: Any = intrinsic(multiply)

    def one_step(b: ir.IRBuilder, total: Any, factor: Any) -> Any:
        if kind == "dot":
            together = [factor] * chosen.together
            return chosen.dot(b, total, together, together, 12 + chosen.mxfp4_bias)
        function = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(total.type, [total.type] * 3), f"llvm.fmuladd.v{chosen.lanes}f32"
        )
        return b.call(function, [factor, factor, total])

    @njit(parallel=True)
    def run(threads, steps):  # type: ignore[no-untyped-def]
        found = np.empty(threads, np.int64)
        for thread in prange(threads):
            found[thread] = multiplied(steps, thread + 1)
        return found

    run(1, 1)
    return run
