"""Networks whose every matrix is quantised, on the plain backends: each form against its own values."""

import tracemalloc
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from gptoss_lite.batch import Batch
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import FormatError
from gptoss_lite.model import GptOss
from gptoss_lite.ops import Linear, Norm, Ops, Use, get_ops
from gptoss_lite.packing import CPU_ROWS, CUDA_TILES, PackedTensor, kind_of, pack
from gptoss_lite.quant import Int8Tensor, QTensor, codecs
from gptoss_lite.quant.formats import MXFP4, Format, Int8
from gptoss_lite.rope import yarn

HIDDEN, INNER, HEADS, KEY_HEADS, EXPERTS, VOCABULARY = 192, 128, 4, 2, 5, 99
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "gpt_oss", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
        "head_dim": 64, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 128,
        "max_position_embeddings": 4096, "rope_theta": 150000,
    }
)  # fmt: skip
FORMATS: list[Format] = [
    MXFP4(),
    *(Int8(group, scales) for group in (32, 64, None) for scales in ("bf16", "float16", "e8m0")),
]
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
RNG = np.random.default_rng(0)


def normal(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape, np.float32)


def quantised(format: Format, *shape: int) -> Any:
    return codecs.encode(normal(*shape), format)


@dataclass(frozen=True, slots=True)
class Memory:
    """A checkpoint that is no file."""

    config: ModelConfig
    tensors: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def tensor(self, name: str) -> Any:
        return self.tensors[name]

    def verify(self, name: str) -> None:
        pass


