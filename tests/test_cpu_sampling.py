"""The CPU's sampling draws the specification's tokens: same survivors, same winner, or no decision at all."""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_lite import sampling as spec
from gptoss_lite.kernels.cpu import sampling as kernel
from gptoss_lite.ops import get_ops
from gptoss_lite.sampling import Draw, Sampled, SamplingParams, keep, philox_uniform, sample

Array = npt.NDArray[Any]
V = 201_088
LARGEST = float(np.finfo(np.float32).max)


def limit(logits: Array, params: SamplingParams) -> tuple[Any, int] | None:
    left = spec._best(logits, params.top_k) if params.top_k else None
    return kernel._limit(logits, float(logits.max()), left, params.temperature, params.top_p, params.min_p)


def within(logits: Array, least: Any, ties: int) -> list[int]:
    """Which tokens a limit keeps."""
    kept = [*np.flatnonzero(logits > least), *np.flatnonzero(logits == least)[:ties]]
    return sorted(int(i) for i in kept if logits[i] > -np.inf)


def kept(logits: Array, params: SamplingParams) -> list[int]:
    return np.flatnonzero(keep(logits, params) > -np.inf).tolist()


def assert_same(found: Sampled | Exception, expected: Sampled | Exception) -> None:
    if isinstance(found, Exception) or isinstance(expected, Exception):
        assert (type(found), str(found)) == (type(expected), str(expected))
        return
    assert found.token == expected.token
    assert (found.logprob is None) == (expected.logprob is None)
    assert [token for token, _ in found.top_logprobs] == [token for token, _ in expected.top_logprobs]
    if found.logprob is not None:
        values = [[s.logprob, *(value for _, value in s.top_logprobs)] for s in (found, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-9, abs=1e-6)


def assert_draws_alike(logits: Array, request: Draw) -> None:
    (found,), (expected,) = sample(logits[None], [request], kernel), sample(logits[None], [request])
    assert_same(found, expected)


def row(kind: str, size: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    logits: Array = rng.standard_normal(size)
    match kind:
        case "peaked":  # a few hundred tokens stand out of a bulk far below
            logits = 2.5 * logits
            logits[rng.choice(size, min(size, 400), replace=False)] += 15
        case "broad":
            logits = 3 * logits
        case "ties":
            logits = np.round(4 * logits) / 2
        case "masked":
            logits[rng.random(size) < 0.9] = -np.inf
            logits[size // 2] = 1
        case "narrow":
            logits = logits / 1000 - 100
        case "outlier":
            logits = logits / 1000 - 20
            logits[size // 3] = 0
    return logits.astype(np.float32)


KINDS = ("peaked", "broad", "ties", "masked", "narrow", "outlier")
FILTERS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.3},
    {"temperature": 100.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 5000},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9, "temperature": 3.0},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 3000, "top_p": 0.95, "temperature": 0.8},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.3},
    {"top_p": 0.99, "min_p": 1e-4},
)  # fmt: skip


# Parts


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**63 + 12345, 2**64 - 1])
def test_uniforms_equal_the_specification_bit_for_bit(seed: int) -> None:
    ids = np.array([0, 1, 4095, 4096, V - 1, 2**31 - 1])
    words = np.uint64(seed), np.uint64(3), np.uint64(131_071)
    found = [(float(kernel._word(*words, np.uint64(i))) + 0.5) * 2.0**-32 for i in ids]
    assert found == list(philox_uniform(seed, 3, 131_071, ids))


def test_noise_stays_within_its_bounds() -> None:
    least, most = -np.log(-np.log(np.array([0.5, 2**32 - 0.5]) * 2.0**-32))
    assert least > kernel._LEAST_NOISE and most < kernel._MOST_NOISE


def test_exponentials_are_accurate() -> None:
    y = -np.concatenate([np.linspace(0, 50, 5001), np.geomspace(1e-12, 699, 2000)]).astype(np.float32)
    found = np.array([kernel._sum_exp(y[i : i + 1], 0.0) for i in range(len(y))])
    np.testing.assert_allclose(found, np.exp(y.astype(np.float64)), rtol=2e-14)
    assert kernel._sum_exp(np.array([-800, -LARGEST, -np.inf], np.float32), LARGEST) < 1e-300


@pytest.mark.parametrize("size", [1, 7, 1023, 1024, 1025, 5000, V])
@pytest.mark.parametrize("kind", KINDS)
def test_log_sum_exp_equals_the_specification(kind: str, size: int) -> None:
    logits = row(kind, size)
    best = float(logits.max())
    assert kernel.log_sum_exp(logits, best) == pytest.approx(spec.log_sum_exp(logits, best), abs=1e-11)


