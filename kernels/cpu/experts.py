"""Mixture of experts over packed weights: gate_up, clamped SwiGLU, down, and the weighted sum, in one call.

Rows are sorted by expert, so that an expert's weights are read once a call. A row is one token's use of one
expert; some lie in chunks together, see `activations`. A task of gate_up is 64 rows of weights of one expert:
32 columns of what `down` multiplies, which are quantised on the spot.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit, prange

from gptoss_lite.kernels.cpu import isa
from gptoss_lite.kernels.cpu.activations import BLOCK, operand, quantize, quantize_block, room_for
from gptoss_lite.kernels.cpu.elementwise import PAIRS, swiglu_pairs
from gptoss_lite.kernels.cpu.linear import SPAN
from gptoss_lite.kernels.cpu.tile import ROWS, tile

_EXPERT, _ROW, _ROWS, _SLOT, _ROOM = range(5)  # of a chunk: the first of its rows in sorted order, its slot


@njit(boundscheck=False)
def _sort(ids, counts, rows, sorted_rows):  # type: ignore[no-untyped-def]
    """Sort uses of experts: ids (T, k), flat; counts (E,) of each; sorted_rows: which use is how many-th."""
    first = np.zeros(len(counts), np.int64)
    for e in ids:
        counts[e] += 1
    for e in range(1, len(counts)):
        first[e] = first[e - 1] + counts[e - 1]
    for use in range(len(ids)):
        e = ids[use]
        sorted_rows[first[e]] = use
        rows[use] = first[e]
        first[e] += 1


@njit(boundscheck=False)
def _plan(counts, wide, chunks, slots, active):  # type: ignore[no-untyped-def]
    """Divide each expert's rows into chunks -> how many chunks, experts in use and slots there are.

    chunks (.., 5) is written, slots: of each row in sorted order; active (E, 3): an expert in use and its
    first and last chunk.
    """
    index = row = slot = experts = 0
    for e in range(len(counts)):
        if counts[e] == 0:
            continue
        active[experts, 0], active[experts, 1] = e, index
        left = counts[e]
        while left > 0:
            rows = min(left, wide)
            room = room_for(rows, wide)
            chunks[index, _EXPERT], chunks[index, _ROW], chunks[index, _ROWS] = e, row, rows
            chunks[index, _SLOT], chunks[index, _ROOM] = slot, room
            for t in range(rows):
                slots[row + t] = slot + t
            index, row, slot, left = index + 1, row + rows, slot + room, left - rows
        active[experts, 2] = index
        experts += 1
    return index, experts, slot


@njit(boundscheck=False)
def _quantize_chunk(h, chunk, uses, k, passes, unit, bias, codes, scales, starts):  # type: ignore[no-untyped-def]
    """Quantise the rows of h (T, hidden) that a chunk uses into its slots."""
    place = chunk[_SLOT] * (h.shape[1] // BLOCK)
    for t in range(chunk[_ROWS]):
        token = uses[chunk[_ROW] + t] // k
        quantize(h, token, passes, unit, bias, codes, scales, starts, place + t, chunk[_ROOM])


@cache
def experts_packed(kind: isa.ISA, gate_up: str, down: str, activations: str) -> Callable[..., None]:
    """Make the mixture over stacks in layout cpu-r16-v1.

    gate_up, down: "mxfp4" or "int8". activations: "accurate", in 16 bits, or "int8".
    """
    up_key, down_key = (isa.key(kind.name, format, activations) for format in (gate_up, down))
    wide = kind.tokens
    passes, up_unit, up_bias = operand(kind, gate_up, activations)
    _, down_unit, down_bias = operand(kind, down, activations)
    up_scale_bytes, down_scale_bytes = (1 if format == "mxfp4" else 2 for format in (gate_up, down))

    @njit(parallel=True, cache=True, boundscheck=False)
    def experts(  # type: ignore[no-untyped-def]
        h, ids, weights,
        up_records, up_code_bytes, up_groups, up_group_blocks, up_is_fp16, up_added,
        down_records, down_code_bytes, down_groups, down_group_blocks, down_is_fp16, down_added,
        limit, x, out,
    ):  # fmt: skip
        """Write out[t] = x[t] + the sum over c of weights[t, c] * (down of expert ids[t, c]).

        h, the normalised activations, x and out float32 (T, hidden), ids int32 and weights float32 (T, k).
        Of each of the two stacks: records uint8 (E, bytes) with scales after code_bytes of codes, `groups` a
        row, each of group_blocks * 32 columns, and what is added, float32 (E, 2 I) and (E, hidden). limit:
        where SwiGLU clamps.
        """
        T, hidden = x.shape
        E, inner = len(up_records), up_added.shape[1] // 2
        k = ids.shape[1]
        uses = T * k
        rows, slots = np.empty(uses, np.int64), np.empty(uses, np.int64)
        sorted_rows = np.empty(uses, np.int64)
        counts = np.zeros(E, np.int64)
        _sort(ids.reshape(uses), counts, rows, sorted_rows)
        chunks = np.empty((uses // wide + min(uses, E), 5), np.int64)
        active = np.empty((min(uses, E), 3), np.int64)
        all_chunks, all_active, all_slots = _plan(counts, wide, chunks, slots, active)

        blocks, inner_blocks = hidden // BLOCK, inner // BLOCK
        codes = np.empty(all_slots * hidden * passes, np.int8)
        scales, starts = np.empty(all_slots * blocks, np.float32), np.empty(all_slots * blocks, np.int32)
        for c in prange(all_chunks):
            _quantize_chunk(h, chunks[c], sorted_rows, k, passes, up_unit, up_bias, codes, scales, starts)

        inner_codes = np.empty(all_slots * inner_blocks * passes * BLOCK, np.int8)
        inner_scales = np.empty(all_slots * inner_blocks, np.float32)
        inner_starts = np.empty(all_slots * inner_blocks, np.int32)
        up_tiles = (2 * inner + ROWS - 1) // ROWS
        up_tile_codes, up_tile_scales = up_code_bytes // up_tiles, up_groups * ROWS * up_scale_bytes
        for task in prange(all_active * inner_blocks):
            use, block = task // inner_blocks, task % inner_blocks
            e = active[use, 0]
            first, last = active[use, 1], active[use, 2]
            out_tiles = np.empty((last - first, 4, wide, ROWS), np.float32)
            gated = np.empty(BLOCK, np.float32)
            for i in range(4):
                index = 4 * block + i
                codes_at = e * up_records.shape[1] + index * up_tile_codes
                scales_at = e * up_records.shape[1] + up_code_bytes + index * up_tile_scales
                for c in range(first, last):
                    tile(
                        up_key, chunks[c, _ROOM], up_records, codes_at, scales_at, up_is_fp16,
                        codes, scales, starts, chunks[c, _SLOT],
                        out_tiles, ((c - first) * 4 + i) * wide * ROWS, up_groups, up_group_blocks,
                    )  # fmt: skip
            for c in range(first, last):
                place = chunks[c, _SLOT] * inner_blocks + block * chunks[c, _ROOM]
                added_at = e * 2 * inner + 2 * block * BLOCK
                for t in range(chunks[c, _ROWS]):
                    pairs = ((c - first) * 4 * wide + t) * ROWS
                    for half in range(2):
                        two = pairs + 2 * half * wide * ROWS
                        swiglu_pairs(
                            out_tiles, two, two + wide * ROWS, up_added, added_at + 2 * half * PAIRS, limit,
                            gated, half * PAIRS,
                        )  # fmt: skip
                    quantize_block(
                        gated, 0, passes, down_unit, down_bias, inner_codes, inner_scales, inner_starts,
                        place + t,
                    )  # fmt: skip

        y = np.empty((all_slots, hidden), np.float32)
        tiles = (hidden + ROWS - 1) // ROWS
        tile_codes, tile_scales = down_code_bytes // tiles, down_groups * ROWS * down_scale_bytes
        tasks = (tiles + SPAN - 1) // SPAN
        for task in prange(all_active * tasks):
            use, first = task // tasks, task % tasks * SPAN
            at = active[use, 0] * down_records.shape[1]
            one = np.empty((wide, ROWS), np.float32)
            for index in range(first, min(first + SPAN, tiles)):
                for c in range(active[use, 1], active[use, 2]):
                    slot = chunks[c, _SLOT]
                    tile(
                        down_key, chunks[c, _ROOM], down_records, at + index * tile_codes,
                        at + down_code_bytes + index * tile_scales, down_is_fp16, inner_codes, inner_scales,
                        inner_starts, slot, one, 0, down_groups, down_group_blocks,
                    )  # fmt: skip
                    for t in range(chunks[c, _ROWS]):
                        for i in range(min(ROWS, hidden - index * ROWS)):
                            y[slot + t, index * ROWS + i] = one[t, i]

        for t in prange(T):
            for n in range(hidden):
                total = np.float32(0)
                for c in range(k):
                    total += weights[t, c] * (y[slots[rows[t * k + c]], n] + down_added[ids[t, c], n])
                out[t, n] = x[t, n] + total

    return experts
