"""The layouts that can be written: what each names its tensors, and how it arranges their data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.checkpoint.directory import SCALE_DTYPES, pair_shapes
from gptoss_lite.conversion.recode import Recoded
from gptoss_lite.packing import CPU_TILES, CUDA_TILES, cpu_layout, kind_of, pack, packed_shape, tile_layout
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor, ggufblocks
from gptoss_lite.quant.formats import MXFP4, Int8

Piece: TypeAlias = tuple[NDArray[Any], ...]
_GGUF_ROWS = 512  # that are put together at a time, an even number: as many as the cache holds
TILES = {"packed-cpu": CPU_TILES, "packed-cuda": CUDA_TILES}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file to be written; dtype as safetensors or, in GGUF, as ggml spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """Tensors that are written together, and the weights that they are made of.

    pieces: yields their data in order, each time the next piece of every tensor.
    """

    weights: tuple[Recoded, ...]
    tensors: tuple[Entry, ...]
    pieces: Callable[[], Iterator[Piece]]

    @property
    def name(self) -> str:
        """What it is called in errors and in the journal."""
        return self.tensors[0].name


def jobs(target: str, weights: Sequence[Recoded]) -> list[Job]:
    """Arrange weights as a target has them: "hf", "bf16", "original", "gguf", "packed-cpu", "packed-cuda"."""
    if target == "original":
        sharing: dict[str, list[Recoded]] = {}
        for weight in weights:
            sharing.setdefault(weight.name.original, []).append(weight)
        return [_original(tuple(group)) for group in sharing.values()]
    if target == "gguf":
        return [_gguf(weight) for weight in weights]
    return [_packed(weight, TILES[target]) if target in TILES else _huggingface(weight) for weight in weights]


def _huggingface(weight: Recoded) -> Job:
    name, shape = weight.name.name, weight.name.shape
    match weight.form:
        case MXFP4():
            return _pair(weight, f"{name}_blocks", f"{name}_scales")
        case Int8() as form:
            groups = (*shape[:-1], shape[-1] // form.group(shape[-1]))
            scales = Entry(f"{name}_scales", SCALE_DTYPES[form.scales], groups)
            tensors = Entry(f"{name}_codes", "I8", shape), scales
            return Job((weight,), tensors, lambda: map(_fields, weight.parts()))
        case dtype if weight.name.is_experts:  # stored input-major, unlike every other weight
            turned = Entry(name, dtype, (shape[0], shape[2], shape[1]))
            return Job((weight,), (turned,), lambda: ((part,) for part in weight.turned()))
        case dtype:
            return Job((weight,), (Entry(name, dtype, shape),), lambda: ((part,) for part in _floats(weight)))


def _pair(weight: Recoded, blocks: str, scales: str) -> Job:
    shapes = pair_shapes(weight.name.shape)
    tensors = Entry(blocks, "U8", shapes[0]), Entry(scales, "U8", shapes[1])
    return Job((weight,), tensors, lambda: map(_fields, weight.parts()))


def _floats(weight: Recoded) -> Iterator[NDArray[Any]]:
    for part in weight.parts():
        assert not isinstance(part, QTensor)
        yield part


def _fields(tensor: Any) -> Piece:
    """The packed arrays of a tensor: codes and scales."""
    match tensor:
        case MXFP4Tensor(blocks=blocks, scales=scales):
            return blocks, scales
        case Int8Tensor(codes=codes, scales=scales):
            return codes, scales
    raise TypeError(f"{type(tensor).__name__} has no form on disk")


def _packed(weight: Recoded, layout: str) -> Job:
    name, form, kind = weight.name, weight.form, kind_of(weight.name.name)
    if isinstance(form, str) or kind is None:
        return _huggingface(weight)
    tensor = Entry(f"{name.name}_packed", "U8", packed_shape(form, name.shape, kind, layout))

    def pieces() -> Iterator[Piece]:
        if name.is_experts:  # each a record of its own
            for part in weight.parts():
                assert isinstance(part, QTensor)
                yield (pack(part, kind, layout),)
            return
        left = tensor.shape[0]
        for field in (0, 1):  # all codes, then all scales, and what fills up the record
            for part in weight.parts():
                piece = _tiled(part, kind, layout)[field]
                left -= piece.size
                yield (piece,)
        yield (np.zeros(left, np.uint8),)

    return Job((weight,), (tensor,), pieces)


def _tiled(part: Any, kind: str, layout: str) -> Piece:
    """Pack some rows of a matrix -> their codes, their scales."""
    packed = pack(part, kind, layout)
    if layout == CPU_TILES:
        form = cpu_layout(part.format, part.shape)
        return packed[: form.code_bytes], packed[form.code_bytes : form.scales_end]
    tiles, _ = tile_layout(part.format, part.shape, kind)
    return packed[: tiles.code_bytes], packed[tiles.code_bytes :]


def _original(weights: tuple[Recoded, ...]) -> Job:
    """Queries, keys and values are rows of one tensor there."""
    first = weights[0]
    name, shape = first.name.original, first.name.shape
    if isinstance(first.form, str):
        rows = sum(weight.name.shape[0] for weight in weights)
        tensor = Entry(name, first.form, (rows, *shape[1:]))
        return Job(weights, (tensor,), lambda: ((part,) for weight in weights for part in _floats(weight)))
    return _pair(first, f"{name}.blocks", f"{name}.scales")


def _gguf(weight: Recoded) -> Job:
    """Rows of gates and ups, which alternate, are two tensors there."""
    names, shape, form = weight.name.gguf, weight.name.shape, weight.form
    if len(names) == 2:
        shape = (shape[0], shape[1] // 2, *shape[2:])
    ggml = {MXFP4: "MXFP4", Int8: "Q8_0"}
    dtype = form if isinstance(form, str) else ggml[type(form)]
    tensors = tuple(Entry(name, dtype, shape) for name in names)

    def pieces() -> Iterator[Piece]:
        for part in weight.parts():
            for start in range(0, part.shape[0], _GGUF_ROWS):
                rows = part[start : start + _GGUF_ROWS]
                raw: NDArray[Any] = rows if isinstance(rows, np.ndarray) else ggufblocks.to_blocks(rows)
                if len(names) == 1:
                    yield (raw,)
                elif weight.name.is_experts:  # a part is one expert's rows
                    yield raw[0::2], raw[1::2]
                else:
                    yield raw[:, 0::2], raw[:, 1::2]

    return Job((weight,), tensors, pieces)
