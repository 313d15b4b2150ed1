"""Paged keys and values: what is counted, what is shared, what slides away."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_lite.cache import BLOCK_TOKENS, BlockPool, Pages, block_hash

WINDOW = 128


def pages(full: BlockPool, sliding: BlockPool) -> Pages:
    return Pages(full, sliding, WINDOW)


def fill(sequence: Pages, tokens: list[int], step: int) -> None:
    while sequence.length < len(tokens):
        count = min(step, len(tokens) - sequence.length)
        assert sequence.reserve(count)
        sequence.advance(tokens, count)


def test_a_sliding_layer_holds_a_window_and_a_full_layer_everything() -> None:
    full, sliding = BlockPool(200), BlockPool(200)
    sequence = pages(full, sliding)
    tokens = list(range(1000))
    sequence.adopt_prefix(tokens)
    fill(sequence, tokens, 1)
    held = 200 - sliding.available
    assert 200 - full.available == 63
    assert WINDOW // BLOCK_TOKENS <= held <= WINDOW // BLOCK_TOKENS + 1
    # The query at 1000 sees keys 873..1000, whose first block is 54.
    assert held == 63 - 54


def test_reserve_takes_from_both_pools_or_from_neither() -> None:
    full, sliding = BlockPool(10), BlockPool(3)
    sequence = pages(full, sliding)
    assert not sequence.reserve(64)
    assert (full.available, sliding.available) == (10, 3)
    assert sequence.reserve(48)
    assert (full.available, sliding.available) == (7, 0)


def test_a_known_block_is_forgotten_only_when_its_room_is_needed() -> None:
    pool = BlockPool(2)
    block = pool.take()
    name = block_hash(b"", list(range(16)))
    pool.name(block, name)
    pool.drop(block)
    other = pool.take()
    assert other != block
    assert name in pool
    assert pool.take() == block
    assert name not in pool


def test_blocks_unlikely_to_be_asked_for_go_first() -> None:
    pool = BlockPool(2)
    likely, unlikely = pool.take(), pool.take()
    pool.name(likely, b"likely")
    pool.name(unlikely, b"unlikely")
    pool.drop(likely, likely=True)
    pool.drop(unlikely, likely=False)
    assert pool.take() == unlikely


def test_a_hash_depends_on_everything_before_the_block() -> None:
    tokens = list(range(16))
    assert block_hash(b"", tokens) != block_hash(block_hash(b"", tokens), tokens)
    assert block_hash(b"", tokens) != block_hash(b"", tokens[::-1])


def test_a_hit_needs_the_sliding_blocks_of_its_last_window() -> None:
    full, sliding = BlockPool(100), BlockPool(100)
    first = pages(full, sliding)
    tokens = list(range(400))
    first.adopt_prefix(tokens)
    fill(first, tokens, 64)
    first.release()
    while sliding.available > 5:  # forget most of what waits in the sliding pool
        sliding.take()
    again = pages(full, sliding)
    assert again.adopt_prefix(tokens) == 0
    assert full.available == 100


def test_a_hit_always_leaves_a_token_to_compute() -> None:
    full, sliding = BlockPool(20), BlockPool(20)
    tokens = list(range(64))
    first, again = pages(full, sliding), pages(full, sliding)
    first.adopt_prefix(tokens)
    fill(first, tokens, 64)
    assert again.adopt_prefix(tokens) == 48


@pytest.mark.parametrize("length", [320, 327, 335])
def test_the_window_before_a_prompts_end_outlives_a_long_answer(length: int) -> None:
    full, sliding = BlockPool(100), BlockPool(24)
    prompt = list(range(length))
    first = pages(full, sliding)
    first.adopt_prefix(prompt)
    fill(first, prompt, 16)
    fill(first, prompt + list(range(1000, 1600)), 1)
    first.release()
    assert pages(full, sliding).adopt_prefix([*prompt, 7]) == 320


class TestPagesNeverLoseABlock:
    """Random requests over small pools: every block is held, free or idle, and all come back."""

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 80), st.integers(0, 2)), max_size=8))
    def test_after_release_everything_is_available(self, requests: list[tuple[int, int, int]]) -> None:
        full, sliding = BlockPool(60), BlockPool(60)
        for length, step, family in requests:
            tokens = [(family + 1) * i for i in range(length)]
            one, two = pages(full, sliding), pages(full, sliding)
            for sequence in (one, two):
                hit = sequence.adopt_prefix(tokens)
                assert hit < length and hit % BLOCK_TOKENS == 0
                fill(sequence, tokens, step)
                assert len(sequence.full) == -(-length // BLOCK_TOKENS)
            two.release()
            one.release()
            assert (full.available, sliding.available) == (60, 60)
