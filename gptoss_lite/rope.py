"""Rotary position tables with YaRN: pure functions of the configuration."""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.config import RopeConfig


class Rope(NamedTuple):
    """inv_freq float32 (head_dim/2,), radians per token; concentration, the factor on cos and sin."""

    inv_freq: NDArray[np.float32]
    concentration: float


def yarn(config: RopeConfig, head_dim: int) -> Rope:
    """Compute the angle per position of each pair of dimensions, and the factor on cos and sin.

    inv_freq is computed in float64 and rounded once; the concentration is 0.1 ln(factor) + 1. A pair that
    turns more than beta_fast times over the original context keeps its frequency, one that turns less than
    beta_slow times has it divided by the factor, and those between are blended. Source: Peng et al., YaRN,
    arXiv 2309.00071, sections 3.2 and 3.4.
    """

    def dimension_of(turns: float) -> float:
        """Give the (fractional) index of the pair that makes this many turns over the original context."""
        wavelength = config.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(config.theta))

    pair = np.arange(head_dim // 2)
    extrapolation = config.theta ** (-2.0 * pair / head_dim)
    if config.factor == 1:
        return Rope(extrapolation.astype(np.float32), 1.0)
    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((pair - low) / max(high - low, 1e-3), 0, 1)  # 0 keeps the frequency, 1 divides it
    inv_freq = extrapolation * (1 - ramp) + extrapolation / config.factor * ramp
    return Rope(inv_freq.astype(np.float32), 0.1 * math.log(config.factor) + 1)


def rope_tables(rope: Rope, positions: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute cos and sin, float32 (T, D/2) each, at integer positions (T,), both times the concentration.

    The angle is a float32 product, as in training; cos and sin of it are taken in float64 and rounded once.
    """
    angle = (positions.astype(np.float32)[:, None] * rope.inv_freq).astype(np.float64)  # (T, D/2)
    cos, sin = np.cos(angle) * rope.concentration, np.sin(angle) * rope.concentration
    return cos.astype(np.float32), sin.astype(np.float32)
