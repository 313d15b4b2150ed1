"""One token drawn from gpt-oss's 201,088 logits with every option, from a batch, and from a small vocabulary.

Measured is all of `sample`, as the engine calls it; tokens are checked against the specification's.
"""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pytest_benchmark.fixture import BenchmarkFixture

from gptoss_lite.kernels.cpu import sampling as kernel
from gptoss_lite.sampling import Draw, SamplingParams, sample

VOCABULARY, SMALL = 201_088, 2048
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 50},
    "top_k-large": {"top_k": 5000},
    "top_p": {"top_p": 0.9},
    "top_p-large": {"top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "filters": {"temperature": 0.8, "top_k": 100, "top_p": 0.95, "min_p": 0.02},
    "logit_bias": {"logit_bias": {5: 1.0, 900: -np.inf, 77: 3.0}},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "logprobs": {"logprobs": 20},
    "greedy-logprobs": {"temperature": 0, "logprobs": 20},
    "all": {
        "temperature": 0.8, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.1,
        "presence_penalty": 0.5, "logit_bias": {5: 1.0}, "logprobs": 20,
    },
}  # fmt: skip


def rows(kind: str, count: int, size: int) -> NDArray[np.float32]:
    """Make logits (count, size): "peaked", some hundred stand out, as a sure model's do, or "broad"."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((count, size), np.float32) * 3
    if kind == "peaked":
        for row in logits:
            row[rng.choice(size, 400, replace=False)] += 12
    return logits


def draws(count: int, size: int, context: int, options: dict[str, Any]) -> list[Draw]:
    """Ask for as many tokens, each after a context of random ones, half of them the prompt."""
    tokens = np.random.default_rng(1).integers(0, size, context).tolist()
    return [Draw(SamplingParams(**options), 7 + i, 0, tokens, context // 2) for i in range(count)]


def measure(benchmark: BenchmarkFixture, logits: NDArray[np.float32], wanted: list[Draw]) -> None:
    """Time `sample`, check its tokens, and note the time per row."""
    found = benchmark.pedantic(sample, (logits, wanted, kernel), rounds=30, warmup_rounds=2)
    assert [s.token for s in found] == [s.token for s in sample(logits, wanted)]  # type: ignore[union-attr]
    assert benchmark.stats is not None
    benchmark.extra_info["us/row"] = round(benchmark.stats.stats.median / len(wanted) * 1e6, 1)


@pytest.mark.parametrize("kind", ["peaked", "broad"])
@pytest.mark.parametrize("option", OPTIONS)
def bench_row(benchmark: BenchmarkFixture, option: str, kind: str) -> None:
    """One row, after 2,000 tokens."""
    wanted = draws(1, VOCABULARY, 2000, OPTIONS[option])
    measure(benchmark, rows(kind, 1, VOCABULARY), wanted)


@pytest.mark.parametrize("option", ["greedy", "plain", "filters", "all"])
def bench_batch(benchmark: BenchmarkFixture, option: str) -> None:
    """Sixteen rows, after 2,000 tokens each."""
    measure(benchmark, rows("peaked", 16, VOCABULARY), draws(16, VOCABULARY, 2000, OPTIONS[option]))


@pytest.mark.parametrize("context", [1000, 10_000, 100_000])
def bench_context(benchmark: BenchmarkFixture, context: int) -> None:
    """Penalties after so many tokens."""
    measure(benchmark, rows("peaked", 1, VOCABULARY), draws(1, VOCABULARY, context, OPTIONS["penalties"]))


@pytest.mark.parametrize("option", ["greedy", "plain", "top_k", "top_p", "all"])
def bench_small_vocabulary(benchmark: BenchmarkFixture, option: str) -> None:
    """One row of a demo's vocabulary, after 200 tokens."""
    measure(benchmark, rows("peaked", 1, SMALL), draws(1, SMALL, 200, OPTIONS[option]))
