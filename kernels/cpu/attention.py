"""Paged attention with sinks: softmax part by part, and segment by segment.

A part is 64 keys and a segment 1,024, at fixed absolute positions: a row's largest score and its sums start
anew with a segment and go through its parts in order, and segments are merged in order. So a row's bits do
not depend on how its sequence was cut into chunks, on who shares the batch, or on the number of threads.

A task is a tile of tokens with one key head; or a single token with one segment and some key heads, and the
thread that finishes the last of such a token's segments merges them. Keys and values are bf16 bits in uint16.
"""

from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import cfunc, njit, types

from gptoss_lite.kernels.cpu import Array, isa
from gptoss_lite.kernels.cpu.attentiontile import (
    BLOCK,
    CHUNK,
    PART,
    ROWS,
    accumulate,
    copy,
    empty,
    finish,
    merge,
    score,
    transpose,
    vectors,
    weigh,
)
from gptoss_lite.kernels.cpu.program import Steps
from gptoss_lite.kernels.cpu.steps import LANES
from gptoss_lite.kernels.cpu.workers import TASK, Operands, array, count

SEGMENT = 1024
TILE = 16  # tokens that share the work of transposing keys
_BLOCKS = PART // BLOCK
_LOG2E = 1.4426950408889634
# Of a tile: its tokens, the first of its segments and how many of them are tasks of their own, key heads in a
# task, its first task, and the first of the states that it keeps to be merged.
_START, _STOP, _SEGMENT, _SEGMENTS, _HEADS, _TASK, _KEPT = range(7)

_PLAN = Operands(
    array(types.int32, 1),  # sequence
    array(types.int32, 1),  # positions
    types.int64,  # window
    types.int64,  # key heads
    types.int64,  # threads
    array(types.int64, 2),  # tiles
    array(types.int64, 1),  # tasks
    array(types.int64, 1),  # segments done
)
_read_plan = _PLAN.read
_ATTEND = Operands(
    array(types.uint32, 3),  # q, the bits of float32, or of bf16 two by two
    array(types.uint16, 4),  # keys
    array(types.uint16, 4),  # values
    array(types.int32, 2),  # table
    array(types.int32, 1),  # sequence
    array(types.int32, 1),  # positions
    array(types.float32, 1),  # sinks
    types.int64,  # window
    types.float64,  # scale
    array(types.float32, 3),  # out
    array(types.int64, 2),  # tiles
    array(types.int64, 1),  # segments done, of the tiles whose segments are tasks, by their first tasks
    array(types.float32, 3),  # states: of each thread two for each octet of a task, then those kept
    # What follows is each thread's own.
    array(types.uint32, 3),  # pairs of dimensions of a part's keys, four blocks
    array(types.float32, 3),  # scores, and in a ninth row what sums are shrunk by
    array(types.int64, 3),  # where the part's blocks are, and what to ask for
    array(types.uint16, 4),  # padded keys and values, four blocks each, where D is not a multiple of 32
    array(types.float32, 3),  # rows of results
)
_read_attend = _ATTEND.read


@cache
def takes_bf16(kind: isa.ISA) -> bool:
    """Whether a CPU multiplies pairs of bf16, so that bf16 queries make attention cheaper."""
    return isinstance(kind, isa.AVX512) and "avx512bf16" in isa.features() and llvm.llvm_version_info[0] > 15


