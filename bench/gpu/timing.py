"""What kernels are timed with: gpt-oss's own sizes, recorded launches, and weights that no cache holds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.gpu.device import Device, Result, bits16, median
from gptoss_lite.config import ModelConfig
from gptoss_lite.kernels.cuda.launch import routing
from gptoss_lite.kernels.cuda.layout import HEAD_DIM, Format, Layout, gate_up_rows, padded
from gptoss_lite.kernels.cuda.runtime import Array

BLOCK_TOKENS = 16
EPS, LIMIT = 1e-5, 7.0
DECODE_TILE, PREFILL_TILE = 8, 64
MOST_COPIES = 1024  # of what a kernel reads: together they are four times the L2 cache, if so many can be
MOST_SPLITS, MIN_WIDTH = 64, 16  # as ops/cuda has them


@dataclass(frozen=True, slots=True)
class Sizes:
    """A network's sizes, and what to time at them."""

    hidden: int
    heads: int
    key_heads: int
    intermediate: int
    experts: tuple[int, ...]  # the first has its products timed, all their routing
    k: int
    vocab: int
    window: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    prefills: tuple[int, ...]
    launches: int  # in one recording, at least
    rounds: int


REAL = Sizes(
    2880, 64, 8, 2880, (32, 128), 4, 201_088, 128, (128, 4096, 32_768, 131_072), (1, 8), (512, 2048), 24, 5
)
SMALL = Sizes(96, 8, 2, 64, (8, 16), 2, 512, 128, (20, 300), (1, 8), (70,), 2, 2)


def network(name: str) -> ModelConfig:
    """Give the configuration of gpt-oss-20b or -120b; of a network like them that is tiny for "tiny"."""
    from gptoss_lite.synthetic import NETWORKS  # wants ml_dtypes, which kernels do not

    if name != "tiny":
        return NETWORKS[name]
    return replace(
        NETWORKS["20b"], vocab_size=1024, hidden_size=96, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, num_local_experts=8,
        layer_types=NETWORKS["20b"].layer_types[:2],
    )  # fmt: skip


