"""Hot CPU kernels at gpt-oss-20b's shapes: answers checked, bytes per second beside those of a plain read."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from gptoss_lite.kernels.cpu import attention, elementwise, linear, sampling
from gptoss_lite.ops import get_ops
from gptoss_lite.quant import MXFP4Tensor
from gptoss_lite.quant.mxfp4 import E2M1
from gptoss_lite.sampling import gumbel_argmax

HIDDEN, INTERMEDIATE, EXPERTS = 2880, 2880, 4
CODES = np.asarray(E2M1, np.float32)


@pytest.fixture(scope="module", autouse=True)
def threads() -> None:
    """Let the CPU backend set its threads up as it does for a model."""
    get_ops("cpu")


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def report(benchmark: BenchmarkFixture) -> Callable[[int, int], None]:
    """Note bytes moved and multiplications made per call, as rates of the median."""

    def note(nbytes: int, products: int) -> None:
        assert benchmark.stats is not None
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["GB/s"] = round(nbytes / seconds / 1e9, 2)
        benchmark.extra_info["GMAC/s"] = round(products / seconds / 1e9, 2)

    return note


def bench_yardstick_read(benchmark: BenchmarkFixture, report: Callable[[int, int], None]) -> None:
    """Read 256 MB from one thread: what the other figures are to be held against."""
    data = np.ones(1 << 28, np.uint8).view(np.uint64)
    assert benchmark(data.max) == 0x0101010101010101
    report(data.nbytes, 0)


@pytest.mark.parametrize("tokens", [1, 64])
def bench_linear_mxfp4(
    benchmark: BenchmarkFixture, report: Callable[[int, int], None], rng: np.random.Generator, tokens: int
) -> None:
    """Four experts' gate_up, each over its own rows."""
    blocks = rng.integers(0, 256, (EXPERTS, 2 * INTERMEDIATE, HIDDEN // 32, 16), np.uint8)
    scales = rng.integers(118, 124, blocks.shape[:3], np.uint8)
    x = rng.standard_normal((EXPERTS * tokens, HIDDEN), np.float32)
    groups = np.arange(EXPERTS, dtype=np.int32)
    starts = np.arange(0, len(x) + 1, tokens, dtype=np.int32)
    y = np.empty((len(x), 2 * INTERMEDIATE), np.float32)
    args = (x, blocks, scales, CODES, groups, starts, y)
    benchmark.pedantic(linear.linear_mxfp4, args, rounds=15, warmup_rounds=2)
    want = x[-1:] @ MXFP4Tensor(blocks[-1], scales[-1]).dequantize().T
    np.testing.assert_allclose(y[-1:], want, rtol=0, atol=1e-4 * np.abs(want).max())
    report(blocks.nbytes + scales.nbytes, len(x) * 2 * INTERMEDIATE * HIDDEN)


@pytest.mark.parametrize("tokens", [1, 64])
def bench_linear_dense(
    benchmark: BenchmarkFixture, report: Callable[[int, int], None], rng: np.random.Generator, tokens: int
) -> None:
    """One layer's query, key and value projection in bf16."""
    values = rng.standard_normal((5120, HIDDEN), np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    weight = (values >> np.uint32(16)).astype(np.uint16)[None]
    x = rng.standard_normal((tokens, HIDDEN), np.float32)
    y = np.empty((tokens, 5120), np.float32)
    args: tuple[Any, ...] = (x, weight, np.zeros(1, np.int32), np.array([0, tokens], np.int32), y)
    benchmark.pedantic(linear.linear_dense, args, rounds=15, warmup_rounds=2)
    want = x @ values.view(np.float32).T
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-4 * np.abs(want).max())
    report(weight.nbytes, tokens * 5120 * HIDDEN)


@pytest.mark.parametrize("window", [128, 1 << 30], ids=["sliding", "full"])
def bench_attention(
    benchmark: BenchmarkFixture, report: Callable[[int, int], None], rng: np.random.Generator, window: int
) -> None:
    """One token at position 4,095: 64 query heads on 8 key heads of 64."""
    blocks = 256
    keys, values = (rng.standard_normal((blocks, 8, 16, 64), np.float32) for _ in range(2))
    bits = [(a.view(np.uint32) >> np.uint32(16)).astype(np.uint16) for a in (keys, values)]
    q, out = rng.standard_normal((1, 64, 64), np.float32), np.empty((1, 64, 64), np.float32)
    table = np.arange(blocks, dtype=np.int32)[None]
    sequence, positions = np.zeros(1, np.int32), np.array([4095], np.int32)
    sinks = np.zeros(64, np.float32)
    args = (q, *bits, table, sequence, positions, sinks, window, 0.125, out)
    benchmark.pedantic(attention.attention, args, rounds=30, warmup_rounds=2)
    span = min(window, 4096)
    k, v = (
        (b.astype(np.uint32) << np.uint32(16)).view(np.float32).swapaxes(0, 1).reshape(8, 4096, 64)[:, -span:]
        for b in bits
    )
    scores = np.einsum("hmd,hkd->hmk", q.reshape(8, 8, 64), k) / 8
    weights: NDArray[np.float32] = np.exp(scores)
    want = np.einsum("hmk,hkd->hmd", weights, v) / (weights.sum(-1, keepdims=True) + 1)
    np.testing.assert_allclose(out.reshape(want.shape), want, atol=1e-5)
    report(2 * span * 8 * 64 * 2, 2 * span * 64 * 64)


def bench_rms_norm(
    benchmark: BenchmarkFixture, report: Callable[[int, int], None], rng: np.random.Generator
) -> None:
    """A prefill step of 512 tokens."""
    x, weight = rng.standard_normal((512, HIDDEN), np.float32), rng.standard_normal(HIDDEN, np.float32)
    y = np.empty_like(x)
    benchmark.pedantic(elementwise.rms_norm, (x, weight, 1e-5, y), rounds=15, warmup_rounds=2)
    want = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    report(x.nbytes + y.nbytes, 3 * x.size)


def bench_swiglu(
    benchmark: BenchmarkFixture, report: Callable[[int, int], None], rng: np.random.Generator
) -> None:
    """The 2,048 expert rows of 512 tokens."""
    x = rng.standard_normal((2048, 2 * INTERMEDIATE), np.float32) * 4
    bias, expert = np.zeros((1, 2 * INTERMEDIATE), np.float32), np.zeros(2048, np.int32)
    y = np.empty((2048, INTERMEDIATE), np.float32)
    benchmark.pedantic(elementwise.swiglu, (x, bias, expert, 7.0, y), rounds=15, warmup_rounds=2)
    gate, up = np.minimum(x[:, ::2], 7), np.clip(x[:, 1::2], -7, 7)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-1.702 * gate)) * (up + 1), rtol=1e-5, atol=1e-6)
    report(x.nbytes + y.nbytes, 0)


