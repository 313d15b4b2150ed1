"""Noticing that a model says the same over and over, as reasoning models sometimes do without end."""

import numpy as np

LONGEST_PERIOD = 256  # tokens
LEAST_TOKENS = 200  # a table or a poem repeats itself, too, though not for so long
LEAST_TIMES = 8


class RepetitionWatch:
    """Sees one answer's tokens, and tells when they have become a loop.

    A loop is a piece of at most 256 tokens that has come at least 8 times in a row, in 200 tokens or more.
    """

    def __init__(self) -> None:
        self._recent = np.full(LONGEST_PERIOD, -1, np.int64)  # newest first
        self._same = np.zeros(LONGEST_PERIOD, np.int64)  # how long tokens have equalled those a period before
        periods = np.arange(1, LONGEST_PERIOD + 1)
        self._enough = np.maximum((LEAST_TIMES - 1) * periods, LEAST_TOKENS - periods)

    def feed(self, token: int) -> bool:
        """Take the next token; whether it closes a loop."""
        self._same = np.where(self._recent == token, self._same + 1, 0)
        self._recent[1:] = self._recent[:-1]
        self._recent[0] = token
        return bool((self._same >= self._enough).any())
