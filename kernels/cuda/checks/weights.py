"""Packing on the device against packing in NumPy, byte for byte; and weights for the checks of decode."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.checks import Check
from gptoss_lite.kernels.cuda.launch import weights as launch
from gptoss_lite.kernels.cuda.layout import (
    BLOCK,
    MXFP4_HALF_SCALES,
    TILE_ROWS,
    Format,
    Layout,
    gate_up_rows,
    operands,
    pack_dense,
    pack_int8,
    pack_mxfp4,
    plain_rows,
    rope_rows,
)
from gptoss_lite.kernels.cuda.runtime import Array as DeviceArray
from gptoss_lite.kernels.cuda.runtime import Runtime

Array = npt.NDArray[Any]

E2M1 = np.array((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
_POISON = 0xCD


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of weights: what Layout needs besides the shape."""

    format: Format
    bf16: bool = False
    group: int = BLOCK
    scale_bf16: bool = False

    def layout(self, rows: int, columns: int) -> Layout:
        """Lay a matrix out; a group longer than its rows becomes the whole row."""
        return Layout(self.format, rows, columns, min(self.group, columns), self.bf16, self.scale_bf16)

    def __str__(self) -> str:
        kind = "bf16" if self.bf16 else "fp16"
        scales = f" groups {self.group} {'bf16' if self.scale_bf16 else 'fp16'} scales"
        return f"{self.format.name.lower()}{scales if self.format is Format.INT8 else ''}, {kind}"


FORMS = (
    Form(Format.DENSE),
    Form(Format.DENSE, bf16=True),
    Form(Format.INT8, group=32),
    Form(Format.INT8, group=1 << 20, scale_bf16=True),
    Form(Format.INT8, bf16=True, scale_bf16=True),
    Form(Format.MXFP4),
    Form(Format.MXFP4, bf16=True),
)


def upload(rt: Runtime, array: Array) -> DeviceArray:
    """Copy an array to the device."""
    target = rt.empty(array.shape, array.dtype)
    rt.upload(np.ascontiguousarray(array), target)
    return target


def to_bits(x: Array, bf16: bool) -> Array:
    """Round float32 to the bits of bf16 or fp16, to the nearest, ties to even."""
    return operands(x.reshape(-1, 1), bf16)[:, 0].reshape(x.shape)


def to_values(bits: Array, bf16: bool) -> Array:
    """Widen the bits of bf16 or fp16 to float64."""
    values: Array = (bits.astype(np.uint32) << 16).view(np.float32) if bf16 else bits.view(np.float16)
    return values.astype(np.float64)


