"""Embedding, RMSNorm and the dense products of decode against float64 over the same rounded operands."""

from functools import partial

import numpy as np

from gptoss_lite.kernels.cuda.checks import Check
from gptoss_lite.kernels.cuda.checks.common import (
    POISON,
    WHOLE_ROW,
    Array,
    Form,
    assert_close,
    assert_same,
    mxfp4_values,
    random_weights,
    rounded,
    to_values,
    upload,
)
from gptoss_lite.kernels.cuda.launch import dense as launch
from gptoss_lite.kernels.cuda.layout import (
    BLOCK,
    Format,
    Layout,
    from_operands,
    operands,
    pack_dense,
    padded,
    plain_rows,
    rope_rows,
    to_bits,
)
from gptoss_lite.kernels.cuda.layout import HEAD_DIM as D
from gptoss_lite.kernels.cuda.runtime import Runtime
from gptoss_lite.sampling import philox_uniform

EPS = 1e-5
# What sums in float32 may lose, of the sum of magnitudes; tensor cores truncate, step by step.
SUM_ERROR = 1e-5
_FLUSHED = 128 * 2.0**-127  # the largest number of which the smallest scale, flushed to zero, is a part

KINDS = {
    "dense fp16": Form(Format.DENSE),
    "dense bf16": Form(Format.DENSE, bf16=True),
    "int8 by 32": Form(Format.INT8),
    "int8 by 64": Form(Format.INT8, group=64),
    "int8 by 96": Form(Format.INT8, group=96),
    "int8 by row": Form(Format.INT8, group=WHOLE_ROW),
    "int8 by 32, bf16": Form(Format.INT8, bf16=True, scale_bf16=True),
    "mxfp4 fp16": Form(Format.MXFP4),
    "mxfp4 bf16": Form(Format.MXFP4, bf16=True),
}

TABLES = (
    (32, "bf16"), (160, "fp16"), (96, "float32"), (2880, "bf16"),
    (32, "mxfp4"), (160, "mxfp4"), (2880, "mxfp4"),
    (160, "int8 by 32, bf16"), (192, "int8 by 64, fp16"), (96, "int8 by 32, e8m0"),
    (192, "int8 by 96, bf16"), (160, "int8 by row, fp16"), (2880, "int8 by row, e8m0"),
)  # fmt: skip


