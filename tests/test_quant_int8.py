"""int8: the codec against an oracle in float64 and facts of its own, and its tensor."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import Int8Tensor, int8, mxfp4, quantize
from gptoss_lite.quant.formats import Scales

DTYPES = [np.float32, np.float16, bfloat16]
SCALES: list[Scales] = ["bf16", "float16", "e8m0"]


def scales_of(q: Int8Tensor) -> np.ndarray:
    """Widen scales to float64."""
    if q.scales.dtype == np.uint8:
        return np.asarray(np.ldexp(1.0, q.scales.astype(int) - 127))
    return np.asarray(q.scales, np.float64)


def random_rows(seed: int, rows: int, columns: int) -> np.ndarray:
    """Draw rows of very different sizes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * 2.0 ** rng.integers(-12, 9, (rows, 1))
    return x.astype(np.float32)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (192, 64), (192, 96), (160, 160), (160, None)])
def test_codes_are_nearest_to_the_stored_scale(
    scales: Scales, dtype: Any, columns: int, group: int | None
) -> None:
    x = random_rows(1, 50, columns).astype(dtype)
    q = quantize(x, "int8", group=group, scales=scales)
    length = group or columns
    assert q.group == length
    assert q.shape == x.shape
    groups = x.astype(np.float64).reshape(50, -1, length)
    largest = np.abs(groups).max(-1)
    factor = scales_of(q)
    if scales == "e8m0":  # the least power of two that reaches the largest weight
        assert (127 * factor >= largest).all()
        assert (127 * factor / 2 < largest).all()
    else:
        step = 2.0**-25 if scales == "float16" else 0
        relative = 2.0**-8 if scales == "bf16" else 2.0**-11
        assert (np.abs(factor - largest / 127) <= relative * largest / 127 * 1.001 + step).all()
    want = np.clip(np.rint(groups / factor[..., None]), -127, 127)  # rint: ties to even
    np.testing.assert_array_equal(q.codes.reshape(groups.shape), want)
    np.testing.assert_array_equal(
        q.dequantize(), (want * factor[..., None]).astype(np.float32).reshape(x.shape)
    )


def test_ties_round_to_even_and_codes_stop_at_127() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :9] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 126.5, 0.50001]
    q = quantize(x, "int8", scales="bf16")
    assert q.scales.astype(float).tolist() == [[1.0]]
    assert q.codes[0, :9].tolist() == [127, 0, 2, 2, 0, -2, -126, 126, 1]
    x[0, 0] = -127.4  # the scale rounds to 1
    assert quantize(x, "int8", scales="bf16").codes[0, 0] == -127


@pytest.mark.parametrize("scales", SCALES)
def test_zeros_stay_zeros(scales: Scales) -> None:
    q = quantize(np.zeros((2, 64), np.float32), "int8", scales=scales)
    assert not q.codes.any()
    assert not q.scales.astype(np.float32).any()
    assert not q.dequantize().any()


@pytest.mark.parametrize("scales", ["bf16", "e8m0"])
@pytest.mark.parametrize("size", [np.finfo(np.float32).max, np.finfo(np.float32).tiny, 2.0**-149])
def test_the_ends_of_float32_stay_finite_and_near(scales: Scales, size: float) -> None:
    x = np.full((1, 32), size, np.float32)
    x[0, ::2] *= -1
    y = quantize(x, "int8", scales=scales).dequantize()
    smallest = 2.0**-127 if scales == "e8m0" else 2.0**-133
    assert (np.abs(y.astype(np.float64) - x) <= 2.0**-6 * size + smallest / 2).all()


def test_fp16_scales_reach_from_their_smallest_number_to_their_largest() -> None:
    x = np.full((1, 32), 2.0**-24, np.float32)
    assert (quantize(x, "int8", scales="float16").dequantize() == x).all()
    x[:] = 65504.0 * 127
    assert (quantize(x, "int8", scales="float16").dequantize() == x).all()
    with pytest.raises(FormatError, match="float16 scales: choose bf16"):
        quantize(x * 2, "int8", scales="float16")


@pytest.mark.parametrize("scale", range(253))
def test_what_mxfp4_holds_is_exact_in_groups_of_32(scale: int) -> None:
    rng = np.random.default_rng(scale)
    blocks = rng.integers(0, 256, (4, 3, 16)).astype(np.uint8)
    values = mxfp4.decode(blocks, np.full((4, 3), scale, np.uint8))
    if scale == 0:  # no E8M0 scale has a half of the smallest
        values[np.abs(values) == 2.0**-128] = 0
        values = np.where(np.abs(values) == 1.5 * 2.0**-127, 0, values)
    q = quantize(values, "int8", group=32, scales="e8m0")
    np.testing.assert_array_equal(q.dequantize(), values)


