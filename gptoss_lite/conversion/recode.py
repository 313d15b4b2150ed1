"""Weights in another form than their file has them: read a part at a time, recoded on the way."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptoss_lite.checkpoint.names import Name
from gptoss_lite.checkpoint.weights import Part, Tensor, Tiled, Weight
from gptoss_lite.conversion.encoders import Encoder
from gptoss_lite.quant import QTensor, codecs
from gptoss_lite.quant.formats import Format
from gptoss_lite.quant.gptq import Costs

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
PART_BYTES = 32 << 20  # of the rows of a matrix that are read at a time
_TURNED_ROWS = 128  # that are turned round at a time, out of the cache
_ROWS = 64  # of which parts are multiples: whole heads, and whole tiles


@dataclass(slots=True)
class Errors:
    """What recoding a weight has cost so far, see TensorReport; costs: where a calibration decided."""

    squared: float = 0.0
    squared_error: float = 0.0
    largest_error: float = 0.0
    costs: Costs | None = None

    def add(self, squared: float, squared_error: float, largest_error: float) -> None:
        """Count one part more."""
        self.squared += squared
        self.squared_error += squared_error
        self.largest_error = max(self.largest_error, largest_error)


@dataclass(slots=True)
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

    def parts(self) -> Iterator[Tensor]:
        """Yield experts one by one, or some rows at a time, of the form that they are to have."""
        shape = self.name.shape
        if len(shape) == 3:
            for expert in range(shape[0]):
                yield self._recode(expert, self.weight.part(expert))
            return
        rows = max(_ROWS, PART_BYTES * shape[0] // max(1, self.weight.nbytes) // _ROWS * _ROWS)
        # Tiles have their rows apart only once all of them are unpacked.
        whole = self.weight.part(slice(None)) if isinstance(self.weight, Tiled) else None
        for start in range(0, shape[0], rows):
            part = slice(start, start + rows)
            yield self._recode(part, self.weight.part(part) if whole is None else whole[part])

    def turned(self) -> Iterator[NDArray[Any]]:
        """Yield experts one by one as floats (K, N), input-major; one array may serve for all of them."""
        experts, rows, columns = self.name.shape
        out = np.empty((columns, rows), DTYPES[str(self.form)])
        bits = out.view(f"u{out.itemsize}")  # copied faster than ml_dtypes' bfloat16
        for expert in range(experts):
            tensor = self.weight.part(expert)
            if isinstance(tensor, np.ndarray) and tensor.T.flags.c_contiguous:
                yield self._floats(tensor.T)
                continue
            for start in range(0, rows, _TURNED_ROWS):
                span = slice(start, start + _TURNED_ROWS)
                bits[:, span] = self._floats(tensor[span]).view(bits.dtype).T
            yield out

    def _recode(self, index: Part, tensor: Tensor) -> Tensor:
        form = self.form
        if isinstance(form, str):
            return self._floats(tensor)
        if isinstance(tensor, QTensor):
            if self.before == form:
                return tensor
            tensor = codecs.decode(tensor, np.dtype(np.float32))
        coded = self.encode(self.name, index, tensor, form)
        self.errors.add(*codecs.errors(tensor, coded))
        self.errors.costs = self.encode.costs.get(self.name.name)
        return coded

    def _floats(self, tensor: Tensor) -> NDArray[Any]:
        """Give a tensor the dtype that it is to have, which is exact."""
        dtype = DTYPES[str(self.form)]
        if isinstance(tensor, QTensor):
            return codecs.decode(tensor, dtype)
        return tensor if tensor.dtype == dtype else tensor.astype(dtype)
