"""The gpt-oss network, top to bottom: each class holds its weights and says what it computes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, KVCache
from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import RequestError
from gptoss_lite.memory import Plan
from gptoss_lite.ops.base import Array, Linear, Norm, Ops, Pending, Use, floats, natural
from gptoss_lite.rope import yarn
from gptoss_lite.sampling import Draw

Progress = Callable[[int, int], None]  # how much is done, of how much
_NORM_ROWS = 256  # expanded at a time, so that a large quantised matrix never is as a whole


@dataclass(frozen=True, slots=True)
class WeightReader:
    """Reads a checkpoint's tensors by name, checks their values, and has the backend prepare them."""

    checkpoint: Checkpoint
    ops: Ops
    note: Callable[[int], None]

    def raw(self, name: str) -> Any:
        """Read a checked tensor as it is stored."""
        tensor = self.checkpoint.tensor(name)
        self.checkpoint.verify(name)
        self.note(tensor.nbytes)
        return tensor

    def vector(self, name: str) -> Array:
        """Read what is small and wanted exactly, on the host: float32."""
        vector: Array = self.raw(name).astype(np.float32)
        return vector

    def norm(self, name: str, eps: float) -> tuple[Norm, Callable[[], float]]:
        """Read a norm, and how large what it returns can become: sqrt(hidden) times its largest weight."""
        weight = self.vector(name)

        def reach() -> float:
            return math.sqrt(len(weight)) * float(np.abs(weight).max())

        return Norm(self.ops.vector(weight), eps), reach

    def matrix(self, name: str, use: Use) -> Any:
        """Read a weight in the backend's own form."""
        return self.ops.prepare(self.raw(name), use)

    def linear(self, weight: str, bias: str, use: Use) -> Linear:
        """Read a weight with its bias."""
        return Linear(self.matrix(weight, use), self.ops.vector(self.vector(bias)))


