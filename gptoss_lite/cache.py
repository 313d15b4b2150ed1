"""Paged keys and values: fixed blocks of 16 tokens, shared between sequences that begin alike.

Layers with full attention keep every block of a sequence; layers with a sliding window give a block back once
the whole of it lies outside the window, so what they hold is bounded. A full block is known by the hash of
all tokens up to its end; when its last user leaves it waits, still known, until the room is needed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import RequestError

BLOCK_TOKENS = 16
FULL, SLIDING = 0, 1  # the two kinds of attention
MAX_SEQUENCES = 16  # under way at once in an Engine, unless it is told otherwise


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class KVCache:
    """Keys and values of every layer, (block, key head, 16, head_dim) each, in the backend's own dtype."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]


def pool_blocks(
    config: ModelConfig, cache_tokens: int, max_sequences: int, step_tokens: int
) -> tuple[int, int]:
    """Count the blocks of keys and values that an engine with these limits needs: full, sliding.

    Raises RequestError for a limit below 1.
    """
    limits = {"max_sequences": max_sequences, "step_tokens": step_tokens, "cache_tokens": cache_tokens}
    for name, limit in limits.items():
        if type(limit) is not int or limit < 1:
            raise RequestError(f"{name} is {limit!r}: give an integer of at least 1")
    window = min(config.sliding_window, config.max_position_embeddings)
    full_blocks = -(-cache_tokens // BLOCK_TOKENS)
    # Room for every running request, and as much again for the windows at which known prefixes end; never
    # more than the full layers have, for a sequence's sliding blocks are some of its full ones.
    step_blocks = max(step_tokens, max_sequences) // BLOCK_TOKENS + 1
    windows = max_sequences * (window // BLOCK_TOKENS + 2) + step_blocks
    return full_blocks, min(2 * windows, full_blocks)


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name a full block by its tokens and the name of the block before it (blake2b, 16 bytes)."""
    return blake2b(parent + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


class BlockPool:
    """Counts the users of each block of one attention kind; knows nothing of what the blocks hold."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._next = 0  # ids from here on were never taken
        self._free: list[int] = []
        self._users: dict[int, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        # Known blocks without users, oldest first; those unlikely to be asked for again go first.
        self._idle: tuple[OrderedDict[int, None], OrderedDict[int, None]] = (OrderedDict(), OrderedDict())

    @property
    def available(self) -> int:
        """Blocks that can be taken now."""
        return self._num_blocks - self._next + len(self._free) + sum(map(len, self._idle))

    def take(self) -> int:
        """Take a block for new tokens, forgetting the one longest idle if no other is left."""
        if self._free:
            block = self._free.pop()
        elif self._next < self._num_blocks:
            block = self._next
            self._next += 1
        else:
            block, _ = (self._idle[0] or self._idle[1]).popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._users[block] = 1
        return block

    def __contains__(self, name: bytes) -> bool:
        return name in self._block_of

    def share(self, name: bytes) -> int:
        """Add a user to a known block and return it."""
        block = self._block_of[name]
        self._users[block] += 1
        for idle in self._idle:
            idle.pop(block, None)
        return block

    def name(self, block: int, name: bytes) -> None:
        """Make a completed block known; of two with the same content the first stays the known one."""
        if name not in self._block_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    def drop(self, block: int, likely: bool = True) -> None:
        """Remove a user; a known block then waits idle, longer if it is `likely` to be asked for again."""
        self._users[block] -= 1
        if self._users[block]:
            return
        if block in self._hash_of:
            self._idle[likely][block] = None
        else:
            self._free.append(block)


class Pages:
    """One sequence's blocks in both pools: which there are, which are full, which have slid away."""

    def __init__(self, full: BlockPool, sliding: BlockPool, window: int, salt: bytes = b"") -> None:
        self._pools = (full, sliding)
        self._window = window
        self._salt = salt  # parent of the first block: only sequences with the same one share blocks
        self.full: list[int] = []
        self.sliding: list[int] = []  # entries before `_slid` were given back; their ids mean nothing
        self._slid = 0
        self._names: list[bytes] = []  # of the first blocks, as far as they were asked for
        self._complete = 0  # blocks of which all keys and values are stored
        self._branch = range(0)  # sliding blocks worth keeping for the next turn
        self._tables = [np.zeros(0, np.int32), np.zeros(0, np.int32)]  # the first _filled of both lists
        self._filled = [0, 0]
        self.length = 0  # tokens whose keys and values are stored

    def _first_visible(self, position: int) -> int:
        """The first sliding block that a query at `position` can see."""
        return max(0, position - self._window + 1) // BLOCK_TOKENS

    def _window_before(self, end: int) -> range:
        """The sliding blocks that a hit of `end` full blocks needs."""
        return range(self._first_visible(end * BLOCK_TOKENS), end)

    def name(self, index: int, tokens: Sequence[int]) -> bytes:
        """Name the full block `index` of `tokens`, all of them this sequence's."""
        while len(self._names) <= index:
            start = len(self._names) * BLOCK_TOKENS
            parent = self._names[-1] if self._names else self._salt
            self._names.append(block_hash(parent, tokens[start : start + BLOCK_TOKENS]))
        return self._names[index]

    def known_blocks(self, tokens: Sequence[int]) -> int:
        """Count the blocks at the beginning of `tokens` that are known, always leaving a token to compute.

        That takes all full-attention blocks up to there and the sliding blocks of the last window.
        """
        full, sliding = self._pools
        known, most = 0, (len(tokens) - 1) // BLOCK_TOKENS
        while known < most and self.name(known, tokens) in full:
            known += 1
        while not all(self._names[index] in sliding for index in self._window_before(known)):
            known -= 1
        return known

    def adopt_prefix(self, tokens: Sequence[int]) -> int:
        """Share the longest known beginning of `tokens`; returns its length."""
        full, sliding = self._pools
        known = self.known_blocks(tokens)
        window = self._window_before(known)
        self.full = [full.share(name) for name in self._names[:known]]
        self.sliding = [0] * window.start + [sliding.share(self._names[index]) for index in window]
        self._slid, self._complete, self.length = window.start, known, known * BLOCK_TOKENS
        # Where the prompt ends, a conversation's next turn will branch off: without this turn's reasoning.
        self._branch = self._window_before(len(tokens) // BLOCK_TOKENS)
        return self.length

    def table(self, kind: int) -> NDArray[np.int32]:
        """Give the blocks of one kind, FULL or SLIDING, as int32 (blocks,), valid until more are reserved."""
        blocks = self.full if kind == FULL else self.sliding
        table, filled, count = self._tables[kind], self._filled[kind], len(blocks)
        if count > len(table):
            table = self._tables[kind] = np.resize(table, 2 * count)
        if count > filled:
            table[filled:count] = blocks[filled:]
            self._filled[kind] = count
        return table[:count]

    def missing(self, count: int) -> int:
        """Blocks that each pool must give before `count` more tokens can be stored."""
        return -(-(self.length + count) // BLOCK_TOKENS) - len(self.full)

    def reserve(self, count: int) -> bool:
        """Take the blocks for `count` more tokens from both pools, or none if either has too few."""
        missing = self.missing(count)
        if not missing:
            return True
        if any(pool.available < missing for pool in self._pools):
            return False
        for _ in range(missing):
            self.full.append(self._pools[0].take())
            self.sliding.append(self._pools[1].take())
        return True

    def advance(self, tokens: Sequence[int], count: int) -> None:
        """Note that `count` more keys and values of `tokens` are stored, and give back what slid away."""
        full, sliding = self._pools
        self.length += count
        for index in range(self._complete, self.length // BLOCK_TOKENS):
            name = self.name(index, tokens)
            full.name(self.full[index], name)
            sliding.name(self.sliding[index], name)
        self._complete = self.length // BLOCK_TOKENS
        visible = self._first_visible(self.length)
        for index in range(self._slid, visible):
            sliding.drop(self.sliding[index], likely=index in self._branch)
        self._slid = max(self._slid, visible)

    def release(self) -> None:
        """Give every block back; the full ones stay known until their room is needed."""
        full, sliding = self._pools
        for block in reversed(self.full):
            full.drop(block)
        for block in reversed(self.sliding[self._slid :]):
            sliding.drop(block)
        self.full, self.sliding = [], []
        self.length = self._slid = self._complete = 0
        self._filled = [0, 0]
