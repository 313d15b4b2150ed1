"""Packing on the device against packing in NumPy, byte for byte."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from gptoss_lite.kernels.cuda.checks import Check
from gptoss_lite.kernels.cuda.checks.common import FORMS, Array, Form, to_values, upload
from gptoss_lite.kernels.cuda.launch import weights as launch
from gptoss_lite.kernels.cuda.layout import (
    BLOCK,
    MXFP4_HALF_SCALES,
    TILE_ROWS,
    Format,
    gate_up_rows,
    pack_dense,
    pack_int8,
    pack_mxfp4,
    plain_rows,
    rope_rows,
    to_bits,
)
from gptoss_lite.kernels.cuda.runtime import Runtime

_POISON = 0xCD


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
