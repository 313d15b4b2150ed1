"""The CUDA backend on the emulator: what lies where, forms of weights, batches, draws, and running ahead."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from gptoss_lite.batch import Batch
from gptoss_lite.cache import KVCache
from gptoss_lite.checkpoint import StoredForm
from gptoss_lite.config import ModelConfig
from gptoss_lite.engine import Engine, Request
from gptoss_lite.errors import DeviceError, GptOssError, OutOfMemoryError
from gptoss_lite.kernels.emulator.runtime import Emulator
from gptoss_lite.memory import RESERVED, Plan
from gptoss_lite.model import GptOss
from gptoss_lite.ops import Ops, get_ops
from gptoss_lite.ops.cuda import CUDAOps, weights
from gptoss_lite.ops.cuda.step import drawn_on_device, is_filtered
from gptoss_lite.packing import CUDA_TILES, PackedTensor, kind_of, pack
from gptoss_lite.quant import QTensor, quantize
from gptoss_lite.quant.formats import MXFP4, Format, Int8
from gptoss_lite.sampling import Draw, SamplingParams

pytestmark = pytest.mark.usefixtures("needs_compiler")

BF16 = ml_dtypes.bfloat16
EMBEDDING = "model.embed_tokens.weight"
GREEDY = SamplingParams(temperature=0)
CONFIG = ModelConfig.from_dict(
    {
        "model_type": "gpt_oss", "vocab_size": 300, "hidden_size": 96, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "num_local_experts": 16, "num_experts_per_tok": 2, "sliding_window": 32,
        "max_position_embeddings": 512, "rope_theta": 150000,
    }
)  # fmt: skip
Tensor = npt.NDArray[Any] | QTensor


class Synthetic:
    """Stands for a checkpoint of random weights: tensors by name, `change` applied to each."""

    config = CONFIG

    def __init__(self, change: Callable[[str, Any], Any] = lambda name, tensor: tensor) -> None:
        c, rng = CONFIG, np.random.default_rng(0)
        hidden, inner, E = c.hidden_size, c.intermediate_size, c.num_local_experts
        widths = {"q": c.num_attention_heads * 64, "k": 128, "v": 128}

        def matrix(*shape: int) -> Any:
            return (rng.standard_normal(shape, np.float32) / np.sqrt(shape[-1])).astype(BF16)

        def vector(*shape: int) -> Any:
            return (rng.standard_normal(shape, np.float32) / 4).astype(BF16)

        def norm() -> Any:
            return (1 + rng.standard_normal(hidden, np.float32) / 8).astype(BF16)

        tensors: dict[str, Any] = {
            EMBEDDING: matrix(c.vocab_size, hidden), "model.norm.weight": norm(),
            "lm_head.weight": matrix(c.vocab_size, hidden) * BF16(3),
        }  # fmt: skip
        for layer in range(c.num_hidden_layers):
            parts = {
                "input_layernorm.weight": norm(), "post_attention_layernorm.weight": norm(),
                "self_attn.sinks": vector(c.num_attention_heads),
                "self_attn.o_proj.weight": matrix(hidden, widths["q"]),
                "self_attn.o_proj.bias": vector(hidden),
                "mlp.router.weight": matrix(E, hidden), "mlp.router.bias": vector(E),
                "mlp.experts.gate_up_proj": quantize(matrix(E, 2 * inner, hidden), "mxfp4"),
                "mlp.experts.down_proj": quantize(matrix(E, hidden, inner), "mxfp4"),
                "mlp.experts.gate_up_proj_bias": vector(E, 2 * inner),
                "mlp.experts.down_proj_bias": vector(E, hidden),
            }  # fmt: skip
            for name, width in widths.items():
                parts[f"self_attn.{name}_proj.weight"] = matrix(width, hidden)
                parts[f"self_attn.{name}_proj.bias"] = vector(width)
            tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in parts.items()}
        self._tensors = {name: change(name, tensor) for name, tensor in tensors.items()}
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def tensor(self, name: str) -> Any:
        """Return a tensor."""
        return self._tensors[name]

    def verify(self, name: str) -> None:
        """Accept it."""

    def forms(self) -> dict[str, StoredForm]:
        """Tell how each tensor is held."""
        dtypes = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

        def form(tensor: Any) -> StoredForm:
            match tensor.format if isinstance(tensor, QTensor) else None:
                case MXFP4():
                    return StoredForm("MXFP4", tensor.nbytes)
                case Int8() as int8:
                    return StoredForm("INT8", tensor.nbytes, int8.group(tensor.shape[-1]))
            return StoredForm(dtypes[tensor.dtype.name], tensor.nbytes)

        return {name: form(tensor) for name, tensor in self._tensors.items()}


class Counting(Emulator):
    """An emulator that knows how much device memory and pinned host memory is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.device = self.host = self.captures = self.replays = 0

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Count it until it is freed."""
        array = super().empty(shape, dtype)
        self.device += array.nbytes
        weakref.finalize(array, self._freed, "device", array.nbytes)
        return array

    def pinned(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """Count it until it is freed."""
        array = super().empty(shape, dtype)
        self.host += array.nbytes
        weakref.finalize(array, self._freed, "host", array.nbytes)
        return array

    def capture(self, work: Callable[[], None]) -> Any:
        """Count it."""
        self.captures += 1
        return super().capture(work)

    def replay(self, recording: Any) -> None:
        """Count it."""
        self.replays += 1
        super().replay(recording)

    def _freed(self, kind: str, nbytes: int) -> None:
        setattr(self, kind, getattr(self, kind) - nbytes)


def load(
    ops: Ops | None = None,
    checkpoint: Any = None,
    *,
    cache_tokens: int = 512,
    plans: list[Plan] | None = None,
) -> GptOss:
    made: list[Plan] = [] if plans is None else plans
    ops = CUDAOps(Emulator(), "emulated") if ops is None else ops
    checkpoint = Synthetic() if checkpoint is None else checkpoint
    return GptOss(checkpoint, ops, cache_tokens=cache_tokens, planned=made.append)


@pytest.fixture(scope="module")
def model() -> GptOss:
    return load()


def prompt(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, length).tolist()
    return tokens


def error(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> float:
    """Median over rows of ||got - want|| / ||want||."""
    return float(np.median(np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)))


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    ids = [engine.submit(request) for request in requests]
    tokens: dict[int, list[int]] = {i: [] for i in ids}
    while engine.has_work:
        for event in engine.step():
            assert event.sampled is not None, event.error
            tokens[event.request_id].append(event.sampled.token)
    return [tokens[i] for i in ids]


def test_weights_and_cache_take_what_the_plan_says_to_the_byte() -> None:
    runtime, plans = Counting(), list[Plan]()
    model = load(CUDAOps(runtime), plans=plans)
    assert runtime.device == plans[0].weight_bytes
    engine = Engine(model)
    cache = runtime.device - plans[0].weight_bytes
    assert 0 <= cache - plans[0].kv_bytes <= 1 << 15  # and where the drawn tokens are noted
    answers(engine, [Request(prompt(300, seed), SamplingParams(top_k=9), seed, 20) for seed in range(4)])
    workspace = runtime.device - plans[0].weight_bytes - cache
    assert workspace <= plans[0].workspace_bytes


def test_weights_are_let_go_with_the_model() -> None:
    runtime = Counting()
    model = load(CUDAOps(runtime))
    weights = runtime.device
    engine = Engine(model)
    answers(engine, [Request(prompt(9), GREEDY, 0, 6)])
    workspace_and_cache = runtime.device - weights
    del engine
    cache = weights + workspace_and_cache - runtime.device
    assert cache > 0
    engine = Engine(model)
    answers(engine, [Request(prompt(9), GREEDY, 0, 6)])
    assert runtime.device == weights + workspace_and_cache  # the second engine's in place of the first one's
    del engine, model
    assert runtime.device == 0


@pytest.fixture(scope="module")
def whole(model: GptOss) -> npt.NDArray[Any]:
    return model.logits(prompt(40))


def plan_of(device_memory: int | None, checkpoint: Any = None) -> tuple[GptOss, Plan, Counting]:
    runtime, plans = Counting(), list[Plan]()
    ops = CUDAOps(runtime, device_memory=device_memory)
    return load(ops, checkpoint, plans=plans), plans[0], runtime


def test_embedding_in_host_memory_changes_no_bit(whole: npt.NDArray[Any]) -> None:
    everything = plan_of(None)[1].device_bytes + RESERVED
    model, plan, runtime = plan_of(everything - 1)
    assert plan.host_embedding and not plan.host_layers
    assert runtime.host == plan.host_bytes > 0
    assert runtime.device == plan.weight_bytes
    np.testing.assert_array_equal(model.logits(prompt(40)), whole)


def test_experts_in_host_memory_change_no_bit_and_the_wanted_ones_move_in(whole: npt.NDArray[Any]) -> None:
    one = plan_of(None)[1]
    expert_layer = CONFIG.num_local_experts * one.expert_bytes[0]
    model, plan, runtime = plan_of(one.device_bytes + RESERVED - 2 * expert_layer)
    assert plan.host_layers >= 2 and plan.hot_experts >= 2 * CONFIG.num_experts_per_tok
    assert runtime.host == plan.host_bytes
    assert runtime.device == plan.weight_bytes
    ops = model.ops
    assert isinstance(ops, CUDAOps)
    hot = ops._weights.hot
    for _ in range(12):  # from the second on, experts are copied before the step
        np.testing.assert_array_equal(model.logits(prompt(40)), whole)
    for layer in hot.layers:
        residents = hot._residents[layer]
        assert (residents >= 0).all()
        assert len(set(residents.tolist())) == len(residents)
    before = {layer: hot._residents[layer].tolist() for layer in hot.layers}
    everywhere = load()
    want = everywhere.logits(prompt(4, seed=8))
    for _ in range(100):  # another prompt, long enough for its experts to drive others out
        np.testing.assert_array_equal(model.logits(prompt(4, seed=8)), want)
    left = [expert for layer in hot.layers for expert in before[layer] if expert not in hot._residents[layer]]
    assert left
    np.testing.assert_array_equal(model.logits(prompt(40)), whole)  # those that left are found at home
    alone = answers(Engine(load()), [Request(prompt(5), SamplingParams(seed=1), 1, 40)])
    assert answers(Engine(model), [Request(prompt(5), SamplingParams(seed=1), 1, 40)]) == alone


def test_what_cannot_fit_is_refused_before_anything_is_read() -> None:
    runtime = Counting()
    with pytest.raises(OutOfMemoryError, match="the model needs"):
        load(CUDAOps(runtime, device_memory=RESERVED))
    assert runtime.device == 0


def to(dtype: Any) -> Callable[[str, Any], Any]:
    def change(name: str, tensor: Any) -> Any:
        return tensor if isinstance(tensor, QTensor) else tensor.astype(np.float32).astype(dtype)

    return change


def experts_as(make: Callable[[npt.NDArray[Any]], Any]) -> Callable[[str, Any], Any]:
    def change(name: str, tensor: Any) -> Any:
        return make(tensor.dequantize()) if isinstance(tensor, QTensor) else tensor

    return change


def products_as_int8(name: str, tensor: Any) -> Any:
    """Attention's output and lm_head in one group a row, experts in groups of 32 with E8M0 scales."""
    if isinstance(tensor, QTensor):
        return quantize(tensor.dequantize().astype(np.float32), "int8", scales="e8m0")
    if name.endswith(("o_proj.weight", "lm_head.weight")):
        return quantize(tensor, "int8", group=None, scales="float16")
    return tensor


