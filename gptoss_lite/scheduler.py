"""Which requests run, and how many tokens of each a step computes; knows no model."""

from collections import deque
from dataclasses import dataclass

from gptoss_lite.cache import BLOCK_TOKENS, BlockPool, Pages
from gptoss_lite.request import Request


@dataclass(slots=True)
class Statistics:
    """What an engine has done since it was made.

    prompt_tokens: of all requests begun; of them cached_tokens were known, prefilled_tokens computed so far.
    recomputed_tokens: computed again after a request had to step back, which happened `preemptions` times.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    recomputed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way: its tokens so far, and its pages while it is running."""

    id: int
    request: Request
    pages: Pages
    tokens: list[int]
    end: int  # the most tokens it may come to
    cached_tokens: int | None = None
    computed: int = 0  # the most tokens it ever had keys and values of
    scheduled: int = 0
    awaited: "tuple[Sequence, int] | None" = None  # who computes what this one begins with, up to where

    @property
    def pending(self) -> int:
        """Tokens without keys and values."""
        return len(self.tokens) - self.pages.length


class Scheduler:
    """The requests of one engine: those that run, and those that wait for a place or for room in the cache.

    Answers come first; prompts share what is left of a step, or, while answers are under way, no more than
    shared_tokens. The youngest request steps back when the cache runs out.
    """

    def __init__(
        self, full: BlockPool, sliding: BlockPool, window: int, max_sequences: int, step_tokens: int,
        shared_tokens: int,
    ) -> None:  # fmt: skip
        self.statistics = Statistics()
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._full, self._sliding, self._window = full, sliding, window
        self._max_sequences = max_sequences
        self._step_tokens = step_tokens
        self._shared_tokens = shared_tokens
        self._blocked = False  # the first that waits found no room, and none has been given back since

    @property
    def admitting(self) -> bool:
        """Whether a request that waits could start now."""
        return bool(self.waiting) and len(self.running) < self._max_sequences and not self._blocked

    def add(self, request_id: int, request: Request, end: int) -> None:
        """Let a request wait; it may come to `end` tokens, its prompt included."""
        pages = self.new_pages(request.cache_salt)
        self.waiting.append(Sequence(request_id, request, pages, list(request.tokens), end))

    def new_pages(self, salt: bytes = b"") -> Pages:
        """Make the pages of one more sequence, none yet."""
        return Pages(self._full, self._sliding, self._window, salt)

    def schedule(self) -> list[Sequence]:
        """Choose how many tokens each request computes: one of each answer first, then what prompts share."""
        for sequence in self.running:
            sequence.scheduled = 0
        answering = [sequence for sequence in self.running if sequence.pending == 1]
        for sequence in answering:
            self._grant(sequence, 1)
        self._admit_waiting()
        prompts = [sequence for sequence in self.running if not sequence.scheduled]
        budget = min(self._budget, self._shared_tokens) if answering else self._budget
        for place, sequence in enumerate(sorted(prompts, key=lambda s: s.pending)):
            share = -(-budget // (len(prompts) - place))  # what the small ones leave goes to the others
            self._grant(sequence, min(sequence.pending, share))
            budget -= sequence.scheduled
        return [sequence for sequence in self.running if sequence.scheduled]

    def reserve_ahead(self) -> bool:
        """Reserve room for one more token of all that runs, if nobody has to step back for it."""
        for sequence in self.running:
            sequence.scheduled = 1
        return all(sequence.pages.reserve(1) for sequence in self.running)

    @property
    def _budget(self) -> int:
        """Tokens that this step can still take."""
        return self._step_tokens - sum(sequence.scheduled for sequence in self.running)

    def _grant(self, sequence: Sequence, count: int) -> None:
        """Reserve room for a request's next tokens; while there is too little, the youngest steps back."""
        if not count or sequence not in self.running:  # it may have stepped back for an older one
            return
        while not sequence.pages.reserve(count):
            youngest = self.running.pop()
            youngest.pages.release()
            youngest.scheduled = 0
            self.waiting.appendleft(youngest)
            self.statistics.preemptions += 1
            self._blocked = bool(self.running)
            if youngest is sequence:
                return
        sequence.scheduled = count

    def _admit_waiting(self) -> None:
        """Start what waits, in its order, while there are places and room."""
        for sequence in list(self.waiting):
            if self._blocked or not self._budget or len(self.running) == self._max_sequences:
                return
            if not self._awaits(sequence):
                self._admit(sequence)

    def _awaits(self, sequence: Sequence) -> bool:
        """Whether a running request is about to compute the first block that this one would have to."""
        if sequence.awaited is not None:  # many may wait for long, and each is asked at every step
            other, end = sequence.awaited
            if other in self.running and other.pages.length < end:
                return True
            sequence.awaited = None
        index = sequence.pages.known_blocks(sequence.tokens)
        end = (index + 1) * BLOCK_TOKENS
        if end >= len(sequence.tokens):  # it would be no block of a known beginning
            return False
        name = sequence.pages.name(index, sequence.tokens)
        for other in self.running:
            if (
                other.pages.length < end <= len(other.tokens)
                and other.pages.name(index, other.tokens) == name
            ):
                shared = min(_common(sequence.tokens, other.tokens), len(sequence.tokens) - 1)
                sequence.awaited = other, shared // BLOCK_TOKENS * BLOCK_TOKENS
                return True
        return False

    def _admit(self, sequence: Sequence) -> None:
        """Start a request from as much of its beginning as the cache knows, if all of it has room."""
        cached = sequence.pages.adopt_prefix(sequence.tokens)
        needed = sum(other.pages.missing(other.pending) for other in [*self.running, sequence])
        if self.running and self._full.available < needed:
            sequence.pages.release()
            self._blocked = True
            return
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed = cached
            self.statistics.prompt_tokens += len(sequence.tokens)
            self.statistics.cached_tokens += cached
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def advance(self, sequence: Sequence) -> None:
        """Note that the tokens a request was granted have their keys and values stored."""
        start, end = sequence.pages.length, sequence.pages.length + sequence.scheduled
        known = max(start, sequence.computed)
        self.statistics.recomputed_tokens += min(end, known) - start
        self.statistics.prefilled_tokens += max(0, min(end, len(sequence.request.tokens)) - known)
        sequence.computed = max(end, known)
        sequence.pages.advance(sequence.tokens, sequence.scheduled)

    def remove(self, sequence: Sequence) -> None:
        """Drop a request wherever it stands and free its blocks."""
        sequence.pages.release()
        self._blocked = False
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)


def _common(tokens: list[int], others: list[int]) -> int:
    """Count the tokens with which two prompts begin alike, halving what is in doubt."""
    alike, most = 0, min(len(tokens), len(others))
    while alike < most:
        middle = (alike + most + 1) // 2
        if tokens[alike:middle] == others[alike:middle]:
            alike = middle
        else:
            most = middle - 1
    return alike
