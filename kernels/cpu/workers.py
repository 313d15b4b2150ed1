"""Steps of compiled code that threads go through together in one parallel loop.

A step is a function that does one of its tasks. Each thread has a part of them, takes one after another, for
their weights lie one after another in memory, and then helps others with theirs: a core that is slow, or that
other programs keep busy, does fewer. Before a core counts, all that it reads and writes has to arrive: a
thread begins a quarter of the tasks left at a time, and single ones at the end. The next step begins when
all tasks are done. No thread is waited for that has not begun a task, so any number of threads gets through.
That costs less than a microsecond, where a parallel loop for each step would cost tens.

A step's operands are words in memory: numbers, and addresses and shapes of arrays.
"""

import struct
import sys
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.np import arrayobj

from gptoss_lite.kernels.cpu.irtools import call, writes_ir

TASK = types.void(types.int64, types.int64, types.int64)  # of: where operands are, which task, which thread
LINE = 8  # words of a cache line
DONE, TASKS, TASKS_AT = range(3)  # of a step's first line; TASKS_AT: where the number of tasks is, or 0

_I64 = ir.IntType(64)
_WORD = 8  # bytes
_SHARE = 4  # of a part's tasks left, one in so many is begun at a time
_WAITS = 2000  # for the others' last tasks, before other programs have their turn: some 50 us


def array(kind: Any, dimensions: int) -> types.Array:
    """Give Numba's type of a contiguous array."""
    return types.Array(kind, dimensions, "C")


class Operands:
    """What a step is given, by Numba's types: contiguous arrays, int64, float64 and booleans.

    `read` is what the step calls, with a key and where its operands are: it gives a tuple of them. The step
    has to close over the key, see isa.key, but must know `read` by a global name: Numba would not find what
    it compiled for another `read`, and each process makes its own.
    """

    def __init__(self, *kinds: Any) -> None:
        self._kinds = kinds
        self.read = _reader(types.Tuple(kinds))

    def words(self, *values: Any) -> list[int]:
        """Spell operands as words; arrays are to be kept alive."""
        words: list[int] = []
        for kind, value in zip(self._kinds, values, strict=True):
            if isinstance(kind, types.Array):
                assert value.dtype == kind.dtype.name and value.ndim == kind.ndim and value.flags.c_contiguous
                words += (value.ctypes.data, *value.shape)
            elif kind == types.float64:
                words += struct.unpack("q", struct.pack("d", value))
            else:
                words.append(int(value))
        return words


def _reader(expected: types.Tuple) -> Any:
    def read(_typing, key, place):  # type: ignore[no-untyped-def]
        def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
            words, used = b.inttoptr(args[1], _I64.as_pointer()), 0

            def word() -> Any:
                nonlocal used
                used += 1
                return b.load(b.gep(words, [ir.Constant(_I64, used - 1)]))

            values = []
            for kind in expected:
                if kind == types.boolean:
                    values.append(b.icmp_unsigned("!=", word(), ir.Constant(_I64, 0)))
                elif kind == types.float64:
                    values.append(b.bitcast(word(), ir.DoubleType()))
                elif not isinstance(kind, types.Array):
                    values.append(word())
                else:
                    made = context.make_array(kind)(context, b)
                    data = b.inttoptr(word(), made.data.type)
                    shape = [word() for _ in range(kind.ndim)]
                    itemsize = ir.Constant(_I64, kind.dtype.bitwidth // 8)
                    strides = [itemsize]
                    for length in shape[:0:-1]:
                        strides.insert(0, b.mul(strides[0], length))
                    arrayobj.populate_array(made, data, shape, strides, itemsize, None)
                    values.append(made._getvalue())
            return context.make_tuple(b, expected, values)

        return expected(key, types.int64), generate

    return writes_ir(read)


@njit(parallel=True, cache=True, boundscheck=False, error_model="numpy", nogil=True)
def run(functions, places, words, base, threads):  # type: ignore[no-untyped-def]
    """Go through steps.

    functions int64 (n,): addresses of functions of type TASK. places int64 (n,): where in `words`, int64
    that begin at the address `base`, each step is: a line; one for each thread, in which the tasks begun of
    its part are counted; operands. Counts are 0 at first. threads: how many go through at most.
    """
    workers = np.zeros(1, np.int64)
    for _ in prange(threads):
        worker = count(workers, 0, 1)
        for step in range(len(functions)):
            place = places[step]
            operands = base + _WORD * (place + LINE * (1 + threads))
            tasks = words[place + TASKS]
            if words[place + TASKS_AT]:
                tasks = _at(words[place + TASKS_AT])
            for turn in range(threads):
                part = (worker + turn) % threads
                first, last = part * tasks // threads, (part + 1) * tasks // threads
                begun, done = place + LINE * (1 + part), 0
                while True:
                    some = max(1, (last - first - _seen(words, begun)) // _SHARE)
                    begin = first + count(words, begun, some)
                    end = min(begin + some, last)
                    if begin >= end:
                        break
                    for task in range(begin, end):
                        _do(functions[step], operands, task, worker)
                    done += end - begin
                if done:
                    count(words, place + DONE, done)
            waits = 0
            while _seen(words, place + DONE) < tasks:
                waits += 1
                if waits < _WAITS:
                    _rest()
                else:
                    _give_way()


@writes_ir
def _do(_typing, function, place, task, worker):  # type: ignore[no-untyped-def]
    """Call a function by its address."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [_I64] * 3)
        b.call(b.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@writes_ir
def _at(_typing, address):  # type: ignore[no-untyped-def]
    """Read a word."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.load(b.inttoptr(args[0], _I64.as_pointer()))

    return types.int64(types.int64), generate


@writes_ir
def count(_typing, counters, index, more):  # type: ignore[no-untyped-def]
    """Add to a counter that threads share and return what it was; orders what they wrote, too.

    counters int64 (n,).
    """

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        place = _place(context, b, signature, args)
        return b.atomic_rmw("add", place, args[2], "acq_rel")

    return types.int64(counters, types.int64, types.int64), generate


@writes_ir
def _seen(_typing, counters, index):  # type: ignore[no-untyped-def]
    """Read a counter that threads share; what they wrote before they counted is seen after it."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        return b.load_atomic(_place(context, b, signature, args), "acquire", _WORD)

    return types.int64(counters, types.int64), generate


def _place(context: Any, b: ir.IRBuilder, signature: Any, args: Any) -> Any:
    struct_ = context.make_array(signature.args[0])(context, b, args[0])
    return cgutils.get_item_pointer(context, b, signature.args[0], struct_, [args[1]])


@writes_ir
def _rest(_typing):  # type: ignore[no-untyped-def]
    """Wait a little, leaving the core to what else runs on it."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        architecture = llvm.get_process_triple().split("-")[0]
        if architecture in ("x86_64", "i386", "i686"):
            call(b, "llvm.x86.sse2.pause", ir.VoidType())
        elif architecture in ("aarch64", "arm64"):
            call(b, "llvm.aarch64.hint", ir.VoidType(), ir.Constant(ir.IntType(32), 1))
        return context.get_dummy_value()

    return types.void(), generate


@writes_ir
def _give_way(_typing):  # type: ignore[no-untyped-def]
    """Let another thread have this core."""

    def generate(context, b, signature, args):  # type: ignore[no-untyped-def]
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        call(b, name, ir.IntType(32))
        return context.get_dummy_value()

    return types.void(), generate
