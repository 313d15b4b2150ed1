"""Which vector instructions this CPU has, and how each kind of CPU does what the tiles are made of.

An ISA writes LLVM IR for two steps: looking MXFP4 codes up, and the dot products of four signed bytes in
each 32-bit lane. All else about a tile is the same everywhere, and so are its results, bit for bit, on every
CPU that has fused multiply-add.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import llvmlite.binding as llvm
import numba
from llvmlite import ir

from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cpu.irtools import call, splat

VARIABLE = "GPTOSS_LITE_CPU"
DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value of each E2M1 code

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)


@dataclass(frozen=True, slots=True)
class ISA:
    """A kind of CPU; this one is any that LLVM knows.

    lanes: 32-bit lanes of a register. tokens: how many a tile multiplies at once, which with the registers
    for decoded weights must fit the register file. together: registers that `dot` takes at once. features:
    what LLVM calls the instructions, any of these sets. mxfp4_bias, int8_bias: added to each doubled MXFP4
    value and int8 code where dot products take unsigned bytes; a sum then starts at -bias times that of its
    activations.
    """

    name: ClassVar[str] = "generic"
    lanes: ClassVar[int] = 4
    tokens: ClassVar[int] = 4
    together: ClassVar[int] = 1
    features: ClassVar[tuple[frozenset[str], ...]] = (frozenset(),)
    mxfp4_bias: ClassVar[int] = 0
    int8_bias: ClassVar[int] = 0

    def lookup(self, b: ir.IRBuilder, codes: Any) -> Any:
        """Turn codes, the lower halves of bytes, into doubled values plus bias; upper halves do not matter.

        This is by arithmetic: 0 1 2 3 4 5+1 6+2 7+5.
        """
        kind = codes.type
        magnitude = b.and_(codes, splat(kind, 7))
        value = magnitude
        for least, more in ((5, 1), (6, 1), (7, 3)):
            reached = b.icmp_unsigned(">=", magnitude, splat(kind, least))
            value = b.add(value, b.select(reached, splat(kind, more), splat(kind, 0)))
        is_positive = b.icmp_unsigned("==", b.and_(codes, splat(kind, 8)), splat(kind, 0))
        return b.select(is_positive, value, b.neg(value))

    def dot(
        self, b: ir.IRBuilder, total: Any, weights: Sequence[Any], xs: Sequence[Any], largest: int
    ) -> Any:
        """Add to each 32-bit lane of `total` the products of its four bytes, in `together` registers.

        weights: registers of bytes, none larger than `largest`; xs: registers of signed bytes, of which none
        is -128.
        """
        wide = ir.VectorType(_I32, 4 * self.lanes)
        for w, x in zip(weights, xs, strict=True):
            products = b.mul(b.sext(w, wide), b.sext(x, wide))
            for i in range(4):
                every_fourth = ir.Constant(ir.VectorType(_I32, self.lanes), list(range(i, 4 * self.lanes, 4)))
                total = b.add(total, b.shuffle_vector(products, products, every_fourth))
        return total


class AVX2(ISA):
    """256-bit registers; pairs of products meet in 16 bits, which hold those of MXFP4 four times over."""

    name = "avx2"
    lanes = 8
    together = 4
    features: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"avx2", "fma"}),)
    mxfp4_bias = 12

    def lookup(self, b: ir.IRBuilder, codes: Any) -> Any:
        """See ISA.lookup."""
        return _shuffle(b, "llvm.x86.avx2.pshuf.b", codes, self.mxfp4_bias)

    def dot(
        self, b: ir.IRBuilder, total: Any, weights: Sequence[Any], xs: Sequence[Any], largest: int
    ) -> Any:
        """See ISA.dot; the unsigned operand is the weight's magnitude, its sign goes to the activation."""
        pairs_type, lanes_type = ir.VectorType(_I16, 16), ir.VectorType(_I32, 8)
        is_signed = largest > self.mxfp4_bias + DOUBLED[7]
        pairs = []
        for w, x in zip(weights, xs, strict=True):
            if is_signed:
                x = call(b, "llvm.x86.avx2.psign.b", x.type, x, w)
                w = b.select(b.icmp_signed("<", w, splat(w.type, 0)), b.neg(w), w)
            pairs.append(call(b, "llvm.x86.avx2.pmadd.ub.sw", pairs_type, w, x))
        if not is_signed:  # four such sums of two fit 16 bits
            pairs = [functools.reduce(b.add, pairs)]
        for pair in pairs:
            ones = splat(pairs_type, 1)
            total = b.add(total, call(b, "llvm.x86.avx2.pmadd.wd", lanes_type, pair, ones))
        return total


