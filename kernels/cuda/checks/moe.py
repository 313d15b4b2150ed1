"""The experts in decode against float64, over operands and weights as rounded as the kernels have them."""

from functools import partial
from typing import Any

import numpy as np

from gptoss_lite.kernels.cuda.checks import Check
from gptoss_lite.kernels.cuda.checks.common import (
    FORMS,
    LIMIT,
    POISON,
    Array,
    Form,
    Groups,
    assert_close,
    choose,
    group,
    mxfp4_values,
    product,
    random_weights,
    swiglu,
    upload,
    upload_experts,
)
from gptoss_lite.kernels.cuda.launch import moe as launch
from gptoss_lite.kernels.cuda.layout import (
    BLOCK,
    CHUNK,
    MXFP4_HALF_SCALES,
    Format,
    Layout,
    from_operands,
    gate_up_rows,
    operands,
    pack_mxfp4,
    padded,
    plain_rows,
)
from gptoss_lite.kernels.cuda.runtime import Runtime

_PARTIAL_SUMS = 8  # that a result is added up from, at most


def _one_token(ids: Array) -> Groups:
    """Group a single token as the engine does, which has nothing to sort: a tile for each choice."""
    numbers = np.arange(ids.size, dtype=np.int32)
    zeros, ones = np.zeros_like(numbers), np.ones_like(numbers)
    return Groups(
        zeros, numbers.reshape(1, -1), ids.reshape(-1), numbers, ones, np.array([ids.size], np.int32)
    )


def _gate_up(
    rt: Runtime, form: Form, T: int, k: int, E: int, hidden: int, inner: int, bf16_out: bool
) -> None:
    rng = np.random.default_rng(T + hidden + inner)
    order, ids = gate_up_rows(inner), choose(rng, T, k, E)
    packed, weights = random_weights(rng, form, (E, 2 * inner, hidden), order)
    groups = _one_token(ids) if T == 1 else group(ids, E, launch.TOKENS)
    table, kept = upload_experts(rt, packed, groups)
    bits = operands(4 * rng.standard_normal((T, hidden)).astype(np.float32), form.bf16)
    bias = (4 * rng.standard_normal((E, 2 * inner))).astype(np.float32)
    out = upload(rt, np.full((T * k, padded(inner)), POISON, np.uint16))
    launch.gate_up_decode(
        rt, upload(rt, bits), table, form.layout(len(order), hidden), upload(rt, bias),
        upload(rt, groups.order), *groups.tiles(rt), out, limit=LIMIT, bf16_out=bf16_out,
    )  # fmt: skip
    got = rt.download(out)
    del kept
    h = from_operands(bits, hidden, form.bf16).astype(np.float64)
    for token, choice in zip(*np.nonzero(ids >= 0), strict=True):
        e, place = ids[token, choice], groups.place[token, choice]
        sums, error = product(h[token : token + 1], weights[e], _PARTIAL_SUMS)
        gate, up = np.split((sums[0] + bias[e]).reshape(-1, 2).T, 2)
        want = swiglu(gate[0], up[0])
        # SwiGLU has slopes up to 9: 1.1 * (limit + 1) for the gate, limit for up. Then the result is rounded.
        allowed = (
            9 * error[0].reshape(-1, 2).sum(1) + np.abs(want) * 2.0 ** (-8 if bf16_out else -10) + 2.0**-20
        )
        row = from_operands(got[place : place + 1], got.shape[1], bf16_out)[0]
        assert_close(row[:inner], want, allowed)
        np.testing.assert_array_equal(row[inner:], 0)  # padding
    unused = np.setdiff1d(np.arange(T * k), groups.place[ids >= 0])
    np.testing.assert_array_equal(got[unused], POISON)


def _down(rt: Runtime, form: Form, T: int, k: int, E: int, hidden: int, inner: int) -> None:
    rng = np.random.default_rng(T + hidden + inner)
    ids = choose(rng, T, k, E)
    packed, weights = random_weights(rng, form, (E, hidden, inner), plain_rows(hidden))
    _run_down(rt, rng, form.layout(hidden, inner), packed, weights, ids)


