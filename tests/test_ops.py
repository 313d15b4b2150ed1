"""Each step on the CPU against its specification, on odd shapes, ragged batches and packed weights."""

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from gptoss_lite.batch import Batch
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import DeviceError
from gptoss_lite.ops import Linear, Norm, Ops, Use, get_ops
from gptoss_lite.quant import quantize
from gptoss_lite.rope import yarn

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, HEAD_DIM, EXPERTS = 160, 96, 6, 2, 64, 8
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "gpt_oss", "vocab_size": 101, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_DIM, "num_local_experts": EXPERTS, "num_experts_per_tok": 4, "sliding_window": 128,
        "max_position_embeddings": 4096, "rope_theta": 150000,
    }
)  # fmt: skip
RNG = np.random.default_rng(0)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, np.float32)


def batch(*spans: tuple[int, int]) -> Batch:
    """Sequences that compute positions start..end-1, their blocks scattered over the cache."""
    counts = [end - start for start, end in spans]
    blocks = RNG.permutation(40 * len(spans)).astype(np.int32).reshape(len(spans), 40)
    total = sum(counts)
    return Batch(
        tokens=RNG.integers(0, 101, total, np.int32),
        positions=np.concatenate([np.arange(*span, dtype=np.int32) for span in spans]),
        query_start=np.cumsum([0, *counts], dtype=np.int32),
        full_table=blocks,
        sliding_table=blocks,
        rows=np.arange(total, dtype=np.int32),
        decoding=np.array(counts) == 1,
    )


@pytest.fixture(scope="module")
def spec() -> Ops:
    return get_ops("reference")


@pytest.fixture(scope="module")
def cpu() -> Ops:
    return get_ops("cpu")


BF16 = ml_dtypes.bfloat16
PLAIN = Use("lm_head")
ROPE = yarn(CONFIG.rope, HEAD_DIM)


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_products_of_dense_weights(spec: Ops, cpu: Ops, dtype: type) -> None:
    x, norm = normal(5, HIDDEN), Norm(normal(HIDDEN), 1e-5)
    weight: NDArray[Any] = normal(101, HIDDEN).astype(dtype)
    step = replace(batch((0, 5)), rows=np.array([0, 3, 4], np.int32))
    want = spec.logits(x, norm, Linear(weight), step)
    got = cpu.logits(x, norm, Linear(cpu.prepare(weight, PLAIN)), step)
    # float32 sums in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_embeddings_are_exact(spec: Ops, cpu: Ops) -> None:
    table, step = normal(101, HIDDEN).astype(BF16), batch((0, 4), (7, 9))
    want, (cos, sin) = spec.embed(table, ROPE, step)
    got, rotation = cpu.embed(cpu.prepare(table, PLAIN), ROPE, step)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(rotation, (cos, sin))


