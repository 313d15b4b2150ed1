"""Weights as the CPU kernels take them: mapped where they can be, brought into tiles where they must be."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.conversion import execute, plan_conversion
from gptoss_lite.errors import DeviceError
from gptoss_lite.model import GptOss
from gptoss_lite.ops import Use, get_ops
from gptoss_lite.ops.cpu import CPUOps
from gptoss_lite.ops.cpu_weights import Tiles
from gptoss_lite.packing import CPU_ROWS, CPU_TILES, PackedTensor, pack, pack_tiles
from gptoss_lite.quant import codecs, concatenate
from gptoss_lite.quant.formats import MXFP4, Format, Int8

RNG = np.random.default_rng(3)
QKV, OUT = Use("qkv", 0), Use("out", 0)


def normal(*shape: int) -> Any:
    return RNG.standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def cpu() -> CPUOps:
    ops = get_ops("cpu")
    assert isinstance(ops, CPUOps)
    return ops


@pytest.mark.parametrize("format", [MXFP4(), Int8(), Int8(None, "float16"), Int8(64, "e8m0")], ids=str)
def test_every_order_becomes_the_same_tiles(cpu: CPUOps, format: Format) -> None:
    tensor = codecs.encode(normal(3, 40, 128), format)
    want = pack_tiles(tensor)
    rows = PackedTensor(pack(tensor, "down", CPU_ROWS), CPU_ROWS, format, tensor.shape, "down")
    packed = PackedTensor(want, CPU_TILES, format, tensor.shape, "down")
    for given in (tensor, rows, packed):
        tiles = cpu.prepare(given, Use("down", 0))
        assert isinstance(tiles, Tiles)
        np.testing.assert_array_equal(tiles.records, want)
        assert not tiles.records.flags.writeable  # kernels are compiled for one kind of array
    assert np.shares_memory(cpu.prepare(packed, Use("down", 0)).records, want)


@pytest.mark.parametrize("rows", [(64, 16, 16), (40, 8, 8)])
@pytest.mark.parametrize("format", [MXFP4(), Int8()], ids=str)
def test_stacked_matrices_are_those_of_the_whole(cpu: CPUOps, format: Format, rows: tuple[int, ...]) -> None:
    parts = [codecs.encode(normal(count, 96), format) for count in rows]
    want = cpu.prepare(concatenate(parts), QKV).records
    np.testing.assert_array_equal(cpu.prepare_stacked(parts, QKV).records, want)


def test_dense_matrices_are_not_copied(cpu: CPUOps) -> None:
    parts = [normal(count, 96).astype(ml_dtypes.bfloat16) for count in (64, 16, 16)]
    prepared = cpu.prepare_stacked(parts, QKV)
    assert all(np.shares_memory(one, part) for one, part in zip(prepared, parts, strict=True))


def test_dense_int8_is_what_the_codec_makes_of_it() -> None:
    ops = get_ops("cpu", dense="int8")
    matrix = normal(5000, 96).astype(ml_dtypes.bfloat16)  # more rows than are quantised at a time
    np.testing.assert_array_equal(ops.prepare(matrix, OUT).records, pack_tiles(codecs.encode(matrix, Int8())))
    for use in (Use("embedding"), Use("router", 0)):
        assert np.shares_memory(ops.prepare(matrix, use), matrix)
    narrow = normal(8, 40).astype(ml_dtypes.bfloat16)
    assert np.shares_memory(ops.prepare(narrow, OUT), narrow)  # no groups of 32


def test_a_packed_file_is_mapped_as_it_is(tiny_path: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    execute(plan_conversion(open_checkpoint(tiny_path), packed, "packed-cpu"), workers=1)
    checkpoint, ops = open_checkpoint(packed), get_ops("cpu")
    tokens = list(range(40))
    model = GptOss(checkpoint, ops)
    for layer, block in enumerate(model.layers):
        for name, linear in (("gate_up_proj", block.experts.gate_up), ("down_proj", block.experts.down)):
            (stored,) = checkpoint.weights[f"model.layers.{layer}.mlp.experts.{name}"].stored
            assert np.shares_memory(linear.weight.records, stored.data)
            assert linear.weight.records.ctypes.data % 64 == 0
    want = GptOss(open_checkpoint(tiny_path), ops).logits(tokens)
    np.testing.assert_array_equal(model.logits(tokens), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "int4"}, "activations is 'int4': choose accurate or int8"),
        ({"dense": "int4"}, "dense is 'int4': choose int8, or None"),
    ],
)
def test_choices_that_there_are_not_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        get_ops("cpu", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"activations": "int8"}, {"dense": "int8"}])
def test_other_devices_refuse_what_is_for_cpus(options: dict[str, str]) -> None:
    with pytest.raises(DeviceError, match="is 'int8', which is for device cpu: reference takes none"):
        get_ops("reference", **options)  # type: ignore[arg-type]
