"""Drawing a token from 200,000 logits without sorting them: gptoss_lite.sampling, fast.

What filters keep is always the first so many tokens in one order: larger logits first, of equal ones the
lower id. So a filter is a limit: the least logit kept, and how many of the tokens that have it.

Sums and logarithms here differ from the specification's in the last bits. Where that could decide, `draw`
decides nothing, so that the specification is asked: its tokens are the ones drawn, always. One thread for a
row, without Python's lock.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numba import njit, prange

from gptoss_lite.kernels.cpu import Array
from gptoss_lite.sampling import Draw

CHUNK = 1024  # tokens at a time: what is known of them stays in the first-level cache
GROUP = 64  # tokens passed over at once where none of them can be drawn
BINS, LANES = 256, 8  # eight sums to a bin, in turn: a sum has to wait for what was added to it last
FEW = 2048  # logits that are sorted at once
_ALL_LAST = np.uint64(0xFFFFFFFFFFFFFFFF)  # eight tokens in bin 255

# Philox4x32-10 in uint64, so that a product's high word is a shift away.
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_WORD, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)

_LEAST_NOISE, _MOST_NOISE = -3.2, 23.0  # bounds of -log(-log(u)), u from 2^-33 to 1 - 2^-33
# A bound of -log(v) without a logarithm: a float32's bits, as a number, are at most 2^23 (log2(v) + 127).
_PER_BIT = np.float32(math.log(2) * 2.0**-23)
_NO_BITS = np.float32(math.log(2) * (127 + 32))  # 32, as v is in units of 2^-32
_SLACK = 1e-3  # more than float32 arithmetic loses between -27 and 23
_NOTHING = np.float32(-np.inf)

# exp(y) = 2^n exp(r), |r| < 0.35, by Taylor: the first term left out is below 1e-14. Adding _ROUND leaves an
# integer in the low bits; log(2) has a high part whose products with n are exact.
_PER_OCTAVE, _ROUND = 1 / math.log(2), 1.5 * 2.0**52
_OCTAVE, _OCTAVE_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_C2, _C3, _C4, _C5, _C6, _C7, _C8, _C9, _C10, _C11 = (1 / math.factorial(n) for n in range(2, 12))
_EXPONENT, _ONE = np.int64(52), np.int64(0x3FF0000000000000)
_NEGLIGIBLE = -700.0  # exp of much less is no normal number


@njit(inline="always")
def _word(seed, choice, position, token):  # type: ignore[no-untyped-def]
    """See gptoss_lite.sampling.philox_uniform: the word x; all arguments uint64."""
    c0, c1, c2, c3 = position, token, seed >> _32, np.uint64(0)
    k0, k1 = seed & _WORD, choice
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _WORD, (p0 >> _32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0


@njit(inline="always")
def _exp(y):  # type: ignore[no-untyped-def]
    """Take the exponential of a float64 below 0, to 1e-14 of itself, in what becomes vector code."""
    y = max(y, _NEGLIGIBLE)
    shifted = y * _PER_OCTAVE + _ROUND
    n = shifted - _ROUND
    r = (y - n * _OCTAVE) - n * _OCTAVE_LOW
    p = ((((_C11 * r + _C10) * r + _C9) * r + _C8) * r + _C7) * r + _C6
    p = (((((p * r + _C5) * r + _C4) * r + _C3) * r + _C2) * r + 1.0) * r + 1.0
    power = (np.float64(shifted).view(np.int64) << _EXPONENT) + _ONE
    return p * np.int64(power).view(np.float64)


@njit(cache=True, nogil=True, boundscheck=False, fastmath={"contract"})
def _sum_exp(logits: Array, best: float) -> float:
    """Sum exp(logit - best), always in the same order."""
    sums = np.zeros(CHUNK, np.float64)
    for start in range(0, len(logits), CHUNK):
        part = logits[start : start + CHUNK]
        for i in range(len(part)):
            sums[i] += _exp(np.float64(part[i]) - best)
    total = 0.0
    for i in range(CHUNK):
        total += sums[i]
    return total


@njit(cache=True, nogil=True, boundscheck=False, fastmath={"contract"})
def _weigh(
    logits: Array, best: float, rate: float, first: float, per_logit: float, bins: Array, eights: Array,
    sums: Array,
) -> float:  # fmt: skip
    """Sum up weights exp((logit - best) * rate), and those in each bin but the last; find each token's bin.

    Bin 0 begins at the largest logit, `first`, a logit has per_logit bins, and the last one takes all that is
    worse. Written: bins uint8 (V,), and sums float64 (BINS, LANES), zeros before. eights: bins as uint64.
    """
    weights, totals = np.empty(CHUNK, np.float64), np.zeros(CHUNK, np.float64)
    for start in range(0, len(logits), CHUNK):
        part, own = logits[start : start + CHUNK], bins[start : start + CHUNK]
        for i in range(len(part)):
            x = np.float64(part[i])
            weights[i] = _exp((x - best) * rate)
            totals[i] += weights[i]
            own[i] = np.int32(min((first - x) * per_logit, np.float64(BINS - 1)))
        whole = len(part) // LANES * LANES
        for i in range(0, whole, LANES):
            if eights[(start + i) // LANES] != _ALL_LAST:
                for lane in range(LANES):
                    sums[np.uint64(own[i + lane]), lane] += weights[i + lane]
        for i in range(whole, len(part)):
            sums[np.uint64(own[i]), 0] += weights[i]
    total = 0.0
    for i in range(CHUNK):
        total += totals[i]
    return total


@njit(cache=True, nogil=True, boundscheck=False)
def _candidates(
    part: Array, start: int, best: float, rate: float, lowest: np.float32, least: np.float32, ties: int,
    scaled: Array, below: Array, ids: Array,
) -> tuple[int, int]:  # fmt: skip
    """Collect the tokens of a chunk that reach `lowest` -> their number, and the ties still to be kept.

    Of those at `least` only the first `ties`. Written: below float32, (logit - best) * rate, and ids uint32.
    Where many reach it the others are left among them, with below -inf: sorting them out would take longer.
    """
    highest, scale = np.float32(best), np.float32(rate)
    count = equal = 0
    for i in range(len(part)):
        reached = part[i] >= lowest
        scaled[i] = (part[i] - highest) * scale if reached else _NOTHING
        count += reached
        equal += reached & (part[i] == least)
    if equal:
        for i in range(len(part)):
            if part[i] == least:
                if ties == 0:
                    scaled[i] = _NOTHING
                else:
                    ties -= 1
    if 4 * count > len(part):
        for i in range(len(part)):
            below[i], ids[i] = scaled[i], start + i
        return len(part), ties
    taken = np.uint64(0)
    if count:
        for g in range(0, len(part), GROUP):
            group = scaled[g : min(g + GROUP, len(part))]
            some = 0
            for i in range(len(group)):
                some += group[i] > _NOTHING
            if some:
                for i in range(len(group)):
                    below[taken], ids[taken] = group[i], start + g + i
                    taken += np.uint64(group[i] > _NOTHING)
    return int(taken), ties


@njit(cache=True, nogil=True, boundscheck=False)
def _gumbel(
    logits: Array, best: float, least: np.float32, ties: int, rate: float, seed: np.uint64,
    choice: np.uint64, position: np.uint64, doubt: float,
) -> int:  # fmt: skip
    """Find the token with the largest (logit - best) * rate - log(-log(u)), as far as the limit goes.

    -1 if another one comes within `doubt` of it. Only few tokens cost a logarithm: as -log(u) is at least
    1 - u, the noise is at most -log(1 - u), and a number a little larger than that is in the bits of 1 - u.
    """
    scaled, below = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    reach = np.empty(CHUNK, np.float32)
    ids, words = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    token, score, second = -1, _LEAST_NOISE, -np.inf
    for start in range(0, len(logits), CHUNK):
        # No noise makes up for more than this; a little more, as float32 rounds it.
        lowest = np.float32(best + (score - _MOST_NOISE) / rate - 2.5e-7 * abs(best))
        part = logits[start : start + CHUNK]
        count, ties = _candidates(
            part, start, best, rate, max(least, lowest), least, ties, scaled, below, ids
        )  # fmt: skip
        for i in range(count):
            words[i] = _word(seed, choice, position, np.uint64(ids[i]))
        bar = np.float32(score - doubt - _SLACK)
        near = 0
        for i in range(count):
            v = np.float32(~words[i]) + np.float32(0.5)  # 1 - u
            reach[i] = below[i] + (_NO_BITS - np.float32(np.float32(v).view(np.int32)) * _PER_BIT)
            near += reach[i] >= bar
        if near:
            for i in range(count):
                if reach[i] >= np.float32(score - doubt - _SLACK):
                    u = (np.float64(words[i]) + 0.5) * 2.0**-32
                    s = (np.float64(logits[int(ids[i])]) - best) * rate - math.log(-math.log(u))
                    if s > score:
                        token, score, second = int(ids[i]), s, score
                    elif s > second:
                        second = s
    return token if score - second > doubt else -1


@njit(cache=True, nogil=True, boundscheck=False)
def _largest(logits: Array) -> float:
    """Find the largest of float32 numbers; NaN where one of them is."""
    bits = logits.view(np.int32)
    most, most_magnitude = np.int32(-(2**31)), np.int32(0)
    for i in range(
        len(bits)
    ):  # as integers, which become vector code: of negative numbers all bits but one turn
        magnitude = bits[i] & np.int32(0x7FFFFFFF)
        most_magnitude = max(most_magnitude, magnitude)
        most = max(most, bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    if most_magnitude > np.int32(0x7F800000):
        return math.nan
    return float(np.int32(most ^ ((most >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32))


@njit(cache=True, nogil=True, boundscheck=False, parallel=True)
def _draw_rows(
    logits: Array, rows: Array, rates: Array, words: Array, bias_start: Array, bias_ids: Array, biases: Array,
    tokens: Array,
) -> None:  # fmt: skip
    """Draw a token for each of R rows of logits (S, V); a thread takes a row.

    rows int64, rates float64 and tokens int64 (R,), words uint64 (3, R): seed, choice and position. Row r's
    biases, float32, and the ids that they are added to lie from bias_start[r] to bias_start[r + 1].
    """
    for r in prange(len(tokens)):
        row = logits[rows[r]]
        best = _largest(row)
        is_sound = math.isfinite(best)
        if bias_start[r] < bias_start[r + 1]:
            row = row.copy()
            for i in range(bias_start[r], bias_start[r + 1]):
                if bias_ids[i] < len(row):
                    row[bias_ids[i]] += biases[i]
                else:
                    is_sound = False
            best = _largest(row)
        tokens[r] = -1
        if is_sound and math.isfinite(best):
            doubt = _doubt(best, rates[r])
            if doubt < math.inf:
                tokens[r] = _gumbel(
                    row, best, _NOTHING, len(row), rates[r], words[0, r], words[1, r], words[2, r], doubt
                )


def draw_rows(logits: Array, draws: Mapping[int, Draw]) -> Sequence[int]:
    """See gptoss_lite.sampling.Fast.draw_rows."""
    wanted = draws.values()
    biases = [draw.params.logit_bias for draw in wanted]
    tokens = np.empty(len(draws), np.int64)
    _draw_rows(
        logits,
        np.array(list(draws)),
        1 / np.array([draw.params.temperature for draw in wanted]),
        np.array(
            [[d.seed for d in wanted], [d.choice for d in wanted], [d.position for d in wanted]], np.uint64
        ),
        np.cumsum([0, *map(len, biases)]),
        np.array([token for bias in biases for token in bias], np.int64),
        np.array([value for bias in biases for value in bias.values()], np.float32),
        tokens,
    )
    found: list[int] = tokens.tolist()
    return found


@njit(cache=True, nogil=True)
def _doubt(best: float, rate: float) -> float:
    """Tell how near two scores may be that are told apart; infinite where no two are.

    Two scores of the specification differ by two roundings at their size from what they are here, and by less
    than 1e-13 as logarithms are not all rounded alike.
    """
    size = abs(best) * rate
    if size > 1e8:  # rounding to a float64 of that size changes the noise
        return math.inf
    return 1e-12 + 1e-15 * size


def draw(
    logits: Array, best: float, left: Array | None, temperature: float, top_p: float, min_p: float,
    seed: int, choice: int, position: int,
) -> int | None:  # fmt: skip
    """See gptoss_lite.sampling.Fast.draw."""
    rate = 1 / temperature
    doubt = _doubt(best, rate)
    limit = _limit(logits, best, left, temperature, top_p, min_p)
    if limit is None or math.isinf(doubt):
        return None
    words = np.uint64(seed), np.uint64(choice), np.uint64(position)
    token = _gumbel(logits, best, *limit, rate, *words, doubt)
    return None if token < 0 else int(token)


def log_sum_exp(logits: Array, best: float) -> float:
    """See gptoss_lite.sampling.log_sum_exp."""
    return best + math.log(_sum_exp(logits, best))


def _limit(
    logits: Array, best: float, left: Array | None, temperature: float, top_p: float, min_p: float
) -> tuple[Any, int] | None:
    """Find the least logit that the filters keep, float32, and how many tokens that have it they keep."""
    least, ties = _NOTHING, len(logits)
    if left is not None:
        logits = logits[left]
        least = logits.min()
        ties = int(np.count_nonzero(logits == least))
    if top_p < 1:
        nucleus = _nucleus(logits, best, temperature, top_p)
        if nucleus is None:
            return None
        least, ties = nucleus
    if min_p:
        lowest = best + temperature * np.log(min_p)
        if (rounded := np.float32(lowest)) < lowest:
            rounded = np.nextafter(rounded, np.float32(np.inf))
        if rounded > least:
            least, ties = rounded, len(logits)
    return least, ties


def _nucleus(logits: Array, best: float, temperature: float, p: float) -> tuple[Any, int] | None:
    """Find the limit of the fewest best tokens that hold probability p; None if rounding could move it.

    Sums over bins tell in which one it lies; that one is divided anew, until few are left.
    """
    rate, first, ahead, total = 1 / temperature, best, 0.0, 0.0
    # Tokens deeper than this hold less than 1 - p of what the best token alone holds.
    deep = temperature * math.log(len(logits) / (1 - p))
    doubt = 1e-12 + 2.3e-16 * len(logits)  # the specification adds up one by one
    while len(logits) > FEW and deep:
        eights, sums = np.empty(len(logits) // LANES + 1, np.uint64), np.zeros((BINS, LANES))
        bins = eights.view(np.uint8)[: len(logits)]
        weight = _weigh(logits, best, rate, first, BINS / deep, bins, eights, sums)
        total = total or weight
        reached = ahead + np.cumsum(sums.sum(axis=1))
        reached[-1] = ahead + weight
        bin_ = int(np.searchsorted(reached, p * total))
        ahead = reached[bin_ - 1] if bin_ else ahead
        logits = logits[bins == bin_]
        if not len(logits):  # p is next to 1
            return None
        first, last = float(logits.max()), float(logits.min())
        deep = first - last
        if math.isinf(deep):
            return None
    logits = np.sort(logits)[::-1]
    reached = ahead + np.cumsum(np.exp((logits.astype(np.float64) - best) * rate))
    total = total or reached[-1]
    end = int(np.searchsorted(reached, p * total))
    before = reached[end - 1] if end else ahead or -math.inf  # the best token is kept in any case
    if end == len(logits) or min(reached[end] - p * total, p * total - before) < doubt * total:
        return None
    return logits[end], int(np.count_nonzero(logits[: end + 1] == logits[end]))