def _row_norms(weight: Any) -> Array:
    """Compute the length of each row of a matrix (N, K), some rows at a time."""
    norms = [
        np.linalg.norm(floats(weight[first : first + _NORM_ROWS]), axis=1)
        for first in range(0, weight.shape[0], _NORM_ROWS)
    ]
    return np.concatenate(norms)


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with a learned sink per query head; sliding or full."""

    norm: Norm
    qkv: Linear
    out: Linear
    sinks: Array  # float32 (H,)
    window: int | None

    @classmethod
    def load(cls, read: WeightReader, config: ModelConfig, layer: int) -> Self:
        """Read layer N's attention; the three input projections become one."""
        prefix, ops = f"model.layers.{layer}", read.ops
        parts = [f"{prefix}.self_attn.{part}_proj" for part in "qkv"]
        out = f"{prefix}.self_attn.o_proj"
        norm, reach = read.norm(f"{prefix}.input_layernorm.weight", config.rms_norm_eps)
        weights = [read.raw(f"{part}.weight") for part in parts]
        biases = [read.vector(f"{part}.bias") for part in parts]

        def value_reach() -> float:
            # Attention averages values, so none of its results is larger than the largest of them can be.
            return float((_row_norms(natural(weights[2])) * reach() + np.abs(biases[2])).max())

        sliding = config.layer_types[layer] == "sliding_attention"
        return cls(
            norm=norm,
            qkv=Linear(
                ops.prepare_stacked(weights, Use("qkv", layer, reach)),
                ops.vector(np.concatenate(biases)),
            ),
            out=read.linear(f"{out}.weight", f"{out}.bias", Use("out", layer, value_reach)),
            sinks=ops.vector(read.vector(f"{prefix}.self_attn.sinks")),
            window=config.sliding_window if sliding else None,
        )

    def __call__(self, ops: Ops, x: Array, rotation: Any, cache: KVCache, layer: int, batch: Batch) -> Array:
        """Compute x (T, hidden) -> x with attention added."""
        table = batch.full_table if self.window is None else batch.sliding_table
        q = ops.qkv(x, self.norm, self.qkv, rotation, cache, layer, table, batch)
        a = ops.attention(q, cache, layer, table, batch, self.sinks, self.window)
        return ops.out_proj(a, self.out, x)


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of experts: a router chooses a few of many clamped-SwiGLU networks for each token."""

    norm: Norm
    router: Linear
    gate_up: Linear
    down: Linear
    num_experts_per_tok: int
    limit: float

    @classmethod
    def load(cls, read: WeightReader, config: ModelConfig, layer: int) -> Self:
        """Read layer N's router and experts, packed where the checkpoint has them packed."""
        prefix = f"model.layers.{layer}"
        router, experts = f"{prefix}.mlp.router", f"{prefix}.mlp.experts"
        gate_up, down, limit = f"{experts}.gate_up_proj", f"{experts}.down_proj", config.swiglu_limit
        norm, reach = read.norm(f"{prefix}.post_attention_layernorm.weight", config.rms_norm_eps)

        def inner_reach() -> float:
            return limit * (limit + 1)  # a gate of at most `limit` times an up of at most `limit`, plus 1

        return cls(
            norm=norm,
            router=read.linear(f"{router}.weight", f"{router}.bias", Use("router", layer, reach)),
            gate_up=read.linear(gate_up, f"{gate_up}_bias", Use("gate_up", layer, reach)),
            down=read.linear(down, f"{down}_bias", Use("down", layer, inner_reach)),
            num_experts_per_tok=config.num_experts_per_tok,
            limit=limit,
        )

    def __call__(self, ops: Ops, x: Array) -> Array:
        """Compute x (T, hidden) -> x with the experts' weighted sum added."""
        h, ids, weights = ops.route(x, self.norm, self.router, self.num_experts_per_tok)
        return ops.experts(h, ids, weights, self.gate_up, self.down, self.limit, x)


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: attention, then experts, each added to the residual stream."""

    attention: Attention
    experts: Experts

    @classmethod
    def load(cls, read: WeightReader, config: ModelConfig, layer: int) -> Self:
        """Read layer N."""
        return cls(Attention.load(read, config, layer), Experts.load(read, config, layer))


class GptOss:
    """The whole network on one device: a ragged batch of tokens in, logits of the wanted rows out."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ops: Ops,
        progress: Progress | None = None,
        *,
        cache_tokens: int | None = None,
        planned: Callable[[Plan], None] | None = None,
    ) -> None:
        """Read every weight of an opened checkpoint; progress is told the bytes done and the bytes in all.

        cache_tokens: how many tokens' keys and values an Engine shall have room for, by default those of one
        context. planned: told, before anything is read, what will lie where on a GPU. Raises CheckpointError
        where a value cannot be: NaN, infinity, a damaged byte under a checksum; OutOfMemoryError, before
        anything is read, where weights and cache do not fit the device.
        """
        config = checkpoint.config
        self.cache_tokens = config.max_position_embeddings if cache_tokens is None else cache_tokens
        self.config = config
        self.ops = ops
        self.rope = yarn(config.rope, config.head_dim)
        done = 0

        def note(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(min(done, checkpoint.nbytes), checkpoint.nbytes)  # tied weights are read twice

        with ops.loading(checkpoint, self.cache_tokens) as plan:
            if plan is not None and planned is not None:
                planned(plan)
            read = WeightReader(checkpoint, ops, note)
            self.embedding = read.matrix("model.embed_tokens.weight", Use("embedding"))
            self.layers = [Block.load(read, config, layer) for layer in range(config.num_hidden_layers)]
            self.norm, reach = read.norm("model.norm.weight", config.rms_norm_eps)
            head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
            self.lm_head = Linear(read.matrix(head, Use("lm_head", reach=reach)))

    def network(self, batch: Batch, cache: KVCache) -> Any:
        """Compute one ragged batch in the backend's own form: appends to the cache, returns logits."""
        ops = self.ops
        x, rotation = ops.embed(self.embedding, self.rope, batch)
        for layer, block in enumerate(self.layers):
            x = block.attention(ops, x, rotation, cache, layer, batch)
            x = block.experts(ops, x)
        return ops.logits(x, self.norm, self.lm_head, batch)

    def __call__(self, batch: Batch, cache: KVCache) -> Array:
        """Compute one ragged batch: appends to the cache, returns logits float32 (R, vocab_size)."""
        return self.ops.run(self.network, batch, cache)

    def begin(self, batch: Batch, cache: KVCache, draws: Sequence[Draw]) -> Pending:
        """Begin one ragged batch and the drawing of a token for each of its rows; see Ops.begin."""
        return self.ops.begin(self.network, batch, cache, draws)

    def logits(self, tokens: Sequence[int], last: int | None = None) -> Array:
        """Compute next-token logits of a prompt with a fresh cache.

        tokens: T ids; last: how many of the final positions are wanted, None for all. Returns float32
        (T or last, vocab_size). Raises RequestError for an empty or too long prompt or an id out of range.
        """
        self.check_prompt(tokens)
        if last is not None and (type(last) is not int or last < 1):
            raise RequestError(f"last is {last!r}: give an integer of at least 1, or None")
        total = len(tokens)
        first_row = 0 if last is None else max(0, total - last)
        blocks = -(-total // BLOCK_TOKENS)
        cache = self.ops.new_cache(self.config, blocks, blocks)
        table = np.arange(blocks, dtype=np.int32)[None]
        parts = []
        for start in range(0, total, self.ops.step_tokens):
            end = min(start + self.ops.step_tokens, total)
            batch = Batch(
                tokens=np.asarray(tokens[start:end], np.int32),
                positions=np.arange(start, end, dtype=np.int32),
                query_start=np.array([0, end - start], np.int32),
                full_table=table,
                sliding_table=table,
                rows=np.arange(max(first_row, start), end, dtype=np.int32) - start,
                decoding=np.zeros(1, np.bool_),
            )
            parts.append(self(batch, cache))
        return np.concatenate(parts)

    def check_prompt(self, tokens: Sequence[int]) -> None:
        """Raise RequestError unless `tokens` is a prompt this model can take."""
        context, vocab = self.config.max_position_embeddings, self.config.vocab_size
        ids = np.asarray(tokens)
        if not ids.size:
            raise RequestError("the prompt is empty: give at least one token")
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise RequestError("the prompt is neither text nor a list of token ids, which are integers")
        if ids.size > context:
            raise RequestError(f"the prompt has {ids.size} tokens: the model's context is {context}")
        wrong = ids[(ids < 0) | (ids >= vocab)]
        if wrong.size:
            raise RequestError(f"the prompt holds token id {wrong[0]}: ids run from 0 to {vocab - 1}")
