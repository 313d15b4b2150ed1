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
from gptoss_lite.kernels.cpu.linear import NO_ROWS, NOTHING, linear_dense, linear_packed
from gptoss_lite.kernels.cpu.program import Rooms, Steps
from gptoss_lite.kernels.cpu.rope import rotate_and_append
from gptoss_lite.kernels.cpu.router import route
from gptoss_lite.ops import cpu_weights
from gptoss_lite.ops.base import Array, Linear, Network, Norm, Ops, Pending, Use, floats, natural
from gptoss_lite.ops.cpu_recording import Recording, Recordings, can_be_recorded, owner_of, roomy
from gptoss_lite.ops.cpu_weights import Tiles
from gptoss_lite.quant import QTensor
from gptoss_lite.rope import Rope, rope_tables
from gptoss_lite.sampling import Draw, Sampled, sample

# Numba's fallback threading layer aborts the process when two threads enter it at once.
_ONE_AT_A_TIME = threading.RLock()
_NO_WINDOW = 2**31 - 1
_FEW = 32  # tokens whose steps are all noted before they are done


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
        self._rooms = Rooms()
        self._is_running = False
        self._noted: Steps | None = None  # steps of a pass of which all are to be done together
        self._embedded: tuple[Any, Rope, Array, Any] | None = None  # what `embed` was given last, and gave
        self._recordings = Recordings()

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Hold Numba's thread pool, at this backend's number of threads."""
        with _ONE_AT_A_TIME:
            numba.set_num_threads(self.threads)
            yield

    @contextmanager
    def _steps(self) -> Iterator[Steps]:
        """Write steps down, to be done at once, or in a forward pass of few tokens with all its others."""
        if self._noted is not None:
            yield self._noted
        else:
            with self._threads():
                steps = Steps(self.threads, self._rooms if self._is_running else None)
                yield steps
                steps.run()

    def run(self, network: Network, batch: Batch, cache: KVCache) -> Array:
        """See Ops.run; operation by operation, each of whose results those who look at them may keep."""
        with self._threads():
            return super().run(network, batch, cache)

    def begin(self, network: Network, batch: Batch, cache: KVCache, draws: Sequence[Draw]) -> Pending:
        """See Ops.begin."""
        with self._threads():
            logits = self._forward(network, batch, cache)
            drawn = self.sample(logits, draws)  # before another pass overwrites them
        return lambda: drawn

    def _forward(self, network: Network, batch: Batch, cache: KVCache) -> Array:
        """Compute a forward pass -> its logits, which the next pass may overwrite."""
        if len(batch.tokens) > _FEW:  # so that an interrupt need not wait for all layers
            return self._compute(network, batch, cache, None)
        if not can_be_recorded(network, batch):
            return self._compute(network, batch, cache, Steps(self.threads, self._rooms))
        recording = self._recordings.find(network, batch, cache)
        if recording is None:
            return self._record(network, batch, cache)
        x, rotation = self.embed(*recording.embedding, recording.batch)
        for place, values in zip(recording.embedded, (x, *rotation), strict=True):
            place[:] = values
        recording.program.run()
        return recording.logits

    def _record(self, network: Network, batch: Batch, cache: KVCache) -> Array:
        """Compute a forward pass, and keep what is done for later ones of its shape."""
        batch, noted = roomy(batch), Steps(self.threads, self._rooms)
        logits = self._compute(network, batch, cache, noted)
        if noted.last is not None and noted.runs == 1:  # nothing hung on what steps before it came to
            assert self._embedded is not None
            table, rope, x, rotation = self._embedded
            owner = owner_of(network)
            recording = Recording(owner, batch, (table, rope), (x, *rotation), noted.last, logits)
            self._recordings.keep(cache, recording)
        self._embedded = None
        return logits

    def _compute(self, network: Network, batch: Batch, cache: KVCache, noted: Steps | None) -> Array:
        """Compute a forward pass; where there is something to note steps in, all at once if they can be."""
        moves = self._rooms.moves
        self._noted, self._is_running = noted, True
        try:
            logits: Array = network(batch, cache)
            if noted is not None:
                noted.run()
        finally:
            self._noted, self._is_running = None, False
        if self._rooms.moves > moves:  # what is recorded writes to rooms that there were before
            self._recordings.forget()
        return logits

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
            x, rotation = super().embed(table, rope, batch)
        else:
            shift = 32 - 8 * table.itemsize
            x = (table[batch.tokens].astype(np.uint32) << np.uint32(shift)).view(np.float32)
            rotation = rope_tables(rope, batch.positions)
        if self._noted is not None:
            self._embedded = table, rope, x, rotation
        return x, rotation

    def qkv(
        self, x: Array, norm: Norm, w: Linear, rotation: Any, cache: KVCache, layer: int,
        table: Array, batch: Batch,
    ) -> Array:  # fmt: skip
        """See Ops.qkv."""
        keys, values = cache.keys[layer], cache.values[layer]
        Hk, _, D = keys.shape[1:]
        with self._steps() as steps:
            projected = self._linear(steps, "projected", x, w, norm)
            shape = len(x), projected.shape[1] // D - 2 * Hk, D
            q = steps.room("queries", shape, self._query_dtype)
            cos, sin = (np.ascontiguousarray(part, np.float32) for part in rotation)
            rotate_and_append(
                steps, projected, cos, sin, table, batch.sequence, batch.positions, q, keys, values
            )
        return q

    def attention(
        self, q: Array, cache: KVCache, layer: int, table: Array, batch: Batch, sinks: Array,
        window: int | None,
    ) -> Array:  # fmt: skip
        """See Ops.attention."""
        with self._steps() as steps:
            out = steps.room("attended", q.shape)
            attention.attention(
                steps, q, cache.keys[layer], cache.values[layer], table, batch.sequence, batch.positions,
                sinks, window or _NO_WINDOW, q.shape[2] ** -0.5, out,
            )  # fmt: skip
        return out

    def out_proj(self, a: Array, w: Linear, x: Array) -> Array:
        """See Ops.out_proj."""
        with self._steps() as steps:
            return self._linear(steps, "with attention", a.reshape(len(a), -1), w, residual=x)

    def route(self, x: Array, norm: Norm, router: Linear, k: int) -> tuple[Array, Array, Array]:
        """See Ops.route."""
        assert router.bias is not None
        with self._steps() as steps:
            h = rms_norm(steps, x, norm.weight, norm.eps)
            name = cpu_weights.name_of(router.weight)
            ids, weights = route(steps, self._isa, name, h, router.weight, router.bias, k)
        return h, ids, weights

    def experts(
        self, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear, limit: float, x: Array
    ) -> Array:
        """See Ops.experts."""
        up, back = gate_up.weight, down.weight
        assert gate_up.bias is not None and down.bias is not None
        with self._steps() as steps:
            out = steps.room("with experts", x.shape)
            if isinstance(up, Tiles) and isinstance(back, Tiles):
                experts_packed(
                    steps, self._isa, (up.format, back.format), self.activations, h, ids, weights,
                    up.packed(), gate_up.bias, back.packed(), down.bias, limit, x, out,
                )  # fmt: skip
            else:
                self._dense_experts(steps, h, ids, weights, gate_up, down, limit, x, out)
        return out

    def _dense_experts(
        self, steps: Steps, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear,
        limit: float, x: Array, out: Array,
    ) -> None:  # fmt: skip
        """Compute experts of which at least one stack is dense; rows are sorted by expert."""
        assert gate_up.bias is not None and down.bias is not None
        steps.run()  # for their order hangs on what was chosen
        order = np.argsort(ids, axis=None, kind="stable")
        expert = ids.ravel()[order]  # (R,), R = T * k
        places = np.empty(ids.size, np.int64)
        places[order] = np.arange(ids.size)
        groups, counts = np.unique(expert, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

        up = self._grouped(steps, "gate_up", h[order // ids.shape[1]], gate_up.weight, groups, starts)
        inner = steps.room("inner", (len(up), up.shape[1] // 2))
        elementwise.swiglu(steps, up, gate_up.bias, expert, limit, inner)
        y = self._grouped(steps, "down", inner, down.weight, groups, starts)
        elementwise.combine(steps, x, y, down.bias, ids, places, weights, out)

    def logits(self, x: Array, norm: Norm, lm_head: Linear, batch: Batch) -> Array:
        """See Ops.logits."""
        with self._steps() as steps:
            if len(batch.rows) < len(x):
                steps.run()
                x = x[batch.rows]
            return self._linear(steps, "logits", x, lm_head, norm)

    def sample(self, logits: Array, draws: Sequence[Draw]) -> list[Sampled | Exception]:
        """See Ops.sample."""
        with self._threads():
            return sample(logits, draws, sampling)

    def _linear(
        self, steps: Steps, name: str, x: Array, w: Linear, norm: Norm | None = None,
        residual: Array = NO_ROWS,
    ) -> Array:  # fmt: skip
        """Compute residual + x @ weight.T + bias, x float32 (R, K), which a norm may come before."""
        weight, added = w.weight, NOTHING if w.bias is None else w.bias
        parts: tuple[Any, ...] = weight if isinstance(weight, tuple) else (weight,)
        rows = [part.rows if isinstance(part, Tiles) else len(part) for part in parts]
        y = steps.room(name, (len(x), sum(rows)))
        if not len(x):  # no row's logits are wanted: spare the reading of the weights
            return y
        if isinstance(weight, Tiles):
            before = None if norm is None else (norm.weight, norm.eps)
            quantised = quantized(steps, self._isa, weight.format, self.activations, x, before)
            linear_packed(
                steps,
                self._isa,
                weight.format,
                self.activations,
                weight.packed(),
                quantised,
                y,
                added,
                residual,
            )
            return y
        if norm is not None:
            x = rms_norm(steps, x, norm.weight, norm.eps)
        one_group, all_rows, column = np.zeros(1, np.int32), np.array([0, len(x)], np.int32), 0
        for part, count in zip(parts, rows, strict=True):
            linear_dense(
                steps, self._isa, cpu_weights.name_of(part), part[None], one_group, all_rows, x, y, column,
                added, residual,
            )  # fmt: skip
            column += count
        return y

    def _grouped(self, steps: Steps, name: str, x: Array, weight: Any, groups: Array, starts: Array) -> Array:
        """Multiply rows starts[g]:starts[g + 1] of x (R, K) with weight[groups[g]] (N, K) -> (R, N)."""
        N = weight.rows if isinstance(weight, Tiles) else weight.shape[1]
        y = steps.room(name, (len(x), N))
        if isinstance(weight, Tiles):
            for group, start, end in zip(groups, starts, starts[1:], strict=False):
                quantised = quantized(steps, self._isa, weight.format, self.activations, x[start:end])
                linear_packed(
                    steps,
                    self._isa,
                    weight.format,
                    self.activations,
                    weight.packed(group),
                    quantised,
                    y[start:end],
                )
        else:
            linear_dense(steps, self._isa, cpu_weights.name_of(weight), weight, groups, starts, x, y)
        return y