def everything_as(*formats: Format) -> Callable[[str, Any], Any]:
    """All that may be quantised, each weight in the first format that its rows can be held in."""

    def change(name: str, tensor: Any) -> Any:
        if name != EMBEDDING and kind_of(name) is None:
            return tensor
        values = tensor.dequantize() if isinstance(tensor, QTensor) else tensor
        columns = values.shape[-1]
        format = next(f for f in formats if isinstance(f, MXFP4) or columns % f.group(columns) == 0)
        if isinstance(format, MXFP4):
            return quantize(values, "mxfp4")
        return quantize(values, "int8", group=format.group_size, scales=format.scales)

    return change


def in_tiles(change: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """The same, as a file made for this backend holds it."""

    def packed(name: str, tensor: Any) -> Any:
        tensor, kind = change(name, tensor), kind_of(name)
        if kind is None or not isinstance(tensor, QTensor):
            return tensor
        data = pack(tensor, kind, CUDA_TILES)
        return PackedTensor(data, CUDA_TILES, tensor.format, tensor.shape, kind)

    return packed


def shifted(name: str, tensor: Any) -> Any:
    """The same network with norms that leave fp16 behind, and weights that make up for it."""
    if name.endswith("norm.weight"):
        return tensor * BF16(2.0**14)
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "router.weight", "lm_head.weight")):
        return tensor * BF16(2.0**-14)
    if name.endswith("gate_up_proj"):
        return replace(tensor, scales=tensor.scales - np.uint8(14))
    return tensor


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        (to(np.float32), 3e-3), (to(np.float16), 3e-3),
        (experts_as(lambda w: w.astype(BF16)), 3e-3), (experts_as(lambda w: w.astype(np.float16)), 3e-3),
        (experts_as(lambda w: w.astype(BF16).swapaxes(1, 2).copy().swapaxes(1, 2)), 3e-3),
        (products_as_int8, 3e-3),
        (shifted, 1.5e-2),  # bf16 operands: eight bits
    ],
    ids=["float32", "fp16", "bf16 experts", "fp16 experts", "transposed experts", "int8", "beyond fp16"],
)  # fmt: skip
def test_every_form_of_weights(change: Callable[[str, Any], Any], bound: float) -> None:
    compare_with_reference(change, bound, seed=4)