def _floats(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def _weights(
    rng: np.random.Generator, form: Form, shape: tuple[int, int], order: Array
) -> tuple[Layout, Array, Array]:
    """Make a matrix: its layout, packed, and in natural order as float64."""
    packed, values = random_weights(rng, form, (1, *shape), order)
    return form.layout(*shape), packed[0], values[0]


def _product(x: Array, w: Array, layout: Layout, flips: int = 0) -> tuple[Array, Array]:
    """Multiply in float64, and say what a kernel may be off by.

    flips: how many operands may be one step from those in x, as their float32 values were near a tie.
    """
    allowed = SUM_ERROR * (np.abs(x) @ np.abs(w).T)
    if flips:
        largest = np.abs(x).max(axis=1)[:, None] * np.abs(w).max(axis=1)
        allowed = allowed + flips * largest * (2.0**-7 if layout.bf16 else 2.0**-10)
    return x @ w.T, allowed


def _normalised(x: Array, weight: Array) -> Array:
    x = x.astype(np.float64)
    y: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * weight
    return y


def _table(rng: np.random.Generator, rows: int, hidden: int, form: str) -> tuple[Array, Array | None, Array]:
    """Make an embedding of a form: rows, their scales where it has some, and the float64 values."""
    kind, _, rest = form.partition(" by ")
    match kind:
        case "float32":
            values = _floats(rng, rows, hidden)
            return values, None, values.astype(np.float64)
        case "bf16" | "fp16":
            bits = to_bits(_floats(rng, rows, hidden), kind == "bf16")
            return bits, None, to_values(bits, kind == "bf16")
    if kind == "mxfp4":
        blocks = rng.integers(0, 256, (rows, hidden // BLOCK, BLOCK // 2)).astype(np.uint8)
        exponents = rng.integers(0, 252, blocks.shape[:2]).astype(np.uint8)
        return blocks, exponents, mxfp4_values(blocks, exponents)
    group, scale_type = rest.split(", ")
    length = hidden if group == "row" else int(group)
    codes = rng.integers(-128, 128, (rows, hidden)).astype(np.int8)
    if scale_type == "e8m0":
        scales = rng.integers(0, 248, (rows, hidden // length)).astype(np.uint8)
        factors = np.ldexp(1.0, scales.astype(np.int32) - 127)
    else:
        scales = to_bits(rng.uniform(-0.1, 0.1, (rows, hidden // length)), scale_type == "bf16")
        factors = to_values(scales, scale_type == "bf16")
    return codes, scales, codes * np.repeat(factors, length, axis=1)


def _embed(rt: Runtime, hidden: int, form: str) -> None:
    rng = np.random.default_rng(hidden)
    rows, scales, natural = _table(rng, 50, hidden, form)
    table = rt.pinned(rows.shape, rows.dtype)
    table[...] = rows
    positions = np.array([0, 1, -1, 4095, 131071, 77], np.int32)
    tokens, drawn = np.array([49, 0, -99, 7, -2, -1], np.int32), np.array([3, 48], np.int32)
    meant = np.array([49, 0, 0, 7, 48, 3])  # -1 - r is drawn[r]; what an empty row holds is not looked at
    inv_freq = (150000.0 ** (-np.arange(32) / 32)).astype(np.float32)
    x, angles = upload(rt, _nans(6, hidden)), upload(rt, _nans(6, D))
    on_device = None if scales is None else upload(rt, scales)
    launch.embed(
        rt, table, upload(rt, tokens), upload(rt, drawn), upload(rt, positions), upload(rt, inv_freq), x,
        angles, concentration=1.25, fp16="fp16" in form, scales=on_device,
    )  # fmt: skip
    full = positions >= 0
    got, want = rt.download(x), np.where(full[:, None], natural[meant], 0)
    # A code and a scale have few enough digits for float32; what is too small for it may be zero.
    assert_close(got, want, np.where(np.abs(want) < _FLUSHED, _FLUSHED, 0))
    product = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    want = np.concatenate([np.cos(product), np.sin(product)], axis=1) * 1.25 * full[:, None]
    # Half a step of float32 above 1, and what the polynomials leave out.
    assert_close(rt.download(angles), want, 2.0**-24 + 1e-10)


def _nans(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def _rms_norm(rt: Runtime, hidden: int, bf16: bool) -> None:
    rng = np.random.default_rng(hidden)
    x, weight = _floats(rng, 5, hidden), _floats(rng, hidden)
    x[1] *= 1e4  # the result does not depend on it
    x[2] *= 1e-4  # eps matters
    x[3] = 0
    step = 2.0**-8 if bf16 else 2.0**-11
    gathered = np.array([4, 0, 0, 2], np.int32)
    length = padded(hidden)
    results = []
    for rows in None, gathered:
        out = upload(rt, np.full((5 if rows is None else 4, length), POISON, np.uint16))
        on_device = None if rows is None else upload(rt, rows)
        launch.rms_norm(rt, upload(rt, x), on_device, upload(rt, weight), out, eps=EPS, bf16=bf16)
        results.append(rt.download(out))
    want = _normalised(x, weight)
    got = from_operands(results[0], hidden, bf16)
    # Half a step of the operand, a few of float32, and fp16's subnormals.
    assert_close(got, want, np.abs(want) * step * 1.001 + 2.0**-25)
    assert not from_operands(results[0], length, bf16)[:, hidden:].any(), "padding is not zero"
    assert_same(results[1], results[0][gathered])


def _out_proj(rt: Runtime, kind: str, hidden: int, columns: int, batch: int) -> None:
    rng = np.random.default_rng(columns + batch)
    layout, packed, w = _weights(rng, KINDS[kind], (hidden, columns), plain_rows(hidden))
    a = operands(_floats(rng, batch, columns), layout.bf16)
    bias, x = _floats(rng, hidden), _floats(rng, batch, hidden)
    on_device = upload(rt, packed), upload(rt, bias)

    def run(rows: slice) -> Array:
        out = upload(rt, x[rows])
        launch.out_proj_decode(rt, upload(rt, a[rows]), on_device[0], layout, on_device[1], out)
        return rt.download(out)

    got = run(slice(None))
    product, allowed = _product(from_operands(a, columns, layout.bf16).astype(np.float64), w, layout)
    want = x + product + bias
    assert_close(got, want, allowed + 1e-6 * (np.abs(x) + np.abs(bias) + np.abs(want)))
    assert_same(run(slice(batch - 1, batch)), got[-1:])


def _qkv(
    rt: Runtime, kind: str, hidden: int, batch: int, heads: int = 2, key_heads: int = 1, kv_fp16: bool = False
) -> None:
    rng = np.random.default_rng(hidden + batch)
    every = heads + 2 * key_heads
    layout, packed, w = _weights(rng, KINDS[kind], (every * D, hidden), rope_rows(every, D))
    x, weight, bias = _floats(rng, batch, hidden), _floats(rng, hidden), _floats(rng, every * D)
    angle = rng.uniform(0, 6, (batch, D // 2))
    angles = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    positions = rng.integers(0, 48, batch).astype(np.int32)
    if batch > 1:
        positions[1] = -1
        x[1] = np.nan  # an empty row disturbs nobody
    blocks = 3 * batch + 2
    table = rng.permutation(blocks)[: 3 * batch].reshape(batch, 3).astype(np.int32)
    shape = blocks, key_heads, 16, D

    def run(rows: slice) -> tuple[Array, Array, Array]:
        keys, values = (upload(rt, np.full(shape, POISON, np.uint16)) for _ in range(2))
        n = len(positions[rows])
        q = upload(rt, _nans(n, heads, D))
        launch.qkv_decode(
            rt, upload(rt, x[rows]), upload(rt, weight), upload(rt, packed), layout, upload(rt, bias),
            upload(rt, angles[rows]), upload(rt, positions[rows]), upload(rt, table[rows]), keys, values,
            q, eps=EPS, kv_fp16=kv_fp16,
        )  # fmt: skip
        return rt.download(q), rt.download(keys), rt.download(values)

    q, keys, values = run(slice(None))
    full = positions >= 0
    normalised = rounded(_normalised(np.where(full[:, None], x, 0), weight), layout.bf16)
    product, allowed = _product(normalised, w, layout, flips=4)
    product = (product + bias).reshape(batch, every, D)
    allowed = (allowed + 1e-6).reshape(batch, every, D)
    wide = np.concatenate([angles[:, : D // 2]] * 2, axis=1)[:, None].astype(np.float64)
    sines = np.concatenate([-angles[:, D // 2 :], angles[:, D // 2 :]], axis=1)[:, None]
    want = product * wide + np.roll(product, D // 2, axis=2) * sines
    allowed = np.concatenate(  # of what is rotated: both of the pair count
        [
            (allowed + np.roll(allowed, D // 2, axis=2) + 1e-6 * np.abs(want))[:, : heads + key_heads],
            allowed[:, heads + key_heads :],
        ],
        axis=1,
    )
    want[:, heads + key_heads :] = product[:, heads + key_heads :]
    assert_close(q, want[:, :heads] * full[:, None, None], allowed[:, :heads])
    rows = np.flatnonzero(full)
    at = table[rows, positions[rows] // 16], slice(None), positions[rows] % 16
    for cache, first in (keys, heads), (values, heads + key_heads):
        part = want[rows, first : first + key_heads]
        half_step = np.abs(part) * (2.0**-11 if kv_fp16 else 2.0**-8)
        tolerance = allowed[rows, first : first + key_heads] + half_step * 1.01 + 2.0**-25
        assert_close(to_values(cache[at], not kv_fp16), part, tolerance)
        untouched = cache.copy()
        untouched[at] = POISON
        assert (untouched == POISON).all(), "a slot was written that is nobody's"
    alone = run(slice(batch - 1, batch))
    assert_same(alone[0], q[-1:])
    slot = table[-1, positions[-1] // 16], slice(None), positions[-1] % 16
    assert_same(alone[1][slot], keys[slot])
    assert_same(alone[2][slot], values[slot])


def _lm_head(rt: Runtime, kind: str, hidden: int, batch: int, vocab: int = 333) -> None:
    rng = np.random.default_rng(hidden + batch)
    layout, packed, w = _weights(rng, KINDS[kind], (vocab, hidden), plain_rows(vocab))
    x, weight = _floats(rng, batch + 2, hidden), _floats(rng, hidden)
    rows = rng.permutation(batch + 2)[:batch].astype(np.int32)
    if batch > 1:
        rows[1] = -1

    def run(rows: Array) -> Array:
        logits = upload(rt, _nans(len(rows), vocab))
        launch.lm_head_decode(
            rt, upload(rt, x), upload(rt, rows), upload(rt, weight), upload(rt, packed), layout, logits,
            None, eps=EPS,
        )  # fmt: skip
        return rt.download(logits)

    logits = run(rows)
    full = rows >= 0
    normalised = rounded(_normalised(x[rows], weight), layout.bf16) * full[:, None]
    product, allowed = _product(normalised, w, layout, flips=4)
    assert_close(logits, product, allowed)
    assert_same(run(rows[-1:]), logits[-1:])


def _draw(rt: Runtime, batch: int, vocab: int) -> None:
    """The drawn token is the best of logits / temperature + noise; of equals the lowest id."""
    rng = np.random.default_rng(batch)
    layout = KINDS["dense fp16"].layout(vocab, 96)
    bits = (rng.standard_normal((vocab, 96)) / 4).astype(np.float16).view(np.uint16)
    bits[vocab // 2 :] = bits[: vocab - vocab // 2]  # each logit twice: ties
    packed = pack_dense(layout, bits[None], plain_rows(vocab))[0]
    x = _floats(rng, batch, 96)
    rows = np.arange(batch, dtype=np.int32)
    temperature = np.where(rows % 3 == 0, 0, 0.5 + rows).astype(np.float32)
    if batch > 2:
        rows[2] = -1
    seed = rng.integers(0, 2**63, batch).astype(np.uint64) * np.uint64(2)
    choice, positions = (rng.integers(0, most, batch, np.int32) for most in (4, 131072))
    logits, best = upload(rt, _nans(batch, vocab)), upload(rt, np.zeros(batch, np.uint64))
    launch.lm_head_decode(
        rt, upload(rt, x), upload(rt, rows), upload(rt, np.ones(96, np.float32)), upload(rt, packed),
        layout, logits, best, upload(rt, temperature), upload(rt, seed), upload(rt, choice),
        upload(rt, positions), eps=EPS,
    )  # fmt: skip
    keys, scores = rt.download(best), rt.download(logits).astype(np.float64)
    tokens = (~keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    for r in range(batch):
        if rows[r] < 0:
            assert keys[r] == 0, "an empty row drew a token"
        elif temperature[r] == 0:
            assert tokens[r] == np.argmax(scores[r]), f"row {r}: {tokens[r]}, not the best token"
        else:
            u = philox_uniform(int(seed[r]), int(choice[r]), int(positions[r]), np.arange(vocab))
            noisy = scores[r] / np.float64(temperature[r]) - np.log(-np.log(u))
            # float32's noise may exchange two that are nearly equal
            assert noisy[tokens[r]] >= noisy.max() - 1e-5, f"row {r}: {tokens[r]}, not the best token"


def _draw_without_logits(rt: Runtime) -> None:
    rng = np.random.default_rng(1)
    layout, packed, w = _weights(rng, KINDS["dense fp16"], (40, 32), plain_rows(40))
    x = _floats(rng, 1, 32)
    best = upload(rt, np.zeros(1, np.uint64))
    zero, seed, temperature = (upload(rt, np.zeros(1, kind)) for kind in (np.int32, np.uint64, np.float32))
    launch.lm_head_decode(
        rt, upload(rt, x), zero, upload(rt, np.ones(32, np.float32)), upload(rt, packed), layout, None,
        best, temperature, seed, zero, zero, eps=EPS,
    )  # fmt: skip
    token = int(~rt.download(best)[0] & np.uint64(0xFFFFFFFF))
    assert token == np.argmax(x.astype(np.float64) @ w.T)


CHECKS: dict[str, Check] = {
    **{
        f"embed, hidden {hidden}, {form}": partial(_embed, hidden=hidden, form=form)
        for hidden, form in TABLES
    },
    **{
        f"norm, hidden {hidden}, {'bf16' if bf16 else 'fp16'}": partial(_rms_norm, hidden=hidden, bf16=bf16)
        for hidden, bf16 in ((32, False), (96, True), (160, False), (192, True), (2880, False), (5792, True))
    },
    **{
        f"out_proj, {kind}, ({hidden}, {columns}), batch {batch}": partial(
            _out_proj, kind=kind, hidden=hidden, columns=columns, batch=batch
        )
        for kind, hidden, columns, batch in (
            *((kind, *shape) for kind in KINDS for shape in ((96, 192, 3), (160, 64, 9))),
            ("dense fp16", 32, 4096, 1),
            ("dense bf16", 32, 2112, 17),
            ("int8 by 32", 32, 3136, 8),
            ("int8 by 96", 32, 4160, 2),
            ("mxfp4 fp16", 32, 4096, 1),
        )
    },
    **{
        f"qkv, {kind}, hidden {hidden}, batch {batch}": partial(_qkv, kind=kind, hidden=hidden, batch=batch)
        for kind, hidden, batch in (
            *((kind, *shape) for kind in KINDS for shape in ((160, 3), (96, 9))),
            ("dense fp16", 2880, 2),
            ("dense bf16", 32, 17),
            ("mxfp4 fp16", 2880, 1),
            ("int8 by row", 192, 8),
        )
    },
    "qkv, 8 heads of 2 keys, fp16 cache": partial(
        _qkv, kind="dense fp16", hidden=32, batch=3, heads=8, key_heads=2, kv_fp16=True
    ),
    **{
        f"lm_head, {kind}, hidden {hidden}, batch {batch}": partial(
            _lm_head, kind=kind, hidden=hidden, batch=batch
        )
        for kind in KINDS
        for hidden, batch in ((160, 3), (96, 9))
    },
    **{
        f"lm_head, {kind}, hidden {hidden}, vocabulary of {vocab}, batch {batch}": partial(
            _lm_head, kind=kind, hidden=hidden, batch=batch, vocab=vocab
        )
        for kind, hidden, batch, vocab in (
            ("dense fp16", 2880, 1, 129),
            ("dense bf16", 192, 17, 17),
            ("int8 by row", 2880, 2, 16),
            ("mxfp4 fp16", 32, 8, 128),
        )
    },
    **{
        f"lm_head draws, vocabulary of {vocab}, batch {batch}": partial(_draw, batch=batch, vocab=vocab)
        for vocab, batch in ((200, 1), (77, 9), (1000, 4))
    },
    "lm_head draws without logits": _draw_without_logits,
}
