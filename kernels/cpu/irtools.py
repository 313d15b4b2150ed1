"""Small helps for functions that write LLVM IR for Numba: arrays as addresses, loads and stores anywhere."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I64 = ir.IntType(64)


def writes_ir(function: Any) -> Any:
    """Make what a kernel calls of a function that writes IR; strings are given to it as literals."""
    return intrinsic(prefer_literal=True)(function)


def addresses(context: Any, b: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> dict[int, Any]:
    """Give the addresses of those arguments that are arrays, by their position."""
    return {
        i: b.ptrtoint(context.make_array(kind)(context, b, args[i]).data, _I64)
        for i, kind in enumerate(signature.args)
        if isinstance(kind, types.Array)
    }


def moved(b: ir.IRBuilder, address: Any, offset: int | Any, times: int = 1) -> Any:
    """Move an address by `offset * times` bytes."""
    if isinstance(offset, int):
        return b.add(address, ir.Constant(_I64, offset * times))
    return b.add(address, b.mul(offset, ir.Constant(_I64, times)))


def load(b: ir.IRBuilder, address: Any, kind: Any) -> Any:
    """Load a value that need not be aligned."""
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def store(b: ir.IRBuilder, value: Any, address: Any) -> None:
    """Store a value that need not be aligned."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = 1


def call(b: ir.IRBuilder, name: str, result: Any, *operands: Any) -> Any:
    """Call an LLVM intrinsic."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), operands)


def splat(kind: Any, value: float) -> Any:
    """Make a vector constant with one value in all its elements."""
    return ir.Constant(kind, [value] * kind.count)


def spread(b: ir.IRBuilder, scalar: Any, count: int) -> Any:
    """Put one number into all elements of a vector."""
    kind = ir.VectorType(scalar.type, count)
    first = b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), count), None)
    return b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)


def integers(b: ir.IRBuilder, x: Any, kind: Any) -> Any:
    """Turn a vector's whole numbers, none beyond the integers of `kind`, into such; NaN becomes 0.

    `llvm.fptosi.sat` would be one number after another.
    """
    is_number = b.fcmp_ordered("ord", x, x)
    return b.fptosi(b.select(is_number, x, ir.Constant(x.type, None)), kind)
