"""Conversions: nothing lost between layouts, loss refused, and a kill or a full disk doing no harm."""

import errno
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from gptoss_lite.checkpoint import Checkpoint, open_checkpoint
from gptoss_lite.conversion import execute, journal, plan_conversion, plan_quantization, recode, writer
from gptoss_lite.conversion.cost import tensor_reports
from gptoss_lite.conversion.plan import Plan
from gptoss_lite.errors import CheckpointError, DeviceError, FormatError
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.quant import QTensor, gguffile
from gptoss_lite.quant.formats import MXFP4, Format, Int8
from gptoss_lite.quant.policy import GROUPS, PRESETS, Policy, Rule
from gptoss_lite.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import DATA
from tests.test_checkpoint import EXPERTS, weights, write

DEMO = Path(__file__).parents[1] / "gptoss_lite" / "demo"
BF16 = DATA / "demo" / "bf16"
TINY = DATA / "checkpoints" / "tiny"
# What every layout can be turned into without loss, from the golden networks.
LOSSLESS = {
    "mxfp4": ("hf", "bf16", "original", "gguf", "packed-cpu", "packed-cuda"),
    "original": ("hf", "bf16", "original", "gguf", "packed-cpu", "packed-cuda"),
    "bf16": ("hf", "bf16", "gguf"),
}


def values(checkpoint: Checkpoint, name: str) -> NDArray[np.uint32]:
    """Expand a tensor to the bits of float32, so that zeros keep their signs."""
    tensor = checkpoint.tensor(name)
    expanded = tensor.dequantize() if isinstance(tensor, QTensor) else np.asarray(tensor, np.float32)
    return np.ascontiguousarray(expanded, np.float32).view(np.uint32)


def assert_same(left: Path, right: Path) -> None:
    a, b = open_checkpoint(left), open_checkpoint(right)
    assert set(a.names()) == set(b.names())
    for name in a.names():
        b.verify(name)
        np.testing.assert_array_equal(values(a, name), values(b, name), err_msg=name)
    assert replace(a.config, quant_method=None) == replace(b.config, quant_method=None)


def convert(source: Path, destination: Path, target: str, **options: Any) -> Path:
    execute(plan_conversion(open_checkpoint(source), destination, target, **options), workers=2)
    return destination


def quantize(
    source: Path, destination: Path, policy: Policy, *, search: bool = True, workers: int = 2
) -> Plan:
    plan = plan_quantization(open_checkpoint(source), destination, policy, search=search)
    execute(plan, workers=workers)
    return plan


def only(group: str, format: Format, *, told: bool = True, exact: bool = False) -> Policy:
    return Policy((Rule(GROUPS[group], format, told, exact),))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    return text


# Layouts


def pairs(layout: Path) -> tuple[str, ...]:
    return LOSSLESS[layout.name]


def test_every_layout_is_reached_and_left_without_loss(layout: Path, tmp_path: Path) -> None:
    for target in pairs(layout):
        there = convert(layout, tmp_path / target, target)
        assert_same(layout, there)
        if target != "bf16" or layout.name == "bf16":  # from which MXFP4 comes back by quantising alone
            back = convert(there, tmp_path / f"{target}-back", {"mxfp4": "hf"}.get(layout.name, layout.name))
            assert_same(layout, back)
            assert open_checkpoint(back).layout == layout.name


def test_written_layouts_lead_to_one_another_without_loss(tmp_path: Path) -> None:
    targets = ("hf", "original", "gguf", "packed-cpu", "packed-cuda")
    made = {target: convert(TINY / "mxfp4", tmp_path / target, target) for target in targets}
    for source, target in itertools.permutations(targets, 2):
        assert_same(TINY / "mxfp4", convert(made[source], tmp_path / f"{source}-{target}", target))


