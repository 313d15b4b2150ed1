"""The CUDA backend: the network's steps as launches of our own kernels, on a GPU or on the emulator."""

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, KVCache
from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.config import ModelConfig
from gptoss_lite.kernels.cuda.launch import attention, dense, gemm, moe, routing, sampling
from gptoss_lite.kernels.cuda.layout import CHUNK
from gptoss_lite.kernels.cuda.runtime import Array, Runtime
from gptoss_lite.memory import Plan, make_plan, stored_forms
from gptoss_lite.ops.base import Linear, Network, Norm, Ops, Pending, Use
from gptoss_lite.ops.cuda.step import Shape, Step, StepBuffers, lay_out
from gptoss_lite.ops.cuda.weights import Matrix, Router, WeightStore
from gptoss_lite.rope import Rope
from gptoss_lite.sampling import Draw, Sampled, not_finite, sample_each

HEAD_DIM = 64
_DECODE_TILE, _PREFILL_TILE = 8, 64  # rows of one expert that are computed together
_MOST_SPLITS = 64
_MOST_DRAWN_ROWS = 64  # more wanted rows than this are a prompt's, and are computed as a prompt is


class Tiles(NamedTuple):
    """Runs of sorted pairs that one expert computes together: int32 (n,), and how many there are, (1,)."""

    expert: Array
    start: Array
    rows: Array
    count: Array


