"""The products of prefill against float64, over operands and weights as rounded as the kernels have them."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from gptoss_lite.kernels.cuda.checks import Check
from gptoss_lite.kernels.cuda.checks.common import (
    LIMIT,
    POISON,
    Array,
    Form,
    assert_close,
    choose,
    group,
    product,
    random_weights,
    rounded,
    swiglu,
    upload,
    upload_experts,
)
from gptoss_lite.kernels.cuda.launch import gemm as launch
from gptoss_lite.kernels.cuda.layout import (
    CHUNK,
    Format,
    from_operands,
    gate_up_rows,
    operands,
    padded,
    plain_rows,
    rope_rows,
)
from gptoss_lite.kernels.cuda.runtime import Runtime

FORMS = {
    "dense, fp16": Form(Format.DENSE),
    "dense, bf16": Form(Format.DENSE, bf16=True),
    "int8 group 64 fp16 scales, fp16": Form(Format.INT8, group=64),
    "int8 group 32 bf16 scales, bf16": Form(Format.INT8, bf16=True, scale_bf16=True),
    "mxfp4, fp16": Form(Format.MXFP4),
    "mxfp4, bf16": Form(Format.MXFP4, bf16=True),
}
OTHER_SCALES = {
    "int8 group 32 bf16 scales, fp16": Form(Format.INT8, scale_bf16=True),
    "int8 group 128 fp16 scales, bf16": Form(Format.INT8, bf16=True, group=128),
}


def _linear(
    rt: Runtime, form: Form, T: int, N: int, K: int, biased: bool = True, accumulate: bool = False,
    rope: bool = False, wide: bool | None = None,
) -> None:  # fmt: skip
    rng = np.random.default_rng(T + N + K)
    order = rope_rows(N // 64, 64) if rope else plain_rows(N)
    packed, weights = random_weights(rng, form, (1, N, K), order, prefill=True)
    x = rng.standard_normal((T, K)).astype(np.float32)
    bias = rng.standard_normal(N).astype(np.float32) if biased else None
    before = np.full((T, N), np.nan, np.float32)
    if accumulate:
        before[:] = rng.standard_normal((T, N))
    out = upload(rt, before)
    launch.linear(
        rt, upload(rt, operands(x, form.bf16)), upload(rt, packed[0]), form.layout(len(order), K),
        upload(rt, order), None if bias is None else upload(rt, bias), out,
        accumulate=accumulate, wide=wide,
    )  # fmt: skip
    want, allowed = product(rounded(x, form.bf16), weights[0])
    if bias is not None:
        want += bias
    if accumulate:
        want += before
    # Two more float32 additions, each within half a step.
    assert_close(rt.download(out), want, allowed + 2.0**-22 * (np.abs(want) + 4))


def _linear_alone(rt: Runtime, form: Form, wide: bool) -> None:
    """Expect the bits of a row whatever else is in the batch."""
    rng = np.random.default_rng(2)
    T, N, K = 200, 96, 160
    order = upload(rt, plain_rows(N))
    packed = upload(rt, random_weights(rng, form, (1, N, K), plain_rows(N), prefill=True)[0][0])
    bits = operands(rng.standard_normal((T, K)).astype(np.float32), form.bf16)

    def run(rows: Array, wide: bool) -> Array:
        out = upload(rt, np.full((len(rows), N), np.nan, np.float32))
        launch.linear(rt, upload(rt, rows), packed, form.layout(N, K), order, None, out, wide=wide)
        return rt.download(out)

    batch = run(bits, wide)
    for first, last in ((0, 1), (70, 71), (130, 160), (199, 200)):
        np.testing.assert_array_equal(run(bits[first:last], False), batch[first:last])


def _gate_up(
    rt: Runtime, form: Form, T: int, k: int, E: int, hidden: int, inner: int, spread: str, bf16_out: bool
) -> None:
    rng = np.random.default_rng(T + hidden + inner)
    order = gate_up_rows(inner)
    packed, weights = random_weights(rng, form, (E, 2 * inner, hidden), order, prefill=True)
    groups = group(choose(rng, T, k, E, spread), E, launch.TOKENS)
    table, kept = upload_experts(rt, packed, groups)
    h = (4 * rng.standard_normal((T, hidden))).astype(np.float32)
    bias = (4 * rng.standard_normal((E, 2 * inner))).astype(np.float32)
    out = upload(rt, np.full((T * k, padded(inner)), POISON, np.uint16))
    launch.moe_gate_up_prefill(
        rt, upload(rt, operands(h, form.bf16)), table, form.layout(len(order), hidden), upload(rt, bias),
        upload(rt, groups.order), *groups.tiles(rt), out, limit=LIMIT, bf16_out=bf16_out,
    )  # fmt: skip
    got = rt.download(out)
    del kept
    experts = groups.experts()
    x = rounded(h, form.bf16)
    want = np.empty((len(experts), inner))
    allowed = np.empty_like(want)
    clamped = np.zeros(3, bool)
    for e in np.unique(experts):
        sums, error = product(x[groups.order[: len(experts)][experts == e]], weights[e])
        sums += bias[e]
        gate, up = sums[:, ::2], sums[:, 1::2]
        clamped |= (gate > LIMIT).any(), (up > LIMIT).any(), (up < -LIMIT).any()
        want[experts == e] = swiglu(gate, up)
        # SwiGLU has slopes up to 9: 1.1 * (limit + 1) for the gate, limit for up.
        allowed[experts == e] = 9 * (error[:, ::2] + error[:, 1::2])
    assert clamped.all() or T < 5
    allowed += np.abs(want) * 2.0 ** (-8 if bf16_out else -10) + 2.0**-20  # the result is rounded
    values = from_operands(got, got.shape[1], bf16_out)[: len(experts)]
    assert_close(values[:, :inner], want, allowed)
    np.testing.assert_array_equal(values[:, inner:], 0)
    np.testing.assert_array_equal(got[len(experts) :], POISON)  # nobody's rows are left alone


def _down(rt: Runtime, form: Form, T: int, k: int, E: int, hidden: int, inner: int, spread: str) -> None:
    rng = np.random.default_rng(T + hidden + inner)
    packed, weights = random_weights(rng, form, (E, hidden, inner), plain_rows(hidden), prefill=True)
    groups = group(choose(rng, T, k, E, spread), E, launch.TOKENS)
    table, kept = upload_experts(rt, packed, groups)
    x = rng.standard_normal((T * k, inner)).astype(np.float32)
    bias = rng.standard_normal((E, hidden)).astype(np.float32)
    y = upload(rt, np.full((T * k, hidden), np.nan, np.float32))
    launch.moe_down_prefill(
        rt, upload(rt, operands(x, form.bf16)), table, form.layout(hidden, inner), upload(rt, bias),
        *groups.tiles(rt), y,
    )  # fmt: skip
    got = rt.download(y)
    del kept
    experts = groups.experts()
    for e in np.unique(experts):
        rows = np.flatnonzero(experts == e)
        want, allowed = product(rounded(x[rows], form.bf16), weights[e])
        want += bias[e]
        assert_close(got[rows], want, allowed + 2.0**-22 * (np.abs(want) + 4))
    assert np.isnan(got[len(experts) :]).all()  # nobody's rows are left alone


def _experts_alone(rt: Runtime, form: Form) -> None:
    """Expect the bits of a token's experts whatever other tokens chose the same ones."""
    rng = np.random.default_rng(3)
    T, E, hidden, inner = 150, 2, 96, 32
    packed = random_weights(rng, form, (E, 2 * inner, hidden), gate_up_rows(inner), prefill=True)[0]
    down = random_weights(rng, form, (E, hidden, inner), plain_rows(hidden), prefill=True)[0]
    bits = operands(rng.standard_normal((T, hidden)).astype(np.float32), form.bf16)
    bias = upload(rt, rng.standard_normal((E, 2 * inner)).astype(np.float32))
    down_bias = upload(rt, rng.standard_normal((E, hidden)).astype(np.float32))

    def run(rows: Array) -> tuple[Array, Array]:
        groups = group(np.ones((len(rows), 1), np.int32), E, launch.TOKENS)
        tiles = groups.tiles(rt)
        h = upload(rt, np.full((len(rows), CHUNK), POISON, np.uint16))
        y = upload(rt, np.full((len(rows), hidden), np.nan, np.float32))
        table, gate_up_kept = upload_experts(rt, packed, groups)
        launch.moe_gate_up_prefill(
            rt, upload(rt, rows), table, form.layout(128, hidden), bias, upload(rt, groups.order), *tiles,
            h, limit=LIMIT, bf16_out=form.bf16,
        )  # fmt: skip
        table, down_kept = upload_experts(rt, down, groups)
        launch.moe_down_prefill(rt, h, table, form.layout(hidden, inner), down_bias, *tiles, y)
        result = rt.download(h), rt.download(y)
        del gate_up_kept, down_kept
        return result

    batch = run(bits)
    for first, last in ((0, 1), (63, 65), (128, 150)):
        for alone, whole in zip(run(bits[first:last]), batch, strict=True):
            np.testing.assert_array_equal(alone, whole[first:last])


