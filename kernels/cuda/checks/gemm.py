"""The products of prefill against float64, over operands and weights as rounded as the kernels have them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.checks import Check
from gptoss_lite.kernels.cuda.launch import gemm as launch
from gptoss_lite.kernels.cuda.layout import (
    BLOCK,
    CHUNK,
    Format,
    Layout,
    from_operands,
    gate_up_rows,
    operands,
    pack_dense,
    pack_int8,
    pack_mxfp4,
    plain_rows,
    rope_rows,
)
from gptoss_lite.kernels.cuda.runtime import Array as DeviceArray
from gptoss_lite.kernels.cuda.runtime import Runtime

Array = npt.NDArray[Any]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_POISON = 0xCDCD  # of operands: a plain number in fp16 and in bf16
_LIMIT = 7.0


@dataclass(frozen=True, slots=True)
class _Form:
    """A kind of weights: what Layout needs besides the shape."""

    format: Format
    bf16: bool = False
    group: int = BLOCK
    scale_bf16: bool = False

    def __str__(self) -> str:
        scale = f" group {self.group} {_kind(self.scale_bf16)} scales" if self.format is Format.INT8 else ""
        return f"{self.format.name.lower()}{scale}, {_kind(self.bf16)}"


def _kind(bf16: bool) -> str:
    return "bf16" if bf16 else "fp16"


FORMS = (
    _Form(Format.DENSE),
    _Form(Format.DENSE, bf16=True),
    _Form(Format.INT8, group=64),
    _Form(Format.INT8, bf16=True, scale_bf16=True),
    _Form(Format.MXFP4),
    _Form(Format.MXFP4, bf16=True),
)
OTHER_SCALES = (_Form(Format.INT8, scale_bf16=True), _Form(Format.INT8, bf16=True, group=128))


def _device(rt: Runtime, array: Array) -> DeviceArray:
    target = rt.empty(array.shape, array.dtype)
    rt.upload(np.ascontiguousarray(array), target)
    return target


def _round(x: Array, bf16: bool) -> Array:
    """Round to an operand's type, to the nearest, ties to even -> float64."""
    shape = x.shape
    bits = operands(np.asarray(x, np.float32).reshape(-1, 1), bf16)
    return from_operands(bits, 1, bf16).reshape(shape).astype(np.float64)


def _bits(x: Array, bf16: bool) -> Array:
    """Round float32 to the bits of fp16 or bf16."""
    return operands(x.reshape(-1, 1), bf16)[:, 0].reshape(x.shape)


