"""The sampler: Philox by known answers, adjustments by formula, draws by statistics, here and on the CPU."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gptoss_lite import sampling as spec
from gptoss_lite.errors import GptOssError, RequestError
from gptoss_lite.kernels.cpu import sampling as kernel
from gptoss_lite.sampling import (
    Draw,
    Fast,
    Sampled,
    SamplingParams,
    adjust,
    keep,
    philox_uniform,
    sample,
)

Array = npt.NDArray[Any]
V = 201_088


def draw(
    seed: int = 1, choice: int = 0, tokens: Sequence[int] = (), prompt_length: int = 0, **options: Any
) -> Draw:
    return Draw(SamplingParams(**options), seed, choice, tokens, prompt_length)


def drawn(logits: Array, draws: Sequence[Draw], fast: Fast | None = None) -> list[Sampled]:
    """Draw, and raise what a draw left in its place."""
    found = []
    for result in sample(logits, draws, fast):
        if isinstance(result, Exception):
            raise result
        found.append(result)
    return found


def one(logits: Array, **options: Any) -> Sampled:
    return drawn(logits[None], [draw(**options)])[0]


def survivors(logits: Array, **options: Any) -> list[int]:
    return np.flatnonzero(keep(logits, SamplingParams(**options)) > -np.inf).tolist()


def log(*probabilities: float) -> Array:
    return np.log(np.array(probabilities, np.float32))


@pytest.fixture(params=[None, kernel], ids=["spec", "kernel"])
def fast(request: pytest.FixtureRequest) -> Fast | None:
    found: Fast | None = request.param
    return found


# Philox


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    words = spec.philox4x32((c0, np.array([c1, c1]), c2, c3), (k0, k1))
    assert [f"{word[1]:08x}" for word in words] == expected.split()


def test_uniforms_are_the_first_word_centred_in_its_interval() -> None:
    # The all-zero known answer: 0x6627e8d5.
    assert philox_uniform(0, 0, 0, [0])[0] == (0x6627E8D5 + 0.5) / 2**32
    u = philox_uniform(7, 0, 3, np.arange(V))
    assert u.min() > 0 and u.max() < 1
    observed = np.bincount((u * 64).astype(int), minlength=64)
    assert_fits(observed, np.full(64, 1 / 64))


@pytest.mark.parametrize(
    "other",
    [(2, 0, 5), (1 + (1 << 32), 0, 5), (1, 1, 5), (1, 0, 6)],
    ids=["low", "high", "choice", "position"],
)
def test_every_part_of_the_key_changes_the_numbers(other: tuple[int, int, int]) -> None:
    ids = np.arange(64)
    assert not np.any(philox_uniform(1, 0, 5, ids) == philox_uniform(*other, ids))


# The distribution of draws


def assert_fits(observed: Array, expected: Array) -> None:
    """Pearson's chi-square; five standard deviations, and the seeds are fixed."""
    assert not observed[expected == 0].any()
    observed, expected = observed[expected > 0], expected[expected > 0] * observed.sum()
    degrees = len(expected) - 1
    assert ((observed - expected) ** 2 / expected).sum() < degrees + 5 * np.sqrt(2 * degrees)


PROBABILITIES = np.array([0.05, 0.3, 0.1, 0.25, 0.02, 0.2, 0.08])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"temperature": 2.0}, PROBABILITIES**0.5),
        ({"top_k": 3}, [0, 0.3, 0, 0.25, 0, 0.2, 0]),
        ({"top_p": 0.8}, [0, 0.3, 0.1, 0.25, 0, 0.2, 0]),
        ({"min_p": 0.3}, [0, 0.3, 0.1, 0.25, 0, 0.2, 0]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.7}, [0, 0.09, 0, 0.0625, 0, 0, 0]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(
    options: dict[str, Any], expected: Sequence[float], fast: Fast | None
) -> None:
    draws = [draw(seed=11, choice=i, **options) for i in range(3000)]
    sampled = drawn(np.tile(log(*PROBABILITIES), (len(draws), 1)), draws, fast)
    observed = np.bincount([s.token for s in sampled], minlength=len(PROBABILITIES))
    assert_fits(observed, np.array(expected) / np.sum(expected))


