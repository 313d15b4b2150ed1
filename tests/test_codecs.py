"""The codecs as everybody calls them: against gguf and ml_dtypes, the search against all exponents there are,
and what is compiled against NumPy, bit for bit.
"""

import subprocess
import sys
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, codecs, int8, mxfp4, quantize
from gptoss_lite.quant.formats import MXFP4, Int8

RNG = np.random.default_rng(0)
DTYPES = [np.float32, np.float16, bfloat16]
INT8 = [Int8(group, scales) for group in (32, 64, None) for scales in ("bf16", "float16", "e8m0")]


def packed(shape: tuple[int, ...], lowest: int = 0, highest: int = 252) -> MXFP4Tensor:
    """Draw codes and scales, every one of them."""
    scales = RNG.integers(lowest, highest + 1, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)
    return MXFP4Tensor(RNG.integers(0, 256, (*scales.shape, 16), np.uint8), scales)


def codes_of(q: MXFP4Tensor) -> np.ndarray:
    return np.stack([q.blocks & 15, q.blocks >> 4], -1).reshape(q.shape)


def weighted_error(x: np.ndarray, q: MXFP4Tensor, weights: Any = 1.0) -> np.ndarray:
    """Add up each block's w * (x - q)^2 in float64."""
    terms = weights * (x.astype(np.float64) - q.dequantize()) ** 2
    return np.asarray(terms.reshape(*q.scales.shape, 32).sum(-1))


def with_scales(x: np.ndarray, scales: np.ndarray) -> MXFP4Tensor:
    """Round to the nearest code, ties to even, with given scale bytes."""
    scaled = np.ldexp(x.astype(np.float64), 127 - np.repeat(scales.astype(int), 32, axis=-1))
    codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    return MXFP4Tensor((codes[..., ::2] | codes[..., 1::2] << 4).reshape(*scales.shape, 16), scales)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Finite arrays of several axes, dtypes and strides; some of any bits at all, some full of ties."""
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 5)), 64)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    match draw(st.sampled_from(["bits", "ties", "normal", "zeros", "small"])):
        case "bits":
            x = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
        case "ties":
            x = rng.integers(-64, 65, shape) * np.float32(0.125)
        case "normal":
            x = rng.standard_normal(shape, np.float32)
        case "zeros":
            x = np.where(rng.random(shape) < 0.5, np.float32(-0.0), np.float32(0))
        case _:
            x = rng.standard_normal(shape, np.float32) * np.float32(2.0**-127)
    with np.errstate(over="ignore", invalid="ignore"):
        x = x.astype(draw(st.sampled_from(DTYPES)))
    x[~np.isfinite(x.astype(np.float32))] = 1
    if draw(st.booleans()):
        x = np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    x.flags.writeable = draw(st.booleans())
    return x


@pytest.fixture
def numpy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the codecs find no Numba."""
    monkeypatch.setattr(codecs, "_kernels", lambda: None)


def same(a: Any, b: Any) -> None:
    """Compare quantised tensors by their bits."""
    assert type(a) is type(b)
    fields = ("blocks", "scales") if isinstance(a, MXFP4Tensor) else ("codes", "scales")
    for name in fields:
        one, other = getattr(a, name), getattr(b, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.view(f"u{one.itemsize}"), other.view(f"u{one.itemsize}"))


def test_numba_is_there_to_be_compared() -> None:
    assert codecs._kernels() is not None


