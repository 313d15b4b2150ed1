"""The CPU kernels at gpt-oss-20b's shapes: answers checked, rates beside what the machine can do."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from bench.shares import Report, noted
from gptoss_lite.kernels.cpu import elementwise, isa
from gptoss_lite.kernels.cpu.activations import quantized, rms_norm
from gptoss_lite.kernels.cpu.experts import experts_packed
from gptoss_lite.kernels.cpu.linear import linear_dense, linear_packed
from gptoss_lite.kernels.cpu.program import Steps
from gptoss_lite.kernels.cpu.router import route
from gptoss_lite.ops.cpu_weights import tiles
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor

HIDDEN, INNER, EXPERTS, CHOSEN, QKV = 2880, 2880, 32, 4, 5120
HOST = isa.host()

both_activations = pytest.mark.parametrize("activations", ["accurate", "int8"])
some_tokens = pytest.mark.parametrize("tokens", [1, 4, 512])


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def mxfp4(rng: np.random.Generator, *shape: int) -> MXFP4Tensor:
    groups = (*shape[:-1], shape[-1] // 32)
    return MXFP4Tensor(
        rng.integers(0, 256, (*groups, 16), np.uint8), rng.integers(115, 119, groups, np.uint8)
    )


def int8(rng: np.random.Generator, *shape: int) -> Int8Tensor:
    scales = rng.random((*shape[:-1], shape[-1] // 32), np.float32) / 4096
    return Int8Tensor(rng.integers(-127, 128, shape, np.int8), scales.astype(ml_dtypes.bfloat16))


def assert_close(got: NDArray[Any], want: NDArray[Any], activations: str) -> None:
    """Compare rows by their Euclidean norms."""
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < (1e-4 if activations == "accurate" else 2e-2)


@some_tokens
@both_activations
@pytest.mark.parametrize("make", [mxfp4, int8])
def bench_linear_packed(
    benchmark: BenchmarkFixture, report: Report, rng: np.random.Generator,
    make: Callable[..., QTensor], activations: str, tokens: int,
) -> None:  # fmt: skip
    """One layer's query, key and value projection; copies that no cache holds take turns."""
    weight = make(rng, QKV, HIDDEN)
    w, x = tiles(weight, 1), rng.standard_normal((tokens, HIDDEN), np.float32)
    copies = [w.records.copy() for _ in range(16 if tokens < 512 else 1)]
    y = np.empty((tokens, QKV), np.float32)

    def note(steps: Steps) -> None:
        for record in copies:
            rows = quantized(steps, HOST, w.format, activations, x)
            linear_packed(steps, HOST, w.format, activations, (record, *w.packed()[1:]), rows, y)

    report.run(noted(note), rounds=9)
    assert_close(y, x @ weight.dequantize().T, activations)
    if tokens < 512:
        report.share("read", len(copies) * w.records.nbytes)
    else:
        report.share("dot", tokens * QKV * HIDDEN * (2 if activations == "accurate" else 1))


@some_tokens
def bench_linear_dense(
    benchmark: BenchmarkFixture, report: Report, rng: np.random.Generator, tokens: int
) -> None:
    """The same in bf16."""
    weight = rng.standard_normal((QKV, HIDDEN), np.float32).astype(ml_dtypes.bfloat16)
    x, y = rng.standard_normal((tokens, HIDDEN), np.float32), np.empty((tokens, QKV), np.float32)
    copies = [weight.view(np.uint16)[None].copy() for _ in range(12 if tokens < 512 else 1)]
    groups, starts = np.zeros(1, np.int32), np.array([0, tokens], np.int32)

    def note(steps: Steps) -> None:
        for bits in copies:
            linear_dense(steps, HOST, "bf16", bits, groups, starts, x, y)

    report.run(noted(note), rounds=9 if tokens < 512 else 3)
    assert_close(y, x @ weight.astype(np.float32).T, "accurate")
    if tokens < 512:
        report.share("read", len(copies) * weight.nbytes)
    else:
        report.share("multiply-add", tokens * QKV * HIDDEN)