def test_draws_along_one_sequence_are_independent_of_each_other() -> None:
    draws = [draw(seed=5, tokens=range(n)) for n in range(3000)]
    tokens = [s.token for s in drawn(np.zeros((3000, 3), np.float32), draws)]
    pairs = Counter(itertools.pairwise(tokens))
    assert_fits(np.array([pairs[a, b] for a in range(3) for b in range(3)]), np.full(9, 1 / 9))


# Filters


def test_filters_keep_what_they_say() -> None:
    logits = log(0.1, 0.4, 0.2, 0.3)
    assert survivors(logits) == [0, 1, 2, 3]
    assert survivors(logits, top_k=2) == [1, 3]
    assert survivors(logits, top_k=9) == [0, 1, 2, 3]
    assert survivors(logits, top_p=0.65) == [1, 3]
    assert survivors(logits, top_p=0.75) == [1, 2, 3]  # the token that crosses the line is kept
    assert survivors(logits, min_p=0.45) == [1, 2, 3]
    assert survivors(logits, min_p=0.55) == [1, 3]
    assert survivors(logits, top_k=3, top_p=0.44) == [1]  # 0.4 / 0.9 of what top_k left
    assert survivors(logits, temperature=0.5, top_p=0.5) == [1]  # 0.16 / 0.3
    assert survivors(logits, temperature=2.0, min_p=0.6) == [
        1,
        2,
        3,
    ]  # sqrt(0.2 / 0.4) is 0.7, sqrt(0.1 / 0.4) 0.5


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_the_best_token_survives_the_strictest_filter(options: dict[str, float]) -> None:
    assert survivors(log(0.1, 0.5, 0.4), **options) == [1]


def test_of_equal_logits_filters_keep_the_lower_ids() -> None:
    logits = log(0.1, 0.2, 0.3, 0.2, 0.2)
    assert survivors(logits, top_k=3) == [1, 2, 3]
    assert survivors(logits, top_p=0.6) == [1, 2, 3]
    assert survivors(np.zeros(10, np.float32), top_p=0.25) == [0, 1, 2]
    assert survivors(np.zeros(10, np.float32), min_p=1.0) == list(range(10))


def test_top_k_counts_only_tokens_that_may_be_drawn() -> None:
    assert survivors(np.array([-np.inf, 1, -np.inf, 0], np.float32), top_k=3) == [1, 3]


@pytest.mark.parametrize("k", [1, 2, 20, 77, 78, 79, 2499, 2500, 2501, 4999])
@pytest.mark.parametrize("step", [0.001, 1.0])
def test_top_k_equals_a_plain_sort_of_the_whole_row(k: int, step: float) -> None:
    rng = np.random.default_rng(4)
    logits = (np.round(rng.normal(0, 3, 5000) / step) * step).astype(np.float32)
    logits[rng.random(5000) < 0.2] = -np.inf
    order = np.argsort(-logits, kind="stable")[: min(k, np.count_nonzero(logits > -np.inf))]
    assert survivors(logits, top_k=k) == sorted(order.tolist())


def test_top_k_of_few_possible_tokens_keeps_them() -> None:
    logits = np.full(5000, -np.inf, np.float32)
    logits[[7, 70, 4999]] = 1, np.finfo(np.float32).min, 2
    assert survivors(logits, top_k=5) == [7, 70, 4999]
    assert survivors(logits, top_k=2) == [7, 4999]


@pytest.mark.parametrize("spread", [0.5, 3.0, 12.0])
@pytest.mark.parametrize("p", [0.1, 0.9, 0.999])
def test_top_p_equals_a_plain_sort_of_the_whole_row(spread: float, p: float) -> None:
    logits = np.random.default_rng(3).normal(0, spread, 5000).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp(logits[order].astype(np.float64) / 0.8)
    ahead = np.cumsum(weights) - weights  # what better tokens hold: below p, this one is still needed
    expected = order[ahead < p * weights.sum()]
    assert survivors(logits, top_p=p, temperature=0.8) == sorted(expected.tolist())


# Bias, penalties, processors


def test_penalties_follow_their_formulas() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.5, 3.0], np.float32)
    tokens = [0, 1, 4, 2, 2, 4]  # the first three are the prompt
    repeated = adjust(logits, draw(tokens=tokens, prompt_length=3, repetition_penalty=2.0))
    assert repeated.tolist() == [1.0, -4.0, 0.5, 0.5, 1.5]
    present = adjust(logits, draw(tokens=tokens, prompt_length=3, presence_penalty=0.5))
    assert present.tolist() == [2.0, -2.0, 0.5, 0.5, 2.5]
    frequent = adjust(logits, draw(tokens=tokens, prompt_length=3, frequency_penalty=-0.25))
    assert frequent.tolist() == [2.0, -2.0, 1.5, 0.5, 3.25]


