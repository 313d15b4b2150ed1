"""The gpt-oss network, top to bottom: each class holds its weights and says what it computes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, KVCache
from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import RequestError
from gptoss_lite.ops.base import Array, Linear, Norm, Ops
from gptoss_lite.rope import rope_tables, yarn_inv_freq

Progress = Callable[[int, int], None]  # how much is done, of how much
PREFILL_TOKENS = 512  # tokens computed at a time: bounds what a long prompt needs besides its cache


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
        """Read what is small and wanted exactly: norms, biases, sinks; float32."""
        vector: Array = self.raw(name).astype(np.float32)
        return vector

    def matrix(self, name: str) -> Any:
        """Read a weight in the backend's own form."""
        return self.ops.prepare(self.raw(name))

    def linear(self, weight: str, bias: str) -> Linear:
        """Read a weight with its bias."""
        return Linear(self.matrix(weight), self.vector(bias))


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
        prefix = f"model.layers.{layer}"
        parts = [f"{prefix}.self_attn.{part}_proj" for part in "qkv"]
        out = f"{prefix}.self_attn.o_proj"
        weight = np.concatenate([read.raw(f"{part}.weight") for part in parts])
        bias = np.concatenate([read.vector(f"{part}.bias") for part in parts])
        sliding = config.layer_types[layer] == "sliding_attention"
        return cls(
            norm=Norm(read.vector(f"{prefix}.input_layernorm.weight"), config.rms_norm_eps),
            qkv=Linear(read.ops.prepare(weight), bias),
            out=read.linear(f"{out}.weight", f"{out}.bias"),
            sinks=read.vector(f"{prefix}.self_attn.sinks"),
            window=config.sliding_window if sliding else None,
        )

    def __call__(
        self, ops: Ops, x: Array, rope: tuple[Array, Array], cache: KVCache, layer: int, batch: Batch
    ) -> Array:
        """Compute x (T, hidden) -> x with attention added."""
        table = batch.full_table if self.window is None else batch.sliding_table
        q = ops.qkv(x, self.norm, self.qkv, rope, cache, layer, table, batch)
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
        experts = f"{prefix}.mlp.experts"
        return cls(
            norm=Norm(read.vector(f"{prefix}.post_attention_layernorm.weight"), config.rms_norm_eps),
            router=read.linear(f"{prefix}.mlp.router.weight", f"{prefix}.mlp.router.bias"),
            gate_up=read.linear(f"{experts}.gate_up_proj", f"{experts}.gate_up_proj_bias"),
            down=read.linear(f"{experts}.down_proj", f"{experts}.down_proj_bias"),
            num_experts_per_tok=config.num_experts_per_tok,
            limit=config.swiglu_limit,
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

    def __init__(self, checkpoint: Checkpoint, ops: Ops, progress: Progress | None = None) -> None:
        """Read every weight of an opened checkpoint; progress is told the bytes done and the bytes in all.

        Raises CheckpointError where a value cannot be: NaN, infinity, a damaged byte under a checksum.
        """
        done = 0

        def note(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, checkpoint.nbytes)

        read = WeightReader(checkpoint, ops, note)
        self.config = config = checkpoint.config
        self.ops = ops
        self.inv_freq, self.concentration = yarn_inv_freq(config.rope, config.head_dim)
        self.embedding = read.matrix("model.embed_tokens.weight")
        self.layers = [Block.load(read, config, layer) for layer in range(config.num_hidden_layers)]
        self.norm = Norm(read.vector("model.norm.weight"), config.rms_norm_eps)
        self.lm_head = Linear(self.embedding if config.tie_word_embeddings else read.matrix("lm_head.weight"))

    def __call__(self, batch: Batch, cache: KVCache) -> Array:
        """Compute one ragged batch: appends to the cache, returns logits float32 (R, vocab_size)."""
        ops = self.ops
        with ops.running():
            rope = rope_tables(self.inv_freq, self.concentration, batch.positions)
            x = ops.embed(self.embedding, batch.tokens)
            for layer, block in enumerate(self.layers):
                x = block.attention(ops, x, rope, cache, layer, batch)
                x = block.experts(ops, x)
            return ops.logits(x, self.norm, self.lm_head, batch.rows)

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
        for start in range(0, total, PREFILL_TOKENS):
            end = min(start + PREFILL_TOKENS, total)
            batch = Batch(
                tokens=np.asarray(tokens[start:end], np.int32),
                positions=np.arange(start, end, dtype=np.int32),
                query_start=np.array([0, end - start], np.int32),
                full_table=table,
                sliding_table=table,
                rows=np.arange(max(first_row, start), end, dtype=np.int32) - start,
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