class AVXVNNI(AVX2):
    """256-bit registers with byte dot products."""

    name = "avxvnni"
    features = (
        frozenset({"avx2", "fma", "avxvnni"}),
        frozenset({"avx2", "fma", "avx512vnni", "avx512vl"}),
    )
    together = 1
    int8_bias = 128

    def dot(
        self, b: ir.IRBuilder, total: Any, weights: Sequence[Any], xs: Sequence[Any], largest: int
    ) -> Any:
        """See ISA.dot."""
        return _vpdpbusd(b, "llvm.x86.avx512.vpdpbusd.256", total, weights, xs)


class AVX512(ISA):
    """512-bit registers with byte dot products."""

    name = "avx512"
    lanes = 16
    tokens = 8
    features = (frozenset({"avx512f", "avx512bw", "avx512vnni"}),)
    mxfp4_bias = 12
    int8_bias = 128

    def lookup(self, b: ir.IRBuilder, codes: Any) -> Any:
        """See ISA.lookup."""
        return _shuffle(b, "llvm.x86.avx512.pshuf.b.512", codes, self.mxfp4_bias)

    def dot(
        self, b: ir.IRBuilder, total: Any, weights: Sequence[Any], xs: Sequence[Any], largest: int
    ) -> Any:
        """See ISA.dot."""
        return _vpdpbusd(b, "llvm.x86.avx512.vpdpbusd.512", total, weights, xs)


class AVX512VBMI(AVX512):
    """AVX-512 with a look-up by six bits: in a table of four times the same, the upper two do not matter."""

    name = "avx512vbmi"
    features = (frozenset({"avx512f", "avx512bw", "avx512vnni", "avx512vbmi"}),)

    def lookup(self, b: ir.IRBuilder, codes: Any) -> Any:
        """See ISA.lookup."""
        table = _table(codes.type, self.mxfp4_bias)
        return call(b, "llvm.x86.avx512.permvar.qi.512", codes.type, table, codes)


class NEON(ISA):
    """128-bit registers of an Arm CPU with byte dot products (Armv8.2 and later, Apple's)."""

    name = "neon"
    tokens = 8
    features = (frozenset({"neon", "dotprod"}),)

    def lookup(self, b: ir.IRBuilder, codes: Any) -> Any:
        """See ISA.lookup."""
        nibbles = b.and_(codes, splat(codes.type, 15))
        return call(b, "llvm.aarch64.neon.tbl1.v16i8", codes.type, _table(codes.type, 0), nibbles)

    def dot(
        self, b: ir.IRBuilder, total: Any, weights: Sequence[Any], xs: Sequence[Any], largest: int
    ) -> Any:
        """See ISA.dot."""
        for w, x in zip(weights, xs, strict=True):
            total = call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, total, w, x)
        return total


KINDS: tuple[ISA, ...] = (AVX512VBMI(), AVX512(), AVXVNNI(), AVX2(), NEON(), ISA())  # the best first


def by_name(name: str) -> ISA:
    """Return the ISA of that name."""
    return next(kind for kind in KINDS if kind.name == name)


@cache
def usable() -> tuple[str, ...]:
    """Name the kinds that this host can run, the best first."""
    here = features()
    return tuple(kind.name for kind in KINDS if any(needed <= here for needed in kind.features))


def host() -> ISA:
    """Choose the best kind that this host can run, or the one that GPTOSS_LITE_CPU names.

    Raises DeviceError where that is none, or none that this host has.
    """
    names = usable()
    name = os.environ.get(VARIABLE) or names[0]
    if name not in names:
        raise DeviceError(f"{VARIABLE} is {name!r}: this CPU can run {', '.join(names)}")
    return by_name(name)


def key(*parts: str) -> str:
    """Spell what a tile is compiled for, and add a mark that changes with the sources of these kernels.

    Kernels close over it: Numba keeps what it compiled by the values that a function closes over, but does
    not notice when something that the function calls has changed.
    """
    return "/".join((*parts, _sources()))


@cache
def _sources() -> str:
    digest = blake2b(digest_size=6)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def features() -> frozenset[str]:
    """List what LLVM may use: of the host, unless Numba was told otherwise."""
    config: Any = numba.config
    if config.CPU_FEATURES is not None:
        named = config.CPU_FEATURES.split(",")
        return frozenset(feature[1:] for feature in named if feature.startswith("+"))
    if config.CPU_NAME == "generic":
        return frozenset()
    return frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)


def _shuffle(b: ir.IRBuilder, name: str, codes: Any, bias: int) -> Any:
    nibbles = b.and_(codes, splat(codes.type, 15))
    return call(b, name, codes.type, _table(codes.type, bias), nibbles)


def _table(kind: Any, bias: int) -> Any:
    return ir.Constant(kind, [value + bias for value in DOUBLED] * (kind.count // 16))


def _vpdpbusd(b: ir.IRBuilder, name: str, total: Any, weights: Sequence[Any], xs: Sequence[Any]) -> Any:
    for w, x in zip(weights, xs, strict=True):
        total = call(b, name, total.type, total, b.bitcast(w, total.type), b.bitcast(x, total.type))
    return total
