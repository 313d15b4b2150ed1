"""Checkpoints: three layouts under one naming, hostile files refused, and no flipped bit passing unseen."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from ml_dtypes import bfloat16

from gptoss_lite.checkpoint import Checkpoint, open_checkpoint, save_file
from gptoss_lite.errors import CheckpointError, FormatError
from gptoss_lite.quant import MXFP4Tensor, QTensor, quantize
from gptoss_lite.quant.tensorfile import read_file

CONFIG = {
    "model_type": "gpt_oss",
    "vocab_size": 6,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 4,
    "max_position_embeddings": 64,
    "rope_theta": 10000,
    "quantization_config": {"quant_method": "mxfp4"},
}
EXPERTS = "model.layers.0.mlp.experts"


def weights() -> dict[str, np.ndarray]:
    """Draw a network of one layer, as the mxfp4 layout stores it."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (6, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (6, 32),
        "model.layers.0.input_layernorm.weight": (32,),
        "model.layers.0.self_attn.q_proj.weight": (8, 32),
        "model.layers.0.self_attn.k_proj.weight": (4, 32),
        "model.layers.0.self_attn.v_proj.weight": (4, 32),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.0.self_attn.k_proj.bias": (4,),
        "model.layers.0.self_attn.v_proj.bias": (4,),
        "model.layers.0.self_attn.sinks": (2,),
        "model.layers.0.self_attn.o_proj.weight": (32, 8),
        "model.layers.0.self_attn.o_proj.bias": (32,),
        "model.layers.0.post_attention_layernorm.weight": (32,),
        "model.layers.0.mlp.router.weight": (2, 32),
        "model.layers.0.mlp.router.bias": (2,),
        f"{EXPERTS}.gate_up_proj_bias": (2, 128),
        f"{EXPERTS}.down_proj_bias": (2, 32),
    }
    tensors = {name: rng.standard_normal(shape).astype(bfloat16) for name, shape in shapes.items()}
    for name, shape in (("gate_up_proj", (2, 128, 32)), ("down_proj", (2, 32, 64))):
        q = quantize(rng.standard_normal(shape).astype(np.float32), "mxfp4")
        tensors |= {f"{EXPERTS}.{name}_blocks": q.blocks, f"{EXPERTS}.{name}_scales": q.scales}
    return tensors


