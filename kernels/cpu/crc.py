"""CRC-32, zlib's, by multiplication without carries, many times as fast, and NaN and infinity on the way.

A message is a polynomial over GF(2), first bit highest, and its CRC what is left of it modulo P. Registers
of it that lie D bits apart may be added up where the earlier one is multiplied by x^D modulo P: so a long
message is folded into a few registers with the same remainder, of which zlib makes the CRC. After V. Gopal et
al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel, 2009.
"""

import zlib
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from gptoss_lite.kernels.cpu import Array, isa

_POLYNOMIAL = 0x104C11DB7
_REGISTERS = 4  # folded side by side: products take a few cycles
_LANE = 16  # bytes that one product folds
_ONES = 0xFFFFFFFF
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
# Lanes of a register: what LLVM calls their product, and the instructions that it takes.
_PRODUCTS = {
    4: ("llvm.x86.pclmulqdq.512", frozenset({"vpclmulqdq", "avx512f"})),
    2: ("llvm.x86.pclmulqdq.256", frozenset({"vpclmulqdq", "avx2"})),
    1: ("llvm.x86.pclmulqdq", frozenset({"pclmul"})),
}


def _power(exponent: int) -> int:
    """Compute x^exponent modulo P, as an operand: in zlib's order of bits, the highest power in bit 1."""
    power = 1
    for _ in range(exponent):
        power <<= 1
        if power >> 32:
            power ^= _POLYNOMIAL
    return int(f"{power:032b}"[::-1], 2) << 1


def _folder(lanes: int) -> Any:
    """Make an operation that folds a message into four registers of so many lanes of 128 bits.

    It takes the address of the message, how often four registers go into it, the CRC's register before it, 32
    bits to mask each 32 of the message with, neither half of which may then equal that of 32 bits more, and
    the address where the four registers go and, after them, one with ones in each 16 bits where one did.
    """
    name, _ = _PRODUCTS[lanes]
    vector, halves = ir.VectorType(_I64, 2 * lanes), ir.VectorType(_I16, 8 * lanes)
    width = _LANE * lanes
    distance = 8 * width * _REGISTERS
    # The first half of a lane is 64 bits ahead of the second, and a power in the low half of 64 bits, their
    # highest powers, counts 32 more than it says.
    powers = ir.Constant(vector, [_power(distance + 32), _power(distance - 32)] * lanes)

    @intrinsic
    def fold(typing, message, steps, crc, mask, unwanted, registers):  # type: ignore[no-untyped-def]
        def build(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            message, steps, crc, mask, unwanted, registers = arguments
            multiply = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector, vector, _I8]), name
            )

            def pointer(base: Any, register: int) -> Any:
                address = builder.add(base, ir.Constant(base.type, width * register))
                return builder.inttoptr(address, vector.as_pointer())

            def every(bits: Any) -> Any:
                """Put 32 bits into every 32 of a register."""
                pair = builder.mul(bits, ir.Constant(_I64, (1 << 32) + 1))
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), pair, ir.Constant(_I32, 0))
                first = ir.Constant(ir.VectorType(_I32, 2 * lanes), [0] * 2 * lanes)
                return builder.shuffle_vector(one, one, first)

            def look_at(bits: Any) -> None:
                masked = builder.bitcast(builder.and_(bits, every(mask)), halves)
                is_bad = builder.icmp_signed("==", masked, builder.bitcast(every(unwanted), halves))
                builder.store(builder.or_(builder.load(found), builder.sext(is_bad, halves)), found)

            found = cgutils.alloca_once_value(builder, ir.Constant(halves, [0] * halves.count))
            folded = [cgutils.alloca_once(builder, vector) for _ in range(_REGISTERS)]
            for i, register in enumerate(folded):
                first = builder.load(pointer(message, i), align=1)
                look_at(first)
                if i == 0:  # what came before is added to the first 32 bits
                    zeros = ir.Constant(vector, [0] * 2 * lanes)
                    before = builder.insert_element(zeros, crc, ir.Constant(_I32, 0))
                    first = builder.xor(first, before)
                builder.store(first, register)
            one = ir.Constant(steps.type, 1)
            with cgutils.for_range(builder, steps, start=one) as loop:
                offset = builder.mul(loop.index, ir.Constant(message.type, width * _REGISTERS))
                at = builder.add(message, offset)
                for i, register in enumerate(folded):
                    bits = builder.load(register)
                    low = builder.call(multiply, [bits, powers, ir.Constant(_I8, 0x00)])
                    high = builder.call(multiply, [bits, powers, ir.Constant(_I8, 0x11)])
                    following = builder.load(pointer(at, i), align=1)
                    look_at(following)
                    builder.store(builder.xor(builder.xor(low, high), following), register)
            for i, register in enumerate(folded):
                builder.store(builder.load(register), pointer(registers, i), align=1)
            bits = builder.bitcast(builder.load(found), vector)
            builder.store(bits, pointer(registers, _REGISTERS), align=1)
            return context.get_dummy_value()

        number = types.int64
        return types.void(types.intp, types.intp, number, number, number, types.intp), build

    return fold


_fold_1, _fold_2, _fold_4 = (_folder(lanes) for lanes in (1, 2, 4))


@njit(nogil=True, cache=True)
def _read_1(message: int, steps: int, crc: int, mask: int, unwanted: int, registers: int) -> None:
    _fold_1(message, steps, crc, mask, unwanted, registers)


@njit(nogil=True, cache=True)
def _read_2(message: int, steps: int, crc: int, mask: int, unwanted: int, registers: int) -> None:
    _fold_2(message, steps, crc, mask, unwanted, registers)


@njit(nogil=True, cache=True)
def _read_4(message: int, steps: int, crc: int, mask: int, unwanted: int, registers: int) -> None:
    _fold_4(message, steps, crc, mask, unwanted, registers)


_KERNELS = {1: _read_1, 2: _read_2, 4: _read_4}


@cache
def usable() -> tuple[int, ...]:
    """List the numbers of lanes that this host's registers may have, the best first; none is for zlib."""
    features = isa.features()
    return tuple(lanes for lanes, (_, needed) in _PRODUCTS.items() if needed <= features)


def read(data: Array, value: int, lanes: int, exponent: int = 0) -> tuple[int, int]:
    """Read through data in registers of so many lanes -> zlib.crc32(data, value), bytes found to be finite.

    data: uint8 (n,), contiguous, at any address. exponent: its bits of a float32, or of each of two floats of
    16 bits. Of so many bytes at the beginning, no float has all of them set: 0 where one has, else all but
    the last few hundred.
    """
    width = _LANE * lanes
    steps = data.size // (width * _REGISTERS)
    if steps == 0:
        return zlib.crc32(data.data, value), 0
    # A half without a bit of the exponent, as float32 has one, is 0 when masked and can never be 1.
    unwanted = (exponent & 0xFFFF or 1) | (exponent >> 16 or 1) << 16
    registers = np.empty(width * (_REGISTERS + 1), np.uint8)
    # zlib keeps the complement of what is left; of one whose complement is all ones, nothing is left.
    _KERNELS[lanes](data.ctypes.data, steps, value ^ _ONES, exponent, unwanted, registers.ctypes.data)
    folded, found = np.split(registers, [width * _REGISTERS])
    end = steps * folded.size
    crc = zlib.crc32(data[end:].data, zlib.crc32(folded.data, _ONES))
    return crc, 0 if found.any() else end
