"""Attention kernels against float64 over the cache's own rounded keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from gptoss_lite.kernels.cuda.checks import Check
from gptoss_lite.kernels.cuda.checks.common import Array, assert_close, rounded, to_values, upload
from gptoss_lite.kernels.cuda.launch import attention as launch
from gptoss_lite.kernels.cuda.layout import BLOCK_TOKENS, from_operands, to_bits
from gptoss_lite.kernels.cuda.layout import HEAD_DIM as D
from gptoss_lite.kernels.cuda.runtime import Runtime

NAN_BITS = 0xFFFF  # a NaN as fp16 and as bf16


def _half_step(x: Array, fp16: bool) -> Array:
    """Half the distance between the 16-bit numbers around x: what rounding to the nearest may change."""
    exponent = np.frexp(np.abs(x))[1] - 1
    step: Array = np.ldexp(1.0, np.maximum(exponent, -14) - 11 if fp16 else exponent - 8)
    return step


@dataclass(frozen=True, slots=True)
class _Cache:
    """A paged cache in which everything that must not be read is NaN, and what it holds: (length, Hk, D)."""

    keys: Array
    values: Array
    table: Array
    exact: list[tuple[Array, Array]]


def _cache(
    rng: np.random.Generator, lengths: Sequence[int], firsts: Sequence[int], Hk: int, fp16: bool,
    lean: float = 0.0,
) -> _Cache:  # fmt: skip
    """Store `lengths` tokens of each sequence in scattered blocks, those before `firsts` as NaN.

    Block 0 is all NaN, and every entry of the table without a visible key leads there. lean: what the first
    dimension of each key is moved by.
    """
    needed = [-(-length // BLOCK_TOKENS) for length in lengths]
    ids = rng.permutation(np.arange(1, sum(needed) + 3, dtype=np.int32))
    shape = (len(ids) + 1, Hk, BLOCK_TOKENS, D)
    keys, values = np.full(shape, NAN_BITS, np.uint16), np.full(shape, NAN_BITS, np.uint16)
    table = np.zeros((len(lengths), max(needed) + 2), np.int32)
    exact, used = [], 0
    for s, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        start = first // BLOCK_TOKENS
        table[s, start : needed[s]] = ids[used : used + needed[s] - start]
        used += needed[s]
        both = rng.standard_normal((2, length, Hk, D)).astype(np.float32)
        both[0, ..., 0] += lean
        bits = [to_bits(x, not fp16) for x in both]
        j = np.arange(first, length)
        for stored, source in zip((keys, values), bits, strict=True):
            stored[table[s, j // BLOCK_TOKENS], :, j % BLOCK_TOKENS] = source[j]
        exact.append((to_values(bits[0], not fp16), to_values(bits[1], not fp16)))
    return _Cache(keys, values, table, exact)


def _attend(q: Array, keys: Array, values: Array, positions: Array, sinks: Array, window: int) -> Array:
    """Softmax attention of one sequence's queries (n, H, D) in float64, the sink in the denominator only."""
    j = np.arange(len(keys))
    visible = (j <= positions[:, None]) & (j > positions[:, None] - (window or len(keys)))
    shared = q.astype(np.float64).reshape(len(q), keys.shape[1], -1, D)
    scores = np.einsum("qhmd,khd->hmqk", shared, keys) / np.sqrt(D)
    scores = np.where(visible, scores, -np.inf).reshape(q.shape[1], len(q), -1)
    top = np.maximum(scores.max(-1), sinks.astype(np.float64)[:, None])
    weights = np.exp(scores - top[..., None])
    weights /= (weights.sum(-1) + np.exp(sinks[:, None] - top))[..., None]
    weights = weights.reshape(*shared.shape[1:3], len(q), -1)
    out: Array = np.einsum("hmqk,khd->qhmd", weights, values).reshape(q.shape)
    return out


# Around the edges of a block of 16, of a window of 128, and of a split of 256; 0 is an empty row.
LENGTHS = (1, 15, 16, 17, 127, 128, 129, 0, 300, 1030)
SINKS = (-1e4, -30.0, 0.0, 3.0, 10.0, 30.0, 100.0, 1e4)


