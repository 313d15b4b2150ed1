"""The ways in which a file holds one weight, and how each is read: whole, or a part at a time."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.packing import CPU_ROWS, PackedTensor
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor, ggufblocks
from gptoss_lite.quant.formats import MXFP4, Format, Int8, Scales
from gptoss_lite.quant.qtensor import invalid_scale
from gptoss_lite.quant.tensorfile import Note, StoredTensor, ignore
from gptoss_lite.threads import spread

Part: TypeAlias = int | slice  # an expert of a stack, or rows of a matrix
Tensor: TypeAlias = NDArray[Any] | QTensor

_ROWS = 4096  # of a matrix that are checked at a time


@dataclass(frozen=True, slots=True)
class StoredForm:
    """How a checkpoint holds one tensor.

    dtype: "BF16", "F16", "F32", or of a packed one, scales included, "MXFP4" or "INT8". group: columns
    that share a scale, for INT8, is_row whether these are all, and scales their kind.
    """

    dtype: str
    nbytes: int
    group: int = 32
    scales: Scales | None = None
    is_row: bool = False


@dataclass(frozen=True, slots=True)
class Weight(ABC):
    """One weight where it lies: (..., N, K), of the logical shape `shape`, mapped and read-only."""

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def stored(self) -> tuple[StoredTensor, ...]:
        """The tensors of the file that it is made of."""

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.data.size for tensor in self.stored)

    @property
    def format(self) -> Format | None:
        """The format it is quantised in, None where it is dense."""
        return None

    @property
    def form(self) -> StoredForm:
        """The same for a memory plan."""
        match self.format:
            case MXFP4():
                return StoredForm("MXFP4", self.nbytes)
            case Int8() as int8:
                group = int8.group(self.shape[-1])
                return StoredForm("INT8", self.nbytes, group, int8.scales, int8.group_size is None)
        return StoredForm(self.stored[0].dtype, self.nbytes)

    @abstractmethod
    def part(self, part: Part) -> Tensor:
        """Read an expert or some rows; what is quantised stays so, in its natural order."""

    def tensor(self) -> Tensor:
        """Read all of it, as close to what the file has as can be: mapped where no byte has to move."""
        return self.part(slice(None))

    def verify(self, threads: int = 1, note: Note = ignore) -> None:
        """Read it through once and refuse what no model may hold; see Checkpoint.verify."""
        left = self.nbytes

        def note_own(nbytes: int) -> None:  # of a tensor that several weights share, each counts its rows
            nonlocal left
            note(min(left, nbytes))
            left -= min(left, nbytes)

        for stored in self.stored:
            stored.verify(threads, note_own)


@dataclass(frozen=True, slots=True)
class Dense(Weight):
    """Floats: rows of a stored tensor; an expert's matrices may be stored input-major."""

    source: StoredTensor
    rows: slice
    turned: bool = False

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """See Weight.stored."""
        return (self.source,)

    @property
    def nbytes(self) -> int:
        """Bytes on disk of these rows."""
        return int(self.source.data.size // self.source.shape[0] * (self.rows.stop - self.rows.start))

    def part(self, part: Part) -> NDArray[Any]:
        """See Weight.part."""
        array = self.source.array(self.rows, part)
        return array.swapaxes(-1, -2) if self.turned else array


@dataclass(frozen=True, slots=True)
class Alternating(Weight):
    """Dense rows that alternate between two stored tensors, of gates and of ups."""

    gate: StoredTensor
    up: StoredTensor

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """See Weight.stored."""
        return self.gate, self.up

    def part(self, part: Part) -> NDArray[Any]:
        """See Weight.part."""
        pair = self.gate.array(part), self.up.array(part)
        axis = len(pair[0].shape) - len(self.shape) + 2  # of the rows: the second of the whole
        mixed = np.stack(pair, axis=axis)
        return mixed.reshape(*mixed.shape[: axis - 1], -1, *mixed.shape[axis + 1 :])


@dataclass(frozen=True, slots=True)
class MXFP4Pair(Weight):
    """Blocks uint8 (..., N, K/32, 16) and scales uint8 (..., N, K/32), as gpt-oss stores them."""

    blocks: StoredTensor
    scales: StoredTensor

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """See Weight.stored."""
        return self.blocks, self.scales

    @property
    def format(self) -> MXFP4:
        """See Weight.format."""
        return MXFP4()

    def part(self, part: Part) -> MXFP4Tensor:
        """See Weight.part."""
        return MXFP4Tensor(self.blocks.array(part), self.scales.array(part))

    def verify(self, threads: int = 1, note: Note = ignore) -> None:
        """See Weight.verify."""
        Weight.verify(self, threads, note)
        _verify_scales(self.part(slice(None)), self.scales)


@dataclass(frozen=True, slots=True)
class Int8Pair(Weight):
    """Codes int8 (..., N, K) and scales (..., N, K / group) of bf16, fp16, or bytes of E8M0."""

    codes: StoredTensor
    scales: StoredTensor
    quantised: Int8

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """See Weight.stored."""
        return self.codes, self.scales

    @property
    def format(self) -> Int8:
        """See Weight.format."""
        return self.quantised

    def part(self, part: Part) -> Int8Tensor:
        """See Weight.part."""
        return Int8Tensor(self.codes.array(part), self.scales.array(part))

    def verify(self, threads: int = 1, note: Note = ignore) -> None:
        """See Weight.verify."""
        Weight.verify(self, threads, note)
        _verify_scales(self.part(slice(None)), self.scales)


@dataclass(frozen=True, slots=True)
class Tiled(Weight):
    """A weight in the tiles of some backend, see packing."""

    source: StoredTensor
    layout: str
    kind: str
    quantised: Format

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """See Weight.stored."""
        return (self.source,)

    @property
    def format(self) -> Format:
        """See Weight.format."""
        return self.quantised

    def tensor(self) -> QTensor:
        """See Weight.tensor; rows as they come need no unpacking."""
        packed = self._packed()
        return packed.unpack() if self.layout == CPU_ROWS else packed

    def part(self, part: Part) -> QTensor:
        """See Weight.part."""
        packed = self._packed()
        if self.layout == CPU_ROWS or isinstance(part, slice):
            return packed.unpack()[part]
        return packed[part].unpack()

    def _packed(self) -> PackedTensor:
        return PackedTensor(self.source.array(), self.layout, self.quantised, self.shape, self.kind)

    def verify(self, threads: int = 1, note: Note = ignore) -> None:
        """See Weight.verify; unpacks an expert at a time, and only where a scale is suspect."""
        Weight.verify(self, threads, note)
        packed = self._packed()
        if self.layout == CPU_ROWS:
            _verify_scales(packed.unpack(), self.source)
            return
        if not packed.is_suspect:
            return
        experts: list[Part] = list(range(self.shape[0])) if len(self.shape) == 3 else [slice(None)]
        for expert in experts:
            if (position := invalid_scale(self.part(expert))) is not None:
                outer = (expert,) if isinstance(expert, int) else ()
                raise self.source.error(
                    f"holds a scale at {(*outer, *position)} that is NaN or beyond float32"
                )


@dataclass(frozen=True, slots=True)
class GGUFBlocks(Weight):
    """MXFP4 or Q8_0 as ggml interleaves them; rows of gates and ups may alternate between two tensors."""

    sources: tuple[StoredTensor, ...]

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """See Weight.stored."""
        return self.sources

    @property
    def format(self) -> Format:
        """See Weight.format."""
        return ggufblocks.FORMATS[self.sources[0].dtype]

    def part(self, part: Part) -> QTensor:
        """See Weight.part; what it returns is a copy, for codes lie otherwise here."""
        if len(self.sources) == 1:
            return self._take_apart(self.sources[0], part)
        gate, up = (self._take_apart(source, part) for source in self.sources)
        rows = gate.scales.ndim - 2
        if isinstance(gate, MXFP4Tensor) and isinstance(up, MXFP4Tensor):
            mixed = _alternate(gate.blocks, up.blocks, rows), _alternate(gate.scales, up.scales, rows)
            return MXFP4Tensor(*mixed)
        assert isinstance(gate, Int8Tensor) and isinstance(up, Int8Tensor)
        return Int8Tensor(_alternate(gate.codes, up.codes, rows), _alternate(gate.scales, up.scales, rows))

    def _take_apart(self, source: StoredTensor, part: Part) -> MXFP4Tensor | Int8Tensor:
        return ggufblocks.from_blocks(_raw_blocks(source)[part], source.dtype)

    def verify(self, threads: int = 1, note: Note = ignore) -> None:
        """See Weight.verify."""
        Weight.verify(self, threads, note)
        for source in self.sources:
            raw = _raw_blocks(source)
            step = 1 if raw.ndim == 4 else _ROWS
            starts = range(0, len(raw), step)
            parts = [raw[start : start + step] for start in starts]
            look = partial(ggufblocks.invalid_scale, dtype=source.dtype)
            for start, position in zip(starts, spread(look, parts, threads), strict=True):
                if position is not None:
                    row, *inner = start + position[0], *position[1:]
                    scale = ggufblocks.scales(raw[row], source.dtype)[tuple(inner)]
                    _refuse_scale(source, (row, *inner), scale)


def _raw_blocks(source: StoredTensor) -> NDArray[np.uint8]:
    """View a GGUF tensor as its blocks: uint8 (..., K/32, bytes)."""
    *outer, columns = source.shape
    return source.data.reshape(*outer, columns // 32, -1)


def _alternate(gate: NDArray[Any], up: NDArray[Any], axis: int) -> NDArray[Any]:
    """Let rows of two arrays take turns along an axis."""
    mixed = np.empty((*gate.shape[:axis], 2 * gate.shape[axis], *gate.shape[axis + 1 :]), gate.dtype)
    before = (slice(None),) * axis
    mixed[(*before, slice(0, None, 2))] = gate
    mixed[(*before, slice(1, None, 2))] = up
    return mixed


def _verify_scales(tensor: MXFP4Tensor | Int8Tensor, stored: StoredTensor) -> None:
    if (position := invalid_scale(tensor)) is not None:
        _refuse_scale(stored, position, tensor.scales[position])


def _refuse_scale(stored: StoredTensor, position: tuple[int, ...], scale: Any) -> None:
    raise stored.error(f"holds {scale} at {position}: with its block, that is NaN or beyond float32")
