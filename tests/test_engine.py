"""Continuous batching: a request's logits are its own, to the last bit, whatever happens around it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from gptoss_lite.cache import Pages
from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.engine import Engine, Request, TokenEvent
from gptoss_lite.errors import RequestError
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.sampling import SamplingParams

PROMPT = np.random.default_rng(5).integers(0, 1000, 300).tolist()
OTHERS = [np.random.default_rng(n).integers(0, 1000, n).tolist() for n in (150, 33)]


class Recorder:
    """A logits processor that keeps what it sees."""

    def __init__(self) -> None:
        self.logits: list[NDArray[np.float32]] = []

    def __call__(self, tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        self.logits.append(logits.copy())
        return logits


def request(tokens: Sequence[int], max_tokens: int = 12, recorder: Recorder | None = None) -> Request:
    sampling = SamplingParams(logits_processors=() if recorder is None else (recorder,))
    return Request(tokens, sampling, seed=11, max_tokens=max_tokens)


def run(engine: Engine, *requests: Request) -> dict[int, list[TokenEvent]]:
    """Run requests to their ends; the events of each, in the order of submission."""
    events: dict[int, list[TokenEvent]] = {engine.submit(request): [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            events[event.request_id].append(event)
    return events


def first_run(engine: Engine, *requests: Request) -> list[int]:
    events = next(iter(run(engine, *requests).values()))
    return [event.sampled.token for event in events if event.sampled]


@pytest.fixture(scope="module")
def alone(tiny: GptOss) -> tuple[NDArray[np.float32], list[int]]:
    """The logits and tokens of the prompt computed whole, with nobody else."""
    recorder = Recorder()
    tokens = first_run(Engine(tiny), request(PROMPT, recorder=recorder))
    return np.stack(recorder.logits), tokens


@pytest.mark.parametrize("step_tokens", [1, 7, 64])
def test_chunked_prefill_changes_no_bit(
    tiny: GptOss, alone: tuple[NDArray[np.float32], list[int]], step_tokens: int
) -> None:
    recorder = Recorder()
    engine = Engine(tiny, max_sequences=1, step_tokens=step_tokens)
    assert first_run(engine, request(PROMPT, recorder=recorder)) == alone[1]
    np.testing.assert_array_equal(np.stack(recorder.logits), alone[0])


@pytest.mark.parametrize("step_tokens", [7, 512])
def test_company_in_the_batch_changes_no_bit(
    tiny: GptOss, alone: tuple[NDArray[np.float32], list[int]], step_tokens: int
) -> None:
    recorder = Recorder()
    engine = Engine(tiny, max_sequences=3, step_tokens=step_tokens)
    tokens = first_run(engine, request(PROMPT, recorder=recorder), *(request(other, 20) for other in OTHERS))
    assert tokens == alone[1]
    np.testing.assert_array_equal(np.stack(recorder.logits), alone[0])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(
    tiny: GptOss, alone: tuple[NDArray[np.float32], list[int]], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "ops", get_ops("cpu", threads))
    recorder = Recorder()
    assert first_run(Engine(tiny), request(PROMPT, recorder=recorder)) == alone[1]
    np.testing.assert_array_equal(np.stack(recorder.logits), alone[0])


@pytest.mark.parametrize("shared", [PROMPT, PROMPT[:200] + [1] * 100, PROMPT[:16]])
def test_a_prefix_hit_changes_no_bit(
    tiny: GptOss, alone: tuple[NDArray[np.float32], list[int]], shared: list[int]
) -> None:
    engine = Engine(tiny)
    run(engine, request(shared, max_tokens=1))
    recorder = Recorder()
    [events] = run(engine, request(PROMPT, recorder=recorder)).values()
    common = next((i for i, (a, b) in enumerate(zip(PROMPT, shared, strict=False)) if a != b), len(shared))
    assert events[0].cached_tokens == min(common, len(PROMPT) - 1) // 16 * 16
    assert [event.sampled.token for event in events if event.sampled] == alone[1]
    np.testing.assert_array_equal(np.stack(recorder.logits), alone[0])


def test_a_next_turn_branching_off_at_the_old_prompt_hits_it_after_a_long_answer(tiny: GptOss) -> None:
    engine = Engine(tiny)
    run(engine, request(PROMPT, max_tokens=400))
    [events] = run(engine, request([*PROMPT, 3, 1, 4], max_tokens=1)).values()
    assert events[0].cached_tokens == len(PROMPT) // 16 * 16


def test_a_full_cache_makes_the_youngest_step_back_and_changes_no_bit(
    tiny: GptOss, alone: tuple[NDArray[np.float32], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted: list[Sequence[int]] = []
    adopt = Pages.adopt_prefix

    def noting(pages: Pages, tokens: Sequence[int]) -> int:
        admitted.append(tokens)
        return adopt(pages, tokens)

    monkeypatch.setattr(Pages, "adopt_prefix", noting)
    engine = Engine(tiny, cache_tokens=480)  # PROMPT and the other fit at first, their answers do not
    recorder = Recorder()
    events = run(engine, request(OTHERS[0], 160), request(PROMPT, recorder=recorder))
    assert len(admitted) > 2
    assert [e.sampled.token for e in events[1] if e.sampled] == alone[1]
    np.testing.assert_array_equal(np.stack(recorder.logits), alone[0])


@pytest.fixture(scope="module")
def windowed(tiny_path: Path) -> Callable[[int], GptOss]:
    """The tiny network with another sliding window, on one thread."""

    @cache
    def load(window: int) -> GptOss:
        checkpoint = open_checkpoint(tiny_path)
        config = replace(checkpoint.config, sliding_window=window)
        return GptOss(replace(checkpoint, config=config), get_ops("cpu", 1))

    return load


def check_random_traffic(windowed: Callable[[int], GptOss], seed: int) -> None:
    """Crowd an engine with a small cache: every row must have the bits that model.logits gives alone."""
    rng = Random(seed)
    model = windowed(rng.choice([1, 5, 16, 17, 33, 128, 1000]))
    context = rng.choice([17, 33, 48, 160, 161, 320])
    engine = Engine(
        model,
        max_sequences=rng.randint(1, 6),
        step_tokens=rng.choice([1, 3, 7, 16, 17, 64, 512]),
        cache_tokens=context,
    )
    for stored in (*engine._cache.keys, *engine._cache.values):
        stored[:] = 0x7FC0  # NaN wherever nothing was stored
    available = engine._full.available, engine._sliding.available
    family = [rng.randrange(1000) for _ in range(context)]
    live: dict[int, tuple[list[int], Recorder, list[int]]] = {}
    finished = []
    waiting = rng.randint(2, 7)
    while waiting or engine.has_work:
        while waiting and (rng.random() < 0.5 or not engine.has_work):
            length, shared = rng.randint(1, context - 1), rng.randint(0, context)
            prompt = family[: min(length, shared)] + [
                rng.randrange(1000) for _ in range(length - min(length, shared))
            ]
            recorder = Recorder()
            live[engine.submit(request(prompt, rng.choice([1, 2, 20, 40]), recorder))] = prompt, recorder, []
            waiting -= 1
        for event in engine.step():
            assert event.sampled is not None
            live[event.request_id][2].append(event.sampled.token)
            if event.finish_reason:
                finished.append(live.pop(event.request_id))
        if live and rng.random() < 0.03:
            cancelled = rng.choice(list(live))
            engine.cancel(cancelled)
            del live[cancelled]
    assert (engine._full.available, engine._sliding.available) == available
    for prompt, recorder, answer in finished:
        want = model.logits(prompt + answer[:-1], last=len(answer))
        np.testing.assert_array_equal(np.stack(recorder.logits), want)


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_changes_no_bit(windowed: Callable[[int], GptOss], seed: int) -> None:
    check_random_traffic(windowed, seed)


@pytest.mark.soak
def test_much_random_traffic_changes_no_bit(windowed: Callable[[int], GptOss]) -> None:
    for seed in range(100, 300):
        check_random_traffic(windowed, seed)


def test_a_window_beyond_the_context_takes_no_more_cache_than_a_full_layer(
    windowed: Callable[[int], GptOss],
) -> None:
    engine = Engine(windowed(2**31 - 1), cache_tokens=160)
    assert engine._sliding.available == engine._full.available == 10


def test_a_cache_may_hold_more_than_one_context(tiny: GptOss) -> None:
    engine = Engine(tiny, cache_tokens=200_000)
    assert engine._full.available == 12_500
    with pytest.raises(RequestError, match="context is 131072"):
        engine.submit(request([1] * 131_073))


@pytest.mark.parametrize("limit", ["max_sequences", "step_tokens", "cache_tokens"])
@pytest.mark.parametrize("value", [0, -5, 1.5, True, "8"])
def test_limits_must_be_positive_integers(tiny: GptOss, limit: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{limit} is"):
        Engine(tiny, **{limit: value})  # type: ignore[arg-type]


def test_what_a_processor_was_shown_stays_as_it_was(tiny: GptOss) -> None:
    shown: list[Sequence[int]] = []

    def keeping(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        shown.append(tokens)
        return logits

    kept = Request(PROMPT, SamplingParams(logits_processors=(keeping,)), seed=11, max_tokens=5)
    answer = first_run(Engine(tiny), kept)
    assert [list(tokens) for tokens in shown] == [PROMPT + answer[:n] for n in range(5)]


def test_finish_reasons(tiny: GptOss, alone: tuple[NDArray[np.float32], list[int]]) -> None:
    [events] = run(Engine(tiny), request(PROMPT)).values()
    assert [event.finish_reason for event in events] == [None] * 11 + ["length"]
    stop = alone[1][4]
    [events] = run(
        Engine(tiny), Request(PROMPT, SamplingParams(), seed=11, stop_token_ids=frozenset({stop}))
    ).values()
    assert len(events) == alone[1].index(stop) + 1
    assert events[-1].finish_reason == "stop"


def test_the_context_ends_an_answer(tiny: GptOss) -> None:
    [events] = run(Engine(tiny, cache_tokens=310), Request(PROMPT, SamplingParams(), seed=1)).values()
    assert len(events) == 10
    assert events[-1].finish_reason == "length"


def test_a_failing_processor_ends_its_own_request_only(
    tiny: GptOss, alone: tuple[NDArray[np.float32], list[int]]
) -> None:
    def broken(tokens: Sequence[int], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        raise KeyError("mine")

    bad = Request(OTHERS[0], SamplingParams(logits_processors=(broken,)), seed=1)
    good, failed = run(Engine(tiny), request(PROMPT), bad).values()
    assert [event.sampled.token for event in good if event.sampled] == alone[1]
    assert failed[-1].finish_reason == "error"
    assert isinstance(failed[-1].error, KeyError)


def test_cancelling_frees_every_block(tiny: GptOss) -> None:
    engine = Engine(tiny, max_sequences=2)
    available = engine._full.available, engine._sliding.available
    ids = [engine.submit(request(tokens, 50)) for tokens in (PROMPT, *OTHERS)]  # the third waits
    engine.step()
    engine.step()
    for request_id in ids:
        engine.cancel(request_id)
    engine.cancel(999)
    assert not engine.has_work
    assert (engine._full.available, engine._sliding.available) == available


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "empty"),
        ([1024], "token id 1024"),
        ([-1], "token id -1"),
        ([1.5], "integers"),
        (["a"], "integers"),
        ([[1]], "integers"),
        (b"It was", "neither text nor"),
        (5, "neither text nor"),
        ([1] * 131073, "131073 tokens: the model's context is 131072"),
    ],
)
def test_prompts_the_model_cannot_take(tiny: GptOss, tokens: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Engine(tiny).submit(request(tokens))


@pytest.mark.parametrize("max_tokens", [0, -1, 1.5, True])
def test_max_tokens_must_be_a_positive_integer(max_tokens: int) -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        request([1], max_tokens)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True])
def test_a_seed_has_64_bits(seed: int) -> None:
    with pytest.raises(RequestError, match="seed is"):
        Request([1], SamplingParams(), seed)
