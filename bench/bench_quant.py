"""The codecs on one expert's gate_up of gpt-oss-20b: one core, answers checked, beside a plain copy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, codecs, int8, mxfp4
from gptoss_lite.quant.formats import MXFP4, Format, Int8

ROWS, COLUMNS = 5760, 2880
Report = Callable[[int], None]


@pytest.fixture(scope="module")
def weight() -> NDArray[Any]:
    """One expert in bf16, (N, K)."""
    return np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32).astype(bfloat16)


@pytest.fixture
def report(benchmark: BenchmarkFixture) -> Report:
    """Note the bytes of one side of a call, as a rate of the median."""

    def note(nbytes: int) -> None:
        assert benchmark.stats is not None
        benchmark.extra_info["MB/s"] = round(nbytes / benchmark.stats.stats.median / 1e6)

    return note


def same(q: Any, codes: NDArray[Any], scales: NDArray[Any]) -> None:
    """Compare a tensor's first and last rows with what the definition makes of those."""
    got = (q.blocks if isinstance(q, MXFP4Tensor) else q.codes)[[0, -1]]
    np.testing.assert_array_equal(got, codes)
    np.testing.assert_array_equal(q.scales[[0, -1]], scales)


def bench_yardstick_copy(benchmark: BenchmarkFixture, report: Report, weight: NDArray[Any]) -> None:
    """Copy the bf16 weights: what the other figures are to be held against."""
    bits, copy = weight.view(np.uint16), np.empty(weight.shape, np.uint16)
    benchmark.pedantic(np.copyto, (copy, bits), rounds=15, warmup_rounds=2)
    np.testing.assert_array_equal(copy, bits)
    report(weight.nbytes)


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "turned"])
@pytest.mark.parametrize("how", ["rule", "search", "weighted"])
def bench_encode_mxfp4(
    benchmark: BenchmarkFixture, report: Report, weight: NDArray[Any], how: str, turned: bool
) -> None:
    """Bytes of bf16 read, from rows or from a matrix stored input-major."""
    search = how != "rule"
    weights = np.random.default_rng(1).random(COLUMNS, np.float32) if how == "weighted" else None
    x = np.ascontiguousarray(weight.T).T if turned else weight
    options = {"search": search, "weights": weights}
    q = benchmark.pedantic(codecs.encode, (x, MXFP4()), options, rounds=5, warmup_rounds=1)
    same(q, *mxfp4.encode(weight[[0, -1]], search, weights))
    report(weight.nbytes)


@pytest.mark.parametrize("group", [32, None])
def bench_encode_int8(
    benchmark: BenchmarkFixture, report: Report, weight: NDArray[Any], group: int | None
) -> None:
    """Bytes of bf16 read."""
    q = benchmark.pedantic(codecs.encode, (weight, Int8(group)), rounds=5, warmup_rounds=1)
    same(q, *int8.encode(weight[[0, -1]], group))
    report(weight.nbytes)


@pytest.mark.parametrize("format", [MXFP4(), Int8(32), Int8(None)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, bfloat16], ids=["float32", "bf16"])
def bench_decode(
    benchmark: BenchmarkFixture, report: Report, weight: NDArray[Any], format: Format, dtype: Any
) -> None:
    """Bytes written."""
    q = codecs.encode(weight, format)
    values = benchmark.pedantic(codecs.decode, (q, dtype), rounds=5, warmup_rounds=1)
    np.testing.assert_array_equal(values[-1], q[-1:].dequantize()[0].astype(dtype))
    report(values.nbytes)


@pytest.mark.parametrize("format", [MXFP4(), Int8(32)], ids=str)
def bench_errors(benchmark: BenchmarkFixture, report: Report, weight: NDArray[Any], format: Format) -> None:
    """Bytes of bf16 compared."""
    q: MXFP4Tensor | Int8Tensor = codecs.encode(weight, format)
    squared, squared_error, largest = benchmark.pedantic(
        codecs.errors, (weight, q), rounds=5, warmup_rounds=1
    )
    difference = weight.astype(np.float32) - q.dequantize()
    assert squared == pytest.approx(float(np.square(weight, dtype=np.float64).sum()))
    assert squared_error == pytest.approx(float(np.square(difference, dtype=np.float64).sum()))
    assert largest == np.abs(difference).max()
    report(weight.nbytes)
