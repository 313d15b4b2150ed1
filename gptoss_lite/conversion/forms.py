"""Which form every weight gets in a target layout, and the refusal of what would lose something."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.checkpoint.names import Name
from gptoss_lite.checkpoint.weights import Weight
from gptoss_lite.config import ATTENTION_KINDS, ModelConfig
from gptoss_lite.conversion.recode import DTYPES
from gptoss_lite.conversion.targets import TILES
from gptoss_lite.errors import DeviceError, FormatError
from gptoss_lite.ops.cuda import limits
from gptoss_lite.packing import kind_of
from gptoss_lite.quant import QTensor
from gptoss_lite.quant.formats import BLOCK, MXFP4, Format, Int8
from gptoss_lite.quant.tensorfile import abbreviated

TARGETS = ("hf", "bf16", "original", "gguf", "packed-cpu", "packed-cuda")


def forms(
    checkpoint: Checkpoint, target: str, names: Mapping[str, Name], chosen: Mapping[str, Format | None]
) -> dict[str, Format | str]:
    """Decide the form of every weight: its chosen format, or the dtype of its floats.

    Raises FormatError where the target cannot hold all of it without loss, naming what, and the targets that
    can; DeviceError where its tiles are for kernels that cannot compute the network.
    """
    problem = _problem(checkpoint, target, names, chosen)
    if problem is not None:
        others = [t for t in TARGETS if t != target and _holds(checkpoint, t, names, chosen)]
        raise FormatError(f"--to {target} {problem}; {_advice(others)}")
    decided: dict[str, Format | str] = {}
    for name, form in chosen.items():
        if target == "bf16":
            decided[name] = "BF16"
        else:
            decided[name] = _dense(checkpoint, target, names[name]) if form is None else form
    if target == "original":
        _widen(names.values(), decided)
    return decided


def _advice(targets: list[str]) -> str:
    if not targets:
        return "no other layout would do"
    *others, last = targets
    return f"--to {', '.join(others)} or {last} would do" if others else f"--to {last} would do"


def _dense(checkpoint: Checkpoint, target: str, name: Name) -> str:
    """Choose the dtype of floats: the file's own, as far as layouts do not have customs."""
    weight = checkpoint.weights[name.name]
    dtype = weight.form.dtype
    if name.is_quantisable:
        return dtype
    if target == "gguf":  # llama.cpp has vectors and routers in float32
        return "F32"
    # ... which says nothing of what they were: bf16 where that holds them.
    return "BF16" if checkpoint.layout == "gguf" and dtype == "F32" and _fits_bf16(weight) else dtype


def _widen(names: Iterable[Name], decided: dict[str, Format | str]) -> None:
    """Give weights that are rows of one tensor one dtype, float32 where they differ."""
    sharing: dict[str, list[str]] = {}
    for name in names:
        sharing.setdefault(name.original, []).append(name.name)
    for members in sharing.values():
        if len({decided[member] for member in members}) > 1:
            decided |= dict.fromkeys(members, "F32")


def _holds(
    checkpoint: Checkpoint, target: str, names: Mapping[str, Name], chosen: Mapping[str, Format | None]
) -> bool:
    """Tell whether a target would do, from headers alone."""
    if target == "bf16" and any(
        form is None and checkpoint.weights[name].form.dtype != "BF16" for name, form in chosen.items()
    ):
        return False  # perhaps it would, but that takes reading them
    try:
        return _problem(checkpoint, target, names, chosen) is None
    except DeviceError:
        return False


def _problem(
    checkpoint: Checkpoint, target: str, names: Mapping[str, Name], chosen: Mapping[str, Format | None]
) -> str | None:
    """Say what a target cannot hold as it is, None where it can hold all."""
    for key, (value, meant) in _settings(checkpoint.config, target).items():
        if value != meant:
            shown = f"{abbreviated(value)}: it has no key for that and means {abbreviated(meant)}"
            return f"would lose {key}, {shown}"
    for name, form in chosen.items():
        if (reason := _reason(target, names[name], checkpoint.weights[name], form)) is not None:
            return f"would lose {name}: {reason}"
    if target in TILES and not any(form and kind_of(name) for name, form in chosen.items()):
        return (
            "has nothing to pack, for none of the weights that kernels pack is quantised: quantize it first"
        )
    if target == "packed-cuda":
        limits.require(checkpoint.config)
    return None


def _settings(config: ModelConfig, target: str) -> dict[str, tuple[Any, Any]]:
    """List the settings that a layout has no key for, and what it means instead."""
    alternating = tuple(ATTENTION_KINDS[layer % 2] for layer in range(config.num_hidden_layers))
    rope = config.rope
    if target == "original":
        extended = int(rope.original_max_position_embeddings * rope.factor)
        return {
            "layer_types": (config.layer_types, alternating),
            "rms_norm_eps": (config.rms_norm_eps, 1e-5),
            "rope_scaling.truncate": (rope.truncate, False),
            "max_position_embeddings": (config.max_position_embeddings, extended),
        }
    if target == "gguf":
        return {
            "layer_types": (config.layer_types, alternating),
            "swiglu_limit": (config.swiglu_limit, 7.0),
        }
    return {}


def _reason(target: str, name: Name, weight: Weight, form: Format | None) -> str | None:
    """Say why a target cannot hold a weight as it is, None where it can."""
    match form, target:
        case Int8(scales=scales), "bf16" if scales != "e8m0":
            return f"int8 codes times {scales} scales have more digits than bf16"
        case None, "bf16" if not _fits_bf16(weight):
            return f"it is {weight.form.dtype}, and bf16 is not enough"
        case Int8(), "original":
            return "original/ has no int8"
        case MXFP4(), "original" if not name.is_experts:
            return "original/ has mxfp4 for experts alone"
        case None, "original" if name.is_experts:
            return "original/ has its experts in mxfp4 alone"
        case Int8() as int8, "gguf" if (int8.group(name.shape[-1]), int8.scales) != (BLOCK, "float16"):
            return (
                f"GGUF has int8 by groups of 32 with float16 scales (quantize --scales float16), not {int8}"
            )
    return None


def _fits_bf16(weight: Weight) -> bool:
    """Tell whether bf16 holds a dense weight exactly; what is not a number is for `verify` to find."""
    if weight.form.dtype == "BF16":
        return True
    # An expert, or some rows, at a time.
    step = 1 if len(weight.shape) == 3 else max(1, (1 << 20) // max(1, weight.shape[-1]))
    for start in range(0, weight.shape[0], step):
        part = weight.part(slice(start, start + step))
        assert not isinstance(part, QTensor)
        rounded = part.astype(DTYPES["BF16"]).astype(part.dtype)
        if not np.array_equal(rounded, part, equal_nan=True):
            return False
    return True
