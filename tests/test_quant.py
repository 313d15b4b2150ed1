"""MXFP4: the codec against facts of the specification and an exhaustive search, and its tensor."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import MXFP4Tensor, mxfp4, quantize

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES += [-v for v in VALUES]
DTYPES = [np.float32, np.float16, bfloat16]


def oracle(block: np.ndarray) -> tuple[int, list[int]]:
    """Quantise 32 finite numbers by exhaustive search in float64, which is exact here."""
    largest = float(np.abs(block.astype(np.float64)).max())
    exponent = max(int(np.floor(np.log2(largest))) - 2, -127) if largest else -127
    codes = []
    for x in block.astype(np.float64):
        distance = [
            (abs(abs(float(x)) - v * 2.0**exponent), code % 2, code) for code, v in enumerate(VALUES[:8])
        ]
        codes.append(min(distance)[2] + 8 * int(np.signbit(x)))
    return exponent + 127, codes


def codes_of(q: MXFP4Tensor) -> np.ndarray:
    return np.stack([q.blocks & 15, q.blocks >> 4], -1).reshape(*q.scales.shape, 32)


def random_floats(seed: int, count: int) -> np.ndarray:
    """Draw finite float32 numbers of every magnitude by their bits."""
    bits = np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32)
    x = bits.view(np.float32)
    return np.where(np.isfinite(x), x, np.float32(0))


@pytest.mark.parametrize("code", range(16))
def test_every_code_at_every_scale_is_code_times_a_power_of_two(code: int) -> None:
    scales = np.arange(255, dtype=np.uint8)[:, None]
    blocks = np.full((255, 1, 16), code | code << 4, np.uint8)
    with np.errstate(over="ignore"):
        values = MXFP4Tensor(blocks, scales).dequantize()
        want = np.ldexp(VALUES[code], np.arange(255) - 127).astype(np.float32)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, np.repeat(want[:, None], 32, 1))
    np.testing.assert_array_equal(np.signbit(values), code >= 8)


def test_the_low_nibble_comes_first() -> None:
    blocks = np.zeros((1, 1, 16), np.uint8)
    blocks[0, 0, 3] = 0xF2
    values = MXFP4Tensor(blocks, np.array([[127]], np.uint8)).dequantize()
    assert values[0, 6:8].tolist() == [1.0, -6.0]
    assert np.count_nonzero(values) == 2


def test_scale_255_is_nan() -> None:
    values = MXFP4Tensor(np.zeros((1, 1, 16), np.uint8), np.array([[255]], np.uint8)).dequantize()
    assert np.isnan(values).all()


def test_ties_round_to_the_even_code_and_excess_is_clamped() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :13] = [4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.99, -0.25, -0.75, -5.0, 0.2500001]
    q = quantize(x, "mxfp4")
    assert q.scales.tolist() == [[127]]
    want = [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0, -1.0, -4.0, 0.5]
    assert q.dequantize()[0, :13].tolist() == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_agrees_with_an_exhaustive_search(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    near = (rng.integers(-64, 65, (200, 32)) / 8).astype(np.float32)  # full of ties
    wide = random_floats(2, 200 * 32).reshape(200, 32)
    small = (rng.standard_normal((50, 32)) * 2.0**-130).astype(np.float32)
    x = np.concatenate([near, wide, small, np.zeros((1, 32), np.float32)])
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    x[~np.isfinite(x.astype(np.float32))] = 0
    q = quantize(x, "mxfp4")
    for row, block in enumerate(x):
        scale, codes = oracle(block)
        assert q.scales[row, 0] == scale, row
        assert codes_of(q)[row, 0].tolist() == codes, row


@given(st.binary(min_size=17 * 4, max_size=17 * 4))
def test_quantize_keeps_every_value_that_mxfp4_can_hold(data: bytes) -> None:
    raw = np.frombuffer(data, np.uint8).reshape(4, 1, 17)
    values = MXFP4Tensor(raw[..., :16], np.minimum(raw[..., 16], 252)).dequantize()
    again = quantize(values, "mxfp4")
    np.testing.assert_array_equal(again.dequantize().view(np.uint32), values.view(np.uint32))
    third = quantize(again.dequantize(), "mxfp4")
    np.testing.assert_array_equal(third.blocks, again.blocks)
    np.testing.assert_array_equal(third.scales, again.scales)


@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 5, 96), (2, 3, 4, 32), (0, 32), (1, 2**18 + 32)])
def test_leading_axes_and_strides_change_nothing(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    q = quantize(x, "mxfp4")
    assert q.shape == shape
    assert q.nbytes == x.size * 17 // 32
    rows = [quantize(row, "mxfp4").dequantize() for row in x.reshape(-1, shape[-1])]
    np.testing.assert_array_equal(
        q.dequantize().reshape(-1, shape[-1]), np.array(rows).reshape(-1, shape[-1])
    )
    strided = quantize(np.asfortranarray(x), "mxfp4")
    np.testing.assert_array_equal(strided.blocks, q.blocks)
    np.testing.assert_array_equal(strided.scales, q.scales)


def test_rows_beyond_one_chunk_are_quantised_like_the_first() -> None:
    row = np.random.default_rng(4).standard_normal(2880).astype(np.float32)
    q = quantize(np.broadcast_to(row, (200, 2880)), "mxfp4")
    assert (q.blocks == q.blocks[0]).all()
    assert (q.scales == q.scales[0]).all()


def test_quantize_needs_little_beyond_its_result() -> None:
    quantize(np.zeros((1, 32), bfloat16), "mxfp4")  # compiled, if it is, outside the measurement
    x = np.zeros((4, 2880, 1440), bfloat16).swapaxes(1, 2)
    tracemalloc.start()
    try:
        q = quantize(x, "mxfp4")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - q.nbytes < 8 * 2**20  # the input is 32 MiB, its float32 copy would be 63 MiB


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused_by_position(bad: float, dtype: Any) -> None:
    x = np.zeros((2, 200, 2880), dtype)
    x[1, 150, 7] = bad
    with pytest.raises(FormatError, match=rf"{bad} at \(1, 150, 7\)"):
        quantize(x, "mxfp4")
    with pytest.raises(FormatError, match=rf"{bad} at \(7,\)|{bad} at \(0, 7\)"):
        quantize(x[1, 150], "mxfp4")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 33), np.float32), r"\(4, 33\)"),
        (np.zeros((), np.float32), r"\(\)"),
        (np.zeros((4, 32), np.float64), "float64"),
        (np.zeros((4, 32), np.int32), "int32"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        quantize(array, "mxfp4")


def test_an_unknown_format_is_refused_with_the_choices() -> None:
    with pytest.raises(FormatError, match="unknown format 'int3': choose mxfp4"):
        quantize(np.zeros((1, 32), np.float32), "int3")


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (
            np.zeros((4, 2, 16), np.uint8),
            np.zeros((4, 3), np.uint8),
            r"\(4, 2, 16\) do not fit scales \(4, 3\)",
        ),
        (np.zeros((4, 2, 15), np.uint8), np.zeros((4, 2), np.uint8), r"\(4, 2, 15\)"),
        (np.zeros(16, np.uint8), np.zeros((), np.uint8), r"\(\)"),
        (np.zeros((4, 2, 16), np.int8), np.zeros((4, 2), np.uint8), "int8"),
        (np.zeros((4, 2, 16), np.uint8), np.zeros((4, 2), np.float32), "float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused(blocks: np.ndarray, scales: np.ndarray, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        MXFP4Tensor(blocks, scales)


def test_an_index_takes_experts_and_rows_but_never_splits_the_packed_axis() -> None:
    x = np.random.default_rng(5).standard_normal((3, 4, 512)).astype(np.float32)
    q = quantize(x, "mxfp4")
    whole = q.dequantize()
    for index in (1, slice(1, 3), np.array([2, 0]), (2, slice(0, 2)), (0, 3)):
        np.testing.assert_array_equal(q[index].dequantize(), whole[index])
    for bad in ((0, 0, 0), (slice(None), slice(None), 0), (..., 0), (None, 0)):
        with pytest.raises(IndexError, match="leading axes"):
            q[bad]


def test_map_reaches_both_parts() -> None:
    q = quantize(np.ones((2, 32), np.float32), "mxfp4")
    twice = q.map(lambda part: np.concatenate([part, part]))
    assert twice.shape == (4, 32)
    assert (twice.dequantize() == 1).all()


@pytest.mark.parametrize(
    ("scale", "code", "valid"),
    [
        (252, 7, True),
        (253, 5, True),
        (253, 6, False),
        (254, 3, True),
        (254, 4, False),
        (254, 12, False),
        (255, 0, False),
    ],
)
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 4, 2), (99, 39, 79)])
def test_invalid_scale_is_what_overflows_float32(
    scale: int, code: int, valid: bool, place: tuple[int, ...]
) -> None:
    blocks = np.zeros((100, 40, 80, 16), np.uint8)
    scales = np.full((100, 40, 80), 252, np.uint8)
    scales[place] = scale
    blocks[place][9] = code << 4
    assert mxfp4.invalid_scale(blocks, scales) == (None if valid else place)
    with np.errstate(over="ignore"):
        assert np.isfinite(mxfp4.decode(blocks[place][None], scales[place][None])).all() == valid
