"""Rotary embedding of queries and keys, and the append of keys and values to the cache."""

from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from gptoss_lite.kernels.cpu import Array, isa
from gptoss_lite.kernels.cpu.program import Steps
from gptoss_lite.kernels.cpu.workers import TASK, Operands, array

_TOKENS = 8  # in a task

_ROTATE = Operands(
    array(types.float32, 2),  # qkv
    array(types.float32, 2),  # cos
    array(types.float32, 2),  # sin
    array(types.int32, 2),  # table
    array(types.int32, 1),  # sequence
    array(types.int32, 1),  # positions
    array(types.uint32, 3),  # q, the bits of float32, or of bf16 two by two
    array(types.uint16, 4),  # keys
    array(types.uint16, 4),  # values
)
_read = _ROTATE.read


def rotate_and_append(
    steps: Steps, qkv: Array, cos: Array, sin: Array, table: Array, sequence: Array, positions: Array,
    q: Array, keys: Array, values: Array,
) -> None:  # fmt: skip
    """Split `qkv`, rotate queries and keys, store keys and values in the cache.

    qkv float32 (T, (H + 2 Hk) * D), cos and sin float32 (T, D/2), table int32 (S, blocks): where each 16
    positions of a sequence are kept, sequence and positions int32 (T,); q (T, H, D), float32 or the bits of
    bf16 as uint16, is written, keys and values uint16 (block, Hk, 16, D) are appended to.
    """
    tasks = -(-len(qkv) // _TOKENS) * keys.shape[1]
    steps.add(
        _make_rotate(), tasks, _ROTATE,
        qkv, cos, sin, table, sequence, positions, q.view(np.uint32), keys, values,
    )  # fmt: skip


@njit(boundscheck=False)
def _to_bf16(bits):  # type: ignore[no-untyped-def]
    """Round the bits of a finite float32 to bf16, half to even."""
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@njit(boundscheck=False)
def _store(bits, row):  # type: ignore[no-untyped-def]
    """Write float32 numbers as bf16, both by their bits."""
    for d in range(len(row)):
        row[d] = _to_bf16(bits[d])


@cache
def _make_rotate() -> Any:
    key = isa.key()

    @cfunc(TASK, cache=True, error_model="numpy")
    def rotate(place, task, worker):  # type: ignore[no-untyped-def]
        """Take a key head, and the query heads that share it, of some tokens."""
        qkv, cos, sin, table, sequence, positions, q, keys, values = _read(key, place)
        T, H = q.shape[:2]
        Hk, size, D = keys.shape[1:]
        G, half = H // Hk, D // 2
        kv, first = task % Hk, task // Hk * _TOKENS
        rotated = np.empty(D, np.float32)
        bits, low, high = rotated.view(np.uint32), rotated[:half], rotated[half:]
        for t in range(first, min(first + _TOKENS, T)):
            block, slot = table[sequence[t], positions[t] // size], positions[t] % size
            c, s = cos[t], sin[t]  # loops over views from 0 on become vector code
            for i in range(G + 1):
                head = kv * G + i if i < G else H + kv
                x, y = qkv[t, head * D : head * D + half], qkv[t, head * D + half : head * D + D]
                for d in range(half):
                    low[d] = x[d] * c[d] - y[d] * s[d]
                for d in range(half):
                    high[d] = y[d] * c[d] + x[d] * s[d]
                if i == G:
                    _store(bits, keys[block, kv, slot])
                elif q.shape[2] == D:
                    target = q[t, head]
                    for d in range(D):
                        target[d] = bits[d]
                else:
                    target = q[t, head]
                    for d in range(half):
                        upper = _to_bf16(bits[2 * d + 1]) << np.uint32(16)
                        target[d] = _to_bf16(bits[2 * d]) | upper
            base = (H + Hk + kv) * D
            rotated[:] = qkv[t, base : base + D]
            _store(bits, values[block, kv, slot])

    return rotate