@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 5, 96), (2, 3, 4, 32), (0, 32), (1, 2**18 + 32)])
def test_leading_axes_and_strides_change_nothing(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    q = quantize(x, "int8")
    assert q.shape == shape
    assert q.nbytes == x.size + x.size // 32 * 2
    for row, code in zip(x.reshape(-1, shape[-1]), q.codes.reshape(-1, shape[-1]), strict=True):
        np.testing.assert_array_equal(quantize(row, "int8").codes, code)
    strided = quantize(np.asfortranarray(x), "int8")
    np.testing.assert_array_equal(strided.codes, q.codes)
    np.testing.assert_array_equal(strided.scales, q.scales)


def test_quantize_needs_little_beyond_its_result() -> None:
    quantize(np.zeros((1, 32), bfloat16), "int8")  # compiled, if it is, outside the measurement
    x = np.zeros((4, 2880, 1440), bfloat16).swapaxes(1, 2)
    tracemalloc.start()
    try:
        q = quantize(x, "int8", group=64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - q.nbytes < 12 * 2**20  # the input is 32 MiB, its float32 copy would be 63 MiB


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused_by_position(bad: float, dtype: Any) -> None:
    x = np.zeros((2, 200, 2880), dtype)
    x[1, 150, 7] = bad
    with pytest.raises(FormatError, match=rf"{bad} at \(1, 150, 7\)"):
        quantize(x, "int8", group=None)


@pytest.mark.parametrize(
    ("array", "group", "message"),
    [
        (np.zeros((4, 33), np.float32), 32, r"\(4, 33\)"),
        (np.zeros((), np.float32), 32, r"\(\)"),
        (np.zeros((4, 32), np.float64), 32, "float64"),
        (np.zeros((4, 96), np.float32), 64, r"\(4, 96\) in groups of 64: .* divides 96"),
        (np.zeros((4, 96), np.float32), 48, "groups of 48: give a multiple of 32"),
        (np.zeros((4, 96), np.float32), 0, "groups of 0"),
        (np.zeros((4, 96), np.float32), -32, "groups of -32"),
    ],
)
def test_other_shapes_dtypes_and_groups_are_refused(array: np.ndarray, group: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        quantize(array, "int8", group=group)


def test_unknown_scales_and_formats_are_refused_with_the_choices() -> None:
    x = np.zeros((1, 32), np.float32)
    with pytest.raises(FormatError, match="unknown scales 'f32': choose bf16, float16 or e8m0"):
        int8.encode(x, 32, "f32")  # type: ignore[arg-type]
    with pytest.raises(FormatError, match="unknown format 'int3': choose mxfp4 or int8"):
        quantize(x, "int3")


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (np.zeros((4, 64), np.int8), np.zeros((3, 2), np.float16), r"\(4, 64\) do not fit scales \(3, 2\)"),
        (np.zeros((4, 64), np.int8), np.zeros((4, 4), np.float16), r"\(4, 64\) do not fit scales \(4, 4\)"),
        (np.zeros((4, 96), np.int8), np.zeros((4, 2), np.float16), r"multiple of 32 columns"),
        (np.zeros((4, 64), np.int8), np.zeros((4, 0), np.float16), r"\(4, 0\)"),
        (np.zeros(64, np.int8), np.zeros((), np.float16), r"\(\)"),
        (np.zeros((4, 64), np.uint8), np.zeros((4, 2), np.float16), "uint8 and float16"),
        (np.zeros((4, 64), np.int8), np.zeros((4, 2), np.float32), "int8 and float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(codes: np.ndarray, scales: np.ndarray, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Int8Tensor(codes, scales)


def test_an_index_takes_experts_and_rows_and_map_reaches_both_parts() -> None:
    q = quantize(np.random.default_rng(5).standard_normal((3, 4, 96)).astype(np.float32), "int8", group=96)
    whole = q.dequantize()
    for index in (1, slice(1, 3), (2, slice(0, 2)), (0, 3)):
        np.testing.assert_array_equal(q[index].dequantize(), whole[index])
    with pytest.raises(IndexError, match="leading axes"):
        q[0, 0, 0]
    twice = q.map(lambda part: np.concatenate([part, part]))
    assert twice.shape == (6, 4, 96)
    assert twice.group == 96


@pytest.mark.parametrize("scales", SCALES)
def test_an_invalid_scale_is_one_that_takes_127_beyond_float32(
    scales: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = int8.SCALE_DTYPES[scales]
    every = np.arange(1 << 8 * dtype.itemsize, dtype=f"u{dtype.itemsize}").view(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        valid = np.isfinite(int8.factors(every) * np.float32(127))
    good, bad = every[valid], every[~valid]
    assert int8.invalid_scale(good) is None
    monkeypatch.setattr(int8, "_CHUNK", 100)
    stored = np.resize(good, (5, 60))
    assert int8.invalid_scale(stored) is None
    for scale in bad:
        for place in (0, 0), (2, 7), (4, 59):
            wrong = stored.copy()
            wrong[place] = scale
            assert int8.invalid_scale(wrong) == place
            wrong[4, 59] = bad[0]
            assert int8.invalid_scale(wrong) == place  # the first of two
