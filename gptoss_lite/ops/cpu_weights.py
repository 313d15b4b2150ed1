"""Weights as the CPU kernels take them: quantised ones in tiles, dense ones as the checkpoint has them."""

import itertools
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptoss_lite.kernels.cpu import records
from gptoss_lite.kernels.cpu.layout import TILE_ROWS, Layout
from gptoss_lite.kernels.cpu.linear import Packed
from gptoss_lite.ops.base import Array
from gptoss_lite.packing import CPU_TILES, PackedTensor, cpu_layout, pack_tiles
from gptoss_lite.quant import QTensor, codecs
from gptoss_lite.quant.formats import BLOCK, Format, Int8
from gptoss_lite.threads import spread

_ROWS = 4096  # of a dense matrix that are quantised at a time, a multiple of a tile's


@dataclass(frozen=True, slots=True)
class Tiles:
    """A quantised matrix (N, K) or a stack (E, N, K) in layout cpu-r16-v1.

    format: "mxfp4" or "int8". records uint8 (bytes,) or (E, bytes): codes, and after code_bytes of them
    scales, `groups` a row, each of group_blocks * 32 columns; those of int8 are fp16 if is_fp16, else bf16.
    rows: N.
    """

    format: str
    records: NDArray[np.uint8]
    code_bytes: int
    groups: int
    group_blocks: int
    is_fp16: bool
    rows: int

    @classmethod
    def of(cls, tensor: PackedTensor) -> "Tiles":
        """Take a weight that is in tiles as it is."""
        form, format = cpu_layout(tensor.format, tensor.shape), tensor.format
        name, is_fp16 = ("int8", format.scales == "float16") if isinstance(format, Int8) else ("mxfp4", False)
        rows, columns = tensor.shape[-2:]
        group_blocks = columns // form.row_scales // BLOCK
        return cls(
            name, read_only(tensor.data), form.code_bytes, form.row_scales, group_blocks, is_fp16, rows
        )

    def packed(self, index: int | None = None) -> Packed:
        """Give what kernels take of it: of all, or of one matrix of a stack."""
        records = self.records if index is None else self.records[index]
        return records, self.code_bytes, self.groups, self.group_blocks, self.is_fp16


Dense: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32]  # the bits of bf16, of float32


def dense(tensor: Array) -> Dense:
    """View bf16 as its bits; float16 becomes float32, which holds it exactly, and float32 its bits."""
    is_bf16 = tensor.dtype == ml_dtypes.bfloat16
    bits = np.ascontiguousarray(tensor, None if is_bf16 else np.float32).view(
        np.uint16 if is_bf16 else np.uint32
    )
    return read_only(bits)


def read_only(array: Array) -> Array:
    """View an array as one that cannot be written, as mapped ones are: kernels are compiled for one kind."""
    view = array.view()
    view.flags.writeable = False
    return view


def name_of(weight: Dense) -> str:
    """Spell what a dense weight holds as the kernels do."""
    return "bf16" if weight.itemsize == 2 else "float32"


def tiles(tensor: QTensor, threads: int) -> Tiles:
    """Bring a quantised weight into tiles, without a copy where it is in them."""
    if isinstance(tensor, PackedTensor):
        if tensor.layout == CPU_TILES:
            return Tiles.of(tensor)
        tensor = tensor.unpack()
    data = pack_tiles(tensor, threads)
    tensor.map(let_go)
    return Tiles.of(PackedTensor(data, CPU_TILES, tensor.format, tensor.shape, "matrix"))


def let_go(array: Array) -> Array:
    """Have a mapped array's pages taken off what this process holds; they come back if it is read again."""
    owner: Any = array
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.obj if isinstance(owner, memoryview) else owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and array.flags.c_contiguous:
        first = array.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        start = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        length = first + array.nbytes - start
        if length > 0:
            owner.madvise(mmap.MADV_DONTNEED, start, length)
    return array


def stacked(parts: Sequence[QTensor], threads: int) -> Tiles:
    """Bring quantised matrices of one format into the tiles of one, their rows one after another's."""
    rows = [part.shape[0] for part in parts]
    empty = _Stack(parts[0].format, (sum(rows), parts[0].shape[1]))
    for first, part in zip(itertools.accumulate(rows, initial=0), parts, strict=False):
        empty.place(first, tiles(part, threads).records, part.shape)
    return empty.finished()


def can_be_stacked(parts: Sequence[Array | QTensor]) -> bool:
    """Whether matrices share a format and fill whole tiles."""
    first, *others = parts
    if not isinstance(first, QTensor) or any(part.shape[0] % TILE_ROWS for part in parts):
        return False
    return all(isinstance(part, QTensor) and part.format == first.format for part in others)


def quantised(tensor: Array, threads: int) -> Tiles:
    """Quantise a dense matrix (N, K) to int8 in groups of 32, some rows at a time."""
    stack = _Stack(Int8(), tensor.shape)

    def encode(first: int) -> None:
        part = codecs.encode(tensor[first : first + _ROWS], Int8())
        stack.place(first, pack_tiles(part), part.shape)

    for _ in spread(encode, range(0, tensor.shape[0], _ROWS), threads):
        pass
    return stack.finished()


def can_be_int8(tensor: Array) -> bool:
    """Whether a dense matrix has the columns that int8 takes."""
    return tensor.ndim == 2 and tensor.shape[1] % BLOCK == 0


class _Stack:
    """A matrix in tiles of which some rows at a time are put in place."""

    def __init__(self, format: Format, shape: tuple[int, ...]) -> None:
        self._form = cpu_layout(format, shape)
        data = records.room((self._form.nbytes,))
        data[self._form.scales_end :] = 0
        self._packed = PackedTensor(data, CPU_TILES, format, shape, "matrix")

    def place(self, first: int, record: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
        """Put the record of a matrix of this shape where row `first`, a multiple of 16, is."""
        form, tile = cpu_layout(self._packed.format, shape), first // TILE_ROWS
        for field in (Layout.codes, Layout.scales):
            part = field(form, record)
            field(self._form, self._packed.data)[tile : tile + len(part)] = part

    def finished(self) -> Tiles:
        """Return the whole."""
        return Tiles.of(self._packed)