def mxfp4_values(blocks: Array, scales: Array) -> Array:
    """Decode blocks (..., 16) with their scales -> float64 (..., K)."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = E2M1[codes & 7] * np.where(codes & 8, -1.0, 1.0)
    scaled: Array = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return scaled.reshape(*scales.shape[:-1], -1)


def random_weights(
    rng: np.random.Generator, form: Form, shape: tuple[int, int, int], order: Array
) -> tuple[Array, Array]:
    """Make (E, N, K) weights, rows of length about 1 -> packed uint8 (E, nbytes), their float64 values."""
    E, N, K = shape
    layout, size = form.layout(len(order), K), 1 / np.sqrt(K)
    match form.format:
        case Format.DENSE:
            bits = to_bits((rng.standard_normal(shape) * size).astype(np.float32), form.bf16)
            return pack_dense(layout, bits, order), to_values(bits, form.bf16)
        case Format.INT8:
            codes = rng.integers(-127, 128, shape).astype(np.int8)
            scales = rng.uniform(0.01, 0.03, (E, N, K // layout.group)) * size
            bits = to_bits(scales.astype(np.float32), form.scale_bf16)
            values = codes * np.repeat(to_values(bits, form.scale_bf16), layout.group, axis=-1)
            return pack_int8(layout, codes, bits, order), values
    blocks = rng.integers(0, 256, (E, N, K // BLOCK, BLOCK // 2)).astype(np.uint8)
    bytes_ = (rng.integers(123, 127, (E, N, K // BLOCK)) + round(np.log2(size))).astype(np.uint8)
    return pack_mxfp4(layout, blocks, bytes_, order), mxfp4_values(blocks, bytes_)


def _packs(rt: Runtime, form: Form, order: Array, K: int, source: str = "") -> None:
    """Expect the bytes of layout.py, in two runs of tiles and in whole."""
    rng = np.random.default_rng(K + len(order))
    N, layout = int(order.max()) + 1, form.layout(len(order), K)
    pack: Any
    match form.format:
        case Format.DENSE:
            # Big and small, halfway between two steps, and both zeros.
            values = np.ldexp(rng.integers(-(1 << 12), 1 << 12, (N, K)) / 2048, rng.integers(-16, 13, (N, K)))
            values = np.where(rng.random((N, K)) < 0.1, -0.0, values).astype(np.float32)
            given = values if source == "float32" else to_bits(values, source == "bf16")
            if source != "float32":
                values = to_values(given, source == "bf16").astype(np.float32)
            want = pack_dense(layout, to_bits(values, form.bf16)[None], order)[0]
            arrays = [upload(rt, given)]
            pack = partial(launch.pack_dense, fp16=source == "fp16")
        case Format.INT8:
            codes = rng.integers(-128, 128, (N, K)).astype(np.int8)
            scales = rng.integers(0, 255 if source == "e8m0" else 1 << 15, (N, K // layout.group))
            scales = scales.astype(np.uint8 if source == "e8m0" else np.uint16)
            bits = scales
            if source == "e8m0":
                powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
                bits = (powers.view(np.uint32) >> 16).astype(np.uint16)
            want = pack_int8(layout, codes[None], bits[None], order)[0]
            arrays, pack = [upload(rt, codes), upload(rt, scales)], launch.pack_int8
        case _:
            blocks = rng.integers(0, 256, (N, K // BLOCK, BLOCK // 2)).astype(np.uint8)
            most = 254 if form.bf16 else MXFP4_HALF_SCALES[1]
            scales = rng.integers(0, most + 1, (N, K // BLOCK)).astype(np.uint8)
            want = pack_mxfp4(layout, blocks[None], scales[None], order)[0]
            arrays, pack = [upload(rt, blocks), upload(rt, scales)], launch.pack_mxfp4
    half = layout.tiles // 2 * TILE_ROWS
    for cuts in ([0, len(order)], [0, half, len(order)]):
        target = upload(rt, np.full(layout.nbytes, _POISON, np.uint8))
        for first, last in pairwise(cuts):
            pack(rt, *arrays, upload(rt, order[first:last]), layout, target, first_tile=first // TILE_ROWS)
        np.testing.assert_array_equal(rt.download(target), want)


_ORDERS: Sequence[tuple[str, Array]] = (
    ("plain", plain_rows(50)),
    ("gate and up", gate_up_rows(96)),
    ("rope", rope_rows(2, 64)),
)
_SOURCES = {Format.DENSE: ("bf16", "fp16", "float32"), Format.INT8: ("bits",), Format.MXFP4: ("blocks",)}

CHECKS: dict[str, Check] = {}
for _form in FORMS:
    for _source in (*_SOURCES[_form.format], *(("e8m0",) if _form.scale_bf16 else ())):
        for (_name, _order), _columns in zip(_ORDERS, (96, 160, 64), strict=True):
            CHECKS[f"{_form} of {_source}, {_name} rows, {_columns} columns"] = partial(
                _packs, form=_form, order=_order, K=_columns, source=_source
            )
for _group, _columns in ((64, 192), (96, 96), (160, 160), (96, 288)):
    CHECKS[f"int8 groups of {_group} of {_columns} columns"] = partial(
        _packs, form=Form(Format.INT8, group=_group), order=plain_rows(32), K=_columns
    )