@pytest.mark.parametrize(
    ("formats", "seed"),
    [
        ([MXFP4()], 4), ([Int8(32, "bf16")], 6), ([Int8(64, "float16"), Int8(96, "float16")], 4),
        ([Int8(None, "float16")], 4), ([Int8(32, "e8m0")], 7),
    ],
    ids=["mxfp4", "int8 by 32", "int8 by 64 or 96", "int8 by row", "int8 of powers of two"],
)  # fmt: skip
def test_all_of_a_network_can_be_quantised(formats: list[Format], seed: int) -> None:
    compare_with_reference(everything_as(*formats), 3e-3, seed)


def compare_with_reference(change: Callable[[str, Any], Any], bound: float, seed: int) -> None:
    """Compare rows of a prompt, and token by token; no expert may be chosen by a hair's breadth for it."""
    tokens = prompt(70, seed)
    checkpoint: Any = Synthetic(change)
    want = GptOss(checkpoint, get_ops("reference")).logits(tokens)
    model = load(checkpoint=checkpoint)
    assert error(model.logits(tokens), want) <= bound
    cache = model.ops.new_cache(CONFIG, 8, 8)
    rows = [model(one_row(token, position), cache)[0] for position, token in enumerate(tokens)]
    assert error(np.stack(rows), want) <= bound


