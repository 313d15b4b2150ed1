"""Quantised weights in the order in which a backend reads them: what a converted file may hold them in."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.errors import FormatError
from gptoss_lite.kernels.cpu.layout import TILE_ROWS
from gptoss_lite.kernels.cpu.layout import Layout as CPULayout
from gptoss_lite.kernels.cpu.records import read_codes, read_scales, room, write
from gptoss_lite.kernels.cuda import layout as tiles
from gptoss_lite.kernels.cuda.layout import BLOCK, HEAD_DIM, Layout, gate_up_rows, plain_rows, rope_rows
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor
from gptoss_lite.quant.formats import MXFP4, Format, Int8, Scales
from gptoss_lite.quant.int8 import SCALE_DTYPES, invalid_bits
from gptoss_lite.quant.mxfp4 import BLOCK_BYTES, SUSPECT
from gptoss_lite.threads import spread

# Fragment order, one record a matrix, with all that the checkpoint says: no scale is adapted to fp16.
CUDA_TILES = "cuda-t16-v1"
# Sixteen rows side by side, one record a matrix, the same for every CPU and every kind of matrix.
CPU_TILES = "cpu-r16-v1"
# The checkpoint's own order as one run of bytes: blocks or codes of all experts, then all scales. Conversions
# wrote it before there were CPU_TILES, and such files are read.
CPU_ROWS = "cpu-rows-v1"
LAYOUTS = (CUDA_TILES, CPU_TILES, CPU_ROWS)

_TASK_BYTES = 1 << 22  # of codes that a thread packs at a time
_Bytes: TypeAlias = NDArray[np.uint8]
_KINDS = {
    "self_attn.q_proj.weight": "qkv", "self_attn.k_proj.weight": "qkv", "self_attn.v_proj.weight": "qkv",
    "self_attn.o_proj.weight": "out", "mlp.experts.gate_up_proj": "gate_up", "mlp.experts.down_proj": "down",
    "lm_head.weight": "lm_head",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class PackedTensor(QTensor):
    """A quantised weight as a converted file has it.

    data: uint8, of the shape that `packed_shape` tells. format, shape: of the weight once unpacked. Raises
    FormatError where these do not fit together.
    """

    data: Any
    layout: str
    format: Format = field()  # field(): or the base class's properties would be taken for defaults
    shape: tuple[int, ...] = field()
    kind: str

    def __post_init__(self) -> None:
        """Check dtype and shape."""
        wanted = packed_shape(self.format, self.shape, self.kind, self.layout)
        if self.data.dtype != np.uint8 or self.data.shape != wanted:
            raise FormatError(
                f"{self.layout} of {self.shape} in {self.format} is {self.data.dtype} {self.data.shape}:"
                f" must be uint8 {wanted}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes held, padding included."""
        return int(self.data.nbytes)

    @property
    def scales(self) -> NDArray[Any]:
        """The scales alone, unpacked: what the field of that name of `unpack()` is."""
        if self.layout == CPU_ROWS:
            rows: NDArray[Any] = self.unpack().scales
            return rows
        if self.layout == CPU_TILES:
            matrix = cpu_layout(self.format, self.shape)
            bits = read_scales(matrix, self.data.reshape(-1, matrix.nbytes))
            return _from_bits(bits, self.format).reshape(*self.shape[:-1], -1)
        form, order = tile_layout(self.format, self.shape, self.kind)
        is_mxfp4 = form.format is tiles.Format.MXFP4
        take = tiles.unpack_mxfp4_scales if is_mxfp4 else tiles.unpack_int8_scales
        bits = take(form, self.data.reshape(-1, form.nbytes), order)
        return _from_bits(bits, self.format).reshape(*self.shape[:-1], -1)

    @property
    def is_suspect(self) -> bool:
        """Whether a scale in tiles is so large that `quant.qtensor.invalid_scale` must tell if it can be.

        Looks at the scales where they lie, and at nothing else.
        """
        form: CPULayout | Layout = cpu_layout(self.format, self.shape)
        if self.layout == CUDA_TILES:
            form, _ = tile_layout(self.format, self.shape, self.kind)
        scales = self.data.reshape(-1, form.nbytes)[:, form.code_bytes :]
        match self.format:
            case MXFP4():
                return bool(scales.max() >= SUSPECT)
            case Int8(scales=kind):
                held: Scales = "float16" if kind == "float16" else "bf16"
                return any(invalid_bits(record.view(np.uint16), held) is not None for record in scales)

    def unpack(self) -> MXFP4Tensor | Int8Tensor:
        """Return the weight in its natural order; see the function `unpack`."""
        return unpack(self.data, self.layout, self.format, self.shape, self.kind)

    def dequantize(self, xp: Any = np) -> Any:
        """Return the values as float32 (..., N, K); `data` must be NumPy's."""
        return self.unpack().dequantize(xp)

    def map(self, fn: Callable[[Any], Any]) -> Self:
        """Return the same weight with `fn(data)`."""
        return type(self)(fn(self.data), self.layout, self.format, self.shape, self.kind)

    def __getitem__(self, index: Any) -> Self:
        """Return an expert, or a slice of the experts, of a stack in tiles."""
        is_stack = len(self.shape) == 3 and self.layout != CPU_ROWS
        if not is_stack or not isinstance(index, int | np.integer | slice):
            raise IndexError(f"cannot index {self.layout} of {self.shape} by {index}: unpack it first")
        data = self.data[index]
        shape = (*data.shape[:-1], *self.shape[1:])
        return type(self)(data, self.layout, self.format, shape, self.kind)