@some_tokens
@both_activations
def bench_experts(
    benchmark: BenchmarkFixture, report: Report, rng: np.random.Generator, activations: str, tokens: int
) -> None:
    """One layer's mixture, each time of other experts."""
    gate_up, down = mxfp4(rng, EXPERTS, 2 * INNER, HIDDEN), mxfp4(rng, EXPERTS, HIDDEN, INNER)
    up, back = tiles(gate_up, 2), tiles(down, 2)
    added = (
        rng.standard_normal((EXPERTS, 2 * INNER), np.float32),
        rng.standard_normal((EXPERTS, HIDDEN), np.float32),
    )
    h, x = (rng.standard_normal((tokens, HIDDEN), np.float32) for _ in range(2))
    choices = [
        np.stack([rng.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens)]).astype(np.int32)
        for _ in range(8 if tokens < 512 else 1)
    ]
    weights, out = rng.random((tokens, CHOSEN), np.float32), np.empty_like(x)

    def note(steps: Steps) -> None:
        for ids in choices:
            experts_packed(
                steps, HOST, (up.format, back.format), activations, h, ids, weights, up.packed(), added[0],
                back.packed(), added[1], 7.0, x, out,
            )  # fmt: skip

    report.run(noted(note), rounds=9 if tokens < 512 else 3)
    want = x[:1].copy()
    for e, share in zip(choices[-1][0], weights[0], strict=True):
        both = h[:1] @ gate_up[e].dequantize().T + added[0][e]
        gate, more = np.minimum(both[:, ::2], 7), np.clip(both[:, 1::2], -7, 7)
        inner = gate / (1 + np.exp(-1.702 * gate)) * (more + 1)
        want += share * (inner @ down[e].dequantize().T + added[1][e])
    assert_close(out[:1], want, activations)
    if tokens < 512:
        used = sum(len(np.unique(ids)) for ids in choices)
        report.share("read", used * (up.records.shape[1] + back.records.shape[1]))
    else:
        products = tokens * CHOSEN * 3 * INNER * HIDDEN
        report.share("dot", products * (2 if activations == "accurate" else 1))


@pytest.mark.parametrize("tokens", [1, 512])
def bench_router(benchmark: BenchmarkFixture, report: Report, rng: np.random.Generator, tokens: int) -> None:
    """Normalise, and choose 4 of 32 experts."""
    x, norm = rng.standard_normal((tokens, HIDDEN), np.float32), rng.standard_normal(HIDDEN, np.float32)
    weight = rng.standard_normal((EXPERTS, HIDDEN), np.float32).astype(ml_dtypes.bfloat16)
    added = rng.standard_normal(EXPERTS, np.float32)
    found: dict[str, NDArray[Any]] = {}

    def note(steps: Steps) -> None:
        found["h"] = rms_norm(steps, x, norm, 1e-5)
        found["ids"], _ = route(steps, HOST, "bf16", found["h"], weight.view(np.uint16), added, CHOSEN)

    report.run(noted(note))
    h, ids = found["h"], found["ids"]
    logits = h @ weight.astype(np.float32).T + added
    np.testing.assert_array_equal(ids[:, 0], logits.argmax(axis=1))
    report.share("multiply-add", tokens * EXPERTS * HIDDEN)


def bench_quantise_activations(benchmark: BenchmarkFixture, report: Report, rng: np.random.Generator) -> None:
    """The rows of a prefill step, in 16 bits."""
    x = rng.standard_normal((512, HIDDEN), np.float32)
    found: list[NDArray[Any]] = []
    report.run(noted(lambda steps: found.extend(quantized(steps, HOST, "int8", "accurate", x))))
    _, scales, _ = found
    first = np.abs(x[:8, :32]).max(axis=1) / 32512
    np.testing.assert_allclose(scales[: HOST.tokens], first[: HOST.tokens], rtol=1e-6)
    report.share("read", x.nbytes)


def bench_swiglu(benchmark: BenchmarkFixture, report: Report, rng: np.random.Generator) -> None:
    """The 2,048 rows of dense experts of 512 tokens."""
    x = rng.standard_normal((2048, 2 * INNER), np.float32) * 4
    bias, expert = np.zeros((1, 2 * INNER), np.float32), np.zeros(2048, np.int32)
    y = np.empty((2048, INNER), np.float32)

    report.run(noted(lambda steps: elementwise.swiglu(steps, x, bias, expert, 7.0, y)))
    gate, up = np.minimum(x[:, ::2], 7), np.clip(x[:, 1::2], -7, 7)
    np.testing.assert_allclose(y, gate / (1 + np.exp(-1.702 * gate)) * (up + 1), rtol=1e-5, atol=1e-6)
    report.share("read", x.nbytes + y.nbytes)
