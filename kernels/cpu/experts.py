"""Mixture of experts over packed weights: gate_up, clamped SwiGLU, down, and the weighted sum.

Rows are sorted by expert, so that an expert's weights are read once. A row is one token's use of one expert;
some lie in chunks together, see `activations`. A task of gate_up is 64 rows of weights of one expert: 32
columns of what `down` multiplies, which are quantised on the spot.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, types

from gptoss_lite.kernels.cpu import Array, isa
from gptoss_lite.kernels.cpu.activations import BLOCK, operand, quantize, quantize_block, room_for
from gptoss_lite.kernels.cpu.elementwise import PAIRS, combine, swiglu_pairs
from gptoss_lite.kernels.cpu.linear import SPAN, Packed
from gptoss_lite.kernels.cpu.program import Steps
from gptoss_lite.kernels.cpu.tile import ROWS, tile
from gptoss_lite.kernels.cpu.workers import TASK, Operands, array

_EXPERT, _ROW, _ROWS, _SLOT, _ROOM = range(5)  # of a chunk: the first of its rows in sorted order, its slot
_CHUNKS, _UP, _DOWN = range(3)  # how many tasks there are

_PLAN = Operands(
    array(types.int32, 2),  # ids
    types.int64,  # wide
    types.int64,  # tasks of gate_up for an expert
    types.int64,  # tasks of down
    array(types.int64, 1),  # counts: uses of each expert
    array(types.int64, 1),  # uses: those of each expert in turn
    array(types.int64, 1),  # places: the slot of each use
    array(types.int64, 2),  # chunks
    array(types.int64, 2),  # active: an expert in use, and its first and last chunk
    array(types.int64, 1),  # tasks
)
_read_plan = _PLAN.read
_QUANTISE = Operands(
    array(types.float32, 2),  # h
    array(types.int64, 1),  # uses
    array(types.int64, 2),  # chunks
    types.int64,  # k
    types.int64,  # passes
    types.float64,  # unit
    types.int64,  # bias
    array(types.int8, 1),  # codes
    array(types.float32, 1),  # scales
    array(types.int32, 1),  # starts
)
_read_quantise = _QUANTISE.read
_STACK = (
    array(types.uint8, 2),  # records
    types.int64,  # code bytes
    types.int64,  # groups
    types.int64,  # blocks in a group
    types.boolean,  # is_fp16
)
_ROWS_AND_CHUNKS = (
    array(types.int8, 1),  # codes
    array(types.float32, 1),  # scales
    array(types.int32, 1),  # starts
    array(types.int64, 2),  # chunks
    array(types.int64, 2),  # active
)
_GATE_UP = Operands(
    *_STACK,
    *_ROWS_AND_CHUNKS,
    array(types.float32, 2),  # added
    types.float64,  # limit
    array(types.int8, 1),  # inner codes
    array(types.float32, 1),  # inner scales
    array(types.int32, 1),  # inner starts
    array(types.float32, 2),  # results of a task's tiles and a block's of SwiGLU, of each thread
)
_read_gate_up = _GATE_UP.read
_TIMES_DOWN = Operands(
    *_STACK,
    *_ROWS_AND_CHUNKS,
    array(types.float32, 2),  # y
    array(types.float32, 3),  # results of a tile, of each thread
)
_read_down = _TIMES_DOWN.read


def experts_packed(
    steps: Steps, kind: isa.ISA, formats: tuple[str, str], activations: str, h: Array, ids: Array,
    weights: Array, gate_up: Packed, up_added: Array, down: Packed, down_added: Array, limit: float,
    x: Array, out: Array,
) -> None:  # fmt: skip
    """Write out[t] = x[t] + the sum over c of weights[t, c] * (down of expert ids[t, c]).

    formats: of gate_up and down, "mxfp4" or "int8". activations: "accurate", in 16 bits, or "int8". h, the
    normalised activations, x and out float32 (T, hidden), ids int32 and weights float32 (T, k). gate_up and
    down: stacks in layout cpu-r16-v1, records uint8 (E, bytes) and so on as `linear_packed` takes them. What
    is added: float32 (E, 2 I) and (E, hidden). limit: where SwiGLU clamps.
    """
    T, hidden = x.shape
    E, inner, k, wide = len(up_added), up_added.shape[1] // 2, ids.shape[1], kind.tokens
    uses, blocks, inner_blocks = T * k, hidden // BLOCK, inner // BLOCK
    slots = min(2 * uses, uses + 3 * min(uses, E))  # at most: a chunk has room for 1, 2, 4 or 8 rows
    most = uses // wide + min(uses, E)
    passes, up_unit, up_bias = operand(kind, formats[0], activations)

    used, places = steps.room("uses", (uses,), np.int64), steps.room("places", (uses,), np.int64)
    counts, tasks = steps.room("counts", (E,), np.int64), np.empty(3, np.int64)
    chunks = steps.room("chunks", (most, 5), np.int64)
    active = steps.room("active", (min(uses, E), 3), np.int64)
    down_tasks = -(-hidden // (ROWS * SPAN))
    steps.add(
        _make_plan(),
        1,
        _PLAN,
        ids,
        wide,
        inner_blocks,
        down_tasks,
        counts,
        used,
        places,
        chunks,
        active,
        tasks,
    )

    codes = steps.room("chunk codes", (slots * hidden * passes,), np.int8)
    scales = steps.room("chunk scales", (slots * blocks,))
    starts = steps.room("chunk starts", (slots * blocks,), np.int32)
    steps.add(
        _make_quantise(), tasks[_CHUNKS:][:1], _QUANTISE,
        h, used, chunks, k, passes, up_unit, up_bias, codes, scales, starts,
    )  # fmt: skip

    inner_codes = steps.room("inner codes", (slots * inner * passes,), np.int8)
    inner_scales = steps.room("inner scales", (slots * inner_blocks,))
    inner_starts = steps.room("inner starts", (slots * inner_blocks,), np.int32)
    own = steps.room("gate_up tiles", (steps.threads, -(-T // wide) * 4 * wide * ROWS + BLOCK))
    steps.add(
        _make_gate_up(kind, *formats, activations), tasks[_UP:][:1], _GATE_UP,
        *gate_up, codes, scales, starts, chunks, active, up_added, limit,
        inner_codes, inner_scales, inner_starts, own,
    )  # fmt: skip

    y = steps.room("experts", (slots, hidden))
    own = steps.room("down tile", (steps.threads, wide, ROWS))
    steps.add(
        _make_down(kind, formats[1], activations), tasks[_DOWN:][:1], _TIMES_DOWN,
        *down, inner_codes, inner_scales, inner_starts, chunks, active, y, own,
    )  # fmt: skip
    combine(steps, x, y, down_added, ids, places, weights, out)


@cache
def _make_plan() -> Any:
    key = isa.key()

    @cfunc(TASK, cache=True, error_model="numpy")
    def plan(place, task, worker):  # type: ignore[no-untyped-def]
        """Sort uses by expert, and divide each expert's into chunks."""
        ids, wide, up_tasks, down_tasks, counts, uses, places, chunks, active, tasks = _read_plan(key, place)
        T, k = ids.shape
        counts[:] = 0
        for use in range(T * k):
            counts[ids[use // k, use % k]] += 1
        index = row = slot = experts = 0
        for e in range(len(counts)):
            if counts[e] == 0:
                continue
            active[experts, 0], active[experts, 1] = e, index
            left = counts[e]
            counts[e] = row  # from here on: where its next use goes
            while left > 0:
                rows = min(left, wide)
                room = room_for(rows, wide)
                chunks[index, _EXPERT], chunks[index, _ROW], chunks[index, _ROWS] = e, row, rows
                chunks[index, _SLOT], chunks[index, _ROOM] = slot, room
                index, row, slot, left = index + 1, row + rows, slot + room, left - rows
            active[experts, 2] = index
            experts += 1
        for use in range(T * k):
            e = ids[use // k, use % k]
            uses[counts[e]] = use
            counts[e] += 1
        for c in range(index):
            for t in range(chunks[c, _ROWS]):
                places[uses[chunks[c, _ROW] + t]] = chunks[c, _SLOT] + t
        tasks[_CHUNKS], tasks[_UP], tasks[_DOWN] = index, experts * up_tasks, experts * down_tasks

    return plan


@cache
def _make_quantise() -> Any:
    key = isa.key()

    @cfunc(TASK, cache=True, error_model="numpy")
    def quantise(place, task, worker):  # type: ignore[no-untyped-def]
        """Quantise the rows that a chunk uses into its slots."""
        h, uses, chunks, k, passes, unit, bias, codes, scales, starts = _read_quantise(key, place)
        slot = chunks[task, _SLOT] * (h.shape[1] // BLOCK)
        for t in range(chunks[task, _ROWS]):
            token = uses[chunks[task, _ROW] + t] // k
            quantize(h, token, passes, unit, bias, codes, scales, starts, slot + t, chunks[task, _ROOM])

    return quantise


@cache
def _make_gate_up(kind: isa.ISA, format: str, down: str, activations: str) -> Any:
    key, wide = isa.key(kind.name, format, activations), kind.tokens
    passes, unit, bias = operand(kind, down, activations)
    scale_bytes = 1 if format == "mxfp4" else 2

    @cfunc(TASK, cache=True, error_model="numpy")
    def gate_up(place, task, worker):  # type: ignore[no-untyped-def]
        """Take a block of 32 columns of what `down` multiplies, of all rows of one expert."""
        (
            records, code_bytes, groups, group_blocks, is_fp16, codes, scales, starts, chunks, active, added,
            limit, inner_codes, inner_scales, inner_starts, own,
        ) = _read_gate_up(key, place)  # fmt: skip
        inner = added.shape[1] // 2
        blocks = inner // BLOCK
        tiles = (2 * inner + ROWS - 1) // ROWS
        tile_codes, tile_scales = code_bytes // tiles, groups * ROWS * scale_bytes
        use, block = task // blocks, task % blocks
        e = active[use, 0]
        first, last = active[use, 1], active[use, 2]
        out = own[worker]
        gated = out[len(out) - BLOCK :]
        for i in range(4):
            index = 4 * block + i
            codes_at = e * records.shape[1] + index * tile_codes
            scales_at = e * records.shape[1] + code_bytes + index * tile_scales
            for c in range(first, last):
                tile(
                    key, chunks[c, _ROOM], records, codes_at, scales_at, is_fp16, codes, scales, starts,
                    chunks[c, _SLOT], out, ((c - first) * 4 + i) * wide * ROWS, groups, group_blocks,
                )  # fmt: skip
        for c in range(first, last):
            slot = chunks[c, _SLOT] * blocks + block * chunks[c, _ROOM]
            added_at = e * 2 * inner + 2 * block * BLOCK
            for t in range(chunks[c, _ROWS]):
                pairs = ((c - first) * 4 * wide + t) * ROWS
                for half in range(2):
                    two = pairs + 2 * half * wide * ROWS
                    swiglu_pairs(
                        out, two, two + wide * ROWS, added, added_at + 2 * half * PAIRS, limit, gated,
                        half * PAIRS,
                    )  # fmt: skip
                quantize_block(
                    gated, 0, passes, unit, bias, inner_codes, inner_scales, inner_starts, slot + t
                )

    return gate_up


@cache
def _make_down(kind: isa.ISA, format: str, activations: str) -> Any:
    key = isa.key(kind.name, format, activations)
    scale_bytes = 1 if format == "mxfp4" else 2

    @cfunc(TASK, cache=True, error_model="numpy")
    def down(place, task, worker):  # type: ignore[no-untyped-def]
        """Take a few tiles of one expert."""
        (
            records, code_bytes, groups, group_blocks, is_fp16, codes, scales, starts, chunks, active, y, own,
        ) = _read_down(key, place)  # fmt: skip
        hidden = y.shape[1]
        tiles = (hidden + ROWS - 1) // ROWS
        tile_codes, tile_scales = code_bytes // tiles, groups * ROWS * scale_bytes
        tasks = (tiles + SPAN - 1) // SPAN
        use, first = task // tasks, task % tasks * SPAN
        at = active[use, 0] * records.shape[1]
        out = own[worker]
        for index in range(first, min(first + SPAN, tiles)):
            for c in range(active[use, 1], active[use, 2]):
                slot = chunks[c, _SLOT]
                tile(
                    key, chunks[c, _ROOM], records, at + index * tile_codes,
                    at + code_bytes + index * tile_scales, is_fp16, codes, scales, starts, slot, out, 0,
                    groups, group_blocks,
                )  # fmt: skip
                for t in range(chunks[c, _ROWS]):
                    for i in range(min(ROWS, hidden - index * ROWS)):
                        y[slot + t, index * ROWS + i] = out[t, i]

    return down