def _run_down(
    rt: Runtime, rng: np.random.Generator, layout: Layout, packed: Array, weights: Array, ids: Array,
    size: float = 1.0,
) -> None:  # fmt: skip
    (T, k), (E, hidden, inner), bf16 = ids.shape, weights.shape, layout.bf16
    groups = _one_token(ids) if T == 1 else group(ids, E, launch.TOKENS)
    table, kept = upload_experts(rt, packed, groups)
    values = (size * rng.standard_normal((T * k, inner))).astype(np.float32)
    bits = operands(values, bf16)
    unused = np.setdiff1d(np.arange(T * k), groups.place[ids >= 0])
    bits[unused] = 0x7FFF  # NaN
    bias = rng.standard_normal((E, hidden)).astype(np.float32)
    shares = rng.random((T, k)).astype(np.float32)
    before = rng.standard_normal((T, hidden)).astype(np.float32)
    x = upload(rt, before)
    launch.down_decode(
        rt, upload(rt, bits), table, layout, upload(rt, bias), *groups.tiles(rt),
        upload(rt, groups.place), upload(rt, shares), x,
    )  # fmt: skip
    got = rt.download(x)
    del kept
    want, allowed = before.astype(np.float64), np.zeros(before.shape)
    for token, choice in zip(*np.nonzero(ids >= 0), strict=True):
        e, place = ids[token, choice], groups.place[token, choice]
        row = from_operands(bits[place : place + 1], inner, bf16).astype(np.float64)
        sums, error = product(row, weights[e], _PARTIAL_SUMS)
        want[token] += shares[token, choice] * (sums[0] + bias[e])
        # Adding the bias, weighing and adding to the others: each within half a step of what there is.
        allowed[token] += error[0] + 2.0**-22 * (np.abs(sums[0]) + np.abs(bias[e]) + 1)
    assert_close(got, want, allowed + 2.0**-22 * np.abs(before))
    np.testing.assert_array_equal(got[ids[:, 0] < 0], before[ids[:, 0] < 0])