# Filters


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_filters_keep_the_tokens_of_the_specification(kind: str, options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    for size in (1, 100, 2048, 2049, 20_000):
        logits = row(kind, size)
        if (found := limit(logits, params)) is not None:
            assert within(logits, *found) == kept(logits, params)
        else:  # of equal tokens a whole number may hold just this probability
            assert kind == "ties"


@pytest.mark.parametrize("kind", KINDS)
def test_a_nucleus_is_found_in_bins_of_bins(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "FEW", 4)
    logits = row(kind, 3000)
    for p in np.random.default_rng(5).random(100).tolist():
        params = SamplingParams(top_p=p)
        if (found := limit(logits, params)) is not None:
            assert within(logits, *found) == kept(logits, params)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_filters_keep_the_tokens_of_the_specification_whatever_the_logits(data: st.DataObject) -> None:
    logits, params = data.draw(rows()), data.draw(options())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "FEW", data.draw(st.sampled_from([2, 8, 2048])))  # few are sorted, many binned
        found = limit(logits, params) if logits.max() > -np.inf else None
    if found is not None:
        assert within(logits, *found) == kept(logits, params)


@pytest.mark.parametrize("few", [4, 4096])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_top_p_at_the_border_is_not_decided_and_beside_it_is(
    few: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "FEW", few)
    logits = row("broad", 3000)
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    mass = np.cumsum(np.sort(weights)[::-1]) / weights.sum()
    for k in range(1000):
        assert limit(logits, SamplingParams(temperature, top_p=float(mass[k]))) is None
    for k in (0, 1, 2, 50, 500, 1000):
        for p, count in ((mass[k] - 1e-10, k + 1), (mass[k] + 1e-10, k + 2)):
            found = limit(logits, SamplingParams(temperature, top_p=float(p)))
            assert found is not None and len(within(logits, *found)) == count


def test_a_nucleus_whose_mass_is_never_quite_reached_is_not_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        logits = row(kind, 3000)
        for few in (4, 2048, 4096):
            monkeypatch.setattr(kernel, "FEW", few)
            assert limit(logits, SamplingParams(top_p=1 - 2**-53)) is None
    # Borders at which the last sum is rounded down, found by trying many.
    monkeypatch.setattr(kernel, "FEW", 4)
    for seed, k in ((0, 143), (3, 137), (4, 133), (13, 103), (14, 125), (21, 128), (23, 157), (56, 164)):
        logits = (np.random.default_rng(seed).standard_normal(300) * 3).astype(np.float32)
        weights = np.exp(logits.astype(np.float64) - logits.max())
        p = np.cumsum(np.sort(weights)[::-1])[k] / weights.sum()
        assert limit(logits, SamplingParams(top_p=float(p))) is None


@pytest.mark.parametrize("p", [0.4, 0.5, 0.9])
def test_a_nucleus_that_ends_among_many_equal_logits_is_decided(p: float) -> None:
    logits = np.full(6000, -0.001, np.float32)
    logits[50:80], logits[77] = 0, 8
    found = limit(logits, params := SamplingParams(top_p=p))
    assert found is not None and found[0] < 0
    assert within(logits, *found) == kept(logits, params)


def test_a_nucleus_that_ends_among_the_worst_is_not_decided() -> None:
    logits = np.full(3000, -np.inf, np.float32)
    logits[:2950] = -np.log(3000 / (1 - 0.99)) * 255.1 / 256  # as deep as the nucleus could reach
    logits[0] = 0
    params = SamplingParams(top_p=0.99)
    assert len(kept(logits, params)) > 1 and limit(logits, params) is None
    assert_draws_alike(logits, Draw(params, 1, 0, (), 0))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_min_p_is_compared_exactly(temperature: float) -> None:
    logits = np.array([0, -1.1, -2.2, -3.3], np.float32)
    for token in (1, 2, 3):
        for nudge, count in ((1 - 1e-9, token + 1), (1 + 1e-9, token)):
            p = float(np.exp(np.float64(logits[token]) / temperature)) * nudge
            found = limit(logits, params := SamplingParams(temperature, min_p=p))
            assert found is not None
            assert within(logits, *found) == kept(logits, params) == list(range(count))


def test_a_nucleus_within_equal_logits_takes_the_lowest_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    for few in (16, 4096):
        monkeypatch.setattr(kernel, "FEW", few)
        logits = np.zeros(1000, np.float32)
        logits[500:] = 1
        params = SamplingParams(top_p=0.30005)
        found = limit(logits, params)
        assert found is not None and found[0] == 1
        assert within(logits, *found) == kept(logits, params) == list(range(500, 500 + found[1]))


@pytest.mark.parametrize("p", [0.0, 1e-300])
def test_the_smallest_nucleus_is_the_best_token(p: float) -> None:
    for size in (3, 5000):
        assert limit(row("broad", size), SamplingParams(top_p=p)) is not None


