"""Steps of kernels written in LLVM IR, as functions that Numba code calls.

Vectors have 16 lanes on every CPU: LLVM makes of them as many registers as it takes.
"""

from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, Signature, signature
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from gptoss_lite.kernels.cpu.irtools import call, splat, spread, writes_ir

LANES = 16

F32 = ir.FloatType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOATS, INTS = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class _Bf16Pairs(ir.Type):  # type: ignore[misc]
    """What `vdpbf16ps` takes, a type that llvmlite has no name for."""

    def _to_string(self) -> str:
        return "<32 x bfloat>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bf16Pairs)

    def __hash__(self) -> int:
        return hash(_Bf16Pairs)


class Elements:
    """An array argument of a step, C-contiguous; the length of its first axis is of no interest."""

    def __init__(self, b: ir.IRBuilder, pointer: Any, lengths: Sequence[Any]) -> None:
        self._b, self._pointer, self._lengths = b, pointer, lengths

    def at(self, first: Any, *indices: Any) -> Any:
        """Point at an element; indices that are not given are 0."""
        offset = i64(first)
        for axis, length in enumerate(self._lengths):
            offset = self._b.mul(offset, i64(length))
            if axis < len(indices):
                offset = self._b.add(offset, i64(indices[axis]))
        return self._b.gep(self._pointer, [offset])

    def length(self, axis: int) -> Any:
        """Give the length of an axis but the first."""
        return i64(self._lengths[axis - 1])


class Writer:
    """What writing a step takes: loads, stores and arithmetic, of indices and of vectors."""

    def __init__(self, b: ir.IRBuilder, key: str) -> None:
        self.b, self.key = b, key

    def add(self, x: Any, y: Any) -> Any:
        """Add two indices."""
        return self.b.add(i64(x), i64(y))

    def times(self, x: Any, y: Any) -> Any:
        """Multiply two indices."""
        return self.b.mul(i64(x), i64(y))

    def over(self, x: Any, y: int) -> Any:
        """Divide an index, rounding down."""
        return self.b.udiv(x, i64(y))

    def least(self, x: Any, y: Any) -> Any:
        """Give the smaller of two indices."""
        return self.b.select(self.b.icmp_signed("<", i64(x), i64(y)), i64(x), i64(y))

    def most(self, x: Any, y: Any) -> Any:
        """Give the larger of two indices."""
        return self.b.select(self.b.icmp_signed(">", i64(x), i64(y)), i64(x), i64(y))

    def loop(self, stop: Any, start: Any = 0) -> Any:
        """Repeat what is written in a `with` block, for an index from start to stop - 1."""
        return cgutils.for_range(self.b, i64(stop), start=i64(start))

    def moved(self, pointer: Any, elements: Any) -> Any:
        """Point so many elements further."""
        return self.b.gep(pointer, [i64(elements)])

    def load(self, pointer: Any, kind: Any = FLOATS) -> Any:
        """Load a value that need not be aligned."""
        value = self.b.load(self.b.bitcast(pointer, kind.as_pointer()))
        value.align = 2
        return value

    def store(self, value: Any, pointer: Any) -> None:
        """Store a value that need not be aligned."""
        self.b.store(value, self.b.bitcast(pointer, value.type.as_pointer())).align = 2

    def variables(self, values: Sequence[Any]) -> list[Any]:
        """Make variables that have these values to begin with."""
        return [cgutils.alloca_once_value(self.b, value) for value in values]

    def splat(self, scalar: Any) -> Any:
        """Put one number into all lanes."""
        return spread(self.b, scalar, LANES)

    def shuffle(self, x: Any, y: Any, lanes: Sequence[int]) -> Any:
        """Pick lanes of two vectors."""
        return self.b.shuffle_vector(x, y, ir.Constant(INTS, list(lanes)))

    def call(self, name: str, result: Any, *operands: Any) -> Any:
        """Call an LLVM intrinsic."""
        return call(self.b, name, result, *operands)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """Compute x * y + z, rounded once where the CPU can."""
        return self.call("llvm.fmuladd.v16f32", FLOATS, x, y, z)

    def larger(self, x: Any, y: Any) -> Any:
        """Give the larger of two floats in each lane, and NaN where y is."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def halves(self, pairs: Any) -> tuple[Any, Any]:
        """Split pairs of bf16 into the lower and the upper, as float32."""
        lower = self.b.shl(pairs, same_word(16))
        upper = self.b.and_(pairs, same_word(0xFFFF0000))
        return self.b.bitcast(lower, FLOATS), self.b.bitcast(upper, FLOATS)

    def add_pairs(self, total: Any, x: Any, y: Any) -> Any:
        """Add to each lane the products of its pairs of bf16."""
        pairs = (self.b.bitcast(operand, _Bf16Pairs()) for operand in (x, y))
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, *pairs)

    def across(self, rows: Sequence[Any], join: Callable[[Any, Any], Any]) -> Any:
        """Join the lanes of each of eight vectors; row r's result is in lanes r and 8 + r."""

        def halve(rows: Sequence[Any], lanes: Sequence[int], others: Sequence[int]) -> list[Any]:
            pairs = zip(rows[::2], rows[1::2], strict=True)
            return [join(self.shuffle(x, y, lanes), self.shuffle(x, y, others)) for x, y in pairs]

        eights = halve(rows, quads(0, 1, 4, 5), quads(2, 3, 6, 7))
        fours = halve(eights, quads(0, 2, 4, 6), quads(1, 3, 5, 7))
        first = of_each_quad(0, 1, LANES, LANES + 1)
        (twos,) = halve(fours, first, [lane + 2 for lane in first])
        ones = join(twos, self.shuffle(twos, twos, [lane ^ 1 for lane in range(LANES)]))
        return self.shuffle(ones, ones, [0, 4, 8, 12, 2, 6, 10, 14] * 2)

    def ask_for(self, pointer: Any, level: int) -> None:
        """Have a line fetched for the first or the second level of cache."""
        place = self.b.bitcast(pointer, I8.as_pointer())
        read, locality, data = (ir.Constant(I32, flag) for flag in (0, 4 - level, 1))
        self.call("llvm.prefetch.p0i8", ir.VoidType(), place, read, locality, data)


