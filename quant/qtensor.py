"""Quantised weights as values: the packed arrays of one format, and the logical shape they stand for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from gptoss_lite.errors import FormatError
from gptoss_lite.quant import int8, mxfp4
from gptoss_lite.quant.formats import BLOCK, MXFP4, Format, Int8, Scales


class QTensor(ABC):
    """A quantised tensor: packed arrays of NumPy or CuPy behind one logical shape.

    `match` on the subclass to reach its fields; `map` moves or shards one; an index takes experts or rows.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor once dequantised."""

    @property
    @abstractmethod
    def format(self) -> Format:
        """The format as data, such as a policy names it."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held, codes and scales together."""

    @abstractmethod
    def dequantize(self, xp: Any = np) -> Any:
        """Return the values as a float32 array of `xp`, which must be the library the fields belong to."""

    @abstractmethod
    def map(self, fn: Callable[[Any], Any]) -> Self:
        """Return a tensor of the same format with `fn` applied to each packed array."""

    def __getitem__(self, index: Any) -> Self:
        """Return the part at `index` over the leading axes; the last axis is packed and stays whole."""
        axes = index if isinstance(index, tuple) else (index,)
        if len(axes) >= len(self.shape) or any(axis is Ellipsis or axis is None for axis in axes):
            raise IndexError(f"cannot index {self.shape} by {index}: give integers or slices of leading axes")
        return self.map(lambda array: array[index])


@dataclass(frozen=True, slots=True, eq=False)
class MXFP4Tensor(QTensor):
    """Weights in MXFP4: (..., N, K), 4.25 bits each.

    blocks: uint8 (..., N, K/32, 16), two codes a byte; scales: uint8 (..., N, K/32), biased powers of two.
    Raises FormatError where these do not fit together.
    """

    blocks: Any
    scales: Any

    def __post_init__(self) -> None:
        """Check dtypes and shapes."""
        if self.blocks.dtype != np.uint8 or self.scales.dtype != np.uint8:
            dtypes = f"{self.blocks.dtype} and {self.scales.dtype}"
            raise FormatError(f"mxfp4 blocks and scales are {dtypes}: must be uint8")
        if self.scales.ndim == 0 or self.blocks.shape != (*self.scales.shape, mxfp4.BLOCK_BYTES):
            raise FormatError(
                f"mxfp4 blocks {self.blocks.shape} do not fit scales {self.scales.shape}:"
                f" blocks must be the scales' shape and {mxfp4.BLOCK_BYTES}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape (..., N, K)."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * BLOCK)

    @property
    def format(self) -> MXFP4:
        """MXFP4 has no choices to make."""
        return MXFP4()

    @property
    def nbytes(self) -> int:
        """Bytes held, blocks and scales together."""
        return int(self.blocks.nbytes + self.scales.nbytes)

    def dequantize(self, xp: Any = np) -> Any:
        """Return the exact values, float32 (..., N, K)."""
        return mxfp4.decode(self.blocks, self.scales, xp)

    def map(self, fn: Callable[[Any], Any]) -> Self:
        """Return a tensor of `fn(blocks)` and `fn(scales)`."""
        return type(self)(fn(self.blocks), fn(self.scales))


@dataclass(frozen=True, slots=True, eq=False)
class Int8Tensor(QTensor):
    """Weights in int8: (..., N, K), with a scale for each group of a row.

    codes: int8 (..., N, K); scales: bfloat16, float16 or E8M0 uint8 (..., N, K / group), where a group is a
    multiple of 32. Raises FormatError where these do not fit together.
    """

    codes: Any
    scales: Any

    def __post_init__(self) -> None:
        """Check dtypes and shapes."""
        if self.codes.dtype != np.int8 or self.scales.dtype.name not in ("bfloat16", "float16", "uint8"):
            dtypes = f"{self.codes.dtype} and {self.scales.dtype}"
            raise FormatError(
                f"int8 codes and scales are {dtypes}: must be int8, and bfloat16, float16 or uint8"
            )
        fits = 0 < self.codes.ndim == self.scales.ndim and self.codes.shape[:-1] == self.scales.shape[:-1]
        groups = self.scales.shape[-1] if fits else 0
        if groups == 0 or self.codes.shape[-1] == 0 or self.codes.shape[-1] % (BLOCK * groups):
            raise FormatError(
                f"int8 codes {self.codes.shape} do not fit scales {self.scales.shape}:"
                f" codes must be the scales' shape, with a multiple of {BLOCK} columns for each scale"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape (..., N, K)."""
        return tuple(self.codes.shape)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return int(self.codes.shape[-1] // self.scales.shape[-1])

    @property
    def format(self) -> Int8:
        """The group and the kind of scales; a group as long as a row is a row's."""
        names: dict[str, Scales] = {"bfloat16": "bf16", "float16": "float16", "uint8": "e8m0"}
        whole = self.scales.shape[-1] == 1
        return Int8(None if whole else self.group, names[self.scales.dtype.name])

    @property
    def nbytes(self) -> int:
        """Bytes held, codes and scales together."""
        return int(self.codes.nbytes + self.scales.nbytes)

    def dequantize(self, xp: Any = np) -> Any:
        """Return the values, code times scale, float32 (..., N, K)."""
        return int8.decode(self.codes, self.scales, xp)

    def map(self, fn: Callable[[Any], Any]) -> Self:
        """Return a tensor of `fn(codes)` and `fn(scales)`."""
        return type(self)(fn(self.codes), fn(self.scales))


def concatenate(tensors: Sequence[Any]) -> Any:
    """Stack matrices (N, K) of one K by rows: arrays, or quantised tensors of one format.

    Raises FormatError where their formats differ.
    """
    first = tensors[0]
    if any(type(tensor) is not type(first) for tensor in tensors):
        raise FormatError("cannot stack matrices of different formats")
    match first:
        case MXFP4Tensor():
            parts = [(tensor.blocks, tensor.scales) for tensor in tensors]
        case Int8Tensor():
            if any(tensor.format != first.format for tensor in tensors):
                raise FormatError("cannot stack int8 matrices of different groups or scales")
            parts = [(tensor.codes, tensor.scales) for tensor in tensors]
        case _:
            return np.concatenate(tensors)
    return type(first)(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def invalid_scale(tensor: QTensor) -> tuple[int, ...] | None:
    """Find the first scale that is NaN or infinite, or takes a value beyond float32; None where none does.

    Returns a position in `scales`.
    """
    match tensor:
        case MXFP4Tensor(blocks=blocks, scales=scales):
            return mxfp4.invalid_scale(blocks, scales)
        case Int8Tensor(scales=scales):
            return int8.invalid_scale(scales)
    raise TypeError(f"no scales in {type(tensor).__name__}")
