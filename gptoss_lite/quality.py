"""How much a network says otherwise than the one it was made from, over a text."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.model import GptOss
from gptoss_lite.ops import Ops

_POSITIONS = 64  # whose probabilities are looked at together: vocabularies are large


@dataclass(frozen=True, slots=True)
class Quality:
    """A network against its reference.

    tokens: how many were predicted. perplexity: of the network itself. kl: mean KL(reference || network) of
    the next token, in nats. top1: share of positions at which both think the same token the likeliest.
    routing: share of the reference's choices of experts that the network makes too, whatever their order.
    """

    tokens: int
    perplexity: float
    kl: float
    top1: float
    routing: float


def compare(reference: GptOss, model: GptOss, rows: Sequence[Sequence[int]]) -> Quality:
    """Run two networks over rows of token ids, at least two each, and compare what they predict.

    Both must be on the CPU or the reference backend, one layer after another being asked for its experts.
    """
    nats = kl = 0.0
    tokens = top1 = agreed = choices = 0
    for row in rows:
        expected, theirs = _run(reference, row[:-1])
        found, ours = _run(model, row[:-1])
        tokens += len(row) - 1
        same = (theirs[..., :, None] == ours[..., None, :]).any(axis=-1)
        agreed, choices = agreed + int(same.sum()), choices + same.size
        for start in range(0, len(expected), _POSITIONS):
            part = slice(start, start + _POSITIONS)
            p, q = _log_softmax(expected[part]), _log_softmax(found[part])
            kl += float((np.exp(p) * (p - q)).sum())
            top1 += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
            nats -= float(q[np.arange(len(q)), row[1:][part]].sum())
    return Quality(tokens, math.exp(nats / tokens), kl / tokens, top1 / tokens, agreed / choices)


class _Recorder:
    """Passes all on to a backend, and keeps the experts that it chooses."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.chosen: list[NDArray[np.int32]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def route(self, *inputs: Any) -> tuple[Any, Any, Any]:
        h, ids, weights = self._ops.route(*inputs)
        self.chosen.append(ids)
        return h, ids, weights


def _run(model: GptOss, tokens: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Compute logits (T, vocab), and the experts chosen (layers, T, k)."""
    with _recorded(model) as recorder:
        logits = model.logits(tokens)
    layers = model.config.num_hidden_layers
    steps = [recorder.chosen[start : start + layers] for start in range(0, len(recorder.chosen), layers)]
    return logits, np.concatenate([np.stack(step) for step in steps], axis=1)


@contextmanager
def _recorded(model: GptOss) -> Iterator[_Recorder]:
    ops, recorder = model.ops, _Recorder(model.ops)
    model.ops = cast(Ops, recorder)
    try:
        yield recorder
    finally:
        model.ops = ops


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted
