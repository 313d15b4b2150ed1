"""Conversions: nothing lost between layouts, and the texts beside the weights go along."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from ml_dtypes import bfloat16
from numpy.typing import NDArray

from gptoss_lite.checkpoint import Checkpoint, open_checkpoint
from gptoss_lite.conversion import execute, plan_conversion, plan_quantization, recode, writer
from gptoss_lite.conversion.plan import Plan
from gptoss_lite.errors import FormatError
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.quant import QTensor, gguffile
from gptoss_lite.quant.formats import MXFP4, Format, Int8
from gptoss_lite.quant.policy import GROUPS, PRESETS, Policy, Rule
from gptoss_lite.tokenizer import Tokenizer, load_tokenizer
from tests.conftest import DATA
from tests.test_checkpoint import weights, write

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


def refusal(call: Callable[[], object], kind: type[Exception] = FormatError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return one_line(caught.value)


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
