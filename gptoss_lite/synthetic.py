"""Checkpoints of random numbers at the size of gpt-oss, made as they are asked for: no file, no download.

A weight's bits follow from the seed, its name and their place alone, so that any part of it can be made by
itself and is the same each time. Their magnitudes keep activations near 1 in every layer.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.checkpoint.directory import pair_shapes
from gptoss_lite.checkpoint.names import EMBEDDING, Name, names
from gptoss_lite.checkpoint.weights import Part, Weight
from gptoss_lite.config import ATTENTION_KINDS, ModelConfig, RopeConfig
from gptoss_lite.errors import RequestError
from gptoss_lite.machine import cores
from gptoss_lite.quant import MXFP4Tensor
from gptoss_lite.quant.formats import MXFP4
from gptoss_lite.quant.tensorfile import Note, StoredTensor, ignore
from gptoss_lite.threads import spread

_LARGE = ModelConfig(
    vocab_size=201_088,
    hidden_size=2880,
    intermediate_size=2880,
    num_hidden_layers=36,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    num_local_experts=128,
    num_experts_per_tok=4,
    sliding_window=128,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    swiglu_limit=7.0,
    layer_types=ATTENTION_KINDS * 18,
    rope=RopeConfig(150_000.0, 32.0, 4096, 32.0, 1.0, False),
    quant_method="mxfp4",
)
_SMALL = replace(_LARGE, num_hidden_layers=24, layer_types=ATTENTION_KINDS * 12, num_local_experts=32)
_DEMO = replace(
    _SMALL,
    vocab_size=4096,
    hidden_size=192,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=1,
    num_local_experts=8,
    layer_types=ATTENTION_KINDS * 2,
)
# gpt-oss as published, and the shape of the bundled demo.
NETWORKS: Final = {"20b": _SMALL, "120b": _LARGE, "demo": _DEMO}

_Fill: TypeAlias = Callable[[NDArray[np.uint64], np.uint64, np.uint64, np.uint64], Any]

# SplitMix64, as kernels/cpu/yardstick.py has it.
_STEP, _FACTORS, _SHIFTS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), (30, 27, 31)
_WORD, _MASK = 8, (1 << 64) - 1  # bytes of a word, its bits
_TASK = 1 << 19  # words that a thread makes at a time
_BLOCK = 1 << 15  # words that NumPy makes at a time, which stay in an inner cache
_CODE_RMS = math.sqrt(8.5625)  # of E2M1's values, all as likely
_FLOAT_RMS = math.sqrt(7 / 3)  # of numbers from 1 to 2
_SCALES = 4  # powers of two among a weight's scales, all as likely


@dataclass(slots=True)
class Clock:
    """How many seconds the making of weights has taken so far."""

    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Words:
    """An endless row of 64-bit words, (random & keep) + add, of which any stretch can be made."""

    key: int
    keep: int
    add: int
    clock: Clock

    def stretch(self, start: int, stop: int) -> NDArray[np.uint8]:
        """Make the bytes from `start` to `stop`, read-only as those of a file."""
        began = time.perf_counter()
        first = start // _WORD
        words = np.empty(-(-stop // _WORD) - first, np.uint64)
        fill, keep, add = _filler(), np.uint64(self.keep), np.uint64(self.add)

        def work(task: int) -> None:
            state = self.key + (first + task) * _STEP
            fill(words[task : task + _TASK], np.uint64(state & _MASK), keep, add)

        for _ in spread(work, range(0, len(words), _TASK), cores()):
            pass
        made = words.view(np.uint8)[start - first * _WORD : stop - first * _WORD]
        made.flags.writeable = False
        self.clock.seconds += time.perf_counter() - began
        return made

    def array(self, shape: tuple[int, ...], itemsize: int, part: Part) -> NDArray[np.uint8]:
        """Make a part of an array of `shape` that begins with the first word -> its bytes, flat."""
        each = math.prod(shape[1:]) * itemsize
        start, stop, _ = (slice(part, part + 1) if isinstance(part, int) else part).indices(shape[0])
        return self.stretch(start * each, max(start, stop) * each)


@dataclass(frozen=True, slots=True)
class _Random(Weight):
    """A weight that no file holds.

    What stands for its file is this module, whose change is the only way for it to change.
    """

    name: str

    def _stored(self, suffix: str, dtype: str, shape: tuple[int, ...], itemsize: int) -> StoredTensor:
        nothing = np.broadcast_to(np.uint8(0), (math.prod(shape) * itemsize,))
        return StoredTensor(Path(__file__), self.name + suffix, dtype, shape, nothing, None)

    def verify(self, threads: int = 1, note: Note = ignore) -> None:
        """See Weight.verify; it is known to be finite."""
        note(self.nbytes)


@dataclass(frozen=True, slots=True)
class RandomFloats(_Random):
    """A weight in bf16."""

    words: Words

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """See Weight.stored; their data is not there."""
        return (self._stored("", "BF16", self.shape, 2),)

    def part(self, part: Part) -> NDArray[Any]:
        """See Weight.part."""
        inner = self.shape[1:] if isinstance(part, int) else (-1, *self.shape[1:])
        floats: NDArray[Any] = self.words.array(self.shape, 2, part).view(ml_dtypes.bfloat16)
        return floats.reshape(inner)


@dataclass(frozen=True, slots=True)
class RandomMXFP4(_Random):
    """A stack of experts' matrices in MXFP4."""

    blocks: Words
    scales: Words

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """See Weight.stored; their data is not there."""
        blocks, scales = pair_shapes(self.shape)
        return self._stored("_blocks", "U8", blocks, 1), self._stored("_scales", "U8", scales, 1)

    @property
    def format(self) -> MXFP4:
        """See Weight.format."""
        return MXFP4()

    def part(self, part: Part) -> MXFP4Tensor:
        """See Weight.part."""
        fields = []
        for words, shape in zip((self.blocks, self.scales), pair_shapes(self.shape), strict=True):
            inner = shape[1:] if isinstance(part, int) else (-1, *shape[1:])
            fields.append(words.array(shape, 1, part).reshape(inner))
        return MXFP4Tensor(*fields)


