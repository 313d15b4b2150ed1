"""How a weight is rounded: by itself, or, see calibrate, with regard to what it multiplies."""

from collections.abc import Mapping
from typing import Any, Protocol

from numpy.typing import NDArray

from gptoss_lite.checkpoint.names import Name
from gptoss_lite.checkpoint.weights import Part
from gptoss_lite.quant import QTensor, codecs
from gptoss_lite.quant.formats import MXFP4, Format
from gptoss_lite.quant.gptq import Costs


class Encoder(Protocol):
    """Quantises an expert of a weight, or some of its rows.

    costs: by canonical name, what that has cost so far, where it is known what the weight multiplies.
    """

    @property
    def costs(self) -> Mapping[str, Costs]:
        """See the class."""

    def __call__(self, name: Name, part: Part, array: NDArray[Any], form: Format) -> QTensor:
        """Quantise one part (N, K): float16, bfloat16 or float32."""


class Plain:
    """Rounds each weight by itself; search: for the exponents of MXFP4 that leave the least squared error."""

    def __init__(self, *, search: bool = True) -> None:
        self.costs: dict[str, Costs] = {}
        self._search = search

    def __call__(self, name: Name, part: Part, array: NDArray[Any], form: Format) -> QTensor:
        """See Encoder."""
        return codecs.encode(array, form, search=self._search and isinstance(form, MXFP4))
