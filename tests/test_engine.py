"""Continuous batching: a request's logits are its own, to the last bit, whatever happens around it."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from gptoss_lite.cache import Pages
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
    engine = Engine(tiny, context=480)  # PROMPT and the other fit at first, their answers do not
    recorder = Recorder()
    events = run(engine, request(OTHERS[0], 160), request(PROMPT, recorder=recorder))
    assert len(admitted) > 2
    assert [e.sampled.token for e in events[1] if e.sampled] == alone[1]
    np.testing.assert_array_equal(np.stack(recorder.logits), alone[0])


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
    [events] = run(Engine(tiny, context=310), Request(PROMPT, SamplingParams(), seed=1)).values()
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