class CUDAOps(Ops):
    """Fp16 tensor-core products over packed weights, bf16 keys and values, a float32 residual stream.

    Rows that are the only one of their sequence take the decode kernels, whatever else is in the batch; all
    others take the prefill kernels. A step without prefill is recorded once for its shape and then replayed.
    """

    def __init__(self, runtime: Runtime, name: str = "cuda", device_memory: int | None = None) -> None:
        self.name = name
        self._device_memory = device_memory
        self._runtime = runtime
        self._weights: WeightStore
        self._lock = threading.RLock()
        self._step_buffers = StepBuffers(runtime)
        self._buffers: dict[str, Array] = {}
        # Launches of steps without prefill, None for those that ran once; they hold while the cache lives.
        self._recordings: WeakKeyDictionary[KVCache, dict[tuple[Network, Shape], Any]] = WeakKeyDictionary()
        self._step: Step  # the one whose launches are being made

    def reserve(self, checkpoint: Checkpoint, cache_tokens: int) -> Plan:
        """See Ops.reserve; what is read afterwards goes where the plan says."""
        free, _ = self._runtime.memory()
        plan = make_plan(
            checkpoint.config, stored_forms(checkpoint), step_tokens=self.step_tokens,
            device_bytes=min(free, self._device_memory or free), cache_tokens=cache_tokens,
        )  # fmt: skip
        self._weights = WeightStore(self._runtime, plan)
        return plan

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

        return KVCache(allocate(), allocate())

    def run(self, network: Network, batch: Batch, cache: KVCache) -> Any:
        """See Ops.run."""
        with self._lock:
            step = self._upload(batch, None)
            logits = self._runtime.fetch(self._launch(network, step, cache))
        return logits()[: len(batch.rows)]

    def can_run_ahead(self, draw: Draw) -> bool:
        """See Ops.can_run_ahead: where the device draws, it needs no word from the host."""
        return _drawn_on_device(draw)

    def begin(self, network: Network, batch: Batch, cache: KVCache, draws: Sequence[Draw]) -> Pending:
        """See Ops.begin."""
        with self._lock:
            step = self._upload(batch, draws)
            if not draws:  # part of a prompt: nobody waits for it
                self._launch(network, step, cache)
                return list
            logits = self._launch(network, step, cache)
            results = self._runtime.fetch(self._buffer("results", (step.shape.rows, 2), np.int32))
            on_host = {
                row: self._runtime.fetch(logits[row : row + 1])
                for row, draw in enumerate(draws)
                if not _drawn_on_device(draw)
            }

        def finish() -> list[Sampled | Exception]:
            drawn: list[Sampled | Exception] = []
            for row, (draw, (token, failed)) in enumerate(zip(draws, results().tolist(), strict=False)):
                if row in on_host:
                    drawn += sample_each(on_host[row](), [draw])
                elif failed:
                    drawn.append(not_finite(draw))
                else:
                    drawn.append(Sampled(token))
            return drawn

        return finish

    def _upload(self, batch: Batch, draws: Sequence[Draw] | None) -> Step:
        on_host = draws is None or not all(map(_drawn_on_device, draws))
        return self._step_buffers.upload(*lay_out(batch, draws, logits=on_host))

    def _launch(self, network: Network, step: Step, cache: KVCache) -> Array:
        """Queue a step's launches, or replay them; returns where the logits will be."""
        shape = step.shape
        logits = self._logits_buffer(shape)

        def work() -> None:
            self._step = step
            network(step, cache)
            if shape.draws:
                self._draw(step, logits)

        if shape.prefills:
            work()
            return logits
        recordings, key = self._recordings.setdefault(cache, {}), (network, shape)
        if key not in recordings:  # once as it is: recording wants every kernel loaded and every buffer there
            work()
            self._recordings.setdefault(cache, {})[key] = None
            return logits
        if recordings[key] is None:
            recordings[key] = self._runtime.capture(work)
        self._runtime.replay(recordings[key])
        return logits

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Give scratch memory that keeps its place from step to step, until a larger one is asked for."""
        count = int(np.prod(shape))
        if name not in self._buffers or len(self._buffers[name]) < count:
            self._buffers[name] = self._runtime.empty(max(count, 1), dtype)
            self._recordings.clear()  # they may have the buffer's old place
        return self._buffers[name][:count].reshape(shape)

    def embed(self, table: Any, rope: Rope, batch: Any) -> tuple[Array, Array]:
        """See Ops.embed; a negative token -1 - r stands for what row r of the step before drew."""
        tokens = batch.shape.tokens
        x = self._buffer("x", (tokens, table.hidden), np.float32)
        rotation = self._buffer("rotation", (tokens, HEAD_DIM), np.float32)
        dense.embed(
            self._runtime, table.data, batch.tokens, self._drawn, batch.positions, self._inv_freq(rope), x,
            rotation, concentration=rope.concentration, fp16=table.is_fp16,
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
        q = self._buffer("q", (len(x), heads, HEAD_DIM), np.float32)
        if d:
            dense.qkv_decode(
                runtime, x[:d], norm.weight, weight.data, weight.layout, w.bias, rotation[:d],
                batch.positions[:d], table[:d], keys, values, q[:d], eps=norm.eps, kv_fp16=self._kv_fp16,
            )  # fmt: skip
        if batch.shape.prefills:
            h = self._normalised(x[d:], None, norm, weight.layout.bf16)
            projected = self._buffer("projected", (len(h), weight.layout.rows), np.float32)
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
        out = self._buffer("attended", (len(q), padded(heads * HEAD_DIM)), np.uint16)
        options: dict[str, Any] = {
            "window": window or 0, "bf16_out": self._weights.bf16["out", layer], "kv_fp16": self._kv_fp16
        }  # fmt: skip
        if d:
            # A sequence's own length decides how many splits it takes; this is the most that any could.
            splits = min(_MOST_SPLITS, -(-batch.shape.width // attention.BLOCKS_PER_SPLIT))
            floats, counters = attention.decode_workspace(d, heads, key_heads, splits)
            partial = self._buffer("partial", (floats,), np.float32)
            attention.attention_decode(
                runtime, q[:d], keys, values, table[:d], batch.positions[:d], sinks, out[:d], partial,
                self._counters("attention", counters), splits=splits, **options,
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
        h = self._buffer("h", (len(x), padded(x.shape[1])), np.uint16)
        ids = self._buffer("ids", (len(x), k), np.int32)
        weights = self._buffer("weights", (len(x), k), np.float32)
        logits = self._buffer("router_logits", (len(x), len(weight.data)), np.float32)
        routing.route(
            self._runtime, x, norm.weight, weight.data, router.bias, self._step.positions, h, ids, weights,
            logits, self._counters("router", len(x)), eps=norm.eps,
            bf16=self._weights.bf16["gate_up", weight.layer],
        )  # fmt: skip
        return h, ids, weights

    def experts(
        self, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear, limit: float, x: Array
    ) -> Array:
        """See Ops.experts; x is changed in place."""
        d, total = self._step.shape.decodes, len(x)
        for rows, tile in ((slice(0, d), _DECODE_TILE), (slice(d, total), _PREFILL_TILE)):
            if rows.start < rows.stop:
                self._experts(h[rows], ids[rows], weights[rows], gate_up, down, limit, x[rows], tile)
        return x

    def _experts(
        self, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear, limit: float, x: Array,
        tile: int,
    ) -> None:  # fmt: skip
        """Run the experts of rows that all are decode rows (tiles of 8) or all prefill rows (of 64)."""
        runtime, up, out = self._runtime, gate_up.weight, down.weight
        pairs, bf16 = ids.size, out.layout.bf16
        order, place, tiles = self._group(ids, len(up.table), tile)
        inner = self._buffer("inner", (pairs, out.layout.chunks * CHUNK), np.uint16)
        if tile == _DECODE_TILE:
            moe.gate_up_decode(
                runtime, h, up.table, up.layout, gate_up.bias, order, *tiles, inner, limit=limit,
                bf16_out=bf16,
            )  # fmt: skip
            moe.down_decode(
                runtime, inner, out.table, out.layout, down.bias, order, *tiles, place, weights, x
            )
            return
        gemm.moe_gate_up_prefill(
            runtime, h, up.table, up.layout, gate_up.bias, order, *tiles, inner, limit=limit, bf16_out=bf16
        )
        y = self._buffer("y", (pairs, x.shape[1]), np.float32)
        gemm.moe_down_prefill(runtime, inner, out.table, out.layout, down.bias, *tiles, y)
        gemm.combine(runtime, y, place, weights, x)

    def _group(self, ids: Array, experts: int, tile: int) -> tuple[Array, Array, Tiles]:
        """Sort pairs (token, choice) by expert: each one's token, where each went (T, k), and the tiles."""
        pairs = ids.size
        if len(ids) == 1:  # nothing to sort: each choice of the one token is a tile of its own
            zeros, numbers, ones, count = self._one_token(pairs)
            return zeros, numbers.reshape(1, -1), Tiles(ids.reshape(-1), numbers, ones, count)
        most = routing.tile_capacity(pairs, experts, tile)
        order = self._buffer("order", (pairs,), np.int32)
        place = self._buffer("place", ids.shape, np.int32)
        tiles = Tiles(
            self._buffer("tile_expert", (most,), np.int32),
            self._buffer("tile_start", (most,), np.int32),
            self._buffer("tile_rows", (most,), np.int32),
            self._buffer("tile_count", (1,), np.int32),
        )
        routing.group(self._runtime, ids, order, place, *tiles, experts=experts, tile=tile)
        return order, place, tiles

    def logits(self, x: Array, norm: Norm, lm_head: Linear, batch: Any) -> Array:
        """See Ops.logits; draws at once where nothing but the temperature stands between."""
        runtime, weight, shape = self._runtime, lm_head.weight, batch.shape
        logits = self._logits_buffer(shape)
        if shape.rows > _MOST_DRAWN_ROWS and not shape.draws:
            h = self._normalised(x, batch.rows, norm, weight.layout.bf16)
            gemm.linear(runtime, h, weight.data, weight.layout, weight.order, None, logits)
            return logits
        fused = shape.draws and not shape.filtered
        kept = logits if shape.logits or shape.filtered else None
        dense.lm_head_decode(
            runtime, x, batch.rows, norm.weight, weight.data, weight.layout, kept,
            self._best(shape) if fused else None, batch.temperature, batch.seed, batch.choice,
            batch.draw_positions, eps=norm.eps,
        )  # fmt: skip
        return logits

    def _draw(self, step: Step, logits: Array) -> None:
        """Draw a token for each wanted row, where `logits` has not already weighed them."""
        runtime, shape = self._runtime, step.shape
        best = self._best(shape)
        if shape.filtered:
            sampling.sample(
                runtime, logits, step.temperature, step.top_k, step.top_p, step.min_p, step.seed, step.choice,
                step.draw_positions, best,
            )  # fmt: skip
        results = self._buffer("results", (shape.rows, 2), np.int32)
        sampling.finish(runtime, best, self._drawn[: shape.rows], results)

    def _logits_buffer(self, shape: Shape) -> Array:
        return self._buffer("logits", (shape.rows, self._weights.vocab_size), np.float32)

    def _best(self, shape: Shape) -> Array:
        return self._zeroed("best", shape.rows, np.uint64)

    @property
    def _drawn(self) -> Array:
        """The tokens that the last step drew, by row."""
        return self._zeroed("drawn", _MOST_DRAWN_ROWS, np.int32)

    def _counters(self, name: str, count: int) -> Array:
        """Counters that kernels find at zero and leave at zero."""
        return self._zeroed(f"{name}_counters", count, np.uint32)

    def _zeroed(self, name: str, count: int, dtype: Any) -> Array:
        """Scratch memory that is zero when it is new."""
        if name not in self._buffers or len(self._buffers[name]) < count:
            self._runtime.upload(np.zeros(count, dtype), self._buffer(name, (count,), dtype))
        return self._buffer(name, (count,), dtype)

    def _normalised(self, x: Array, rows: Array | None, norm: Norm, bf16: bool) -> Array:
        """Normalise rows of x into operands."""
        count = len(x) if rows is None else len(rows)
        h = self._buffer("normalised", (count, padded(x.shape[1])), np.uint16)
        dense.rms_norm(self._runtime, x, rows, norm.weight, h, eps=norm.eps, bf16=bf16)
        return h

    @property
    def _kv_fp16(self) -> bool:
        return self._runtime.arch == "sm_75"  # Turing multiplies fp16 alone

    def _inv_freq(self, rope: Rope) -> Array:
        if "inv_freq" not in self._buffers:
            self._runtime.upload(rope.inv_freq, self._buffer("inv_freq", rope.inv_freq.shape, np.float32))
        return self._buffer("inv_freq", rope.inv_freq.shape, np.float32)

    def _one_token(self, k: int) -> tuple[Array, ...]:
        """The grouping arrays, less the experts, of one token's k choices: order, start, rows, count."""
        arrays = np.zeros(k), np.arange(k), np.ones(k), np.array([k])
        found = []
        for name, array in zip(("order", "start", "rows", "count"), arrays, strict=True):
            full = f"one_token_{name}"
            if full not in self._buffers:
                self._runtime.upload(array.astype(np.int32), self._buffer(full, array.shape, np.int32))
            found.append(self._buffer(full, array.shape, np.int32))
        return tuple(found)


def padded(columns: int) -> int:
    """Columns of a row of operands."""
    return -(-columns // CHUNK) * CHUNK


def _drawn_on_device(draw: Draw) -> bool:
    """Whether a draw wants nothing that only the host does: processors, biases, penalties, logprobs."""
    params = draw.params
    return not (
        params.logits_processors
        or params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logprobs is not None
    )
