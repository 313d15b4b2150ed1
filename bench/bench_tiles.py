"""Weights to and from the orders of backends at gpt-oss-20b's shapes, beside a plain copy; one thread."""

from typing import Any

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from gptoss_lite.packing import LAYOUTS, pack, unpack
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor
from gptoss_lite.quant.formats import MXFP4, Format, Int8

EXPERTS, ROWS, COLUMNS = 4, 5760, 2880
FORMATS: list[Format] = [MXFP4(), Int8(32, "bf16"), Int8(32, "e8m0"), Int8(None, "float16")]


@pytest.fixture(scope="module", params=FORMATS, ids=str)
def tensor(request: pytest.FixtureRequest) -> MXFP4Tensor | Int8Tensor:
    """Experts' gate_up, of random bytes."""
    rng, format = np.random.default_rng(0), request.param
    if isinstance(format, MXFP4):
        blocks = rng.integers(0, 256, (EXPERTS, ROWS, COLUMNS // 32, 16), np.uint8)
        return MXFP4Tensor(blocks, rng.integers(0, 255, blocks.shape[:3], np.uint8))
    codes = rng.integers(-127, 128, (EXPERTS, ROWS, COLUMNS), np.int8)
    groups = (EXPERTS, ROWS, COLUMNS // format.group(COLUMNS))
    if format.scales == "e8m0":
        return Int8Tensor(codes, rng.integers(0, 248, groups, np.uint8))
    scales = rng.random(groups, np.float32)
    return Int8Tensor(codes, scales.astype("bfloat16" if format.scales == "bf16" else np.float16))


def note(benchmark: BenchmarkFixture, nbytes: int) -> None:
    """Note the rate of the median, of bytes in the natural order."""
    assert benchmark.stats is not None
    benchmark.extra_info["GB/s"] = round(nbytes / benchmark.stats.stats.median / 1e9, 2)


def bench_yardstick_copy(benchmark: BenchmarkFixture) -> None:
    """Copy 128 MB to new memory from one thread: what the other figures are to be held against."""
    data = np.ones(1 << 27, np.uint8)
    assert len(benchmark(data.copy)) == len(data)
    note(benchmark, data.nbytes)


@pytest.mark.parametrize("layout", LAYOUTS)
def bench_pack(benchmark: BenchmarkFixture, tensor: MXFP4Tensor | Int8Tensor, layout: str) -> None:
    data = benchmark.pedantic(pack, (tensor, "gate_up", layout), rounds=10, warmup_rounds=2)
    assert_same(unpack(data, layout, tensor.format, tensor.shape, "gate_up"), tensor)
    note(benchmark, tensor.nbytes)


@pytest.mark.parametrize("layout", LAYOUTS)
def bench_unpack(benchmark: BenchmarkFixture, tensor: MXFP4Tensor | Int8Tensor, layout: str) -> None:
    args = pack(tensor, "gate_up", layout), layout, tensor.format, tensor.shape, "gate_up"
    assert_same(benchmark.pedantic(unpack, args, rounds=10, warmup_rounds=2), tensor)
    note(benchmark, tensor.nbytes)


def assert_same(got: MXFP4Tensor | Int8Tensor, want: MXFP4Tensor | Int8Tensor) -> None:
    arrays: list[Any] = []
    for tensor in got, want:
        tensor.map(lambda array: arrays.append(array) or array)  # type: ignore[func-returns-value]
    assert all(np.array_equal(arrays[i], arrays[i + 2]) for i in range(2))
