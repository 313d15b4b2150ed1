"""JSON schemas to grammars that tell which tokens may come next; knows nothing of harmony."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptoss_lite.errors import GptOssError, RequestError
from gptoss_lite.sampling import Array
from gptoss_lite.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

LONGEST_SCHEMA = 1 << 16  # characters; compiling takes up to half a second, growing with their square
_TRIALS = 256  # verdicts kept
_PATIENCE = 20.0  # seconds; the trial's own limit is of CPU time
_REASON = 200  # characters of llguidance's messages, which can hold whole patterns

# Between the parts of a JSON text: a break with its indentation, or a blank or two, so that blanks end.
_WHITESPACE = r"(\n {0,40}| {1,2})"

# What to add to eight logits for a byte of a mask, whose lowest bit is the first token's.
_BIAS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), 0, -np.inf
).astype(np.float32)

# A schema with one of these beside one of those is merged, and with it all patterns within.
_COMBINING = {"$ref", "anyOf", "oneOf"}
_COMBINED = {"pattern", "format", "multipleOf", "properties", "additionalProperties", "items", "prefixItems"}


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """The form that a text must have; made by GrammarCompiler, for one request.

    What is begun from the same grammar shares what it finds out about it, and so what that may grow to.
    """

    _matcher: "LLMatcher"
    _specials: Array

    def begin(self) -> "Progress":
        """Return the grammar's state before the first token."""
        return Progress(self._matcher.deep_copy(), self._specials)


class Progress:
    """How far a text has come in its grammar."""

    def __init__(self, matcher: "LLMatcher", specials: Array) -> None:
        self._matcher = matcher
        self._specials = specials
        self._bias = np.empty((0, 8), np.float32)

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    def restrict(self, logits: Array) -> None:
        """Set logits float32 (V,) of what cannot come next to -inf, in place; all special tokens are.

        Raises RequestError after a token that could not come, and where llguidance gives up.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise RequestError(f"the grammar of the text stopped: {_reason(self._matcher.get_error())}")
        if len(self._bias) != len(bits):
            self._bias = np.empty((len(bits), 8), np.float32)
        np.take(_BIAS, bits, axis=0, out=self._bias, mode="clip")  # without a mode it would be buffered
        bias = self._bias.reshape(-1)[: len(logits)]
        logits[: len(bias)] += bias
        logits[len(bias) :] = -np.inf
        logits[self._specials] = -np.inf

    def accept(self, token: int) -> None:
        """Take the next token."""
        self._matcher.consume_token(token)


class GrammarCompiler:
    """Compiles JSON schemas for one tokenizer; making it takes about a second for 201,088 ids.

    Its methods may be called from several threads at once. Raises GptOssError without llguidance.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise GptOssError(
                "grammars take llguidance, which is missing: pip install 'gptoss-lite[serve]'"
            ) from None
        vocabulary = _Vocabulary(tokenizer)
        self._tokens = LLTokenizer(TokenizerWrapper(vocabulary))
        self._specials = np.array(vocabulary.special_token_ids)
        self._trial = lru_cache(_TRIALS)(_trial)

    def json_object(self) -> Grammar:
        """Return the grammar of any JSON object."""
        return self.compile({"type": "object"})

    def compile(self, schema: Mapping[str, Any], where: str = "the schema") -> Grammar:
        """Return the grammar of the JSON that a schema describes, properties in the schema's order.

        Takes about a millisecond; for a schema that combines others by `allOf` and the like, when it is first
        met, up to two seconds more. Raises RequestError, which begins with `where`, for a schema that is no
        sound JSON schema, has no instance, is too long or too costly, or says what llguidance cannot do.
        """
        from llguidance import LLMatcher, LLParserLimits

        text = _grammar_text(schema, where)
        problem = self._trial(text) if _combines(schema) else ""
        if not problem:
            limits = LLParserLimits(verbose_errors=False)
            matcher = LLMatcher(self._tokens, text, log_level=0, limits=limits)
            matcher.compute_bitmask()  # only this finds a schema without instances, {"$ref": "#"}
            problem = _reason(matcher.get_error())
        if problem:
            raise RequestError(f"{where} cannot be compiled: {problem}")
        return Grammar(matcher, self._specials)


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = tokenizer.special["<|return|>"]
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _grammar_text(schema: Mapping[str, Any], where: str) -> str:
    """Write a schema as llguidance's grammar."""
    from llguidance import LLMatcher

    try:
        text = json.dumps(schema, allow_nan=False)
        if len(text) <= LONGEST_SCHEMA:
            # overrides, since a schema may have options of its own
            return LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_pattern": _WHITESPACE, "lenient": False, "coerce_one_of": False}
            )
    except RecursionError:
        raise RequestError(f"{where} cannot be compiled: it is nested too deeply") from None
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where} cannot be compiled: {_reason(str(error))}") from None
    raise RequestError(f"{where} has {len(text):,} characters: at most {LONGEST_SCHEMA:,} will do")


def _combines(schema: Any) -> bool:
    """Tell whether patterns may have to be intersected, which can take llguidance any time and memory."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            if part.keys() & {"allOf", "patternProperties"}:
                return True
            if part.keys() & _COMBINING and part.keys() & _COMBINED:
                return True
            waiting += part.values()
        elif isinstance(part, list | tuple):
            waiting += part
    return False


def _trial(text: str) -> str:
    """Compile a grammar in another process and return what is wrong with it, nothing if it is sound."""
    script = Path(__file__).with_name("trial.py")
    try:
        result = subprocess.run(
            [sys.executable, "-P", str(script)],
            input=text.encode(), capture_output=True, timeout=_PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "it takes too long"
    if result.returncode:
        return "it takes too much time or memory"
    return _reason(result.stdout.decode(errors="replace"))


def _reason(message: str) -> str:
    """Make one short line of llguidance's message."""
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    message = " ".join(message.removesuffix("<non-verbose/>").split())
    message = message.partition(" Enable 'coerce_one_of'")[0]  # advice for programmers
    return message if len(message) <= _REASON else f"{message[:_REASON]}..."
