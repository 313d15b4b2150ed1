"""Who waits for whom in the engine: answers go on beside long prompts, and short ones do not wait."""

from collections.abc import Sequence

import pytest

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, KVCache, Pages
from gptoss_lite.engine import Engine, Request
from gptoss_lite.ops.base import Pending
from gptoss_lite.sampling import Draw, SamplingParams
from tests.scripted import ScriptedModel
from tests.talker import DEMO, demo_tokenizer

LONG = 8000  # tokens
SHARED = 64  # of prompts, in a step that answers wait for


class Witness(ScriptedModel):
    """Keeps the sizes of the batches that it is given."""

    def __init__(self) -> None:
        super().__init__(DEMO, demo_tokenizer(), lambda _prompt: [5] * LONG, context=8 * LONG)
        self.batches: list[int] = []

    def begin(self, batch: Batch, cache: KVCache, draws: Sequence[Draw]) -> Pending:
        """See GptOss."""
        self.batches.append(len(batch.tokens))
        return super().begin(batch, cache, draws)


def ask(engine: Engine, prompt: Sequence[int], max_tokens: int = 10_000) -> int:
    return engine.submit(Request(prompt, SamplingParams(temperature=0), seed=0, max_tokens=max_tokens))


def prompt(length: int, kind: int) -> list[int]:
    return [kind] * length


def steps_to_token(engine: Engine, request: int) -> int:
    """Step until a request comes to a token; return how many steps that took."""
    for steps in range(1, 1000):
        if any(event.request_id == request for event in engine.step()):
            return steps
    raise AssertionError("it came to no token")


def test_answers_go_on_at_every_step_while_a_long_prompt_is_read() -> None:
    model = Witness()
    engine = Engine(model)
    answers = [ask(engine, prompt(10, kind)) for kind in range(3)]
    steps_to_token(engine, answers[-1])
    model.batches.clear()
    long = ask(engine, prompt(LONG, 9))
    waited = 0
    while True:
        told = {event.request_id for event in engine.step()}
        waited += 1
        assert told >= set(answers)
        if long in told:
            break
    assert waited == LONG // SHARED  # it is not starved either
    assert max(model.batches) <= SHARED + len(answers)


def test_a_long_prompt_has_whole_steps_where_nobody_waits() -> None:
    engine = Engine(Witness())
    assert steps_to_token(engine, ask(engine, prompt(LONG, 9))) == -(-LONG // engine.model.ops.step_tokens)


@pytest.mark.parametrize("answering", [False, True])
def test_a_short_prompt_does_not_wait_for_long_ones(answering: bool) -> None:
    engine = Engine(Witness())
    if answering:
        steps_to_token(engine, ask(engine, prompt(10, 1)))
    for kind in range(2, 6):
        ask(engine, prompt(LONG, kind))
    engine.step()
    assert steps_to_token(engine, ask(engine, prompt(60, 7))) <= 5  # a fifth of 64 tokens a step at least


def test_long_prompts_are_read_side_by_side() -> None:
    engine = Engine(Witness())
    longs = [ask(engine, prompt(LONG, kind), max_tokens=1) for kind in range(4)]
    steps = 0
    while not engine.step():
        steps += 1
        read = [engine.computed(request) for request in longs]
        assert max(read) - min(read) <= engine.model.ops.step_tokens
    assert steps > 4 * LONG // engine.model.ops.step_tokens - 4  # they come to their ends together


def test_a_long_prompt_comes_to_its_end_though_short_ones_keep_coming() -> None:
    engine = Engine(Witness(), max_sequences=8)
    long = ask(engine, prompt(LONG, 9))
    for steps in range(3 * LONG // SHARED):
        ask(engine, prompt(10, 10 + steps), max_tokens=3)
        if any(event.request_id == long for event in engine.step()):
            return
    raise AssertionError("it is starved")


def test_requests_that_wait_start_in_their_order() -> None:
    engine = Engine(Witness(), max_sequences=1)
    requests = [ask(engine, prompt(10, kind), max_tokens=2) for kind in range(5)]
    order = []
    while engine.has_work:
        order += [event.request_id for event in engine.step()]
    assert order == [request for request in requests for _ in range(2)]


def test_equal_prompts_are_computed_once_and_hold_up_nobody() -> None:
    engine = Engine(Witness())
    length = 10 * BLOCK_TOKENS + 5
    equal = [ask(engine, prompt(length, 1), max_tokens=1) for _ in range(4)]
    other = ask(engine, prompt(length, 2), max_tokens=1)
    told = []
    while engine.has_work:
        told += [event.request_id for event in engine.step()]
    assert engine.statistics.prefilled_tokens == 2 * length + 3 * 5
    assert engine.statistics.cached_tokens == 3 * 10 * BLOCK_TOKENS
    assert set(told[:2]) == {equal[0], other}


def test_many_who_wait_for_the_same_beginning_cost_a_step_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked, known_blocks = [], Pages.known_blocks

    def count(pages: Pages, tokens: Sequence[int]) -> int:
        looked.append(len(tokens))
        return known_blocks(pages, tokens)

    monkeypatch.setattr(Pages, "known_blocks", count)
    engine = Engine(Witness())
    ask(engine, prompt(LONG, 1), max_tokens=1)
    for kind in range(50):  # each goes on in its own way, after half of it or all
        ask(engine, prompt(LONG // 2 * (1 + kind % 2), 1) + prompt(9, kind), max_tokens=1)
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    assert steps > 15
    assert len(looked) < 4 * 50
    assert engine.statistics.prefilled_tokens < 2 * LONG