# Draws


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_those_of_the_specification(kind: str) -> None:
    for size, (i, options) in itertools.product((1, 63, 1024, 1025, 6000), enumerate(FILTERS)):
        logits = row(kind, size, seed=i)
        params = SamplingParams(**options, logprobs=i if i <= 20 else None)
        for seed in (i, i << 40):
            assert_draws_alike(logits, Draw(params, seed, i % 3, range(i), 0))


@pytest.mark.parametrize("kind", ["peaked", "broad", "masked"])
def test_draws_from_a_whole_vocabulary_are_those_of_the_specification(kind: str) -> None:
    tokens = np.random.default_rng(1).integers(0, V, 500).tolist()
    changes = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {5: 3.0, 100_000: 2.0}}
    for i, options in enumerate(FILTERS):
        more: dict[str, Any] = {**options, **(changes if i % 2 else {})}
        params = SamplingParams(**more, logprobs=20 if i % 3 == 0 else None)
        assert_draws_alike(row(kind, V, seed=i), Draw(params, i << 33, 1, tokens, 200))


BIASES = st.sampled_from([-np.inf, -1.0, 0.5, 100.0])
LOGITS = (
    st.sampled_from([-np.inf, -LARGEST, -1e6, -100.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 1e4])
    | st.floats(-30, 30, width=32)
    | st.sampled_from([1e30, LARGEST])
)


@st.composite
def rows(draw: st.DrawFn) -> Array:
    pool = draw(st.lists(LOGITS, min_size=1, max_size=12))
    size = draw(st.sampled_from([1, 2, 3, 15, 64, 65, 200]))
    picks = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, len(pool), size)
    return np.array(pool, np.float32)[picks]


@st.composite
def options(draw: st.DrawFn) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([1e-5, 1e-3, 0.1, 0.7, 1.0, 3.0, 100.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 63, 64, 199, 200, 201, 2**31 - 1])),
        top_p=draw(
            st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9, 0.999, 1 - 2**-53, 1.0, 1.0]) | st.floats(0, 1)
        ),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.5, 1.0])),
        logprobs=draw(st.sampled_from([None, 0, 1, 20])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 1.3])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, -0.5, 0.25])),
        logit_bias=draw(st.dictionaries(st.integers(0, 3), BIASES, max_size=2)),
    )