@pytest.mark.parametrize("target", ["gguf", "packed-cpu", "packed-cuda", "original"])
def test_a_converted_checkpoint_gives_the_same_logits_bit_for_bit(
    network: list[Path], tmp_path: Path, target: str
) -> None:
    source = next(path for path in network if path.name != "bf16")
    tokens = list(range(1, 40))
    logits = [
        GptOss(open_checkpoint(path), get_ops("cpu")).logits(tokens)
        for path in (source, convert(source, tmp_path / target, target))
    ]
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize(
    "format",
    [Int8(32, "float16"), Int8(64, "bf16"), Int8(None, "float16"), Int8(32, "e8m0"), MXFP4()],
    ids=str,
)
def test_quantised_attention_and_heads_survive_every_layout_that_holds_them(
    tmp_path: Path, format: Format
) -> None:
    policy = Policy(tuple(Rule(GROUPS[group], format) for group in ("attention", "lm_head", "embedding")))
    quantize(DEMO, tmp_path / "q", policy)
    targets = ["hf", "packed-cpu", "packed-cuda"]
    targets += ["gguf"] if format in (MXFP4(), Int8(32, "float16")) else []
    targets += ["bf16"] if format in (MXFP4(), Int8(32, "e8m0")) else []
    for target in targets:
        there = convert(tmp_path / "q", tmp_path / target, target)
        assert_same(tmp_path / "q", there)
        if target != "bf16":
            back = convert(there, tmp_path / f"{target}-back", "hf")
            for name in (
                "lm_head.weight",
                "model.layers.1.self_attn.o_proj.weight",
                "model.embed_tokens.weight",
            ):
                assert open_checkpoint(back).weights[name].format == format
            assert_same(tmp_path / "q", back)


