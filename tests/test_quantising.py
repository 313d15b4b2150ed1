"""Quantising a checkpoint: what a policy asks for, what it costs, and what is refused."""

import errno
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.conversion import execute, plan_quantization
from gptoss_lite.conversion.cost import tensor_reports
from gptoss_lite.conversion.plan import Plan
from gptoss_lite.errors import CheckpointError, DeviceError
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.quant import QTensor
from gptoss_lite.quant.formats import MXFP4, Format, Int8
from gptoss_lite.quant.policy import GROUPS, PRESETS, Policy, Rule
from tests.test_checkpoint import EXPERTS, weights, write
from tests.test_conversion import (
    BF16,
    DEMO,
    TINY,
    Interrupted,
    assert_same,
    contents,
    convert,
    only,
    quantize,
    refusal,
    values,
)

# Quantising


@pytest.mark.parametrize("search", [False, True])
def test_bf16_that_came_from_mxfp4_quantises_back_to_the_same_values(
    network: list[Path], tmp_path: Path, search: bool
) -> None:
    by_layout = {path.name: path for path in network}
    if not {"bf16", "mxfp4"} <= by_layout.keys():
        pytest.skip("the network has no bf16 and mxfp4 layouts to compare")
    plan = quantize(by_layout["bf16"], tmp_path / "q", PRESETS["experts"], search=search)
    assert_same(by_layout["mxfp4"], tmp_path / "q")
    assert all(weight.errors.squared_error == 0 for weight in plan.weights)
    assert open_checkpoint(tmp_path / "q").layout == "mxfp4"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_quantise_what_they_say_and_the_result_runs(tmp_path: Path, preset: str) -> None:
    expected = {
        "experts": {"experts": "MXFP4"},
        "balanced": {"experts": "MXFP4", "attention": "INT8", "lm_head": "INT8"},
        "small": {"experts": "MXFP4", "attention": "INT8", "lm_head": "INT8", "embedding": "INT8"},
        "smallest": {"experts": "MXFP4", "attention": "MXFP4", "lm_head": "INT8", "embedding": "INT8"},
    }[preset]
    plan = quantize(BF16, tmp_path / "q", PRESETS[preset])
    checkpoint = open_checkpoint(tmp_path / "q")
    for weight in plan.weights:
        dtype = checkpoint.forms()[weight.name.name].dtype
        assert dtype == (expected.get(weight.name.group, "BF16") if weight.name.is_quantisable else "BF16")
        # Half a code of int8 is 1/254 of the largest in a group; MXFP4 is coarser.
        relative = np.sqrt(weight.errors.squared_error / max(weight.errors.squared, 1e-30))
        assert relative < {"BF16": 1e-12, "INT8": 0.012, "MXFP4": 0.2}[dtype], weight.name.name
        assert (weight.errors.squared_error > 0) == (dtype != "BF16")
    rows = [
        GptOss(open_checkpoint(path), get_ops("cpu")).logits(range(5, 40)) for path in (BF16, tmp_path / "q")
    ]
    error = np.linalg.norm(rows[0] - rows[1]) / np.linalg.norm(rows[0])
    assert 0 < error < 0.3


def test_what_is_quantised_stays_as_it_is_unless_told(tmp_path: Path) -> None:
    quantize(TINY / "mxfp4", tmp_path / "kept", Policy((Rule(GROUPS["experts"], Int8()),)))
    assert_same(TINY / "mxfp4", tmp_path / "kept")
    assert open_checkpoint(tmp_path / "kept").layout == "mxfp4"


