"""The small steps between the products: RMSNorm, clamped SwiGLU, the weighted sum of the experts, softmax."""

import math

import numpy as np
from numba import njit, prange

from gptoss_lite.kernels.cpu import Array


@njit(cache=True, fastmath={"contract", "reassoc", "nsz"}, boundscheck=False)
def rms_norm(x: Array, weight: Array, eps: float, y: Array) -> None:
    """Write x / sqrt(mean(x^2) + eps) * weight row by row; x and y float32 (T, K), weight float32 (K,)."""
    T, K = x.shape
    for t in range(T):
        squares = np.float32(0)
        for k in range(K):
            squares += x[t, k] * x[t, k]
        factor = np.float32(1.0 / math.sqrt(squares / K + eps))
        for k in range(K):
            y[t, k] = x[t, k] * factor * weight[k]


@njit(parallel=True, cache=True, boundscheck=False)
def swiglu(x: Array, bias: Array, expert: Array, limit: float, y: Array) -> None:
    """Write clamped SwiGLU of interleaved gate and up columns.

    x float32 (R, 2 I), bias float32 (E, 2 I), expert int32 (R,) whose bias each row takes, y float32 (R, I).
    """
    R, inner = y.shape
    top = np.float32(limit)
    for r in prange(R):
        for i in range(inner):
            gate = min(x[r, 2 * i] + bias[expert[r], 2 * i], top)
            up = max(min(x[r, 2 * i + 1] + bias[expert[r], 2 * i + 1], top), -top)
            sigmoid = np.float32(1.0 / (1.0 + math.exp(np.float32(-1.702) * gate)))
            y[r, i] = gate * sigmoid * (up + np.float32(1))


@njit(parallel=True, cache=True, boundscheck=False)
def combine(x: Array, y: Array, bias: Array, expert: Array, rows: Array, weights: Array, out: Array) -> None:
    """Add to each token the weighted results of its experts, in the order of the router's choice.

    x and out float32 (T, K), y float32 (R, K), bias float32 (E, K), expert int32 (R,), rows int32 (T, k):
    which row of `y` holds choice c of token t, weights float32 (T, k).
    """
    T, K = x.shape
    for t in prange(T):
        for k in range(K):
            total = np.float32(0)
            for c in range(rows.shape[1]):
                r = rows[t, c]
                total += weights[t, c] * (y[r, k] + bias[expert[r], k])
            out[t, k] = x[t, k] + total


@njit(cache=True, boundscheck=False)
def softmax(x: Array, y: Array) -> None:
    """Write the softmax of each row; x float32 (T, k) with its largest value first, y float32 (T, k)."""
    for t in range(x.shape[0]):
        total = np.float32(0)
        for k in range(x.shape[1]):
            y[t, k] = math.exp(x[t, k] - x[t, 0])
            total += y[t, k]
        for k in range(x.shape[1]):
            y[t, k] /= total
