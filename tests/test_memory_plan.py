"""What a plan says of the real models, from sparse files of their shapes, against totals worked out here."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoss_lite.cache import pool_blocks
from gptoss_lite.checkpoint import Checkpoint, StoredForm, open_checkpoint
from gptoss_lite.config import ModelConfig
from gptoss_lite.engine import Engine
from gptoss_lite.errors import OutOfMemoryError, RequestError
from gptoss_lite.memory import (
    Plan,
    lines,
    make_plan,
    workspace,
)
from gptoss_lite.model import GptOss
from gptoss_lite.quant.tensorfile import StoredTensor
from gptoss_lite.sizes import format_gib, parse_size

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a truncated file is not sparse there")

GB = 1 << 30  # as cards are sold
MIB = 1 << 20
H100 = 81559 * MIB  # what nvidia-smi shows of 80 GB
RESERVED = 600 * MIB
STEP = 2048  # tokens, as the CUDA backend takes them
CONTEXT = 131072
SIZES = {"20b": (24, 32), "120b": (36, 128)}  # layers, experts
EXPERT = 13_219_200  # (5760 + 2880) rows of 90 blocks of 17 bytes
KV_TOKEN = {"20b": 12 * 2048, "120b": 18 * 2048}  # full layers; 8 heads * 64 * 2 bytes, keys and values
SLIDING_KV = {
    "20b": 12 * 578 * 32768,
    "120b": 18 * 578 * 32768,
}  # 578 blocks: 2 * (16 * (8 + 2) + 2048 / 16 + 1)


def config(size: str) -> dict[str, Any]:
    layers, experts = SIZES[size]
    return {
        "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": experts, "num_experts_per_tok": 4, "sliding_window": 128,
        "max_position_embeddings": CONTEXT, "rope_theta": 150000,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip


def shapes(size: str) -> dict[str, list[int]]:
    """Name every tensor of Hugging Face's packed layout."""
    layers, E = SIZES[size]
    matrix = [201088, 2880]
    every = {"model.embed_tokens.weight": matrix, "model.norm.weight": [2880], "lm_head.weight": matrix}
    for layer in range(layers):
        one: dict[str, list[int]] = {
            "input_layernorm.weight": [2880], "post_attention_layernorm.weight": [2880],
            "self_attn.sinks": [64], "self_attn.o_proj.weight": [2880, 4096], "self_attn.o_proj.bias": [2880],
            "mlp.router.weight": [E, 2880], "mlp.router.bias": [E],
            "mlp.experts.gate_up_proj_bias": [E, 5760], "mlp.experts.down_proj_bias": [E, 2880],
            "mlp.experts.gate_up_proj_blocks": [E, 5760, 90, 16],
            "mlp.experts.gate_up_proj_scales": [E, 5760, 90],
            "mlp.experts.down_proj_blocks": [E, 2880, 90, 16], "mlp.experts.down_proj_scales": [E, 2880, 90],
        }  # fmt: skip
        for part, width in (("q", 4096), ("k", 512), ("v", 512)):
            one |= {f"self_attn.{part}_proj.weight": [width, 2880], f"self_attn.{part}_proj.bias": [width]}
        every |= {f"model.layers.{layer}.{name}": shape for name, shape in one.items()}
    return every


def write_sparse(directory: Path, size: str, files: int, tied: bool = False) -> Path:
    """Write a checkpoint of holes, in one file or several with an index; tied, it has no lm_head."""
    directory.mkdir(parents=True)
    every = [item for item in shapes(size).items() if not tied or item[0] != "lm_head.weight"]
    weight_map = {}
    for number in range(files):
        name = "model.safetensors" if files == 1 else f"model-{number:05}-of-{files:05}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        for tensor, shape in every[number::files]:
            packed = tensor.endswith(("_blocks", "_scales"))
            nbytes = math.prod(shape) * (1 if packed else 2)
            entry = {"dtype": "U8" if packed else "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
            header[tensor], weight_map[tensor], end = entry, name, end + nbytes
        text = json.dumps(header).encode()
        text += b" " * (1 - len(text) % 2)  # of odd length: every view of bf16 would have to be a copy
        with open(directory / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        assert (directory / name).stat().st_blocks * 512 < MIB
    if files > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config(size) | {"tie_word_embeddings": tied}))
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    root = tmp_path_factory.mktemp("sparse")
    return {
        "20b": open_checkpoint(write_sparse(root / "20b", "20b", 3)),
        "120b": open_checkpoint(write_sparse(root / "120b", "120b", 1)),
    }


