"""The inner tiles of the products, in LLVM IR: some rows of weights times a few rows of activations.

Packed weights: a tile's 16 rows lie side by side, so that a 32-bit lane sums its own row and nothing is added
across a register. In each 32 columns the products are sums of integers; these become float32, are multiplied
by the activations' scale and the weights', and added to what the columns before came to: int8 by one after
the other, MXFP4 by their product, for it is exact. Activations are codes of int16 or int8 with a scale for
each 32 columns, see `activations`; an int16 is two signed bytes, 256 * high + low, which weights are
multiplied by in turn.

Dense weights: four rows as they are stored, times activations in float32.

A row of activations meets the same operations in the same order in a tile of any size, so its results have
the same bits.
"""

import functools
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from gptoss_lite.kernels.cpu import isa
from gptoss_lite.kernels.cpu.irtools import addresses, call, load, moved, splat, spread, store, writes_ir

ROWS = 16  # of a tile of packed weights
DENSE_ROWS = 4
BLOCK = 32  # columns that share a scale of the activations
_ONE = 127 << 23  # bits of 1.0
_AHEAD = 4096  # bytes of weights asked for ahead of their use by few tokens, past what a CPU does itself

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()


class _Writer:
    """What writing a tile's IR takes: loads, stores and arithmetic in registers of an ISA."""

    def __init__(self, b: ir.IRBuilder, kind: isa.ISA) -> None:
        self.b, self.isa = b, kind
        self.ints = ir.VectorType(_I32, kind.lanes)
        self.floats = ir.VectorType(_F32, kind.lanes)
        self.bytes = ir.VectorType(_I8, 4 * kind.lanes)
        self.halves = ir.VectorType(_I16, kind.lanes)

    def at(self, address: Any, offset: int | Any, times: int = 1) -> Any:
        """Move an address by `offset * times` bytes."""
        return moved(self.b, address, offset, times)

    def load(self, address: Any, kind: Any) -> Any:
        """Load a value that need not be aligned."""
        return load(self.b, address, kind)

    def store(self, value: Any, address: Any) -> None:
        """Store a value that need not be aligned."""
        store(self.b, value, address)

    def splat(self, scalar: Any) -> Any:
        """Put one number into all lanes."""
        return spread(self.b, scalar, self.isa.lanes)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """Compute x * y + z, rounded once where the CPU can."""
        suffix = f"v{self.isa.lanes}f32" if x.type == self.floats else "f32"
        return call(self.b, f"llvm.fmuladd.{suffix}", x.type, x, y, z)

    def ask_for(self, address: Any, level: int) -> None:
        """Have a cache line fetched for the first or the second level of cache."""
        read, locality, data = (ir.Constant(_I32, flag) for flag in (0, 4 - level, 1))
        pointer = self.b.inttoptr(address, _I8.as_pointer())
        call(self.b, "llvm.prefetch.p0i8", ir.VoidType(), pointer, read, locality, data)

    def zeros(self, count: int) -> list[Any]:
        """Make room for sums."""
        sums = [cgutils.alloca_once(self.b, self.floats) for _ in range(count)]
        for place in sums:
            self.b.store(ir.Constant(self.floats, [0.0] * self.isa.lanes), place)
        return sums