def step(writer: type[Writer], **known: Sequence[int | None]) -> Callable[[Callable[..., None]], Any]:
    """Make what a kernel calls of a function that writes IR: function(writer, *operands).

    The call begins with a key, a literal string, which the writer gets. Arrays come as Elements, floats as
    they are and the rest as int64. known: lengths of some arrays' axes. What is written becomes a function of
    its own in LLVM as well, for beside the loops around it there would not be registers enough.
    """

    def decorated(write: Callable[..., None]) -> Any:
        names = list(signature(write).parameters)[1:]

        def lengths(name: str, kind: types.Array) -> Sequence[int | None]:
            return known.get(name, [None] * kind.ndim)[1:]

        def flat(context: Any, b: ir.IRBuilder, kinds: Sequence[Any], args: Sequence[Any]) -> Iterator[Any]:
            """Give what the function needs: of an array where it begins, and lengths that are not known."""
            for name, kind, value in zip(names, kinds, args, strict=True):
                if not isinstance(kind, types.Array):
                    yield value
                    continue
                array = context.make_array(kind)(context, b, value)
                yield array.data
                shape = cgutils.unpack_tuple(b, array.shape)[1:]
                yield from (x for x, y in zip(shape, lengths(name, kind), strict=True) if y is None)

        def operands(b: ir.IRBuilder, kinds: Sequence[Any], given: Iterator[Any]) -> Iterator[Any]:
            for name, kind in zip(names, kinds, strict=True):
                value = next(given)
                if isinstance(kind, types.Array):
                    shape = [next(given) if y is None else y for y in lengths(name, kind)]
                    value = Elements(b, value, shape)
                yield value

        def typed(_typing: Any, key: Any, *given: Any) -> Any:
            kinds = [kind if isinstance(kind, types.Array | types.Float) else types.int64 for kind in given]

            def generate(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> Any:
                values = list(flat(context, builder, kinds, args[1:]))
                name = f"{write.__name__} {key.literal_value}"
                function = builder.module.globals.get(name)
                if function is None:
                    whole = ir.FunctionType(ir.VoidType(), [value.type for value in values])
                    function = ir.Function(builder.module, whole, name)
                    function.linkage = "internal"
                    function.attributes.add("noinline")
                    b = ir.IRBuilder(function.append_basic_block())
                    write(writer(b, key.literal_value), *operands(b, kinds, iter(function.args)))
                    b.ret_void()
                builder.call(function, values)
                return context.get_dummy_value()

            return types.void(key, *kinds), generate

        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("_typing", "key", *names)]
        typed.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return writes_ir(typed)

    return decorated


def i64(index: Any) -> Any:
    """Give an index as a value of the IR."""
    return ir.Constant(I64, index) if isinstance(index, int) else index


def same_float(value: float) -> Any:
    """Make a vector of floats that are all the same."""
    return splat(FLOATS, float(np.float32(value)))


def same_word(value: int) -> Any:
    """Make a vector of 32-bit words that are all the same."""
    return splat(INTS, value)


def quads(*indices: int) -> list[int]:
    """List the lanes of these groups of four."""
    return [4 * index + i for index in indices for i in range(4)]


def of_each_quad(*lanes: int) -> list[int]:
    """List the same lanes of each group of four."""
    return [lane + 4 * quad for quad in range(4) for lane in lanes]