@pytest.fixture
def plan(checkpoints: dict[str, Checkpoint]) -> Callable[..., Plan]:
    """Plan one of the real models on a device of so many bytes, as published."""

    def make(size: str, device_bytes: int | None = None, **options: Any) -> Plan:
        checkpoint = checkpoints[size]
        forms = checkpoint.forms()
        return make_plan(
            checkpoint.config, forms, device_bytes=device_bytes, **{"step_tokens": STEP} | options
        )

    return make


# Bytes


@pytest.mark.parametrize("size", SIZES)
def test_weights_are_counted_to_the_byte(plan: Callable[..., Plan], size: str) -> None:
    layers, E = SIZES[size]
    head = 201088 * 2880 * 2
    attention = 53_100_288  # qkv 5120 x 2880 and o 2880 x 4096, their biases and sinks, all bf16
    router = {"20b": 184_384, "120b": 737_536}[size]
    stored = {
        "embedding": head,
        "attention": layers * attention,
        "norms and routers": layers * (11_520 + router) + 5_760,
        "experts": layers * E * (EXPERT + 17_280),
        "lm_head": head,
    }
    # On the device vectors are float32, as long again; a dense matrix has an int32 for each of its rows, and
    # an expert two addresses. Every size is a whole number of tiles, so nothing is padded.
    packed = {
        "embedding": head,
        "attention": layers * (attention + 2 * (5120 + 2880 + 64) + 4 * (5120 + 2880)),
        "norms and routers": layers * (2 * 11_520 + router + 2 * E) + 2 * 5_760,
        "experts": layers * E * (EXPERT + 2 * 17_280 + 16),
        "lm_head": head + 4 * 201088,
    }
    made = plan(size)
    assert {group.name: group.checkpoint for group in made.weights} == stored
    assert {group.name: group.packed for group in made.weights} == packed
    assert made.expert_bytes == (EXPERT,) * layers
    assert made.checkpoint_bytes == sum(stored.values())
    assert made.weight_bytes == sum(packed.values())
    assert made.host_bytes == 0
    assert format_gib(made.checkpoint_bytes) == {"20b": "12.8 GiB", "120b": "60.8 GiB"}[size]


@pytest.mark.parametrize("size", SIZES)
def test_a_token_of_context_costs_its_keys_and_values(plan: Callable[..., Plan], size: str) -> None:
    made = plan(size)
    assert (made.cache_tokens, made.full_kv) == (CONTEXT, CONTEXT * KV_TOKEN[size])
    assert made.sliding_kv == SLIDING_KV[size]
    assert made.kv_bytes == made.full_kv + made.sliding_kv
    # A cache of few tokens bounds the sliding layers too, and counts whole blocks.
    small = plan(size, cache_tokens=1001)
    assert small.full_kv == small.sliding_kv == 63 * 16 * KV_TOKEN[size]
    assert made.device_bytes == made.weight_bytes + made.kv_bytes + made.workspace_bytes


