"""Rotary embedding of queries and keys, and the append of keys and values to the cache."""

from functools import cache
from typing import Any

import numba
import numpy as np
from numba import cfunc, njit, prange, types

from gptoss_lite.kernels.cpu import Array
from gptoss_lite.kernels.cpu.workers import ADDRESS, arguments, array, call, count

_TOKENS = 8  # in a task

_pack, _read = arguments(
    array(types.float32, 2),  # qkv
    array(types.float32, 2),  # cos
    array(types.float32, 2),  # sin
    array(types.int32, 1),  # blocks
    array(types.int32, 1),  # slots
    array(types.uint32, 3),  # q, the bits of float32, or of bf16 two by two
    array(types.uint16, 4),  # keys
    array(types.uint16, 4),  # values
    array(types.int64, 1),  # counters: of threads, of tasks begun
    array(types.float32, 2),  # a head, each thread's own
    array(types.uint32, 2),  # its bits
)


def rotate_and_append(
    qkv: Array, cos: Array, sin: Array, blocks: Array, slots: Array, q: Array, keys: Array, values: Array
) -> None:
    """Split `qkv`, rotate queries and keys, store keys and values in the cache.

    qkv float32 (T, (H + 2 Hk) * D), cos and sin float32 (T, D/2), blocks and slots int32 (T,): where each
    token is kept; q (T, H, D), float32 or the bits of bf16 as uint16, is written, keys and values uint16
    (block, Hk, 16, D) are appended to.
    """
    T, D = len(qkv), q.shape[2]
    threads = min(numba.get_num_threads(), -(-T // _TOKENS))
    cos, sin = (table.astype(np.float32, copy=False) for table in (cos, sin))
    head = np.empty((threads, D + 16), np.float32)  # so that no two threads write to one cache line
    operands = (
        qkv, cos, sin, blocks, slots, q.view(np.uint32), keys, values, np.zeros(2, np.int64), head,
        head.view(np.uint32),
    )  # fmt: skip
    _run(_make_rotate().address, threads, operands)


@njit(parallel=True, cache=True, boundscheck=False, error_model="numpy")
def _run(work, threads, operands):  # type: ignore[no-untyped-def]
    place = _pack(operands)
    if threads == 1:
        call(work, place)
    else:
        for _ in prange(threads):
            call(work, place)


@njit(boundscheck=False)
def _to_bf16(bits):  # type: ignore[no-untyped-def]
    """Round the bits of a finite float32 to bf16, half to even."""
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@cache
def _make_rotate() -> Any:
    """Compile what each thread does."""

    @cfunc(types.void(ADDRESS), cache=True, error_model="numpy")
    def work(address):  # type: ignore[no-untyped-def]
        qkv, cos, sin, blocks, slots, q, keys, values, counters, rotated, bits = _read(address)
        worker = count(counters, 0)
        T, H = q.shape[:2]
        Hk, D = keys.shape[1], keys.shape[3]
        half = D // 2
        while True:
            first = count(counters, 1) * _TOKENS
            if first >= T:
                break
            for t in range(first, min(first + _TOKENS, T)):
                block, slot = blocks[t], slots[t]
                for head in range(H + Hk):
                    base = head * D
                    for i in range(half):
                        a, b = qkv[t, base + i], qkv[t, base + half + i]
                        rotated[worker, i] = a * cos[t, i] - b * sin[t, i]
                        rotated[worker, half + i] = b * cos[t, i] + a * sin[t, i]
                    if head >= H:
                        for i in range(D):
                            keys[block, head - H, slot, i] = _to_bf16(bits[worker, i])
                    elif q.shape[2] == D:
                        for i in range(D):
                            q[t, head, i] = bits[worker, i]
                    else:
                        for i in range(half):
                            upper = _to_bf16(bits[worker, 2 * i + 1]) << np.uint32(16)
                            q[t, head, i] = _to_bf16(bits[worker, 2 * i]) | upper
                for kv in range(Hk):
                    for i in range(D):
                        rotated[worker, i] = qkv[t, (H + Hk + kv) * D + i]
                    for i in range(D):
                        values[block, kv, slot, i] = _to_bf16(bits[worker, i])

    return work
