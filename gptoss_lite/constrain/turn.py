"""A logits processor that keeps one assistant turn to its rules, message by message."""

from collections.abc import Sequence

import numpy as np

from gptoss_lite.constrain.grammar import Progress
from gptoss_lite.constrain.headers import Header, Headers, Part, TurnRules
from gptoss_lite.errors import RequestError
from gptoss_lite.sampling import Array
from gptoss_lite.tokenizer import Tokenizer

_MESSAGE = 2  # tokens of a message of reasoning besides its text: what begins it and what ends it


class TurnConstraint:
    """A logits processor for one choice of one request, whose prompt ends in ``<|start|>assistant``.

    prompt_length: tokens of that prompt. Each call must have the tokens of the call before and go on from
    them; the same tokens may come again.
    """

    def __init__(self, rules: TurnRules, tokenizer: Tokenizer, prompt_length: int) -> None:
        self._rules = rules
        self._headers = Headers(rules, tokenizer)
        self._tokenizer = tokenizer
        self._specials = np.array(sorted(tokenizer.special_ids))
        self._read = prompt_length
        self._reasoning_tokens = 0
        self._place: Header | Part | None = self._headers.first(reasoning=self._may_reason(_MESSAGE + 1))
        self._progress: Progress | None = None  # within the grammar of the part that is being written

    def __call__(self, tokens: Sequence[int], logits: Array) -> Array:
        """Set logits float32 (V,) of what may not follow to -inf, in place, and return them.

        Raises RequestError if a token was not one of those it left, or where llguidance gives up.
        """
        for token in tokens[self._read :]:
            self._accept(token)
            self._read += 1
        match self._place:
            case Header(next=following, other=other):
                self._allow(logits, list(following), others=other is not None)
            case Part(end=end, is_reasoning=is_reasoning) if self._progress is None:
                more = not is_reasoning or self._may_reason(2)  # one and the end
                self._allow(logits, [end], others=more)
            case Part(end=end):
                self._follow_grammar(logits, end)
        return logits

    def _may_reason(self, tokens: int) -> bool:
        """Whether so many more tokens of reasoning are within the budget."""
        budget = self._rules.reasoning_tokens
        return budget is None or self._reasoning_tokens + tokens <= budget

    def _accept(self, token: int) -> None:
        place = self._place
        if isinstance(place, Header):
            ordinary = place.other if token not in self._tokenizer.special_ids else None
            following = place.next.get(token, ordinary)
            if following is None:
                raise RequestError(f"{self._name(token)} cannot stand in a header of this turn")
            self._place = following
            if isinstance(following, Part):
                self._reasoning_tokens += following.is_reasoning
                self._progress = following.grammar.begin() if following.grammar else None
        elif place is not None:
            self._reasoning_tokens += place.is_reasoning
            if token == place.end:
                self._place = self._after(place)
            elif self._progress is not None:
                self._progress.accept(token)

    def _after(self, part: Part) -> Header | None:
        """Where the turn stands behind a part, None if it is over."""
        if part.end != self._tokenizer.special["<|end|>"]:
            return None
        more = not self._rules.thinks_once and self._may_reason(_MESSAGE + 1)
        return self._headers.next(reasoning=more)

    def _allow(self, logits: Array, tokens: list[int], *, others: bool) -> None:
        """Leave these tokens and, with `others`, all ordinary ones."""
        kept = logits[tokens]
        if others:
            logits[self._specials] = -np.inf
            logits[self._tokenizer.vocab_size :] = -np.inf
        else:
            logits[:] = -np.inf
        logits[tokens] = kept

    def _follow_grammar(self, logits: Array, end: int) -> None:
        assert self._progress is not None
        kept = logits[end]
        self._progress.restrict(logits)
        if self._progress.complete:
            logits[end] = kept

    def _name(self, token: int) -> str:
        return f"token {token} ({self._tokenizer.decode([token])!r})"