def _decode(
    rt: Runtime, lengths: Sequence[int] = LENGTHS, H: int = 8, Hk: int = 1, window: int = 0, splits: int = 8,
    bf16_out: bool = False, kv_fp16: bool = False, size: float = 3.0, sinks: Sequence[float] | None = None,
    lean: float = 0.0,
) -> None:  # fmt: skip
    rng = np.random.default_rng(1)
    cache = _cache(rng, lengths, [max(0, n - window) if window else 0 for n in lengths], Hk, kv_fp16, lean)
    q = (size * rng.standard_normal((len(lengths), H, D))).astype(np.float32)
    q[..., 0] -= 50 * lean
    sink = np.asarray(2 * rng.standard_normal(H) if sinks is None else sinks, np.float32)
    want = np.zeros(q.shape)
    for s, (keys, values) in enumerate(cache.exact):
        if len(keys):
            last = np.array([len(keys) - 1])
            want[s] = _attend(q[s : s + 1], keys, values, last, sink, window)[0]
    bits = _run_decode(rt, cache, q, sink, lengths, window, splits, bf16_out, kv_fp16)
    got = from_operands(bits, H * D, bf16_out).reshape(q.shape).astype(np.float64)
    # Queries and weights have 16 bits or more, so scores are right to some 1e-6 of |q| |k|; the rounding of
    # the output comes on top.
    assert_close(got, want, _half_step(want, not bf16_out) + 1e-5 * max(size, 3.0, 50 * lean))
    assert not bits[np.array(lengths) == 0].any(), "an empty row is not zero"


def _run_decode(
    rt: Runtime, cache: _Cache, q: Array, sinks: Array, lengths: Sequence[int], window: int, splits: int,
    bf16_out: bool = False, kv_fp16: bool = False, runs: int = 1,
) -> Array:  # fmt: skip
    S, H, _ = q.shape
    floats, counts = launch.decode_workspace(S, H, cache.keys.shape[1], splits)
    out = upload(rt, np.full((S, H * D), NAN_BITS, np.uint16))
    workspace = upload(rt, np.full(floats, np.nan, np.float32))
    counters = upload(rt, np.zeros(counts, np.uint32))
    queries, keys, values, table, positions, sink = (
        upload(rt, array)
        for array in (q, cache.keys, cache.values, cache.table, np.array(lengths, np.int32) - 1, sinks)
    )
    for _ in range(runs):
        launch.attention_decode(
            rt, queries, keys, values, table, positions, sink, out, workspace, counters,
            window=window, splits=splits, bf16_out=bf16_out, kv_fp16=kv_fp16,
        )  # fmt: skip
    assert not rt.download(counters).any(), "a counter was not left at zero"
    return rt.download(out)


def _decode_alone(rt: Runtime) -> None:
    """A sequence's bits depend neither on the grid nor on the other sequences nor on an earlier launch."""
    rng = np.random.default_rng(2)
    lengths = (700, 40, 513)
    cache = _cache(rng, lengths, (0, 0, 0), 2, False)
    q = (3 * rng.standard_normal((3, 6, D))).astype(np.float32)
    sinks = rng.standard_normal(6).astype(np.float32)
    together = _run_decode(rt, cache, q, sinks, lengths, 0, 3)
    for s, splits in enumerate((64, 5, 8)):
        one = slice(s, s + 1)
        single = _Cache(cache.keys, cache.values, cache.table[one], cache.exact[one])
        alone = _run_decode(rt, single, q[one], sinks, lengths[s : s + 1], 0, splits, runs=2)
        assert (alone == together[one]).all(), f"sequence {s} differs with {splits} splits"


# Chunks (position of the first query, queries): one row, part of a tile, more than one, behind earlier ones.
CHUNKS = ((0, 1), (0, 75), (130, 9), (295, 1), (62, 5), (190, 3))


