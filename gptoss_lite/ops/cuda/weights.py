"""Weights on the device: uploaded piece by piece, and repacked there into the form that the kernels read."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cuda import ranges
from gptoss_lite.kernels.cuda.launch import weights as repack
from gptoss_lite.kernels.cuda.layout import (
    TILE_ROWS,
    Format,
    Layout,
    mxfp4_filled,
    mxfp4_to_half,
)
from gptoss_lite.kernels.cuda.runtime import Array, Runtime
from gptoss_lite.memory import Plan
from gptoss_lite.ops.base import Use
from gptoss_lite.ops.cuda.hot import HotExperts
from gptoss_lite.packing import PackedTensor, row_order
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor
from gptoss_lite.quant.formats import MXFP4, Int8

_HALF_MAX = 65504.0
_PIECE = 32 << 20  # bytes of a matrix that are uploaded and repacked at a time


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """One packed matrix. data uint8 (layout.nbytes,); order int32, the natural row of each packed one."""

    layout: Layout
    data: Array
    order: Array


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """A packed matrix of each expert: table uint64 (E,) has their addresses, records uint8 (E, nbytes)."""

    layout: Layout
    table: Array
    records: Any


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """A router's weight (E, hidden), bits of bf16 in uint16 or float32."""

    data: Array
    layer: int


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The embedding, rows as the checkpoint has them, and the scales of those that are packed.

    data: (vocab_size, hidden) bits of bf16 or fp16 in uint16, float32, or int8 codes; or MXFP4 blocks uint8
    (vocab_size, hidden / 32, 16). Both may be on the host. is_fp16: the 16-bit numbers of either are fp16.
    """

    data: Any
    scales: Any | None
    is_fp16: bool
    hidden: int


class WeightStore:
    """Gives every weight its place and its form, as the plan has it.

    Products take fp16 operands where weights and activations keep their precision and range in it, and bf16
    operands elsewhere; `bf16[kind, layer]` says which.
    """

    def __init__(self, runtime: Runtime, plan: Plan) -> None:
        self._runtime = runtime
        self._plan = plan
        self._staging: dict[str, Array] = {}
        self._filled: dict[tuple[Layout, bytes], npt.NDArray[Any]] = {}
        self.hot = HotExperts(runtime, plan.hot_experts)
        self.bf16: dict[tuple[str, int | None], bool] = {}
        self.vocab_size = 0

    def prepare(self, tensor: Any, use: Use) -> Matrix | Experts | Router | Table:
        """Bring a checkpoint's tensor to the device in the form its use wants."""
        match use.kind:
            case "embedding":
                return self._embedding(tensor)
            case "router":
                assert use.layer is not None
                is_bf16 = tensor.dtype.name == "bfloat16"
                bits = tensor.view(np.uint16) if is_bf16 else tensor.astype(np.float32)
                return Router(self.upload(bits), use.layer)
            case "gate_up" | "down":
                return self._experts(tensor, use)
        if use.kind == "lm_head":
            self.vocab_size = tensor.shape[0]
        return self._matrix(tensor, use)

    def upload(self, array: npt.NDArray[Any]) -> Array:
        """Copy an array to the device as it is."""
        target = self._runtime.empty(array.shape, array.dtype)
        self._runtime.upload(array, target)
        return target

    def finish(self) -> None:
        """Let go of what only loading needed."""
        self._staging.clear()
        self._filled.clear()

    def _embedding(self, tensor: Any) -> Table:
        match tensor:
            case MXFP4Tensor(blocks=rows, scales=scales) | Int8Tensor(codes=rows, scales=scales):
                floats, placed = scales, self._place(_bits(scales))
            case _:
                rows = floats = tensor
                placed = None
        return Table(self._place(_bits(rows)), placed, floats.dtype == np.float16, tensor.shape[1])

    def _place(self, array: npt.NDArray[Any]) -> Any:
        """Copy a part of the embedding to where the plan wants it."""
        if not self._plan.host_embedding:
            return self.upload(array)
        pinned = self._runtime.pinned(array.shape, array.dtype)
        pinned[...] = array
        return pinned

    def _matrix(self, tensor: Any, use: Use) -> Matrix:
        order = row_order(use.kind, tensor.shape[0])
        layout = self._layout(tensor, tensor.shape[0], use)
        data = self._runtime.empty((layout.nbytes,), np.uint8)
        self._pack(tensor, order, layout, data, in_order=use.kind != "qkv")
        return Matrix(layout, data, self.upload(order))

    def _experts(self, tensor: Any, use: Use) -> Experts:
        assert use.layer is not None
        order = row_order(use.kind, tensor.shape[1])
        # gate_up's rows are padded in pairs, for their results to be padded
        rows = len(order) if use.kind == "gate_up" else tensor.shape[1]
        layout, runtime, experts = self._layout(tensor, rows, use), self._runtime, tensor.shape[0]
        if use.layer < self._plan.first_host_layer:
            records = runtime.empty((experts, layout.nbytes), np.uint8)
            for expert in range(experts):
                self._pack(tensor[expert], order, layout, records[expert])
            first = runtime.address(records)
            addresses = np.arange(first, first + experts * layout.nbytes, layout.nbytes, dtype=np.uint64)
            return Experts(layout, self.upload(addresses), records)
        pinned = runtime.pinned((experts, layout.nbytes), np.uint8)
        packed = self._staged("packed", (layout.nbytes,), np.uint8)
        for expert in range(experts):
            if isinstance(tensor, PackedTensor):
                np.concatenate(self._record(tensor[expert], order, layout), out=pinned[expert])
                continue
            self._pack(tensor[expert], order, layout, packed)
            runtime.copy(packed, pinned[expert])
        return Experts(layout, self.hot.add(use.layer, pinned), pinned)

    def _layout(self, tensor: Any, rows: int, use: Use) -> Layout:
        """Choose a tensor's packed form, and the type of the operands of its products."""
        columns = tensor.shape[-1]
        match tensor.format if isinstance(tensor, QTensor) else None:
            case MXFP4():
                fits, layout = ranges.mxfp4_fits_half(tensor.scales), Layout(Format.MXFP4, rows, columns)
            case Int8() as format:
                scales = tensor.scales
                fits, is_bf16 = ranges.int8_fits_half(scales), scales.dtype != np.float16
                layout = Layout(Format.INT8, rows, columns, format.group(columns), scale_bf16=is_bf16)
            case _:
                fits, layout = ranges.dense_fits_half(tensor), Layout(Format.DENSE, rows, columns)
        bf16 = not fits or use.reach() > _HALF_MAX
        if bf16 and self._runtime.arch == "sm_75":
            where = "lm_head" if use.layer is None else f"{use.kind} of layer {use.layer}"
            raise DeviceError(
                f"{where} goes beyond fp16, and a GPU older than Ampere multiplies nothing else"
            )
        self.bf16[use.kind, use.layer] = bf16
        return replace(layout, bf16=bf16)

    def _pack(
        self, tensor: Any, order: npt.NDArray[Any], layout: Layout, target: Array, *, in_order: bool = False
    ) -> None:
        """Upload one matrix, and repack it unless it is in tiles; in pieces where its rows stay in order."""
        if isinstance(tensor, PackedTensor):
            codes, scales = self._record(tensor, order, layout)
            self._runtime.upload(codes, target[: codes.size])
            self._runtime.upload(scales, target[codes.size :])
            return
        row_bytes = max(1, tensor.nbytes // tensor.shape[0])
        rows = max(1, _PIECE // row_bytes // TILE_ROWS) * TILE_ROWS if in_order else len(order)
        for first in range(0, len(order), rows):
            piece = order[first : first + rows]
            source = tensor[first : first + rows] if in_order else tensor
            relative = np.where(piece < 0, piece, piece - first) if in_order else piece
            self._pack_piece(source, relative, layout, target, first // TILE_ROWS)

    def _record(
        self, tensor: PackedTensor, order: npt.NDArray[Any], layout: Layout
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Take codes and scales of a matrix that is in tiles, adapted to the operands of its products."""
        record = tensor.data
        if layout.format is not Format.MXFP4 or layout.bf16:
            return record[: layout.code_bytes], record[layout.code_bytes :]
        key = layout, order.tobytes()
        if key not in self._filled:
            self._filled[key] = mxfp4_filled(layout, order)
        return mxfp4_to_half(layout, record, self._filled[key])

    def _pack_piece(
        self, source: Any, order: npt.NDArray[Any], layout: Layout, target: Array, first_tile: int
    ) -> None:
        runtime, rows = self._runtime, self._stage("order", order)
        match source:
            case MXFP4Tensor(blocks=blocks, scales=scales):
                parts = self._stage("blocks", blocks), self._stage("scales", scales)
                repack.pack_mxfp4(runtime, *parts, rows, layout, target, first_tile=first_tile)
            case Int8Tensor(codes=codes, scales=scales):
                parts = self._stage("codes", codes), self._stage("scales", _bits(scales))
                repack.pack_int8(runtime, *parts, rows, layout, target, first_tile=first_tile)
            case _:
                values = np.ascontiguousarray(source)
                dense = self._stage("values", _bits(values))
                fp16 = values.dtype == np.float16
                repack.pack_dense(runtime, dense, rows, layout, target, fp16=fp16, first_tile=first_tile)

    def _stage(self, name: str, array: npt.NDArray[Any]) -> Array:
        """Upload an array to scratch memory that the next one of this name takes over."""
        staged = self._staged(name, array.shape, array.dtype)
        self._runtime.upload(np.ascontiguousarray(array), staged)
        return staged

    def _staged(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if name not in self._staging or len(self._staging[name]) < nbytes:
            self._staging[name] = self._runtime.empty((nbytes,), np.uint8)
        return self._staging[name][:nbytes].view(dtype).reshape(shape)


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """View bf16 and fp16 as their bits; the rest is as kernels take it."""
    return array.view(np.uint16) if array.itemsize == 2 else array
