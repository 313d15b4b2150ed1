"""Weights in the order of a backend: nothing is lost, and the fast way equals the definition."""

import itertools
import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from gptoss_lite import packing
from gptoss_lite.errors import FormatError
from gptoss_lite.kernels.cpu import records
from gptoss_lite.kernels.cuda import ranges
from gptoss_lite.kernels.cuda.launch import weights as repack
from gptoss_lite.kernels.cuda.layout import Layout, mxfp4_filled, mxfp4_to_half, pack_mxfp4
from gptoss_lite.kernels.emulator.runtime import Emulator
from gptoss_lite.memory import Plan
from gptoss_lite.ops import get_ops
from gptoss_lite.ops.base import Use
from gptoss_lite.ops.cuda.weights import Matrix, WeightStore
from gptoss_lite.packing import (
    CPU_ROWS,
    CPU_TILES,
    CUDA_TILES,
    LAYOUTS,
    PackedTensor,
    cpu_layout,
    pack,
    pack_tiles,
    packed_shape,
    unpack,
)
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor
from gptoss_lite.quant.formats import MXFP4, Format, Int8

Array = npt.NDArray[Any]
SCALE_DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "float16": np.float16, "e8m0": np.uint8}
FORMATS: list[Format] = [
    MXFP4(),
    *(Int8(32, scales) for scales in SCALE_DTYPES),  # type: ignore[arg-type]
    Int8(96, "bf16"), Int8(None, "float16"), Int8(None, "e8m0"),
]  # fmt: skip
# Hidden 96, 160 and 288, intermediate 96, rows of a few heads, and a vocabulary of no whole number of tiles.
SHAPES = {
    "qkv": (320, 96), "out": (160, 192), "gate_up": (8, 192, 288), "down": (3, 96, 96), "lm_head": (101, 96),
}  # fmt: skip
TILES = (CPU_TILES, CUDA_TILES)
ROWS = PackedTensor(np.zeros(272, np.uint8), CPU_ROWS, MXFP4(), (8, 64), "out")
CASES = [(format, kind) for format in FORMATS for kind in SHAPES]


