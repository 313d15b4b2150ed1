"""Steps of a model in gpt-oss-20b's shapes: two of its layers, and what stands outside of them."""

import numpy as np
import pytest

from bench.shares import Report
from gptoss_lite.engine import Request
from gptoss_lite.footprint import step_bytes
from gptoss_lite.measure import MeasuredEngine, Workload, measure_prefill
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.sampling import SamplingParams
from gptoss_lite.synthetic import synthetic

LAYERS, PROMPT, CONTEXT = 2, 512, 128


@pytest.fixture(scope="module", params=["accurate", "int8"])
def model(request: pytest.FixtureRequest) -> GptOss:
    """Two layers, all quantised."""
    ops = get_ops("cpu", activations=request.param, dense="int8")
    return GptOss(synthetic("20b", layers=LAYERS), ops, cache_tokens=8 * PROMPT)


def prompt(rng: np.random.Generator, model: GptOss, tokens: int) -> list[int]:
    ids: list[int] = rng.integers(0, model.config.vocab_size, tokens).tolist()
    return ids


@pytest.mark.parametrize("sequences", [1, 4])
def bench_decode(report: Report, model: GptOss, sequences: int) -> None:
    """One token of each sequence, drawn at temperature 1."""
    rng = np.random.default_rng(0)
    engine = MeasuredEngine(model, Workload(CONTEXT, 64, concurrency=sequences))
    for number in range(sequences):
        engine.submit(Request(prompt(rng, model, CONTEXT), SamplingParams(), number))
    while len(engine.step()) < sequences:
        pass
    events = report.run(engine.step, rounds=20)
    assert len(events) == sequences
    assert all(event.error is None for event in events)
    needed = step_bytes(model, sequences=sequences, visible=CONTEXT, kv_itemsize=engine.kv_itemsize)
    report.share("read", needed.total)


def bench_prefill(report: Report, model: GptOss, request: pytest.FixtureRequest) -> None:
    """A prompt that the cache knows nothing of, and its first token."""
    rng, config = np.random.default_rng(0), model.config
    engine = MeasuredEngine(model, Workload(PROMPT, 1))
    measured = report.run(lambda: measure_prefill(engine, prompt(rng, model, PROMPT)), rounds=3)
    assert measured.tokens == PROMPT
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = (heads + config.num_attention_heads) * config.head_dim * config.hidden_size
    experts = config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size
    passes = 2 if request.node.callspec.params["model"] == "accurate" else 1
    report.share("dot", PROMPT * LAYERS * (attention + experts) * passes)
