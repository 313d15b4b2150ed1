"""Log-probabilities of the tokens of an answer's content, in step with the text that is shown of it."""

from collections import deque

from gptoss_lite.serve.replies import TokenLogprob, TopLogprob
from gptoss_lite.stream import GenerationEvent
from gptoss_lite.tokenizer import Tokenizer


class ContentLogprobs:
    """Keeps a token's entry back until its text is shown: a stop string's tokens are never shown."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._held: deque[tuple[int, TokenLogprob]] = deque()  # with the bytes of content up to its end
        self._written = self._shown = 0  # bytes

    def feed(self, event: GenerationEvent) -> list[TokenLogprob]:
        """Take an event of the content; return what can be shown now."""
        if event.logprob is not None and not self._tokenizer.is_special(event.token):
            entry = _entry(event, self._tokenizer)
            self._written += len(entry.bytes)
            self._held.append((self._written, entry))
        # Text may take more bytes than its tokens: U+FFFD for one cut off, or what was read from a header.
        self._shown = min(self._shown + len(event.text.encode()), self._written)
        shown = []
        while self._held and self._held[0][0] <= self._shown:
            shown.append(self._held.popleft()[1])
        return shown


def _entry(event: GenerationEvent, tokenizer: Tokenizer) -> TokenLogprob:
    assert event.logprob is not None
    best = [_top(token, logprob, tokenizer) for token, logprob in event.top_logprobs]
    own = _top(event.token, event.logprob, tokenizer)
    return TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=best)


def _top(token: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    spelled = tokenizer.token_bytes(token)
    return TopLogprob(token=spelled.decode(errors="replace"), logprob=logprob, bytes=list(spelled))