QUANTISED = {
    "mxfp4": everything_as(MXFP4()),
    "int8, bf16": everything_as(Int8(32, "bf16")),
    "int8, float16": everything_as(Int8(None, "float16")),
    "int8, e8m0": everything_as(Int8(96, "e8m0"), Int8(64, "e8m0")),
}


@pytest.mark.parametrize("change", QUANTISED.values(), ids=QUANTISED)
def test_a_quantised_embedding_is_planned_to_the_byte_and_may_lie_on_the_host(
    change: Callable[[str, Any], Any],
) -> None:
    checkpoint = Synthetic(change)
    model, plan, runtime = plan_of(None, checkpoint)
    assert (runtime.device, runtime.host) == (plan.weight_bytes, 0)
    whole = model.logits(prompt(40))
    model, plan, runtime = plan_of(plan.device_bytes + RESERVED - 1, checkpoint)
    assert plan.host_embedding and not plan.host_layers
    assert plan.host_bytes == checkpoint.tensor(EMBEDDING).nbytes
    assert (runtime.device, runtime.host) == (plan.weight_bytes, plan.host_bytes)
    np.testing.assert_array_equal(model.logits(prompt(40)), whole)


@pytest.mark.parametrize("format", ["mxfp4", "int8, bf16"])
def test_a_quantised_embedding_can_be_the_head_too(format: str) -> None:
    checkpoint: Any = Synthetic(QUANTISED[format])
    checkpoint.config = replace(CONFIG, tie_word_embeddings=True)
    model, plan, runtime = plan_of(None, checkpoint)
    assert runtime.device == plan.weight_bytes
    want = GptOss(checkpoint, get_ops("reference")).logits(prompt(40))
    assert error(model.logits(prompt(40)), want) <= 3e-3


