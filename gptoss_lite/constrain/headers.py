"""What an assistant's turn may consist of, and the headers that this allows, token by token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gptoss_lite.constrain.grammar import Grammar
from gptoss_lite.errors import RequestError
from gptoss_lite.harmony.messages import CHANNELS
from gptoss_lite.harmony.render import CONSTRAIN, FUNCTIONS, opening
from gptoss_lite.tokenizer import Tokenizer

# What the model writes before JSON or code; before the arguments of a function it may be any of these.
_CONTENT_TYPES = ("", f" {CONSTRAIN}json", f"{CONSTRAIN}json", " json", " code")


@dataclass(frozen=True, slots=True)
class TurnRules:
    """What an assistant's turn may consist of; the headers of its messages are well-formed in any case.

    A turn whose end has a form thinks in one message at most: else a model that never calls would go on
    thinking instead for as long as it may.

    content: the form of the answer for the user, None for any text. With a form, no preamble goes before
    calls. calls: the functions that may be called, by name, and the form of their arguments, None for any
    text; no other recipient may be called. None: any recipient, built-in tools too.
    answer: whether the turn may end in an answer. If not, it ends in a call, without a preamble.
    reasoning_tokens: the most that Usage.reasoning_tokens may come to, which counts two tokens a message
    besides its text; below 3 there is no reasoning. None: as much as the model likes.

    Raises RequestError for a budget that is no number of tokens, and for rules that leave nothing to say.
    """

    content: Grammar | None = None
    calls: Mapping[str, Grammar | None] | None = None
    answer: bool = True
    reasoning_tokens: int | None = None

    def __post_init__(self) -> None:
        budget = self.reasoning_tokens
        if budget is not None and (type(budget) is not int or budget < 0):
            raise RequestError(f"reasoning_tokens is {budget!r}: give an integer of at least 0, or None")
        if not self.answer and not self.calls:
            raise RequestError("the turn may not end in an answer, and no function is named to be called")

    @property
    def thinks_once(self) -> bool:
        """Whether the end has a form, so that no reasoning may follow the first message of it."""
        return self.content is not None or not self.answer


@dataclass(frozen=True, slots=True)
class Part:
    """What stands behind a header: text of a grammar, None for any text, and the token that ends it."""

    end: int
    grammar: Grammar | None = None
    is_reasoning: bool = False


@dataclass(slots=True, eq=False)
class Header:
    """A place within a header.

    next: where each token leads; other: where every ordinary token leads that is not in `next`, None where
    there may be no such token.
    """

    next: dict[int, "Header | Part"] = field(default_factory=dict)
    other: "Header | None" = None


class Headers:
    """The headers that rules allow, for one tokenizer, with reasoning and without."""

    def __init__(self, rules: TurnRules, tokenizer: Tokenizer) -> None:
        self._rules = rules
        self._encode = tokenizer.encode
        self._opening = opening("assistant", tokenizer)
        special = tokenizer.special
        self._channel, self._constrain, self._message = (
            special[name] for name in ("<|channel|>", CONSTRAIN, "<|message|>")
        )
        self._end, self._call, self._return = (
            special[name] for name in ("<|end|>", "<|call|>", "<|return|>")
        )
        self._channels = {name: [self._channel, *self._encode(name)] for name in CHANNELS}
        self._content_types = [[*self._spell(name), self._message] for name in _CONTENT_TYPES]
        limited = rules.reasoning_tokens is not None or rules.thinks_once
        self._first = {reasoning: self._build(reasoning) for reasoning in {True, not limited}}

    def first(self, *, reasoning: bool) -> Header:
        """Return where a turn begins, behind ``<|start|>assistant``; without reasoning, no analysis."""
        return self._first[reasoning]

    def next(self, *, reasoning: bool) -> Header:
        """Return where a turn stands behind the end of a message, with no choice before the next header."""
        header = Header()
        _add(header, self._opening, self.first(reasoning=reasoning))
        return header

    def _spell(self, content_type: str) -> list[int]:
        blank, constrain, name = content_type.rpartition(CONSTRAIN)
        return [*self._encode(blank), *([self._constrain] if constrain else ()), *self._encode(name)]

    def _build(self, reasoning: bool) -> Header:
        rules, header, on = self._rules, Header(), self._channels
        if reasoning:
            _add(header, on["analysis"], Header({self._message: Part(self._end, is_reasoning=True)}))
        if rules.answer:
            answer = Part(self._return, rules.content)
            plain = Header({self._message: answer})
            _add(header, on["final"], self._typed(answer) if rules.content else plain)
        if rules.answer and rules.content is None and rules.calls != {}:
            _add(header, on["commentary"], Header({self._message: Part(self._end)}))
        channels = [on["commentary"], *([on["analysis"]] if reasoning else ())]
        if rules.calls is None:
            self._add_any_call(header, channels)
        for name, grammar in (rules.calls or {}).items():
            to = self._encode(f" to={FUNCTIONS}.{name}")
            self._add_call(header, channels, to, self._typed(Part(self._call, grammar)))
        return header

    def _typed(self, part: Part) -> Header:
        """Return what leads to a part by way of a content type or none."""
        header = Header()
        for content_type in self._content_types:
            _add(header, content_type, part)
        return header

    def _add_call(
        self, header: Header, channels: Sequence[list[int]], to: list[int], content: Header
    ) -> None:
        # The recipient stands behind the channel or before it; the model writes either.
        behind = Header()
        for channel in channels:
            _add(header, [*channel, *to], content)
            _add(behind, channel, content)
        _add(header, to, behind)

    def _add_any_call(self, header: Header, channels: Sequence[list[int]]) -> None:
        part, to = Part(self._call), self._encode(" to=")
        content = Header({self._message: part})
        _add(content, [self._constrain, *self._encode("json"), self._message], part)
        behind = Header()
        for channel in channels:
            _add(header, [*channel, *to], _some_text(content))
            _add(behind, channel, self._typed(part))
        _add(header, to, _some_text(behind))


def _some_text(then: Header) -> Header:
    """Return what leads by ordinary text, as much as the model likes, to where `then` leads."""
    text = Header(then.next)
    text.other = text
    return Header(other=text)


def _add(header: Header, tokens: Sequence[int], then: Header | Part) -> None:
    """Let tokens lead from a header to where `then` does, besides where they lead already.

    So names that begin with one another, and a channel with and without a recipient, share their beginning.
    """
    *path, last = tokens
    for token in path:
        step = header.next.setdefault(token, Header())
        assert isinstance(step, Header)
        header = step
    if isinstance(then, Part):
        header.next[last] = then
        return
    step = header.next.setdefault(last, Header())
    assert isinstance(step, Header)
    step.next.update(then.next)
    step.other = then.other