def test_mxfp4_becomes_int8_exactly_where_groups_allow_it(tmp_path: Path) -> None:
    plan = quantize(TINY / "mxfp4", tmp_path / "exact", only("experts", Int8(), exact=True))
    assert open_checkpoint(tmp_path / "exact").weights[f"{EXPERTS}.down_proj"].format == Int8(32, "e8m0")
    for name in (f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"):  # int8 has no zero below zero
        before, after = (open_checkpoint(path).tensor(name) for path in (TINY / "mxfp4", tmp_path / "exact"))
        assert isinstance(before, QTensor) and isinstance(after, QTensor)
        np.testing.assert_array_equal(before.dequantize(), after.dequantize())
    assert all(weight.errors.squared_error == 0 for weight in plan.weights)
    rows = only("experts", Int8(None), exact=True)
    plan = quantize(TINY / "mxfp4", tmp_path / "rows", rows)
    assert open_checkpoint(tmp_path / "rows").weights[f"{EXPERTS}.down_proj"].format == Int8(None, "bf16")
    assert any(weight.errors.squared_error > 0 for weight in plan.weights)


def test_errors_are_those_of_the_written_values(tmp_path: Path) -> None:
    plan = quantize(BF16, tmp_path / "q", PRESETS["smallest"])
    before, after = open_checkpoint(BF16), open_checkpoint(tmp_path / "q")
    for weight in plan.weights:
        name = weight.name.name
        x, q = (values(c, name).view(np.float32).astype(np.float64) for c in (before, after))
        assert weight.errors.squared_error == pytest.approx(np.square(x - q).sum(), rel=1e-9, abs=0)
        if weight.errors.squared:
            assert weight.errors.largest_error == pytest.approx(np.abs(x - q).max(), rel=1e-6)


def test_search_beats_the_rule_on_every_tensor_that_is_not_exact(tmp_path: Path) -> None:
    policy = Policy(tuple(Rule(pattern, MXFP4()) for pattern in GROUPS.values()))
    rule, search = (
        {
            w.name.name: w.errors.squared_error
            for w in quantize(BF16, tmp_path / str(s), policy, search=s).weights
        }
        for s in (False, True)
    )
    lossy = [name for name, error in rule.items() if error]
    assert len(lossy) == 4 * 6 + 2
    assert all(search[name] < rule[name] for name in lossy)
    assert all(search[name] == 0 for name in rule if name not in lossy)


def test_executing_a_plan_again_reports_the_same_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_quantization(open_checkpoint(BF16), tmp_path / "out", PRESETS["small"])
    with monkeypatch.context() as patch:
        Interrupted(patch, 80, OSError(errno.ENOSPC, "No space left on device"))
        refusal(lambda: execute(plan, workers=2), CheckpointError)
    execute(plan, workers=2)
    whole = quantize(BF16, tmp_path / "whole", PRESETS["small"])
    assert [w.errors for w in plan.weights] == [w.errors for w in whole.weights]


def test_calibration_is_reported_and_survives_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [list(range(n, n + 64)) for n in range(0, 640, 64)]

    def plan(name: str, tokens: list[list[int]]) -> Plan:
        checkpoint = open_checkpoint(BF16)
        return plan_quantization(checkpoint, tmp_path / name, PRESETS["experts"], calibration_rows=tokens)

    whole = plan("whole", rows)
    execute(whole, workers=2)
    first = plan("out", rows)
    with monkeypatch.context() as patch:
        Interrupted(patch, 60, OSError(errno.ENOSPC, "No space left on device"))
        refusal(lambda: execute(first, workers=2), CheckpointError)
    other = plan("out", rows[1:])
    assert "in another way" in refusal(lambda: execute(other, workers=2), CheckpointError)
    resumed = plan("out", rows)
    execute(resumed, workers=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert tensor_reports(resumed) == tensor_reports(whole)
    gains = [tensor.output_ratio for tensor in tensor_reports(whole) if tensor.squared_error]
    assert len(gains) == 8
    assert all(gain is not None and gain < 1 for gain in gains)


# Refusals


@pytest.mark.parametrize(
    ("group", "format", "target", "message"),
    [
        (
            "attention",
            Int8(),
            "original",
            "q_proj.weight: original/ has no int8; --to hf, packed-cpu or packed-cuda would do",
        ),
        ("attention", MXFP4(), "original", "original/ has mxfp4 for experts alone"),
        (
            "lm_head",
            Int8(),
            "bf16",
            "lm_head.weight: int8 codes times bf16 scales have more digits than bf16",
        ),
        (
            "lm_head",
            Int8(64, "float16"),
            "gguf",
            "GGUF has int8 by groups of 32 with float16 scales (quantize --scales float16), not",
        ),
        ("experts", Int8(32, "bf16"), "gguf", "experts.gate_up_proj"),
    ],
)
def test_a_layout_that_would_lose_something_is_refused_with_those_that_would_not(
    tmp_path: Path, group: str, format: Format, target: str, message: str
) -> None:
    quantize(DEMO, tmp_path / "q", only(group, format))
    text = refusal(lambda: convert(tmp_path / "q", tmp_path / "out", target))
    assert message in text
    assert f"--to {target} would lose" in text
    assert "hf" in text.partition("; ")[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_dense_experts_have_no_place_in_original_and_nothing_to_pack(tmp_path: Path) -> None:
    text = refusal(lambda: convert(BF16, tmp_path / "out", "original"))
    assert "original/ has its experts in mxfp4 alone" in text
    text = refusal(lambda: convert(BF16, tmp_path / "out", "packed-cpu"))
    assert "is quantised: quantize it first; --to hf, bf16 or gguf would do" in text


def test_floats_that_bf16_does_not_hold_are_refused_by_name(tmp_path: Path) -> None:
    tensors = weights()
    tensors["lm_head.weight"] = np.full((6, 32), 1 + 2**-20, np.float32)
    source = write(tmp_path / "s", tensors)
    text = refusal(lambda: convert(source, tmp_path / "out", "bf16"))
    assert "would lose lm_head.weight: it is F32, and bf16 is not enough" in text
    tensors["lm_head.weight"] = np.full((6, 32), 1.5, np.float32)
    assert_same(write(tmp_path / "t", tensors), convert(tmp_path / "t", tmp_path / "out", "bf16"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"max_position_embeddings": 63}, "max_position_embeddings"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 32}},
            "truncate",
        ),
    ],
)
def test_settings_without_a_key_in_original_are_refused(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": False}
    source = write(tmp_path / "s", None, {"rope_scaling": rope} | change)
    text = refusal(lambda: convert(source, tmp_path / "out", "original"))
    assert f"would lose {key}" in text or f"would lose rope_scaling.{key}" in text


@pytest.mark.parametrize(
    ("change", "key"),
    [({"layer_types": ["full_attention"]}, "layer_types"), ({"swiglu_limit": 5.0}, "swiglu_limit")],
)
def test_settings_that_gguf_has_no_key_for_are_refused(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    source = write(tmp_path / "s", None, change)
    assert f"would lose {key}" in refusal(lambda: convert(source, tmp_path / "out", "gguf"))


def test_tiles_for_kernels_that_cannot_compute_the_network_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "s")  # of head_dim 4
    assert "head_dim" in refusal(lambda: convert(source, tmp_path / "out", "packed-cuda"), DeviceError)


def test_a_quantised_embedding_alone_is_nothing_to_pack(tmp_path: Path) -> None:
    quantize(BF16, tmp_path / "q", Policy((Rule(GROUPS["embedding"], Int8()),)))
    assert "nothing to pack" in refusal(lambda: convert(tmp_path / "q", tmp_path / "out", "packed-cpu"))


@pytest.mark.parametrize("pattern", ["model.layer.*", "", "lm_heat.weight"])
def test_a_rule_that_matches_nothing_is_refused_by_its_pattern(tmp_path: Path, pattern: str) -> None:
    policy = Policy((Rule(pattern, Int8(), told=True),))
    text = refusal(lambda: quantize(DEMO, tmp_path / "q", policy))
    assert f"{pattern!r} matches no weight of this model" in text


@pytest.mark.parametrize("pattern", ["*", "model.layers.*.mlp.router.weight", "model.norm.weight", "*.sinks"])
def test_routers_norms_and_sinks_are_never_quantised(tmp_path: Path, pattern: str) -> None:
    policy = Policy((Rule(pattern, Int8(), told=True),))
    text = refusal(lambda: quantize(DEMO, tmp_path / "q", policy))
    assert f"{pattern} asks to quantise " in text
    assert "never quantised" in text
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_does_not_divide_is_refused_by_name_unless_the_weight_has_its_own(
    tmp_path: Path,
) -> None:
    policy = only("attention", Int8(96))
    text = refusal(lambda: quantize(DEMO, tmp_path / "q", policy))
    assert (
        "o_proj.weight has 512 columns, which groups of 96 do not divide: choose 32, 64, 128 or row" in text
    )
    own = Policy((Rule("*.o_proj.weight", Int8(64)), *policy.rules))
    quantize(DEMO, tmp_path / "q", own)
    found = open_checkpoint(tmp_path / "q").weights
    assert found["model.layers.0.self_attn.o_proj.weight"].format == Int8(64)
    assert found["model.layers.0.self_attn.q_proj.weight"].format == Int8(96)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named_by_position_and_nothing_is_left(tmp_path: Path, value: float) -> None:
    shutil.copytree(BF16, tmp_path / "s")
    tensors = safetensors.numpy.load_file(BF16 / "model.safetensors")
    name = "model.layers.2.mlp.experts.down_proj"
    damaged = tensors[name].copy()
    damaged[3, 100, 17] = value
    safetensors.numpy.save_file({**tensors, name: damaged}, tmp_path / "s" / "model.safetensors")
    before = contents(tmp_path / "s")
    text = refusal(lambda: quantize(tmp_path / "s", tmp_path / "q", PRESETS["experts"]), CheckpointError)
    assert f"tensor {name} holds {value} at (3, 100, 17)" in text
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    assert contents(tmp_path / "s") == before


def test_a_damaged_source_of_ours_is_noticed(tmp_path: Path) -> None:
    for target in ("hf", "gguf", "packed-cuda"):
        source = convert(DEMO, tmp_path / target, target)
        file = next(path for path in source.iterdir() if path.suffix in (".gguf", ".safetensors"))
        raw = bytearray(file.read_bytes())
        raw[-1000] ^= 4
        file.unlink()
        file.write_bytes(raw)
        text = refusal(partial(convert, source, tmp_path / "out", "hf"), CheckpointError)
        assert "is damaged: its checksum is" in text or "must be finite" in text
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