class _PackedTile(_Writer):
    """A tile of T tokens and 16 rows, of which each register holds a part."""

    def __init__(self, b: ir.IRBuilder, key: str, tokens: int) -> None:
        name, self.format, activations, _ = key.split("/")
        super().__init__(b, isa.by_name(name))
        self.tokens, self.passes = tokens, 1 if activations == "int8" else 2

    @property
    def code_bytes(self) -> int:
        """Bytes of the tile's codes in 32 columns."""
        return ROWS * BLOCK // (2 if self.format == "mxfp4" else 1)

    def weights(self, codes: Any, part: int) -> list[Any]:
        """Read 32 columns of a part of the rows: eight registers of four columns each."""
        b, places = self.b, range(4 * self.isa.lanes * part, self.code_bytes, 64)
        lines = [self.load(self.at(codes, place), self.bytes) for place in places]
        if self.format == "int8":
            bias = splat(self.bytes, self.isa.int8_bias)
            return [b.add(line, bias) for line in lines]
        registers = []
        for line in lines:
            upper = b.lshr(b.bitcast(line, self.ints), splat(self.ints, 4))
            registers += [self.isa.lookup(b, codes) for codes in (line, b.bitcast(upper, self.bytes))]
        return registers

    def scales(self, address: Any, part: int, is_fp16: Any) -> Any:
        """Read the scales of a part of the rows as float32."""
        b = self.b
        if self.format == "int8":
            stored = self.load(self.at(address, 2 * self.isa.lanes * part), self.halves)
            upper_half = b.shl(b.zext(stored, self.ints), splat(self.ints, 16))
            fp16 = b.bitcast(stored, ir.VectorType(ir.HalfType(), self.isa.lanes))
            return b.select(is_fp16, b.fpext(fp16, self.floats), b.bitcast(upper_half, self.floats))
        stored = self.load(self.at(address, self.isa.lanes * part), ir.VectorType(_I8, self.isa.lanes))
        # E8M0 is the exponent field of a float32; byte 0 is 2^-127, a subnormal.
        bits = b.shl(b.zext(stored, self.ints), splat(self.ints, 23))
        least = splat(self.ints, 1 << 22)
        return b.bitcast(b.select(b.icmp_signed(">", bits, least), bits, least), self.floats)

    def add_block(
        self, sums: Sequence[Any], weights: Sequence[Any], scales: Any, x: Any, x_scales: Any, starts: Any
    ) -> None:
        """Add to each token's sum the products of 32 columns."""
        b, tokens = self.b, range(self.tokens)
        first_sums = [self.splat(self.load(self.at(starts, 4 * t), _I32)) for t in tokens]
        zeros, eight = [ir.Constant(self.ints, None)] * self.tokens, splat(self.ints, 8)
        if self.passes == 1:
            totals = self.add_products(first_sums, weights, x, 0)
        elif self.tokens == 1:  # both passes at once: the one would wait for the other
            high, low = self.add_products(zeros, weights, x, 0), self.add_products(first_sums, weights, x, 1)
            totals = [b.add(b.shl(high[0], eight), low[0])]
        else:  # in one set of registers
            high = self.add_products(zeros, weights, x, 0)
            so_far = [b.add(b.shl(one, eight), start) for one, start in zip(high, first_sums, strict=True)]
            totals = self.add_products(so_far, weights, x, 1)
        factors = self.factors(x_scales, scales) if self.format == "mxfp4" else [scales] * self.tokens
        for t, (total, factor) in enumerate(zip(totals, factors, strict=True)):
            value = b.sitofp(total, self.floats)
            if self.format == "int8":
                value = b.fmul(value, self.splat(self.load(self.at(x_scales, 4 * t), _F32)))
            b.store(self.multiply_add(value, factor, b.load(sums[t])), sums[t])

    def factors(self, x_scales: Any, scales: Any) -> list[Any]:
        """Multiply each token's scale by powers of two, which is exact and does not wait for the products.

        A tile of many tokens waits for the multipliers: there exponents are added instead.
        """
        b, tokens = self.b, range(self.tokens)
        x_words = [self.splat(self.load(self.at(x_scales, 4 * t), _I32)) for t in tokens]
        if self.tokens < self.isa.tokens:
            return [b.fmul(b.bitcast(word, self.floats), scales) for word in x_words]
        bits, found = b.bitcast(scales, self.ints), [cgutils.alloca_once(b, self.floats) for _ in tokens]
        together = self.load(x_scales, ir.VectorType(_I32, self.tokens))
        is_moderate = b.and_(self.all_moderate(bits), self.all_moderate(together))
        with b.if_else(is_moderate, likely=True) as (moderate, extreme):
            with moderate:
                exponents = b.sub(bits, splat(self.ints, _ONE))
                for place, word in zip(found, x_words, strict=True):
                    b.store(b.bitcast(b.add(word, exponents), self.floats), place)
            with extreme:
                for place, word in zip(found, x_words, strict=True):
                    b.store(b.fmul(b.bitcast(word, self.floats), scales), place)
        return [b.load(place) for place in found]

    def all_moderate(self, words: Any) -> Any:
        """Tell whether all are the bits of floats from 2^-63 on and below 2^63, whose products are normal."""
        b, (least, most) = self.b, (_ONE + (exponent << 23) for exponent in (-63, 63))
        above = b.sub(words, splat(words.type, least))
        is_moderate = b.icmp_unsigned("<", above, splat(words.type, most - least))
        return call(b, f"llvm.vector.reduce.and.v{words.type.count}i1", ir.IntType(1), is_moderate)

    def add_products(self, totals: Sequence[Any], weights: Sequence[Any], x: Any, step: int) -> list[Any]:
        """Add 32 columns of one pass to each token's total; tokens take turns, so that none waits."""
        b, together = self.b, self.isa.together
        largest = 12 + self.isa.mxfp4_bias if self.format == "mxfp4" else 255
        chains = 1 if self.tokens > 2 or together > 1 else 4 // self.passes if self.tokens == 1 else 2
        sums = [[total, *[ir.Constant(self.ints, None)] * (chains - 1)] for total in totals]
        for first in range(0, 8, together):
            for t in range(self.tokens):
                place = (t * self.passes + step) * BLOCK + 4 * first
                fours = [self.load(self.at(x, place + 4 * i), _I32) for i in range(together)]
                xs = [b.bitcast(self.splat(four), self.bytes) for four in fours]
                chain = first % chains
                some = weights[first : first + together]
                sums[t][chain] = self.isa.dot(b, sums[t][chain], some, xs, largest)
        return [functools.reduce(b.add, chain) for chain in sums]

    def group(self, block: Any, group_blocks: Any) -> Any:
        """Say which of a row's scales is that of a block; each block of MXFP4 has its own."""
        return block if self.format == "mxfp4" else self.b.udiv(block, group_blocks)

    def write(
        self, codes: Any, scales: Any, is_fp16: Any, x: Any, x_scales: Any, starts: Any, y: Any,
        groups: Any, group_blocks: Any,
    ) -> None:  # fmt: skip
        """Write the whole tile; see `tile`."""
        b, lanes = self.b, self.isa.lanes
        is_fp16 = b.icmp_unsigned("!=", is_fp16, ir.Constant(_I64, 0))
        parts = list(range(ROWS // lanes))
        # One or two tokens wait for memory alone; with more there is time to fetch the next tile as a whole.
        blocks = b.mul(groups, group_blocks)
        whole = b.mul(blocks, ir.Constant(_I64, self.code_bytes))
        ahead, level = (_AHEAD, 1) if self.tokens <= 2 else (whole, 2)
        scale_bytes = ROWS * (1 if self.format == "mxfp4" else 2)
        # A single token's sums of all rows fit the registers: each cache line is then read once.
        for at_once in [parts] if self.tokens == 1 else [[part] for part in parts]:
            sums = {part: self.zeros(self.tokens) for part in at_once}
            with cgutils.for_range(b, blocks) as loop:
                block = loop.index
                block_codes = self.at(codes, block, self.code_bytes)
                for line in range(0, self.code_bytes, 64):
                    self.ask_for(self.at(self.at(block_codes, ahead), line), level)
                group = self.at(scales, self.group(block, group_blocks), scale_bytes)
                operands = (
                    self.at(x, block, self.tokens * self.passes * BLOCK),
                    self.at(x_scales, block, 4 * self.tokens),
                    self.at(starts, block, 4 * self.tokens),
                )
                for part in at_once:
                    factors = self.scales(group, part, is_fp16)
                    self.add_block(sums[part], self.weights(block_codes, part), factors, *operands)
            for part in at_once:
                for t, place in enumerate(sums[part]):
                    self.store(b.load(place), self.at(y, 4 * (t * ROWS + lanes * part)))


class _DenseTile(_Writer):
    """Four rows of bf16 or float32 weights times T tokens."""

    def __init__(self, b: ir.IRBuilder, key: str, tokens: int) -> None:
        name, self.format, _ = key.split("/")
        super().__init__(b, isa.by_name(name))
        self.tokens = tokens
        self.item = 2 if self.format == "bf16" else 4

    def columns(self, row: Any, column: Any) -> Any:
        """Read as many weights of a row as a register has lanes."""
        address = self.at(row, column, self.item)
        if self.format == "float32":
            return self.load(address, self.floats)
        wide = self.b.zext(self.load(address, self.halves), self.ints)
        return self.b.bitcast(self.b.shl(wide, splat(self.ints, 16)), self.floats)

    def one(self, row: Any, column: Any) -> Any:
        """Read one weight."""
        address = self.at(row, column, self.item)
        if self.format == "float32":
            return self.load(address, _F32)
        wide = self.b.zext(self.load(address, _I16), _I32)
        return self.b.bitcast(self.b.shl(wide, ir.Constant(_I32, 16)), _F32)

    def across(self, registers: list[Any]) -> list[Any]:
        """Add the lanes of each register: halves, quarters and so on -> the sums, one after another.

        Two registers at a time become one, with the sums of their halves. Lanes left over repeat some.
        """
        lanes, width = self.isa.lanes, self.isa.lanes  # width: lanes that a sum is still spread over
        while width > 1:
            width //= 2
            low = [lane for lane in range(2 * lanes) if lane // width % 2 == 0]
            high = [lane + width for lane in low]
            pairs = zip(registers[::2], registers[1::2] or registers, strict=True)
            registers = [self.b.fadd(self.pick(*pair, low), self.pick(*pair, high)) for pair in pairs]
        return registers

    def pick(self, x: Any, y: Any, lanes: Sequence[int]) -> Any:
        """Pick lanes of two registers."""
        kind = ir.VectorType(_I32, len(lanes))
        return self.b.shuffle_vector(x, y, ir.Constant(kind, list(lanes)))

    def rows(self, first: Any, stride: Any, count: Any, wanted: int) -> list[Any]:
        """Give the addresses of so many rows; past the last of `count` there is, that one again."""
        b, last = self.b, self.b.sub(count, ir.Constant(_I64, 1))
        indices = [ir.Constant(_I64, i) for i in range(wanted)]
        clamped = [b.select(b.icmp_unsigned("<", i, last), i, last) for i in indices]
        return [b.add(first, b.mul(index, stride)) for index in clamped]

    def write(
        self, weights: Any, weight_stride: Any, rows: Any, x: Any, x_stride: Any, tokens: Any, y: Any,
        columns: Any,
    ) -> None:  # fmt: skip
        """Write the whole tile; see `dense_tile`."""
        b, lanes = self.b, ir.Constant(_I64, self.isa.lanes)
        w_rows = self.rows(weights, weight_stride, rows, DENSE_ROWS)
        x_rows = self.rows(x, x_stride, tokens, self.tokens)
        sums = self.zeros(DENSE_ROWS * self.tokens)
        with cgutils.for_range(b, b.udiv(columns, lanes)) as loop:
            column = b.mul(loop.index, lanes)
            if self.tokens == 1:
                for row in w_rows:
                    self.ask_for(self.at(self.at(row, column, self.item), _AHEAD), 1)
            w = [self.columns(row, column) for row in w_rows]
            for t, row in enumerate(x_rows):
                value = self.load(self.at(row, column, 4), self.floats)
                for i in range(DENSE_ROWS):
                    place = sums[t * DENSE_ROWS + i]
                    b.store(self.multiply_add(w[i], value, b.load(place)), place)
        found, lanes_wanted = self.across([b.load(place) for place in sums]), min(len(sums), self.isa.lanes)
        for index, register in enumerate(found):
            part = self.pick(register, register, range(lanes_wanted))
            self.store(part, self.at(y, 4 * self.isa.lanes * index))
        whole = b.sub(columns, b.urem(columns, lanes))
        with cgutils.for_range(b, b.sub(columns, whole)) as loop:
            column = b.add(whole, loop.index)
            w = [self.one(row, column) for row in w_rows]
            for t, row in enumerate(x_rows):
                value = self.load(self.at(row, column, 4), _F32)
                for i in range(DENSE_ROWS):
                    place = self.at(y, 4 * (t * DENSE_ROWS + i))
                    self.store(self.multiply_add(w[i], value, self.load(place, _F32)), place)


@writes_ir
def tile(  # type: ignore[no-untyped-def]
    _typing, key, room, weights, codes_at, scales_at, is_fp16, x, x_scales, starts, slot, y, y_at,
    groups, group_blocks,
):  # fmt: skip
    """Write y[t, r] = weights[r] @ x[t] for 16 rows of packed weights and a chunk of activations.

    key: "isa/mxfp4 or int8/accurate or int8/mark", see isa.key. room: how many tokens the chunk has room for,
    all of which are computed: 1, 2, 4 or the ISA's. weights: uint8, in which the tile's codes begin at
    codes_at, uint8 (K/32, 4, 16, 4) of MXFP4 or int8 (K/4, 16, 4), and its scales at scales_at: (groups, 16)
    of E8M0, or the bits of fp16 if is_fp16, else of bf16, each of group_blocks * 32 columns.
    x, x_scales, starts: the chunk begins at `slot`, see `activations`. y float32, (room, 16) from y_at on.
    """
    spelt = key.literal_value

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        arrays = addresses(context, builder, signature, args)
        w = _PackedTile(builder, spelt, 1)
        _, room, _, codes_at, scales_at, is_fp16, _, _, _, slot, _, y_at, groups, group_blocks = args
        blocks = builder.mul(groups, group_blocks)
        block = builder.mul(slot, blocks)
        operands = (
            w.at(arrays[2], codes_at), w.at(arrays[2], scales_at), is_fp16,
            w.at(arrays[6], block, w.passes * BLOCK), w.at(arrays[7], block, 4), w.at(arrays[8], block, 4),
            w.at(arrays[10], y_at, 4), groups, group_blocks,
        )  # fmt: skip
        for tokens in sorted({1, 2, 4, w.isa.tokens}):
            with builder.if_then(builder.icmp_signed("==", room, ir.Constant(_I64, tokens))):
                _PackedTile(builder, spelt, tokens).write(*operands)
        return context.get_dummy_value()

    integers = types.int64
    return types.void(
        key, integers, weights, integers, integers, types.boolean, x, x_scales, starts, integers, y, integers,
        integers, integers,
    ), generate  # fmt: skip


@writes_ir
def dense_tile(_typing, key, weights, weights_at, rows, x, row, count, y):  # type: ignore[no-untyped-def]
    """Write y[t, i] = weights[i] @ x[row + t] for four rows and some tokens.

    key: "isa/bf16 or float32/mark". weights: the bits of bf16 as uint16 or of float32 as uint32, rows of K
    from element weights_at on. rows: how many there are of the four, and count: how many tokens, one or as
    many as half the ISA's; what is missing repeats the last. x float32 (R, K), y float32 (tokens, 4).
    """
    spelt = key.literal_value

    def generate(context, builder, signature, args):  # type: ignore[no-untyped-def]
        arrays = addresses(context, builder, signature, args)
        w = _DenseTile(builder, spelt, 1)
        _, _, weights_at, rows, _, row, count, _ = args
        columns = context.make_array(signature.args[4])(context, builder, args[4]).shape
        columns = builder.extract_value(columns, 1)
        stride, x_stride = (builder.mul(columns, ir.Constant(_I64, item)) for item in (w.item, 4))
        operands = (
            w.at(arrays[1], weights_at, w.item), stride, rows,
            builder.add(arrays[4], builder.mul(row, x_stride)), x_stride, count, arrays[7], columns,
        )  # fmt: skip
        with builder.if_else(builder.icmp_signed("==", count, ir.Constant(_I64, 1))) as (one, several):
            for branch, tokens in ((one, 1), (several, dense_tokens(w.isa))):
                with branch:
                    _DenseTile(builder, spelt, tokens).write(*operands)
        return context.get_dummy_value()

    integers = types.int64
    return types.void(key, weights, integers, integers, x, integers, integers, y), generate


def dense_tokens(kind: isa.ISA) -> int:
    """How many tokens a tile of dense weights takes at once."""
    return kind.tokens // 2
