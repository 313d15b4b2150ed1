"""Which weights the CUDA kernels may multiply as fp16."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptoss_lite.kernels.cuda import ranges
from gptoss_lite.kernels.cuda.layout import MXFP4_HALF_SCALES


@pytest.mark.parametrize(
    ("size", "fits"), [(0.02, True), (500.0, True), (2.0**-12, True), (2.0**-15, False), (1e-30, False)]
)
@pytest.mark.parametrize("shape", [(40, 96), (2, 3, 64), (1, 3000), (3000, 1024)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_dense_weights_fit_unless_fp16_has_too_few_digits(
    size: float, fits: bool, shape: tuple[int, ...], dtype: Any
) -> None:
    w = (np.random.default_rng(1).standard_normal(shape) * size).astype(dtype)
    assert ranges.dense_fits_half(w) == fits
    if dtype is not np.float32:
        assert ranges.dense_fits_half(w.view(np.uint16)) == fits
    strided = np.asfortranarray(w)
    assert ranges.dense_fits_half(strided) == fits


def test_one_weight_beyond_fp16_is_found_anywhere() -> None:
    w = np.ones((3000, 1024), np.float32)
    w[2999, 1023] = -65504
    assert ranges.dense_fits_half(w)
    w[2999, 1023] = -65536
    assert not ranges.dense_fits_half(w)


def test_what_is_exact_in_fp16_fits_however_small() -> None:
    assert ranges.dense_fits_half(np.zeros((4, 32), np.float32))
    assert ranges.dense_fits_half(np.full((4, 32), 2.0**-24, np.float32))
    assert not ranges.dense_fits_half(np.full((4, 32), 2.0**-25, np.float32))
    assert ranges.dense_fits_half(np.full((4, 32), 2.0**-24, np.float16))


@pytest.mark.parametrize(
    ("scales", "fits"),
    [
        ([*MXFP4_HALF_SCALES], True),
        ([104, 104], True),
        ([103, 112], False),
        ([0, 113], True),
        ([0, 128], True),
        ([0, 129], False),
        ([110, 254], False),
        ([0, 0], False),
        ([], True),
    ],
)
def test_mxfp4_scales_fit_in_range_or_where_what_is_lost_is_small(scales: list[int], fits: bool) -> None:
    assert ranges.mxfp4_fits_half(np.array(scales, np.uint8)) == fits


@pytest.mark.parametrize(
    ("scale", "fits"), [(2.0**9, True), (2.0**10, False), (1.5e-3, True), (2.0**-24, True), (2.0**-25, False)]
)
def test_int8_scales_fit_in_range_or_where_they_are_exact(scale: float, fits: bool) -> None:
    for dtype in (ml_dtypes.bfloat16, np.float32):
        assert ranges.int8_fits_half(np.full((4, 3), scale, dtype)) == fits
    bits = np.full((4, 3), scale, ml_dtypes.bfloat16).view(np.uint16)
    assert ranges.int8_fits_half(bits) == fits
    if np.log2(scale) == round(np.log2(scale)):
        e8m0 = np.full((4, 3), 127 + int(np.log2(scale)), np.uint8)
        assert ranges.int8_fits_half(e8m0) == fits
    assert not ranges.int8_fits_half(np.full((4, 3), 1e-7, ml_dtypes.bfloat16))