def weight(format: Format, shape: tuple[int, ...], seed: int = 0) -> MXFP4Tensor | Int8Tensor:
    """Make codes and scales of every byte that there is."""
    rng = np.random.default_rng(seed)
    *outer, columns = shape
    if isinstance(format, MXFP4):
        scales = rng.integers(0, 256, (*outer, columns // 32)).astype(np.uint8)
        scales.reshape(-1)[:: max(1, scales.size // 256)][:256] = np.arange(256)[: scales.size]
        return MXFP4Tensor(rng.integers(0, 256, (*scales.shape, 16)).astype(np.uint8), scales)
    dtype = np.dtype(SCALE_DTYPES[format.scales])
    count = (*outer, columns // format.group(columns))
    bits = rng.integers(0, 256, (*count, dtype.itemsize)).astype(np.uint8)
    codes = rng.integers(-128, 128, shape).astype(np.int8)
    return Int8Tensor(codes, bits.view(dtype).reshape(count))


def fields(tensor: QTensor) -> list[bytes]:
    match tensor:
        case MXFP4Tensor(blocks=codes, scales=scales) | Int8Tensor(codes=codes, scales=scales):
            return [codes.tobytes(), scales.tobytes()]
    raise TypeError(type(tensor))


def without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_fast", lambda: None)
    monkeypatch.setattr(records, "_compiled", lambda: None)


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the kernels for a CPU, and as where Numba is missing."""
    if request.param == "plain":
        without_numba(monkeypatch)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("format", "kind"), CASES, ids=str)
def test_every_byte_comes_back(format: Format, kind: str, layout: str) -> None:
    tensor = weight(format, SHAPES[kind])
    data = pack(tensor, kind, layout)
    assert data.dtype == np.uint8
    assert data.shape == packed_shape(tensor.format, tensor.shape, kind, layout)
    back = unpack(data, layout, format, tensor.shape, kind)
    assert type(back) is type(tensor) and back.shape == tensor.shape
    assert back.scales.dtype == tensor.scales.dtype
    assert fields(back) == fields(tensor)


@pytest.mark.parametrize("layout", TILES)
@pytest.mark.parametrize(("format", "kind"), CASES, ids=str)
def test_the_compiled_way_equals_the_definition(
    format: Format, kind: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = weight(format, SHAPES[kind], seed=1)
    compiled = pack(tensor, kind, layout)
    without_numba(monkeypatch)
    np.testing.assert_array_equal(compiled, pack(tensor, kind, layout))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_tiles_of_cpus_are_sixteen_rows_side_by_side(format: Format) -> None:
    """Each byte of a record, named one by one."""
    rows, columns = 19, 96
    tensor = weight(format, (rows, columns))
    want = []
    if isinstance(tensor, MXFP4Tensor):
        code = np.stack([tensor.blocks & 15, tensor.blocks >> 4], axis=-1).reshape(rows, columns)
        code = np.concatenate([code, np.zeros((13, columns), np.uint8)])
        for t, b, j, r, i in np.ndindex(2, columns // 32, 4, 16, 4):
            row, column = 16 * t + r, 32 * b + 8 * j + i
            want.append(code[row, column] | code[row, column + 4] << 4)
        bits = tensor.scales
    else:
        code = np.concatenate([tensor.codes.view(np.uint8), np.zeros((13, columns), np.uint8)])
        want = [code[16 * t + r, 4 * q + i] for t, q, r, i in np.ndindex(2, columns // 4, 16, 4)]
        bits = tensor.scales.view(np.uint16) if tensor.scales.itemsize == 2 else bf16_bits(tensor.scales)
    bits = np.concatenate([bits, np.zeros((13, bits.shape[1]), bits.dtype)])
    scales = np.array([bits[16 * t + r, u] for t, u, r in np.ndindex(2, bits.shape[1], 16)], bits.dtype)
    record = bytes(want) + scales.tobytes()
    record += bytes(-len(record) % 64)
    assert pack(tensor, "out", CPU_TILES).tobytes() == record
    form = cpu_layout(format, (rows, columns))
    assert (form.code_bytes, form.nbytes) == (len(want), len(record))


def bf16_bits(scales: Array) -> Array:
    powers = np.ldexp(np.float64(1), scales.astype(np.int32) - 127)
    powers[scales == 255] = np.inf  # a NaN in E8M0, which bf16 has too, but comes back from infinity as well
    return powers.astype(ml_dtypes.bfloat16).view(np.uint16)


@pytest.mark.parametrize("kind", ["down", "lm_head"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_number_of_threads_changes_no_byte(
    format: Format, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = weight(format, SHAPES[kind])
    whole = pack_tiles(tensor)
    monkeypatch.setattr(packing, "_TASK_BYTES", 2000)  # a tile or two
    for threads in 1, 3:
        np.testing.assert_array_equal(pack_tiles(tensor, threads), whole)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_may_lie_apart(format: Format) -> None:
    tensor = weight(format, (4, 200, 192))
    for part in tensor[::2, ::-3], tensor[1, 5:150:2], tensor[:, 7:60]:
        together = pack(part.map(np.ascontiguousarray), "down", CPU_TILES)
        np.testing.assert_array_equal(pack(part, "down", CPU_TILES), together)


def test_tiles_of_cpus_begin_at_cache_lines_and_take_no_scratch_of_their_size() -> None:
    tensor = weight(MXFP4(), (6, 1600, 2880))
    for threads in 1, 2:
        tracemalloc.start()
        try:
            data = pack_tiles(tensor, threads)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert data.ctypes.data % 64 == data.shape[1] % 64 == 0
        assert peak < data.nbytes + tensor[0].nbytes / 2


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.parametrize(("format", "kind"), CASES, ids=str)
def test_tiles_are_what_the_device_packs(format: Format, kind: str) -> None:
    rt, tensor = Emulator(), weight(format, SHAPES[kind], seed=2)
    form, order = packing.tile_layout(tensor.format, tensor.shape, kind)
    records = pack(tensor, kind, CUDA_TILES).reshape(-1, form.nbytes)
    stack = tensor if len(tensor.shape) == 3 else tensor.map(lambda array: array[None])
    for expert, record in enumerate(records):
        target = rt.empty((form.nbytes,), np.uint8)
        match stack[expert]:
            case MXFP4Tensor(blocks=blocks, scales=scales):
                repack.pack_mxfp4(rt, blocks, scales, order, form, target)
            case Int8Tensor(codes=codes, scales=scales):
                bits = scales if scales.dtype == np.uint8 else scales.view(np.uint16)
                repack.pack_int8(rt, codes, bits, order, form, target)
        np.testing.assert_array_equal(rt.download(target), record)


def test_rows_are_the_bytes_of_codes_then_those_of_scales_and_are_not_copied() -> None:
    for format in FORMATS:
        tensor = weight(format, SHAPES["down"])
        data = pack(tensor, "down", CPU_ROWS)
        assert data.tobytes() == b"".join(fields(tensor))
        back = unpack(data, CPU_ROWS, format, tensor.shape, "down")
        arrays: list[Array] = []
        back.map(lambda array, kept=arrays: kept.append(array) or array)  # type: ignore[misc]
        assert len(arrays) == 2 and all(np.shares_memory(array, data) for array in arrays)


def shifted(array: Array) -> Array:
    """Copy an array to an odd address, and make it read-only."""
    return np.frombuffer(b"\0" + array.tobytes(), np.uint8)[1:].view(array.dtype).reshape(array.shape)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_data_may_lie_at_any_address_and_be_read_only(format: Format, layout: str) -> None:
    tensor = weight(format, SHAPES["down"])
    data = pack(tensor, "down", layout)
    if layout == CPU_TILES:
        np.testing.assert_array_equal(pack(tensor.map(shifted), "down", layout), data)
    back = unpack(shifted(data), layout, format, tensor.shape, "down")
    assert back.scales.flags.aligned
    assert fields(back) == fields(tensor)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("format", "kind"), CASES, ids=str)
def test_scales_can_be_read_alone(format: Format, kind: str, layout: str) -> None:
    tensor = weight(format, SHAPES[kind], seed=3)
    packed = PackedTensor(pack(tensor, kind, layout), layout, tensor.format, tensor.shape, kind)
    scales = packed.scales
    assert (scales.dtype, scales.shape) == (tensor.scales.dtype, tensor.scales.shape)
    assert scales.tobytes() == tensor.scales.tobytes()


def test_padding_does_not_count_in_what_fits_fp16() -> None:
    rng = np.random.default_rng(0)
    for lowest, fits in (104, True), (103, False):  # zeros of padding are below both
        scales = np.full((96, 3), lowest, np.uint8)
        tensor = MXFP4Tensor(rng.integers(0, 256, (*scales.shape, 16)).astype(np.uint8), scales)
        packed = PackedTensor(
            pack(tensor, "gate_up", CUDA_TILES), CUDA_TILES, MXFP4(), tensor.shape, "gate_up"
        )
        assert ranges.mxfp4_fits_half(packed.scales) == fits


@pytest.mark.parametrize("kind", SHAPES)
def test_tiles_for_fp16_are_what_packing_for_it_gives(kind: str) -> None:
    tensor = weight(MXFP4(), SHAPES[kind], seed=4)
    assert isinstance(tensor, MXFP4Tensor)
    tensor = replace(tensor, scales=np.minimum(tensor.scales, 128))
    form, order = packing.tile_layout(MXFP4(), tensor.shape, kind)
    half: Layout = replace(form, bf16=False)
    blocks, scales = tensor.blocks, tensor.scales
    parts = blocks.reshape(-1, *blocks.shape[-3:]), scales.reshape(-1, *scales.shape[-2:])
    filled = mxfp4_filled(half, order)
    for record, want in zip(
        pack(tensor, kind, CUDA_TILES).reshape(-1, form.nbytes), pack_mxfp4(half, *parts, order), strict=True
    ):
        before = record.copy()
        np.testing.assert_array_equal(np.concatenate(mxfp4_to_half(half, record, filled)), want)
        np.testing.assert_array_equal(record, before)


@pytest.mark.parametrize("layout", TILES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_suspect_scale_is_noticed_where_it_lies(format: Format, layout: str) -> None:
    """Beyond its bound, of either sign, in the first place or the last, and never at it."""
    dtype = np.dtype(np.uint8 if isinstance(format, MXFP4) else SCALE_DTYPES[format.scales])
    largest = {"uint8": 252 if isinstance(format, MXFP4) else 248, "bfloat16": 0x7C01, "float16": 0x7BFF}
    bound = largest[dtype.name]
    for kind in "down", "lm_head":
        tensor = weight(format, SHAPES[kind])
        bits = np.full(tensor.scales.shape, bound, f"u{dtype.itemsize}")
        signs = (0,) if dtype == np.uint8 else (0, 0x8000)
        for place in 0, -1:
            for bit, more in itertools.product(signs, (0, 1)):
                bits.reshape(-1)[place] = bound + more | bit
                changed = replace(tensor, scales=bits.view(dtype))
                data = pack(changed, kind, layout)
                packed = PackedTensor(data, layout, tensor.format, tensor.shape, kind)
                assert packed.is_suspect == bool(more)
            bits[:] = bound


@pytest.mark.parametrize("layout", TILES)
def test_an_expert_in_tiles_is_a_weight_of_its_own(layout: str) -> None:
    for format in MXFP4(), Int8(32, "e8m0"):
        tensor = weight(format, (5, 96, 96))
        packed = PackedTensor(pack(tensor, "down", layout), layout, format, tensor.shape, "down")
        assert packed.nbytes == packed.data.nbytes and packed.shape == tensor.shape
        assert fields(packed[3].unpack()) == fields(tensor[3])
        assert fields(packed[1:4].unpack()) == fields(tensor[1:4])
        assert packed[3].shape == (96, 96)
        np.testing.assert_array_equal(packed[3].data, pack(tensor[3], "down", layout))
        for index in (slice(None), slice(None)), ..., None:
            with pytest.raises(IndexError, match="unpack it first"):
                packed[index]
        for whole in packed[0], packed.map(lambda array: array)[0]:
            with pytest.raises(IndexError):
                whole[0]
        rows = PackedTensor(pack(tensor, "down", CPU_ROWS), CPU_ROWS, format, tensor.shape, "down")
        with pytest.raises(IndexError, match="unpack it first"):
            rows[0]


def test_values_are_those_of_the_unpacked_weight() -> None:
    rng = np.random.default_rng(5)
    tensor = Int8Tensor(
        rng.integers(-127, 128, (101, 96)).astype(np.int8), rng.random((101, 3)).astype(np.float16)
    )
    for layout in LAYOUTS:
        packed = PackedTensor(pack(tensor, "lm_head", layout), layout, tensor.format, tensor.shape, "lm_head")
        np.testing.assert_array_equal(packed.dequantize(), tensor.dequantize())


def test_what_is_never_packed_has_no_kind() -> None:
    layer = "model.layers.7"
    kinds = {
        f"{layer}.self_attn.q_proj.weight": "qkv", f"{layer}.self_attn.v_proj.weight": "qkv",
        f"{layer}.self_attn.o_proj.weight": "out", f"{layer}.mlp.experts.gate_up_proj": "gate_up",
        f"{layer}.mlp.experts.down_proj": "down", "lm_head.weight": "lm_head",
        "model.embed_tokens.weight": None, f"{layer}.mlp.router.weight": None,
        f"{layer}.mlp.experts.down_proj_bias": None, f"{layer}.self_attn.q_proj.bias": None,
    }  # fmt: skip
    assert {name: packing.kind_of(name) for name in kinds} == kinds


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: packed_shape(MXFP4(), (8, 40), "out", CUDA_TILES), "40 columns"),
        (lambda: packed_shape(Int8(64), (8, 96), "out", CPU_ROWS), "groups of 64 do not divide"),
        (lambda: packed_shape(MXFP4(), (96, 64), "qkv", CUDA_TILES), "96 rows.*heads of 64"),
        (lambda: packed_shape(MXFP4(), (2, 97, 64), "gate_up", CUDA_TILES), "97 rows: must be even"),
        (lambda: packed_shape(MXFP4(), (8, 64), "out", "cuda-t8-v1"), "unknown layout 'cuda-t8-v1': choose"),
        (
            lambda: PackedTensor(np.zeros(9, np.uint8), CPU_ROWS, MXFP4(), (8, 64), "out"),
            r"is uint8 \(9,\): must be uint8 \(272,\)",
        ),
        (lambda: pack(ROWS, "out", CUDA_TILES), "cannot pack PackedTensor"),
        (lambda: pack_tiles(ROWS), "cannot pack PackedTensor"),
        (lambda: packed_shape(MXFP4(), (8, 40), "out", CPU_TILES), "40 columns"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        make()


def test_the_largest_weights_have_room_for_their_records() -> None:
    for shape, kind in ((32, 5760, 2880), "gate_up"), ((32, 2880, 2880), "down"), ((201088, 2880), "lm_head"):
        natural = int(np.prod(shape)) // 32 * 17
        for layout in LAYOUTS:  # of gpt-oss, where nothing is padded
            assert int(np.prod(packed_shape(MXFP4(), shape, kind, layout))) == natural


def plan_with_a_layer_on_the_host() -> Plan:
    return Plan((), 8, (0, 0), 16, 0, 0, (), host_layers=1)


@pytest.mark.usefixtures("needs_compiler", "way")
@pytest.mark.parametrize("range", ["fp16", "below fp16", "bf16"])
@pytest.mark.parametrize("kind", ["qkv", "out", "gate_up", "down", "lm_head"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_device_gets_the_same_bytes_from_tiles(format: Format, kind: Any, range: str) -> None:
    """Blocks of scales below fp16 become zero on the way, where fp16 is what will be multiplied."""
    tensor = weight(format, SHAPES[kind], seed=6)
    lowest = 98 if range == "below fp16" else 110
    scales: Any = np.resize(np.array([120, lowest, 117], np.uint8), tensor.scales.shape)
    if scales.dtype != tensor.scales.dtype:
        scales = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(tensor.scales.dtype)
    tensor = replace(tensor, scales=scales)
    packed = PackedTensor(pack(tensor, kind, CUDA_TILES), CUDA_TILES, tensor.format, tensor.shape, kind)
    for layer in (0, 1) if len(tensor.shape) == 3 else (0,):
        use = Use(kind, layer, lambda: math.inf if range == "bf16" else 1.0)
        found: list[Any] = []
        for given in tensor, packed:
            store = WeightStore(Emulator(), plan_with_a_layer_on_the_host())
            found.append(store.prepare(given, use))
            assert store.bf16[kind, layer] == (range == "bf16")
        want, got = found
        assert got.layout == want.layout
        if isinstance(want, Matrix):
            np.testing.assert_array_equal(got.data, want.data)
            np.testing.assert_array_equal(got.order, want.order)
        else:
            np.testing.assert_array_equal(got.records, want.records)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_unpacks(layout: str) -> None:
    tensor = weight(MXFP4(), SHAPES["gate_up"])
    packed = PackedTensor(pack(tensor, "gate_up", layout), layout, MXFP4(), tensor.shape, "gate_up")
    prepared = get_ops("reference").prepare(packed, Use("gate_up", 0))
    assert fields(prepared) == fields(tensor)
