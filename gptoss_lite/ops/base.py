"""The specification: each step of gpt-oss in plain float32 array code; backends override what is hot."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, KVCache
from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import OutOfMemoryError
from gptoss_lite.packing import PackedTensor
from gptoss_lite.quant import QTensor, concatenate
from gptoss_lite.rope import Rope, rope_tables
from gptoss_lite.sampling import Draw, Sampled, sample

if TYPE_CHECKING:
    from gptoss_lite.memory import Plan

Array = npt.NDArray[Any]
Network: TypeAlias = Callable[[Any, KVCache], Any]  # a batch in the backend's own form -> logits of its rows
Pending: TypeAlias = Callable[[], list[Sampled | Exception]]  # waits for a step's tokens


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: weight float32 (hidden,)."""

    weight: Array
    eps: float


@dataclass(frozen=True, slots=True)
class Linear:
    """A product: weight (..., N, K) in the form that `Ops.prepare` gave it, bias float32 (..., N)."""

    weight: Any
    bias: Array | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """What a weight matrix is for, which decides the form a backend gives it.

    layer: None outside the layers. reach: computes the largest magnitude of the activations that it
    multiplies, for backends that have to know.
    """

    kind: Literal["embedding", "qkv", "out", "router", "gate_up", "down", "lm_head"]
    layer: int | None = None
    reach: Callable[[], float] = field(default=lambda: math.inf, compare=False)


class Ops:
    """The reference backend: NumPy, float32, right rather than fast; subclasses override what is hot.

    T tokens, H query heads, Hk key heads, D head dim, E experts, k experts per token. The residual stream x
    is float32 (T, hidden). Weights stay as packed as the checkpoint has them and are expanded expert by
    expert.
    """

    name: str = "reference"
    cache_dtype: ClassVar[Any] = np.float32
    step_tokens: ClassVar[int] = 512  # computed at a time: bounds what a long prompt needs besides its cache
    shared_step_tokens: ClassVar[int] = 64  # of prompts, in a step that answers under way wait for

    @contextmanager
    def loading(self, checkpoint: Checkpoint, cache_tokens: int) -> "Iterator[Plan | None]":
        """Enclose the reading of one model: decide what will lie where, and afterwards let go of scratch.

        Yields None where memory is the host's, and the operating system's affair. Raises OutOfMemoryError if
        nothing fits.
        """
        yield None

    def run(self, network: Network, batch: Batch, cache: KVCache) -> Array:
        """Compute one forward pass -> logits float32 (R, vocab_size) of the batch's rows."""
        logits: Array = network(batch, cache)
        return logits

    def begin(self, network: Network, batch: Batch, cache: KVCache, draws: Sequence[Draw]) -> Pending:
        """Begin a forward pass and the drawing of a token for each of its rows.

        What is returned waits for the tokens. A draw that fails has its exception in its place: the others
        must not suffer.
        """
        drawn = self.sample(self.run(network, batch, cache), draws)
        return lambda: drawn

    def can_run_ahead(self, draw: Draw) -> bool:
        """Whether a step may begin before this draw is known, with -1 - row for the token drawn."""
        return False

    def prepare(self, tensor: Array | QTensor, use: Use) -> Any:
        """Bring a weight matrix, or a stack of them, from the checkpoint's form into this backend's."""
        return natural(tensor)

    def prepare_stacked(self, parts: Sequence[Array | QTensor], use: Use) -> Any:
        """Do the same for matrices (N, K) that become one, the rows of one after another's.

        Raises FormatError where their formats differ.
        """
        return self.prepare(concatenate([natural(part) for part in parts]), use)

    def vector(self, values: Array) -> Any:
        """Bring float32 norms, biases or sinks to the device."""
        return values

    def new_cache(self, config: ModelConfig, full_blocks: int, sliding_blocks: int) -> KVCache:
        """Set aside keys and values for so many blocks of each kind of layer, or raise OutOfMemoryError."""
        counts = {"full_attention": full_blocks, "sliding_attention": sliding_blocks}
        shapes = [
            (counts[kind], config.num_key_value_heads, BLOCK_TOKENS, config.head_dim)
            for kind in config.layer_types
        ]
        try:
            keys, values = (tuple(np.empty(shape, self.cache_dtype) for shape in shapes) for _ in range(2))
        except MemoryError as error:
            needed = 2 * sum(map(math.prod, shapes)) * np.dtype(self.cache_dtype).itemsize
            raise OutOfMemoryError(
                f"keys and values need {needed / 2**30:.1f} GiB of memory: give the engine fewer cache_tokens"
            ) from error
        return KVCache(keys, values)

    def embed(self, table: Any, rope: Rope, batch: Batch) -> tuple[Array, Any]:
        """Look up the batch's tokens -> x float32 (T, hidden), and the rotation that `qkv` wants."""
        return floats(table[batch.tokens]), rope_tables(rope, batch.positions)

    def qkv(
        self, x: Array, norm: Norm, w: Linear, rotation: Any, cache: KVCache, layer: int,
        table: Array, batch: Batch,
    ) -> Array:  # fmt: skip
        """Normalise, project, rotate; append keys and values to the cache; return queries (T, H, D).

        w.weight ((H + 2 Hk) * D, hidden); rotation: cos and sin float32 (T, D/2); table int32 (S, blocks).
        """
        keys, values = cache.keys[layer], cache.values[layer]
        Hk, _, D = keys.shape[1:]
        projected = _linear(_rms_norm(x, norm), w).reshape(len(x), -1, D)  # (T, H + 2 Hk, D)
        q, k, v = np.split(projected, [projected.shape[1] - 2 * Hk, projected.shape[1] - Hk], axis=1)
        blocks, slots = batch.slots(table)
        keys[blocks, :, slots] = _rotate(k, *rotation)
        values[blocks, :, slots] = v
        return _rotate(q, *rotation)

    def attention(
        self, q: Array, cache: KVCache, layer: int, table: Array, batch: Batch, sinks: Array,
        window: int | None,
    ) -> Array:  # fmt: skip
        """Attend causally over each query's own sequence -> (T, H, D).

        sinks float32 (H,): a logit per head that takes part in the softmax and has no value. With a window,
        key j is visible to query i when i - window < j <= i: the window includes the query itself.
        """
        out = np.empty_like(q)
        for s, (start, end) in enumerate(zip(batch.query_start, batch.query_start[1:], strict=False)):
            positions = batch.positions[start:end]
            first = 0 if window is None else max(0, int(positions[0]) - window + 1) // BLOCK_TOKENS
            blocks = table[s, first : positions[-1] // BLOCK_TOKENS + 1]
            j = np.arange(first * BLOCK_TOKENS, positions[-1] + 1)
            keys, values = (  # (Hk, len(j), D)
                stored[blocks].swapaxes(0, 1).reshape(stored.shape[1], -1, stored.shape[3])[:, : len(j)]
                for stored in (cache.keys[layer], cache.values[layer])
            )
            visible = j <= positions[:, None]
            if window is not None:
                visible &= j > positions[:, None] - window
            out[start:end] = _attend(q[start:end], keys, values, sinks, visible)
        return out

    def out_proj(self, a: Array, w: Linear, x: Array) -> Array:
        """Project attention (T, H, D) back onto the residual stream."""
        return x + _linear(a.reshape(len(a), -1), w)

    def route(self, x: Array, norm: Norm, router: Linear, k: int) -> tuple[Array, Array, Array]:
        """Normalise and choose experts -> h (T, hidden), ids int32 (T, k), weights float32 (T, k).

        The k best logits, ties to the lowest index, then softmax over just those.
        """
        h = _rms_norm(x, norm)
        logits = _linear(h, router)
        ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k].astype(np.int32)
        return h, ids, _softmax(np.take_along_axis(logits, ids, axis=-1))

    def experts(
        self, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear, limit: float, x: Array
    ) -> Array:
        """Add to x the weighted sum of each token's experts.

        gate_up.weight (E, 2 I, hidden), its rows gate and up in turn; down.weight (E, hidden, I); biases (E,
        N).
        """
        assert gate_up.bias is not None and down.bias is not None
        out = x.copy()
        for e in np.unique(ids):
            token, choice = np.nonzero(ids == e)
            inner = _swiglu(_linear(h[token], Linear(gate_up.weight[e], gate_up.bias[e])), limit)
            y = _linear(inner, Linear(down.weight[e], down.bias[e]))
            out[token] += weights[token, choice, None] * y  # an expert is chosen at most once a token
        return out

    def logits(self, x: Array, norm: Norm, lm_head: Linear, batch: Batch) -> Array:
        """Project the batch's wanted rows (R,) onto the vocabulary -> float32 (R, vocab_size)."""
        return _linear(_rms_norm(x[batch.rows], norm), lm_head)

    def sample(self, logits: Array, draws: Sequence[Draw]) -> list[Sampled | Exception]:
        """Choose one token for each row of logits (R, vocab_size)."""
        return sample(logits, draws)