def test_tied_embeddings_stay_tied_or_are_written_twice(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in weights().items() if name != "lm_head.weight"}
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": False}
    source = write(tmp_path / "tied", tensors, {"tie_word_embeddings": True, "rope_scaling": rope})
    for target, tied in (("hf", True), ("gguf", True), ("original", False)):
        there = convert(source, tmp_path / target, target)
        checkpoint = open_checkpoint(there)
        assert checkpoint.config.tie_word_embeddings == tied
        head, table = (values(checkpoint, name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        np.testing.assert_array_equal(head, table)


@pytest.mark.parametrize("target", ["hf", "original", "gguf", "packed-cpu", "packed-cuda", "bf16"])
def test_the_size_of_the_parts_read_at_a_time_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    rules = [Rule(GROUPS[group], MXFP4() if target == "bf16" else Int8(32, "float16")) for group in GROUPS]
    source = DEMO if target == "original" else tmp_path / "s"
    if source != DEMO:
        quantize(DEMO, source, Policy(tuple(rules)))
    whole = convert(source, tmp_path / "whole", target)
    monkeypatch.setattr(recode, "PART_BYTES", 9_000)
    assert contents(convert(source, tmp_path / "parts", target)) == contents(whole)
    assert_same(source, whole)


def test_tiles_are_quantised_again_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(BF16, tmp_path / "q", PRESETS["small"])
    monkeypatch.setattr(recode, "PART_BYTES", 9_000)
    for target in ("hf", "packed-cpu", "packed-cuda"):
        source = convert(tmp_path / "q", tmp_path / target, target)
        quantize(source, tmp_path / f"{target}-again", only("lm_head", MXFP4()))
    assert_same(tmp_path / "hf-again", tmp_path / "packed-cpu-again")
    assert_same(tmp_path / "hf-again", tmp_path / "packed-cuda-again")


def test_queries_keys_and_values_of_several_dtypes_share_a_tensor_in_original(tmp_path: Path) -> None:
    tensors = weights()
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(np.float32) + np.float32(2**-20)
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": False}
    source = write(tmp_path / "s", tensors, {"rope_scaling": rope})
    assert_same(source, convert(source, tmp_path / "original", "original"))


def test_large_checkpoints_are_cut_into_shards_with_an_index(tmp_path: Path) -> None:
    there = convert(TINY / "mxfp4", tmp_path / "shards", "hf", shard_bytes=500_000)
    files = sorted(path.name for path in there.glob("*.safetensors"))
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 3
    index = json.loads((there / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == open_checkpoint(TINY / "mxfp4").nbytes
    assert_same(TINY / "mxfp4", there)


def test_files_for_others_say_pt_and_ours_say_so(tmp_path: Path) -> None:
    def metadata(directory: Path) -> dict[str, str]:
        with safetensors.safe_open(directory / "model.safetensors", "numpy") as file:
            return dict(file.metadata())

    theirs = metadata(convert(TINY / "original", tmp_path / "hf", "hf"))
    assert theirs["format"] == "pt"
    assert (theirs["source"], theirs["source_layout"]) == ("original", "original")
    names = set(safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors"))
    assert set(json.loads(theirs["checksums"])) == names
    ours = metadata(convert(TINY / "original", tmp_path / "packed", "packed-cpu"))
    assert (ours["format"], ours["format_version"]) == ("gptoss-lite", "1")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "mxfp4"
    assert written["rope_scaling"]["truncate"] is False


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    for workers in (1, 4):
        quantize(BF16, tmp_path / str(workers), PRESETS["smallest"], workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


# Texts beside the weights


def test_the_tokenizer_and_its_like_go_along_and_come_back_from_gguf(tmp_path: Path) -> None:
    gguf = convert(DEMO, tmp_path / "demo.gguf", "gguf")
    back = convert(gguf, tmp_path / "back", "hf")
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (DEMO / name).read_bytes()
    before, after = (json.loads((path / "tokenizer.json").read_text()) for path in (DEMO, back))
    assert before["model"]["vocab"] == after["model"]["vocab"]
    assert before["model"]["merges"] == after["model"]["merges"]
    assert before["added_tokens"] == after["added_tokens"]
    text = "It was a truth, universally acknowledged; 1813!\n"
    tokens = load_tokenizer(DEMO, 4096).encode(text)
    assert load_tokenizer(gguf, 4096).encode(text) == load_tokenizer(back, 4096).encode(text) == tokens


def test_small_files_of_any_bytes_survive_gguf(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "s", ignore=shutil.ignore_patterns("__pycache__"))
    strange = {"LICENSE": b"caf\xe9", "NOTICE": b"", "chat_template.jinja": "{{ '\u00e9' }}".encode()}
    for name, text in strange.items():
        (tmp_path / "s" / name).write_bytes(text)
    convert(tmp_path / "s", tmp_path / "x.gguf", "gguf")
    back = convert(tmp_path / "x.gguf", tmp_path / "back", "hf")
    assert {name: (back / name).read_bytes() for name in strange} == strange
    assert gguffile.read_file(tmp_path / "x.gguf").metadata["tokenizer.chat_template"] == "{{ '\u00e9' }}"


def test_an_older_chat_template_reaches_gguf_too(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "s", ignore=shutil.ignore_patterns("__pycache__"))
    settings = json.loads((tmp_path / "s" / "tokenizer_config.json").read_text())
    (tmp_path / "s" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ x }}"}))
    convert(tmp_path / "s", tmp_path / "x.gguf", "gguf")
    assert gguffile.read_file(tmp_path / "x.gguf").metadata["tokenizer.chat_template"] == "{{ x }}"


def test_the_model_s_name_is_kept_whatever_the_folder_of_the_hub_s_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--gpt-oss-tuned" / "snapshots" / "0123abc"
    shutil.copytree(DEMO, snapshot, ignore=shutil.ignore_patterns("__pycache__"))
    convert(snapshot, tmp_path / "out", "hf")
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata()["source"] == "someone/gpt-oss-tuned"


def test_original_takes_the_texts_of_the_directory_it_lies_in(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    convert(DEMO, tmp_path / "model" / "original", "original")
    (tmp_path / "model" / "original" / "tokenizer.json").unlink()
    back = convert(tmp_path / "model" / "original", tmp_path / "back", "hf")
    assert (back / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()


def test_gpt_oss_without_a_tokenizer_gets_the_one_it_shipped_with(tmp_path: Path) -> None:
    tensors = weights()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.zeros((201088, 32), bfloat16)
    there = convert(write(tmp_path / "s", tensors, {"vocab_size": 201088}), tmp_path / "d", "hf")
    tokenizer = Tokenizer.from_file(there / "tokenizer.json", 201088)
    assert tokenizer.encode("Hello, world") == Tokenizer.embedded().encode("Hello, world")
    # its SHA-256 as published with openai/gpt-oss-20b
    digest = hashlib.sha256((there / "tokenizer.json").read_bytes()).hexdigest()
    assert digest == "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"


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


def refusal(call: Callable[[], object], kind: type[Exception] = FormatError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return one_line(caught.value)


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


# Destinations


def test_a_destination_that_exists_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for taken in ("mine", "file"):
        text = refusal(partial(convert, DEMO, tmp_path / taken, "hf"), CheckpointError)
        assert f"{taken} exists already" in text
    assert (tmp_path / "mine" / "letter.txt").read_text() == (tmp_path / "file").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    assert_same(DEMO, convert(DEMO, tmp_path / "empty", "hf"))


def test_a_directory_in_the_way_of_the_partial_result_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("dear")
    text = refusal(lambda: convert(DEMO, tmp_path / "out", "hf"), CheckpointError)
    assert "out.partial is in the way" in text
    assert (tmp_path / "out.partial" / "letter.txt").read_text() == "dear"


def test_source_and_destination_must_differ(tmp_path: Path) -> None:
    source = convert(DEMO, tmp_path / "s", "hf")
    link = tmp_path / "link"
    link.symlink_to(source)
    before = contents(source)
    for destination in (source, link, tmp_path / "s" / ".." / "s"):
        text = refusal(partial(convert, source, destination, "hf"), CheckpointError)
        assert "is the source itself" in text
    assert contents(source) == before


def test_a_destination_must_fit_the_layout_and_lie_somewhere(tmp_path: Path) -> None:
    assert "makes a directory" in refusal(lambda: convert(DEMO, tmp_path / "x.gguf", "hf"), CheckpointError)
    text = refusal(lambda: convert(DEMO, tmp_path / "no" / "x", "hf"), CheckpointError)
    assert "no is not a directory" in text


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    text = refusal(lambda: convert(DEMO, tmp_path / "out", "hf"), CheckpointError)
    assert "needs 6.8 MiB of disk, and 1.0 MiB are free" in text
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_file_does_not_take_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").mkdir()
    text = refusal(lambda: convert(DEMO, tmp_path / "x.gguf", "gguf"), CheckpointError)
    assert "x.gguf exists already" in text
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_paths_may_be_relative_and_strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "an \u00e4 b").mkdir()
    for destination in ("x/", "./y", "an \u00e4 b/z"):
        assert_same(DEMO, convert(DEMO, Path(destination), "hf"))
    for taken in (".", "/"):
        assert "exists already" in refusal(partial(convert, DEMO, Path(taken), "hf"), CheckpointError)


# Interruptions


class Interrupted:
    """Lets a number of pieces be written and then fails, as a full disk or a kill would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pieces: int, error: BaseException) -> None:
        self.left, self.error, self._write_at = pieces, error, writer._write_at
        monkeypatch.setattr(writer, "_write_at", self)

    def __call__(self, file: Any, data: memoryview, at: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error
        self._write_at(file, data, at)


@pytest.mark.parametrize("target", ["hf", "gguf", "packed-cuda"])
def test_a_full_disk_leaves_what_is_done_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    whole = convert(DEMO, tmp_path / "whole", target)
    with monkeypatch.context() as patch:
        Interrupted(patch, 60, OSError(errno.ENOSPC, "No space left on device"))
        text = refusal(lambda: convert(DEMO, tmp_path / "out", target), CheckpointError)
    assert "the disk is full" in text
    assert "out.partial" in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "out.partial")
    written, original = 0, writer._write_at

    def counted(file: Any, data: memoryview, at: int) -> None:
        nonlocal written
        written += len(data)
        original(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_at", counted)
        convert(DEMO, tmp_path / "out", target)
    assert written < 0.9 * sum(map(len, contents(whole).values()))
    assert contents(tmp_path / "out") == contents(whole)
    assert not (tmp_path / "out.partial").exists()


def test_ctrl_c_leaves_what_is_done_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Interrupted(patch, 40, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(DEMO, tmp_path / "out", "hf")
    assert (tmp_path / "out.partial" / journal.NAME).read_text().count("\n") > 5
    assert_same(DEMO, convert(DEMO, tmp_path / "out", "hf"))


def test_a_finished_tensor_that_was_damaged_since_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_errors = {
        w.name.name: w.errors for w in quantize(BF16, tmp_path / "whole", PRESETS["small"]).weights
    }
    with monkeypatch.context() as patch:
        Interrupted(patch, 80, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(CheckpointError):
            quantize(BF16, tmp_path / "out", PRESETS["small"])
    records = (tmp_path / "out.partial" / journal.NAME).read_text().splitlines()[1:]
    finished = next(iter(json.loads(records[-1])["checksums"]))
    starts = plan_quantization(open_checkpoint(BF16), tmp_path / "out", PRESETS["small"]).files[0].starts
    with (tmp_path / "out.partial" / "model.safetensors").open("r+b") as file:
        file.seek(starts[finished])
        byte = file.read(1)
        file.seek(starts[finished])
        file.write(bytes([byte[0] ^ 1]))
    plan = quantize(BF16, tmp_path / "out", PRESETS["small"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {w.name.name: w.errors for w in plan.weights} == plan_errors


def test_the_rest_of_another_conversion_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Interrupted(patch, 40, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(CheckpointError):
            quantize(BF16, tmp_path / "out", PRESETS["small"])
    before = contents(tmp_path / "out.partial")
    text = refusal(lambda: quantize(BF16, tmp_path / "out", PRESETS["experts"]), CheckpointError)
    assert "is left from a conversion of other things or in another way" in text
    assert contents(tmp_path / "out.partial") == before
    quantize(BF16, tmp_path / "out", PRESETS["small"])


def test_too_small_a_disk_at_the_second_try_costs_nothing_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Interrupted(patch, 60, OSError(errno.ENOSPC, "No space left on device"))
        refusal(lambda: convert(DEMO, tmp_path / "out", "hf"), CheckpointError)
    before = contents(tmp_path / "out.partial")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "of disk, and" in refusal(lambda: convert(DEMO, tmp_path / "out", "hf"), CheckpointError)
    assert contents(tmp_path / "out.partial") == before
    with monkeypatch.context() as patch:  # what is there already needs no room
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6 << 20))
        assert_same(DEMO, convert(DEMO, tmp_path / "out", "hf"))


def test_a_source_that_has_changed_since_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = convert(DEMO, tmp_path / "s", "hf")
    with monkeypatch.context() as patch:
        Interrupted(patch, 40, OSError(errno.ENOSPC, "No space left on device"))
        refusal(lambda: convert(source, tmp_path / "out", "hf"), CheckpointError)
    (source / "model.safetensors").touch()
    assert "in another way" in refusal(lambda: convert(source, tmp_path / "out", "hf"), CheckpointError)


def test_one_destination_is_written_by_one_process(tmp_path: Path) -> None:
    plan = plan_conversion(open_checkpoint(DEMO), tmp_path / "out", "hf")
    held = journal.Journal.open(tmp_path / "out.partial", plan.digest)
    assert "is being written by another process" in refusal(lambda: execute(plan, workers=1), CheckpointError)
    held.close()
    execute(plan, workers=1)


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_a_stop_between_the_move_and_the_end_is_made_good(tmp_path: Path, target: str) -> None:
    plan = plan_conversion(
        open_checkpoint(DEMO), tmp_path / ("out.gguf" if target == "gguf" else "out"), target
    )
    assert execute(plan, workers=1)
    directory = tmp_path if plan.is_single_file else plan.destination
    before = contents(directory)
    leftover = tmp_path / "out.gguf.partial" if plan.is_single_file else plan.destination
    leftover.mkdir(exist_ok=True)
    (leftover / journal.NAME).write_text(json.dumps({"digest": plan.digest}) + "\n")
    assert not execute(plan, workers=1)
    assert contents(directory) == before


def test_a_result_that_is_out_of_date_or_of_something_else_is_not_taken_for_done(tmp_path: Path) -> None:
    source = convert(BF16, tmp_path / "s", "hf")
    quantize(source, tmp_path / "out", PRESETS["small"])
    again = plan_quantization(open_checkpoint(source), tmp_path / "out", PRESETS["small"])
    assert not execute(again, workers=1)
    other = plan_quantization(open_checkpoint(source), tmp_path / "out", PRESETS["balanced"])
    assert "exists already" in refusal(lambda: execute(other, workers=1), CheckpointError)
    (source / "model.safetensors").touch()
    assert "exists already" in refusal(lambda: execute(again, workers=1), CheckpointError)