def _combine(rt: Runtime, T: int, k: int, hidden: int, skipped: Sequence[int] = ()) -> None:
    rng = np.random.default_rng(T + hidden)
    place = rng.permutation(T * k).astype(np.int32).reshape(T, k)
    y = rng.standard_normal((T * k, hidden)).astype(np.float32)
    for t in skipped:
        y[place[t]] = np.nan
        place[t] = -1
    weights = rng.uniform(0, 1, (T, k)).astype(np.float32)
    x = (10 * rng.standard_normal((T, hidden))).astype(np.float32)
    target = upload(rt, x)
    launch.combine(rt, upload(rt, y), upload(rt, place), upload(rt, weights), target)
    terms = weights[..., None].astype(np.float64) * np.where(place[..., None] < 0, 0.0, y[place])
    want = x + terms.sum(axis=1)
    # k + 1 roundings to float32, each within half a step of what the magnitudes add up to.
    assert_close(rt.download(target), want, 2.0**-24 * (k + 1) * (np.abs(x) + np.abs(terms).sum(axis=1)))


# Tokens around the edges of a tile of 64 and of its half and quarter; rows and columns padded or not.
LINEAR_SHAPES = (
    (1, 32, 320),
    (5, 96, 32),
    (17, 64, 64),
    (63, 160, 96),
    (64, 192, 160),
    (65, 320, 192),
    (200, 96, 320),
)
# Tokens, choices, experts, hidden, intermediate, spread.
EXPERT_SHAPES = (
    (1, 2, 3, 32, 32, "ragged"),
    (70, 2, 7, 160, 96, "ragged"),
    (33, 1, 2, 96, 192, "one"),
    (150, 1, 3, 64, 320, "one"),
    (2, 2, 4, 32, 96, "none"),
)

