"""What a run takes of main memory, before it is begun; and what a loaded model holds, and reads at a step."""

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from gptoss_lite.checkpoint import Checkpoint, StoredForm
from gptoss_lite.checkpoint.names import group_of, is_quantisable
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import OutOfMemoryError
from gptoss_lite.machine import free_memory
from gptoss_lite.memory import kv_bytes, workspace
from gptoss_lite.model import GptOss
from gptoss_lite.ops.base import Ops
from gptoss_lite.packing import CPU_TILES
from gptoss_lite.synthetic import SyntheticCheckpoint, synthetic

_TENTH = (1 << 30) / 10
_INT8_SHARE = (1 + 2 / 32) / 2  # of bf16's bytes: codes, and a scale of 16 bits for each 32 of them


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run's memory depends on beside the model.

    cache_tokens, max_sequences: see Engine. yardstick_bytes: of the memory that reading is timed on. dense:
    see CPUOps.
    """

    cache_tokens: int
    max_sequences: int
    yardstick_bytes: int
    dense: str | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """Main memory that a run takes, in bytes; scratch: the most beside weights, keys and values at once."""

    weights: int
    keys_and_values: int
    scratch: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.keys_and_values + self.scratch


def host_need(checkpoint: Checkpoint, ops: Ops, limits: Limits, pinned: int = 0) -> Need:
    """Estimate what a run takes, to some per cent, from headers alone.

    pinned: weights that the plan of a GPU puts into main memory; keys and values are the GPU's own.
    """
    config, forms = checkpoint.config, checkpoint.forms()
    largest = max(form.nbytes for form in forms.values())
    if ops.name == "cuda":
        return Need(pinned, 0, largest)
    weights = sum(int(_held(name, form, limits.dense)) for name, form in forms.items())
    if checkpoint.layout == CPU_TILES and ops.name == "cpu":
        weights = 0  # mapped: the system may let go of their pages, and read them again
    itemsize = np.dtype(ops.cache_dtype).itemsize
    kv = kv_bytes(config, limits.cache_tokens, limits.max_sequences, ops.step_tokens)
    # Twice what the CUDA kernels take: there is float32 where they have 16 bits.
    step = 2 * sum(nbytes for _, nbytes in workspace(config, ops.step_tokens, limits.max_sequences))
    if ops.name == "reference":
        step += 4 * config.vocab_size * config.hidden_size  # lm_head, expanded
    # What one tensor takes before it is packed is given back before the yardstick is made.
    return Need(weights, sum(kv) * itemsize // 2, max(largest, step + limits.yardstick_bytes))


def _held(name: str, form: StoredForm, dense: str | None) -> float:
    """Bytes of a weight once it is loaded."""
    is_dense = form.dtype not in ("MXFP4", "INT8")
    if is_dense and not is_quantisable(name):
        return form.nbytes if "router.weight" in name else 2 * form.nbytes  # float32
    if is_dense and dense == "int8" and group_of(name) in ("attention", "lm_head"):
        return form.nbytes * _INT8_SHARE
    return form.nbytes


def require_room(
    checkpoint: Checkpoint, ops: Ops, limits: Limits, pinned: int = 0
) -> tuple[Need, int | None]:
    """Hold what a run needs, see `host_need`, against what is free -> both; None where that cannot be told.

    Raises OutOfMemoryError where it does not fit, saying in one line what it needs and what would fit.
    """
    need, free = host_need(checkpoint, ops, limits, pinned), free_memory()
    if free is not None and need.total > free:
        parts = (
            f"weights {_rounded_up(need.weights)}, keys and values {_rounded_up(need.keys_and_values)}, "
            f"scratch {_rounded_up(need.scratch)}"
        )
        raise OutOfMemoryError(
            f"{checkpoint.path} needs {_rounded_up(need.total)} of memory ({parts}), and "
            f"{math.floor(free / _TENTH) / 10} GiB are free: {_advice(checkpoint, ops, limits, free)}"
        )
    return need, free


def _advice(checkpoint: Checkpoint, ops: Ops, limits: Limits, free: int) -> str:
    if not isinstance(checkpoint, SyntheticCheckpoint):
        return "with `convert --to packed-cpu` its weights would stay on disk"
    if ops.name == "cuda":
        return "with fewer --layers more of it would fit the GPU"
    for layers in range(checkpoint.config.num_hidden_layers, 0, -1):
        least = host_need(synthetic(checkpoint.whole, layers=layers), ops, limits).total
        if least <= free:
            return f"--layers {layers} would fit"
    return f"even --layers 1 takes {_rounded_up(least)}"


def _rounded_up(nbytes: int) -> str:
    return f"{math.ceil(nbytes / _TENTH) / 10} GiB"


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What a step of decode must read, in the form that the backend holds it in.

    attention: with its norms. experts: those that are chosen, on average where several sequences choose.
    """

    attention: float
    routers: float
    experts: float
    lm_head: float
    keys_and_values: float
    total: float


def step_bytes(
    model: GptOss, *, sequences: int, visible: float, kv_itemsize: int, whole: ModelConfig | None = None
) -> StepBytes:
    """Count what one step must read: every weight in use once, and all visible keys and values.

    visible: tokens that a query sees in a full layer, itself included. whole: the network that the model's
    layers are the first of; by default they are all. One row of the embedding is left out.
    """
    config = model.config if whole is None else whole
    layers = config.num_hidden_layers / len(model.layers)
    attention = held_bytes([block.attention for block in model.layers])
    routers = held_bytes([(block.experts.norm, block.experts.router) for block in model.layers])
    experts = held_bytes([(block.experts.gate_up, block.experts.down) for block in model.layers])
    lm_head = held_bytes((model.norm, model.lm_head))
    # Choices are about even, and those of different sequences independent.
    unchosen = (1 - config.num_experts_per_tok / config.num_local_experts) ** sequences
    kv = sequences * _visible_bytes(config, visible, kv_itemsize)
    parts = (layers * attention, layers * routers, layers * experts * (1 - unchosen), lm_head, kv)
    return StepBytes(*parts, sum(parts))


def _visible_bytes(config: ModelConfig, visible: float, itemsize: int) -> float:
    windows = [
        min(visible, config.sliding_window) if kind == "sliding_attention" else visible
        for kind in config.layer_types
    ]
    return sum(windows) * 2 * config.num_key_value_heads * config.head_dim * itemsize


def model_bytes(model: GptOss) -> tuple[int, int]:
    """Count the bytes of all weights as they are held, and those of them that are a file's, mapped."""
    held = list(_arrays([model.embedding, model.layers, model.norm, model.lm_head]))
    return sum(array.nbytes for array in held), sum(array.nbytes for array in held if _is_mapped(array))


def held_bytes(value: Any) -> int:
    """Count the bytes of all arrays in a part of a model."""
    return sum(array.nbytes for array in _arrays(value))


def _arrays(value: Any) -> Iterator[Any]:
    """Find the arrays, of main memory or a device, in dataclasses and sequences."""
    if hasattr(value, "dtype") and hasattr(value, "nbytes"):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _arrays(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _arrays(one)


def _is_mapped(array: Any) -> bool:
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base.obj if isinstance(base, memoryview) else base, mmap.mmap)
