"""Comparing networks over a text: against plain arithmetic; and what quantising costs the bundled model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss_lite.calibrate import read_rows
from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.conversion import execute, plan_quantization
from gptoss_lite.errors import RequestError
from gptoss_lite.model import GptOss
from gptoss_lite.ops import Ops, get_ops
from gptoss_lite.quality import compare
from gptoss_lite.quant.policy import make_policy
from gptoss_lite.tokenizer import load_tokenizer

DATA = Path(__file__).parent / "data" / "demo"
ROWS = [np.random.default_rng(n).integers(0, 1000, n).tolist() for n in (90, 33, 2)]


class Noisy(Ops):
    """The reference with other logits and, in some layers, other experts, both written down."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.said: list[np.ndarray] = []
        self.shifted = 0

    def route(self, *inputs: Any) -> tuple[Any, Any, Any]:
        h, ids, weights = super().route(*inputs)
        if self.rng.random() < 0.5:
            self.shifted += 1
            ids = ids[:, [1, 0, 3, 2]]  # the same experts in another order
            ids[:, 0] = [next(e for e in range(8) if e not in row) for row in ids]  # and one that is not
        return h, ids, weights

    def logits(self, *inputs: Any) -> Any:
        logits = super().logits(*inputs)
        logits += self.rng.standard_normal(logits.shape).astype(np.float32) / 4
        self.said.append(logits)
        return logits


def probabilities(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def test_a_network_agrees_with_itself(tiny: GptOss) -> None:
    quality = compare(tiny, tiny, ROWS)
    assert (quality.kl, quality.top1, quality.routing) == (0, 1, 1)
    assert quality.tokens == 89 + 32 + 1


def test_measures_are_what_they_are_called(tiny_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_path)
    reference, model = GptOss(checkpoint, get_ops("reference")), GptOss(checkpoint, noisy := Noisy())
    quality = compare(reference, model, ROWS)
    q = np.concatenate([probabilities(logits) for logits in noisy.said])
    p = np.concatenate([probabilities(reference.logits(row[:-1])) for row in ROWS])
    nexts = np.concatenate([row[1:] for row in ROWS])
    assert quality.perplexity == pytest.approx(np.exp(-np.log(q[np.arange(len(q)), nexts]).mean()))
    assert quality.kl == pytest.approx((p * np.log(p / q)).sum(axis=1).mean())
    assert quality.top1 == (p.argmax(axis=1) == q.argmax(axis=1)).mean()


def test_routing_counts_experts_whatever_their_order(tiny_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_path)

    class Last(Ops):
        """Swaps experts in the last layer, and replaces one there."""

        calls = 0

        def route(self, *inputs: Any) -> tuple[Any, Any, Any]:
            h, ids, weights = super().route(*inputs)
            self.calls += 1
            if self.calls % 4 == 0:
                ids = ids[:, ::-1].copy()
                ids[:, 0] = [next(e for e in range(8) if e not in row) for row in ids]
            return h, ids, weights

    quality = compare(GptOss(checkpoint, Ops()), GptOss(checkpoint, Last()), ROWS)
    assert quality.routing == pytest.approx(15 / 16)  # one of four experts, in one of four layers


def test_a_long_row_is_compared_in_whole(tiny_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_path)
    row = np.random.default_rng(0).integers(0, 1000, 600).tolist()  # more than one step of the backend's
    quality = compare(GptOss(checkpoint, get_ops("reference")), GptOss(checkpoint, get_ops("cpu")), [row])
    assert quality.tokens == 599
    assert quality.kl < 0.01 and quality.routing > 0.99


def test_backends_are_left_as_they_were(tiny: GptOss) -> None:
    ops = tiny.ops
    compare(tiny, tiny, ROWS[-1:])
    assert tiny.ops is ops
    with pytest.raises(RequestError, match="token id 1000000"):
        compare(tiny, tiny, [[10**6, 1]])
    assert tiny.ops is ops


def test_calibration_costs_the_bundled_model_less_than_a_search(tmp_path: Path) -> None:
    source = open_checkpoint(DATA / "bf16")
    tokenizer = load_tokenizer(DATA / "bf16", source.config.vocab_size)
    rows = read_rows(DATA / "heldout.txt", tokenizer, 6 * 512)
    reference = GptOss(source, get_ops("cpu"))
    kl = {}
    for name, calibration_rows in (("search", None), ("calibrated", rows[:3])):
        plan = plan_quantization(
            source, tmp_path / name, make_policy("experts"), calibration_rows=calibration_rows
        )
        execute(plan, workers=1)
        made = GptOss(open_checkpoint(tmp_path / name), get_ops("cpu"))
        kl[name] = compare(reference, made, rows[3:]).kl
    assert kl["calibrated"] < 0.85 * kl["search"]
