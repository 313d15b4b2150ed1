"""The weight toolkit: quantised tensors and their codecs; knows nothing of the model."""

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import codecs, int8
from gptoss_lite.quant.formats import BLOCK, MXFP4, Int8, Scales
from gptoss_lite.quant.qtensor import Int8Tensor, MXFP4Tensor, QTensor, concatenate

__all__ = ["Int8Tensor", "MXFP4Tensor", "QTensor", "concatenate", "quantize"]


@overload
def quantize(
    array: NDArray[Any],
    format: Literal["mxfp4"],
    *,
    search: bool = ...,
    weights: NDArray[np.float32] | None = ...,
) -> MXFP4Tensor: ...
@overload
def quantize(
    array: NDArray[Any], format: Literal["int8"], *, group: int | None = ..., scales: Scales = ...
) -> Int8Tensor: ...
@overload
def quantize(
    array: NDArray[Any],
    format: str,
    *,
    group: int | None = ...,
    scales: Scales = ...,
    search: bool = ...,
    weights: NDArray[np.float32] | None = ...,
) -> MXFP4Tensor | Int8Tensor: ...
def quantize(
    array: NDArray[Any],
    format: str,
    *,
    group: int | None = BLOCK,
    scales: Scales = "bf16",
    search: bool = False,
    weights: NDArray[np.float32] | None = None,
) -> MXFP4Tensor | Int8Tensor:
    """Quantise an array (..., N, K) of float16, bfloat16 or float32 to `format`: "mxfp4" or "int8".

    The logical shape stays; K must be a multiple of 32. For int8, `group` columns of a row share a scale, a
    multiple of 32 that divides K, or None for whole rows; `scales` are "bf16", "float16" or "e8m0", powers of
    two. For mxfp4, `search` takes the exponents of least squared error instead of those of the OCP
    specification, each column's errors counting as much as `weights` says, float32 (K,) or (..., K). Works in
    a few MB of scratch.
    Raises FormatError on an unknown format, a shape or dtype that does not fit, and on NaN or infinity.
    """
    if not isinstance(array, np.ndarray):
        raise FormatError(f"cannot quantise {type(array).__name__}: give a NumPy array")
    match format:
        case "mxfp4":
            return codecs.encode(array, MXFP4(), search=search, weights=weights)
        case "int8":
            int8.check(array, group, scales)  # whose errors name the array
            return codecs.encode(array, Int8(group, scales), search=search, weights=weights)
        case _:
            raise FormatError(f"unknown format {format!r}: choose mxfp4 or int8")