def test_decoding_agrees_with_gguf() -> None:
    q = packed((4, 255 * 32))
    q.scales[:, :] = np.arange(255)
    halves = codes_of(q).reshape(
        4, 255, 2, 16
    )  # gguf: the first half in low nibbles, the second in high ones
    raw = np.concatenate([q.scales[..., None], halves[:, :, 0] | halves[:, :, 1] << 4], -1).reshape(4, -1)
    with np.errstate(over="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.MXFP4)
        np.testing.assert_array_equal(codecs.decode(q, np.float32), want)  # to gguf, zero has no sign


def test_decoding_agrees_with_ml_dtypes() -> None:
    q = packed((8, 256 * 32))
    q.scales[:, :] = np.arange(256)
    code = codes_of(q).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    with np.errstate(over="ignore"):
        want = code * np.repeat(q.scales, 32, axis=1).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        for dtype in (np.float32, bfloat16):
            got = codecs.decode(q, dtype).astype(np.float32)
            np.testing.assert_array_equal(got, want.astype(dtype).astype(np.float32))
            np.testing.assert_array_equal(np.signbit(got[:, :-32]), np.signbit(want[:, :-32]))


@settings(deadline=None)  # some are the first to compile
@given(arrays())
def test_encoding_agrees_with_ml_dtypes(x: np.ndarray) -> None:
    q = codecs.encode(x, MXFP4())
    assert isinstance(q, MXFP4Tensor)
    same(q, with_scales(x.astype(np.float32), q.scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_search_finds_the_best_of_all_exponents(dtype: Any) -> None:
    x = RNG.standard_normal((400, 32)) * 2.0 ** RNG.integers(-8, 9, (400, 1))
    x[:100, 0] *= 4  # one far above the rest, which the next lower exponent cuts off
    x[100:120] = np.where(np.arange(32) == 3, 4.25, 0.25)
    x = x.astype(dtype)
    q, ocp = codecs.encode(x, MXFP4(), search=True), codecs.encode(x, MXFP4())
    assert isinstance(q, MXFP4Tensor)
    assert isinstance(ocp, MXFP4Tensor)
    same(q, MXFP4Tensor(*mxfp4.encode(x, search=True)))
    same(q, with_scales(x.astype(np.float32), q.scales))
    best = np.min(
        [weighted_error(x, with_scales(x, np.full((400, 1), b, np.uint8))) for b in range(100, 150)], 0
    )
    np.testing.assert_allclose(weighted_error(x, q), best, rtol=1e-12)
    moves = q.scales.astype(int) - ocp.scales
    assert set(moves.ravel().tolist()) == {-1, 0, 1}


@settings(deadline=None)
@given(arrays(), st.booleans())
def test_the_search_is_never_worse_than_the_rule(x: np.ndarray, weighted: bool) -> None:
    weights = np.random.default_rng(1).lognormal(0, 3, 64).astype(np.float32) if weighted else None
    ocp, q = quantize(x, "mxfp4"), quantize(x, "mxfp4", search=True, weights=weights)
    scale = np.ldexp(1.0, 127 - ocp.scales.astype(int)) ** 2  # so that no square is lost in float64
    w = 1 if weights is None else weights.astype(np.float64)
    errors = [weighted_error(x, tensor, w) * scale for tensor in (q, ocp)]
    assert (errors[0] <= errors[1] * (1 + 1e-12)).all()
    moves = q.scales.astype(int) - ocp.scales
    assert (errors[0] < errors[1])[moves != 0].all()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_gains_on_random_numbers(weighted: bool) -> None:
    x = RNG.standard_normal((64, 2880), np.float32)
    weights = RNG.lognormal(0, 1, 2880).astype(np.float32) if weighted else None
    w = 1 if weights is None else weights
    ocp, q = quantize(x, "mxfp4"), quantize(x, "mxfp4", search=True, weights=weights)
    gain = weighted_error(x, q, w).sum() / weighted_error(x, ocp, w).sum()
    assert 0.9 < gain < 0.95


def test_weights_may_give_the_largest_number_up() -> None:
    x = np.full((1, 32), 1.5 / 8, np.float32)
    x[0, 5] = -4.0
    weights = np.ones(32, np.float32)
    weights[5] = 0
    q = quantize(x, "mxfp4", search=True, weights=weights)
    assert q.scales[0, 0] == 127 - 3  # the lowest there is, and the only one to hold 1.5 / 8
    assert q.dequantize()[0, 4:6].tolist() == [1.5 / 8, -6 / 8]
    assert quantize(x, "mxfp4", search=True).scales[0, 0] == 127


def test_equal_errors_leave_the_rule_alone() -> None:
    x = RNG.standard_normal((4, 64), np.float32)
    same(quantize(x, "mxfp4", search=True, weights=np.zeros(64, np.float32)), quantize(x, "mxfp4"))


@settings(deadline=None)
@given(st.binary(min_size=17 * 4, max_size=17 * 4), st.booleans())
def test_the_search_keeps_every_value_that_mxfp4_can_hold(data: bytes, weighted: bool) -> None:
    raw = np.frombuffer(data, np.uint8).reshape(4, 1, 17)
    values = MXFP4Tensor(raw[..., :16], np.minimum(raw[..., 16], 252)).dequantize()
    weights = np.arange(32, dtype=np.float32) if weighted else None
    q = quantize(values, "mxfp4", search=True, weights=weights)
    np.testing.assert_array_equal(q.dequantize().view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("size", [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 2.0**-149])
def test_the_search_stays_within_float32(size: float) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = -size
    for weights in (None, np.ones(32, np.float32)):
        q = quantize(x, "mxfp4", search=True, weights=weights)
        assert mxfp4.invalid_scale(q.blocks, q.scales) is None
        same(q, quantize(x, "mxfp4"))


@settings(deadline=None)
@given(arrays(), st.sampled_from(["rule", "search", "weights", "weights of each matrix"]))
def test_compiled_mxfp4_has_the_same_bits(x: np.ndarray, how: str) -> None:
    rng, weights = np.random.default_rng(2), None
    if "weights" in how:
        shape = (*x.shape[:-2], 64) if how != "weights" else (64,)
        weights = np.where(rng.random(shape) < 0.2, 0, rng.lognormal(0, 4, shape)).astype(np.float32)
    q = codecs.encode(x, MXFP4(), search=how != "rule", weights=weights)
    same(q, MXFP4Tensor(*mxfp4.encode(x, how != "rule", weights)))


@settings(deadline=None)
@given(arrays(), st.sampled_from(INT8))
def test_compiled_int8_has_the_same_bits(x: np.ndarray, format: Int8) -> None:
    if format.scales == "float16":
        x = np.clip(x, -60000, 60000).astype(x.dtype)
    q = codecs.encode(x, format)
    same(q, Int8Tensor(*int8.encode(x, format.group_size, format.scales)))
    for dtype in (np.float32, bfloat16):
        got, want = codecs.decode(q, dtype), q.dequantize().astype(dtype)
        np.testing.assert_array_equal(got.view(f"u{got.itemsize}"), want.view(f"u{got.itemsize}"))


@pytest.mark.parametrize("scales", [np.float16, bfloat16])
def test_scales_that_are_not_finite_are_not_made_finite(scales: Any) -> None:
    for bits in (0x7FFF, 0xFFFF):
        broken = np.array([[bits]], np.uint16).view(scales)
        assert np.isnan(codecs.decode(Int8Tensor(np.ones((1, 32), np.int8), broken), bfloat16)).all()


@settings(deadline=None)
@given(arrays(), st.sampled_from([MXFP4(), *INT8]))
def test_compiled_errors_are_the_same_sums(x: np.ndarray, format: MXFP4 | Int8) -> None:
    x = np.clip(x, -60000, 60000).astype(x.dtype)
    q = codecs.encode(x, format)
    got = codecs.errors(x, q)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "_kernels", lambda: None)
        assert codecs.errors(x, q) == got
    difference = x.astype(np.float64) - q.dequantize()
    np.testing.assert_allclose(
        got, [(x.astype(np.float64) ** 2).sum(), (difference**2).sum(), np.abs(difference).max()], rtol=1e-12
    )


def test_long_arrays_are_done_piece_by_piece() -> None:
    x = RNG.standard_normal((2, 200, 2880), np.float32).astype(bfloat16)
    for format in (MXFP4(), Int8(64)):
        q = codecs.encode(x, format)
        for e, n in ((0, 0), (0, 45), (1, 199)):
            same(q[e, n : n + 1], codecs.encode(x[e, n : n + 1], format))
        np.testing.assert_array_equal(codecs.decode(q, np.float32), q.dequantize())
        turned = np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)
        same(codecs.encode(turned, format), q)
        parts = [codecs.errors(x[e], q[e]) for e in range(2)]
        whole = codecs.errors(x, q)
        assert whole[2] == max(parts[0][2], parts[1][2])
        for total, *both in zip(whole[:2], *parts, strict=False):
            assert total == pytest.approx(sum(both), rel=1e-15)
        np.testing.assert_array_equal(codecs.decode(q[:, ::3], bfloat16), codecs.decode(q, bfloat16)[:, ::3])


@pytest.mark.parametrize("shape", [(32,), (0, 32), (3, 0, 32)])
@pytest.mark.parametrize("format", [MXFP4(), Int8()])
def test_vectors_and_empty_arrays_are_arrays_too(shape: tuple[int, ...], format: MXFP4 | Int8) -> None:
    x = RNG.standard_normal(shape, np.float32)
    q = codecs.encode(x, format)
    assert q.shape == shape
    np.testing.assert_array_equal(codecs.decode(q, np.float32), q.dequantize())
    squared, squared_error, largest = codecs.errors(x, q)
    assert squared == pytest.approx(float((x.astype(np.float64) ** 2).sum()))
    assert 0 <= squared_error <= squared / 50
    assert 0 <= largest < 1


@pytest.mark.usefixtures("numpy_alone")
def test_without_numba_numpy_does_it_all() -> None:
    x = RNG.standard_normal((3, 64), np.float32)
    same(codecs.encode(x, MXFP4(), search=True), MXFP4Tensor(*mxfp4.encode(x, search=True)))
    q = codecs.encode(x, Int8(64))
    same(q, Int8Tensor(*int8.encode(x, 64)))
    np.testing.assert_array_equal(codecs.decode(q, bfloat16), q.dequantize().astype(bfloat16))
    assert codecs.errors(x, q)[1] > 0


def test_importing_quant_leaves_numba_alone() -> None:
    code = "import sys, gptoss_lite.quant; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("format", [MXFP4(), Int8(None, "float16")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused_by_position(bad: float, format: MXFP4 | Int8, dtype: Any) -> None:
    x = np.zeros((2, 200, 2880), dtype)
    x[1, 150, 7] = bad
    with pytest.raises(FormatError, match=rf"{bad} at \(1, 150, 7\)"):
        codecs.encode(x, format)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(32, np.float32), r"weights \(32,\) do not fit \(2, 3, 64\)"),
        (np.ones((3, 64), np.float32), r"weights \(3, 64\) do not fit"),
        (np.ones(64), "must be float32"),
        (np.full(64, -1, np.float32), "not negative"),
        (np.full(64, np.nan, np.float32), "finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: Any, message: str) -> None:
    x = np.zeros((2, 3, 64), np.float32)
    with pytest.raises(FormatError, match=message):
        quantize(x, "mxfp4", search=True, weights=weights)


def test_what_cannot_be_meant_is_refused() -> None:
    x, ones = np.zeros((3, 64), np.float32), np.ones(64, np.float32)
    with pytest.raises(FormatError, match="give search=True"):
        quantize(x, "mxfp4", weights=ones)
    for how in ({"search": True}, {"weights": ones}):
        with pytest.raises(FormatError, match="search and weights are for mxfp4"):
            quantize(x, "int8", **how)
    with pytest.raises(FormatError, match="cannot expand to float64: choose float32 or bfloat16"):
        codecs.decode(quantize(x, "mxfp4"), np.float64)
    with pytest.raises(FormatError, match=r"cannot compare \(2, 64\) with a tensor \(3, 64\)"):
        codecs.errors(x[:2], quantize(x, "mxfp4"))
