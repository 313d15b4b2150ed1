"""The CPU backend: Numba kernels on packed weights, made for the instructions that this CPU has."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numba
import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import KVCache
from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cpu import attention, elementwise, isa, sampling
from gptoss_lite.kernels.cpu.activations import quantized, rms_norm
from gptoss_lite.kernels.cpu.experts import experts_packed
from gptoss_lite.kernels.cpu.linear import linear_dense, linear_packed
from gptoss_lite.kernels.cpu.rope import rotate_and_append
from gptoss_lite.kernels.cpu.router import make_router
from gptoss_lite.ops import cpu_weights
from gptoss_lite.ops.base import Array, Linear, Network, Norm, Ops, Use, floats, natural
from gptoss_lite.ops.cpu_weights import Tiles
from gptoss_lite.quant import QTensor
from gptoss_lite.rope import Rope, rope_tables
from gptoss_lite.sampling import Draw, Sampled, sample

# Numba's fallback threading layer aborts the process when two threads enter it at once.
_ONE_AT_A_TIME = threading.RLock()
_NO_WINDOW = 2**31 - 1
_NOTHING, _NO_ROWS = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)


class CPUOps(Ops):
    """Packed weights times integer activations, float32 between them; bf16 keys and values; all cores.

    activations: what quantised weights are multiplied by. "accurate" is 16 bits, whose error is lost beside
    that of the cache; "int8" is 8 bits, twice as fast with many tokens, and less accurate. dense: "int8"
    quantises attention and lm_head while loading where the checkpoint has them dense.

    A row's result has the same bits whatever else is in the batch, however its prompt was cut, and whatever
    the number of threads: every sum runs in one order fixed by the weight's shape or by absolute position.
    Raises DeviceError for a choice that there is not.
    """

    name = "cpu"
    cache_dtype: ClassVar[Any] = np.uint16  # the bits of bf16

    def __init__(
        self, threads: int | None = None, activations: str = "accurate", dense: str | None = None
    ) -> None:
        # Read when the thread pool first starts. Threads that wait for their next loop awake for long starve
        # each other where cores are shared: on two busy cores a step of a small model took 40 times as long.
        # Some 0.2 ms, turns of GNU's own wait loop, are as long as a step does something else.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ["OMP_WAIT_POLICY"] = "passive"
            os.environ.setdefault("GOMP_SPINCOUNT", "20000")
        available = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        if threads is not None and (type(threads) is not int or not 1 <= threads <= available):
            raise DeviceError(f"threads is {threads!r}: this machine gives 1 to {available}")
        if activations not in ("accurate", "int8"):
            raise DeviceError(f"activations is {activations!r}: choose accurate or int8")
        if dense not in (None, "int8"):
            raise DeviceError(f"dense is {dense!r}: choose int8, or None for what the checkpoint has")
        self.threads = threads or available
        self.activations = activations
        self._dense = dense
        self._isa = isa.host()
        # Eight bits are less than bf16 has, in which queries are multiplied faster where the CPU can.
        is_bf16 = activations == "int8" and attention.takes_bf16(self._isa)
        self._query_dtype = np.uint16 if is_bf16 else np.float32

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Hold Numba's thread pool, at this backend's number of threads."""
        with _ONE_AT_A_TIME:
            numba.set_num_threads(self.threads)
            yield

    def run(self, network: Network, batch: Batch, cache: KVCache) -> Array:
        """See Ops.run."""
        with self._threads():
            return super().run(network, batch, cache)

    def prepare(self, tensor: Array | QTensor, use: Use) -> Any:
        """Bring what is quantised into tiles, unless it is in them; keep what is dense, or quantise it.

        An embedding stays as it is: rows are looked up in it.
        """
        if use.kind == "embedding":
            table = natural(tensor)
            return table if isinstance(table, QTensor) else cpu_weights.dense(table)
        if use.kind == "router":
            return cpu_weights.dense(floats(tensor) if isinstance(tensor, QTensor) else tensor)
        if isinstance(tensor, QTensor):
            return cpu_weights.tiles(tensor, self.threads)
        if self._dense == "int8" and cpu_weights.can_be_int8(tensor):
            return cpu_weights.quantised(tensor, self.threads)
        return cpu_weights.dense(tensor)

    def prepare_stacked(self, parts: Sequence[Array | QTensor], use: Use) -> Any:
        """See Ops.prepare_stacked; quantised parts are put in place one by one."""
        if cpu_weights.can_be_stacked(parts):
            return cpu_weights.stacked(parts, self.threads)  # type: ignore[arg-type]
        if self._dense is None and not any(isinstance(part, QTensor) for part in parts):
            return tuple(self.prepare(part, use) for part in parts)  # mapped where they are
        return super().prepare_stacked(parts, use)

    def embed(self, table: Any, rope: Rope, batch: Batch) -> tuple[Array, Any]:
        """See Ops.embed; a table that is not quantised holds the bits of bf16 or float32."""
        if isinstance(table, QTensor):
            return super().embed(table, rope, batch)
        shift = 32 - 8 * table.itemsize
        x = (table[batch.tokens].astype(np.uint32) << np.uint32(shift)).view(np.float32)
        return x, rope_tables(rope, batch.positions)

    def qkv(
        self, x: Array, norm: Norm, w: Linear, rotation: Any, cache: KVCache, layer: int,
        table: Array, batch: Batch,
    ) -> Array:  # fmt: skip
        """See Ops.qkv."""
        keys, values = cache.keys[layer], cache.values[layer]
        Hk, _, D = keys.shape[1:]
        projected = self._linear(rms_norm(x, norm.weight, norm.eps), w)
        q = np.empty((len(x), projected.shape[1] // D - 2 * Hk, D), self._query_dtype)
        cos, sin = rotation
        rotate_and_append(projected, cos, sin, *batch.slots(table), q, keys, values)
        return q

    def attention(
        self, q: Array, cache: KVCache, layer: int, table: Array, batch: Batch, sinks: Array,
        window: int | None,
    ) -> Array:  # fmt: skip
        """See Ops.attention."""
        out = np.empty(q.shape, np.float32)
        attention.attention(
            q, cache.keys[layer], cache.values[layer], table, batch.sequence, batch.positions, sinks,
            window or _NO_WINDOW, q.shape[2] ** -0.5, out,
        )  # fmt: skip
        return out

    def out_proj(self, a: Array, w: Linear, x: Array) -> Array:
        """See Ops.out_proj."""
        return self._linear(a.reshape(len(a), -1), w, x)

    def route(self, x: Array, norm: Norm, router: Linear, k: int) -> tuple[Array, Array, Array]:
        """See Ops.route."""
        h = rms_norm(x, norm.weight, norm.eps)
        ids, weights = np.empty((len(x), k), np.int32), np.empty((len(x), k), np.float32)
        route = make_router(self._isa, cpu_weights.name_of(router.weight))
        route(h, router.weight, router.bias, ids, weights)
        return h, ids, weights

    def experts(
        self, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear, limit: float, x: Array
    ) -> Array:
        """See Ops.experts."""
        up, back = gate_up.weight, down.weight
        if not isinstance(up, Tiles) or not isinstance(back, Tiles):
            return self._dense_experts(h, ids, weights, gate_up, down, limit, x)
        out = np.empty_like(x)
        experts = experts_packed(self._isa, up.format, back.format, self.activations)
        experts(
            h, ids, weights,
            up.records, up.code_bytes, up.groups, up.group_blocks, up.is_fp16, gate_up.bias,
            back.records, back.code_bytes, back.groups, back.group_blocks, back.is_fp16, down.bias,
            limit, x, out,
        )  # fmt: skip
        return out

    def _dense_experts(
        self, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear, limit: float, x: Array
    ) -> Array:
        """Compute experts of which at least one stack is dense; rows are sorted by expert."""
        assert gate_up.bias is not None and down.bias is not None
        order = np.argsort(ids, axis=None, kind="stable")
        expert = ids.ravel()[order]  # (R,), R = T * k
        rows = np.empty(ids.size, np.int32)
        rows[order] = np.arange(ids.size, dtype=np.int32)
        groups, counts = np.unique(expert, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

        up = self._grouped(h[order // ids.shape[1]], gate_up.weight, groups, starts)
        inner = np.empty((len(up), up.shape[1] // 2), np.float32)
        elementwise.swiglu(up, gate_up.bias, expert, limit, inner)
        y = self._grouped(inner, down.weight, groups, starts)
        out = np.empty_like(x)
        elementwise.combine(x, y, down.bias, expert, rows.reshape(ids.shape), weights, out)
        return out

    def logits(self, x: Array, norm: Norm, lm_head: Linear, batch: Batch) -> Array:
        """See Ops.logits."""
        return self._linear(rms_norm(x[batch.rows], norm.weight, norm.eps), lm_head)

    def sample(self, logits: Array, draws: Sequence[Draw]) -> list[Sampled | Exception]:
        """See Ops.sample."""
        return sample(logits, draws, sampling)

    def _linear(self, x: Array, w: Linear, residual: Array = _NO_ROWS) -> Array:
        """Compute residual + x @ weight.T + bias, x float32 (R, K)."""
        weight, added = w.weight, _NOTHING if w.bias is None else w.bias
        parts: tuple[Any, ...] = weight if isinstance(weight, tuple) else (weight,)
        rows = [part.rows if isinstance(part, Tiles) else len(part) for part in parts]
        y = np.empty((len(x), sum(rows)), np.float32)
        if not len(x):  # no row's logits are wanted: spare the reading of the weights
            return y
        if isinstance(weight, Tiles):
            self._product(weight, weight.records, x, added, residual, y)
            return y
        one_group, all_rows, column = np.zeros(1, np.int32), np.array([0, len(x)], np.int32), 0
        for part, count in zip(parts, rows, strict=True):
            linear = linear_dense(self._isa, cpu_weights.name_of(part))
            linear(part[None], one_group, all_rows, x, added, residual, y, column)
            column += count
        return y

    def _grouped(self, x: Array, weight: Any, groups: Array, starts: Array) -> Array:
        """Multiply rows starts[g]:starts[g + 1] of x (R, K) with weight[groups[g]] (N, K) -> (R, N)."""
        N = weight.rows if isinstance(weight, Tiles) else weight.shape[1]
        y = np.empty((len(x), N), np.float32)
        if isinstance(weight, Tiles):
            for group, start, end in zip(groups, starts, starts[1:], strict=False):
                self._product(weight, weight.records[group], x[start:end], _NOTHING, _NO_ROWS, y[start:end])
        else:
            linear = linear_dense(self._isa, cpu_weights.name_of(weight))
            linear(weight, groups, starts, x, _NOTHING, _NO_ROWS, y, 0)
        return y

    def _product(self, w: Tiles, record: Array, x: Array, added: Array, residual: Array, y: Array) -> None:
        linear = linear_packed(self._isa, w.format, self.activations)
        rows = quantized(self._isa, w.format, self.activations, x)
        linear(record, w.code_bytes, w.groups, w.group_blocks, w.is_fp16, *rows, added, residual, y)
