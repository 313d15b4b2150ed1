"""One ragged batch: prefill chunks and decode steps of several sequences, laid end to end."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gptoss_lite.cache import BLOCK_TOKENS

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """What one forward pass computes: T tokens of S sequences.

    tokens and positions int32 (T,); query_start int32 (S + 1,), where each sequence's tokens begin;
    full_table and sliding_table int32 (S, blocks), the cache block of each 16 positions per kind of
    attention; rows int32 (R,), the rows of the T whose logits are wanted; decoding bool (S,), which sequences
    have one token that goes on with an answer, not a part of a prompt. A token's keys and values must have a
    block in both tables.
    """

    tokens: Int32
    positions: Int32
    query_start: Int32
    full_table: Int32
    sliding_table: Int32
    rows: Int32
    decoding: npt.NDArray[np.bool_]

    @cached_property
    def sequence(self) -> Int32:
        """The sequence each token belongs to, (T,)."""
        counts = np.diff(self.query_start)
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def slots(self, table: Int32) -> tuple[Int32, Int32]:
        """Where each token's key and value go under `table`: block ids and places in the block, (T,) each.

        table: one of this batch's own, which all layers of a kind share.
        """
        if table is self.full_table:
            return self._full_slots
        assert table is self.sliding_table
        return self._sliding_slots

    @cached_property
    def _full_slots(self) -> tuple[Int32, Int32]:
        return self._slots(self.full_table)

    @cached_property
    def _sliding_slots(self) -> tuple[Int32, Int32]:
        return self._slots(self.sliding_table)

    def _slots(self, table: Int32) -> tuple[Int32, Int32]:
        return table[self.sequence, self.positions // BLOCK_TOKENS], self.positions % BLOCK_TOKENS