def _every_scale(rt: Runtime, bf16: bool) -> None:
    """Expect each row of an MXFP4 matrix to come out whatever its scale, and every code in it."""
    rng = np.random.default_rng(5)
    first, last = (1, 254) if bf16 else MXFP4_HALF_SCALES
    hidden, inner = 256, 32
    scales = np.resize(np.arange(first, last + 1), hidden).astype(np.uint8).reshape(1, hidden, 1)
    codes = rng.permuted(np.tile(np.arange(16), (hidden, 1)), axis=1)
    blocks = (codes | codes << 4).astype(np.uint8).reshape(1, hidden, 1, BLOCK // 2)
    layout = Layout(Format.MXFP4, hidden, inner, bf16=bf16)
    packed = pack_mxfp4(layout, blocks, scales, plain_rows(hidden))
    ids = np.zeros((3, 1), np.int32)
    size = 2.0**-16 if bf16 else 1.0  # so that the largest rows stay within float32
    _run_down(rt, rng, layout, packed, mxfp4_values(blocks, scales), ids, size)


def _alone(rt: Runtime, form: Form) -> None:
    """Expect the bits of a token whatever other tokens are in the batch."""
    rng = np.random.default_rng(3)
    T, k, E, hidden, inner = 19, 2, 3, 160, 96
    ids = np.array([rng.choice(E, k, replace=False) for _ in range(T)], np.int32)
    packed = random_weights(rng, form, (E, 2 * inner, hidden), gate_up_rows(inner))[0]
    down_packed = random_weights(rng, form, (E, hidden, inner), plain_rows(hidden))[0]
    bits = operands(rng.standard_normal((T, hidden)).astype(np.float32), form.bf16)
    bias = upload(rt, rng.standard_normal((E, 2 * inner)).astype(np.float32))
    down_bias = upload(rt, rng.standard_normal((E, hidden)).astype(np.float32))
    before, shares = (
        rng.standard_normal((T, hidden)).astype(np.float32),
        rng.random((T, k)).astype(np.float32),
    )

    def run(rows: slice) -> Array:
        count = len(ids[rows])
        groups = _one_token(ids[rows]) if count == 1 else group(ids[rows], E, launch.TOKENS)
        order, tiles = upload(rt, groups.order), groups.tiles(rt)
        table, kept = upload_experts(rt, packed, groups)
        out = upload(rt, np.full((count * k, 2 * CHUNK), POISON, np.uint16))
        launch.gate_up_decode(
            rt, upload(rt, bits[rows]), table, form.layout(len(gate_up_rows(inner)), hidden), bias, order,
            *tiles, out, limit=LIMIT, bf16_out=form.bf16,
        )  # fmt: skip
        table, down_kept = upload_experts(rt, down_packed, groups)
        x = upload(rt, before[rows])
        launch.down_decode(
            rt, out, table, form.layout(hidden, inner), down_bias, *tiles, upload(rt, groups.place),
            upload(rt, shares[rows]), x,
        )  # fmt: skip
        result = rt.download(x)
        del kept, down_kept
        return result

    batch = run(slice(0, T))
    for rows in (slice(0, 1), slice(7, 8), slice(10, 13), slice(18, 19)):
        np.testing.assert_array_equal(run(rows), batch[rows])


def _nobody(rt: Runtime) -> None:
    """Expect a lone token of no sequence, ids -1 in the one-token grouping, to leave everything as it is."""
    hidden = inner = 64
    ids = np.full((1, 4), -1, np.int32)
    groups = _one_token(ids)
    table = upload(rt, np.zeros(4, np.uint64))
    out = upload(rt, np.full((4, inner), POISON, np.uint16))
    x = upload(rt, np.ones((1, hidden), np.float32))
    order, tiles = upload(rt, groups.order), groups.tiles(rt)
    launch.gate_up_decode(
        rt, upload(rt, np.zeros((1, hidden), np.uint16)), table, Layout(Format.MXFP4, 2 * inner, hidden),
        upload(rt, np.zeros((4, 2 * inner), np.float32)), order, *tiles, out, limit=LIMIT, bf16_out=False,
    )  # fmt: skip
    launch.down_decode(
        rt, out, table, Layout(Format.MXFP4, hidden, inner), upload(rt, np.ones((4, hidden), np.float32)),
        *tiles, upload(rt, groups.place), upload(rt, np.ones((1, 4), np.float32)), x,
    )  # fmt: skip
    np.testing.assert_array_equal(rt.download(out), POISON)
    np.testing.assert_array_equal(rt.download(x), 1)


# Tokens, choices, experts, hidden, inner: full and ragged tiles, sizes that no tile divides.
_SHAPES = (
    (1, 4, 4, 32, 192),
    (1, 8, 8, 320, 32),
    (3, 2, 4, 96, 160),
    (8, 1, 4, 160, 96),
    (9, 4, 40, 192, 32),
    (20, 4, 8, 96, 320),
)
_LONG = 2080  # so many columns that each warp goes through its main loop, and one has a chunk more


def _sizes(form: Form, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"form": form, **dict(zip(("T", "k", "E", "hidden", "inner"), shape, strict=True))}


CHECKS: dict[str, Check] = {}
for _form in FORMS:
    for _i, _shape in enumerate((*_SHAPES, (3, 1, 2, _LONG, 32))):
        _name = "{} of {}, {} tokens, {}, {}".format(*(_shape[i] for i in (1, 2, 0, 3, 4)))
        CHECKS[f"gate_up, {_form}, {_name}"] = partial(
            _gate_up, **_sizes(_form, _shape), bf16_out=_form.bf16 ^ (_i % 3 == 2)
        )
    for _shape in (*_SHAPES, (3, 1, 2, 32, _LONG)):
        _name = "{} of {}, {} tokens, {}, {}".format(*(_shape[i] for i in (1, 2, 0, 3, 4)))
        CHECKS[f"down, {_form}, {_name}"] = partial(_down, **_sizes(_form, _shape))
    CHECKS[f"same alone as in a batch, {_form}"] = partial(_alone, form=_form)
CHECKS["MXFP4 of every scale, fp16"] = partial(_every_scale, bf16=False)
CHECKS["MXFP4 of every scale, bf16"] = partial(_every_scale, bf16=True)
CHECKS["a token of no sequence"] = _nobody
