"""From logits to the next token in plain NumPy: the specification that every device follows.

One rule for ties everywhere: of equal logits the lower token id ranks first.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gptoss_lite.errors import GptOssError, RequestError

Array: TypeAlias = npt.NDArray[Any]
LogitsProcessor: TypeAlias = Callable[[Sequence[int], Array], Array]
GumbelArgmax: TypeAlias = Callable[[Array, float, int, int, int], int]  # see gumbel_argmax

_INTEGER_TYPES = (int, np.integer)
_NUMBER_TYPES = (int, float, np.integer, np.floating)
_GREEDY_BELOW = 1e-5  # as vLLM has it; smaller temperatures only overflow
_NUMBERS = {  # option -> smallest and largest value
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
_INTEGERS = {"top_k": (0, 2**31 - 1), "seed": (0, 2**64 - 1), "logprobs": (0, 20)}
_OPTIONAL = ("seed", "logprobs")
_TOKENS = (0, 2**31 - 1)
_BIASES = (-100, 100)

# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request wants its tokens chosen; the defaults are gpt-oss's own.

    temperature: below 1e-5 the best token is taken and no filter matters.
    top_k: keep the k best; 0 keeps all. top_p: keep the fewest best tokens that together are this probable.
    min_p: keep tokens at least this fraction as probable as the best.
    seed: 64 bits; None lets the engine draw one.
    logit_bias: token id -> -100 to 100, added to its logit; -inf forbids the token.
    repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output (CTRL).
    presence_penalty, frequency_penalty: subtracted once, and once per occurrence, for tokens of the output
    alone (OpenAI).
    logprobs: None for no log-probabilities; n for the drawn token's and those of the n best, at most 20.
    logits_processors: called first, in turn, as `processor(tokens, logits) -> logits`, with the tokens of
    prompt and output and with logits float32 (V,) that it may change in place; -inf forbids a token.

    Raises RequestError, naming the option, for a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logprobs: int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        checked: dict[str, object] = {}
        for name, (low, high) in _NUMBERS.items():
            checked[name] = _number(name, getattr(self, name), low, high)
        for name, (first, last) in _INTEGERS.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                checked[name] = _integer(name, value, first, last)
        if not isinstance(self.logit_bias, Mapping):
            raise _rejected("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        checked["logit_bias"] = {
            _integer("a token of logit_bias", token, *_TOKENS): _bias(token, bias)
            for token, bias in self.logit_bias.items()
        }
        processors = self.logits_processors
        if not isinstance(processors, (list, tuple)) or not all(map(callable, processors)):
            raise _rejected("logits_processors", processors, "a list or tuple of callables")
        checked["logits_processors"] = tuple(processors)
        for name, value in checked.items():  # plain Python values, which the caller cannot change afterwards
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, without chance."""
        return self.temperature < _GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to be drawn: what for, from which random stream, and after which tokens.

    seed: 64 bits, the request's own or drawn by the engine. choice: which of the request's n choices, from 0.
    tokens: prompt and output so far; the first prompt_length of them are the prompt. ahead: tokens drawn
    since that are not known yet.
    """

    params: SamplingParams
    seed: int
    choice: int
    tokens: Sequence[int]
    prompt_length: int
    ahead: int = 0

    @property
    def position(self) -> int:
        """Where the drawn token will stand in its sequence."""
        return len(self.tokens) + self.ahead


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token and, where the request asks, natural log-probabilities under the model's own logits.

    Processors, biases, penalties, temperature and filters do not change these. top_logprobs: (token, logprob)
    of the best tokens, best first.
    """

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """Scramble counters with Philox4x32-10; each 32-bit word may be an array -> the words in uint64."""
    c0, c1, c2, c3 = np.array(np.broadcast_arrays(*counter), np.uint64)
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _WORD, (p0 >> 32) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _PHILOX_KEY_STEPS[0]) & _WORD, (k1 + _PHILOX_KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def philox_uniform(seed: int, choice: int, position: int, token_ids: npt.ArrayLike) -> Array:
    """Give each token id a uniform number in (0, 1), float64, a pure function of the arguments.

    Key = (low word of seed, choice), counter = (position, token id, high word of seed, 0). The result's first
    word x becomes (x + 1/2) / 2^32. float64 holds that exactly, so every device computes the same bits.
    """
    word = philox4x32((position, token_ids, seed >> 32, 0), (seed & _WORD, choice))[0]
    uniform: Array = (word + 0.5) * 2.0**-32
    return uniform


def adjust(logits: Array, draw: Draw) -> Array:
    """Apply processors, bias and penalties, in vLLM's order -> a new float32 (V,).

    Raises RequestError for a bias outside the vocabulary, for a processor that returns another shape, NaN or
    +inf, and when no token is left.
    """
    params = draw.params
    adjusted = logits.copy()
    for processor in params.logits_processors:
        returned = processor(tuple(draw.tokens), adjusted)
        adjusted = np.array(returned, np.float32)  # copied: it may keep its own array
        if adjusted.shape != logits.shape:
            raise RequestError(f"a logits processor returned shape {adjusted.shape}: must be {logits.shape}")
    if params.logit_bias:
        if (token := max(params.logit_bias)) >= len(logits):
            raise RequestError(f"logit_bias names token {token}: the vocabulary ends at {len(logits) - 1}")
        adjusted[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if params.repetition_penalty != 1:
        seen = np.unique(np.asarray(draw.tokens, np.int64))
        penalty, values = np.float32(params.repetition_penalty), adjusted[seen]
        adjusted[seen] = np.where(values < 0, values * penalty, values / penalty)
    if params.presence_penalty or params.frequency_penalty:
        output = np.asarray(draw.tokens[draw.prompt_length :], np.int64)
        used, counts = np.unique(output, return_counts=True)
        adjusted[used] -= params.presence_penalty + params.frequency_penalty * counts
    best = adjusted.max()
    if best == -np.inf:
        raise RequestError("logit_bias and logits_processors forbid every token: leave at least one")
    if not np.isfinite(best):
        raise RequestError(f"logits_processors returned {best}: must be finite, or -inf to forbid")
    return adjusted


def keep_top_k(logits: Array, k: int) -> Array:
    """Set all but the k best of logits (V,) to -inf."""
    ids = _best(logits, k)
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def keep_top_p(logits: Array, p: float, temperature: float) -> Array:
    """Set to -inf all but the nucleus: the fewest best tokens that hold probability p, at least one."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    total = weights.sum()
    # Tokens less probable than this hold less than 1 - p together: the nucleus lies among the others.
    weights = weights[weights >= (1 - p) * total / len(weights)]
    mass = np.cumsum(np.sort(weights)[::-1])
    return keep_top_k(logits, int(np.searchsorted(mass, p * total)) + 1)


def keep_min_p(logits: Array, p: float, temperature: float) -> Array:
    """Set tokens less than p times as probable as the best to -inf; p above 0."""
    lowest = logits.max() + temperature * np.log(p)
    return np.where(logits < lowest, np.float32(-np.inf), logits)


def keep(logits: Array, params: SamplingParams) -> Array:
    """Set to -inf the tokens that may not be drawn; logits float32 (V,), not yet divided by the temperature.

    In Hugging Face's order: temperature, top_k, top_p of what is left, min_p. The best token always survives.
    """
    if params.top_k:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p, params.temperature)
    if params.min_p:
        logits = keep_min_p(logits, params.min_p, params.temperature)
    return logits


def gumbel_argmax(logits: Array, temperature: float, seed: int, choice: int, position: int) -> int:
    """Draw a token with probability softmax(logits / temperature); logits float32 (V,), some of them -inf.

    The token with the largest logit / temperature - log(-log(u)), u = philox_uniform(...) (Gumbel-max).
    """
    ids = np.flatnonzero(logits > -np.inf)
    noise = -np.log(-np.log(philox_uniform(seed, choice, position, ids)))
    return int(ids[np.argmax(logits[ids].astype(np.float64) / temperature + noise)])


def sample(
    logits: Array, draws: Sequence[Draw], argmax: GumbelArgmax = gumbel_argmax
) -> list[Sampled | Exception]:
    """Draw one token per row of logits float32 (S, V); a row's result depends on that row alone.

    argmax: the device's own gumbel_argmax. A draw that fails has its exception in its place, and the others
    go on: GptOssError for a row with NaN or +inf or nothing but -inf, RequestError as `adjust` raises it, and
    whatever the request's own logits processors raise.
    """

    def attempt(row: Array, draw: Draw) -> Sampled | Exception:
        try:
            return _sample(row, draw, argmax)
        except Exception as error:  # a request's own logits processor may raise anything
            return error

    return [attempt(row, draw) for row, draw in zip(logits, draws, strict=True)]


def not_finite(position: int) -> GptOssError:
    """Make the error of a row whose largest logit is NaN or infinite."""
    return GptOssError(
        f"the logits at position {position} are not finite: the checkpoint is damaged or a kernel is"
        " wrong; compare with device 'reference'"
    )


def _sample(logits: Array, draw: Draw, argmax: GumbelArgmax) -> Sampled:
    params = draw.params
    if not np.isfinite(best := logits.max()):  # NaN if any logit is
        raise not_finite(draw.position)
    adjusted = adjust(logits, draw)
    if params.greedy:
        token = int(adjusted.argmax())
    else:
        kept = keep(adjusted, params)
        token = argmax(kept, params.temperature, draw.seed, draw.choice, draw.position)
    if params.logprobs is None:
        return Sampled(token)
    total = best + np.log(np.exp(logits.astype(np.float64) - best).sum())
    top = _best(logits, params.logprobs)
    top = top[np.argsort(-logits[top], kind="stable")]
    ranked = tuple((int(i), float(logits[i] - total)) for i in top)
    return Sampled(token, float(logits[token] - total), ranked)


def _best(logits: Array, k: int) -> Array:
    """Ids of the k best that are not -inf, unsorted; of equal logits the lower ids are taken."""
    ids = np.flatnonzero(logits > -np.inf)
    if k < len(ids):
        values = logits[ids]
        last = np.partition(values, -k)[-k]  # the k-th best, far cheaper than sorting the row
        ids = np.concatenate([ids[values > last], ids[values == last]])
    return ids[:k]


def _number(name: str, value: object, low: float, high: float) -> float:
    # Written so that NaN fails too.
    if isinstance(value, bool) or not isinstance(value, _NUMBER_TYPES) or not low <= value <= high:
        raise _rejected(name, value, f"a number from {low} to {high}")
    return float(value)


def _integer(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, _INTEGER_TYPES) or not low <= value <= high:
        none = " or None" if name in _OPTIONAL else ""
        raise _rejected(name, value, f"an integer from {low} to {high}{none}")
    return int(value)


def _bias(token: int, value: object) -> float:
    return -math.inf if value == -math.inf else _number(f"logit_bias of token {token}", value, *_BIASES)


def _rejected(name: str, value: object, wanted: str) -> RequestError:
    return RequestError(f"{name} is {reprlib.repr(value)}: must be {wanted}")
