"""How a weight is rounded: by itself, or with regard to what it multiplies."""

from typing import Any

from numpy.typing import NDArray

from gptoss_lite.checkpoint.names import Name
from gptoss_lite.checkpoint.weights import Part
from gptoss_lite.conversion.recode import Encoder
from gptoss_lite.quant import QTensor, codecs
from gptoss_lite.quant.formats import MXFP4, Format


def plain(*, search: bool = True) -> Encoder:
    """Round each weight by itself; search: for the exponents of MXFP4 that leave the least squared error."""

    def encode(name: Name, part: Part, array: NDArray[Any], form: Format) -> QTensor:
        return codecs.encode(array, form, search=search and isinstance(form, MXFP4))

    return encode