def _prefill(
    rt: Runtime, chunks: Sequence[tuple[int, int]] = CHUNKS, H: int = 8, Hk: int = 1, window: int = 0,
    bf16_out: bool = False, kv_fp16: bool = False, size: float = 3.0, sinks: Sequence[float] | None = None,
    lean: float = 0.0,
) -> None:  # fmt: skip
    rng = np.random.default_rng(3)
    firsts = [max(0, start - window + 1) if window else 0 for start, _ in chunks]
    cache = _cache(rng, [start + count for start, count in chunks], firsts, Hk, kv_fp16, lean)
    counts, starts = [count for _, count in chunks], [start for start, _ in chunks]
    q = (size * rng.standard_normal((sum(counts), H, D))).astype(np.float32)
    q[..., 0] -= 50 * lean
    sink = np.asarray(2 * rng.standard_normal(H) if sinks is None else sinks, np.float32)
    queries = rounded(q, not kv_fp16)
    ends = np.cumsum(counts)
    want = np.concatenate([
        _attend(queries[end - count : end], *exact, np.arange(start, start + count), sink, window)
        for exact, start, count, end in zip(cache.exact, starts, counts, ends, strict=True)
    ])  # fmt: skip
    bits = _run_prefill(rt, cache, q, sink, launch.prefill_tiles(counts, starts), window, bf16_out, kv_fp16)
    got = from_operands(bits, H * D, bf16_out).reshape(q.shape).astype(np.float64)
    # Queries are rounded as the kernel rounds them. A weight is right to 2^-9 (bf16) or 2^-12 of itself, the
    # values are up to 4, and errors add up as their squares do.
    assert_close(got, want, _half_step(want, not bf16_out) + (1e-3 if kv_fp16 else 6e-3))


def _run_prefill(
    rt: Runtime, cache: _Cache, q: Array, sinks: Array, tiles: Array, window: int, bf16_out: bool = False,
    kv_fp16: bool = False,
) -> Array:  # fmt: skip
    out = upload(rt, np.full((len(q), q.shape[1] * D), NAN_BITS, np.uint16))
    queries, keys, values, table, where, sink = (
        upload(rt, array) for array in (q, cache.keys, cache.values, cache.table, tiles, sinks)
    )
    launch.attention_prefill(
        rt, queries, keys, values, table, where, sink, out,
        window=window, bf16_out=bf16_out, kv_fp16=kv_fp16,
    )  # fmt: skip
    return rt.download(out)


def _prefill_alone(rt: Runtime, window: int) -> None:
    """A row's bits do not depend on the tile that it is in."""
    rng = np.random.default_rng(4)
    start, count = 120, 21
    cache = _cache(rng, [start + count], [0], 1, False)
    q = (3 * rng.standard_normal((count, 4, D))).astype(np.float32)
    sinks = rng.standard_normal(4).astype(np.float32)
    results = []
    for cuts in ((0, count), (0, 1, 9, 20, count)):
        tiles = [(0, a, b - a, start + a) for a, b in pairwise(cuts)]
        results.append(_run_prefill(rt, cache, q, sinks, np.array(tiles, np.int32), window))
    assert (results[0] == results[1]).all(), "other tiles, other bits"