@pytest.mark.parametrize("change", QUANTISED.values(), ids=QUANTISED)
def test_weights_in_tiles_change_no_bit(change: Callable[[str, Any], Any]) -> None:
    tiled = Synthetic(in_tiles(change))
    model, plan, runtime = plan_of(None, tiled)
    assert runtime.device == plan.weight_bytes
    whole = load(checkpoint=Synthetic(change)).logits(prompt(40))
    np.testing.assert_array_equal(model.logits(prompt(40)), whole)
    layer = CONFIG.num_local_experts * plan.expert_bytes[0]
    model, plan, runtime = plan_of(plan.device_bytes + RESERVED - layer, tiled)
    assert plan.host_layers and runtime.host == plan.host_bytes
    np.testing.assert_array_equal(model.logits(prompt(40)), whole)


def one_row(token: int, position: int) -> Batch:
    return batch_of([([token], position, list(range(8)))])


def batch_of(parts: Sequence[tuple[list[int], int, list[int]]]) -> Batch:
    """Lay parts end to end: tokens, the position of the first, and the blocks of the sequence."""
    table = np.array([blocks for _, _, blocks in parts], np.int32)
    query_start = np.cumsum([0, *(len(tokens) for tokens, _, _ in parts)], dtype=np.int32)
    positions = [np.arange(start, start + len(tokens), dtype=np.int32) for tokens, start, _ in parts]
    return Batch(
        tokens=np.array([token for tokens, _, _ in parts for token in tokens], np.int32),
        positions=np.concatenate(positions),
        query_start=query_start,
        full_table=table,
        sliding_table=table,
        rows=query_start[1:] - 1,
        decoding=np.diff(query_start) == 1,
    )


@pytest.mark.parametrize("others", [1, 2, 7, 12])
def test_a_decode_row_has_the_same_bits_whatever_is_beside_it(model: GptOss, others: int) -> None:
    def run(parts: Sequence[tuple[list[int], int, list[int]]], prefill: bool) -> npt.NDArray[Any]:
        cache = model.ops.new_cache(CONFIG, 8 * 16, 8 * 16)
        for tokens, _, blocks in parts:
            model(batch_of([(tokens, 0, blocks)]), cache)
        step = [([tokens[0]], len(tokens), blocks) for tokens, _, blocks in parts]
        if prefill:
            step.insert(1, (prompt(33, seed=9), 0, list(range(8 * 15, 8 * 16))))
        return model(batch_of(step), cache)

    parts = [(prompt(20 + 7 * i, seed=i), 0, list(range(8 * i, 8 * i + 8))) for i in range(others + 1)]
    alone = run(parts[:1], prefill=False)
    np.testing.assert_array_equal(run(parts, prefill=False)[:1], alone)
    np.testing.assert_array_equal(run(parts, prefill=True)[:1], alone)


