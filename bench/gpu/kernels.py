"""Every kernel alone, at gpt-oss's own sizes, over weights that no cache holds."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from bench.gpu.device import Device, Result, bits16
from bench.gpu.timing import (
    BLOCK_TOKENS,
    DECODE_TILE,
    EPS,
    LIMIT,
    MIN_WIDTH,
    MOST_SPLITS,
    PREFILL_TILE,
    Bench,
    Groups,
    Sizes,
    choices,
    expert_layouts,
    tables_of,
)  # fmt: skip
from gptoss_lite.kernels.cuda.launch import attention, dense, gemm, moe, routing, sampling
from gptoss_lite.kernels.cuda.layout import HEAD_DIM, Format, Layout, plain_rows, rope_rows
from gptoss_lite.kernels.cuda.runtime import Array


def kernels(device: Device, sizes: Sizes) -> Iterator[Result]:
    """Time every kernel of decode at every batch, then those of prefill."""
    bench = Bench(device, sizes)
    for batch in sizes.batches:
        yield from _dense_decode(bench, batch)
        yield from _experts_decode(bench, batch)
        yield from _sampling(bench, batch)
        for context in sizes.contexts:
            yield _attention_decode(bench, batch, context, 0)
        yield _attention_decode(bench, batch, max(sizes.contexts), sizes.window)
    for tokens in sizes.prefills:
        yield from _dense_prefill(bench, tokens)
        yield from _experts_prefill(bench, tokens)


def _dense_decode(b: Bench, S: int) -> Iterator[Result]:
    """Embedding, both projections of attention, and the head."""
    s, rt = b.sizes, b.runtime
    positions, x, norm = b.ints(np.arange(S)), b.floats(S, s.hidden), b.floats(s.hidden)
    time = partial(b.time, batch=S)

    rows = min(s.vocab, 65_536)
    table = b.upload(bits16(b.rng, (rows, s.hidden), True))
    tokens = b.ints(b.rng.integers(0, rows, (64, S)))
    drawn, angles, inv_freq = b.ints(np.zeros(S)), b.empty(S, HEAD_DIM), b.floats(HEAD_DIM // 2)
    yield time(
        "embed",
        lambda i: dense.embed(
            rt, table, tokens[i], drawn, positions, inv_freq, x, angles, concentration=1.0, fp16=False
        ),
        64, nbytes=S * s.hidden * 6,
    )  # fmt: skip

    layout = Layout(Format.DENSE, (s.heads + 2 * s.key_heads) * HEAD_DIM, s.hidden)
    packed = b.packed(layout, b.copies(layout.nbytes))
    bias, q = b.floats(layout.rows), b.empty(S, s.heads, HEAD_DIM)
    keys, values = b.cache(S)
    blocks = b.ints(np.arange(S)[:, None])
    yield time(
        "qkv_decode",
        lambda i: dense.qkv_decode(
            rt, x, norm, packed[i], layout, bias, angles, positions, blocks, keys, values, q, eps=EPS,
            kv_fp16=b.kv_fp16,
        ),
        len(packed), nbytes=layout.nbytes,
    )  # fmt: skip

    out = Layout(Format.DENSE, s.hidden, s.heads * HEAD_DIM)
    out_packed, out_bias = b.packed(out, b.copies(out.nbytes)), b.floats(s.hidden)
    attended = b.operands(S, s.heads * HEAD_DIM)
    yield time(
        "out_proj_decode",
        lambda i: dense.out_proj_decode(rt, attended, out_packed[i], out, out_bias, x),
        len(out_packed), nbytes=out.nbytes,
    )  # fmt: skip

    head = Layout(Format.DENSE, s.vocab, s.hidden)
    head_packed, best = b.packed(head, b.copies(head.nbytes)), b.zeros(S, np.uint64)
    draw = b.upload(np.ones(S, np.float32)), b.upload(np.arange(S, dtype=np.uint64)), b.ints(np.zeros(S))
    wanted = b.ints(np.arange(S))
    fresh = b.floats(S, s.hidden)  # x has grown with every out_proj
    yield time(
        "lm_head_decode",
        lambda i: dense.lm_head_decode(
            rt, fresh, wanted, norm, head_packed[i], head, None, best, *draw, positions, eps=EPS
        ),
        len(head_packed), nbytes=head.nbytes,
    )  # fmt: skip


def _experts_decode(b: Bench, S: int) -> Iterator[Result]:
    """Routing, and the two products of the chosen experts."""
    s, rt = b.sizes, b.runtime
    time = partial(b.time, batch=S)
    x, norm, positions = b.floats(S, s.hidden), b.floats(s.hidden), b.ints(np.arange(S))
    for experts in s.experts:
        yield _route(b, S, experts, x, norm, positions, batch=S)
    up, down = expert_layouts(b)
    experts = s.experts[0]
    sets = 8 * -(-experts // s.k)
    ids = choices(b, sets, S, experts)
    used = float(np.mean([len(np.unique(one)) for one in ids]))  # experts that a launch reads
    groups = Groups(b, ids, experts, DECODE_TILE)
    if S > 1:  # one token's choices need no sorting
        yield time("group", groups.group, sets, experts=experts)
    pairs = S * s.k
    weights = b.upload(np.full((S, s.k), 1 / s.k, np.float32))
    h, inner = b.operands(S, s.hidden), b.operands(pairs, s.intermediate)

    tables, _kept = tables_of(b, up, experts)
    bias = b.floats(experts, 2 * s.intermediate)
    yield time(
        "gate_up_decode",
        lambda i: moe.gate_up_decode(
            rt, h, tables[i % len(tables)], up, bias, *groups[i], inner, limit=LIMIT, bf16_out=False
        ),
        sets, nbytes=used * up.nbytes, experts=experts, experts_read=used,
    )  # fmt: skip
    down_tables, _records = tables_of(b, down, experts)
    down_bias, product = b.floats(experts, s.hidden), b.operands(pairs, s.intermediate)
    yield time(
        "down_decode",
        lambda i: moe.down_decode(
            rt, product, down_tables[i % len(down_tables)], down, down_bias, *groups[i][1:], groups.place[i],
            weights, x,
        ),
        sets, nbytes=used * down.nbytes, experts=experts, experts_read=used,
    )  # fmt: skip


def _route(b: Bench, T: int, experts: int, x: Array, norm: Array, positions: Array, **labels: Any) -> Result:
    s = b.sizes
    nbytes = experts * s.hidden * 2
    copies = b.copies(nbytes)
    router = b.repeated(bits16(b.rng, (experts, s.hidden), True), copies)
    bias, h = b.floats(experts), b.operands(T, s.hidden)
    ids, weights = b.empty(T, s.k, dtype=np.int32), b.empty(T, s.k)
    logits, counters = b.empty(T, experts), b.zeros(T, np.uint32)
    return b.time(
        "route",
        lambda i: routing.route(
            b.runtime, x, norm, router[i], bias, positions, h, ids, weights, logits, counters, eps=EPS,
            bf16=False,
        ),
        copies, nbytes=nbytes + T * s.hidden * 6, experts=experts, **labels,
    )  # fmt: skip


def _sampling(b: Bench, S: int) -> Iterator[Result]:
    """Draw with every filter, and hand the tokens on."""
    s, rt = b.sizes, b.runtime
    copies = min(b.copies(S * s.vocab * 4), 64)
    logits = b.repeated(b.rng.standard_normal((S, s.vocab), np.float32), copies)
    ones, zeros = np.ones(S, np.float32), b.ints(np.zeros(S))
    temperature, top_p, min_p = b.upload(ones), b.upload(0.9 * ones), b.upload(np.float32(0.01) * ones)
    top_k, seed = b.ints(np.full(S, 50)), b.upload(np.arange(S, dtype=np.uint64))
    best, positions = b.zeros(S, np.uint64), b.ints(np.arange(S))
    yield b.time(
        "sample",
        lambda i: sampling.sample(
            rt, logits[i], temperature, top_k, top_p, min_p, seed, zeros, positions, best
        ),
        copies, nbytes=S * s.vocab * 4, batch=S,
    )  # fmt: skip
    drawn, results = b.empty(S, dtype=np.int32), b.empty(S, 2, dtype=np.int32)
    yield b.time("finish", lambda i: sampling.finish(rt, best, drawn, results), 1, batch=S)


def _attention_decode(b: Bench, S: int, context: int, window: int) -> Result:
    """One query of each sequence at the end of its context; every launch and sequence has its own blocks."""
    s, rt = b.sizes, b.runtime
    visible = min(context, window or context)
    nbytes = S * visible * s.key_heads * HEAD_DIM * 2 * 2
    copies = b.copies(nbytes)
    used = -(-context // BLOCK_TOKENS)
    width = max(1 << (used - 1).bit_length(), MIN_WIDTH)
    seen = -(-visible // BLOCK_TOKENS) + 1  # with a window only the last blocks are looked up
    blocks = min(seen, used) * S * copies
    keys, values = b.cache(blocks)
    order = b.rng.permutation(blocks).reshape(copies, S, -1)
    table = np.zeros((copies, S, width), np.int32)
    table[:, :, used - order.shape[2] : used] = order
    tables, positions = b.ints(table), b.ints(np.full(S, context - 1))
    q, sinks = b.floats(S, s.heads, HEAD_DIM), b.floats(s.heads)
    out = b.operands(S, s.heads * HEAD_DIM)
    splits = min(MOST_SPLITS, -(-width // attention.BLOCKS_PER_SPLIT))
    floats, counters = attention.decode_workspace(S, s.heads, s.key_heads, splits)
    partial_sums, counts = b.empty(floats), b.zeros(counters, np.uint32)
    return b.time(
        "attention_decode",
        lambda i: attention.attention_decode(
            rt, q, keys, values, tables[i], positions, sinks, out, partial_sums, counts, window=window,
            splits=splits, bf16_out=False, kv_fp16=b.kv_fp16,
        ),
        copies, nbytes=nbytes, batch=S, context=context, window=window,
    )  # fmt: skip


def _dense_prefill(b: Bench, T: int) -> Iterator[Result]:
    """Norm, projections, rotation and attention of one prompt."""
    s, rt = b.sizes, b.runtime
    time = partial(b.time, tokens=T)
    x, norm, h = b.floats(T, s.hidden), b.floats(s.hidden), b.operands(T, s.hidden)
    yield time(
        "rms_norm", lambda i: dense.rms_norm(rt, x, None, norm, h, eps=EPS, bf16=False), 1,
        nbytes=T * s.hidden * 6,
    )  # fmt: skip
    heads = s.heads + 2 * s.key_heads
    layout = Layout(Format.DENSE, heads * HEAD_DIM, s.hidden)
    packed, bias = b.packed(layout, b.copies(layout.nbytes)), b.floats(layout.rows)
    order, projected = b.upload(rope_rows(heads, HEAD_DIM)), b.empty(T, layout.rows)
    yield time(
        "linear", lambda i: gemm.linear(rt, h, packed[i], layout, order, bias, projected), len(packed),
        flops=2.0 * T * layout.rows * s.hidden, of="qkv",
    )  # fmt: skip
    blocks = -(-T // BLOCK_TOKENS)
    keys, values = b.cache(blocks)
    keys, values = keys[:blocks], values[:blocks]
    table, positions, sequences = b.ints(np.arange(blocks)[None]), b.ints(np.arange(T)), b.ints(np.zeros(T))
    angles, q = b.floats(T, HEAD_DIM), b.floats(T, s.heads, HEAD_DIM)
    yield time(
        "rotate_append",
        lambda i: attention.rotate_append(
            rt, projected, angles, sequences, positions, table, keys, values, q, kv_fp16=b.kv_fp16
        ),
        1, nbytes=T * HEAD_DIM * (4 * heads + 4 * s.heads + 2 * 2 * s.key_heads),
    )  # fmt: skip
    keys, values = b.cache(blocks)  # finite ones, whatever was rotated
    tiles, sinks = b.upload(attention.prefill_tiles([T], [0])), b.floats(s.heads)
    queries, attended = b.floats(T, s.heads, HEAD_DIM), b.operands(T, s.heads * HEAD_DIM)

    def attend(i: int, *, window: int) -> None:
        attention.attention_prefill(
            rt, queries, keys, values, table, tiles, sinks, attended, window=window, bf16_out=False,
            kv_fp16=b.kv_fp16,
        )  # fmt: skip

    for window in (0, s.window):
        visible = float(np.minimum(np.arange(T) + 1, window or T).sum())
        yield time(
            "attention_prefill", partial(attend, window=window), 1,
            flops=4 * HEAD_DIM * s.heads * visible, window=window,
        )  # fmt: skip
    out = Layout(Format.DENSE, s.hidden, s.heads * HEAD_DIM)
    out_packed, out_order = b.packed(out, b.copies(out.nbytes)), b.upload(plain_rows(s.hidden))
    out_bias = b.floats(s.hidden)
    yield time(
        "linear",
        lambda i: gemm.linear(rt, attended, out_packed[i], out, out_order, out_bias, x, accumulate=True),
        len(out_packed), flops=2.0 * T * s.hidden * s.heads * HEAD_DIM, of="out",
    )  # fmt: skip


def _experts_prefill(b: Bench, T: int) -> Iterator[Result]:
    """Routing, grouping and the products of the experts of one prompt."""
    s, rt = b.sizes, b.runtime
    time = partial(b.time, tokens=T)
    x, norm, positions = b.floats(T, s.hidden), b.floats(s.hidden), b.ints(np.arange(T))
    for experts in s.experts:
        yield _route(b, T, experts, x, norm, positions, tokens=T)
    up, down = expert_layouts(b)
    experts, pairs = s.experts[0], T * s.k
    groups = Groups(b, choices(b, 2, T, experts), experts, PREFILL_TILE)
    yield time("group", groups.group, 2, experts=experts)
    h, inner = b.operands(T, s.hidden), b.operands(pairs, s.intermediate)
    tables, _kept = tables_of(b, up, experts)
    bias = b.floats(experts, 2 * s.intermediate)
    yield time(
        "moe_gate_up_prefill",
        lambda i: gemm.moe_gate_up_prefill(
            rt, h, tables[i % len(tables)], up, bias, *groups[i], inner, limit=LIMIT, bf16_out=False
        ),
        2, flops=2.0 * pairs * 2 * s.intermediate * s.hidden, experts=experts,
    )  # fmt: skip
    down_tables, _records = tables_of(b, down, experts)
    down_bias, y = b.floats(experts, s.hidden), b.empty(pairs, s.hidden)
    product = b.operands(pairs, s.intermediate)
    yield time(
        "moe_down_prefill",
        lambda i: gemm.moe_down_prefill(
            rt, product, down_tables[i % len(down_tables)], down, down_bias, *groups[i][1:], y
        ),
        2, flops=2.0 * pairs * s.intermediate * s.hidden, experts=experts,
    )  # fmt: skip
    weights = b.upload(np.full((T, s.k), 1 / s.k, np.float32))
    yield time(
        "combine", lambda i: gemm.combine(rt, y, groups.place[i], weights, x), 2,
        nbytes=4 * s.hidden * (pairs + 2 * T),
    )  # fmt: skip