def test_router_breaks_ties_by_index(spec: Ops, cpu: Ops) -> None:
    x, norm = normal(33, HIDDEN), Norm(normal(HIDDEN), 1e-5)
    weight = normal(EXPERTS, HIDDEN)
    weight[6] = weight[1]
    router = Linear(weight, np.zeros(EXPERTS, np.float32))
    h, ids, weights = spec.route(x, norm, router, 4)
    got_h, got_ids, got_weights = cpu.route(x, norm, replace(router, weight=cpu.prepare(weight, PLAIN)), 4)
    np.testing.assert_array_equal(got_ids, ids)
    np.testing.assert_allclose(got_weights, weights, rtol=1e-5)
    np.testing.assert_allclose(got_h, h, rtol=1e-5, atol=1e-6)
    both = (ids == 1).any(axis=1) & (ids == 6).any(axis=1)
    assert both.any()
    for row in ids[both]:
        assert row.tolist().index(1) + 1 == row.tolist().index(6)


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("packed", [True, False])
def test_experts(spec: Ops, cpu: Ops, tokens: int, packed: bool) -> None:
    def weight(*shape: int) -> Any:
        values = (normal(*shape) * 2).astype(BF16)
        return quantize(values, "mxfp4") if packed else values

    gate_up = Linear(weight(EXPERTS, 2 * INTERMEDIATE, HIDDEN), normal(EXPERTS, 2 * INTERMEDIATE))
    down = Linear(weight(EXPERTS, HIDDEN, INTERMEDIATE), normal(EXPERTS, HIDDEN))
    x, h = normal(tokens, HIDDEN), normal(tokens, HIDDEN)
    ids = np.stack([RNG.permutation(EXPERTS)[:4] for _ in range(tokens)]).astype(np.int32)
    weights = RNG.random((tokens, 4), np.float32)
    want = spec.experts(h, ids, weights, gate_up, down, 7.0, x)
    gate_up, down = (replace(w, weight=cpu.prepare(w.weight, PLAIN)) for w in (gate_up, down))
    got = cpu.experts(h, ids, weights, gate_up, down, 7.0, x)
    # Pre-activations reach +-60 here, so that both clamps are at work; sums of 96 products up to 56 * 10.
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("window", [None, 128, 5])
@pytest.mark.parametrize("spans", [[(0, 1)], [(0, 40), (0, 16), (0, 17)], [(300, 303), (0, 5), (15, 16)]])
def test_qkv_and_attention(spec: Ops, cpu: Ops, window: int | None, spans: list[tuple[int, int]]) -> None:
    norm = Norm(normal(HIDDEN), 1e-5)
    width = (HEADS + 2 * KEY_HEADS) * HEAD_DIM
    w = Linear((normal(width, HIDDEN) / 8).astype(BF16), normal(width))
    sinks = normal(HEADS)
    history = batch(*((0, end) for _, end in spans))
    current = batch(*spans)
    current = replace(current, full_table=history.full_table, sliding_table=history.sliding_table)
    x_history, x = normal(len(history.tokens), HIDDEN), normal(len(current.tokens), HIDDEN)

    def attend(ops: Ops, w: Linear) -> NDArray[np.float32]:
        cache = ops.new_cache(CONFIG, 40 * len(spans), 40 * len(spans))
        out: NDArray[np.float32]
        for rows, step in ((x_history, history), (x, current)):
            angle = step.positions[:, None] * np.linspace(0.5, 0.001, HEAD_DIM // 2, dtype=np.float32)
            q = ops.qkv(rows, norm, w, (np.cos(angle), np.sin(angle)), cache, 0, step.full_table, step)
            out = ops.attention(q, cache, 0, step.full_table, step, sinks, window)
        return out

    want = attend(spec, w)
    got = attend(cpu, replace(w, weight=cpu.prepare(w.weight, PLAIN)))
    # bf16 keys and values: 2^-9 relative on each of the terms of an average.
    np.testing.assert_allclose(got, want, rtol=0, atol=8e-3 * np.abs(want).max())
    assert got.shape == (len(x), HEADS, HEAD_DIM)


def test_a_sink_takes_its_share(cpu: Ops) -> None:
    # One visible key: the softmax over key and sink is a logistic function of their difference.
    current = batch((0, 1))
    cache = cpu.new_cache(CONFIG, 40, 40)
    block = int(current.full_table[0, 0])
    for stored, value in ((cache.keys[0], 0.5), (cache.values[0], 2.0)):
        stored[block, :, 0] = np.full(HEAD_DIM, value, BF16).view(np.uint16)
    q = np.full((1, HEADS, HEAD_DIM), 0.25, np.float32)  # score 0.25 * 0.5 * 64 / 8 = 1
    sinks = np.linspace(-3, 3, HEADS, dtype=np.float32)
    got = cpu.attention(q, cache, 0, current.full_table, current, sinks, None)
    want = 2 / (1 + np.exp(sinks - 1))
    np.testing.assert_allclose(got[0], np.repeat(want[:, None], HEAD_DIM, axis=1), rtol=1e-5)


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", 10_000])
def test_threads_must_be_some_that_there_are(threads: int) -> None:
    with pytest.raises(DeviceError, match="threads is"):
        get_ops("cpu", threads)


def test_no_rows_wanted_cost_no_reading(cpu: Ops) -> None:
    norm, weight = Norm(normal(HIDDEN), 1e-5), cpu.prepare(normal(101, HIDDEN), PLAIN)
    step = replace(batch((0, 3)), rows=np.empty(0, np.int32))
    assert cpu.logits(normal(3, HIDDEN), norm, Linear(weight), step).shape == (0, 101)


def test_unknown_device_names_the_choices() -> None:
    with pytest.raises(DeviceError, match="'tpu': choose auto, cpu, cuda, cuda:N"):
        get_ops("tpu")
