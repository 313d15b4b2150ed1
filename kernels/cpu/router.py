"""The router: its product, and the choice of the best experts; a token is a task."""

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit, prange

from gptoss_lite.kernels.cpu import isa
from gptoss_lite.kernels.cpu.tile import DENSE_ROWS, dense_tile


@njit(boundscheck=False)
def _choose(logits, t, ids, weights):  # type: ignore[no-untyped-def]
    """Take the best of logits (E,), of equal ones the first, and their softmax; logits are spoilt."""
    k = ids.shape[1]
    for c in range(k):
        best = 0
        for e in range(1, len(logits)):
            if logits[e] > logits[best]:
                best = e
        ids[t, c], weights[t, c] = best, logits[best]
        logits[best] = -np.inf
    total, largest = np.float32(0), weights[t, 0]
    for c in range(k):
        weights[t, c] = np.float32(np.exp(weights[t, c] - largest))
        total += weights[t, c]
    for c in range(k):
        weights[t, c] /= total


@cache
def make_router(kind: isa.ISA, format: str) -> Callable[..., None]:
    """Make the router; format: "bf16" or "float32"."""
    key = isa.key(kind.name, format)

    @njit(parallel=True, cache=True, boundscheck=False)
    def route(h, weight, added, ids, weights):  # type: ignore[no-untyped-def]
        """Write each token's experts, the best first, and their shares.

        h float32 (T, hidden), normalised, weight (E, hidden) the bits of bf16 as uint16 or of
        float32 as uint32, added float32 (E,), ids int32 and weights float32 (T, k).
        """
        T, hidden = h.shape
        E = len(weight)
        for t in prange(T):
            out = np.empty((1, DENSE_ROWS), np.float32)
            logits = np.empty(E, np.float32)
            for e in range(0, E, DENSE_ROWS):
                rows = min(DENSE_ROWS, E - e)
                dense_tile(key, weight, e * hidden, rows, h, t, 1, out)
                for i in range(rows):
                    logits[e + i] = out[0, i] + added[e + i]
            _choose(logits, t, ids, weights)

    return route
