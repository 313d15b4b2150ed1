"""The yardstick of decode: memory filled with random bits, and read as fast as a plain kernel can."""

import numpy as np
from numba import njit, prange

from gptoss_lite.kernels.cpu import Array

# SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014).
STEP, FIRST_FACTOR, SECOND_FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SHIFTS = 30, 27, 31

PART = 1 << 17  # words that a thread reads at a time: 1 MiB

_STEP, _FIRST, _SECOND = (np.uint64(number) for number in (STEP, FIRST_FACTOR, SECOND_FACTOR))
_A, _B, _C = (np.uint64(shift) for shift in SHIFTS)


@njit(cache=True, nogil=True, boundscheck=False)
def fill(words: Array, state: np.uint64, keep: np.uint64, add: np.uint64) -> None:
    """Write (random & keep) + add to each of words uint64 (N,), by one thread and without Python's lock.

    state: SplitMix64's before the first word; each word adds STEP to it.
    """
    for i in range(len(words)):
        state += _STEP
        z = (state ^ (state >> _A)) * _FIRST
        z = (z ^ (z >> _B)) * _SECOND
        words[i] = ((z ^ (z >> _C)) & keep) + add


@njit(parallel=True, cache=True, boundscheck=False)
def read(words: Array, sums: Array) -> None:
    """Add up words uint64 (N,), PART of them at a time -> sums uint64 (ceil(N / PART),), modulo 2^64."""
    for part in prange(len(sums)):
        total = np.uint64(0)
        for word in words[part * PART : (part + 1) * PART]:
            total += word
        sums[part] = total
