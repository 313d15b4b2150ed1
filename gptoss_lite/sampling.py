"""From logits to the next token in plain NumPy: the specification that every device follows.

One rule for ties everywhere: of equal logits the lower token id ranks first.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gptoss_lite.errors import GptOssError, RequestError

Array: TypeAlias = npt.NDArray[Any]
LogitsProcessor: TypeAlias = Callable[[Sequence[int], Array], Array]

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
_LOWEST = np.finfo(np.float32).min
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
    def penalizes(self) -> bool:
        """Whether tokens of the prompt or the output have their logits changed."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken, without chance."""
        return self.temperature < _GREEDY_BELOW

    @property
    def plain(self) -> bool:
        """Whether a token is drawn of all, with no more than biases, and nothing else is wanted."""
        filters = self.top_k or self.top_p < 1 or self.min_p
        changes = self.greedy or self.logits_processors or self.penalizes
        return not (filters or changes) and self.logprobs is None


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


class Fast(Protocol):
    """What takes long, done a device's own way: a module or an object with these functions.

    They have logits float32 (V,), finite or -inf, and the largest of them, `best`.
    """

    def draw(
        self, logits: Array, best: float, left: Array | None, temperature: float, top_p: float, min_p: float,
        seed: int, choice: int, position: int,
    ) -> int | None:  # fmt: skip
        """Draw the token that `gumbel_argmax` draws of what `keep` keeps; None if that is too close to call.

        Too close: sums in another order, or logarithms rounded otherwise, could decide for another token. The
        functions of this module do it then. left: ids of the tokens that top_k leaves, unsorted; None: all.
        """

    def draw_rows(self, logits: Array, draws: Mapping[int, Draw]) -> Sequence[int]:
        """Draw a token for some rows of logits float32 (S, V) that may hold anything; all draws are `plain`.

        -1 stands for a row that has to be looked at by itself: too close to call, or an error.
        """

    def log_sum_exp(self, logits: Array, best: float) -> float:
        """Do what `log_sum_exp` does, to 1e-6."""


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
    """Apply processors, bias and penalties, in vLLM's order -> a new float32 (V,); logits if there are none.

    Raises RequestError for a bias outside the vocabulary, and for a processor that returns another shape.
    """
    params = draw.params
    bias, processors = params.logit_bias, params.logits_processors
    if not (processors or bias or params.penalizes):
        return logits
    adjusted = logits.copy()
    for processor in processors:
        returned = processor(tuple(draw.tokens), adjusted)
        adjusted = np.array(returned, np.float32)  # copied: it may keep its own array
        if adjusted.shape != logits.shape:
            raise RequestError(f"a logits processor returned shape {adjusted.shape}: must be {logits.shape}")
    if bias:
        if (token := max(bias)) >= len(logits):
            raise RequestError(f"logit_bias names token {token}: the vocabulary ends at {len(logits) - 1}")
        adjusted[np.fromiter(bias, np.int64)] += np.fromiter(bias.values(), np.float32)
    if params.penalizes:
        _penalize(adjusted, draw)
    return adjusted


def _penalize(logits: Array, draw: Draw) -> None:
    # A token that stands in the text many times is written as often, each time the same number.
    params, tokens = draw.params, np.asarray(draw.tokens, np.int64)
    if params.repetition_penalty != 1:
        penalty, values = np.float32(params.repetition_penalty), logits[tokens]
        logits[tokens] = np.where(values < 0, values * penalty, values / penalty)
    output = tokens[draw.prompt_length :]
    counts = np.bincount(output)[output]
    logits[output] = logits[output] - (params.presence_penalty + params.frequency_penalty * counts)


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


def log_sum_exp(logits: Array, best: float) -> float:
    """Give the logarithm of the sum of exp(logits); logits float32 (V,), best the largest of them."""
    return float(best + np.log(np.exp(logits.astype(np.float64) - best).sum()))


