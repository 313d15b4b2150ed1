"""Which form every weight gets in a target layout, and the refusal of those that would lose something."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.checkpoint.names import Name
from gptoss_lite.checkpoint.weights import Weight
from gptoss_lite.conversion.recode import DTYPES
from gptoss_lite.errors import FormatError
from gptoss_lite.quant.formats import BLOCK, MXFP4, Format, Int8

TARGETS = ("hf", "bf16", "original", "gguf", "packed-cpu", "packed-cuda")

_CHUNK = 1 << 20  # numbers compared at a time


def forms(
    checkpoint: Checkpoint, target: str, names: Mapping[str, Name], chosen: Mapping[str, Format | None]
) -> dict[str, Format | str]:
    """Decide the form of every weight: its chosen format, or the dtype of its floats.

    Raises FormatError where the target cannot hold one without loss, naming it and the targets that can.
    """
    decided: dict[str, Format | str] = {}
    for name, format in chosen.items():
        weight = checkpoint.weights[name]
        decided[name] = _dense(checkpoint, target, names[name], weight) if format is None else format
        if format is not None and target == "bf16":
            decided[name] = "BF16"
        if (problem := _problem(target, names[name], weight, format, decided[name])) is not None:
            fitting = [
                other
                for other in TARGETS
                if _problem(other, names[name], weight, format, format or "") is None
            ]
            advice = f"--to {', '.join(fitting)} would not" if fitting else "no other layout would do either"
            raise FormatError(f"--to {target} would lose {name}: {problem}; {advice}")
    if target.startswith("packed") and not any(isinstance(form, MXFP4 | Int8) for form in decided.values()):
        raise FormatError(
            f"{checkpoint.path} has nothing to pack, for nothing is quantised: quantize it first"
        )
    return decided


def _dense(checkpoint: Checkpoint, target: str, name: Name, weight: Weight) -> str:
    """Choose the dtype of floats: the file's own, as far as layouts do not have customs."""
    dtype = weight.form.dtype
    if target == "bf16":
        return "BF16"
    if name.is_quantisable:
        return dtype if dtype in DTYPES else "BF16"
    if target == "gguf":  # llama.cpp has vectors and routers in float32
        return "F32"
    # ... which says nothing of what they were: bf16 where that holds them.
    from_gguf = checkpoint.layout == "gguf" and dtype == "F32"
    return "BF16" if from_gguf and _fits(weight.tensor(), "BF16") else dtype


def _problem(
    target: str, name: Name, weight: Weight, format: Format | None, form: Format | str
) -> str | None:
    """Say why a target cannot hold a weight as it is, None where it can."""
    match format, target:
        case Int8(scales=scales), "bf16" if scales != "e8m0":
            return f"int8 codes times {scales} scales have more digits than bf16"
        case None, "bf16":
            return (
                None
                if _fits(weight.tensor(), "BF16")
                else f"it is {weight.form.dtype}, and bf16 is not enough"
            )
        case Int8(), "original":
            return "original/ has no int8"
        case MXFP4(), "original" if not name.is_experts:
            return "original/ has mxfp4 for experts alone"
        case None, "original" if name.is_experts:
            return "original/ has its experts in mxfp4 alone"
        case Int8() as int8, "gguf" if (int8.group(name.shape[-1]), int8.scales) != (BLOCK, "float16"):
            return f"GGUF has int8 by groups of 32 with float16 scales, and this is {int8}"
    return None


def _fits(array: Any, dtype: str) -> bool:
    """Tell whether another dtype holds an array exactly."""
    if array.dtype == DTYPES[dtype]:
        return True
    flat: NDArray[Any] = array.reshape(-1)
    return all(
        bool((flat[start : start + _CHUNK].astype(DTYPES[dtype]).astype(np.float32) == part).all())
        for start in range(0, flat.size, _CHUNK)
        for part in [flat[start : start + _CHUNK].astype(np.float32)]
    )
