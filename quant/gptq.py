"""Quantising with feedback: columns make up for the errors of those before them; knows nothing of the model.

After GPTQ (Frantar et al. 2022, arXiv:2210.17323). For inputs with Gram matrix H, the sum of x x^T, a row's
error e = w - q costs e H e^T. With H = R R^T, R upper triangular, that is the sum over columns of
(e R)_j^2 = R_jj^2 (t_j - q_j)^2, where the target t_j = w_j + sum_{i<j} e_i R_ij / R_jj: so columns are
rounded one after another, each to what is nearest to its target.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import codecs, int8, rows
from gptoss_lite.quant.formats import BLOCK, MXFP4, Format, Int8
from gptoss_lite.quant.qtensor import Int8Tensor, MXFP4Tensor

_DAMPING = 0.01  # of the mean of H's diagonal, added to the diagonal
_COLUMNS = 512  # of R that are multiplied at a time where only a sum is wanted


@dataclass(frozen=True, slots=True)
class Gram:
    """What is known of the inputs x of a matrix: the sum of x x^T over `count` of them, float (K, K)."""

    matrix: NDArray[Any]
    count: int


@dataclass(slots=True)
class Costs:
    """What quantising some rows cost: outputs, the sum of e H e^T; and what rounding by itself would have.

    outputs_plain: of outputs; values_plain: of the weights themselves, the sum of squared errors.
    """

    outputs: float = 0.0
    outputs_plain: float = 0.0
    values_plain: float = 0.0


def quantize(weight: NDArray[Any], gram: Gram, format: Format) -> MXFP4Tensor | Int8Tensor:
    """Quantise one matrix (N, K) for such inputs; see Feedback."""
    return Feedback(gram, format).quantize(weight, Costs())


class Feedback:
    """Quantises rows that multiply the same inputs.

    H is damped by a hundredth of its mean diagonal and, since few inputs say little of how columns go
    together, by K / count of it more. Holds a float32 (K, K); making it takes two of float64. Raises
    FormatError on what is no Gram matrix, and on a K that the format cannot group.
    """

    def __init__(self, gram: Gram, format: Format) -> None:
        matrix = gram.matrix
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.isfinite(matrix).all():
            raise FormatError(f"a Gram matrix is square and finite: this is {matrix.shape}")
        columns = len(matrix)
        format.check(columns, "what multiplies these inputs")
        self.format = format
        damped = matrix.astype(np.float64)
        diagonal = damped.reshape(-1)[:: columns + 1]
        mean = float(diagonal.mean()) or 1.0  # where there was no input, all columns count alike
        self._weights = (diagonal / mean + _DAMPING).astype(np.float32)
        self._damping = mean * (_DAMPING + columns / max(gram.count, 1))
        diagonal += self._damping
        try:
            factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # R
        except np.linalg.LinAlgError:
            raise FormatError("a Gram matrix has no negative eigenvalues: this one has") from None
        self.scale = factor.diagonal().astype(np.float32)  # R_jj
        self.shares = (factor / factor.diagonal()).astype(np.float32)  # R_ij / R_jj

    def quantize(self, weight: NDArray[Any], costs: Costs) -> MXFP4Tensor | Int8Tensor:
        """Quantise rows (N, K) of float16, bfloat16 or float32, and add to `costs` what that cost.

        A row is rounded by itself, for MXFP4 with searched exponents, unless feedback makes it cost less: so
        what that keeps exactly is kept. Raises FormatError as codecs.encode does, and on another K.
        """
        rows.check(weight)
        if weight.ndim != 2 or weight.shape[1] != len(self.scale):
            raise FormatError(f"cannot quantise {weight.shape} for inputs of {len(self.scale)} columns")
        search = isinstance(self.format, MXFP4)
        plain = codecs.encode(weight, self.format, search=search, weights=self._weights if search else None)
        turned = np.ascontiguousarray(weight.T, np.float32)
        run = _Run(self, turned)
        run.settle(0, len(turned))
        plain_errors = turned - codecs.decode(plain, np.float32).T
        cost, plain_cost = self._cost(run.errors), self._cost(plain_errors)
        better = cost < plain_cost
        costs.outputs += float(np.minimum(cost, plain_cost).sum())
        costs.outputs_plain += float(plain_cost.sum())
        costs.values_plain += float(np.square(plain_errors).sum(dtype=np.float64))
        fed = run.tensor()
        arrays = zip(_fields(fed), _fields(plain), strict=True)
        return type(plain)(*(np.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in arrays))

    def _cost(self, errors: NDArray[np.float32]) -> NDArray[np.float64]:
        """Compute e H e^T of rows: errors (K, N) -> (N,)."""
        total: NDArray[np.float64] = -self._damping * np.square(errors).sum(axis=0, dtype=np.float64)
        for start in range(0, len(errors), _COLUMNS):
            stop = min(start + _COLUMNS, len(errors))
            parts = self.shares[:stop, start:stop].T @ errors[:stop]
            total += np.square(parts * self.scale[start:stop, None]).sum(axis=0, dtype=np.float64)
        return np.maximum(total, 0)


class _Run:
    """One pass over the columns of a matrix; arrays are (K, N), so that a column lies in one piece.

    values: targets, then what they were rounded to; errors: weights, then w - q.
    """

    def __init__(self, feedback: Feedback, weights: NDArray[np.float32]) -> None:
        self.feedback = feedback
        self.values, self.errors = weights.copy(), weights.copy()
        columns, count = weights.shape
        match feedback.format:
            case MXFP4():
                self.group = BLOCK
            case Int8() as form:
                self.group = form.group(columns)
                self.codes, self.scales = int8.empty((count, columns), self.group, form.scales)

    def settle(self, start: int, stop: int) -> None:
        """Round columns whose targets include the errors of all before them: by halves, for BLAS's sake."""
        width = stop - start
        if width == self.group:
            self._choose_scales(start, stop)
        if width == 1:
            self._round(start)
            return
        unit = self.group if width > self.group else 1
        middle = start + max(1, width // unit // 2) * unit
        self.settle(start, middle)
        self.values[middle:stop] += (
            self.feedback.shares[start:middle, middle:stop].T @ self.errors[start:middle]
        )
        self.settle(middle, stop)

    def _choose_scales(self, start: int, stop: int) -> None:
        targets = self.values[start:stop]
        match self.feedback.format:
            case MXFP4():
                weights = self.feedback.scale[start:stop] ** 2
                coded = codecs.encode(targets.T, MXFP4(), search=True, weights=weights)
                self.divisor = int8.factors(coded.scales[:, 0])
            case Int8(scales=kind):
                largest = np.abs(targets).max(axis=0)
                stored, self.divisor = int8.choose_scales(largest, kind)
                self.scales[:, start // self.group] = stored
                self.factor = int8.factors(stored)

    def _round(self, column: int) -> None:
        target = self.values[column]
        match self.feedback.format:
            case MXFP4():
                magnitude = np.abs(target) / self.divisor
                step = np.where(magnitude < 2, 0.5, np.where(magnitude < 4, 1, 2)).astype(np.float32)
                value = np.copysign(np.minimum(np.rint(magnitude / step) * step, 6) * self.divisor, target)
            case Int8():
                code = np.clip(np.rint(target / self.divisor), -int8.LARGEST, int8.LARGEST)
                self.codes[:, column] = code
                value = code.astype(np.float32) * self.factor
        self.values[column] = value
        self.errors[column] -= value

    def tensor(self) -> MXFP4Tensor | Int8Tensor:
        """Pack what all columns were rounded to."""
        match self.feedback.format:
            case MXFP4():
                return codecs.encode(self.values.T, MXFP4())  # exact: these are values of MXFP4
            case Int8():
                return Int8Tensor(self.codes, self.scales)


def _fields(tensor: MXFP4Tensor | Int8Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    match tensor:
        case MXFP4Tensor(blocks=blocks, scales=scales):
            return blocks, scales
        case Int8Tensor(codes=codes, scales=scales):
            return codes, scales
