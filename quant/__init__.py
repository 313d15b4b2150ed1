"""The weight toolkit: quantised tensors and their codecs; knows nothing of the model."""

from typing import Any, Literal, overload

from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import int8, mxfp4
from gptoss_lite.quant.formats import BLOCK, Scales
from gptoss_lite.quant.qtensor import Int8Tensor, MXFP4Tensor, QTensor, concatenate

__all__ = ["Int8Tensor", "MXFP4Tensor", "QTensor", "concatenate", "quantize"]


@overload
def quantize(array: NDArray[Any], format: Literal["mxfp4"]) -> MXFP4Tensor: ...
@overload
def quantize(
    array: NDArray[Any], format: Literal["int8"], *, group: int | None = ..., scales: Scales = ...
) -> Int8Tensor: ...
@overload
def quantize(
    array: NDArray[Any], format: str, *, group: int | None = ..., scales: Scales = ...
) -> MXFP4Tensor | Int8Tensor: ...
def quantize(
    array: NDArray[Any], format: str, *, group: int | None = BLOCK, scales: Scales = "bf16"
) -> MXFP4Tensor | Int8Tensor:
    """Quantise an array (..., N, K) of float16, bfloat16 or float32 to `format`: "mxfp4" or "int8".

    The logical shape stays; K must be a multiple of 32. For int8, `group` columns of a row share a scale, a
    multiple of 32 that divides K, or None for whole rows; `scales` are "bf16", "float16" or "e8m0", powers of
    two. Works in a few MB of scratch.
    Raises FormatError on an unknown format, a shape or dtype that does not fit, and on NaN or infinity.
    """
    match format:
        case "mxfp4":
            return MXFP4Tensor(*mxfp4.encode(array))
        case "int8":
            return Int8Tensor(*int8.encode(array, group, scales))
        case _:
            raise FormatError(f"unknown format {format!r}: choose mxfp4 or int8")