def network(format: Format, tied: bool = False) -> Memory:
    """Draw weights, all matrices but the routers quantised."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    if not tied:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    tensors: dict[str, Any] = {"model.norm.weight": normal(HIDDEN)}
    for layer in range(CONFIG.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        for part, rows, columns in (
            ("q", HEADS * 64, HIDDEN), ("k", KEY_HEADS * 64, HIDDEN), ("v", KEY_HEADS * 64, HIDDEN),
            ("o", HIDDEN, HEADS * 64),
        ):  # fmt: skip
            shapes[f"{attention}.{part}_proj.weight"] = (rows, columns)
            tensors[f"{attention}.{part}_proj.bias"] = normal(rows)
        shapes[f"{mlp}.experts.gate_up_proj"] = (EXPERTS, 2 * INNER, HIDDEN)
        shapes[f"{mlp}.experts.down_proj"] = (EXPERTS, HIDDEN, INNER)
        tensors |= {
            f"{attention}.sinks": normal(HEADS),
            f"{prefix}.input_layernorm.weight": normal(HIDDEN),
            f"{prefix}.post_attention_layernorm.weight": normal(HIDDEN),
            f"{mlp}.router.weight": normal(EXPERTS, HIDDEN),
            f"{mlp}.router.bias": normal(EXPERTS),
            f"{mlp}.experts.gate_up_proj_bias": normal(EXPERTS, 2 * INNER),
            f"{mlp}.experts.down_proj_bias": normal(EXPERTS, HIDDEN),
        }
    for name, shape in shapes.items():
        tensors[name] = codecs.encode(normal(*shape) / np.float32(8), format)
    return Memory(replace(CONFIG, tie_word_embeddings=tied), tensors)


def model(checkpoint: Memory, ops: Ops) -> GptOss:
    return GptOss(checkpoint, ops)  # type: ignore[arg-type]


def expanded(checkpoint: Memory) -> Memory:
    """Hold the same values in float32."""
    tensors = {n: t.dequantize() if isinstance(t, QTensor) else t for n, t in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def batch(tokens: int, *rows: int) -> Batch:
    """One sequence from its beginning."""
    blocks = np.arange(tokens // 16 + 1, dtype=np.int32)[None]
    return Batch(
        tokens=RNG.integers(0, VOCABULARY, tokens, np.int32),
        positions=np.arange(tokens, dtype=np.int32),
        query_start=np.array([0, tokens], np.int32),
        full_table=blocks,
        sliding_table=blocks,
        rows=np.array(rows, np.int32),
        decoding=np.zeros(1, np.bool_),
    )


@pytest.fixture(scope="module")
def spec() -> Ops:
    return get_ops("reference")


@pytest.fixture(scope="module")
def cpu() -> Ops:
    return get_ops("cpu")


PLAIN = Use("lm_head")
ROPE = yarn(CONFIG.rope, 64)


@every_format
def test_products_are_those_of_the_expanded_weight(cpu: Ops, format: Format) -> None:
    x, weight = normal(7, HIDDEN), quantised(format, 101, HIDDEN)
    step, norm = batch(7, 0, 3, 6), Norm(normal(HIDDEN), 1e-5)
    want = get_ops("reference").logits(x, norm, Linear(weight.dequantize()), step)
    for ops in (get_ops("reference"), cpu):
        got = ops.logits(x, norm, Linear(ops.prepare(weight, PLAIN)), step)
        # float32 sums in another order, activations of 16 bits
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@every_format
def test_experts_are_those_of_the_expanded_weights(spec: Ops, cpu: Ops, format: Format) -> None:
    tokens = 9
    gate_up = Linear(quantised(format, EXPERTS, 2 * INNER, HIDDEN), normal(EXPERTS, 2 * INNER))
    down = Linear(quantised(format, EXPERTS, HIDDEN, INNER), normal(EXPERTS, HIDDEN))
    x, h = normal(tokens, HIDDEN), normal(tokens, HIDDEN)
    ids = np.stack([RNG.permutation(EXPERTS)[:2] for _ in range(tokens)]).astype(np.int32)
    weights = RNG.random((tokens, 2), np.float32)
    dense_up, dense_down = (replace(w, weight=w.weight.dequantize()) for w in (gate_up, down))
    want = spec.experts(h, ids, weights, dense_up, dense_down, 7.0, x)
    np.testing.assert_array_equal(spec.experts(h, ids, weights, gate_up, down, 7.0, x), want)
    gate_up, down = (replace(w, weight=cpu.prepare(w.weight, PLAIN)) for w in (gate_up, down))
    got = cpu.experts(h, ids, weights, gate_up, down, 7.0, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-4 * np.abs(want).max())


@every_format
def test_a_row_has_the_same_bits_whoever_shares_the_batch(cpu: Ops, format: Format) -> None:
    x, norm = normal(33, HIDDEN), Norm(normal(HIDDEN), 1e-5)
    weight = Linear(cpu.prepare(quantised(format, 101, HIDDEN), PLAIN))
    step = batch(33, *range(33))
    together = cpu.logits(x, norm, weight, step)
    one_thread = get_ops("cpu", 1)
    for row in (0, 5, 32):
        alone = replace(step, rows=np.array([row], np.int32))
        np.testing.assert_array_equal(cpu.logits(x, norm, weight, alone)[0], together[row])
    np.testing.assert_array_equal(one_thread.logits(x, norm, weight, step), together)


@every_format
def test_tokens_are_looked_up_exactly(spec: Ops, cpu: Ops, format: Format) -> None:
    table, step = quantised(format, VOCABULARY, HIDDEN), batch(20)
    want = table.dequantize()[step.tokens]
    for ops in (spec, cpu):
        x, _ = ops.embed(ops.prepare(table, Use("embedding")), ROPE, step)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, want)


@pytest.mark.parametrize("tied", [False, True])
@every_format
def test_networks_compute_what_their_values_say(spec: Ops, cpu: Ops, format: Format, tied: bool) -> None:
    checkpoint = network(format, tied)
    tokens = RNG.integers(0, VOCABULARY, 40).tolist()
    want = model(expanded(checkpoint), spec).logits(tokens)
    np.testing.assert_array_equal(model(checkpoint, spec).logits(tokens), want)
    # Keys and values are rounded to bf16, here and there to the other neighbour.
    got, dense = (model(c, cpu).logits(tokens) for c in (checkpoint, expanded(checkpoint)))
    assert np.linalg.norm(got - dense) <= 5e-3 * np.linalg.norm(dense)
    assert np.median(np.abs(got - want)) <= 0.01 * np.abs(want).std()


@every_format
def test_attention_reaches_as_far_as_its_values_do(spec: Ops, format: Format) -> None:
    class Noting(Ops):
        def prepare(self, tensor: Any, use: Use) -> Any:
            uses.append(use)
            return super().prepare(tensor, use)

    checkpoint = network(format)
    uses: list[Use] = []
    model(checkpoint, Noting())
    packed, uses = uses, []
    model(expanded(checkpoint), Noting())
    assert packed == uses
    (reach,) = (use.reach() for use in packed if use.kind == "out" and use.layer == 1)
    prefix = "model.layers.1."
    norm = np.abs(checkpoint.tensors[f"{prefix}input_layernorm.weight"]).max() * np.sqrt(HIDDEN)
    values = checkpoint.tensors[f"{prefix}self_attn.v_proj.weight"].dequantize()
    bias = np.abs(checkpoint.tensors[f"{prefix}self_attn.v_proj.bias"])
    assert reach == pytest.approx(float((np.sqrt((values**2).sum(1)) * norm + bias).max()), rel=1e-5)


def test_loading_never_expands_a_matrix_as_a_whole(cpu: Ops) -> None:
    checkpoint = network(Int8())
    rows = 1 << 16
    value = Int8Tensor(np.ones((rows, HIDDEN), np.int8), np.ones((rows, HIDDEN // 32), bfloat16))
    checkpoint.tensors["model.layers.1.self_attn.v_proj.weight"] = value
    checkpoint.tensors["model.layers.1.self_attn.v_proj.bias"] = np.zeros(rows, np.float32)
    tracemalloc.start()
    try:
        model(checkpoint, cpu)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One is in tiles by itself, one beside those of queries and keys; expanded it takes 4.
    assert peak < 2.5 * value.nbytes


@pytest.mark.parametrize(
    ("scales", "bits"),
    [
        (bfloat16, [0x0000, 0x0001, 0x0080, 0x3F80, 0xBF81, 0x7B00]),
        (np.float16, [0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0xBC01, 0x7BFF, 0x8001]),
        (np.uint8, [0, 1, 2, 127, 247]),
    ],
)
def test_every_kind_of_scale_is_exact(cpu: Ops, scales: Any, bits: list[int]) -> None:
    stored = np.array(bits, f"u{np.dtype(scales).itemsize}").view(scales)[:, None]
    codes = np.zeros((len(bits), 32), np.int8)
    codes[:, 3] = np.arange(-127, 127, 254 // len(bits))[: len(bits)]
    weight = Int8Tensor(codes, stored)
    one = np.zeros((1, 32), np.float32)
    one[0, 3] = 1
    got = cpu.out_proj(one[:, None], Linear(cpu.prepare(weight, PLAIN)), np.zeros((1, len(bits)), np.float32))
    np.testing.assert_array_equal(got[0], weight.dequantize()[:, 3])


@every_format
def test_weights_in_tiles_are_taken_back_to_rows(spec: Ops, cpu: Ops, format: Format) -> None:
    checkpoint = network(format)
    tiled = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if (kind := kind_of(name)) and isinstance(tensor, QTensor):
            layout = CPU_ROWS if kind in ("lm_head", "down") else CUDA_TILES
            tiled[name] = PackedTensor(pack(tensor, kind, layout), layout, format, tensor.shape, kind)
    assert sum(isinstance(tensor, PackedTensor) for tensor in tiled.values()) == 2 * 6 + 1
    tokens = RNG.integers(0, VOCABULARY, 5).tolist()
    for ops in (spec, cpu):
        want = model(checkpoint, ops).logits(tokens)
        np.testing.assert_array_equal(model(replace(checkpoint, tensors=tiled), ops).logits(tokens), want)


def test_projections_of_different_formats_are_refused(spec: Ops) -> None:
    checkpoint = network(MXFP4())
    name = "model.layers.0.self_attn.v_proj.weight"
    checkpoint.tensors[name] = quantised(Int8(), KEY_HEADS * 64, HIDDEN)
    with pytest.raises(FormatError, match="different formats"):
        model(checkpoint, spec)
