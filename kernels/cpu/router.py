"""The router: its product, and the choice of the best experts."""

from functools import cache
from typing import Any

import numpy as np
from numba import cfunc, njit, types

from gptoss_lite.kernels.cpu import Array, isa
from gptoss_lite.kernels.cpu.linear import linear_dense
from gptoss_lite.kernels.cpu.program import Steps
from gptoss_lite.kernels.cpu.workers import TASK, Operands, array

_TOKENS = 8  # in a task

_CHOOSE = Operands(
    array(types.float32, 2),  # logits
    array(types.int32, 2),  # ids
    array(types.float32, 2),  # weights
)
_read = _CHOOSE.read


def route(
    steps: Steps, kind: isa.ISA, format: str, h: Array, weight: Array, added: Array, k: int
) -> tuple[Array, Array]:
    """Choose each token's experts, the best first -> ids int32 and their shares, weights float32 (T, k).

    format: "bf16" or "float32". h float32 (T, hidden), normalised, weight (E, hidden) the bits of bf16 as
    uint16 or of float32 as uint32, added float32 (E,).
    """
    T = len(h)
    logits = steps.room("router", (T, len(weight)))
    ids, weights = steps.room("chosen", (T, k), np.int32), steps.room("shares", (T, k))
    one_group, all_rows = np.zeros(1, np.int32), np.array([0, T], np.int32)
    linear_dense(steps, kind, format, weight[None], one_group, all_rows, h, logits, added=added)
    steps.add(_make_choose(), -(-T // _TOKENS), _CHOOSE, logits, ids, weights)
    return ids, weights


@njit(boundscheck=False)
def _best(logits, t, ids, weights):  # type: ignore[no-untyped-def]
    """Take the best of logits[t], of equal ones the first, and their softmax; logits are spoilt."""
    E, k = logits.shape[1], ids.shape[1]
    for c in range(k):
        best = 0
        for e in range(1, E):
            if logits[t, e] > logits[t, best]:
                best = e
        ids[t, c], weights[t, c] = best, logits[t, best]
        logits[t, best] = -np.inf
    total, largest = np.float32(0), weights[t, 0]
    for c in range(k):
        weights[t, c] = np.float32(np.exp(weights[t, c] - largest))
        total += weights[t, c]
    for c in range(k):
        weights[t, c] /= total


@cache
def _make_choose() -> Any:
    key = isa.key()

    @cfunc(TASK, cache=True, error_model="numpy")
    def choose(place, task, worker):  # type: ignore[no-untyped-def]
        logits, ids, weights = _read(key, place)
        for t in range(task * _TOKENS, min((task + 1) * _TOKENS, len(logits))):
            _best(logits, t, ids, weights)

    return choose