def test_logits_that_nothing_changes_are_not_copied() -> None:
    logits = np.zeros(3, np.float32)
    assert adjust(logits, draw(tokens=[1, 2], temperature=0.5, top_k=2, logprobs=3)) is logits


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {1: 9.0}},
        {"repetition_penalty": 2.0},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"logits_processors": [lambda _t, logits: np.negative(logits, out=logits)]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_caller_s_logits_stay_as_they_are(options: dict[str, Any], fast: Fast | None) -> None:
    logits = np.array([[3, 2, 1]], np.float32)
    for temperature in (0, 1):
        drawn(logits, [draw(tokens=[0, 0], temperature=temperature, logprobs=1, **options)], fast)
    assert logits.tolist() == [[3, 2, 1]]


def test_processors_come_before_bias_and_bias_before_penalties() -> None:
    def double(tokens: Sequence[int], logits: Array) -> Array:
        assert list(tokens) == [0, 1]
        logits *= 2
        return logits

    logits = np.array([1.0, 1.0], np.float32)
    options: dict[str, Any] = {
        "logits_processors": [double],
        "logit_bias": {0: 4},
        "repetition_penalty": 2,
        "presence_penalty": 0.5,
    }
    assert adjust(logits, draw(tokens=[0, 1], prompt_length=1, **options)).tolist() == [3.0, 0.5]
    assert logits.tolist() == [1.0, 1.0]


def test_a_processor_keeps_the_array_it_returns() -> None:
    own = np.zeros(3, np.float32)
    assert (
        one(np.ones(3, np.float32), logits_processors=(lambda _t, _l: own,), logit_bias={2: 100}).token == 2
    )
    assert not own.any()


def test_logit_bias_forces_and_forbids() -> None:
    logits = log(0.9, 0.05, 0.05)
    assert {one(logits, seed=s, logit_bias={2: 100}).token for s in range(50)} == {2}
    assert 0 not in {one(logits, seed=s, logit_bias={0: -100}).token for s in range(50)}
    assert {one(logits, seed=s, logit_bias={0: -np.inf, 2: -np.inf}).token for s in range(50)} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": {1: 0.5, 3: 1.0}}, "logit_bias names token 3: the vocabulary ends at 2"),
        ({"logit_bias": dict.fromkeys(range(3), -np.inf)}, "forbid every token"),
        ({"logits_processors": [lambda _t, _l: np.zeros(4)]}, r"shape \(4,\): must be \(3,\)"),
        ({"logits_processors": [lambda _t, _l: None]}, r"shape \(\)"),
        ({"logits_processors": [lambda _t, logits: logits * np.nan]}, "logits_processors returned nan"),
        ({"logits_processors": [lambda _t, logits: logits + np.inf]}, "logits_processors returned inf"),
    ],
)
def test_a_request_that_cannot_be_drawn_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        one(np.zeros(3, np.float32), **options)


# Sampling


def test_greedy_takes_the_lowest_of_equal_tokens_whatever_the_filters() -> None:
    logits = np.array([1, 3, 2, 3], np.float32)
    assert one(logits, temperature=0).token == 1
    assert one(logits, temperature=0, logit_bias={3: 0.5}, top_k=1).token == 3
    assert {one(logits, seed=s, temperature=9e-6).token for s in range(20)} == {1}
    assert SamplingParams(temperature=9e-6).greedy and not SamplingParams(temperature=1e-5).greedy


@pytest.mark.parametrize("temperature", [1e-5, 1.0, 100.0])
def test_a_single_possible_token_is_drawn(temperature: float, fast: Fast | None) -> None:
    logits = np.full((1, 9000), -np.inf, np.float32)
    logits[0, 8192] = -3e38
    assert drawn(logits, [draw(temperature=temperature)], fast)[0].token == 8192


