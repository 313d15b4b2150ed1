"""Paged attention with sinks: rotary embedding and append to the cache, then softmax block by block.

A block holds 16 tokens at fixed absolute positions and blocks are visited in order, so a row's sums do not
depend on how its sequence was cut into chunks or on who shares the batch. Keys and values are bf16 bits in
uint16.
"""

import math

import numpy as np
from numba import njit, prange

from gptoss_lite.kernels.cpu import Array

_DOT = {"contract", "reassoc", "nsz"}


@njit(inline="always")
def _to_bf16(bits):  # type: ignore[no-untyped-def]
    """Round the bits of a finite float32 to bf16, half to even."""
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@njit(cache=True, boundscheck=False)
def rotate_and_append(
    qkv: Array, cos: Array, sin: Array, blocks: Array, slots: Array, q: Array, keys: Array, values: Array
) -> None:
    """Split `qkv`, rotate queries and keys, store keys and values in the cache.

    qkv float32 (T, (H + 2 Hk) * D), cos and sin float32 (T, D/2), blocks and slots int32 (T,): where each
    token is kept, q float32 (T, H, D) is written, keys and values uint16 (block, Hk, 16, D) are appended to.
    """
    T, H, D = q.shape
    Hk = keys.shape[1]
    half = D // 2
    rotated = np.empty(D, np.float32)
    bits = rotated.view(np.uint32)
    for t in range(T):
        for head in range(H + 2 * Hk):
            base = head * D
            if head < H + Hk:
                for i in range(half):
                    a, b = qkv[t, base + i], qkv[t, base + half + i]
                    rotated[i] = a * cos[t, i] - b * sin[t, i]
                    rotated[half + i] = b * cos[t, i] + a * sin[t, i]
            else:
                for i in range(D):
                    rotated[i] = qkv[t, base + i]
            for i in range(D):
                if head < H:
                    q[t, head, i] = rotated[i]
                elif head < H + Hk:
                    keys[blocks[t], head - H, slots[t], i] = _to_bf16(bits[i])
                else:
                    values[blocks[t], head - H - Hk, slots[t], i] = _to_bf16(bits[i])


@njit(parallel=True, cache=True, fastmath=_DOT, boundscheck=False)
def attention(
    q: Array,
    keys: Array,
    values: Array,
    table: Array,
    sequence: Array,
    positions: Array,
    sinks: Array,
    window: int,
    scale: float,
    out: Array,
) -> None:
    """Write each query's attention over its sequence's visible keys; a task is one token and one key head.

    q float32 (T, H, D), keys and values uint16 (block, Hk, 16, D), table int32 (S, blocks), sequence and
    positions int32 (T,), sinks float32 (H,), out float32 (T, H, D). Key j is visible to position i when i -
    window < j <= i.
    """
    T, H, D = q.shape
    Hk, B = keys.shape[1:3]
    G = H // Hk  # query heads that share one key head
    for task in prange(T * Hk):
        t, kv = task // Hk, task % Hk
        position = positions[t]
        first = max(0, position - window + 1)
        key_bits = np.empty((B, D), np.uint32)
        value_bits = np.empty((B, D), np.uint32)
        key = key_bits.view(np.float32)
        value = value_bits.view(np.float32)
        score = np.empty(B, np.float32)
        total = np.ones(G, np.float32)  # the sink's own weight, e^(s - maximum), before any key
        maximum = np.empty(G, np.float32)
        accumulated = np.zeros((G, D), np.float32)
        for g in range(G):
            maximum[g] = sinks[kv * G + g]
        for index in range(first // B, position // B + 1):
            block = table[sequence[t], index]
            low = max(first - index * B, 0)
            high = min(position + 1 - index * B, B)
            for j in range(low, high):
                for d in range(D):
                    key_bits[j, d] = np.uint32(keys[block, kv, j, d]) << np.uint32(16)
                    value_bits[j, d] = np.uint32(values[block, kv, j, d]) << np.uint32(16)
            for g in range(G):
                head = kv * G + g
                best = maximum[g]
                for j in range(low, high):
                    dot = np.float32(0)
                    for d in range(D):
                        dot += q[t, head, d] * key[j, d]
                    score[j] = dot * np.float32(scale)
                    best = max(best, score[j])
                shrink = np.float32(math.exp(maximum[g] - best))
                maximum[g] = best
                total[g] *= shrink
                for d in range(D):
                    accumulated[g, d] *= shrink
                for j in range(low, high):
                    weight = np.float32(math.exp(score[j] - best))
                    total[g] += weight
                    for d in range(D):
                        accumulated[g, d] += weight * value[j, d]
        for g in range(G):
            for d in range(D):
                out[t, kv * G + g, d] = accumulated[g, d] / total[g]