def attention(
    steps: Steps, q: Array, keys: Array, values: Array, table: Array, sequence: Array, positions: Array,
    sinks: Array, window: int, scale: float, out: Array,
) -> None:  # fmt: skip
    """Write each query's attention over its sequence's visible keys.

    q (T, H, D), D even: float32; or where the CPU `takes_bf16` the bits of bf16 as uint16, and weights are
    rounded to bf16 as well. keys and values uint16 (block, Hk, 16, D), table int32 (S, blocks), sequence and
    positions int32 (T,), sinks float32 (H,), out float32 (T, H, D). Key j is visible to position i when i -
    window < j <= i. Later steps of this shape may have other sequences and positions, of as many runs.
    """
    T, H, D = q.shape
    Hk, threads = keys.shape[1], steps.threads
    octets, chunks = -(-H // Hk // ROWS), -(-D // CHUNK)
    # The most that there can be, for the first step finds out: single tokens, and segments that they see.
    runs = 1 + np.count_nonzero((np.diff(sequence) != 0) | (np.diff(positions) != 1))
    segments = min(-(-table.shape[1] * BLOCK // SEGMENT), (window - 1) // SEGMENT + 2)
    most = (T + runs * segments) * Hk
    tiles = steps.room("attention tiles", (T + 1, 7), np.int64)
    tasks, done = np.empty(1, np.int64), steps.room("attention done", (most,), np.int64)
    steps.add(_make_plan(), 1, _PLAN, sequence, positions, window, Hk, threads, tiles, tasks, done)

    kept = runs * segments * Hk if segments > 1 else 0
    states = steps.room(
        "attention states",
        ((2 * threads * max(TILE, Hk) + kept) * octets, vectors(chunks), LANES),
    )
    pairs = steps.room("attention pairs", (threads * _BLOCKS, chunks * CHUNK // 2, LANES), np.uint32)
    scores = steps.room("attention scores", (threads, ROWS + 1, PART))
    rows = steps.room("attention rows", (threads, ROWS, chunks * CHUNK))
    places = steps.room("attention places", (threads, 8, _BLOCKS), np.int64)
    padded_blocks = 2 * threads * _BLOCKS if D % CHUNK else 0
    padded = np.zeros((padded_blocks, 1, BLOCK, chunks * CHUNK), np.uint16)
    kind = isa.host()
    assert q.dtype == np.float32 or takes_bf16(kind)
    attend = _make_attend(kind.lanes == LANES, "float32" if q.dtype == np.float32 else "bf16")
    steps.add(
        attend, tasks, _ATTEND,
        q.view(np.uint32), keys, values, table, sequence, positions, sinks, window, scale, out, tiles, done,
        states, pairs, scores, places, padded, rows,
    )  # fmt: skip


@cache
def _make_plan() -> Any:
    key = isa.key()

    @cfunc(TASK, cache=True, error_model="numpy")
    def plan(place, task, worker):  # type: ignore[no-untyped-def]
        """Cut the batch into tiles, last tokens first, for they see most.

        After the last of the tiles stands where tasks end. Single tokens have as many key heads to a task as
        leaves every thread some tasks: what lies together is then read together.
        """
        sequence, positions, window, Hk, threads, tiles, tasks, done = _read_plan(key, place)
        pieces = 0
        for t in range(len(sequence)):
            pieces += positions[t] // SEGMENT - max(0, positions[t] - window + 1) // SEGMENT + 1
        some_heads = max(1, min(Hk, Hk * pieces // (4 * threads)))
        n = begun = kept = 0
        stop = len(sequence)
        while stop > 0:
            start = stop - 1
            while start > max(0, stop - TILE) and (
                sequence[start - 1] == sequence[start] and positions[start - 1] + 1 == positions[start]
            ):
                start -= 1
            first = max(0, positions[start] - window + 1) // SEGMENT
            segments, heads = 1, 1
            if stop - start == 1:
                segments, heads = positions[start] // SEGMENT - first + 1, some_heads
            tiles[n, _START], tiles[n, _STOP], tiles[n, _HEADS] = start, stop, heads
            tiles[n, _SEGMENT], tiles[n, _SEGMENTS] = first, segments
            tiles[n, _TASK], tiles[n, _KEPT] = begun, kept
            begun += segments * ((Hk + heads - 1) // heads)
            if segments > 1:
                kept += segments * Hk
            n, stop = n + 1, start
        for i in range(n, len(tiles)):
            tiles[i, _TASK] = begun
        tasks[0] = begun
        done[:begun] = 0

    return plan


@njit(boundscheck=False, error_model="numpy")
def _look_ahead(  # type: ignore[no-untyped-def]
    places, worker, table, s, part, kv, first_head, end_head, lowest, highest
):
    """Write which keys and values to ask for while a part is computed with a key head.

    Soon, places[worker, 1:3], a block and a head of each: those with the next head. Later, places[worker,
    3:5]: a piece of the next part, in the order in which they lie in memory, so that all of it has been asked
    for when the part is done with all heads.
    """
    heads = end_head - first_head
    for i in range(_BLOCKS):
        soon, soon_head = part // BLOCK + i, kv + 1
        if soon_head == end_head:
            soon, soon_head = soon + _BLOCKS, first_head
        piece = (kv - first_head) * _BLOCKS + i
        later = part // BLOCK + _BLOCKS + piece // heads
        places[worker, 1, i] = table[s, max(lowest // BLOCK, min(soon, highest // BLOCK))]
        places[worker, 2, i] = soon_head
        places[worker, 3, i] = table[s, min(later, highest // BLOCK)]
        places[worker, 4, i] = first_head + piece % heads


@cache
def _make_attend(is_wide: bool, queries: str) -> Any:
    """Compile what each thread does; queries: "float32" or "bf16"."""
    key = isa.key("wide" if is_wide else "narrow", queries)

    @cfunc(TASK, cache=True, error_model="numpy")
    def attend(place, task, worker):  # type: ignore[no-untyped-def]
        (
            q, keys, values, table, sequence, positions, sinks, window, scale, out, tiles, done, states,
            pairs, scores, places, padded, rows,
        ) = _read_attend(key, place)  # fmt: skip
        H, D, Hk = q.shape[1], keys.shape[3], keys.shape[1]
        G = H // Hk  # query heads that share one key head
        octets = (G + ROWS - 1) // ROWS
        most = max(TILE, Hk) * octets
        running, fresh, keeping = 2 * worker * most, (2 * worker + 1) * most, 2 * len(scores) * most
        factor = np.float32(scale * _LOG2E)
        n, after = 0, len(tiles) - 1
        while after - n > 1:
            middle = (n + after) // 2
            if task >= tiles[middle, _TASK]:
                n = middle
            else:
                after = middle
        start, stop, heads = tiles[n, _START], tiles[n, _STOP], tiles[n, _HEADS]
        first_segment, segments = tiles[n, _SEGMENT], tiles[n, _SEGMENTS]
        task -= tiles[n, _TASK]
        turns = (Hk + heads - 1) // heads
        piece, turn = task // turns, task % turns
        first_head, end_head = turn * heads, min(turn * heads + heads, Hk)
        s, tokens = sequence[start], stop - start
        octets_here = (end_head - first_head) * tokens * octets
        lowest, highest = max(0, positions[start] - window + 1), positions[stop - 1]
        last_segment = highest // SEGMENT
        if segments > 1:
            first_segment += piece
            last_segment = first_segment

        for segment in range(first_segment, last_segment + 1):
            target = running if segment == first_segment else fresh
            for octet in range(octets_here):
                empty(key, states, target + octet)
            begin, end = max(segment * SEGMENT, lowest), min(segment * SEGMENT + SEGMENT, highest + 1)
            for part in range(begin // PART * PART, end, PART):
                first_block, last_block = max(part, begin) // BLOCK, (min(part + PART, end) - 1) // BLOCK
                for kv in range(first_head, end_head):
                    _look_ahead(places, worker, table, s, part, kv, first_head, end_head, lowest, highest)
                    v, head = values, kv
                    for b in range(first_block, last_block + 1):
                        block, i = np.int64(table[s, b]), b % _BLOCKS
                        places[worker, 0, i] = block
                        if len(padded) == 0:
                            transpose(key, keys, block, kv, pairs, worker * _BLOCKS + i)
                            continue
                        v, head = padded, 0
                        at = 2 * worker * _BLOCKS + i
                        for j in range(BLOCK):
                            for d in range(D):
                                padded[at, 0, j, d] = keys[block, kv, j, d]
                                padded[at + _BLOCKS, 0, j, d] = values[block, kv, j, d]
                        places[worker, 0, i] = at + _BLOCKS
                        transpose(key, padded, at, 0, pairs, worker * _BLOCKS + i)
                    octet = target + (kv - first_head) * tokens * octets
                    for t in range(start, stop):
                        low = max(part, positions[t] - window + 1) - part
                        high = min(part + PART, positions[t] + 1) - part
                        for row in range(kv * G, kv * G + G, ROWS):
                            if low < high:
                                score(
                                    key, q, t, row, kv * G + G - 1, pairs, low, high, keys, places,
                                    worker, scores,
                                )  # fmt: skip
                                weigh(key, scores, worker, factor, states, octet)
                                accumulate(
                                    key, v, places, worker, head, low, high, values, scores, states,
                                    octet,
                                )  # fmt: skip
                            octet += 1
            if segment > first_segment:
                for octet in range(octets_here):
                    merge(key, states, running + octet, fresh + octet)

        if segments > 1:
            kept = keeping + (tiles[n, _KEPT] + first_head) * octets
            for octet in range(octets_here):
                copy(key, states, running + octet, kept + piece * Hk * octets + octet)
            if count(done, tiles[n, _TASK] + turn, 1) < segments - 1:
                return
            for octet in range(octets_here):
                copy(key, states, kept + octet, running + octet)
                for other in range(1, segments):
                    merge(key, states, running + octet, kept + other * Hk * octets + octet)

        octet = running
        for kv in range(first_head, end_head):
            for t in range(start, stop):
                for row in range(kv * G, kv * G + G, ROWS):
                    finish(key, states, octet, sinks, row, kv * G + G - 1, rows, worker)
                    for r in range(min(ROWS, kv * G + G - row)):
                        for d in range(D):
                            out[t, row + r, d] = rows[worker, r, d]
                    octet += 1

    return attend
