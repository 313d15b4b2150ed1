"""The CPU backend: Numba kernels that read weights as packed as the checkpoint has them."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import ml_dtypes
import numba
import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import KVCache
from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cpu import attention, elementwise, linear, sampling
from gptoss_lite.ops.base import Array, Linear, Network, Norm, Ops, Use, natural
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor
from gptoss_lite.quant.mxfp4 import E2M1
from gptoss_lite.rope import Rope, rope_tables
from gptoss_lite.sampling import Draw, Sampled, sample

# Numba's fallback threading layer aborts the process when two threads enter it at once.
_ONE_AT_A_TIME = threading.RLock()
_CODES = np.asarray(E2M1, np.float32)
_NO_WINDOW = 2**31 - 1
# How int8's scales become float32, see linear.linear_int8. The exponent of fp16 is biased by 112 less; byte 0
# of E8M0 is 2^-127, a subnormal.
_SCALES = {"bfloat16": (16, 0, 1.0), "float16": (13, 0, 2.0**112), "uint8": (23, 1 << 22, 1.0)}


class CPUOps(Ops):
    """Float32 arithmetic on packed weights, bf16 keys and values, all cores.

    A row's result has the same bits whatever else is in the batch, however its prompt was cut, and whatever
    the number of threads: every sum runs in one order fixed by the weight's shape or by absolute position.
    """

    name = "cpu"
    cache_dtype: ClassVar[Any] = np.uint16  # the bits of bf16

    def __init__(self, threads: int | None = None) -> None:
        # Read when the thread pool first starts. Threads that spin until their next loop starve each other
        # where cores are shared: on two busy cores a step of a small model took 40 times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        available = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        if threads is not None and (type(threads) is not int or not 1 <= threads <= available):
            raise DeviceError(f"threads is {threads!r}: this machine gives 1 to {available}")
        self.threads = threads or available

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
        """Keep MXFP4 and int8 packed, bf16 as its bits; float16 becomes float32, which holds it exactly."""
        match natural(tensor):
            case MXFP4Tensor() | Int8Tensor() as packed:
                return packed.map(np.ascontiguousarray)
            case np.ndarray() as tensor:
                if tensor.dtype == ml_dtypes.bfloat16:
                    return np.ascontiguousarray(tensor).view(np.uint16)
                return np.ascontiguousarray(tensor, np.float32).view(np.uint32)
        raise TypeError(f"no CPU kernel for {type(tensor).__name__}")

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
        projected = _dense(_rms_norm(x, norm), w)
        q = np.empty((len(x), projected.shape[1] // D - 2 * Hk, D), np.float32)
        cos, sin = rotation
        attention.rotate_and_append(projected, cos, sin, *batch.slots(table), q, keys, values)
        return q

    def attention(
        self, q: Array, cache: KVCache, layer: int, table: Array, batch: Batch, sinks: Array,
        window: int | None,
    ) -> Array:  # fmt: skip
        """See Ops.attention."""
        out = np.empty_like(q)
        attention.attention(
            q, cache.keys[layer], cache.values[layer], table, batch.sequence, batch.positions, sinks,
            window or _NO_WINDOW, q.shape[2] ** -0.5, out,
        )  # fmt: skip
        return out

    def out_proj(self, a: Array, w: Linear, x: Array) -> Array:
        """See Ops.out_proj."""
        return x + _dense(a.reshape(len(a), -1), w)

    def route(self, x: Array, norm: Norm, router: Linear, k: int) -> tuple[Array, Array, Array]:
        """See Ops.route."""
        h = _rms_norm(x, norm)
        logits = _dense(h, router)
        ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k].astype(np.int32)
        weights = np.empty(ids.shape, np.float32)
        elementwise.softmax(np.take_along_axis(logits, ids, axis=-1), weights)
        return h, ids, weights

    def experts(
        self, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear, limit: float, x: Array
    ) -> Array:
        """See Ops.experts. Rows are sorted by expert, so that each expert's weights are read once a call."""
        assert gate_up.bias is not None and down.bias is not None
        order = np.argsort(ids, axis=None, kind="stable")
        expert = ids.ravel()[order]  # (R,), R = T * k
        rows = np.empty(ids.size, np.int32)
        rows[order] = np.arange(ids.size, dtype=np.int32)
        groups, counts = np.unique(expert, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

        up = _grouped(h[order // ids.shape[1]], gate_up.weight, groups, starts)
        inner = np.empty((len(up), up.shape[1] // 2), np.float32)
        elementwise.swiglu(up, gate_up.bias, expert, limit, inner)
        y = _grouped(inner, down.weight, groups, starts)
        out = np.empty_like(x)
        elementwise.combine(x, y, down.bias, expert, rows.reshape(ids.shape), weights, out)
        return out

    def logits(self, x: Array, norm: Norm, lm_head: Linear, batch: Batch) -> Array:
        """See Ops.logits."""
        return _dense(_rms_norm(x[batch.rows], norm), lm_head)

    def sample(self, logits: Array, draws: Sequence[Draw]) -> list[Sampled | Exception]:
        """See Ops.sample."""
        with self._threads():
            return sample(logits, draws, sampling.gumbel_argmax)


def _rms_norm(x: Array, norm: Norm) -> Array:
    y = np.empty_like(x)
    elementwise.rms_norm(x, norm.weight, norm.eps, y)
    return y


def _dense(x: Array, w: Linear) -> Array:
    one_group, all_rows = np.zeros(1, np.int32), np.array([0, len(x)], np.int32)
    stack = w.weight.map(lambda part: part[None]) if isinstance(w.weight, QTensor) else w.weight[None]
    y = _grouped(x, stack, one_group, all_rows)
    return y if w.bias is None else y + w.bias


def _grouped(x: Array, weight: Any, groups: Array, starts: Array) -> Array:
    """Multiply rows starts[g]:starts[g + 1] of x (R, K) with weight[groups[g]] (N, K) -> float32 (R, N)."""
    y = np.empty((len(x), weight.shape[1]), np.float32)
    if not len(x):  # no row's logits are wanted: spare the reading of the weights
        return y
    match weight:
        case MXFP4Tensor(blocks=blocks, scales=scales):
            linear.linear_mxfp4(x, blocks, scales, _CODES, groups, starts, y)
        case Int8Tensor(codes=codes, scales=scales):
            bits = scales.view(f"u{scales.itemsize}")
            linear.linear_int8(x, codes, bits, *_SCALES[scales.dtype.name], groups, starts, y)
        case _:
            linear.linear_dense(x, weight, groups, starts, y)
    return y