@dataclass(frozen=True, slots=True)
class SyntheticCheckpoint(Checkpoint):
    """A checkpoint of random weights, perhaps of a network's first layers alone.

    whole: the configuration of all of it. clock: how long making weights has taken.
    """

    whole: ModelConfig = field(kw_only=True)
    clock: Clock = field(kw_only=True)


def synthetic(network: str | ModelConfig, *, layers: int | None = None, seed: int = 0) -> SyntheticCheckpoint:
    """Make a checkpoint, in the layout of gpt-oss's own, whose weights are random; nothing is made yet.

    network: "20b", "120b" or "demo", by its shape, or any configuration; experts are in MXFP4, all else in
    bf16. layers: take the first so many, by default all. Each read of a weight makes it anew, the same.
    Raises RequestError for a name or a number of layers that there is not.
    """
    if isinstance(network, str):
        if network not in NETWORKS:
            raise RequestError(f"no network is called {network!r}: choose {', '.join(NETWORKS)}")
        name, whole = network, NETWORKS[network]
    else:
        name, whole = "network", network
    count = whole.num_hidden_layers if layers is None else layers
    if not 1 <= count <= whole.num_hidden_layers:
        raise RequestError(f"layers is {layers}: {name} has 1 to {whole.num_hidden_layers}")
    config = replace(whole, num_hidden_layers=count, layer_types=whole.layer_types[:count])
    clock = Clock()
    weights = {name.name: _weight(name, seed, clock) for name in names(config)}
    path = Path(f"synthetic-{name}-{count}-layers-seed-{seed}")
    return SyntheticCheckpoint(path, config, "mxfp4", {}, weights, whole=whole, clock=clock)


def random_bytes(nbytes: int, keep: int = 0xFF, add: int = 0, bits: int = 8) -> NDArray[np.uint8]:
    """Make bytes, always the same: numbers of so many bits, (random & keep) + add."""
    return Words(0, _everywhere(keep, bits), _everywhere(add, bits), Clock()).stretch(0, nbytes)


def _weight(name: Name, seed: int, clock: Clock) -> Weight:
    def words(suffix: str, keep: int, add: int, bits: int) -> Words:
        key = blake2b(f"{seed} {name.name}{suffix}".encode(), digest_size=_WORD).digest()
        return Words(int.from_bytes(key, "little"), _everywhere(keep, bits), _everywhere(add, bits), clock)

    if name.is_experts:
        wanted = 1 / (math.sqrt(name.shape[-1]) * _CODE_RMS)
        # Scales from the least to the least times 2^(_SCALES - 1), whose mean square is known, too.
        rms = math.sqrt(sum(4.0**power for power in range(_SCALES)) / _SCALES)
        least = 127 + round(math.log2(wanted / rms))
        scales = words("_scales", _SCALES - 1, least, 8)
        return RandomMXFP4(name.shape, name.name, words("_blocks", 0xFF, 0, 8), scales)
    sign, exponent = 0x8000, -6  # of biases and sinks
    if name.name.endswith("norm.weight"):
        sign, exponent = 0, -1
    elif name.name == EMBEDDING:
        exponent = -1
    elif len(name.shape) == 2:
        exponent = round(-math.log2(math.sqrt(name.shape[-1]) * _FLOAT_RMS))
    return RandomFloats(name.shape, name.name, words("", sign | 0x7F, (127 + exponent) << 7, 16))


def _everywhere(number: int, bits: int) -> int:
    """Repeat a number of so many bits all over a word."""
    return number * (_MASK // ((1 << bits) - 1))


def _filler() -> _Fill:
    """Return the kernel, or NumPy's way where it cannot be compiled: Numba may be missing beside a GPU."""
    try:
        from gptoss_lite.kernels.cpu.yardstick import fill
    except ImportError:
        return fill_with_numpy
    kernel: Any = fill
    filler: _Fill = kernel
    return filler


def fill_with_numpy(words: NDArray[np.uint64], state: np.uint64, keep: np.uint64, add: np.uint64) -> None:
    """Do as `fill` of kernels/cpu/yardstick.py does, bit for bit, a third as fast or slower."""
    ramp = np.arange(1, _BLOCK + 1, dtype=np.uint64) * np.uint64(_STEP)
    shifted = np.empty_like(ramp)
    for start in range(0, len(words), _BLOCK):
        z = words[start : start + _BLOCK]
        size = len(z)
        np.add(ramp[:size], np.uint64((int(state) + start * _STEP) & _MASK), out=z)
        for shift, factor in zip(_SHIFTS, (*_FACTORS, None), strict=True):
            np.right_shift(z, np.uint64(shift), out=shifted[:size])
            np.bitwise_xor(z, shifted[:size], out=z)
            if factor is not None:
                np.multiply(z, np.uint64(factor), out=z)
        np.bitwise_and(z, keep, out=z)
        np.add(z, add, out=z)