def bench_combine(
    benchmark: BenchmarkFixture, report: Callable[[int, int], None], rng: np.random.Generator
) -> None:
    """Four experts' results added to each of 512 tokens."""
    x, y = rng.standard_normal((512, HIDDEN), np.float32), rng.standard_normal((2048, HIDDEN), np.float32)
    bias, expert = np.zeros((1, HIDDEN), np.float32), np.zeros(2048, np.int32)
    rows = rng.permutation(2048).astype(np.int32).reshape(512, 4)
    weights, out = rng.random((512, 4), np.float32), np.empty_like(x)
    args = (x, y, bias, expert, rows, weights, out)
    benchmark.pedantic(elementwise.combine, args, rounds=15, warmup_rounds=2)
    np.testing.assert_allclose(out, x + np.einsum("tc,tck->tk", weights, y[rows]), rtol=1e-4, atol=1e-4)
    report(x.nbytes + y.nbytes + out.nbytes, y.size)


def bench_gumbel_argmax(
    benchmark: BenchmarkFixture, report: Callable[[int, int], None], rng: np.random.Generator
) -> None:
    """One draw over gpt-oss's 201,088 logits."""
    logits = rng.standard_normal(201_088, np.float32) * 3
    args = (logits, 1.0, 7, 0, 5)
    token = benchmark.pedantic(sampling.gumbel_argmax, args, rounds=15, warmup_rounds=2)
    assert token == gumbel_argmax(*args)
    report(logits.nbytes, 0)
