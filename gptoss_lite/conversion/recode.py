"""Weights in another form than their file has them: read a part at a time, recoded on the way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptoss_lite.checkpoint.names import Name
from gptoss_lite.checkpoint.weights import Part, Tensor, Tiled, Weight
from gptoss_lite.quant import QTensor, codecs
from gptoss_lite.quant.formats import Format

Encoder: TypeAlias = Callable[[Name, Part, NDArray[Any], Format], QTensor]

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
PART_BYTES = 32 << 20  # of the rows of a matrix that are read at a time


@dataclass(slots=True)
class Errors:
    """What recoding a weight has cost so far, see TensorReport."""

    squared: float = 0.0
    squared_error: float = 0.0
    largest_error: float = 0.0

    def add(self, squared: float, squared_error: float, largest_error: float) -> None:
        """Count one part more."""
        self.squared += squared
        self.squared_error += squared_error
        self.largest_error = max(self.largest_error, largest_error)


@dataclass(frozen=True, slots=True)
class Recoded:
    """A weight of a checkpoint, and the form that it is to have: a format, or the dtype of floats.

    encode: quantises one part of it.
    """

    name: Name
    weight: Weight
    form: Format | str
    encode: Encoder
    errors: Errors = field(default_factory=Errors)

    @property
    def before(self) -> Format | str:
        """The form in the file."""
        return self.weight.format or self.weight.form.dtype

    @property
    def is_quantised(self) -> bool:
        """Whether it is newly quantised: what is kept, or only becomes floats, loses nothing."""
        return not isinstance(self.form, str) and self.before != self.form

    def parts(self) -> Iterator[Tensor]:
        """Yield experts one by one, or some rows at a time, each as the file has it."""
        for index in self._indices():
            yield self._recode(index, self.weight.part(index))

    def _indices(self) -> Iterator[Part]:
        shape = self.name.shape
        if len(shape) == 3:
            yield from range(shape[0])
        elif isinstance(self.weight, Tiled):  # whose rows are not apart
            yield slice(None)
        else:
            rows = max(32, PART_BYTES * shape[0] // max(1, self.weight.nbytes) // 32 * 32)
            for start in range(0, shape[0], rows):
                yield slice(start, start + rows)

    def _recode(self, index: Part, tensor: Tensor) -> Tensor:
        form = self.form
        if isinstance(form, str):
            dtype = DTYPES[form]
            if isinstance(tensor, QTensor):
                return codecs.decode(tensor, dtype)
            return tensor if tensor.dtype == dtype else tensor.astype(dtype)
        if isinstance(tensor, QTensor):
            if self.before == form:
                return tensor
            tensor = codecs.decode(tensor, np.dtype(np.float32))
        coded = self.encode(self.name, index, tensor, form)
        self.errors.add(*codecs.errors(tensor, coded))
        return coded