def kind_of(name: str) -> str | None:
    """Tell what a weight is for by its canonical name; None for what is never packed, embeddings too."""
    return next((kind for end, kind in _KINDS.items() if name.endswith(end)), None)


def row_order(kind: str, rows: int) -> NDArray[np.int32]:
    """Name the natural row of each row in tiles, -1 for padding; int32 (tiles * 16,).

    Raises FormatError where no matrix of this kind has so many rows.
    """
    match kind:
        case "qkv":
            if rows % HEAD_DIM:
                raise FormatError(f"qkv has {rows} rows: {CUDA_TILES} needs whole heads of {HEAD_DIM}")
            return rope_rows(rows // HEAD_DIM, HEAD_DIM)
        case "gate_up":
            if rows % 2:
                raise FormatError(f"gate_up has {rows} rows: must be even, gate and up in turn")
            return gate_up_rows(rows // 2)
    return plain_rows(rows)


def tile_layout(format: Format, shape: tuple[int, ...], kind: str) -> tuple[Layout, NDArray[np.int32]]:
    """Lay one matrix of a weight out in tiles, as files hold it -> its layout and the order of its rows."""
    rows, columns = shape[-2:]
    order = row_order(kind, rows)
    rows = len(order) if kind == "gate_up" else rows  # padded in pairs, for their results to be padded
    match format:
        case MXFP4():
            return Layout(tiles.Format.MXFP4, rows, columns, bf16=True), order
        case Int8(scales=scales):
            group, is_bf16 = format.group(columns), scales != "float16"
            return Layout(tiles.Format.INT8, rows, columns, group, scale_bf16=is_bf16), order


def cpu_layout(format: Format, shape: tuple[int, ...]) -> CPULayout:
    """Lay one matrix of a weight (E, N, K) or (N, K) out in the tiles of CPUs: where a record has what."""
    rows, columns = shape[-2:]
    match format:
        case MXFP4():
            return CPULayout(rows, columns // 2, columns // BLOCK, 1, True)
        case Int8():
            return CPULayout(rows, columns, columns // format.group(columns), 2, False)


def packed_shape(format: Format, shape: tuple[int, ...], kind: str, layout: str) -> tuple[int, ...]:
    """Tell the shape of a packed weight's uint8 array: (E, nbytes) or (nbytes,) in tiles, else flat.

    shape: (E, N, K) or (N, K). Raises FormatError for an unknown layout, and for a shape that cannot be.
    """
    format.check(shape[-1], f"{kind} {shape}")
    if layout not in LAYOUTS:
        raise FormatError(f"unknown layout {layout!r}: choose {' or '.join(LAYOUTS)}")
    if layout == CPU_ROWS:
        codes, scales = _row_bytes(format, shape)
        return (codes + scales,)
    if layout == CPU_TILES:
        return (*shape[:-2], cpu_layout(format, shape).nbytes)
    return (*shape[:-2], tile_layout(format, shape, kind)[0].nbytes)


def pack(tensor: QTensor, kind: str, layout: str) -> _Bytes:
    """Bring a quantised weight (E, N, K) or (N, K) into a layout; see `packed_shape`.

    It comes back from `unpack`, every byte of it. Raises FormatError as `packed_shape` does.
    """
    if layout == CPU_TILES:
        return pack_tiles(tensor)
    packed = np.empty(packed_shape(tensor.format, tensor.shape, kind, layout), np.uint8)
    codes, scales = _fields(tensor)
    codes = np.ascontiguousarray(codes).view(np.uint8)
    if layout == CPU_ROWS:
        packed[: codes.size] = codes.reshape(-1)
        packed[codes.size :] = np.ascontiguousarray(scales).reshape(-1).view(np.uint8)
        return packed
    form, order = tile_layout(tensor.format, tensor.shape, kind)
    records, rows = packed.reshape(-1, form.nbytes), tensor.shape[-2]
    bits = np.ascontiguousarray(_to_bits(scales, tensor.format)).reshape(len(records), rows, -1)
    for record, *parts in zip(records, codes.reshape(len(records), rows, -1), bits, strict=True):
        _pack_record(form, order, record, *parts)
    return packed


def pack_tiles(tensor: QTensor, threads: int = 1) -> _Bytes:
    """Bring a quantised weight into the tiles of CPUs, as `pack` does, by so many threads.

    tensor: (E, N, K) or (N, K); read where it lies, perhaps mapped and at any address. Returns uint8 (E,
    record) or (record,), see `cpu_layout`. Raises FormatError as `packed_shape` does.
    """
    format, shape = tensor.format, tensor.shape
    form = cpu_layout(format, shape)
    packed = room(packed_shape(format, shape, "matrix", CPU_TILES))
    records = packed.reshape(-1, form.nbytes)
    codes, scales = (field.reshape(len(records), form.rows, -1) for field in _fields(tensor))
    step = max(1, _TASK_BYTES // (TILE_ROWS * form.row_bytes))
    tasks = [(expert, first) for expert in range(len(records)) for first in range(0, form.tiles, step)]

    def work(task: tuple[int, int]) -> None:
        expert, first = task
        rows = slice(first * TILE_ROWS, (first + step) * TILE_ROWS)
        bits = _to_bits(scales[expert, rows], format)
        write(form, first, codes[expert, rows].view(np.uint8), bits, records[expert])

    for _ in spread(work, tasks, threads):
        pass
    return packed


def unpack(
    data: _Bytes, layout: str, format: Format, shape: tuple[int, ...], kind: str
) -> MXFP4Tensor | Int8Tensor:
    """Undo `pack`; what was packed as rows is not copied, but for int8's scales where they lie misaligned."""
    codes_bytes, _ = _row_bytes(format, shape)
    if layout == CPU_ROWS:
        codes, scales = data[:codes_bytes], data[codes_bytes:]
        if isinstance(format, Int8):
            scales = np.require(scales.view(SCALE_DTYPES[format.scales]), requirements="A")
    elif layout == CPU_TILES:
        matrix = cpu_layout(format, shape)
        records = data.reshape(-1, matrix.nbytes)
        codes, scales = read_codes(matrix, records), _from_bits(read_scales(matrix, records), format)
    else:
        form, order = tile_layout(format, shape, kind)
        records, rows = data.reshape(-1, form.nbytes), shape[-2]
        codes = np.empty((len(records), rows, codes_bytes // (len(records) * rows)), np.uint8)
        units = form.columns // form.group
        bits = np.empty((len(records), rows, units), np.uint8 if isinstance(format, MXFP4) else np.uint16)
        for record, *parts in zip(records, codes, bits, strict=True):
            _unpack_record(form, order, record, *parts)
        scales = _from_bits(bits, format)
    scales = scales.reshape(*shape[:-1], -1)
    if isinstance(format, MXFP4):
        return MXFP4Tensor(codes.reshape(*scales.shape, BLOCK_BYTES), scales)
    return Int8Tensor(codes.reshape(-1).view(np.int8).reshape(shape), scales)


def _fields(tensor: QTensor) -> tuple[NDArray[Any], NDArray[Any]]:
    match tensor:
        case MXFP4Tensor(blocks=codes, scales=scales) | Int8Tensor(codes=codes, scales=scales):
            return codes, scales
    raise FormatError(f"cannot pack {type(tensor).__name__}: give it in its natural order")


def _row_bytes(format: Format, shape: tuple[int, ...]) -> tuple[int, int]:
    """Count the bytes of codes and of scales in natural order."""
    count = math.prod(shape)
    match format:
        case MXFP4():
            return count // 2, count // BLOCK
        case Int8(scales=scales):
            return count, count // format.group(shape[-1]) * SCALE_DTYPES[scales].itemsize


def _to_bits(scales: NDArray[Any], format: Format) -> NDArray[Any]:
    """Turn int8's scales into the 16 bits that tiles hold; E8M0 becomes bf16, its smallest a subnormal."""
    if isinstance(format, MXFP4):
        return scales
    if format.scales == "e8m0":
        return np.where(scales == 0, np.uint16(0x40), scales.astype(np.uint16) << np.uint16(7))
    return scales.view(np.uint16)


def _from_bits(bits: NDArray[Any], format: Format) -> NDArray[Any]:
    if isinstance(format, MXFP4):
        return bits
    if format.scales == "e8m0":
        return (bits >> 7).astype(np.uint8)
    return bits.view(SCALE_DTYPES[format.scales])


def _pack_record(
    form: Layout, order: NDArray[np.int32], record: _Bytes, codes: _Bytes, scales: NDArray[Any]
) -> None:
    """Pack one matrix: the bytes of its codes (N, ...), scales (N, units) -> record uint8 (form.nbytes,)."""
    if (fast := _fast()) is not None:
        is_mxfp4 = form.format is tiles.Format.MXFP4
        kernel = fast.pack_mxfp4 if is_mxfp4 else fast.pack_int8
        kernel(codes, scales, order, *_parts(form, record))
    elif form.format is tiles.Format.MXFP4:
        blocks = codes.reshape(1, *scales.shape, BLOCK_BYTES)
        record[:] = tiles.pack_mxfp4(form, blocks, scales[None], order)[0]
    else:
        record[:] = tiles.pack_int8(form, codes.view(np.int8)[None], scales[None], order)[0]


def _unpack_record(
    form: Layout, order: NDArray[np.int32], record: _Bytes, codes: _Bytes, scales: NDArray[Any]
) -> None:
    """Undo `_pack_record`: codes and scales are written."""
    is_mxfp4 = form.format is tiles.Format.MXFP4
    if (fast := _fast()) is not None:
        kernel = fast.unpack_mxfp4 if is_mxfp4 else fast.unpack_int8
        kernel(*_parts(form, record), order, codes, scales)
    else:
        take = tiles.unpack_mxfp4 if is_mxfp4 else tiles.unpack_int8
        natural, bits = take(form, record[None], order)
        codes[:], scales[:] = natural[0].reshape(codes.shape).view(np.uint8), bits[0]


def _parts(form: Layout, record: _Bytes) -> tuple[NDArray[Any], NDArray[Any]]:
    """View a record as the arrays that the kernels of kernels/cpu/tiles.py take."""
    codes, scales = record[: form.code_bytes].view(np.uint64), record[form.code_bytes :]
    if form.format is tiles.Format.MXFP4:
        return codes.reshape(form.tiles, form.chunks, 8, 8), scales.reshape(form.tiles, form.chunks, 8, 4)
    return (
        codes.reshape(form.tiles, form.chunks, 2, 8, 4, 2),
        scales.view(np.uint16).reshape(form.tiles, form.scale_units, 8, 2),
    )


def _fast() -> Any:
    """Return the kernels for a CPU, None where they cannot be compiled.

    Beside a GPU, Numba may be missing, or have nowhere to write.
    """
    try:
        from gptoss_lite.kernels.cpu import tiles as kernels
    except (ImportError, RuntimeError):
        return None
    return kernels