class Bench:
    """Times launches in a recording, and makes the arrays that they want."""

    def __init__(self, device: Device, sizes: Sizes) -> None:
        self.device, self.runtime, self.sizes = device, device.runtime, sizes
        self.rng = np.random.default_rng(0)
        self.kv_fp16 = self.runtime.arch == "sm_75"

    def time(
        self, name: str, launch: Callable[[int], None], copies: int, *, nbytes: float = 0, flops: float = 0,
        **labels: Any,
    ) -> Result:  # fmt: skip
        """Time launch(i) for i going round `copies`; nbytes: what one must read and write at the least."""
        count = max(copies, self.sizes.launches)

        def work() -> None:
            for i in range(count):
                launch(i % copies)

        launch(0)  # a recording wants kernels that are loaded
        recording = self.runtime.capture(work)
        times = self.device.seconds(lambda: self.runtime.replay(recording), self.sizes.rounds)
        seconds = median(times) / count
        result: Result = {"kernel": name, **labels, "us": seconds * 1e6}
        if nbytes:
            result |= {"bytes": int(nbytes), "bytes_per_s": nbytes / seconds}
        if flops:
            result |= {"flops": flops, "flops_per_s": flops / seconds}
        return result

    def copies(self, nbytes: float) -> int:
        """How many copies of so many bytes are four times the cache."""
        return int(min(MOST_COPIES, max(1, -(-4 * self.device.l2_bytes // max(nbytes, 1)))))

    def upload(self, array: npt.NDArray[Any]) -> Array:
        """Bring an array to the device."""
        target = self.runtime.empty(array.shape, array.dtype)
        self.runtime.upload(np.ascontiguousarray(array), target)
        return target

    def repeated(self, array: npt.NDArray[Any], copies: int) -> Array:
        """Bring so many copies of an array to the device: (copies, ...)."""
        target = self.runtime.empty((copies, *array.shape), array.dtype)
        self.runtime.upload(array, target[0])
        for copy in range(1, copies):
            self.runtime.copy(target[0], target[copy])
        return target

    def packed(self, layout: Layout, copies: int) -> Array:
        """Make packed matrices (copies, nbytes) of plausible numbers, whatever their order."""
        if layout.format is Format.DENSE:
            data = bits16(self.rng, (layout.nbytes // 2,), layout.bf16).view(np.uint8)
        else:
            data = self.rng.integers(0, 256, layout.nbytes, np.uint8)
            data[layout.code_bytes :] = self.rng.integers(132, 136, layout.nbytes - layout.code_bytes)
        return self.repeated(data, copies)

    def floats(self, *shape: int) -> Array:
        """Make normal float32 numbers."""
        return self.upload(self.rng.standard_normal(shape, np.float32))

    def ints(self, values: Any) -> Array:
        """Bring int32 numbers to the device."""
        return self.upload(np.asarray(values, np.int32))

    def operands(self, rows: int, columns: int) -> Array:
        """Make fp16 operands."""
        return self.upload(bits16(self.rng, (rows, padded(columns)), False))

    def cache(self, blocks: int) -> tuple[Array, Array]:
        """Make keys and values of so many blocks."""
        shape = self.sizes.key_heads, BLOCK_TOKENS, HEAD_DIM
        bits = bits16(self.rng, (min(blocks, 1024), *shape), not self.kv_fp16)
        whole = -(-blocks // len(bits))
        keys, values = (self.repeated(part, whole).reshape(-1, *shape) for part in (bits, bits[::-1].copy()))
        return keys, values

    def empty(self, *shape: int, dtype: Any = np.float32) -> Array:
        """Set aside memory."""
        return self.runtime.empty(shape, dtype)

    def zeros(self, count: int, dtype: Any) -> Array:
        """Set aside memory that is zero."""
        return self.upload(np.zeros(count, dtype))


def choices(b: Bench, sets: int, tokens: int, experts: int) -> npt.NDArray[np.int32]:
    """Choose k experts of each token at random: ids (sets, tokens, k); of one token, all experts in turn."""
    k = b.sizes.k
    order = b.rng.random((sets, tokens, experts), np.float32).argsort(axis=2).astype(np.int32)
    if tokens > 1:
        return order[:, :, :k].copy()
    each = experts // k  # sets without an expert in common
    return order[: -(-sets // each), 0, : each * k].reshape(-1, 1, k)[:sets]


class Groups:
    """Grouping arrays of several choices, made on the device: [i] -> (order, tiles of experts ...), place."""

    def __init__(self, b: Bench, ids: npt.NDArray[np.int32], experts: int, tile: int) -> None:
        sets, tokens, k = ids.shape
        most = routing.tile_capacity(tokens * k, experts, tile)
        self.ids = b.ints(ids)
        self.place = b.empty(*ids.shape, dtype=np.int32)
        self._order = b.empty(sets, tokens * k, dtype=np.int32)
        self._expert, self._start, self._rows = (b.empty(sets, most, dtype=np.int32) for _ in range(3))
        self._count = b.empty(sets, 1, dtype=np.int32)
        self.experts, self.tile, self._runtime = experts, tile, b.runtime
        for i in range(sets):
            self.group(i)

    def group(self, i: int) -> None:
        """Launch the grouping of one set."""
        order, expert, start, rows, count = self[i]
        routing.group(
            self._runtime, self.ids[i], order, self.place[i], expert, start, rows, count,
            experts=self.experts, tile=self.tile,
        )  # fmt: skip

    def __getitem__(self, i: int) -> tuple[Array, Array, Array, Array, Array]:
        return self._order[i], self._expert[i], self._start[i], self._rows[i], self._count[i]


def tables_of(b: Bench, layout: Layout, experts: int) -> tuple[Array, Array]:
    """Make layers of experts until no cache holds them: tables uint64 (layers, E), and what they point at."""
    layers = b.copies(experts * layout.nbytes)
    records = b.packed(layout, layers * experts)
    first = b.runtime.address(records)
    addresses = np.arange(layers * experts, dtype=np.uint64) * np.uint64(layout.nbytes) + np.uint64(first)
    return b.upload(addresses.reshape(layers, experts)), records


def expert_layouts(b: Bench) -> tuple[Layout, Layout]:
    """The forms of gate_up and down."""
    s = b.sizes
    return (
        Layout(Format.MXFP4, len(gate_up_rows(s.intermediate)), s.hidden),
        Layout(Format.MXFP4, s.hidden, s.intermediate),
    )
