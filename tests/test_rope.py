"""The YaRN table against transformers, and against the formula where it rounds the correction range."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.config import RopeConfig
from gptoss_lite.rope import rope_tables, yarn

OPENAI = RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, truncate=False)


def test_table_equals_transformers(layout: Path, golden: Callable[[Path], dict[str, np.ndarray]]) -> None:
    config, want = open_checkpoint(layout).config, golden(layout)
    inv_freq, concentration = yarn(config.rope, config.head_dim)
    assert inv_freq.dtype == np.float32
    np.testing.assert_allclose(inv_freq, want["rope_inv_freq"], rtol=1e-6, atol=0)
    assert concentration == pytest.approx(float(want["rope_concentration"]), abs=1e-12)


def test_truncation_rounds_the_correction_range_outwards() -> None:
    # The exact range is 8.09 to 17.40; rounded, 8 to 18: pairs 9 to 17 change, by up to three quarters.
    exact, _ = yarn(OPENAI, 64)
    rounded, _ = yarn(dataclasses.replace(OPENAI, truncate=True), 64)
    assert np.flatnonzero(exact != rounded).tolist() == list(range(9, 18))
    assert np.abs(rounded / exact - 1).max() == pytest.approx(0.76, abs=0.01)


def test_factor_one_is_plain_rope() -> None:
    inv_freq, concentration = yarn(dataclasses.replace(OPENAI, factor=1.0), 64)
    assert concentration == 1.0
    np.testing.assert_array_equal(inv_freq, (150000.0 ** (-np.arange(32) / 32)).astype(np.float32))


def test_a_range_that_leaves_the_head_stays_finite() -> None:
    for context in (1, 7, 2**31 - 1):
        inv_freq, _ = yarn(dataclasses.replace(OPENAI, original_max_position_embeddings=context), 4)
        assert np.isfinite(inv_freq).all()
        assert (inv_freq > 0).all()


def test_the_correction_range_is_held_within_the_head() -> None:
    # As transformers does. Unclamped, the range would be -0.10 to 1.06 here, and 0.11 to 3.12 below.
    below = RopeConfig(150000.0, 32.0, 150, 32.0, 1.0, truncate=False)
    assert yarn(below, 8)[0][0] == 1.0
    above = RopeConfig(100.0, 4.0, 8192, 1024.0, 1.0, truncate=False)
    low = 4 * math.log(8192 / (1024 * 2 * math.pi)) / (2 * math.log(100.0))
    blend = (1 - low) / (3 - low)
    assert yarn(above, 4)[0][1] == pytest.approx(0.1 * (1 - blend) + 0.1 / 4 * blend, rel=1e-6)


def test_tables_take_the_angle_in_float32() -> None:
    rope = inv_freq, concentration = yarn(OPENAI, 64)
    positions = np.array([0, 1, 4096, 131071], np.int32)
    cos, sin = rope_tables(rope, positions)
    assert cos.shape == sin.shape == (4, 32)
    assert cos.dtype == sin.dtype == np.float32
    assert (cos[0] == np.float32(concentration)).all()
    assert (sin[0] == 0).all()
    for row, position in enumerate(positions):
        angle = np.float32(position) * inv_freq
        np.testing.assert_array_equal(
            cos[row], (np.cos(angle.astype(float)) * concentration).astype(np.float32)
        )
        np.testing.assert_array_equal(
            sin[row], (np.sin(angle.astype(float)) * concentration).astype(np.float32)
        )