def test_many_more_decode_rows_than_a_kernel_takes(model: GptOss) -> None:
    count = 300  # more pairs of token and expert than the experts' kernel has room for at once
    cache = model.ops.new_cache(CONFIG, count, count)
    step = batch_of([([i % CONFIG.vocab_size], 0, [i]) for i in range(count)])
    logits = model(step, cache)
    for row in (7, 255, 256, 299):
        alone = model(batch_of([([row], 0, [row])]), cache)
        np.testing.assert_allclose(logits[row], alone[0], atol=2e-3 * np.abs(alone).max())


def test_rows_of_a_prompt_come_in_any_number(model: GptOss) -> None:
    whole = model.logits(prompt(150))
    assert whole.shape == (150, CONFIG.vocab_size)
    last = model.logits(prompt(150), last=3)
    np.testing.assert_allclose(last, whole[-3:], atol=2e-3 * np.abs(whole).max())


def requests(count: int) -> list[Request]:
    kinds = [
        GREEDY, SamplingParams(), SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(top_k=5, min_p=0.02), SamplingParams(repetition_penalty=1.3),
        SamplingParams(logprobs=2),
    ]  # fmt: skip
    return [
        Request(prompt(3 + 11 * i, seed=i), kinds[i % len(kinds)], 100 + i, 6 + 3 * i) for i in range(count)
    ]


@pytest.fixture(scope="module")
def alone(model: GptOss) -> list[list[int]]:
    return [answers(Engine(model), [request])[0] for request in requests(6)]


def test_requests_beside_each_other_get_the_answers_they_get_alone(
    model: GptOss, alone: list[list[int]]
) -> None:
    assert answers(Engine(model), requests(6)) == alone


def test_draws_on_the_device_follow_the_specification(alone: list[list[int]]) -> None:
    want = [answers(Engine(load(get_ops("cpu"))), [request])[0] for request in requests(6)]
    # Draws that lie closer together than fp16 operands tell apart may differ; then all that follows does.
    assert sum(got == expected for got, expected in zip(alone, want, strict=True)) >= 5


def test_the_next_step_is_begun_before_a_token_is_known(model: GptOss) -> None:
    begun = 0

    class Watched(Engine):
        def _begin_ahead(self, last: Any) -> Any:
            nonlocal begun
            ahead = super()._begin_ahead(last)
            begun += ahead is not None
            return ahead

    [tokens] = answers(Watched(model), [Request(prompt(4), GREEDY, 0, 12)])
    assert len(tokens) == 12
    assert begun == 11  # all but the one that follows the last token


def test_steps_of_one_shape_are_recorded_once() -> None:
    runtime = Counting()
    model = load(CUDAOps(runtime))
    answers(Engine(model), [Request(prompt(4), GREEDY, 0, 12)])
    assert runtime.captures == 1
    assert runtime.replays == 10  # of 11 steps after the prompt, the first ran as it was


def test_recordings_are_forgotten_when_what_they_use_has_moved(alone: list[list[int]]) -> None:
    engine = Engine(load())  # whose scratch memory has not grown yet
    assert answers(engine, requests(1)) == alone[:1]
    assert answers(engine, requests(6)) == alone
    assert answers(engine, requests(1)) == alone[:1]


def test_cancelling_and_arriving_between_steps_disturbs_nobody(model: GptOss, alone: list[list[int]]) -> None:
    rng = np.random.default_rng(3)
    engine, waiting = Engine(model, cache_tokens=512), requests(6)
    kept: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    doomed: list[int] = []
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.3:
            index = 6 - len(waiting)
            kept[engine.submit(waiting.pop(0))] = index
        if rng.random() < 0.2:
            doomed.append(engine.submit(Request(prompt(9, seed=77), SamplingParams(), 5, 50)))
        if doomed and rng.random() < 0.3:
            engine.cancel(doomed.pop())
        for event in engine.step():
            assert event.sampled is not None
            tokens.setdefault(event.request_id, []).append(event.sampled.token)
        if not waiting and len(kept) == 6 and doomed:
            engine.cancel(doomed.pop())
    assert [tokens[i] for i in kept] == alone