CHECKS: dict[str, Check] = {
    f"linear, {name}, {T} x {K} to {N}": partial(
        _linear, form=form, T=T, N=N, K=K, biased=T != 63, accumulate=T in (5, 64), wide=False
    )
    for name, form in FORMS.items()
    for T, N, K in LINEAR_SHAPES
}
CHECKS |= {
    f"linear, {name}, other scales": partial(_linear, form=form, T=65, N=96, K=320)
    for name, form in OTHER_SCALES.items()
}
CHECKS |= {
    f"linear, {name}, {T} x {K} to {N}, wide": partial(_linear, form=form, T=T, N=N, K=K, wide=True)
    for name, form in tuple(FORMS.items())[:2]
    for T, N, K in ((20, 32, 96), (50, 192, 160), (129, 160, 64), (128, 96, 320))
}
CHECKS |= {
    f"linear, {name}, rows in RoPE order": partial(_linear, form=form, T=9, N=256, K=96, rope=True)
    for name, form in FORMS.items()
}
CHECKS |= {
    f"linear, {name}, a row alone{' and wide' * wide}": partial(_linear_alone, form=form, wide=wide)
    for name, form in FORMS.items()
    for wide in (False, True)[: 1 + (form.format is Format.DENSE)]
}
CHECKS |= {
    f"gate and up, {name} to {'bf16' if bf16_out else 'fp16'}, {T} tokens, {spread}": partial(
        _gate_up, form=form, T=T, k=k, E=E, hidden=hidden, inner=inner, spread=spread, bf16_out=bf16_out
    )
    for name, form in FORMS.items()
    for T, k, E, hidden, inner, spread in EXPERT_SHAPES
    for bf16_out in ((form.bf16,) if T != 33 else (not form.bf16,))
}
CHECKS |= {
    f"down, {name}, {T} tokens, {spread}": partial(
        _down, form=form, T=T, k=k, E=E, hidden=hidden, inner=inner, spread=spread
    )
    for name, form in FORMS.items()
    for T, k, E, hidden, inner, spread in EXPERT_SHAPES
}
CHECKS |= {
    f"experts, {name}, a token alone": partial(_experts_alone, form=form) for name, form in FORMS.items()
}
CHECKS |= {
    "combine, one choice": partial(_combine, T=3, k=1, hidden=32),
    "combine, four choices, some tokens without": partial(_combine, T=7, k=4, hidden=96, skipped=(0, 4)),
    "combine, eight choices, more than a block of columns": partial(_combine, T=2, k=8, hidden=1120),
}
