"""The inner steps of attention, in LLVM IR: eight query rows against 64 keys at a time.

An octet is up to eight heads of one token that share a key head; past the last of them, that one again. Keys
lie side by side, 16 to a vector, so that a score is summed in its own lane: dimension by dimension. Values
are summed key by key, in the order of their positions, and the 64 keys of a part are all that meets at once;
a row's largest score so far, in units of log2, is what its sums are relative to. So a row's sums are the same
operations in the same order, whichever rows are computed beside it, and on every CPU that has fused
multiply-add.

Queries are float32, or the bits of bf16. With those, scores and sums are of pairs of bf16 products, which an
AVX-512 CPU with BF16 adds in half the time: weights are rounded to bf16 too.

The state of an octet is vectors of 16 float32: the rows' maxima, one a lane; the total weight of each row,
by position modulo 16; then for each 32 dimensions and row the weighted sums of even and of odd dimensions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir

from gptoss_lite.kernels.cpu.steps import (
    F32,
    FLOATS,
    I16,
    I32,
    INTS,
    LANES,
    Elements,
    Writer,
    i64,
    of_each_quad,
    quads,
    same_float,
    same_word,
    step,
)

ROWS = 8
BLOCK = 16  # positions in a block of the cache
PART = 64  # keys that are weighed at once
CHUNK = 32  # dimensions that are summed at once
LINE = 64  # bytes of a cache line
EMPTY = -np.inf  # the maximum of no scores

# 2^x = 1 + x * (...) on [-1/2, 1/2], its largest relative error as small as it can be: 2e-9.
_POWER = (0.69314718246, 0.24022647738, 0.05550332367, 0.00961843692, 0.00133988738, 0.00015353362)
_TO_INTEGER = 1.5 * 2.0**23  # added to a float32, it leaves the nearest integer in the low bits
_SMALLEST = -125.0  # 2^x is nothing below it
_LOG2E = 1.4426950408889634
_ALL_ROWS = range(ROWS)


def vectors(chunks: int) -> int:
    """How many vectors the state of an octet has, for so many times 32 dimensions."""
    return 1 + ROWS + chunks * ROWS * 2


class _Writer(Writer):
    """A writer that knows its key: "wide or narrow/bf16 or float32/mark".

    It says how many rows and blocks of keys are summed at once: what fits the registers, 32 of 16 floats if
    wide. That does not change a result.
    """

    def __init__(self, b: ir.IRBuilder, key: str) -> None:
        super().__init__(b, key)
        size, queries, _ = key.split("/")
        self.has_bf16_queries = queries == "bf16"
        self.score_rows, self.score_blocks, self.sum_rows = (ROWS, 2, ROWS) if size == "wide" else (4, 1, 2)

    def power(self, x: Any) -> Any:
        """Compute 2^x for x up to a little above 0, 1e-7 off at most; 2^0 is 1, and 2^-inf is 0."""
        b = self.b
        shifted = b.fadd(x, same_float(_TO_INTEGER))
        fraction = b.fsub(x, b.fsub(shifted, same_float(_TO_INTEGER)))
        p = same_float(_POWER[-1])
        for coefficient in (*_POWER[-2::-1], 1.0):
            p = self.multiply_add(p, fraction, same_float(coefficient))
        exponent = b.shl(b.bitcast(shifted, INTS), same_word(23))
        p = b.bitcast(b.add(b.bitcast(p, INTS), exponent), FLOATS)
        return b.select(b.fcmp_ordered("<", x, same_float(_SMALLEST)), same_float(0.0), p)


_SCORES, _PLACES = (None, ROWS + 1, PART), (None, 8, PART // BLOCK)
_PAIRS, _STATES = (None, None, LANES), (None, None, LANES)


@step(_Writer, pairs=_PAIRS)
def transpose(w: _Writer, keys: Elements, block: Any, head: Any, pairs: Elements, place: Any) -> None:
    """Write pairs[place, i, j], dimensions 2 i and 2 i + 1 of key j of a block.

    keys uint16 (blocks, heads, 16, D), D a multiple of 32; pairs uint32 (.., D/2, 16).
    """

    def swap(rows: list[Any], distance: int, low: list[int], high: list[int]) -> list[Any]:
        swapped = list(rows)
        for i in range(LANES):
            if not i & distance:
                swapped[i] = w.shuffle(rows[i], rows[i + distance], low)
                swapped[i + distance] = w.shuffle(rows[i], rows[i + distance], high)
        return swapped

    with w.loop(w.over(keys.length(3), CHUNK)) as loop:
        column = w.times(loop.index, CHUNK)
        rows = [w.load(keys.at(block, head, j, column), INTS) for j in range(BLOCK)]
        # First 4 x 4 words within each four keys, then the squares as wholes.
        rows = swap(rows, 1, of_each_quad(0, LANES, 1, LANES + 1), of_each_quad(2, LANES + 2, 3, LANES + 3))
        rows = swap(rows, 2, of_each_quad(0, 1, LANES, LANES + 1), of_each_quad(2, 3, LANES + 2, LANES + 3))
        for distance in (4, 8):
            rows = swap(rows, distance, quads(0, 2, 4, 6), quads(1, 3, 5, 7))
        for i in range(LANES):
            row = (0, 2, 1, 3)[i % 4] + i // 4 * 4  # where the swaps within four keys leave the columns
            w.store(rows[row], pairs.at(place, w.add(w.times(loop.index, LANES), i)))


@step(_Writer, pairs=_PAIRS, places=_PLACES, scores=_SCORES)
def score(
    w: _Writer, q: Elements, t: Any, head: Any, last: Any, pairs: Elements, low: Any, high: Any,
    keys: Elements, places: Elements, worker: Any, scores: Elements,
) -> None:  # fmt: skip
    """Write the scores of an octet's rows, the heads from `head` to `last` of token t, with a part's keys.

    q uint32: the bits of float32, or of bf16 two by two. pairs uint32 (.., .., 16): where `transpose` wrote
    them for this worker. scores float32 (workers, 9, 64): -inf outside low..high - 1, which are places in the
    part. Meanwhile the keys of places[worker, 1:5] are asked for, see attention._look_ahead.
    """
    b = w.b
    rows = [q.at(t, w.least(w.add(head, r), last)) for r in _ALL_ROWS]
    with w.loop(PART // BLOCK // w.score_blocks) as loop:
        first = w.times(loop.index, w.score_blocks)
        begin = w.times(first, BLOCK)
        keys_at = [w.add(begin, BLOCK * i) for i in range(w.score_blocks)]
        end = w.add(begin, BLOCK * w.score_blocks)
        is_seen = b.and_(b.icmp_signed("<", low, end), b.icmp_signed(">", high, begin))
        with b.if_else(is_seen) as (seen, unseen):
            with seen:
                blocks = [w.add(first, i) for i in range(w.score_blocks)]
                asked = [_asked(w, keys, places, worker, block) for block in blocks]
                own = [w.add(w.times(worker, PART // BLOCK), block) for block in blocks]
                masks = [_between(w, b.sub(low, at), b.sub(high, at)) for at in keys_at]
                for group in range(0, ROWS, w.score_rows):
                    some = range(group, group + w.score_rows)
                    sums = w.variables([same_float(0.0)] * (w.score_rows * w.score_blocks))
                    with w.loop(w.over(keys.length(3), 2)) as dimensions:
                        pair = dimensions.index
                        for pointers in asked:
                            _ask(w, pointers, pair)
                        words = [w.load(pairs.at(block, pair), INTS) for block in own]
                        place = pair if w.has_bf16_queries else w.times(pair, 2)
                        _add_pair(w, sums, [w.moved(rows[r], place) for r in some], words)
                    for i, total in enumerate(sums):
                        r, block = group + i // w.score_blocks, i % w.score_blocks
                        value = b.select(masks[block], b.load(total), same_float(EMPTY))
                        w.store(value, scores.at(worker, r, keys_at[block]))
            with unseen:
                for r in _ALL_ROWS:
                    for at in keys_at:
                        w.store(same_float(EMPTY), scores.at(worker, r, at))


def _asked(w: _Writer, array: Elements, places: Elements, worker: Any, i: Any) -> tuple[Any, Any]:
    """Point at what to ask for beside block i: soon, and later."""
    b = w.b
    rows = [[b.load(places.at(worker, row + part, i)) for part in range(2)] for row in (1, 3)]
    soon, later = (array.at(block, head) for block, head in rows)
    return soon, later


def _ask(w: _Writer, pointers: tuple[Any, Any], line: Any) -> None:
    """Have a cache line fetched of each, for the first level and for the second."""
    for pointer, level in zip(pointers, (1, 2), strict=True):
        w.ask_for(w.moved(pointer, w.times(line, LINE // 2)), level)


def _between(w: _Writer, low: Any, high: Any) -> Any:
    low, high = (w.splat(w.b.trunc(bound, I32)) for bound in (low, high))
    lanes = ir.Constant(INTS, list(range(LANES)))
    return w.b.and_(w.b.icmp_signed(">=", lanes, low), w.b.icmp_signed("<", lanes, high))


def _add_pair(w: _Writer, sums: Sequence[Any], queries: Sequence[Any], words: Sequence[Any]) -> None:
    """Add the products of two dimensions to sums, which are those of the queries' rows by blocks of keys."""
    b = w.b
    halves = [w.halves(word) for word in words]
    for r, query in enumerate(queries):
        own = sums[r * len(words) : (r + 1) * len(words)]
        if w.has_bf16_queries:
            x = w.splat(b.load(query))
            for place, word in zip(own, words, strict=True):
                b.store(w.add_pairs(b.load(place), x, word), place)
            continue
        for i in range(2):
            x = w.splat(b.bitcast(b.load(w.moved(query, i)), F32))
            for place, half in zip(own, halves, strict=True):
                b.store(w.multiply_add(x, half[i], b.load(place)), place)


