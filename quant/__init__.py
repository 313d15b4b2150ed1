"""The weight toolkit: quantised tensors and their codecs; knows nothing of the model."""

from typing import Any

from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import mxfp4
from gptoss_lite.quant.qtensor import MXFP4Tensor, QTensor

__all__ = ["MXFP4Tensor", "QTensor", "quantize"]


def quantize(array: NDArray[Any], format: str) -> MXFP4Tensor:
    """Quantise an array (..., N, K) of float16, bfloat16 or float32 to `format`; "mxfp4" is the one there is.

    The logical shape stays; K must be a multiple of the format's block. Works in a few MB of scratch.
    Raises FormatError on an unknown format, a shape or dtype that does not fit, and on NaN or infinity.
    """
    match format:
        case "mxfp4":
            return MXFP4Tensor(*mxfp4.encode(array))
        case _:
            raise FormatError(f"unknown format {format!r}: choose mxfp4")