def test_the_workspace_has_every_array_of_a_step(checkpoints: dict[str, Checkpoint]) -> None:
    settings = checkpoints["20b"].config
    arrays = dict(workspace(settings, 512, 16))
    small = arrays.pop("small arrays")
    assert arrays == {
        "residual stream": 512 * 2880 * 4,
        "normalised": 2 * 512 * 2880 * 2,
        "projections": 512 * 5120 * 4,
        "queries": 512 * 4096 * 4,
        "attention": 512 * 4096 * 2,
        "attention partials": 16 * 64 * 64 * 66 * 4,
        "rotations": 512 * 64 * 4,
        "router logits": 512 * 32 * 4,
        "chosen experts": 512 * 4 * (4 + 4),
        "choices of host layers": 24 * 512 * 4 * 4,
        "grouping": 2 * 2048 * 4 + 3 * (256 + 32) * 4 + 4,
        "inner": 2048 * 2880 * 2,
        "expert outputs": 2048 * 2880 * 4,
        "logits": 16 * 201088 * 4,
    }
    tables = 2 * 16 * (CONTEXT // 16) * 4
    assert tables < small < tables + MIB // 8
    assert workspace(settings, 4, 16) == workspace(settings, 16, 16)  # each running request gets a token


@pytest.mark.parametrize(
    ("limits", "blocks"),  # of the sliding layers 2 * (sequences * (128 / 16 + 2) + step / 16 + 1), or all
    [
        ((1, 1, 1), (1, 1)), ((64, 3, 40), (4, 4)), ((500, 2, 16), (32, 32)), ((2000, 5, 33), (125, 106)),
        ((16000, 40, 1), (1000, 806)), ((4000, 1, 900), (250, 134)),
    ],
)  # fmt: skip
def test_an_engine_sets_aside_what_was_planned(
    tiny: GptOss, limits: tuple[int, int, int], blocks: tuple[int, int]
) -> None:
    names = ("cache_tokens", "max_sequences", "step_tokens")
    options: dict[str, Any] = dict(zip(names, limits, strict=True))
    cache = Engine(tiny, **options)._cache
    planned = make_plan(tiny.config, _dense(tiny.config), device_bytes=None, **options)
    assert planned.kv_bytes == sum(array.nbytes for array in (*cache.keys, *cache.values))
    full = tiny.config.layer_types.index("full_attention")
    sliding = tiny.config.layer_types.index("sliding_attention")
    assert pool_blocks(tiny.config, *limits) == blocks
    assert (len(cache.keys[full]), len(cache.keys[sliding])) == blocks


def _dense(settings: ModelConfig, experts: str = "MXFP4", weights: str = "BF16") -> dict[str, StoredForm]:
    """Claim some form for all the weights of a model."""
    names = ["self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.router.weight"]
    forms = {name: StoredForm(weights, 0) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for layer in range(settings.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        forms |= {f"{prefix}.{name}": StoredForm(weights, 0) for name in names}
        forms |= {f"{prefix}.mlp.experts.{name}_proj": StoredForm(experts, 0) for name in ("gate_up", "down")}
    return forms


def test_odd_sizes_are_padded_to_whole_tiles() -> None:
    small = {"vocab_size": 100, "hidden_size": 160, "intermediate_size": 96, "num_attention_heads": 5,
             "num_key_value_heads": 1, "num_local_experts": 3, "num_hidden_layers": 2,
             "layer_types": ["sliding_attention", "full_attention"], "num_experts_per_tok": 2}  # fmt: skip
    settings = ModelConfig.from_dict(config("20b") | small)
    # 160 columns take 3 chunks of 64, 96 take 2; 96 gates and their ups take 16 tiles of 16 rows, 160 rows
    # take 10, 100 take 7, and 7 heads 28. A chunk of a tile has 512 bytes of codes and 32 of scales, or 2048.
    made = make_plan(settings, _dense(settings), device_bytes=None, step_tokens=STEP)
    assert made.expert_bytes == (16 * 3 * 544 + 10 * 2 * 544,) * 2
    packed = {group.name: group.packed for group in made.weights}
    assert packed["lm_head"] == 7 * 3 * 2048 + 7 * 16 * 4
    matrices = 28 * 3 * 2048 + 28 * 16 * 4 + 10 * 5 * 2048 + 10 * 16 * 4
    assert packed["attention"] == 2 * (matrices + 4 * (7 * 64 + 160 + 5))
    assert packed["embedding"] == 100 * 160 * 2
    dense = make_plan(settings, _dense(settings, "BF16", "F32"), device_bytes=None, step_tokens=STEP)
    assert dense.expert_bytes == (16 * 3 * 2048 + 10 * 2 * 2048,) * 2
    groups = {group.name: group.packed for group in dense.weights}
    assert groups["embedding"] == 2 * packed["embedding"]
    assert groups["norms and routers"] - packed["norms and routers"] == 2 * 3 * 160 * 2
    assert groups["lm_head"] == packed["lm_head"]
    # Int8: 1024 bytes of codes, and for 8 pairs of rows a word of two scales for each block of 32 columns.
    int8 = make_plan(settings, _dense(settings, "INT8"), device_bytes=None, step_tokens=STEP)
    assert int8.expert_bytes == (16 * 3 * (1024 + 64) + 10 * 2 * (1024 + 64),) * 2


@pytest.mark.parametrize(
    ("dtype", "scale_bytes", "in_tiles"),
    [
        ("MXFP4", 1, 17),
        ("INT8", 2, 34),
        ("INT8", 1, 34),
    ],  # bytes of a block of 32; tiles have no E8M0 of int8
    ids=["mxfp4", "int8, bf16", "int8, e8m0"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_quantised_weights_are_counted_to_the_byte(
    checkpoints: dict[str, Checkpoint], dtype: str, scale_bytes: int, in_tiles: int, tied: bool
) -> None:
    forms, layers, head = checkpoints["20b"].forms(), SIZES["20b"][0], 201088 * 90
    natural = (16 if dtype == "MXFP4" else 32) + scale_bytes
    for name, form in forms.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight", "_proj.weight")):
            forms[name] = StoredForm(dtype, form.nbytes // 64 * natural)
    if tied:
        del forms["lm_head.weight"]
    settings = replace(checkpoints["20b"].config, tie_word_embeddings=tied)
    made = make_plan(settings, forms, device_bytes=None, step_tokens=STEP)
    packed = {group.name: group.packed for group in made.weights}
    assert packed["embedding"] == head * natural
    assert packed["lm_head"] == head * in_tiles + 4 * 201088
    blocks = 5120 * 90 + 2880 * 128  # qkv and o
    vectors = 4 * (5120 + 2880 + 64)  # biases and sinks
    assert packed["attention"] == layers * (blocks * in_tiles + vectors + 4 * (5120 + 2880))
    stored = {group.name: group.checkpoint for group in made.weights}
    assert (stored["embedding"], stored["lm_head"]) == (head * natural, 0 if tied else head * natural)
    # On a card where all but the embedding fits, that lies on the host as the checkpoint has it.
    small = make_plan(
        settings, forms, device_bytes=made.device_bytes + RESERVED - head * natural, step_tokens=STEP
    )
    assert (small.host_embedding, small.host_layers) == (True, 0)
    assert small.host_bytes == head * natural
    assert small.device_bytes == made.device_bytes - head * natural


def test_a_scale_a_row_takes_two_bytes(checkpoints: dict[str, Checkpoint]) -> None:
    forms = checkpoints["20b"].forms()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        forms[name] = StoredForm("INT8", 201088 * 2882, 2880)
    made = make_plan(checkpoints["20b"].config, forms, device_bytes=None, step_tokens=STEP)
    packed = {group.name: group.packed for group in made.weights}
    assert packed["embedding"] == 201088 * 2882
    assert packed["lm_head"] == 201088 * (2882 + 4)


def test_every_layout_is_counted_whole(layout: Path) -> None:
    checkpoint = open_checkpoint(layout)
    forms = checkpoint.forms()
    assert set(forms) == set(checkpoint.names())
    assert sum(form.nbytes for form in forms.values()) == checkpoint.nbytes
    assert (
        make_plan(checkpoint.config, forms, device_bytes=None, step_tokens=STEP).checkpoint_bytes
        == checkpoint.nbytes
    )


def test_tied_weights_are_once_in_the_checkpoint_and_twice_in_memory(
    tmp_path: Path, plan: Callable[..., Plan]
) -> None:
    checkpoint = open_checkpoint(write_sparse(tmp_path / "tied", "20b", 1, tied=True))
    made = make_plan(checkpoint.config, checkpoint.forms(), device_bytes=None, step_tokens=STEP)
    assert made.checkpoint_bytes == checkpoint.nbytes == plan("20b").checkpoint_bytes - 201088 * 2880 * 2
    assert made.weight_bytes == plan("20b").weight_bytes  # one is read by rows, the other in tiles


def test_a_plan_reads_no_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: dict[str, Checkpoint]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(StoredTensor, "array", refuse)
    monkeypatch.setattr(StoredTensor, "verify", refuse)
    checkpoint = open_checkpoint(checkpoints["120b"].path)
    made = make_plan(checkpoint.config, checkpoint.forms(), device_bytes=24 * GB, step_tokens=STEP)
    assert made.checkpoint_bytes > 65e9


# Where things lie


def test_120b_fits_one_card_of_80_gb(plan: Callable[..., Plan]) -> None:
    for tokens in (65536, CONTEXT):
        made = plan("120b", H100, cache_tokens=tokens)
        assert (made.host_embedding, made.host_layers, made.hot_experts) == (False, 0, 0)
        assert made.fits(H100)
        assert made.device_bytes + RESERVED <= H100
    assert made.full_kv == CONTEXT * KV_TOKEN["120b"]


def test_20b_fits_16_gb_with_all_of_its_context(plan: Callable[..., Plan]) -> None:
    made = plan("20b", 16 * GB)
    assert made.cache_tokens == CONTEXT
    assert (made.host_embedding, made.host_layers) == (True, 0)
    assert made.host_bytes == 201088 * 2880 * 2
    assert made.device_bytes == plan("20b").device_bytes - made.host_bytes <= 16 * GB - RESERVED
    assert not plan("20b", 24 * GB).host_embedding


@pytest.mark.parametrize(
    ("size", "device_bytes", "tokens"), [("20b", 8 * GB, 65536), ("20b", 12 * GB, CONTEXT),
                                         ("120b", 24 * GB, CONTEXT), ("120b", 48 * GB, CONTEXT)]
)  # fmt: skip
def test_experts_of_the_fewest_last_layers_leave_a_small_card(
    plan: Callable[..., Plan], size: str, device_bytes: int, tokens: int
) -> None:
    layers, E = SIZES[size]
    made, whole = plan(size, device_bytes, cache_tokens=tokens), plan(size, cache_tokens=tokens)
    head, away = 201088 * 2880 * 2, made.host_layers
    assert made.host_embedding
    assert 0 < away <= layers
    assert 8 <= made.hot_experts < E  # twice num_experts_per_tok
    assert made.first_host_layer == layers - away
    assert made.host_bytes == head + away * E * EXPERT
    assert made.device_bytes == whole.device_bytes - made.host_bytes + away * made.hot_experts * EXPERT
    assert made.hot_expert_bytes == away * made.hot_experts * EXPERT
    # The card is full, and with one layer fewer on the host there would not be room for 8 experts of each.
    free = device_bytes - RESERVED - made.device_bytes
    assert 0 <= free < away * EXPERT
    assert made.fits(device_bytes)
    fewer = whole.device_bytes - head - (away - 1) * (E - 8) * EXPERT
    assert fewer > device_bytes - RESERVED


def test_the_reserve_is_part_of_what_must_fit(plan: Callable[..., Plan]) -> None:
    needed = plan("20b").device_bytes + RESERVED
    assert plan("20b").fits(needed)
    assert not plan("20b").fits(needed - 1)
    assert not plan("20b", needed).host_embedding
    assert plan("20b", needed - 1).host_embedding


# What is said


def test_an_error_says_how_many_cache_tokens_would_fit(plan: Callable[..., Plan]) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        plan("20b", 8 * GB)
    text = str(caught.value)
    whole = plan("20b").device_bytes
    least = whole - 201088 * 2880 * 2 - 24 * (32 - 8) * EXPERT
    # All but the cache, and the sliding layers' share of it, is fixed; a block is 16 tokens.
    fitting = (8 * GB - RESERVED - (least - CONTEXT * KV_TOKEN["20b"])) // (16 * KV_TOKEN["20b"]) * 16
    needed, offloaded = (f"{math.ceil(nbytes * 10 / GB) / 10:.1f} GiB" for nbytes in (whole, least))
    assert text == (
        f"the model needs {needed} of device memory, {offloaded} with all experts in host memory, and "
        f"7.4 GiB can be used of 8.0 GiB: --cache-tokens {fitting} would fit"
    )
    assert plan("20b", 8 * GB, cache_tokens=fitting).fits(8 * GB)
    with pytest.raises(OutOfMemoryError):
        plan("20b", 8 * GB, cache_tokens=fitting + 1)


def test_the_cache_tokens_that_would_fit_are_the_most_that_do(plan: Callable[..., Plan]) -> None:
    least = plan("20b").device_bytes - 201088 * 2880 * 2 - 24 * (32 - 8) * EXPERT
    just = least - (CONTEXT - 16000) * KV_TOKEN["20b"] + RESERVED
    for device_bytes, fitting in ((just, 16000), (just - 1, 15984)):
        with pytest.raises(OutOfMemoryError, match=f": --cache-tokens {fitting} would fit"):
            plan("20b", device_bytes)
        assert plan("20b", device_bytes, cache_tokens=fitting).hot_experts == 8


def test_an_error_says_when_no_number_of_cache_tokens_helps(plan: Callable[..., Plan]) -> None:
    for device_bytes in (0, 4 * GB):
        with pytest.raises(
            OutOfMemoryError, match="even with hardly any --cache-tokens it takes a device"
        ) as e:
            plan("120b", device_bytes)
        assert "\n" not in str(e.value)
        assert f"{max(0.0, device_bytes / GB - 0.6):.1f} GiB can be used of {device_bytes / GB:.1f}" in str(
            e.value
        )
    needed = plan("120b").device_bytes - plan("120b").kv_bytes
    least = needed - 201088 * 2880 * 2 - 36 * (128 - 8) * EXPERT + RESERVED
    assert str(e.value).endswith(f"with {math.ceil(least * 10 / GB) / 10:.1f} GiB")


def test_a_model_with_few_experts_keeps_them_on_the_device() -> None:
    settings = ModelConfig.from_dict(config("20b") | {"num_local_experts": 8})
    with pytest.raises(OutOfMemoryError, match="GiB with its embedding in host memory, and") as caught:
        make_plan(settings, _dense(settings), device_bytes=6 * GB, step_tokens=STEP)
    assert "experts" not in str(caught.value)


@pytest.mark.parametrize("name", ["cache_tokens", "max_sequences", "step_tokens"])
@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_limits_are_checked_before_anything_is_loaded(
    plan: Callable[..., Plan], name: str, limit: float
) -> None:
    with pytest.raises(RequestError, match=f"{name} is {limit!r}: give an integer of at least 1"):
        plan("20b", **{name: limit})


def test_the_lines_of_a_plan_are_two_columns_that_add_up(plan: Callable[..., Plan]) -> None:
    for made in (
        plan("20b"),
        plan("20b", 16 * GB),
        plan("120b", 24 * GB),
        plan("120b", 8 * GB, cache_tokens=64),
    ):
        text = lines(made)
        assert len({len(line) for line in text}) == 1
        assert all(line.endswith(" GiB") for line in text)
        figures = {line[:-12].strip(): float(line[-10:-4]) for line in text}
        assert len(figures) == len(text)
        start = list(figures).index("weights in the checkpoint") + 1
        total = list(figures).index("on the device")
        assert sum(list(figures.values())[start:total]) == pytest.approx(figures["on the device"], abs=0.5)
    assert "biases of experts" in figures
    made = plan("120b", 24 * GB)
    first = made.first_host_layer
    assert [line[:-12].strip() for line in lines(made)] == [
        "weights in the checkpoint",
        "attention",
        "norms and routers",
        f"experts of layers 0 to {first - 1}, biases of all",
        f"experts cached, {made.hot_experts} of 128 in each other layer",
        "lm_head",
        "keys and values of 131072 tokens",
        "keys and values of sliding windows",
        "workspace",
        "on the device",
        "left free for CUDA",
        "embedding, in host memory",
        f"experts of layers {first} to 35, in host memory",
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 << 30), ("8GiB", 8 << 30), ("8 GB", 8 << 30), ("8gb", 8 << 30), ("8G", 8 << 30),
        ("800MB", 800 << 20), ("64KiB", 65536), ("1TB", 1 << 40), ("7.5GB", 15 << 29), ("0.1GB", 107374182),
        ("8589934592", 8 << 30), ("12B", 12), (" 1 ", 1),
    ],
)  # fmt: skip
def test_a_size_is_read_as_cards_are_sold(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GB", "0", "0GB", "-8GB", "8XB", "8 G B", "8GBs", "8,5GB", "1e9", "nan", "inf", ".5GB", "8.GB",
     "8iB", "0x8", "٨GB", "9" * 400, "8\nGB"],
)  # fmt: skip
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_size(text)
    assert str(caught.value).startswith(repr(text)[:40])
    assert "as in 8GB" in str(caught.value)


def test_sizes_are_written_in_gib() -> None:
    assert format_gib(12.8 * GB) == "12.8 GiB"
    assert format_gib(0) == "0.0 GiB"
    assert format_gib(4_700_000) == "0.004 GiB"
