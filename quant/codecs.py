"""The codecs as fast as the machine has them: compiled where there is Numba, else NumPy; the same bits."""

import math
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import int8, mxfp4, rows
from gptoss_lite.quant.formats import BLOCK, MXFP4, Format, Int8, Scales
from gptoss_lite.quant.qtensor import Int8Tensor, MXFP4Tensor, QTensor


def encode(
    array: NDArray[Any],
    format: Format,
    *,
    search: bool = False,
    weights: NDArray[np.float32] | None = None,
) -> MXFP4Tensor | Int8Tensor:
    """Quantise an array (..., K) of float16, bfloat16 or float32, of any strides, in a few MB of scratch.

    search and weights: for MXFP4, see mxfp4.encode. Raises FormatError on a shape, dtype or number that the
    format does not take, and on a search for int8.
    """
    match format:
        case MXFP4():
            return MXFP4Tensor(*_encode_mxfp4(array, search, weights))
        case Int8(group_size=group, scales=scales):
            if search or weights is not None:
                raise FormatError("int8 scales are not searched for: search and weights are for mxfp4")
            return Int8Tensor(*_encode_int8(array, group, scales))


def decode(tensor: QTensor, dtype: Any) -> NDArray[Any]:
    """Expand a quantised tensor (..., K) to float32, exactly, or to bfloat16, to nearest, ties to even."""
    if (dtype := np.dtype(dtype)) not in (np.float32, ml_dtypes.bfloat16):
        raise FormatError(f"cannot expand to {dtype}: choose float32 or bfloat16")
    kernels = _kernels()
    if kernels is None:
        return tensor.dequantize().astype(dtype)  # type: ignore[no-any-return]
    out = np.empty(tensor.shape, dtype)
    bits = out.view(f"u{out.itemsize}")
    for index in rows.chunks(out.shape) if out.ndim > 1 else [(slice(None),)]:
        part = bits[index]
        match tensor:
            case MXFP4Tensor(blocks=blocks, scales=scales):
                codes = _fixed(blocks[index]).reshape(-1, mxfp4.BLOCK_BYTES)
                values = np.asarray(mxfp4.E2M1, np.float32)
                factors = int8.factors(scales[index]).reshape(-1)
                kernels.decode_mxfp4(codes, factors, values, part.reshape(-1, BLOCK))
            case Int8Tensor(codes=codes, scales=scales, group=group):
                factors = int8.factors(scales[index]).reshape(-1)
                kernels.decode_int8(_fixed(codes[index]).reshape(-1, group), factors, part.reshape(-1, group))
    return out


def errors(array: NDArray[Any], tensor: QTensor) -> tuple[float, float, float]:
    """Compare a tensor with its source -> sums of squared values and of squared errors, the largest error.

    array: float16, bfloat16 or float32 of the tensor's shape. The sums are of float64, within each row in an
    order that `row_errors` fixes, and exact over the rows.
    """
    rows.check(array)
    if array.shape != tensor.shape:
        raise FormatError(f"cannot compare {array.shape} with a tensor {tensor.shape}")
    if array.ndim == 1:
        return errors(array[None], tensor.map(lambda part: part[None]))
    compare = getattr(_kernels(), "row_errors", row_errors)
    squared, squared_error, largest = [], [], 0.0
    for index in rows.chunks(array.shape):
        x, q = rows.load(array, index), decode(tensor[index], np.float32)
        sums = np.empty((2, len(x)), np.float64)
        largest = max(largest, float(compare(x, q, *sums)))
        squared += sums[0].tolist()
        squared_error += sums[1].tolist()
    return math.fsum(squared), math.fsum(squared_error), largest


def row_errors(
    x: NDArray[np.float32],
    q: NDArray[np.float32],
    squared: NDArray[np.float64],
    squared_error: NDArray[np.float64],
) -> float:
    """Write sums (R,) of x^2 and (x - q)^2 of rows (R, K) and return the largest |x - q|: the definition.

    Column k adds to lane k mod 32, one after another; then halves of the lanes are added to each other.
    """
    values = x.astype(np.float64)
    differences = values - q
    for terms, sums in ((values, squared), (differences, squared_error)):
        lanes = np.zeros((len(x), BLOCK), np.float64)
        for k in range(0, x.shape[1], BLOCK):
            lanes += terms[:, k : k + BLOCK] ** 2
        while (half := lanes.shape[1] // 2) > 0:
            lanes = lanes[:, :half] + lanes[:, half:]
        sums[:] = lanes[:, 0]
    return float(np.abs(differences).max(initial=0))


def _encode_mxfp4(
    array: NDArray[Any], search: bool, weights: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    kernels = _kernels()
    if kernels is None or array.ndim < 2 or not array.size:
        return mxfp4.encode(array, search, weights)
    rows.check(array)
    weights = mxfp4.check_weights(array, search, weights)
    ones = np.ones(array.shape[-1], np.float32)
    blocks, scales = mxfp4.empty(array.shape)
    for index in rows.chunks(array.shape):
        w = ones if weights is None else weights[index[:-1]]
        x = _fixed(rows.load(array, index))
        if not kernels.encode_mxfp4(x, search, weights is not None, _fixed(w), blocks[index], scales[index]):
            raise rows.not_finite(array, index)
    return blocks, scales


def _encode_int8(
    array: NDArray[Any], group: int | None, scales: Scales
) -> tuple[NDArray[np.int8], NDArray[Any]]:
    kernels = _kernels()
    if kernels is None or array.ndim < 2 or not array.size:
        return int8.encode(array, group, scales)
    length = int8.check(array, group, scales)
    codes, stored = int8.empty(array.shape, length, scales)
    for index in rows.chunks(array.shape):
        x = _fixed(rows.load(array, index))
        largest = np.empty((len(x), array.shape[-1] // length), np.float32)
        kernels.largest_int8(x, largest)
        if not np.isfinite(largest).all():
            raise rows.not_finite(array, index)
        stored[index], divisor = int8.choose_scales(largest, scales)
        kernels.encode_int8(x, divisor, codes[index])
    return codes, stored


def _fixed(array: NDArray[Any]) -> NDArray[Any]:
    """View as contiguous and read-only, which mapped files are: Numba compiles for either kind apart."""
    fixed = np.ascontiguousarray(array).view()
    fixed.flags.writeable = False
    return fixed


def _kernels() -> ModuleType | None:
    """Import the compiled kernels, if this machine can have them."""
    try:
        from gptoss_lite.kernels.cpu import codec
    except (ImportError, RuntimeError):  # no Numba, or it found no directory to keep compiled code in
        return None
    return codec