@settings(max_examples=200, deadline=None)
@given(rows(), options(), st.integers(0, 2**64 - 1), st.integers(0, 3), st.integers(0, 100))
@np.errstate(all="ignore")  # the largest numbers overflow when they are penalised
def test_draws_are_those_of_the_specification_whatever_the_logits(
    logits: Array, params: SamplingParams, seed: int, choice: int, position: int
) -> None:
    assert_draws_alike(logits, Draw(params, seed, choice, [0] * position, position // 2))


ODD_ROWS = ([np.nan, 1, 2], [1, -np.nan, 2], [np.inf, 1, 2], [-np.inf] * 3, [-np.inf, 0, -np.inf], [1e30] * 3)


@settings(max_examples=100, deadline=None)
@given(st.data())
@np.errstate(all="ignore")
def test_rows_drawn_together_are_those_of_the_specification(data: st.DataObject) -> None:
    """Plain draws, all others, errors and what cannot be told apart, in any order."""
    biases = st.dictionaries(st.integers(0, 3), BIASES, max_size=2)  # of three tokens
    plain = st.builds(SamplingParams, temperature=st.sampled_from([1e-4, 0.7, 1.0]), logit_bias=biases)
    some_rows = st.sampled_from(ODD_ROWS) | st.lists(LOGITS, min_size=3, max_size=3)
    cases = data.draw(st.lists(st.tuples(some_rows, plain | options()), min_size=2, max_size=9))
    logits = np.array([values for values, _ in cases], np.float32)
    before, seed = logits.copy(), data.draw(st.integers(0, 2**64 - 1))
    draws = [Draw(params, seed, i, [0] * i, 0) for i, (_, params) in enumerate(cases)]
    for found, expected in zip(sample(logits, draws, kernel), sample(logits, draws), strict=True):
        assert_same(found, expected)
    np.testing.assert_array_equal(logits, before)


def test_ordinary_rows_are_drawn_together() -> None:
    logits = np.stack([row(kind, V) for kind in ("peaked", "broad", "masked") for _ in range(20)])
    params = SamplingParams(temperature=0.8, logit_bias={5: 3.0, 100_000: -np.inf})
    draws = {i: Draw(params if i % 2 else SamplingParams(), i, i % 3, range(i), 0) for i in range(1, 60)}
    found = kernel.draw_rows(logits, draws)
    assert found == [
        spec.gumbel_argmax(spec.adjust(logits[i], d), d.params.temperature, d.seed, d.choice, d.position)
        for i, d in draws.items()
    ]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_largest_of_a_row_is_found_whatever_its_sign(size: int) -> None:
    rng = np.random.default_rng(size)
    for values in (rng.standard_normal(size), -1 - rng.random(size), np.full(size, -np.inf), np.zeros(size)):
        logits = values.astype(np.float32)
        assert kernel._largest(logits) == logits.max()
        for odd in (np.nan, -np.nan, np.inf):
            logits[-1] = odd
            np.testing.assert_equal(kernel._largest(logits), logits.max())


def test_of_tied_tokens_at_the_limit_only_those_kept_are_drawn() -> None:
    logits = np.zeros(3000, np.float32)
    logits[::300] = 1
    drawn = set()
    for seed in range(400):
        token = kernel.draw(logits, 1.0, spec._best(logits, 15), 5.0, 1.0, 0.0, seed, 0, 0)
        assert token is not None
        drawn.add(token)
    assert drawn == {*range(0, 3000, 300), 1, 2, 3, 4, 5}


@pytest.mark.parametrize("kind", ["peaked", "broad", "masked"])
def test_ordinary_rows_are_decided_here(kind: str) -> None:
    logits = row(kind, 50_000)
    best = float(logits.max())
    for seed, (temperature, top_p) in itertools.product(range(40), ((1e-5, 1.0), (0.7, 0.95), (1.0, 1.0))):
        assert kernel.draw(logits, best, None, temperature, top_p, 0.0, seed, 0, 0) is not None


def test_the_cpu_backend_draws_with_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "draw", lambda *_: 2)
    monkeypatch.setattr(kernel, "log_sum_exp", lambda *_: 7.0)
    drawn = get_ops("cpu").sample(
        np.zeros((1, 3), np.float32), [Draw(SamplingParams(logprobs=0), 1, 0, (), 0)]
    )
    assert drawn == [Sampled(2, -7.0)]


def test_each_kernel_is_compiled_once() -> None:
    for options, size in itertools.product(FILTERS, (100, 6000)):
        params = SamplingParams(**options, logprobs=1)
        assert_draws_alike(row("broad", size), Draw(params, 1, 0, (), 0))
    for count, bias in ((2, {}), (5, {1: 2.0})):
        sample(
            np.zeros((count, 100), np.float32),
            [Draw(SamplingParams(logit_bias=bias), 1, 0, (), 0)] * count,
            kernel,
        )
    kernels = (kernel._gumbel, kernel._weigh, kernel._sum_exp, kernel._draw_rows)
    assert [len(function.signatures) for function in kernels] == [1, 1, 1, 1]


def test_equal_scores_are_left_to_the_specification() -> None:
    logits = np.full(5000, 1e30, np.float32)
    assert kernel.draw(logits, 1e30, None, 1.0, 1.0, 0.0, 1, 0, 0) is None


@pytest.mark.parametrize("seed", range(6))
def test_scores_that_are_nearly_equal_are_left_to_the_specification(seed: int) -> None:
    noise = -np.log(-np.log(philox_uniform(seed, 0, 0, [0, 1])))
    logits = np.array([0, 1], np.float32)
    temperature = 1 / (noise[0] - noise[1])  # at which both have the same score
    if temperature < 0:
        logits, temperature = logits[::-1].copy(), -temperature
    stream = 1.0, 0.0, seed, 0, 0
    for nudge in (-1e-14, 0, 1e-14):  # the first is a little better, or the second
        assert kernel.draw(logits, 1.0, None, temperature * (1 + nudge), *stream) is None
    for nudge in (-1e-9, 1e-9):
        params = SamplingParams(temperature * (1 + nudge))
        token = spec.gumbel_argmax(logits, params.temperature, seed, 0, 0)
        assert kernel.draw(logits, 1.0, None, params.temperature, *stream) == token


def test_the_bound_on_the_noise_is_no_smaller_than_the_noise() -> None:
    """For tokens where the two are closest, and that win by the smallest bit."""
    u = philox_uniform(1, 0, 0, np.arange(V))
    noise = -np.log(-np.log(u))
    mantissa, _ = np.frexp(1 - u)
    tight = np.flatnonzero((noise > 5) & (mantissa - 0.5 < 0.002))
    assert len(tight) > 3
    for i in tight:
        logits = np.full(V, -np.inf, np.float32)
        logits[0] = 1
        logits[i] = 1 + noise[0] - noise[i]
        while logits[i] + noise[i] <= 1 + noise[0]:
            logits[i] = np.nextafter(logits[i], np.float32(np.inf))
        best = float(logits.max())
        assert kernel.draw(logits, best, None, 1.0, 1.0, 0.0, 1, 0, 0) == i