@step(_Writer, scores=_SCORES, states=_STATES)
def weigh(w: _Writer, scores: Elements, worker: Any, scale: Any, states: Elements, octet: Any) -> None:
    """Turn scores into weights 2^(scale * score - maximum), and count them in the state's totals.

    Weights take the scores' place, or as pairs of bf16 the first half of each row. The ninth row becomes what
    the rows' earlier sums are to be multiplied by.
    """
    b = w.b
    wide = w.splat(scale)
    best = []
    for r in _ALL_ROWS:
        some = [w.load(scores.at(worker, r, LANES * i)) for i in range(PART // LANES)]
        best.append(_tree(some, w.larger))
    maxima = states.at(octet)
    before = w.load(maxima)
    now = w.larger(before, b.fmul(w.across(best, w.larger), wide))
    w.store(now, maxima)
    w.store(w.power(b.fsub(before, now)), scores.at(worker, ROWS))
    with w.loop(ROWS) as loop:
        r = loop.index
        below = w.splat(b.fneg(b.load(w.moved(maxima, r))))
        row = [w.load(scores.at(worker, r, LANES * i)) for i in range(PART // LANES)]
        weights = [w.power(w.multiply_add(value, wide, below)) for value in row]
        for i, weight in enumerate(weights):
            if w.has_bf16_queries:
                rounded = b.add(b.bitcast(weight, INTS), same_word(0x8000))
                upper = b.lshr(rounded, same_word(16))
                w.store(b.trunc(upper, ir.VectorType(I16, LANES)), scores.at(worker, r, LANES // 2 * i))
            else:
                w.store(weight, scores.at(worker, r, LANES * i))
        total = states.at(octet, w.add(r, 1))
        factor = w.splat(b.load(scores.at(worker, ROWS, r)))
        w.store(w.multiply_add(w.load(total), factor, _tree(weights, b.fadd)), total)


def _tree(values: Sequence[Any], join: Callable[[Any, Any], Any]) -> Any:
    while len(values) > 1:
        values = [join(x, y) for x, y in zip(values[::2], values[1::2], strict=True)]
    return values[0]


@step(_Writer, places=_PLACES, weights=_SCORES, states=_STATES)
def accumulate(
    w: _Writer, values: Elements, places: Elements, worker: Any, head: Any, low: Any, high: Any,
    ahead: Elements, weights: Elements, states: Elements, octet: Any,
) -> None:  # fmt: skip
    """Shrink an octet's sums, then add the values of keys low..high - 1 of a part, by their weights.

    values uint16 (blocks, heads, 16, D), D a multiple of 32; the part's blocks are places[worker, 0].
    weights: see `weigh`. Meanwhile the values of places[worker, 1:5] are asked for in `ahead`, of any D.
    """
    b = w.b
    dim = values.length(3)
    with w.loop(w.over(dim, CHUNK)) as loop:
        chunk = loop.index
        for group in range(0, ROWS, w.sum_rows):
            some = range(group, group + w.sum_rows)
            vectors = [states.at(octet, _sum(w, chunk, r, i)) for r in some for i in range(2)]
            factors = [w.splat(b.load(weights.at(worker, ROWS, r))) for r in some]
            sums = w.variables([b.fmul(w.load(at), factors[i // 2]) for i, at in enumerate(vectors)])
            begin, end = w.over(low, BLOCK), w.over(w.add(high, BLOCK - 1), BLOCK)
            with w.loop(end, begin) as turn:
                block = b.load(places.at(worker, 0, turn.index))
                origin = values.at(block, head, 0, w.times(chunk, CHUNK))
                asked = _asked(w, ahead, places, worker, turn.index), w.times(chunk, BLOCK)
                before = w.times(turn.index, BLOCK)
                start, stop = w.most(b.sub(low, before), 0), w.least(b.sub(high, before), BLOCK)
                rows = [weights.at(worker, r) for r in some]
                add = _add_key_pairs if w.has_bf16_queries else _add_keys
                add(w, sums, origin, dim, asked, rows, before, start, stop)
            for at, total in zip(vectors, sums, strict=True):
                w.store(b.load(total), at)


def _sum(w: _Writer, chunk: Any, row: int, half: int) -> Any:
    """Say which vector of a state sums the even or odd dimensions of a chunk."""
    return w.add(w.times(chunk, 2 * ROWS), 1 + ROWS + 2 * row + half)


def _add_keys(
    w: _Writer, sums: Sequence[Any], origin: Any, dim: Any, asked: Any, weights: Sequence[Any], before: Any,
    start: Any, stop: Any,
) -> None:  # fmt: skip
    """Add the values of keys start..stop - 1 of a block, one by one, to sums of rows by halves."""
    b = w.b
    with w.loop(stop, start) as loop:
        j = loop.index
        _ask(w, asked[0], w.add(asked[1], j))
        halves = w.halves(w.load(w.moved(origin, w.times(j, dim)), INTS))
        for r, row in enumerate(weights):
            weight = w.splat(b.load(w.moved(row, w.add(before, j))))
            for half, place in zip(halves, sums[2 * r : 2 * r + 2], strict=True):
                b.store(w.multiply_add(weight, half, b.load(place)), place)


def _add_key_pairs(
    w: _Writer, sums: Sequence[Any], origin: Any, dim: Any, asked: Any, weights: Sequence[Any], before: Any,
    start: Any, stop: Any,
) -> None:  # fmt: skip
    """Add the values of keys start..stop - 1 of a block two by two.

    One more at either end may get into a pair, with a weight of 0. What is there may be anything, even NaN,
    so one that is seen takes its place.
    """
    b = w.b
    sixteen, upper = same_word(16), same_word(0xFFFF0000)
    with w.loop(w.over(w.add(stop, 1), 2), w.over(start, 2)) as loop:
        first = w.times(loop.index, 2)
        keys = [w.add(first, i) for i in range(2)]
        for j in keys:
            _ask(w, asked[0], w.add(asked[1], j))
        seen = w.most(keys[0], start), w.least(keys[1], b.sub(stop, i64(1)))
        one, other = (w.load(w.moved(origin, w.times(j, dim)), INTS) for j in seen)
        even = b.or_(b.and_(one, same_word(0xFFFF)), b.shl(other, sixteen))
        odd = b.or_(b.lshr(one, sixteen), b.and_(other, upper))
        for r, row in enumerate(weights):
            weight = w.splat(w.load(w.moved(row, w.add(w.over(before, 2), loop.index)), I32))
            for half, place in zip((even, odd), sums[2 * r : 2 * r + 2], strict=True):
                b.store(w.add_pairs(b.load(place), weight, half), place)


@step(_Writer, states=_STATES)
def empty(w: _Writer, states: Elements, octet: Any) -> None:
    """Make a state that of no keys."""
    w.store(same_float(EMPTY), states.at(octet))
    with w.loop(states.length(1), 1) as loop:
        w.store(same_float(0.0), states.at(octet, loop.index))


@step(_Writer, states=_STATES)
def copy(w: _Writer, states: Elements, source: Any, target: Any) -> None:
    """Copy an octet's state."""
    with w.loop(states.length(1)) as loop:
        w.store(w.load(states.at(source, loop.index)), states.at(target, loop.index))


@step(_Writer, states=_STATES)
def merge(w: _Writer, states: Elements, i: Any, j: Any) -> None:
    """Add the state of octet j to that of octet i; at most one of them is empty, which changes nothing."""
    b = w.b
    maxima = [w.load(states.at(i)), w.load(states.at(j))]
    now = w.larger(*maxima)
    shrink = w.variables([w.power(b.fsub(maximum, now)) for maximum in maxima])
    factors = [b.bitcast(vector, F32.as_pointer()) for vector in shrink]
    w.store(now, states.at(i))

    def add(vector: Any, row: Any) -> None:
        mine, others = (w.splat(b.load(w.moved(factor, row))) for factor in factors)
        scaled = b.fmul(w.load(states.at(j, vector)), others)
        w.store(w.multiply_add(w.load(states.at(i, vector)), mine, scaled), states.at(i, vector))

    with w.loop(ROWS) as loop:
        add(w.add(loop.index, 1), loop.index)
    with w.loop(states.length(1), 1 + ROWS) as loop:
        add(loop.index, b.urem(w.over(b.sub(loop.index, i64(1 + ROWS)), 2), i64(ROWS)))


@step(_Writer, states=_STATES)
def finish(
    w: _Writer, states: Elements, octet: Any, sinks: Elements, head: Any, last: Any, rows: Elements,
    worker: Any,
) -> None:  # fmt: skip
    """Write an octet's results to rows[worker], float32 (8, D), D a multiple of 32.

    sinks float32 (H,): those of the heads from `head` to `last` take part.
    """
    b = w.b
    sink = same_float(0.0)
    for r in _ALL_ROWS:
        own = b.load(sinks.at(w.least(w.add(head, r), last)))
        sink = b.insert_element(sink, own, ir.Constant(I32, r))
    sink = b.fmul(sink, same_float(_LOG2E))
    maximum = w.load(states.at(octet))
    top = w.larger(maximum, sink)
    total = w.across([w.load(states.at(octet, 1 + r)) for r in _ALL_ROWS], b.fadd)
    share = w.power(b.fsub(maximum, top))
    share = b.fdiv(share, w.multiply_add(total, share, w.power(b.fsub(sink, top))))
    factors = [w.splat(b.extract_element(share, ir.Constant(I32, r))) for r in _ALL_ROWS]
    with w.loop(w.over(rows.length(2), CHUNK)) as loop:
        for r, factor in enumerate(factors):
            even, odd = (
                b.fmul(factor, w.load(states.at(octet, _sum(w, loop.index, r, i)))) for i in range(2)
            )
            for half in range(2):
                lanes = [LANES // 2 * half + i // 2 + i % 2 * LANES for i in range(LANES)]
                place = w.add(w.times(loop.index, CHUNK), LANES * half)
                w.store(w.shuffle(even, odd, lanes), rows.at(worker, r, place))
