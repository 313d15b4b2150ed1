"""Attention of one full layer of gpt-oss-20b: 64 query heads on 8 key heads of 64; answers checked."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bench.shares import Report, noted
from gptoss_lite.kernels.cpu import isa
from gptoss_lite.kernels.cpu.attention import attention, takes_bf16
from gptoss_lite.kernels.cpu.program import Rooms, Steps
from gptoss_lite.kernels.cpu.rope import rotate_and_append

HEADS, KEY_HEADS, HEAD_DIM = 64, 8, 64
FULL, SLIDING = 2**31 - 1, 128
STEP = 512  # tokens of a prompt computed at a time

Queries = pytest.mark.parametrize("queries", ["float32", *(["bf16"] if takes_bf16(isa.host()) else [])])


class Layer:
    """Keys and values of some sequences of one length, and the queries of their last positions."""

    def __init__(self, length: int, sequences: int = 1, queries: str = "float32", last: int = 1) -> None:
        rng = np.random.default_rng(0)
        blocks = -(-length // 16)
        shape = (sequences * blocks, KEY_HEADS, 16, HEAD_DIM)
        self.keys, self.values = (
            (rng.standard_normal(shape, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
            for _ in range(2)
        )
        self.table = rng.permutation(shape[0]).astype(np.int32).reshape(sequences, blocks)
        self.positions = np.tile(np.arange(length - last, length, dtype=np.int32), sequences)
        self.sequence = np.repeat(np.arange(sequences, dtype=np.int32), last)
        q = rng.standard_normal((len(self.positions), HEADS, HEAD_DIM), np.float32)
        self.q: NDArray[Any] = q if queries == "float32" else q.astype(ml_dtypes.bfloat16).view(np.uint16)
        self.sinks = np.zeros(HEADS, np.float32)
        self.out, self.rooms = np.empty(q.shape, np.float32), Rooms()

    def run(self, window: int) -> None:
        """Attend from all queries, a step at a time."""
        for start in range(0, len(self.q), STEP):
            rows, steps = slice(start, start + STEP), Steps(rooms=self.rooms)
            attention(
                steps, self.q[rows], self.keys, self.values, self.table, self.sequence[rows],
                self.positions[rows], self.sinks, window, HEAD_DIM**-0.5, self.out[rows],
            )  # fmt: skip
            steps.run()

    def check(self, window: int) -> None:
        """Compare the last query's first eight heads with NumPy."""
        seen = np.arange(max(0, int(self.positions[-1]) - window + 1), self.positions[-1] + 1)
        places = self.table[self.sequence[-1], seen // 16], 0, seen % 16
        k, v = (part[places].view(ml_dtypes.bfloat16).astype(np.float64) for part in (self.keys, self.values))
        q = self.q[-1, : HEADS // KEY_HEADS]
        if q.dtype == np.uint16:
            q = q.view(ml_dtypes.bfloat16)
        weights = np.exp(q.astype(np.float64) @ k.T * HEAD_DIM**-0.5)
        want = weights @ v / (weights.sum(-1, keepdims=True) + 1)
        within = 1e-5 if self.q.dtype == np.float32 else 1e-3
        np.testing.assert_allclose(self.out[-1, : HEADS // KEY_HEADS], want, rtol=0, atol=within)

    def products(self, window: int) -> int:
        """Count the multiplications of all queries with the keys and values that they see."""
        seen = np.minimum(self.positions.astype(np.int64) + 1, window).sum()
        return int(seen) * 2 * HEADS * HEAD_DIM


@Queries
@pytest.mark.parametrize(
    ("length", "sequences"), [(4096, 1), (4096, 8), (131_072, 1)], ids=["4k", "4k-of-8", "128k"]
)
def bench_attention_decode(report: Report, length: int, sequences: int, queries: str) -> None:
    """One token of each sequence."""
    layer = Layer(length, sequences, queries)
    report.run(lambda: layer.run(FULL))
    layer.check(FULL)
    report.share("read", layer.keys.nbytes + layer.values.nbytes)


def bench_attention_decode_sliding(report: Report) -> None:
    """One token of each of 8 sequences, in a layer with a window."""
    layer = Layer(4096, 8)
    report.run(lambda: layer.run(SLIDING), rounds=50)
    layer.check(SLIDING)
    report.share("multiply-add", layer.products(SLIDING))


@Queries
@pytest.mark.parametrize("length", [512, 4096])
def bench_attention_prefill(report: Report, length: int, queries: str) -> None:
    """A prompt, 512 tokens at a time."""
    layer = Layer(length, 1, queries, last=length)
    report.run(lambda: layer.run(FULL), rounds=5 if length > STEP else 15)
    layer.check(FULL)
    report.share("multiply-add", layer.products(FULL))


def bench_attention_prefill_sliding(report: Report) -> None:
    """512 tokens in a layer with a window."""
    layer = Layer(4096, 1, last=STEP)
    report.run(lambda: layer.run(SLIDING))
    layer.check(SLIDING)
    report.share("multiply-add", layer.products(SLIDING))


@pytest.mark.parametrize("tokens", [1, STEP])
def bench_rotate_and_append(report: Report, tokens: int) -> None:
    """Queries, keys and values of some tokens."""
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((tokens, (HEADS + 2 * KEY_HEADS) * HEAD_DIM), np.float32)
    cos, sin = (rng.standard_normal((tokens, HEAD_DIM // 2), np.float32) for _ in range(2))
    positions, sequence = np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.int32)
    table = np.arange(STEP // 16, dtype=np.int32)[None]
    q = np.empty((tokens, HEADS, HEAD_DIM), np.float32)
    keys, values = (np.empty((STEP // 16, KEY_HEADS, 16, HEAD_DIM), np.uint16) for _ in range(2))

    def note(steps: Steps) -> None:
        rotate_and_append(steps, qkv, cos, sin, table, sequence, positions, q, keys, values)

    report.run(noted(note))
    first, second = np.split(qkv[:, :HEAD_DIM], 2, axis=1)
    want = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    np.testing.assert_array_equal(q[:, 0], want)
    report.share("read", qkv.nbytes + q.nbytes + 2 * tokens * KEY_HEADS * HEAD_DIM * 2)
