"""Attention on the CPU: against float64, and bit for bit however a batch is cut and shared out."""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptoss_lite.kernels.cpu import isa
from gptoss_lite.kernels.cpu.attention import attention, takes_bf16
from gptoss_lite.kernels.cpu.program import Steps
from gptoss_lite.kernels.cpu.rope import rotate_and_append
from gptoss_lite.kernels.cpu.steps import LANES

BF16 = ml_dtypes.bfloat16
FULL = 2**31 - 1
ANYTHING = 0x7FC0  # bits of NaN: what the cache may hold where nothing was written
PRECISIONS = ["float32", *(["bf16"] if takes_bf16(isa.host()) else [])]

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Bits = NDArray[np.uint16]
Rows = list[tuple[int, int]]  # sequence and position of each


@pytest.fixture(params=list({isa.by_name(name).lanes == LANES: name for name in isa.usable()}.values()))
def each_width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test once for each way in which attention is compiled, for wide registers or for others."""
    monkeypatch.setenv(isa.VARIABLE, request.param)


def bits(values: NDArray[Any]) -> Bits:
    rounded: Bits = values.astype(BF16).view(np.uint16)
    return rounded


def floats(stored: Bits) -> Floats:
    values: Floats = stored.view(BF16).astype(np.float32)
    return values


@dataclass
class Sequences:
    """Sequences of some lengths, every position with a query, their blocks scattered over one cache."""

    lengths: list[int]
    heads: tuple[int, int]  # of queries, of keys
    head_dim: int
    seed: int = 0
    spread: float = 1.0  # of the queries, and so of the scores

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        (H, Hk), D, lengths = self.heads, self.head_dim, self.lengths
        counts = [-(-length // 16) for length in lengths]
        order = iter(rng.permutation(sum(counts) + 2).astype(np.int32))
        self.table = np.full((len(lengths), max(counts)), -1, np.int32)
        self.keys, self.values = (np.full((sum(counts) + 2, Hk, 16, D), ANYTHING, np.uint16) for _ in "kv")
        self.queries = [rng.standard_normal((length, H, D), np.float32) * self.spread for length in lengths]
        self.sinks = rng.standard_normal(H, np.float32) * 2
        self.whole = []  # keys and values (length, Hk, D) of each sequence
        for s, length in enumerate(lengths):
            self.table[s, : counts[s]] = [next(order) for _ in range(counts[s])]
            pair = tuple(bits(rng.standard_normal((length, Hk, D), np.float32)) for _ in "kv")
            self.whole.append(pair)
            for j in range(length):
                place = self.table[s, j // 16], slice(None), j % 16
                self.keys[place], self.values[place] = pair[0][j], pair[1][j]

    def run(self, rows: Rows, window: int = FULL, precision: str = "float32") -> Floats:
        """Attend from these rows, a sequence and a position each, of which neighbours may share a tile."""
        sequence, positions = (np.array(part, np.int32) for part in zip(*rows, strict=True))
        q = np.stack([self.queries[s][position] for s, position in rows])
        out = np.full(q.shape, np.nan, np.float32)
        steps = Steps()
        attention(
            steps, bits(q) if precision == "bf16" else q, self.keys, self.values, self.table, sequence,
            positions, self.sinks, window, self.head_dim**-0.5, out,
        )  # fmt: skip
        steps.run()
        return out

    def exact(self, s: int, position: int, window: int = FULL) -> tuple[Doubles, Doubles]:
        """Compute a row (H, D) in float64, and what it would be were all values positive."""
        H, Hk = self.heads
        seen = slice(max(0, position - window + 1), position + 1)
        keys, values = (floats(part[seen]).astype(np.float64) for part in self.whole[s])
        q = self.queries[s][position].astype(np.float64).reshape(Hk, H // Hk, self.head_dim)
        scores = np.einsum("hmd,khd->hmk", q, keys) * self.head_dim**-0.5
        sinks = self.sinks.astype(np.float64).reshape(Hk, -1, 1)
        top = np.maximum(scores.max(-1, keepdims=True), sinks)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True) + np.exp(sinks - top)
        sums = [np.einsum("hmk,khd->hmd", weights / total, part) for part in (values, np.abs(values))]
        return sums[0].reshape(H, self.head_dim), sums[1].reshape(H, self.head_dim)


def errors(sequences: Sequences, rows: Rows, window: int = FULL, precision: str = "float32") -> Doubles:
    """Compare with float64 -> (rows, H, D), relative to sums without regard to sign."""
    got = sequences.run(rows, window, precision)
    want, size = zip(*(sequences.exact(s, position, window) for s, position in rows), strict=True)
    error: Doubles = np.abs(got - np.stack(want)) / np.stack(size)
    return error


def span(s: int, start: int, stop: int) -> Rows:
    return [(s, position) for position in range(start, stop)]


@pytest.mark.usefixtures("each_width")
@pytest.mark.parametrize("window", [FULL, 1100, 128, 5, 1])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((16, 2), 64), ((6, 2), 48), ((20, 2), 34), ((3, 3), 16), ((4, 1), 2)]
)
def test_attention(heads: tuple[int, int], head_dim: int, window: int) -> None:
    sequences = Sequences([2100, 40, 1], heads, head_dim)
    rows = span(0, 2080, 2100) + span(1, 0, 40) + span(2, 0, 1)
    batches = [rows, *([row] for row in ((0, 2099), (0, 1023), (0, 1024), (1, 15), (1, 16), (2, 0)))]
    for batch in batches:
        assert errors(sequences, batch, window).max() < 1.5e-6  # float32 sums of up to 2,100 products


@pytest.mark.usefixtures("each_width")
@pytest.mark.parametrize("growth", [-1, 1])
def test_scores_far_apart(growth: int) -> None:
    # Scores from 0 to 300, up or down along the sequence: sums shrink from part to part, or hardly count.
    sequences = Sequences([2100], (8, 1), 32, spread=0.1)
    length, D = 2100, 32
    ramp = np.linspace(0, 1, length)[::growth, None, None] * np.ones((1, 1, D))
    sequences.whole[0] = (bits(ramp), sequences.whole[0][1])
    sequences.queries[0] += 300 / D**0.5
    for j in range(length):
        sequences.keys[sequences.table[0, j // 16], :, j % 16] = sequences.whole[0][0][j]
    # An error of 2e-7 in a score of 300 is one of 6e-5 in its weight.
    error = errors(sequences, [*span(0, 2070, 2100), (0, 5), (0, 1500)]).max()
    assert error < 1e-4


@pytest.mark.usefixtures("each_width")
def test_weights_are_exact_to_the_last_bits() -> None:
    # Key j has a score of j / 8 times the query's one element, and its value says which key it is.
    D = 64
    sequences = Sequences([D], (8, 1), D)
    sequences.sinks[:] = -np.inf
    sequences.queries[0][:] = 0
    factors = -8 - np.arange(8, dtype=np.float32)
    sequences.queries[0][-1, :, 0] = factors
    for j in range(D):
        place = sequences.table[0, j // 16], 0, j % 16
        sequences.keys[place], sequences.values[place] = (
            bits(x * np.eye(D)[y]) for x, y in ((j / 8, 0), (1, j))
        )
    (got,) = sequences.run([(0, D - 1)])
    scale = np.float32(D**-0.5 * np.log2(np.e))
    exponent = (factors[:, None].astype(np.float64) * np.arange(D) / 8 * scale).astype(np.float32)
    np.testing.assert_allclose(got / got[:, :1], np.exp2(exponent.astype(np.float64)), rtol=3e-7)


@pytest.mark.parametrize("sink", [-200.0, 0.0, 30.0, 200.0])
def test_a_sink_takes_its_share(sink: float) -> None:
    # One key: the softmax over key and sink is a logistic function of their difference.
    sequences = Sequences([1], (8, 1), 32)
    sequences.sinks[:] = sink + np.arange(8)
    got = sequences.run([(0, 0)])[0]
    value = floats(sequences.whole[0][1][0, 0])
    score = sequences.queries[0][0].astype(np.float64) @ floats(sequences.whole[0][0][0, 0]) * 32**-0.5
    want = 1 / (1 + np.exp(sequences.sinks - score))[:, None] * value
    np.testing.assert_allclose(got, want, rtol=5e-6, atol=1e-37)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("window", [FULL, 128, 7])
@pytest.mark.parametrize("position", [0, 1, 14, 15, 16, 63, 64, 100, 1023, 1024, 1100])
def test_what_is_not_seen_does_not_matter(position: int, window: int, precision: str) -> None:
    sequences = Sequences([1101], (8, 1), 32)
    tile = span(0, max(0, position - 9), position + 1)
    want = sequences.run(tile, window, precision)[-1]
    for j in range(1101):
        if not position - window < j <= position:
            place = sequences.table[0, j // 16], slice(None), j % 16
            sequences.keys[place] = sequences.values[place] = ANYTHING
    slid = max(0, position - window + 1) // 16
    sequences.table[0, :slid] = sequences.table[0, position // 16 + 1 :] = 2**31 - 1
    got = sequences.run([(0, position)], window, precision)[0]
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@st.composite
def batches(draw: st.DrawFn) -> list[list[tuple[int, int, int]]]:
    """Cut some of two sequences of 2,100 and 90 positions into batches of chunks: sequence, start, stop."""
    chunks = []
    for s, length in enumerate((2100, 90)):
        start = draw(st.integers(0, length - 1))
        for _ in range(draw(st.integers(1, 3))):
            stop = min(length, start + draw(st.sampled_from([1, 1, 2, 15, 16, 17, 40])))
            chunks += [(s, start, stop)] if stop > start else []
            start = stop
    chunks = draw(st.permutations(chunks))
    cut = draw(st.integers(1, len(chunks)))
    return [part for part in (chunks[:cut], chunks[cut:]) if part]


@pytest.fixture(scope="module")
def everything() -> dict[tuple[str, int], list[Floats]]:
    """Hold what whole sequences come to, by precision and window."""
    return {}


@pytest.fixture(scope="module")
def two() -> Sequences:
    return Sequences([2100, 90], (10, 1), 32)


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=40, deadline=None)
@given(cut=batches(), window=st.sampled_from([FULL, 128, 20, 1]), threads=st.integers(1, 9))
@example(cut=[[(0, 2099, 2100)]], window=FULL, threads=7)
@example(cut=[[(0, 2030, 2070), (1, 89, 90)]], window=128, threads=3)
def test_a_row_has_the_same_bits_however_a_batch_is_cut(
    two: Sequences,
    everything: dict[tuple[str, int], list[Floats]],
    precision: str,
    cut: list[list[tuple[int, int, int]]],
    window: int,
    threads: int,
) -> None:
    if (precision, window) not in everything:
        whole = [two.run(span(s, 0, n), window, precision) for s, n in enumerate(two.lengths)]
        everything[precision, window] = whole
    want = everything[precision, window]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numba, "get_num_threads", lambda: threads)  # more than there are: they take turns
        for batch in cut:
            rows = [row for chunk in batch for row in span(*chunk)]
            for (s, position), row in zip(rows, two.run(rows, window, precision), strict=True):
                np.testing.assert_array_equal(row.view(np.uint32), want[s][position].view(np.uint32))


@pytest.mark.usefixtures("each_width")
def test_a_row_has_the_same_bits_on_every_cpu(two: Sequences) -> None:
    rows = span(0, 1180, 1200) + span(1, 89, 90)
    got = two.run(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(isa.VARIABLE)
        np.testing.assert_array_equal(got.view(np.uint32), two.run(rows).view(np.uint32))


@pytest.mark.skipif("bf16" not in PRECISIONS, reason="this CPU does not multiply pairs of bf16")
@pytest.mark.parametrize("window", [FULL, 128])
def test_bf16_queries(window: int) -> None:
    sequences = Sequences([1200], (16, 2), 64)
    sequences.queries = [floats(bits(q)) for q in sequences.queries]
    error = errors(sequences, [*span(0, 1180, 1200), (0, 0)], window, "bf16")
    # Weights are rounded to 8 bits: 2^-9 at most, and in a sum of many far less.
    assert error.max() < 2**-9
    assert np.sqrt(np.mean(error**2)) < 2**-11


@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize(("heads", "head_dim"), [((8, 2), 64), ((3, 3), 6), ((2, 1), 2)])
def test_rotate_and_append(heads: tuple[int, int], head_dim: int, tokens: int) -> None:
    rng = np.random.default_rng(1)
    (H, Hk), D = heads, head_dim
    qkv = rng.standard_normal((tokens, (H + 2 * Hk) * D), np.float32)
    qkv[:, -2:] = 1 + 2.0**-8, 1 + 3 * 2.0**-8  # halfway between two bf16
    angle = rng.random((tokens, D // 2)) * 6
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    places = rng.permutation(64)[:tokens].astype(np.int32)
    blocks, slots = places // 16, places % 16
    # Two sequences, of which some positions are asked for in any order.
    table = np.stack([np.arange(4), np.arange(4)[::-1]]).astype(np.int32)
    sequence = rng.integers(0, 2, tokens).astype(np.int32)
    positions = (np.where(sequence == 0, blocks, 3 - blocks) * 16 + slots).astype(np.int32)

    def run(dtype: type) -> tuple[NDArray[Any], Bits, Bits]:
        q: NDArray[Any] = np.zeros((tokens, H, D), dtype)
        keys, values = (np.full((4, Hk, 16, D), ANYTHING, np.uint16) for _ in "kv")
        steps = Steps()
        rotate_and_append(steps, qkv, cos, sin, table, sequence, positions, q, keys, values)
        steps.run()
        return q, keys, values

    q, keys, values = run(np.float32)
    heads_of = qkv.reshape(tokens, -1, D)
    first, second = np.split(heads_of[:, : H + Hk], 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    rotated = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
    np.testing.assert_array_equal(q, rotated[:, :H])
    np.testing.assert_array_equal(keys[blocks, :, slots], bits(rotated[:, H:]))
    np.testing.assert_array_equal(values[blocks, :, slots], bits(heads_of[:, H + Hk :]))
    free = np.ones((4, 16), bool)
    free[blocks, slots] = False
    assert (keys.swapaxes(1, 2)[free] == ANYTHING).all() and (values.swapaxes(1, 2)[free] == ANYTHING).all()
    for got, want in zip(run(np.uint16), (bits(q), keys, values), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.soak
@pytest.mark.skipif("avx2" not in isa.usable(), reason="needs a CPU with AVX2")
def test_avx2_code_gives_the_same_bits() -> None:
    """Have LLVM compile for a CPU without AVX-512; in the other tests it uses all that this one has."""
    program = (
        "import sys; sys.path.insert(0, 'tests'); from test_cpu_attention import Sequences, span;"
        "rows = span(0, 1180, 1200) + span(1, 89, 90);"
        "print(Sequences([1200, 90], (10, 2), 48).run(rows).tobytes().hex())"
    )
    features = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2"}
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | extra, capture_output=True, check=True
        ).stdout
        for extra in ({}, features)
    }
    assert len(outputs) == 1
