"""The bundled model: it is what its card says, and it talks as a gpt-oss does."""

from pathlib import Path

import numpy as np
import pytest

import gptoss_lite as gl
from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.model import GptOss
from gptoss_lite.quant import MXFP4Tensor, quantize
from gptoss_lite.tokenizer import Tokenizer

DEMO = Path(gl.__file__).parent / "demo"
BEFORE = Path(__file__).parent / "data" / "demo"
PROMPTS = (
    "Tell me about the whale.",
    "Hello!",
    "Who is Emma?",
    "Write a paragraph about the sea and a ship.",
)


@pytest.fixture(scope="module")
def demo() -> tuple[GptOss, Tokenizer]:
    return gl.load("demo", device="cpu")


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file()) < 12e6


def test_it_is_its_bf16_self_with_the_experts_quantised() -> None:
    shipped, before = open_checkpoint(DEMO), open_checkpoint(BEFORE / "bf16")
    assert set(shipped.names()) == set(before.names())
    for name in shipped.names():
        shipped.verify(name)
        tensor, source = shipped.tensor(name), before.tensor(name)
        assert isinstance(source, np.ndarray)
        if isinstance(tensor, MXFP4Tensor):
            again = quantize(source, "mxfp4")
            np.testing.assert_array_equal(tensor.blocks, again.blocks)
            np.testing.assert_array_equal(tensor.scales, again.scales)
        else:
            np.testing.assert_array_equal(tensor, source)


def test_every_effort_thinks_and_then_answers(demo: tuple[GptOss, Tokenizer]) -> None:
    reasoning: dict[str, int] = {}
    turns = 0
    for effort in ("low", "medium", "high"):
        for seed, prompt in enumerate(PROMPTS * 3):
            *_, last = gl.stream_generate(
                *demo,
                messages=[{"role": "user", "content": prompt}],
                reasoning_effort=effort,
                date="2026-01-01",
                max_tokens=400,
                sampling=gl.SamplingParams(temperature=0.8, seed=seed),
            )
            assert last.usage is not None
            reasoning[effort] = reasoning.get(effort, 0) + last.usage.reasoning_tokens
            channels = [message.channel for message in last.messages]
            turns += channels == ["analysis", "final"] and last.finish_reason == "stop"
    assert turns >= 34  # of 36
    assert reasoning["low"] < reasoning["medium"] < reasoning["high"]


def test_it_has_learnt_its_prose(demo: tuple[GptOss, Tokenizer]) -> None:
    model, tokenizer = demo
    text = (BEFORE / "heldout.txt").read_text(encoding="utf-8")
    tokens = tokenizer.encode(text[:40_000])[: 384 * 16 + 1]
    nats = []
    for start in range(0, len(tokens) - 1, 384):
        row = tokens[start : start + 385]
        logits = model.logits(row[:-1]).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(row) - 1), row[1:]]
        nats.append(np.log(np.exp(logits).sum(axis=1)) - chosen)
    assert np.concatenate(nats).mean() < 4.09  # a uniform guess is 8.3; the same network once stopped at 4.09