def test_where_rounding_swallows_the_noise_the_lowest_token_is_drawn(fast: Fast | None) -> None:
    logits = np.full((1, 9000), 1e30, np.float32)
    logits[0, :10] = 0
    assert drawn(logits, [draw()], fast)[0].token == 10


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_not_rubbish(bad: float, temperature: float) -> None:
    logits = np.zeros(8, np.float32)
    logits[5] = bad
    with pytest.raises(GptOssError, match="position 2 are not finite"):
        one(logits, tokens=[1, 2], temperature=temperature)
    with pytest.raises(GptOssError, match="not finite"):
        one(np.full(8, -np.inf, np.float32), temperature=temperature)


def test_a_seed_repeats_and_seed_choice_and_position_each_change_the_draw() -> None:
    logits = np.zeros((40, 100), np.float32)

    def tokens(change: Callable[[int], dict[str, Any]]) -> list[int]:
        return [s.token for s in drawn(logits, [draw(**change(i)) for i in range(40)])]

    assert len(set(tokens(lambda _i: {"seed": 9}))) == 1
    for change in (lambda i: {"seed": i}, lambda i: {"seed": i << 32}, lambda i: {"choice": i}):
        assert len(set(tokens(change))) > 20
    assert len(set(tokens(lambda i: {"tokens": [0] * i}))) > 20


def test_a_row_does_not_depend_on_the_others(fast: Fast | None) -> None:
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 2, (5, 500)).astype(np.float32)
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"top_p": 0.7, "logprobs": 3},
        {"top_k": 5, "min_p": 0.1},
        {"repetition_penalty": 1.3, "logit_bias": {4: 2.0}},
    ]
    draws = [draw(seed=i, tokens=range(i + 1), **o) for i, o in enumerate(options)]
    together = drawn(logits, draws, fast)
    alone = [drawn(logits[i : i + 1], draws[i : i + 1], fast)[0] for i in range(5)]
    assert together == alone
    assert drawn(logits[::-1], draws[::-1], fast) == together[::-1]


def test_logprobs_are_the_model_s_own_whatever_the_request_changes() -> None:
    logits = np.array([1.5, 2.0, 1.0, 2.0, 0.5, -np.inf], np.float32) + 500
    expected = logits - np.log(np.exp(logits - np.float64(500)).sum()) - 500
    sampled = one(logits, temperature=0, logprobs=4, logit_bias={2: 50}, top_k=1)
    assert sampled.token == 2
    assert sampled.logprob == pytest.approx(expected[2])
    assert [token for token, _ in sampled.top_logprobs] == [1, 3, 0, 2]
    assert [value for _, value in sampled.top_logprobs] == pytest.approx(expected[[1, 3, 0, 2]])
    assert one(logits, temperature=0) == Sampled(1)
    bare = one(logits, temperature=0, logprobs=0)
    assert bare.logprob == pytest.approx(expected[1]) and bare.top_logprobs == ()
    assert [token for token, _ in one(logits, logprobs=20).top_logprobs] == [1, 3, 0, 2, 4]
    few = np.append(logits, np.full(200, -np.inf, np.float32))
    assert [token for token, _ in one(few, logprobs=20).top_logprobs] == [1, 3, 0, 2, 4]


class Recorder:
    """A device that notes what it is asked, and answers with the same token each time."""

    def __init__(self, token: int | None) -> None:
        self.token = token
        self.asked: list[tuple[Any, ...]] = []
        self.rows: list[list[int]] = []

    def draw(
        self, logits: Array, best: float, left: Array | None, temperature: float, top_p: float, min_p: float,
        seed: int, choice: int, position: int,
    ) -> int | None:  # fmt: skip
        self.asked.append((logits.tolist(), best, left, temperature, top_p, min_p, seed, choice, position))
        return self.token

    def draw_rows(self, logits: Array, draws: Mapping[int, Draw]) -> list[int]:
        self.rows.append(list(draws))
        return [-1 if self.token is None else self.token for _ in draws]

    def log_sum_exp(self, logits: Array, best: float) -> float:
        return best + 100


def test_a_device_draws_its_own_way() -> None:
    logits = np.array([[0, 1, 3, 2]], np.float32)
    options: dict[str, Any] = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.01, "logit_bias": {3: 2.0}}
    device = Recorder(2)
    request = draw(seed=3, choice=4, tokens=[0, 0], logprobs=0, **options)
    assert drawn(logits, [request], device) == [Sampled(2, -100.0)]
    assert device.asked == [([0, 1, 3, 4], 4.0, None, 0.5, 0.9, 0.01, 3, 4, 2)]
    drawn(logits, [draw(top_k=2)], device)
    assert sorted(device.asked[-1][2]) == [2, 3]