def write(
    folder: Path, tensors: dict[str, np.ndarray] | None = None, config: dict[str, Any] | None = None
) -> Path:
    """Write a checkpoint as others write theirs, without checksums."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    safetensors.numpy.save_file(weights() if tensors is None else tensors, folder / "model.safetensors")
    return folder


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    return text


def values(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.dequantize() if isinstance(tensor, QTensor) else tensor, np.float32)


# Layouts


def test_every_tensor_of_every_layout_is_sound_and_read_only(layout: Path) -> None:
    checkpoint = open_checkpoint(layout)
    files = sum(file.stat().st_size for file in layout.glob("*.safetensors"))
    assert files - 64 * 1024 < checkpoint.nbytes < files
    assert (
        len(set(checkpoint.names()))
        == len(checkpoint.names())
        == 3 + 17 * checkpoint.config.num_hidden_layers
    )
    for name in checkpoint.names():
        assert name in checkpoint
        told: list[int] = []
        checkpoint.verify(name, 2, told.append)
        assert sum(told) == checkpoint.weights[name].nbytes  # also of rows of a tensor that others share
        tensor: Any = checkpoint.tensor(name)
        for array in (tensor.blocks, tensor.scales) if isinstance(tensor, MXFP4Tensor) else (tensor,):
            assert not array.flags.writeable
            assert not array.flags.owndata


def test_the_layouts_hold_the_same_weights_under_the_same_names(network: list[Path]) -> None:
    first, *others = map(open_checkpoint, network)
    for other in others:
        assert set(other.names()) == set(first.names())
        for name in first.names():
            a, b = first.tensor(name), other.tensor(name)
            assert a.shape == b.shape, name
            np.testing.assert_array_equal(values(a), values(b), err_msg=name)


def test_the_layout_is_recognised(layout: Path) -> None:
    assert open_checkpoint(layout).layout == layout.name


def test_an_original_folder_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "model.safetensors").write_bytes(b"junk")
    assert open_checkpoint(tmp_path).layout == "mxfp4"


@pytest.mark.parametrize("indexed", [True, False])
def test_files_in_several_pieces_are_read_with_or_without_an_index(tmp_path: Path, indexed: bool) -> None:
    tensors = weights()
    whole = open_checkpoint(write(tmp_path / "whole"))
    write(tmp_path / "parts", {})
    (tmp_path / "parts" / "model.safetensors").unlink()
    names = [f"model--0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    weight_map: dict[str, str] = {}
    for n, file in enumerate(names):
        part = dict(list(tensors.items())[n::3])
        safetensors.numpy.save_file(part, tmp_path / "parts" / file)
        weight_map |= dict.fromkeys(part, file)
    if indexed:
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps(index))
    parts = open_checkpoint(tmp_path / "parts")
    for name in whole.names():
        np.testing.assert_array_equal(values(parts.tensor(name)), values(whole.tensor(name)))


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").rename(tmp_path / "blobs" / "0a1b")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(Path("..", "blobs", "0a1b"))
    assert "lm_head.weight" in open_checkpoint(tmp_path / "snapshot")


def test_tied_embeddings_serve_as_the_head(tmp_path: Path) -> None:
    tensors = weights()
    del tensors["lm_head.weight"]
    assert "lm_head.weight is missing" in refusal(lambda: open_checkpoint(write(tmp_path, tensors)))
    checkpoint = open_checkpoint(write(tmp_path, tensors, {"tie_word_embeddings": True}))
    checkpoint.verify("lm_head.weight")
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), tensors["model.embed_tokens.weight"])
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())


def test_dense_tensors_may_be_of_any_float(tmp_path: Path) -> None:
    for dtype in (np.float32, np.float16, bfloat16):
        tensors = {n: t.astype(dtype) if t.dtype != np.uint8 else t for n, t in weights().items()}
        checkpoint = open_checkpoint(write(tmp_path, tensors))
        checkpoint.verify("model.layers.0.self_attn.sinks")
        sinks = checkpoint.tensor("model.layers.0.self_attn.sinks")
        assert isinstance(sinks, np.ndarray)
        assert sinks.dtype == dtype


def test_what_nothing_asks_for_is_ignored_but_not_a_further_layer(tmp_path: Path) -> None:
    more: dict[str, np.ndarray] = {"value_head.weight": np.zeros((1, 32), np.int64)}
    checkpoint = open_checkpoint(write(tmp_path, weights() | more))
    assert "value_head.weight" not in checkpoint
    more = {"model.layers.1.input_layernorm.weight": np.zeros(32, np.float32)}
    text = refusal(lambda: open_checkpoint(write(tmp_path, weights() | more)))
    assert "model.layers.1.input_layernorm.weight is of a layer past num_hidden_layers, 1" in text


def test_misaligned_tensors_are_read_whole(tmp_path: Path) -> None:
    write(tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", size + 1) + raw[8 : 8 + size] + b" " + raw[8 + size :]
    )
    checkpoint = open_checkpoint(tmp_path)
    for name, want in weights().items():
        if not name.endswith(("_blocks", "_scales")):
            checkpoint.verify(name)
            array = checkpoint.tensor(name)
            assert isinstance(array, np.ndarray)
            assert array.flags.aligned
            assert not array.flags.writeable
            np.testing.assert_array_equal(array, want)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path))
    assert "no tensor 'model.layers.9.x'" in refusal(lambda: checkpoint.tensor("model.layers.9.x"))
    assert "no tensor 'model.layers.9.x'" in refusal(lambda: checkpoint.verify("model.layers.9.x"))


# What the headers say against what the configuration says


@pytest.mark.parametrize("name", sorted(weights()))
def test_a_tensor_missing_or_of_another_form_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors = weights()
    want = tensors.pop(name)
    text = refusal(lambda: open_checkpoint(write(tmp_path, tensors)))
    assert f"tensor {name} is missing" in text
    assert str(want.shape) in text
    tensors[name] = np.concatenate([want, want])
    text = refusal(lambda: open_checkpoint(write(tmp_path, tensors)))
    assert (
        f"model.safetensors: tensor {name} has shape {tensors[name].shape}: by config.json it is {want.shape}"
        in text
    )
    tensors[name] = want.astype(np.int8 if want.dtype == np.uint8 else np.float64)
    text = refusal(lambda: open_checkpoint(write(tmp_path, tensors)))
    found, wanted = ("I8", "U8") if want.dtype == np.uint8 else ("F64", "F32 or F16 or BF16")
    assert f"tensor {name} is {found}: must be {wanted}" in text


def test_a_bf16_checkpoint_called_mxfp4_names_what_it_lacks(tmp_path: Path) -> None:
    tensors = {name: t for name, t in weights().items() if t.dtype != np.uint8}
    tensors |= {f"{EXPERTS}.gate_up_proj": np.zeros((2, 32, 128), np.float32)}
    assert "gate_up_proj_blocks is missing" in refusal(lambda: open_checkpoint(write(tmp_path, tensors)))


# Hostile files


def entry(start: int, stop: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": [(stop - start) // 4] if shape is None else shape,
        "data_offsets": [start, stop],
    }


def raw_file(header: dict[str, Any] | bytes, data: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


TWICE = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}'
)
HOSTILE = {
    "overlapping": raw_file({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "the same bytes twice": raw_file({"a": entry(0, 8), "b": entry(0, 8)}, 8),
    "backwards": raw_file({"a": entry(8, 0, [2])}, 8),
    "past the end": raw_file({"a": entry(0, 800)}, 8),
    "far past the end": raw_file({"a": entry(0, 2**62)}, 8),
    "a gap": raw_file({"a": entry(0, 8), "b": entry(12, 20)}, 20),
    "a gap at the start": raw_file({"a": entry(4, 12)}, 12),
    "bytes left over": raw_file({"a": entry(0, 8)}, 16),
    "truncated data": raw_file({"a": entry(0, 8)}, 7),
    "truncated header": raw_file({"a": entry(0, 8)}, 8)[:30],
    "header longer than the file": raw_file({"a": entry(0, 8)}, 8, 10**7),
    "header length 2^63": raw_file({"a": entry(0, 8)}, 8, 2**63),
    "header length 2^64 - 1": raw_file({"a": entry(0, 8)}, 8, 2**64 - 1),
    "negative shape": raw_file({"a": entry(0, 8, [-2])}, 8),
    "negative offset": raw_file({"a": entry(-8, 0, [2])}, 8),
    "overflowing shape": raw_file({"a": entry(0, 8, [2**32, 2**32])}, 8),
    "overflow to zero": raw_file({"a": entry(0, 0, [2**62, 4])}),
    "enormous shape": raw_file({"a": entry(0, 8, [10**30])}, 8),
    "shape of another size": raw_file({"a": entry(0, 8, [3])}, 8),
    "unknown dtype": raw_file({"a": entry(0, 8, dtype="Q4")}, 8),
    "metadata that is not text": raw_file({"__metadata__": {"format": 1}, "a": entry(0, 8)}, 8),
    "duplicate names": raw_file(TWICE, 8),
    "not UTF-8": raw_file(b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8),
    "not JSON": raw_file(b"{]"),
    "not an object": raw_file(b"[]"),
    "deeply nested": raw_file(b'{"a":' * 100_000),
    "deeply nested lists": raw_file(b"[" * 100_000),
    "empty": b"",
    "seven bytes": b"1234567",
    "eight zeros": bytes(8),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model.safetensors").write_bytes(data)
    assert str(tmp_path / "model.safetensors") in refusal(lambda: open_checkpoint(tmp_path))


def test_offsets_decide_not_the_order_of_the_header(tmp_path: Path) -> None:
    header = {"late": entry(8, 16), "early": entry(0, 8), "empty": entry(16, 16)}
    data = np.arange(4, dtype=np.float32)
    (tmp_path / "x.safetensors").write_bytes(raw_file(header) + data.tobytes())
    tensors = read_file(tmp_path / "x.safetensors")
    assert tensors["early"].array().tolist() == [0, 1]
    assert tensors["late"].array().tolist() == [2, 3]
    assert tensors["empty"].array().size == 0


def test_what_is_not_a_directory_or_a_file_is_refused(tmp_path: Path) -> None:
    assert "absent does not exist: give a directory" in refusal(lambda: open_checkpoint(tmp_path / "absent"))
    assert "config.json is missing" in refusal(lambda: open_checkpoint(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "no *.safetensors" in refusal(lambda: open_checkpoint(tmp_path))
    assert "config.json is not a directory" in refusal(lambda: open_checkpoint(tmp_path / "config.json"))
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors is missing, or not a file" in refusal(lambda: open_checkpoint(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a file" in refusal(lambda: open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b'"text"', b"\xff\xfe{}", b'{"a": 1, "a": 2}', b"[" * 100_000, b"1" * 5000],
    ids=["empty", "broken", "a list", "a string", "not UTF-8", "duplicate keys", "nested", "a long number"],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_broken_json_is_refused_by_file(tmp_path: Path, name: str, text: bytes) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes(text)
    assert refusal(lambda: open_checkpoint(tmp_path)).startswith(str(tmp_path / name))


def test_an_error_of_the_configuration_names_its_file(tmp_path: Path) -> None:
    write(tmp_path, config={"hidden_size": 0})
    assert refusal(lambda: open_checkpoint(tmp_path)).startswith(
        f"{tmp_path / 'config.json'}: hidden_size is 0"
    )


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors", "/model.safetensors", "sub/model.safetensors", "link/../model.safetensors",
        "..\\model.safetensors", "C:model.safetensors", "model.safetensors\0", "model.safetensors\n",
        "config.json", "..", ".", "", 7, None, ["model.safetensors"],
    ],
)  # fmt: skip
def test_an_index_never_leads_out_of_its_directory(tmp_path: Path, file: Any) -> None:
    write(tmp_path / "inside")
    shutil.copy(tmp_path / "inside" / "model.safetensors", tmp_path)
    (tmp_path / "inside" / "link").symlink_to(tmp_path)
    index = {"weight_map": dict.fromkeys(weights(), file)}
    (tmp_path / "inside" / "model.safetensors.index.json").write_text(json.dumps(index))
    text = refusal(lambda: open_checkpoint(tmp_path / "inside"))
    assert "index.json: 'model.embed_tokens.weight' is in " in text
    assert "must be *.safetensors beside it" in text


@pytest.mark.parametrize("weight_map", [None, [], "model.safetensors", 3])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "index.json: weight_map is " in refusal(lambda: open_checkpoint(tmp_path))


def test_an_index_that_names_what_is_not_there_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    full = dict.fromkeys(weights(), "model.safetensors")
    index.write_text(json.dumps({"weight_map": full | {"model.norm.weight": "other.safetensors"}}))
    assert "other.safetensors is missing" in refusal(lambda: open_checkpoint(tmp_path))
    index.write_text(json.dumps({"weight_map": full | {"extra": "model.safetensors"}}))
    assert "tensor 'extra' is missing, but indexed here" in refusal(lambda: open_checkpoint(tmp_path))
    full.pop("model.norm.weight")
    index.write_text(json.dumps({"weight_map": full}))
    assert "tensor model.norm.weight is missing" in refusal(lambda: open_checkpoint(tmp_path))


def test_a_tensor_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    safetensors.numpy.save_file({"model.norm.weight": np.ones(32, bfloat16)}, tmp_path / "b.safetensors")
    text = refusal(lambda: open_checkpoint(tmp_path))
    assert "b.safetensors: tensor model.norm.weight is also in a.safetensors" in text


# Values


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (5, 31), (2, 7)])
def test_verify_finds_what_is_not_finite(
    tmp_path: Path, dtype: Any, value: float, place: tuple[int, int]
) -> None:
    tensors = weights()
    head = np.full((6, 32), np.finfo(np.float16).max if dtype == np.float16 else 3e38, np.float32).astype(
        dtype
    )
    head[::2] *= -1
    tensors["lm_head.weight"] = head
    open_checkpoint(write(tmp_path, tensors)).verify(
        "lm_head.weight"
    )  # the largest numbers there are will do
    head[place] = value
    text = refusal(lambda: open_checkpoint(write(tmp_path, tensors)).verify("lm_head.weight"))
    assert f"model.safetensors: tensor lm_head.weight holds {value} at {place}: must be finite" in text


def test_verify_counts_positions_over_all_chunks(tmp_path: Path) -> None:
    array = np.zeros((1000, 1001), np.float32)
    array[899, 5] = np.inf
    safetensors.numpy.save_file({"x": array}, tmp_path / "x.safetensors")
    assert "holds inf at (899, 5)" in refusal(lambda: read_file(tmp_path / "x.safetensors")["x"].verify())


def test_verify_refuses_scales_that_are_nan_or_overflow(tmp_path: Path) -> None:
    tensors = weights()
    scales, blocks = tensors[f"{EXPERTS}.down_proj_scales"], tensors[f"{EXPERTS}.down_proj_blocks"]
    blocks[1, 30, 1] = 0x33
    scales[1, 30, 1] = 254
    open_checkpoint(write(tmp_path, tensors)).verify(f"{EXPERTS}.down_proj")
    for scale, code in ((255, 0x33), (254, 0x34)):
        scales[1, 30, 1], blocks[1, 30, 1] = scale, code
        write(tmp_path, tensors)
        open_checkpoint(tmp_path).verify(f"{EXPERTS}.gate_up_proj")
        text = refusal(lambda: open_checkpoint(tmp_path).verify(f"{EXPERTS}.down_proj"))
        assert f"tensor {EXPERTS}.down_proj_scales holds {scale} at (1, 30, 1)" in text


# Files of ours


def ours(path: Path) -> dict[str, np.ndarray]:
    """Write the smallest file that has every kind of tensor."""
    tensors: dict[str, np.ndarray] = {
        "codes": np.arange(5, dtype=np.uint8),  # of odd length, and first, so that the writer has to sort
        "w": np.array([[1.5, -2.0, 0.0]], bfloat16),
        "norm": np.array([1.0, 3.0], np.float32),
        "half": np.array([[0.5], [0.25]], np.float16),
    }
    save_file(path, tensors, {"note": "kept"})
    return tensors


def load(path: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for name, stored in read_file(path).items():
        stored.verify()
        tensors[name] = stored.array()
    return tensors


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for n in a
    )


def test_what_is_saved_is_read_back_by_us_and_by_the_safetensors_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = ours(path)
    assert same(load(path), tensors)
    assert not any(
        array.flags.owndata for array in load(path).values()
    )  # all aligned, so that none is copied
    assert same(safetensors.numpy.load_file(path), tensors)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"], metadata["note"]) == ("gptoss-lite", "1", "kept")
    assert json.loads(metadata["checksums"]).keys() == tensors.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_saved_checkpoint_opens_and_verifies(tmp_path: Path) -> None:
    write(tmp_path)
    before = open_checkpoint(tmp_path)
    save_file(tmp_path / "model.safetensors", {name: before.tensor(name) for name in before.names()})
    after = open_checkpoint(tmp_path)
    for name in before.names():
        after.verify(name)
        np.testing.assert_array_equal(values(after.tensor(name)), values(before.tensor(name)))


def test_every_flipped_bit_is_found_or_changes_no_tensor(tmp_path: Path) -> None:
    path, damaged = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    tensors = ours(path)
    raw = path.read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    unseen = []
    for bit in range(8 * len(raw)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.unlink(missing_ok=True)  # a mapping of the last file may live on
        damaged.write_bytes(flipped)
        try:
            read = load(damaged)
        except CheckpointError:
            continue
        assert bit < 8 * header, "a flip in the data passed"
        assert same(read, tensors), f"bit {bit} changed a tensor"
        unseen.append(bit)
    # What may pass is metadata not about tensors: the caller's own, and "format".
    assert len(unseen) < 8 * 60


def test_random_flips_in_a_checkpoint_are_found(tmp_path: Path) -> None:
    write(tmp_path)
    before = open_checkpoint(tmp_path)
    save_file(tmp_path / "model.safetensors", {name: before.tensor(name) for name in before.names()})
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    rng = np.random.default_rng(6)

    def verify_all(checkpoint: Checkpoint) -> None:
        for name in checkpoint.names():
            checkpoint.verify(name)

    for position in rng.integers(header, len(raw), 200):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << int(rng.integers(8))
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors").write_bytes(flipped)
        text = refusal(lambda: verify_all(open_checkpoint(tmp_path)))
        assert "is damaged" in text or "must be finite" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format_version": "1"', b'"format_version": "2"', "format_version is '2': this release reads '1'"),
        (b'"format_version": "1"', b'"format_versiom": "1"', "format_version is None"),
        (b'"checksums"', b'"checksumz"', "checksums is not sound JSON"),
        (b'\\"norm\\"', b'\\"nora\\"', "'nora' is only one of tensor and checksum"),
    ],
)
def test_metadata_of_ours_must_be_whole(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    ours(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert old in raw
    (tmp_path / "y.safetensors").write_bytes(raw.replace(old, new))
    assert message in refusal(lambda: read_file(tmp_path / "y.safetensors"))


def test_saving_fails_cleanly(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="'x', int64"):
        save_file(tmp_path / "x.safetensors", {"x": np.zeros(3, np.int64)})
    assert "cannot be written" in refusal(lambda: save_file(tmp_path / "no" / "x.safetensors", {}))
    (tmp_path / "d.safetensors").mkdir()
    assert "cannot be written" in refusal(lambda: save_file(tmp_path / "d.safetensors", {}))
    assert [file.name for file in tmp_path.iterdir()] == ["d.safetensors"]
