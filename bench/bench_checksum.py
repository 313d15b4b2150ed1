"""Checksums of 256 MB in memory, on one thread, by each way that this CPU has."""

import zlib

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from gptoss_lite.kernels.cpu import crc
from gptoss_lite.quant import checksum

BFLOAT16 = 0x7F807F80  # the exponents of two


@pytest.mark.parametrize("lanes", [0, *crc.usable()])
def bench_read(benchmark: BenchmarkFixture, lanes: int) -> None:
    """With 0 lanes, zlib, which looks for no exponents."""
    data = np.random.default_rng(0).integers(0, 0x7F, 1 << 28, np.uint8)
    got, finite = benchmark(checksum.read, data, lanes=lanes, exponent=BFLOAT16)
    assert got == zlib.crc32(data.data)
    assert finite == (data.size if lanes else 0)
    assert benchmark.stats is not None
    benchmark.extra_info["GB/s"] = round(data.nbytes / benchmark.stats.stats.median / 1e9, 2)
