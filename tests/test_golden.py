"""The whole network against logits that Hugging Face transformers computed in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gptoss_lite.batch import Batch
from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.kernels.cpu import isa
from gptoss_lite.kernels.emulator.runtime import Emulator, Order
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.ops.cuda import CUDAOps

Golden = Callable[[Path], dict[str, NDArray[Any]]]
needs_compiler = pytest.mark.usefixtures("needs_compiler")


def row_errors(model: GptOss, reference: dict[str, NDArray[Any]]) -> dict[tuple[str, int], float]:
    """Relative error ||logits - reference|| / ||reference|| of every (prompt, row)."""
    errors = {}
    for key in (key for key in reference if key.startswith("logits_")):
        want = reference[key]
        got = model.logits(reference[key.replace("logits", "tokens")].tolist(), last=len(want))
        for row, error in enumerate(np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)):
            errors[key, row] = float(error)
    return errors


def test_reference_is_transformers_to_float32_rounding(layout: Path, golden: Golden) -> None:
    model = GptOss(open_checkpoint(layout), get_ops("reference"))
    # Two float32 evaluations in different order differ by about 1e-6.
    assert max(row_errors(model, short(golden(layout))).values()) <= 2e-5


def test_reference_is_transformers_past_the_original_context(network: list[Path], golden: Golden) -> None:
    model = GptOss(open_checkpoint(network[0]), get_ops("reference"))
    assert max(row_errors(model, golden(network[0])).values()) <= 2e-5


@pytest.mark.soak
def test_every_layout_is_transformers_past_the_original_context(layout: Path, golden: Golden) -> None:
    model = GptOss(open_checkpoint(layout), get_ops("reference"))
    assert max(row_errors(model, golden(layout)).values()) <= 2e-5


def test_cpu_is_within_bf16_keys_and_values_of_transformers(network: list[Path], golden: Golden) -> None:
    worst: dict[tuple[str, int], float] = {}
    for layout in network:
        model = GptOss(open_checkpoint(layout), get_ops("cpu"))
        errors = row_errors(model, golden(layout))
        assert np.median(list(errors.values())) <= 2e-3
        assert np.quantile(list(errors.values()), 0.9) <= 1e-2
        worst = {key: max(error, worst.get(key, 0.0)) for key, error in errors.items()}
    # A router near-tie that flips shows as one row above 0.1; a wrong window or sink shows as many.
    assert np.mean(np.array(list(worst.values())) > 0.1) <= 0.05


@pytest.mark.parametrize(
    ("activations", "dense", "bound"),
    [("int8", None, 3e-2), ("accurate", "int8", 3e-2), ("int8", "int8", 5e-2)],
)
def test_eight_bits_cost_what_they_must(
    network: list[Path], golden: Golden, activations: str, dense: str | None, bound: float
) -> None:
    packed = next(path for path in network if path.name == "mxfp4")
    model = GptOss(open_checkpoint(packed), get_ops("cpu", activations=activations, dense=dense))
    errors = list(row_errors(model, short(golden(packed))).values())
    assert 1e-3 < np.median(errors) <= bound


@pytest.mark.soak
@pytest.mark.parametrize("kind", isa.usable()[1:])
def test_every_kind_of_cpu_gives_the_same_logits(
    network: list[Path], golden: Golden, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = next(path for path in network if path.name == "mxfp4")
    tokens = golden(packed)["tokens_129"].tolist()
    want = GptOss(open_checkpoint(packed), get_ops("cpu")).logits(tokens)
    monkeypatch.setenv(isa.VARIABLE, kind)
    got = GptOss(open_checkpoint(packed), get_ops("cpu")).logits(tokens)
    assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)  # dense sums have other lanes


def emulated(path: Path, order: Order = "forward") -> GptOss:
    """Open a checkpoint on the CUDA path, run by the emulator."""
    return GptOss(open_checkpoint(path), CUDAOps(Emulator(order), "emulated"))


def short(reference: dict[str, NDArray[Any]], longest: int = 300) -> dict[str, NDArray[Any]]:
    """Keep the prompts of at most `longest` tokens: the longest takes minutes on the emulator."""
    lengths = [n for n in (1, 7, 127, 128, 129, 300) if n <= longest]
    return {f"{kind}_{n}": reference[f"{kind}_{n}"] for n in lengths for kind in ("tokens", "logits")}


def assert_within_half_precision(errors: dict[tuple[str, int], float]) -> None:
    values = np.array(list(errors.values()))
    assert np.median(values) <= 3e-3
    assert np.quantile(values, 0.9) <= 2e-2
    assert np.mean(values > 0.1) <= 0.05


@needs_compiler
def test_cuda_prefill_is_within_half_precision_of_transformers(layout: Path, golden: Golden) -> None:
    assert_within_half_precision(row_errors(emulated(layout), short(golden(layout))))


@pytest.mark.soak
@needs_compiler
def test_cuda_prefill_past_the_original_context(network: list[Path], golden: Golden) -> None:
    reference = golden(network[0])
    longest = {key: reference[key] for key in ("tokens_long", "logits_long")}
    assert_within_half_precision(row_errors(emulated(network[0]), longest))


@needs_compiler
@pytest.mark.parametrize("order", ["reversed", "random"])
def test_cuda_prefill_in_other_thread_orders(network: list[Path], golden: Golden, order: Order) -> None:
    reference = short(golden(network[0]), longest=129)
    assert_within_half_precision(row_errors(emulated(network[0], order), reference))


@needs_compiler
def test_cuda_decode_is_within_half_precision_of_transformers(layout: Path, golden: Golden) -> None:
    """Token by token through the decode kernels, recorded and replayed, up to past the sliding window."""
    reference = golden(layout)
    model = emulated(layout)
    blocks = 9
    cache = model.ops.new_cache(model.config, blocks, blocks)
    table = np.arange(blocks, dtype=np.int32)[None]
    tokens = reference["tokens_129"]
    rows = {}
    for position in range(len(tokens)):
        batch = Batch(
            tokens=tokens[position : position + 1].astype(np.int32),
            positions=np.array([position], np.int32),
            query_start=np.array([0, 1], np.int32),
            full_table=table,
            sliding_table=table,
            rows=np.zeros(1, np.int32),
            decoding=np.ones(1, np.bool_),
        )
        rows[position] = model(batch, cache)[0]
    want = reference["logits_129"]
    got = np.stack([rows[len(tokens) - len(want) + i] for i in range(len(want))])
    errors = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert_within_half_precision({("logits_129", i): float(error) for i, error in enumerate(errors)})


@pytest.mark.parametrize("device", ["reference", "cpu", "emulated"])
def test_best_token_follows_the_reference_where_the_gap_is_clear(
    layout: Path, golden: Golden, device: str, request: pytest.FixtureRequest
) -> None:
    if device == "emulated":
        request.getfixturevalue("needs_compiler")
    reference = golden(layout)
    prompt, greedy = reference["tokens_7"].tolist(), reference["greedy_7"].tolist()
    model = GptOss(open_checkpoint(layout), get_ops(device))
    logits = model.logits(prompt + greedy[:-1], last=len(greedy))
    clear = reference["greedy_gap"] > 0.1
    np.testing.assert_array_equal(logits.argmax(axis=1)[clear], np.array(greedy)[clear])