def sample(logits: Array, draws: Sequence[Draw], fast: Fast | None = None) -> list[Sampled | Exception]:
    """Draw one token per row of logits float32 (S, V); a row's result depends on that row alone.

    fast: how the device does what takes long. A draw that fails has its exception in its place, and the
    others go on: GptOssError for a row with NaN or +inf or nothing but -inf, RequestError as `adjust` raises
    it, for a processor that leaves NaN or +inf, and when no token is left, and whatever the request's own
    logits processors raise.
    """

    def attempt(row: Array, draw: Draw) -> Sampled | Exception:
        try:
            return _sample(row, draw, fast)
        except Exception as error:  # a request's own logits processor may raise anything
            return error

    known: dict[int, int] = {}
    plain = {row: draw for row, draw in enumerate(draws) if draw.params.plain} if fast else {}
    if fast and len(plain) > 1:
        known = dict(zip(plain, fast.draw_rows(logits, plain), strict=True))
    return [
        attempt(logits[row], draw) if known.get(row, -1) < 0 else Sampled(known[row])
        for row, draw in enumerate(draws)
    ]


def not_finite(position: int) -> GptOssError:
    """Make the error of a row whose largest logit is NaN or infinite."""
    return GptOssError(
        f"the logits at position {position} are not finite: the checkpoint is damaged or a kernel is"
        " wrong; compare with device 'reference'"
    )


def _sample(logits: Array, draw: Draw, fast: Fast | None) -> Sampled:
    params = draw.params
    token = int(logits.argmax())  # NaN counts as the largest
    best = float(logits[token])
    if not math.isfinite(best):
        raise not_finite(draw.position)
    adjusted, highest = adjust(logits, draw), best
    if adjusted is not logits:
        token = int(adjusted.argmax())
        highest = float(adjusted[token])
        if highest == -math.inf:
            raise RequestError("logit_bias and logits_processors forbid every token: leave at least one")
        if not math.isfinite(highest):
            raise RequestError(f"logits_processors returned {highest}: must be finite, or -inf to forbid")
    if not params.greedy:
        token = _draw(adjusted, highest, draw, fast)
    if params.logprobs is None:
        return Sampled(token)
    total = fast.log_sum_exp(logits, best) if fast else log_sum_exp(logits, best)
    top = _best(logits, params.logprobs)
    top = top[np.argsort(-logits[top], kind="stable")]
    logprobs = (logits[top].astype(np.float64) - total).tolist()
    return Sampled(token, float(logits[token]) - total, tuple(zip(top.tolist(), logprobs, strict=True)))


def _draw(logits: Array, best: float, draw: Draw, fast: Fast | None) -> int:
    params, stream = draw.params, (draw.seed, draw.choice, draw.position)
    token = None
    if fast:
        left = _best(logits, params.top_k) if 0 < params.top_k < len(logits) else None
        token = fast.draw(logits, best, left, params.temperature, params.top_p, params.min_p, *stream)
    if token is None:
        token = gumbel_argmax(keep(logits, params), params.temperature, *stream)
    return token


def _best(logits: Array, k: int) -> Array:
    """Ids of the k best that are not -inf, unsorted; of equal logits the lower ids are taken."""
    if not k:
        return np.empty(0, np.int64)
    ids = np.flatnonzero(logits >= _at_most(logits, k))
    if k < len(ids):
        values = logits[ids]
        last = np.partition(values, -k)[-k]  # the k-th best, far cheaper than sorting the row
        ids = np.concatenate([ids[values > last], ids[values == last]])
    return ids[:k]


def _at_most(logits: Array, k: int) -> Any:
    """Find a number above -inf that the k best logits reach, near the k-th best if k is small."""
    rows = min(64, len(logits) // (2 * k))
    if rows < 2:
        return _LOWEST
    columns = len(logits) // rows
    best = logits[: rows * columns].reshape(rows, columns).max(axis=0)
    return max(np.partition(best, -k)[-k], _LOWEST)  # reached by k columns' best, so by k logits at least


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