def test_two_engines_taking_turns_on_one_model(model: GptOss, alone: list[list[int]]) -> None:
    engines = [Engine(model), Engine(model)]
    ids = [engine.submit(request) for engine, request in zip(engines, requests(2), strict=True)]
    tokens: list[list[int]] = [[], []]
    while any(engine.has_work for engine in engines):
        for index, engine in enumerate(engines):
            for event in engine.step():
                assert event.sampled is not None and event.request_id == ids[index]
                tokens[index].append(event.sampled.token)
    assert tokens == alone[:2]


def test_a_stop_token_ends_an_answer_though_the_next_step_is_under_way(
    model: GptOss, alone: list[list[int]]
) -> None:
    request = requests(1)[0]
    stop = alone[0][3]
    engine = Engine(model)
    [tokens] = answers(engine, [replace(request, stop_token_ids=frozenset([stop]))])
    assert tokens == alone[0][: alone[0].index(stop) + 1]
    assert answers(engine, [request]) == alone[:1]  # on the blocks of which some were written ahead


def test_logits_that_are_not_finite_are_an_error_of_the_request() -> None:
    def change(name: str, tensor: Any) -> Any:
        return np.full(tensor.shape, BF16(3e38)) if name == "model.norm.weight" else tensor

    engine = Engine(load(checkpoint=Synthetic(change)))
    for sampling in (GREEDY, SamplingParams(top_k=3)):
        engine.submit(Request([5, 6, 7], sampling, 0, 4))
    events = [event for _ in range(3) for event in engine.step()]
    assert [event.finish_reason for event in events] == ["error", "error"]
    for event in events:
        assert isinstance(event.error, GptOssError)
        assert "position 3 are not finite" in str(event.error)
    assert not engine.has_work


@pytest.mark.parametrize("cut", [1, 29, 40])
def test_a_prompt_has_the_same_bits_however_it_is_cut(model: GptOss, cut: int) -> None:
    tokens = prompt(41)
    cache = model.ops.new_cache(CONFIG, 8, 8)
    parts = [(tokens[:cut], 0, list(range(8))), (tokens[cut:], cut, list(range(8)))]
    for part in parts:  # one token of a prompt, too, is computed as a prompt is
        logits = model(replace(batch_of([part]), decoding=np.zeros(1, np.bool_)), cache)
    np.testing.assert_array_equal(logits, model.logits(tokens, last=1))