def test_rows_that_nothing_filters_are_drawn_together() -> None:
    logits = np.zeros((4, 3), np.float32)
    draws = [draw(logit_bias={1: 1.0}), draw(top_k=2), draw(temperature=0.5), draw(temperature=0)]
    device = Recorder(2)
    assert [sampled.token for sampled in drawn(logits, draws, device)] == [2, 2, 2, 0]
    assert device.rows == [[0, 2]]
    assert len(device.asked) == 1
    drawn(logits[:1], draws[:1], device)
    assert len(device.rows) == 1  # a single one is no less work there
    for option in ({"top_p": 0.9}, {"min_p": 0.1}, {"logprobs": 0}, {"presence_penalty": 1.0}):
        drawn(logits[:2], [draw(**option)] * 2, device)
    assert len(device.rows) == 1
    undecided = Recorder(None)
    assert drawn(logits, draws, undecided) == drawn(logits, draws)
    assert undecided.rows == [[0, 2]]


def test_what_a_device_leaves_undecided_is_drawn_here() -> None:
    logits = np.random.default_rng(1).normal(0, 2, (20, 50)).astype(np.float32)
    draws = [draw(seed=i, top_k=20, top_p=0.9, min_p=0.01) for i in range(20)]
    device = Recorder(None)
    assert drawn(logits, draws, device) == drawn(logits, draws)
    assert len(device.asked) == 20


def test_the_best_token_is_no_work_for_a_device() -> None:
    device = Recorder(0)
    assert drawn(np.eye(3, dtype=np.float32), [draw(temperature=0)] * 3, device) == [
        Sampled(0),
        Sampled(1),
        Sampled(2),
    ]
    assert not device.asked


# Options


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", v) for v in (-0.1, 101, NAN, np.inf, "1", None, True)),
        *(("top_p", v) for v in (-0.1, 1.01, NAN, "0.9", None, False)),
        *(("top_k", v) for v in (-1, 2**31, 2.0, None, True)),
        *(("min_p", v) for v in (-0.1, 1.01, NAN, None)),
        *(("seed", v) for v in (-1, 2**64, 1.0, "1", True)),
        *(("repetition_penalty", v) for v in (0, -1.0, 101, NAN, None)),
        *(("presence_penalty", v) for v in (-2.1, 2.1, NAN, None)),
        *(("frequency_penalty", v) for v in (-2.1, 2.1, NAN, None)),
        *(("logprobs", v) for v in (-1, 21, 1.0, True)),
        *(("logit_bias", v) for v in ([(1, 2)], None, {"1": 1}, {-1: 1}, {True: 1}, {2**31: 1}, {1.0: 1})),
        *(("logit_bias", {1: v}) for v in (100.5, -100.5, NAN, np.inf, "1", None, True)),
        *(("logits_processors", v) for v in (None, 3, [None], abs, iter([abs]))),
    ],
    ids=str,
)
def test_an_option_out_of_range_or_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"{name}.* is .*: must be ") as raised:
        SamplingParams(**{name: value})
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 150


def test_refusals_name_the_value_and_what_would_do() -> None:
    with pytest.raises(RequestError) as raised:
        SamplingParams(top_p=1.5)
    assert str(raised.value) == "top_p is 1.5: must be a number from 0 to 1"
    with pytest.raises(RequestError) as raised:
        SamplingParams(logit_bias={7: 1e9})
    assert str(raised.value) == "logit_bias of token 7 is 1000000000.0: must be a number from -100 to 100"
    with pytest.raises(RequestError) as raised:
        SamplingParams(seed=-1)
    assert str(raised.value) == "seed is -1: must be an integer from 0 to 18446744073709551615 or None"


def test_options_are_copied_and_become_plain_values() -> None:
    bias, processors = {1: 2}, [lambda _tokens, logits: logits]
    options: dict[str, Any] = {"temperature": 1, "top_k": np.int64(5), "seed": np.uint64(2**64 - 1)}
    params = SamplingParams(logit_bias=bias, logits_processors=processors, **options)
    bias[1] = 99
    processors.clear()
    assert params.logit_bias == {1: 2.0} and len(params.logits_processors) == 1
    assert [type(v) for v in (params.temperature, params.top_k, params.seed)] == [float, int, int]
    assert params.seed == 2**64 - 1
    assert dataclasses.replace(params, temperature=0).greedy and not params.greedy
