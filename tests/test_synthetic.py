"""Checkpoints of random numbers: shapes and bytes of gpt-oss, the same bits each time, sane activations."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss_lite import synthetic as module
from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.config import ATTENTION_KINDS
from gptoss_lite.conversion import execute, plan_conversion
from gptoss_lite.errors import RequestError
from gptoss_lite.hub import DEMO
from gptoss_lite.kernels.cpu import yardstick as kernels
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.ops.base import floats, natural
from gptoss_lite.quant import MXFP4Tensor
from gptoss_lite.synthetic import NETWORKS, SyntheticCheckpoint, fill_with_numpy, synthetic

GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{part}_proj" for part in ("gate_up", "down"))
QUERIES = "model.layers.0.self_attn.q_proj.weight"
PROMPT = np.random.default_rng(0).integers(0, 4096, 70).tolist()


def bits(checkpoint: SyntheticCheckpoint, name: str) -> bytes:
    tensor = checkpoint.tensor(name)
    if isinstance(tensor, MXFP4Tensor):
        return bytes(tensor.blocks.tobytes() + tensor.scales.tobytes())
    assert isinstance(tensor, np.ndarray)
    return tensor.tobytes()


@pytest.mark.parametrize(("name", "nbytes"), [("20b", 13_761_264_768), ("120b", 65_248_815_744)])
def test_the_real_networks_have_the_bytes_of_the_published_files(name: str, nbytes: int) -> None:
    assert synthetic(name).nbytes == nbytes


def test_the_demos_shape_is_that_of_the_bundled_model() -> None:
    real, made = open_checkpoint(DEMO), synthetic("demo")
    assert made.config == real.config
    assert made.forms() == real.forms()
    for name in real.names():
        ours, theirs = made.tensor(name), real.tensor(name)
        assert type(ours) is type(theirs)
        assert ours.shape == theirs.shape
        if isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray):
            assert ours.dtype == theirs.dtype
            assert not ours.flags.writeable


def test_bits_follow_from_seed_and_name_alone() -> None:
    one, again, other = synthetic("demo"), synthetic("demo", layers=1), synthetic("demo", seed=1)
    for name in again.names():
        assert bits(one, name) == bits(again, name)
        assert bits(one, name) != bits(other, name)
    assert len({bits(one, f"model.layers.{layer}.mlp.experts.down_proj") for layer in range(4)}) == 4
    assert bits(one, "lm_head.weight") != bits(one, "model.embed_tokens.weight")


@pytest.mark.parametrize("fill", [kernels.fill, fill_with_numpy])
def test_words_are_splitmix64s(fill: Callable[..., None]) -> None:
    words = np.empty(5, np.uint64)
    fill(words, np.uint64(1234567), np.uint64(2**64 - 1), np.uint64(0))
    published = [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip
    assert words.tolist() == published


def test_a_files_bits_stay_what_they_are() -> None:
    first = np.frombuffer(bits(synthetic("demo", seed=7), DOWN)[:8], np.uint64)
    assert first[0] == 0xF0FD445442981A41


@pytest.mark.parametrize("name", [GATE_UP, DOWN, QUERIES, "model.layers.0.self_attn.sinks"])
@pytest.mark.parametrize("part", [0, 3, slice(2, 5), slice(1, 2), slice(0, 0), slice(5, None), slice(None)])
def test_a_part_is_that_part_of_the_whole(name: str, part: int | slice) -> None:
    weight = synthetic("demo").weights[name]
    whole, taken = floats(weight.tensor()), floats(weight.part(part))
    assert np.array_equal(taken, whole[part])


def test_parts_that_begin_within_a_word_are_right_too() -> None:
    odd = replace(NETWORKS["demo"], num_attention_heads=3, num_key_value_heads=1, head_dim=6)
    weight = synthetic(odd).weights["model.layers.0.self_attn.o_proj.weight"]  # rows of 36 bytes
    assert np.array_equal(floats(weight.part(slice(1, 4))), floats(weight.tensor())[1:4])


@pytest.mark.parametrize("count", [0, 1, 1000, 1 << 15, (1 << 16) + 3])
def test_numpy_makes_what_the_kernel_makes(count: int) -> None:
    made, wanted = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    arguments = [np.uint64(number) for number in (0xFEDCBA9876543210, 0x80FF0000FFFFFFFF, 0x1000200000003)]
    kernels.fill(made, *arguments)
    fill_with_numpy(wanted, *arguments)
    assert np.array_equal(made, wanted)


def test_a_machine_without_numba_makes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    want = bits(synthetic("demo"), GATE_UP)
    monkeypatch.setattr(module, "_filler", lambda: fill_with_numpy)
    assert bits(synthetic("demo"), GATE_UP) == want


def test_threads_share_what_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    want = bits(synthetic("demo"), "lm_head.weight")
    monkeypatch.setattr(module, "_TASK", 1000)
    assert bits(synthetic("demo"), "lm_head.weight") == want


def test_numbers_are_random_and_of_a_size_that_keeps_activations_near_one() -> None:
    checkpoint = synthetic("20b", layers=1)
    for name, columns in ((GATE_UP, 2880), (DOWN, 2880), (QUERIES, 2880), ("lm_head.weight", 2880)):
        part = checkpoint.weights[name].part(slice(0, 1) if "experts" in name else slice(0, 512))
        values = floats(part)
        gain = float(np.sqrt(np.mean(values * values) * columns))
        assert 0.5 < gain < 2, name
        assert abs(values.mean()) < 0.01 * values.std()
    expert: Any = checkpoint.weights[GATE_UP].part(0)
    values, counts = np.unique(expert.scales, return_counts=True)
    assert len(values) == 4
    assert counts.max() < 1.02 * counts.min()


def test_every_layer_of_a_deep_network_has_its_say() -> None:
    deep = replace(
        NETWORKS["demo"], num_hidden_layers=24, layer_types=ATTENTION_KINDS * 12, hidden_size=64,
        intermediate_size=64, vocab_size=512, num_attention_heads=2,
    )  # fmt: skip
    deep_logits, shallow_logits = (
        GptOss(synthetic(deep, layers=layers), get_ops("reference")).logits(list(range(20)))
        for layers in (24, 23)
    )
    assert np.isfinite(deep_logits).all()
    assert 0.3 < deep_logits.std() < 3
    assert 0.05 < np.abs(deep_logits - shallow_logits).mean() < 3


def test_all_devices_compute_the_same_network(needs_compiler: None) -> None:
    checkpoint = synthetic("demo", layers=2)
    want = GptOss(checkpoint, get_ops("reference")).logits(PROMPT[:9])
    for device in ("cpu", "emulated"):
        found = GptOss(checkpoint, get_ops(device), cache_tokens=64).logits(PROMPT[:9])
        error = np.linalg.norm(found - want, axis=1) / np.linalg.norm(want, axis=1)
        assert np.median(error) < 1e-2, device  # a tie of the router may fall the other way in a row


def test_loading_holds_one_layer_beside_what_is_packed() -> None:
    checkpoint = synthetic("demo")
    layer = max(weight.nbytes for weight in checkpoint.weights.values())
    tracemalloc.start()
    try:
        model = GptOss(checkpoint, get_ops("reference"))
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now >= checkpoint.nbytes
    assert peak - now < layer
    assert len(model.layers) == 4


def test_nothing_is_made_before_it_is_asked_for() -> None:
    checkpoint = synthetic("120b")
    checkpoint.forms()
    assert checkpoint.clock.seconds == 0
    checkpoint.tensor("model.norm.weight")
    assert checkpoint.clock.seconds > 0


def compare(found: Any, want: Any) -> None:
    assert np.array_equal(floats(natural(found)), floats(natural(want)))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("target", "name"), [("gguf", "made.gguf"), ("hf", "made"), ("original", "made")])
def test_it_is_written_as_any_checkpoint_is(target: str, name: str, layers: int, tmp_path: Path) -> None:
    checkpoint = synthetic("demo", layers=layers, seed=5)
    plan = plan_conversion(checkpoint, tmp_path / name, target)
    assert execute(plan, workers=2)
    written = open_checkpoint(tmp_path / name)
    assert replace(written.config, quant_method="mxfp4") == checkpoint.config
    assert set(written.names()) == set(checkpoint.names())
    for each in checkpoint.names():
        written.verify(each)
        compare(written.tensor(each), checkpoint.tensor(each))
    assert not execute(plan, workers=2)  # it is there


def test_another_seed_is_another_conversion(tmp_path: Path) -> None:
    made = [synthetic("demo", layers=1, seed=seed) for seed in (0, 1)]
    first, second = (plan_conversion(one, tmp_path / "made.gguf", "gguf").digest for one in made)
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (lambda: synthetic("7b"), "no network is called '7b': choose 20b, 120b, demo"),
        (lambda: synthetic("20b", layers=25), "layers is 25: 20b has 1 to 24"),
        (lambda: synthetic("demo", layers=0), "layers is 0: demo has 1 to 4"),
    ],
)
def test_what_there_is_not_is_named(arguments: Callable[[], object], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        arguments()