def test_memory_that_runs_out_ahead_loses_no_token(
    model: GptOss, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, calls = model.begin, 0

    def failing(batch: Batch, cache: KVCache, draws: Any) -> Any:
        nonlocal calls
        calls += 1
        if batch.tokens[0] < 0 and calls % 2:
            raise OutOfMemoryError("no room")
        return begin(batch, cache, draws)

    monkeypatch.setattr(model, "begin", failing)
    assert answers(Engine(model), requests(1)) == alone[:1]
    assert calls > 6


def test_a_step_that_fails_half_way_leaves_nothing_behind(
    model: GptOss, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(model.ops, CUDAOps)
    engine = Engine(model)
    assert answers(engine, requests(1)) == alone[:1]
    with monkeypatch.context() as patch:
        patch.setattr(model.ops, "_draw", lambda step: 1 / 0)  # with keys of its tokens left to be read
        engine.submit(requests(2)[1])
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert answers(Engine(model), requests(1)) == alone[:1]


@pytest.mark.parametrize("tiles", [1, 3])
def test_a_matrix_is_repacked_in_pieces_as_it_is_whole(
    monkeypatch: pytest.MonkeyPatch, whole: npt.NDArray[Any], tiles: int
) -> None:
    monkeypatch.setattr(weights, "_PIECE", tiles * 16 * CONFIG.hidden_size * 2)
    np.testing.assert_array_equal(load().logits(prompt(40)), whole)


@pytest.mark.parametrize(
    ("options", "on_device", "filtered"),
    [
        ({}, True, False), ({"temperature": 0.0, "top_k": 5}, True, False), ({"top_k": 5}, True, True),
        ({"top_p": 0.9}, True, True), ({"min_p": 0.1}, True, True), ({"logprobs": 0}, False, False),
        ({"repetition_penalty": 1.1}, False, False), ({"presence_penalty": 0.1}, False, False),
        ({"frequency_penalty": 0.1}, False, False), ({"logit_bias": {3: 1.0}}, False, False),
        ({"logits_processors": [lambda tokens, logits: logits]}, False, False),
    ],
)  # fmt: skip
def test_who_draws_a_token(options: dict[str, Any], on_device: bool, filtered: bool) -> None:
    draw = Draw(SamplingParams(**options), 0, 0, [], 0)
    assert drawn_on_device(draw) == on_device
    assert is_filtered(draw) == filtered


def turing() -> CUDAOps:
    runtime = Emulator()
    runtime.arch = "sm_75"
    return CUDAOps(runtime)


def test_turing_keeps_keys_and_values_in_fp16(whole: npt.NDArray[Any]) -> None:
    want = GptOss(Synthetic(), get_ops("reference")).logits(prompt(40))  # type: ignore[arg-type]
    got = load(turing()).logits(prompt(40))
    assert error(got, want) <= 3e-3
    assert not np.array_equal(got, whole)


def test_turing_refuses_what_goes_beyond_fp16() -> None:
    with pytest.raises(DeviceError, match="qkv of layer 0 goes beyond fp16"):
        load(turing(), Synthetic(shifted))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("head_dim", 32, "64"), ("num_experts_per_tok", 9, "at most 8"),
        ("hidden_size", 80, "a multiple of 32 up to 12160"), ("intermediate_size", 72, "a multiple of 32"),
        ("vocab_size", 2**18 + 1, "at most 262144"),
    ],
)  # fmt: skip
def test_networks_beyond_the_kernels_are_refused_by_name(key: str, value: int, wanted: str) -> None:
    checkpoint: Any = Synthetic()
    changed: dict[str, Any] = {key: value}
    checkpoint.config = replace(CONFIG, **changed)
    with pytest.raises(DeviceError, match=f"{key} is {value}: the CUDA kernels want {wanted};"):
        load(checkpoint=checkpoint)


def test_an_interrupted_wait_loses_no_token(model: GptOss, alone: list[list[int]]) -> None:
    begin, interrupted = model.begin, False

    def interrupting(*args: Any) -> Any:
        finish = begin(*args)

        def once() -> Any:
            nonlocal interrupted
            if not interrupted and args[0].tokens[0] < 0:
                interrupted = True
                raise KeyboardInterrupt
            return finish()

        return once

    engine = Engine(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "begin", interrupting)
        tokens = []
        request_id = engine.submit(requests(1)[0])
        while engine.has_work:
            try:
                events = engine.step()
            except KeyboardInterrupt:
                continue
            tokens += [event.sampled.token for event in events if event.sampled is not None]
    assert interrupted and request_id == 0
    assert tokens == alone[0]


@pytest.mark.parametrize("limits", [{"max_sequences": 1}, {"cache_tokens": 32}])
def test_requests_that_cannot_be_admitted_do_not_hold_up_the_others(
    model: GptOss, limits: dict[str, int]
) -> None:
    begun = 0

    class Watched(Engine):
        def _begin_ahead(self, last: Any) -> Any:
            nonlocal begun
            ahead = super()._begin_ahead(last)
            begun += ahead is not None
            return ahead

    engine = Watched(model, **limits)
    both = [Request(prompt(4), GREEDY, 0, 12), Request(prompt(17), GREEDY, 0, 12)]
    assert answers(engine, both) == [answers(Engine(model), [request])[0] for request in both]
    assert begun == 22  # though one of them waited all the time that the other ran
