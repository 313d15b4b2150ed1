"""Run a compiled function on several threads without compiling it into the parallel loop that does.

Numba compiles a loop's body four times over, once for each function that it wraps around it. So what is long
is a function of its own, which the loop calls by its address and gives the address of its arguments.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, imputils
from numba.core.errors import TypingError

from gptoss_lite.kernels.cpu.irtools import writes_ir

ADDRESS = types.int64
_I64 = ir.IntType(64)


def array(kind: Any, dimensions: int) -> types.Array:
    """Give Numba's type of a contiguous array."""
    return types.Array(kind, dimensions, "C")


def arguments(*kinds: Any) -> tuple[Any, Any]:
    """Make what puts arguments of these types where threads find them, and what reads them there.

    The first takes a tuple and gives its address, good until the function that called it returns; the second
    takes the address and gives the tuple.
    """
    expected = types.Tuple(kinds)

    def pack(_typing, values):  # type: ignore[no-untyped-def]
        given = types.Tuple([_writable(kind) for kind in values])
        if given != expected:
            raise TypingError(f"arguments are {given}: they are to be {expected}")

        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.ptrtoint(cgutils.alloca_once_value(builder, args[0]), _I64)

        return ADDRESS(values), generate

    def read(_typing, address):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
            place = builder.inttoptr(args[0], context.get_value_type(expected).as_pointer())
            return imputils.impl_ret_borrowed(context, builder, expected, builder.load(place))

        return expected(ADDRESS), generate

    return writes_ir(pack), writes_ir(read)


def _writable(kind: Any) -> Any:
    """Give an array's type without what has no part in how it lies in memory."""
    return kind.copy(readonly=False) if isinstance(kind, types.Array) else kind


@writes_ir
def call(_typing, function, address):  # type: ignore[no-untyped-def]
    """Call a function by its address with the address of its arguments."""

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [_I64])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS), generate


@writes_ir
def count(_typing, counters, index):  # type: ignore[no-untyped-def]
    """Add 1 to a counter that threads share and return what it was; orders what they wrote, too.

    counters int64 (n,).
    """

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        struct = context.make_array(signature.args[0])(context, builder, args[0])
        place = cgutils.get_item_pointer(context, builder, signature.args[0], struct, [args[1]])
        return builder.atomic_rmw("add", place, ir.Constant(_I64, 1), "acq_rel")

    return types.int64(counters, types.int64), generate
