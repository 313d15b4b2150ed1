"""Drawing tokens, against gptoss_lite.sampling in float64."""

from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np

from gptoss_lite.kernels.cuda.checks import Check
from gptoss_lite.kernels.cuda.checks.common import Array, upload
from gptoss_lite.kernels.cuda.launch import sampling as launch
from gptoss_lite.kernels.cuda.runtime import Runtime
from gptoss_lite.sampling import SamplingParams, gumbel_argmax, keep, philox_uniform

_POISON = 0xCDCDCDCD
_NONE, _NOT_FINITE = 0, 2**64 - 1  # philox.cuh's keys for rows without a winner
_MASS = 4e-6  # how far float32 sums of probabilities may be from float64's
_SCORE = 1e-5  # and scores of about 10: logit / temperature and two logarithms, each rounded


def _draw(
    rt: Runtime,
    logits: Array,
    params: Sequence[SamplingParams],
    seeds: Array,
    choices: Array,
    positions: Array,
) -> Array:
    """Launch -> the winners' keys uint64 (R,)."""
    best = upload(rt, np.full(len(params), _POISON, np.uint64))
    launch.sample(
        rt,
        upload(rt, logits),
        upload(rt, np.array([p.temperature for p in params], np.float32)),
        upload(rt, np.array([p.top_k for p in params], np.int32)),
        upload(rt, np.array([p.top_p for p in params], np.float32)),
        upload(rt, np.array([p.min_p for p in params], np.float32)),
        upload(rt, seeds.astype(np.uint64)),
        upload(rt, choices.astype(np.int32)),
        upload(rt, positions.astype(np.int32)),
        best,
    )
    return rt.download(best)