def _weights(
    rng: np.random.Generator, form: _Form, E: int, N: int, K: int, order: Array
) -> tuple[Array, Array]:
    """Make E matrices -> packed uint8 (E, nbytes), and what the products see of them, float64 (E, N, K)."""
    layout = _layout(form, len(order), K)
    match form.format:
        case Format.DENSE:
            values = rng.standard_normal((E, N, K)).astype(np.float32) / 4
            return pack_dense(layout, _bits(values, form.bf16), order), _round(values, form.bf16)
        case Format.INT8:
            codes = rng.integers(-127, 128, (E, N, K)).astype(np.int8)
            scales = rng.uniform(0.001, 0.008, (E, N, -(-K // form.group))).astype(np.float32)
            factors = _round(_round(scales, form.scale_bf16), form.bf16)
            values = _round(codes * np.repeat(factors, form.group, axis=-1)[..., :K], form.bf16)
            return pack_int8(layout, codes, _bits(scales, form.scale_bf16), order), values
    blocks = rng.integers(0, 256, (E, N, K // BLOCK, BLOCK // 2)).astype(np.uint8)
    exponents = rng.integers(121, 126, (E, N, K // BLOCK)).astype(np.uint8)
    exponents[..., -1] = 108  # a small one, still exact in fp16
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(E, N, K // BLOCK, BLOCK)
    values = np.array(_E2M1)[codes & 7] * np.where(codes & 8, -1, 1)
    values = np.ldexp(values, exponents[..., None].astype(np.int64) - 127).reshape(E, N, K)
    return pack_mxfp4(layout, blocks, exponents, order), values


def _layout(form: _Form, rows: int, columns: int) -> Layout:
    return Layout(form.format, rows, columns, form.group, form.bf16, form.scale_bf16)


def _product(x: Array, w: Array) -> tuple[Array, Array]:
    """Multiply (T, K) with (N, K) in float64 -> the product, and how far the kernel's float32 may be from it.

    Tensor cores add in float32, some by cutting digits off: for each 16 columns, at most 2^-22 of what the
    magnitudes add up to.
    """
    return x @ w.T, (2.0**-22 * x.shape[1] / 16) * (np.abs(x) @ np.abs(w).T) + 1e-9


def _assert_close(got: Array, want: Array, allowed: Array) -> None:
    wrong = ~(np.abs(got - want) <= allowed)  # a NaN is wrong
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.size} wrong, first at {at}: {got[at]} for {want[at]}"
        )


def _linear(
    rt: Runtime, form: _Form, T: int, N: int, K: int, biased: bool = True, accumulate: bool = False,
    rope: bool = False, wide: bool | None = None,
) -> None:  # fmt: skip
    rng = np.random.default_rng(T + N + K)
    order = rope_rows(N // 64, 64) if rope else plain_rows(N)
    packed, weights = _weights(rng, form, 1, N, K, order)
    x = rng.standard_normal((T, K)).astype(np.float32)
    bias = rng.standard_normal(N).astype(np.float32) if biased else None
    before = np.full((T, N), np.nan, np.float32)
    if accumulate:
        before[:] = rng.standard_normal((T, N))
    out = _device(rt, before)
    launch.linear(
        rt, _device(rt, operands(x, form.bf16)), _device(rt, packed[0]), _layout(form, len(order), K),
        _device(rt, order), None if bias is None else _device(rt, bias), out,
        accumulate=accumulate, wide=wide,
    )  # fmt: skip
    want, allowed = _product(_round(x, form.bf16), weights[0])
    if bias is not None:
        want += bias
    if accumulate:
        want += before
    # Two more float32 additions, each within half a step.
    _assert_close(rt.download(out), want, allowed + 2.0**-22 * (np.abs(want) + 4))


def _linear_alone(rt: Runtime, form: _Form, wide: bool) -> None:
    """Expect the bits of a row whatever else is in the batch."""
    rng = np.random.default_rng(2)
    T, N, K = 200, 96, 160
    order = _device(rt, plain_rows(N))
    packed = _device(rt, _weights(rng, form, 1, N, K, plain_rows(N))[0][0])
    bits = operands(rng.standard_normal((T, K)).astype(np.float32), form.bf16)

    def run(rows: Array, wide: bool) -> Array:
        out = _device(rt, np.full((len(rows), N), np.nan, np.float32))
        launch.linear(rt, _device(rt, rows), packed, _layout(form, N, K), order, None, out, wide=wide)
        return rt.download(out)

    batch = run(bits, wide)
    for first, last in ((0, 1), (70, 71), (130, 160), (199, 200)):
        np.testing.assert_array_equal(run(bits[first:last], False), batch[first:last])


@dataclass(frozen=True, slots=True)
class _Groups:
    """Pairs sorted by expert, then by token, in tiles; what lies past their count is poison."""

    order: Array
    place: Array
    expert: Array
    start: Array
    rows: Array
    count: Array

    def upload(self, rt: Runtime) -> tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray]:
        """Upload expert, start, rows and count."""
        device = partial(_device, rt)
        return device(self.expert), device(self.start), device(self.rows), device(self.count)

    def experts(self) -> Array:
        """Name the expert of each sorted place in use."""
        n = int(self.count[0])
        return np.repeat(self.expert[:n], self.rows[:n])


def _group(ids: Array, E: int) -> _Groups:
    T, k = ids.shape
    pairs = T * k
    n = min(pairs, pairs // launch.TOKENS + E)
    order, place = np.full(pairs, -1, np.int32), np.full((T, k), -1, np.int32)
    tiles: list[tuple[int, int, int]] = []
    used = 0
    for e in range(E):
        tokens, choices = np.nonzero(ids == e)
        order[used : used + len(tokens)] = tokens
        place[tokens, choices] = used + np.arange(len(tokens))
        for first in range(0, len(tokens), launch.TOKENS):
            tiles.append((e, used + first, min(launch.TOKENS, len(tokens) - first)))
        used += len(tokens)
    grouped = np.full((3, n), 1 << 30, np.int32)
    grouped[:, : len(tiles)] = np.array(tiles, np.int32).reshape(-1, 3).T
    return _Groups(order, place, grouped[0], grouped[1], grouped[2], np.array([len(tiles)], np.int32))


def _ids(rng: np.random.Generator, T: int, k: int, E: int, spread: str) -> Array:
    """Choose experts int32 (T, k): ragged with some empty and a token skipped, all the same ones, or none."""
    if spread == "none":
        return np.full((T, k), -1, np.int32)
    if spread == "one":
        return np.tile(np.arange(E - k, E, dtype=np.int32), (T, 1))
    usable = [e for e in range(E) if e % 3 != 1]  # the others get no token
    odds = 1.0 / (1 + np.arange(len(usable))) ** 2
    ids = np.array([rng.choice(usable, k, replace=False, p=odds / odds.sum()) for _ in range(T)], np.int32)
    if T > 1:
        ids[T // 2] = -1
    return ids


def _experts(rt: Runtime, packed: Array, groups: _Groups) -> tuple[DeviceArray, list[DeviceArray]]:
    """Upload each expert to a place of its own, one of them to the host -> pointer table, what it points to.

    Experts without a token have no address.
    """
    kept: list[DeviceArray] = []
    table = np.zeros(len(packed), np.uint64)
    for e in sorted(set(groups.experts().tolist()), reverse=True):
        if kept:
            kept.append(_device(rt, packed[e]))
        else:
            host = rt.pinned(packed[e].shape, np.uint8)
            host[:] = packed[e]
            kept.append(host)
        table[e] = rt.address(kept[-1])
    return _device(rt, table), kept


def _gate_up(
    rt: Runtime, form: _Form, T: int, k: int, E: int, hidden: int, inner: int, spread: str, bf16_out: bool
) -> None:
    rng = np.random.default_rng(T + hidden + inner)
    order = gate_up_rows(inner)
    packed, weights = _weights(rng, form, E, 2 * inner, hidden, order)
    groups = _group(_ids(rng, T, k, E, spread), E)
    table, kept = _experts(rt, packed, groups)
    h = (rng.standard_normal((T, hidden)) * 12 / np.sqrt(hidden)).astype(np.float32)
    bias = (4 * rng.standard_normal((E, 2 * inner))).astype(np.float32)
    out = _device(rt, np.full((T * k, -(-inner // CHUNK) * CHUNK), _POISON, np.uint16))
    launch.moe_gate_up_prefill(
        rt, _device(rt, operands(h, form.bf16)), table, _layout(form, len(order), hidden), _device(rt, bias),
        _device(rt, groups.order), *groups.upload(rt), out, limit=_LIMIT, bf16_out=bf16_out,
    )  # fmt: skip
    got = rt.download(out)
    del kept
    experts = groups.experts()
    x = _round(h, form.bf16)
    want = np.empty((len(experts), inner))
    allowed = np.empty_like(want)
    clamped = np.zeros(3, bool)
    for e in np.unique(experts):
        product, error = _product(x[groups.order[: len(experts)][experts == e]], weights[e])
        product += bias[e]
        gate, up = product[:, ::2], product[:, 1::2]
        clamped |= (gate > _LIMIT).any(), (up > _LIMIT).any(), (up < -_LIMIT).any()
        gate, up = np.minimum(gate, _LIMIT), np.clip(up, -_LIMIT, _LIMIT)
        want[experts == e] = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
        # SwiGLU has slopes up to 9: 1.1 * (limit + 1) for the gate, limit for up.
        allowed[experts == e] = 9 * (error[:, ::2] + error[:, 1::2])
    assert clamped.all() or T < 5
    allowed += np.abs(want) * 2.0 ** (-8 if bf16_out else -10) + 2.0**-20  # the result is rounded
    values = from_operands(got, got.shape[1], bf16_out)[: len(experts)]
    _assert_close(values[:, :inner], want, allowed)
    np.testing.assert_array_equal(values[:, inner:], 0)
    np.testing.assert_array_equal(got[len(experts) :], _POISON)  # nobody's rows are left alone


def _down(rt: Runtime, form: _Form, T: int, k: int, E: int, hidden: int, inner: int, spread: str) -> None:
    rng = np.random.default_rng(T + hidden + inner)
    packed, weights = _weights(rng, form, E, hidden, inner, plain_rows(hidden))
    groups = _group(_ids(rng, T, k, E, spread), E)
    table, kept = _experts(rt, packed, groups)
    x = rng.standard_normal((T * k, inner)).astype(np.float32)
    bias = rng.standard_normal((E, hidden)).astype(np.float32)
    y = _device(rt, np.full((T * k, hidden), np.nan, np.float32))
    launch.moe_down_prefill(
        rt, _device(rt, operands(x, form.bf16)), table, _layout(form, hidden, inner), _device(rt, bias),
        *groups.upload(rt), y,
    )  # fmt: skip
    got = rt.download(y)
    del kept
    experts = groups.experts()
    for e in np.unique(experts):
        rows = np.flatnonzero(experts == e)
        want, allowed = _product(_round(x[rows], form.bf16), weights[e])
        want += bias[e]
        _assert_close(got[rows], want, allowed + 2.0**-22 * (np.abs(want) + 4))
    assert np.isnan(got[len(experts) :]).all()  # nobody's rows are left alone


def _experts_alone(rt: Runtime, form: _Form) -> None:
    """Expect the bits of a token's experts whatever other tokens chose the same ones."""
    rng = np.random.default_rng(3)
    T, E, hidden, inner = 150, 2, 96, 32
    packed = _weights(rng, form, E, 2 * inner, hidden, gate_up_rows(inner))[0]
    down = _weights(rng, form, E, hidden, inner, plain_rows(hidden))[0]
    bits = operands(rng.standard_normal((T, hidden)).astype(np.float32), form.bf16)
    bias = _device(rt, rng.standard_normal((E, 2 * inner)).astype(np.float32))
    down_bias = _device(rt, rng.standard_normal((E, hidden)).astype(np.float32))

    def run(rows: Array) -> tuple[Array, Array]:
        groups = _group(np.ones((len(rows), 1), np.int32), E)
        tiles = groups.upload(rt)
        h = _device(rt, np.full((len(rows), CHUNK), _POISON, np.uint16))
        y = _device(rt, np.full((len(rows), hidden), np.nan, np.float32))
        table, gate_up_kept = _experts(rt, packed, groups)
        launch.moe_gate_up_prefill(
            rt, _device(rt, rows), table, _layout(form, 128, hidden), bias, _device(rt, groups.order), *tiles,
            h, limit=_LIMIT, bf16_out=form.bf16,
        )  # fmt: skip
        table, down_kept = _experts(rt, down, groups)
        launch.moe_down_prefill(rt, h, table, _layout(form, hidden, inner), down_bias, *tiles, y)
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
    target = _device(rt, x)
    launch.combine(rt, _device(rt, y), _device(rt, place), _device(rt, weights), target)
    terms = weights[..., None].astype(np.float64) * np.where(place[..., None] < 0, 0.0, y[place])
    want = x + terms.sum(axis=1)
    # k + 1 roundings to float32, each within half a step of what the magnitudes add up to.
    _assert_close(rt.download(target), want, 2.0**-24 * (k + 1) * (np.abs(x) + np.abs(terms).sum(axis=1)))


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
    f"linear, {form}, {T} x {K} to {N}": partial(
        _linear, form=form, T=T, N=N, K=K, biased=T != 63, accumulate=T in (5, 64), wide=False
    )
    for form in FORMS
    for T, N, K in LINEAR_SHAPES
}
CHECKS |= {
    f"linear, {form}, other scales": partial(_linear, form=form, T=65, N=96, K=320) for form in OTHER_SCALES
}
CHECKS |= {
    f"linear, {form}, {T} x {K} to {N}, wide": partial(_linear, form=form, T=T, N=N, K=K, wide=True)
    for form in FORMS[:2]
    for T, N, K in ((20, 32, 96), (50, 192, 160), (129, 160, 64), (128, 96, 320))
}
CHECKS |= {
    f"linear, {form}, rows in RoPE order": partial(_linear, form=form, T=9, N=256, K=96, rope=True)
    for form in FORMS
}
CHECKS |= {
    f"linear, {form}, a row alone{' and wide' * wide}": partial(_linear_alone, form=form, wide=wide)
    for form in FORMS
    for wide in (False, True)[: 1 + (form.format is Format.DENSE)]
}
CHECKS |= {
    f"gate and up, {form} to {_kind(bf16_out)}, {T} tokens, {spread}": partial(
        _gate_up, form=form, T=T, k=k, E=E, hidden=hidden, inner=inner, spread=spread, bf16_out=bf16_out
    )
    for form in FORMS
    for T, k, E, hidden, inner, spread in EXPERT_SHAPES
    for bf16_out in ((form.bf16,) if T != 33 else (not form.bf16,))
}
CHECKS |= {
    f"down, {form}, {T} tokens, {spread}": partial(
        _down, form=form, T=T, k=k, E=E, hidden=hidden, inner=inner, spread=spread
    )
    for form in FORMS
    for T, k, E, hidden, inner, spread in EXPERT_SHAPES
}
CHECKS |= {f"experts, {form}, a token alone": partial(_experts_alone, form=form) for form in FORMS}
CHECKS |= {
    "combine, one choice": partial(_combine, T=3, k=1, hidden=32),
    "combine, four choices, some tokens without": partial(_combine, T=7, k=4, hidden=96, skipped=(0, 4)),
    "combine, eight choices, more than a block of columns": partial(_combine, T=2, k=8, hidden=1120),
}