def _rotate(rt: Runtime, H: int, Hk: int, kv_fp16: bool) -> None:
    rng = np.random.default_rng(5)
    sequences = np.array([0, 0, 1, 1, 1, 0, 1], np.int32)
    positions = np.array([15, 16, 0, 1, 2, -1, 47], np.int32)  # neighbours across a block, an empty row
    T, blocks = len(positions), 7
    table = np.array([[4, 2, -1], [5, -1, 1]], np.int32)
    projected = rng.standard_normal((T, H + 2 * Hk, D)).astype(np.float32)
    angle = rng.uniform(-4, 4, (T, D // 2))
    angles = (1.25 * np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)
    keys, values = (upload(rt, np.full((blocks, Hk, 16, D), 0xCDCD, np.uint16)) for _ in range(2))
    q = upload(rt, np.full((T, H, D), np.nan, np.float32))
    inputs = (projected.reshape(T, -1), angles, sequences, positions, table)
    x, turns, owners, places, pages = (upload(rt, array) for array in inputs)
    launch.rotate_append(rt, x, turns, owners, places, pages, keys, values, q, kv_fp16=kv_fp16)

    low, high = np.split(projected[:, : H + Hk].astype(np.float64), 2, axis=-1)
    cos, sin = np.split(angles.astype(np.float64)[:, None], 2, axis=-1)
    turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    filled = positions >= 0
    want_q = np.where(filled[:, None, None], turned[:, :H], 0)
    assert_close(rt.download(q).astype(np.float64), want_q, 1e-6)  # two float32 roundings of up to 6

    at = (table[sequences, positions // 16][filled], slice(None), (positions % 16)[filled])
    got = rt.download(keys)
    want_k = turned[filled, H:]
    assert_close(to_values(got[at], not kv_fp16), want_k, _half_step(want_k, kv_fp16) + 1e-6)
    stored = rt.download(values)
    assert (stored[at] == to_bits(projected[filled, H + Hk :], not kv_fp16)).all(), (
        "values are not just rounded"
    )
    for cache in (got, stored):
        cache[at] = 0xCDCD
        assert (cache == 0xCDCD).all(), "something else was overwritten"


CHECKS: dict[str, Check] = {
    "decode, ragged lengths": _decode,
    "decode, window 128": partial(_decode, window=128),
    "decode, window 5": partial(_decode, window=5),
    "decode, window 300 in two splits": partial(_decode, window=300),
    "decode, 3 heads per key head": partial(_decode, H=6, Hk=2, lengths=(300, 17)),
    "decode, 1 head per key head": partial(_decode, H=3, Hk=3, lengths=(300, 17)),
    "decode, 12 heads per key head": partial(_decode, H=24, Hk=2, lengths=(300, 17)),
    "decode, at most 1 split": partial(_decode, splits=1),
    "decode, at most 2 splits": partial(_decode, splits=2),
    "decode, at most 64 splits": partial(_decode, splits=64),
    "decode, fp16 cache": partial(_decode, kv_fp16=True),
    "decode, bf16 operands": partial(_decode, bf16_out=True, lengths=(300, 17)),
    "decode, huge scores": partial(_decode, size=100.0),
    "decode, sinks small and great": partial(_decode, sinks=SINKS),
    "decode, scores around -400": partial(_decode, lean=8.0, sinks=[-1e4] * 8),
    "decode, nothing but empty rows": partial(_decode, lengths=(0, 0)),
    "decode, a sequence alone has the same bits": _decode_alone,
    "prefill, ragged chunks": _prefill,
    "prefill, window 128": partial(_prefill, window=128),
    "prefill, window 5": partial(_prefill, window=5),
    "prefill, 3 heads per key head": partial(_prefill, H=6, Hk=2, window=128),
    "prefill, 1 head per key head": partial(_prefill, H=2, Hk=2),
    "prefill, 12 heads per key head": partial(_prefill, H=24, Hk=2, chunks=((3, 7), (70, 1))),
    "prefill, behind 1000 keys": partial(_prefill, chunks=((1000, 12),)),
    "prefill, fp16 cache": partial(_prefill, kv_fp16=True),
    "prefill, bf16 operands": partial(_prefill, bf16_out=True, chunks=((60, 9),)),
    "prefill, huge scores": partial(_prefill, size=100.0),
    "prefill, sinks small and great": partial(_prefill, sinks=SINKS),
    "prefill, scores around -400": partial(_prefill, lean=8.0, sinks=[-1e4] * 8),
    "prefill, a row has the same bits in any tile": partial(_prefill_alone, window=0),
    "prefill, a row has the same bits in any tile, window": partial(_prefill_alone, window=50),
    "rotate and append": partial(_rotate, H=6, Hk=2, kv_fp16=False),
    "rotate and append, fp16 cache": partial(_rotate, H=16, Hk=2, kv_fp16=True),
}