def natural(tensor: Array | QTensor) -> Array | QTensor:
    """Bring a weight that a converted file has in tiles back into the natural order of its rows."""
    return tensor.unpack() if isinstance(tensor, PackedTensor) else tensor


def floats(tensor: Array | QTensor) -> Array:
    """Expand a weight, or a part of one, to float32."""
    values: Array = tensor.dequantize(np) if isinstance(tensor, QTensor) else tensor.astype(np.float32)
    return values


def _rms_norm(x: Array, norm: Norm) -> Array:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    y: Array = x / np.sqrt(mean_square + np.float32(norm.eps)) * norm.weight
    return y


def _linear(x: Array, w: Linear) -> Array:
    y: Array = x @ floats(w.weight).T
    return y if w.bias is None else y + w.bias


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the pairs (i, i + D/2) of each head; x (T, heads, D), cos and sin (T, D/2)."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    y: Array = e / e.sum(axis=-1, keepdims=True)
    return y


def _attend(q: Array, keys: Array, values: Array, sinks: Array, visible: Array) -> Array:
    """Softmax attention of one sequence's queries (q, H, D) over keys and values (Hk, k, D)."""
    T, H, D = q.shape
    q = q.reshape(T, len(keys), -1, D)  # (q, Hk, m, D): m query heads share a key head
    scores = np.einsum("qhmd,hkd->hmqk", q, keys, optimize=True) / np.float32(np.sqrt(D))
    scores = np.where(visible, scores, -np.inf)
    sink = np.broadcast_to(sinks.reshape(*q.shape[1:3], 1, 1), (*scores.shape[:3], 1))
    weights = _softmax(np.concatenate([scores, sink], axis=-1))[..., :-1]
    out: Array = np.einsum("hmqk,hkd->qhmd", weights, values, optimize=True).reshape(T, H, D)
    return out


def _swiglu(x: Array, limit: float) -> Array:
    """Clamped SwiGLU of interleaved columns gate0, up0, gate1, ...; (T, 2 I) -> (T, I)."""
    gate, up = np.minimum(x[:, ::2], limit), np.clip(x[:, 1::2], -limit, limit)
    with np.errstate(over="ignore"):  # a gate far below zero: its share is 1 / infinity
        y: Array = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return y