def _tokens(keys: Array) -> Array:
    return (~keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _values(keys: Array) -> Array:
    """Undo the order of floats: the number that won."""
    order = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(order >> 31, order & 0x7FFFFFFF, ~order).astype(np.uint32)
    return bits.view(np.float32).astype(np.float64)


def _params(temperature: float, top_k: int = 0, top_p: float = 1, min_p: float = 0) -> SamplingParams:
    """Round to float32 what the kernel gets in float32."""
    temperature, top_p, min_p = (float(np.float32(number)) for number in (temperature, top_p, min_p))
    return SamplingParams(temperature, top_p, top_k, min_p)


def _kept(logits: Array, params: SamplingParams) -> list[Array]:
    """Which tokens may be drawn: by a nucleus that is as small as rounding may make it, exact, as large."""
    if params.top_p == 1:
        return [keep(logits, params) > -np.inf] * 3
    shares = (max(0.0, params.top_p - _MASS), params.top_p, min(1.0, params.top_p + _MASS))
    return [
        keep(logits, SamplingParams(params.temperature, share, params.top_k, params.min_p)) > -np.inf
        for share in shares
    ]


def _logits(kind: str, rows: int, V: int) -> Array:
    rng = np.random.default_rng(V + rows)
    logits: Array = rng.normal(size=(rows, V)).astype(np.float32)
    match kind:
        case "peaked":
            logits = 4 * logits + 20
        case "ties":
            logits = np.round(2 * logits)
        case "equal":
            logits[:] = -3
        case "negative":
            logits = logits / 1000 - 100
        case "forbidden":
            logits[rng.random((rows, V)) < 0.7] = -np.inf
            logits[:, V // 2] = 0  # one at least is left
    return logits.astype(np.float32)


def _check_sample(
    rt: Runtime, V: int, kind: str, temperatures: Sequence[float], top_ks: Sequence[int],
    top_ps: Sequence[float], min_ps: Sequence[float],
) -> None:  # fmt: skip
    """Every combination of options, a row each: what may be drawn, what is, and its score."""
    params = [_params(*options) for options in product(temperatures, top_ks, top_ps, min_ps)]
    R = len(params)
    rng = np.random.default_rng(R)
    logits = _logits(kind, R, V)
    seeds, choices = rng.integers(0, 2**64, R, np.uint64), np.arange(R) % 3
    positions = rng.integers(0, 131072, R)
    keys = _draw(rt, logits, params, seeds, choices, positions)
    for r, (token, value) in enumerate(zip(_tokens(keys), _values(keys), strict=True)):
        row, option = logits[r], params[r]
        what = f"row {r}, {option}: token {token}"
        if option.greedy:
            assert token == row.argmax(), f"{what}: must be {row.argmax()}"
            continue
        low, kept, high = _kept(row, option)
        assert high[token], f"{what} is filtered out"
        noise = -np.log(
            -np.log(philox_uniform(int(seeds[r]), int(choices[r]), int(positions[r]), np.arange(V)))
        )
        scores = row.astype(np.float64) / option.temperature + noise
        allowed = _SCORE + 3e-7 * abs(scores[token])
        assert abs(value - scores[token]) <= allowed, f"{what}: score {value}, must be {scores[token]}"
        best = np.sort(scores[kept])[-2:]
        if np.array_equal(low, high) and best[-1] - best[0] > 1e-4:
            want = gumbel_argmax(
                np.where(kept, row, -np.inf).astype(np.float32),
                option.temperature, int(seeds[r]), int(choices[r]), int(positions[r]),
            )  # fmt: skip
            assert token == want, f"{what}: must be {want}"


def _check_all_drawn(rt: Runtime, options: SamplingParams, want: Sequence[int], R: int = 24) -> None:
    """Many seeds draw each token that the filters keep, and no other."""
    logits = np.array([1, 3, 2, 3, 0, 2, 1, -np.inf, 3, 2.5], np.float32)
    rows = np.tile(logits, (R, 1))
    keys = _draw(rt, rows, [options] * R, np.arange(R) * 2**40 + 1, np.zeros(R), np.full(R, 5))
    assert set(np.flatnonzero(keep(logits, options) > -np.inf)) == set(want), "the check itself is wrong"
    assert set(_tokens(keys)) == set(want), f"drawn {sorted(set(_tokens(keys)))}: must be {want}"


def _check_not_finite(rt: Runtime) -> None:
    """NaN and +infinity are found wherever they stand, and told apart from rows without a token."""
    bad = [np.nan, -np.nan, np.inf]
    logits = np.random.default_rng(0).normal(size=(12, 2000)).astype(np.float32)
    for r in range(6):
        logits[r, (0, 1999, 1024, 7, 1023, 3)[r]] = bad[r % 3]
    logits[6:8] = -np.inf
    logits[8] = np.nan
    logits[9, 5] = 3e38
    options = [_params(0 if r % 2 else 1, top_k=r % 4, top_p=0.9) for r in range(12)]
    positions = np.array([3] * 10 + [-1] * 2)
    keys = _draw(rt, logits, options, np.arange(12), np.zeros(12), positions)
    assert (keys[[*range(6), 8]] == _NOT_FINITE).all(), keys
    assert (keys[[6, 7, 10, 11]] == _NONE).all(), keys
    assert _tokens(keys)[9] == 5


def _check_alone(rt: Runtime) -> None:
    """A row's key is the same alone and among others, and changes with seed, choice and position."""
    logits = np.tile(_logits("random", 1, 500), (6, 1))
    options = [_params(1, 100, 0.95, 0.01)] * 6
    seeds, choices = np.array([1, 2, 1, 1, 1 + 2**32, 1], np.uint64), np.array([0, 0, 1, 0, 0, 0])
    positions = np.array([9, 9, 9, 8, 9, 9])
    keys = _draw(rt, logits, options, seeds, choices, positions)
    assert keys[5] == keys[0] and len(set(keys)) == 5, keys
    one = slice(3, 4)
    alone = _draw(rt, logits[one], options[one], seeds[one], choices[one], positions[one])
    assert alone[0] == keys[3]


def _check_finish(rt: Runtime, R: int) -> None:
    rng = np.random.default_rng(R)
    want = rng.integers(0, 201_088, R)
    keys = rng.integers(1, 2**31, R).astype(np.uint64) << np.uint64(32) | (~want & 0xFFFFFFFF).astype(
        np.uint64
    )
    failed = np.arange(R) % 5 == 3
    keys[failed] = np.where(np.arange(R) % 2, _NONE, np.uint64(_NOT_FINITE))[failed]
    want[failed] = 0
    best, drawn = upload(rt, keys), upload(rt, np.full(R, -7, np.int32))
    result = upload(rt, np.full((R, 2), -7, np.int32))
    launch.finish(rt, best, drawn, result)
    assert np.array_equal(rt.download(result), np.stack([want, failed], axis=1)), "result"
    assert np.array_equal(rt.download(drawn), want), "drawn"
    assert not rt.download(best).any(), "keys are not 0 afterwards"


def _sample_checks() -> dict[str, Check]:
    checks: dict[str, Check] = {}
    for V, kind in product((5, 300), ("random", "ties", "equal", "forbidden")):
        checks[f"sample: {V} tokens, {kind}"] = partial(
            _check_sample, V=V, kind=kind, temperatures=(1,), top_ks=(0, 1, 5, V, V + 7),
            top_ps=(0.5, 1), min_ps=(0, 0.1),
        )  # fmt: skip
    for temperature in (0, 0.5, 10):
        checks[f"sample: temperature {temperature}"] = partial(
            _check_sample, V=1000, kind="random", temperatures=(temperature,), top_ks=(0, 300),
            top_ps=(0, 0.5, 0.999), min_ps=(0, 0.1, 1),
        )  # fmt: skip
    for kind in ("peaked", "ties", "negative"):
        checks[f"sample: 4097 tokens, {kind}"] = partial(
            _check_sample, V=4097, kind=kind, temperatures=(0.8,), top_ks=(0, 1500), top_ps=(0.7, 0.9999, 1),
            min_ps=(0, 0.02),
        )  # fmt: skip
    checks["sample: one token"] = partial(
        _check_sample, V=1, kind="random", temperatures=(0, 1), top_ks=(0, 1, 9), top_ps=(0, 1), min_ps=(0, 1)
    )
    return checks


CHECKS: dict[str, Check] = _sample_checks() | {
    "sample: no filter, all are drawn": partial(
        _check_all_drawn, options=_params(3), want=[0, 1, 2, 3, 4, 5, 6, 8, 9], R=96
    ),
    "sample: top_k among ties": partial(_check_all_drawn, options=_params(1, 2), want=[1, 3]),
    "sample: top_k": partial(_check_all_drawn, options=_params(5, 5), want=[1, 2, 3, 8, 9]),
    "sample: top_p among ties": partial(_check_all_drawn, options=_params(1, 0, 0.4), want=[1, 3]),
    "sample: top_p": partial(_check_all_drawn, options=_params(1, 0, 0.75), want=[1, 3, 8, 9]),
    "sample: top_p of what top_k leaves": partial(_check_all_drawn, options=_params(1, 2, 0.5), want=[1]),
    "sample: top_p cuts ties that top_k cut": partial(
        _check_all_drawn, options=_params(5, 6, 0.95), want=[1, 2, 3, 5, 8, 9]
    ),
    "sample: min_p": partial(_check_all_drawn, options=_params(1, 0, 1, 0.36), want=[1, 2, 3, 5, 8, 9]),
    "sample: min_p 1": partial(_check_all_drawn, options=_params(1, 0, 1, 1), want=[1, 3, 8]),
    "sample: min_p leaves ties that top_k cut": partial(
        _check_all_drawn, options=_params(5, 5, 1, 0.1), want=[1, 2, 3, 8, 9]
    ),
    "sample: rows that are not finite": _check_not_finite,
    "sample: a row does not depend on the others": _check_alone,
    "finish: one row": partial(_check_finish, R=1),
    "finish: 7 rows": partial(_check_finish, R=7),
    "finish: 300 rows": partial(_check_finish, R=300),
}
