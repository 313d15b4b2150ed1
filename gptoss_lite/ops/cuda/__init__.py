"""The CUDA backend: the network's steps as launches of our own kernels, on a GPU or on the emulator."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, KVCache
from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.config import ModelConfig
from gptoss_lite.kernels.cuda.launch import attention, dense, gemm, routing, sampling
from gptoss_lite.kernels.cuda.layout import HEAD_DIM, padded
from gptoss_lite.kernels.cuda.runtime import Array, Runtime
from gptoss_lite.memory import MOST_SPLITS, Plan, make_plan
from gptoss_lite.ops.base import Linear, Network, Norm, Ops, Pending, Use
from gptoss_lite.ops.cuda import experts, limits
from gptoss_lite.ops.cuda.hot import Due
from gptoss_lite.ops.cuda.recording import Recordings
from gptoss_lite.ops.cuda.scratch import Scratch
from gptoss_lite.ops.cuda.step import MOST_ROWS, Shape, Step, StepBuffers, drawn_on_device, lay_out
from gptoss_lite.ops.cuda.weights import Matrix, Router, WeightStore
from gptoss_lite.rope import Rope
from gptoss_lite.sampling import Draw, Sampled, not_finite, sample

_MOST_DRAWS = 4096  # in one step


class CUDAOps(Ops):
    """Fp16 tensor-core products over packed weights, bf16 keys and values, a float32 residual stream.

    Rows that go on with an answer take the decode kernels, whatever else is in the batch; rows of a prompt
    take the prefill kernels. A step without prefill is recorded once for its shape and then replayed.
    """

    step_tokens = 2048  # so many that reading the weights takes less time than computing with them
    shared_step_tokens = 512

    def __init__(self, runtime: Runtime, name: str = "cuda", device_memory: int | None = None) -> None:
        self.name = name
        self._device_memory = device_memory
        self._runtime = runtime
        self._weights: WeightStore
        self._lock = threading.RLock()
        self._step_buffers = StepBuffers(runtime)
        self._recordings = Recordings(runtime)
        self._scratch = Scratch(runtime, self.step_tokens, moved=self._recordings.forget)
        # What the last step over a cache drew, by row: a cache belongs to one engine.
        self._drawn: WeakKeyDictionary[KVCache, Array] = WeakKeyDictionary()
        self._step: Step  # the one whose launches are being made
        self._tokens: Array  # where it finds what was drawn, and puts what it draws
        self._choices = 0  # experts per token
        self._pieces: list[Any] = []  # its logits, on the host, where they are many

    @contextmanager
    def loading(self, checkpoint: Checkpoint, cache_tokens: int) -> Iterator[Plan]:
        """See Ops.loading; raises DeviceError for a network that the kernels cannot compute."""
        limits.require(checkpoint.config)
        free, _ = self._runtime.memory()
        plan = make_plan(
            checkpoint.config, checkpoint.forms(), step_tokens=self.step_tokens,
            device_bytes=min(free, self._device_memory or free), cache_tokens=cache_tokens,
        )  # fmt: skip
        self._weights = WeightStore(self._runtime, plan)
        self._choices = checkpoint.config.num_experts_per_tok
        yield plan
        self._weights.finish()

    def prepare(self, tensor: Any, use: Use) -> Any:
        """Upload a weight and bring it into fragment order on the device."""
        return self._weights.prepare(tensor, use)

    def vector(self, values: Any) -> Array:
        """See Ops.vector."""
        return self._weights.upload(np.ascontiguousarray(values, np.float32))

    def new_cache(self, config: ModelConfig, full_blocks: int, sliding_blocks: int) -> KVCache:
        """See Ops.new_cache."""
        counts = {"full_attention": full_blocks, "sliding_attention": sliding_blocks}

        def allocate() -> tuple[Array, ...]:
            heads, dim = config.num_key_value_heads, config.head_dim
            return tuple(
                self._runtime.empty((counts[kind], heads, BLOCK_TOKENS, dim), np.uint16)
                for kind in config.layer_types
            )

        cache = KVCache(allocate(), allocate())
        self._drawn[cache] = self._runtime.empty((_MOST_DRAWS,), np.int32)
        return cache

    def run(self, network: Network, batch: Batch, cache: KVCache) -> Any:
        """See Ops.run."""
        with self._lock:
            step = self._upload(batch, None)
            due = self._launch(network, step, cache)
            if step.shape.is_prompt:
                logits = np.concatenate(self._pieces)
                self._pieces.clear()
            else:
                logits = self._runtime.download(self._logits_buffer(step.shape.rows))
            self._weights.hot.note(due)
        return logits[: len(batch.rows)]

    def can_run_ahead(self, draw: Draw) -> bool:
        """See Ops.can_run_ahead: where the device draws, it needs no word from the host."""
        return drawn_on_device(draw)

    def begin(self, network: Network, batch: Batch, cache: KVCache, draws: Sequence[Draw]) -> Pending:
        """See Ops.begin."""
        with self._lock:
            step = self._upload(batch, draws)
            results = self._scratch.array("results", (step.shape.rows, 2), np.int32)
            due = self._launch(network, step, cache)
            if not draws:  # part of a prompt: nobody waits for it
                return list
            drawn = self._runtime.fetch(results)
            logits = self._logits_buffer(step.shape.rows)
            on_host = {
                row: self._runtime.fetch(logits[row : row + 1])
                for row, draw in enumerate(draws)
                if not drawn_on_device(draw)
            }
        positions = [draw.position for draw in draws]  # their tokens grow meanwhile

        def finish() -> list[Sampled | Exception]:
            found: list[Sampled | Exception] = []
            for row, (token, failed) in enumerate(drawn().tolist()[: len(draws)]):
                if row in on_host:
                    found += sample(on_host[row](), [draws[row]])
                elif failed:
                    found.append(not_finite(positions[row]))
                else:
                    found.append(Sampled(token))
            with self._lock:
                self._weights.hot.note(due)
            return found

        return finish

    def _upload(self, batch: Batch, draws: Sequence[Draw] | None) -> Step:
        """Put a batch on the device, after the experts that it will likely want."""
        self._weights.hot.promote()
        on_host = draws is None or not all(map(drawn_on_device, draws))
        return self._step_buffers.upload(*lay_out(batch, draws, logits=on_host))

    def _launch(self, network: Network, step: Step, cache: KVCache) -> Due:
        """Queue a step's launches, or replay them; returns what its choices of experts will be noted from."""

        def work() -> None:
            self._step, self._tokens = step, self._drawn[cache]
            network(step, cache)
            if step.shape.draws:
                self._draw(step)

        try:
            self._recordings.launch(cache, step.shape, work)
        except BaseException:
            self._scratch.clear()  # half a step may have left counters and keys behind
            raise
        return self._weights.hot.fetch(self._host_ids(step.shape.tokens))

    def _host_ids(self, tokens: int) -> Array:
        """Where the choices of layers with experts on the host are kept, (layers, T, k)."""
        hot = self._weights.hot
        return self._scratch.array("host_ids", (len(hot.layers), tokens, self._choices), np.int32)

    def embed(self, table: Any, rope: Rope, batch: Any) -> tuple[Array, Array]:
        """See Ops.embed; a negative token -1 - r stands for what row r of the step before drew."""
        tokens = batch.shape.tokens
        x = self._scratch.rows("x", (tokens, table.hidden), np.float32)
        rotation = self._scratch.rows("rotation", (tokens, HEAD_DIM), np.float32)
        inv_freq = self._scratch.filled("inv_freq", rope.inv_freq)
        dense.embed(
            self._runtime, table.data, batch.tokens, self._tokens, batch.positions, inv_freq, x,
            rotation, concentration=rope.concentration, fp16=table.is_fp16, scales=table.scales,
        )  # fmt: skip
        return x, rotation

    def qkv(
        self, x: Array, norm: Norm, w: Linear, rotation: Array, cache: KVCache, layer: int,
        table: Array, batch: Any,
    ) -> Array:  # fmt: skip
        """See Ops.qkv."""
        runtime, keys, values, d = self._runtime, cache.keys[layer], cache.values[layer], batch.shape.decodes
        weight: Matrix = w.weight
        heads = weight.layout.rows // HEAD_DIM - 2 * keys.shape[1]
        q = self._scratch.rows("q", (len(x), heads, HEAD_DIM), np.float32)
        if d:
            dense.qkv_decode(
                runtime, x[:d], norm.weight, weight.data, weight.layout, w.bias, rotation[:d],
                batch.positions[:d], table[:d], keys, values, q[:d], eps=norm.eps, kv_fp16=self._kv_fp16,
            )  # fmt: skip
        if batch.shape.prefills:
            h = self._normalised(x[d:], None, norm, weight.layout.bf16)
            projected = self._scratch.rows("projected", (len(h), weight.layout.rows), np.float32)
            gemm.linear(runtime, h, weight.data, weight.layout, weight.order, w.bias, projected)
            attention.rotate_append(
                runtime, projected, rotation[d:], batch.sequence_of[d:], batch.positions[d:], table, keys,
                values, q[d:], kv_fp16=self._kv_fp16,
            )  # fmt: skip
        return q

    def attention(
        self, q: Array, cache: KVCache, layer: int, table: Array, batch: Any, sinks: Array,
        window: int | None,
    ) -> Array:  # fmt: skip
        """See Ops.attention; the result is in operand order, in the type that out_proj's products want."""
        runtime, keys, values, d = self._runtime, cache.keys[layer], cache.values[layer], batch.shape.decodes
        heads, key_heads = q.shape[1], keys.shape[1]
        out = self._scratch.rows("attended", (len(q), padded(heads * HEAD_DIM)), np.uint16)
        options: dict[str, Any] = {
            "window": window or 0, "bf16_out": self._weights.bf16["out", layer], "kv_fp16": self._kv_fp16
        }  # fmt: skip
        if d:
            # A sequence's own length decides how many splits it takes; this is the most that any could.
            splits = min(MOST_SPLITS, -(-batch.shape.width // attention.BLOCKS_PER_SPLIT))
            floats, counters = attention.decode_workspace(d, heads, key_heads, splits)
            partial = self._scratch.array("partial", (floats,), np.float32)
            attention.attention_decode(
                runtime, q[:d], keys, values, table[:d], batch.positions[:d], sinks, out[:d], partial,
                self._scratch.counters("attention_counters", counters), splits=splits, **options,
            )  # fmt: skip
        if batch.shape.prefills:
            attention.attention_prefill(
                runtime, q[d:], keys, values, table, batch.tiles, sinks, out[d:], **options
            )
        return out

    def out_proj(self, a: Array, w: Linear, x: Array) -> Array:
        """See Ops.out_proj; x is changed in place."""
        weight: Matrix = w.weight
        d = self._step.shape.decodes
        if d:
            dense.out_proj_decode(self._runtime, a[:d], weight.data, weight.layout, w.bias, x[:d])
        if self._step.shape.prefills:
            gemm.linear(
                self._runtime, a[d:], weight.data, weight.layout, weight.order, w.bias, x[d:],
                accumulate=True,
            )  # fmt: skip
        return x

    def route(self, x: Array, norm: Norm, router: Linear, k: int) -> tuple[Array, Array, Array]:
        """See Ops.route; h is in operand order, in the type that the experts' products want."""
        weight: Router = router.weight
        h = self._scratch.rows("h", (len(x), padded(x.shape[1])), np.uint16)
        ids = self._ids(weight.layer, len(x), k)
        weights = self._scratch.rows("weights", (len(x), k), np.float32)
        logits = self._scratch.rows("router_logits", (len(x), len(weight.data)), np.float32)
        routing.route(
            self._runtime, x, norm.weight, weight.data, router.bias, self._step.positions, h, ids, weights,
            logits, self._scratch.counters("router_counters", len(x)), eps=norm.eps,
            bf16=self._weights.bf16["gate_up", weight.layer],
        )  # fmt: skip
        return h, ids, weights

    def _ids(self, layer: int, tokens: int, k: int) -> Array:
        """Where a layer's choices go, (T, k); they are kept for layers whose experts lie on the host."""
        layers = self._weights.hot.layers
        if layer not in layers:
            return self._scratch.rows("ids", (tokens, k), np.int32)
        return self._host_ids(tokens)[layers.index(layer)]

    def experts(
        self, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear, limit: float, x: Array
    ) -> Array:
        """See Ops.experts; x is changed in place."""
        experts.add(
            self._runtime, self._scratch, h, ids, weights, gate_up, down, limit, x, self._step.shape.decodes
        )
        return x

    def logits(self, x: Array, norm: Norm, lm_head: Linear, batch: Any) -> Array:
        """See Ops.logits; draws at once where nothing but the temperature stands between."""
        runtime, weight, shape = self._runtime, lm_head.weight, batch.shape
        if shape.is_prompt:
            self._pieces = [
                self._many_logits(x, batch.rows[first : first + MOST_ROWS], norm, weight)
                for first in range(0, shape.rows, MOST_ROWS)
            ]
            return self._pieces
        logits = self._logits_buffer(shape.rows)
        fused = shape.draws and not shape.filtered
        kept = logits if shape.logits or shape.filtered else None
        dense.lm_head_decode(
            runtime, x, batch.rows, norm.weight, weight.data, weight.layout, kept,
            self._best(shape) if fused else None, batch.temperature, batch.seed, batch.choice,
            batch.draw_positions, eps=norm.eps,
        )  # fmt: skip
        return logits

    def _many_logits(self, x: Array, rows: Array, norm: Norm, weight: Matrix) -> Any:
        """Project rows as a prompt's, and bring them to the host, for all of them would be huge."""
        h = self._normalised(x, rows, norm, weight.layout.bf16)
        logits = self._logits_buffer(len(rows))
        gemm.linear(self._runtime, h, weight.data, weight.layout, weight.order, None, logits)
        return self._runtime.download(logits)

    def _draw(self, step: Step) -> None:
        """Draw a token for each wanted row, where `logits` has not already weighed them."""
        runtime, shape = self._runtime, step.shape
        best = self._best(shape)
        if shape.filtered:
            logits = self._logits_buffer(shape.rows)
            sampling.sample(
                runtime, logits, step.temperature, step.top_k, step.top_p, step.min_p, step.seed, step.choice,
                step.draw_positions, best,
            )  # fmt: skip
        results = self._scratch.array("results", (shape.rows, 2), np.int32)
        sampling.finish(runtime, best, self._tokens[: shape.rows], results)

    def _logits_buffer(self, rows: int) -> Array:
        most = max(rows, MOST_ROWS)
        return self._scratch.array("logits", (most, self._weights.vocab_size), np.float32)[:rows]

    def _best(self, shape: Shape) -> Array:
        return self._scratch.filled("best", np.zeros(shape.rows, np.uint64))

    def _normalised(self, x: Array, rows: Array | None, norm: Norm, bf16: bool) -> Array:
        """Normalise rows of x into operands."""
        count = len(x) if rows is None else len(rows)
        h = self._scratch.rows("normalised", (count, padded(x.shape[1])), np.uint16)
        dense.rms_norm(self._runtime, x, rows, norm.weight, h, eps=norm.eps, bf16=bf16)
        return h

    @property
    def _kv_fp16(self) -> bool:
        return self._runtime.arch == "sm_75"  # Turing multiplies fp16 alone
