"""Gumbel-max: temperature, Philox noise and the search for the best token in one pass over the logits."""

import math

import numpy as np
from numba import njit, prange

from gptoss_lite.kernels.cpu import Array

TASK = 4096  # tokens per parallel task

# Philox4x32-10 in uint64, so that a product's high word is a shift away.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_WORD, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


@njit(inline="always")
def _uniform(seed, choice, position, token):  # type: ignore[no-untyped-def]
    """See gptoss_lite.sampling.philox_uniform; all arguments uint64."""
    c0, c1, c2, c3 = position, token, seed >> _32, np.uint64(0)
    k0, k1 = seed & _WORD, choice
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _WORD, (p0 >> _32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return (np.float64(c0) + 0.5) * 2.0**-32


@njit(parallel=True, cache=True, boundscheck=False)
def _gumbel_argmax(
    logits: Array, temperature: float, seed: np.uint64, choice: np.uint64, position: np.uint64
) -> int:
    """Find each task's best token, then the best of those; ties go to the lowest id, whatever the threads."""
    V = len(logits)
    tasks = (V + TASK - 1) // TASK
    scores = np.empty(tasks, np.float64)
    tokens = np.empty(tasks, np.int64)
    for task in prange(tasks):
        first = task * TASK
        count = min(TASK, V - first)
        u = np.empty(TASK, np.float64)
        for i in range(count):  # a loop of its own: without a branch it becomes vector code
            u[i] = _uniform(seed, choice, position, np.uint64(first + i))
        best, token = -np.inf, first
        for i in range(count):
            x = np.float64(logits[first + i]) / temperature
            # The noise is below -log(1 - u): most tokens cannot win and cost one logarithm instead of two.
            if x - math.log(1.0 - u[i]) > best:
                score = x - math.log(-math.log(u[i]))
                if score > best:
                    best, token = score, first + i
        scores[task], tokens[task] = best, token
    return tokens[np.argmax(scores)]  # type: ignore[no-any-return]


def gumbel_argmax(logits: Array, temperature: float, seed: int, choice: int, position: int) -> int:
    """Draw as gptoss_lite.sampling.gumbel_argmax does, from the same random numbers; logits float32 (V,)."""
    logits = np.ascontiguousarray(logits, np.float32)
    words = np.uint64(seed), np.uint64(choice), np.uint64(position)
    return int(_gumbel_argmax(logits, float(temperature), *words))
