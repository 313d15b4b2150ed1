"""GGUF: the container against the gguf package, blocks against theirs, foreign and damaged files refused."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gptoss_lite.checkpoint import gguf_vocabulary, open_checkpoint
from gptoss_lite.conversion import execute, plan_conversion
from gptoss_lite.errors import CheckpointError, FormatError
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor, ggufblocks, gguffile, quantize
from gptoss_lite.quant.gguffile import StringArray
from gptoss_lite.tokenizer import load_tokenizer
from tests.conftest import DATA

DEMO = Path(__file__).parents[1] / "gptoss_lite" / "demo"
BF16 = DATA / "demo" / "bf16"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as a GGUF file of ours."""
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    execute(plan_conversion(open_checkpoint(DEMO), path, "gguf"), workers=2)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


# Container


def test_the_gguf_package_reads_what_we_write(demo: Path) -> None:
    theirs, ours = gguf.GGUFReader(demo), gguffile.read_file(demo)
    assert {tensor.name for tensor in theirs.tensors} == set(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.dtype == tensor.tensor_type.name
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.data.tobytes() == tensor.data.tobytes()
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        value = ours.metadata[key]
        shown = value.decode() if isinstance(value, StringArray) else value
        want = field.contents()
        assert (shown.tolist() if isinstance(shown, np.ndarray) else shown) == want, key


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt-oss")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.rate", 0.1)
    writer.add_bool("a.flag", True)
    writer.add_int64("a.long", -(2**40))
    writer.add_array("a.words", ["one", "zwei", "\u4e09"])
    writer.add_array("a.numbers", [1, -2, 3])
    matrix = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("m", matrix)
    writer.add_tensor("q", gguf.quantize(matrix, Kind.Q8_0), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = gguffile.read_file(tmp_path / "x.gguf")
    assert file.metadata["a.count"] == 7
    assert file.metadata["a.rate"] == np.float32(0.1)
    assert file.metadata["a.flag"] is True
    assert file.metadata["a.long"] == -(2**40)
    assert file.metadata["a.words"].decode() == ["one", "zwei", "\u4e09"]
    assert file.metadata["a.numbers"].tolist() == [1, -2, 3]
    np.testing.assert_array_equal(file.tensors["m"].array(), matrix)
    assert (file.tensors["q"].dtype, file.tensors["q"].shape) == ("Q8_0", (2, 32))


def test_a_header_has_the_same_length_whatever_the_checksums() -> None:
    entries = [("w", "MXFP4", (3, 64)), ("b", "F32", (5,))]
    headers = [
        gguffile.header({"k": "v", gguffile.CHECKSUMS: checksum}, entries) for checksum in ("0" * 8, "f" * 8)
    ]
    assert len(headers[0]) == len(headers[1])
    assert len(headers[0]) % gguffile.ALIGNMENT == 0
    assert gguffile.offsets(entries) == [0, 128]  # six blocks of 17 bytes, rounded up to 32


# Blocks


def test_mxfp4_blocks_are_ggml_s(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensor = MXFP4Tensor(rng.integers(0, 256, (4, 3, 16), np.uint8), rng.integers(100, 150, (4, 3), np.uint8))
    raw = ggufblocks.to_blocks(tensor)
    theirs = gguf.dequantize(raw.reshape(4, -1), Kind.MXFP4)
    ours = tensor.dequantize()
    # ggml has no zero below zero.
    np.testing.assert_array_equal(theirs, ours)
    back = ggufblocks.from_blocks(raw, "MXFP4")
    assert isinstance(back, MXFP4Tensor)
    np.testing.assert_array_equal(back.blocks, tensor.blocks)
    np.testing.assert_array_equal(back.scales, tensor.scales)


@given(st.binary(min_size=17 * 6, max_size=17 * 6))
def test_compiled_blocks_equal_their_definition(data: bytes) -> None:
    raw = np.frombuffer(data, np.uint8).reshape(2, 3, 17)
    tensor = ggufblocks.from_blocks(raw, "MXFP4")
    assert isinstance(tensor, MXFP4Tensor)
    blocks, scales = np.empty((6, 16), np.uint8), np.empty(6, np.uint8)
    ggufblocks.take_apart(raw.reshape(6, 17), blocks, scales)
    np.testing.assert_array_equal(tensor.blocks.reshape(6, 16), blocks)
    np.testing.assert_array_equal(tensor.scales.reshape(6), scales)
    again = np.empty((6, 17), np.uint8)
    ggufblocks.put_together(blocks, scales, again)
    assert again.tobytes() == ggufblocks.to_blocks(tensor).tobytes() == data


def test_q8_0_blocks_are_int8_by_32_with_float16_scales() -> None:
    x = np.random.default_rng(1).standard_normal((5, 96)).astype(np.float32)
    raw = gguf.quantize(x, Kind.Q8_0).reshape(5, 3, 34)
    tensor = ggufblocks.from_blocks(raw, "Q8_0")
    np.testing.assert_array_equal(tensor.dequantize(), gguf.dequantize(raw.reshape(5, -1), Kind.Q8_0))
    assert ggufblocks.to_blocks(tensor).tobytes() == raw.tobytes()
    ours = quantize(x, "int8", group=32, scales="float16")
    assert isinstance(ours, Int8Tensor)
    np.testing.assert_array_equal(
        gguf.dequantize(ggufblocks.to_blocks(ours).reshape(5, -1), Kind.Q8_0), ours.dequantize()
    )


# Checkpoints


def rewrite(
    source: Path, target: Path, change: dict[str, Any], tensors: dict[str, Any] | None = None
) -> Path:
    """Copy a file by the gguf package, with some keys and tensors changed; None leaves one out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "gpt-oss")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in change:
            continue
        writer.add_key_value(
            key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
        )
    kinds = {
        int: gguf.GGUFValueType.UINT32,
        str: gguf.GGUFValueType.STRING,
        float: gguf.GGUFValueType.FLOAT32,
    }
    for key, value in change.items():
        if value is not None:
            writer.add_key_value(key, value, kinds[type(value)])
    for tensor in reader.tensors:
        data = (tensors or {}).get(tensor.name, tensor.data)
        if data is not None:
            plain = data.dtype in (np.float32, np.float16)
            writer.add_tensor(tensor.name, data, raw_dtype=None if plain else tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_file_without_our_keys_means_the_same_network(demo: Path, tmp_path: Path) -> None:
    foreign = rewrite(demo, tmp_path / "f.gguf", {"gptoss-lite.config": None, gguffile.CHECKSUMS: None})
    ours, theirs = open_checkpoint(demo), open_checkpoint(foreign)
    for key in (
        "hidden_size",
        "layer_types",
        "rope",
        "rms_norm_eps",
        "vocab_size",
        "max_position_embeddings",
    ):
        assert getattr(ours.config, key) == getattr(theirs.config, key)
    assert theirs.config.rope.truncate is False
    for name in ours.names():
        theirs.verify(name)
        a, b = ours.tensor(name), theirs.tensor(name)
        a, b = (t.dequantize() if isinstance(t, QTensor) else t for t in (a, b))
        np.testing.assert_array_equal(a, b)
    assert load_tokenizer(foreign, 4096).encode("the sea") == load_tokenizer(DEMO, 4096).encode("the sea")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "llama"}, "general.architecture is 'llama': must be 'gpt-oss'"),
        ({"gptoss-lite.config": None, "gpt-oss.expert_count": None}, "num_local_experts is missing"),
        ({"gptoss-lite.config": None, "gpt-oss.block_count": 3}, "is of a layer past num_hidden_layers, 3"),
        ({"gptoss-lite.config": "{"}, "gptoss-lite.config is not sound JSON"),
        ({"split.count": "two"}, "is one of 'two' parts"),
        ({"split.count": 2}, "is one of 2 parts: join them by gguf-split"),
        ({"gptoss-lite.config": None, "gpt-oss.embedding_length": "wide"}, "hidden_size is 'wide'"),
        ({gguffile.CHECKSUMS: '{"w": "00000000"}'}, "is only one of tensor and checksum"),
    ],
)
def test_foreign_and_contradictory_metadata_is_refused(
    demo: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    changed = {gguffile.CHECKSUMS: None} | change
    assert message in refusal(rewrite(demo, tmp_path / "f.gguf", changed))


def test_yarn_s_range_is_read_where_a_file_has_it(demo: Path, tmp_path: Path) -> None:
    keys = {f"gpt-oss.rope.scaling.yarn_beta_{end}": value for end, value in (("fast", 16.0), ("slow", 2.0))}
    foreign = rewrite(
        demo, tmp_path / "f.gguf", {"gptoss-lite.config": None, gguffile.CHECKSUMS: None, **keys}
    )
    rope = open_checkpoint(foreign).config.rope
    assert (rope.beta_fast, rope.beta_slow) == (16.0, 2.0)
    without = dict.fromkeys(keys)
    foreign = rewrite(
        demo, tmp_path / "g.gguf", {"gptoss-lite.config": None, gguffile.CHECKSUMS: None, **without}
    )
    rope = open_checkpoint(foreign).config.rope
    assert (rope.beta_fast, rope.beta_slow) == (32.0, 1.0)


def test_tokens_of_the_user_s_are_special_or_refused(demo: Path) -> None:
    metadata = dict(gguffile.read_file(demo).metadata)
    types = metadata["tokenizer.ggml.token_type"].copy()
    start = load_tokenizer(demo, 4096).special["<|start|>"]
    types[start] = 4
    document = gguf_vocabulary.to_document(metadata | {"tokenizer.ggml.token_type": types}, "x")
    assert document is not None
    assert document == gguf_vocabulary.to_document(metadata, "x")
    types[100] = 4
    with pytest.raises(CheckpointError, match="is not special, which is not supported"):
        gguf_vocabulary.to_document(metadata | {"tokenizer.ggml.token_type": types}, "x")
    with pytest.raises(CheckpointError, match="are not lists of one length"):
        gguf_vocabulary.to_document(metadata | {"tokenizer.ggml.token_type": 3}, "x")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("blk.1.attn_sinks.weight", None, "tensor blk.1.attn_sinks.weight is missing: must be (8,)"),
        (
            "blk.1.attn_sinks.weight",
            np.zeros(9, np.float32),
            "has shape (9,): by the file's metadata it is (8,)",
        ),
        (
            "blk.0.ffn_up_exps.weight",
            np.zeros((8, 192, 192), np.float16),
            "is F16, and blk.0.ffn_gate_exps.weight is MXFP4",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    demo: Path, tmp_path: Path, name: str, data: NDArray[Any] | None, message: str
) -> None:
    assert message in refusal(rewrite(demo, tmp_path / "f.gguf", {gguffile.CHECKSUMS: None}, {name: data}))


def test_a_type_we_do_not_read_is_named(demo: Path, tmp_path: Path) -> None:
    raw = bytearray(demo.read_bytes())
    at = raw.rindex(b"blk.0.attn_q.weight")  # behind the one among the checksums
    kind = at + len(b"blk.0.attn_q.weight") + 4 + 16
    assert struct.unpack_from("<I", raw, kind) == (30,)
    struct.pack_into("<I", raw, kind, 2)  # Q4_0
    (tmp_path / "x.gguf").write_bytes(raw)
    text = refusal(tmp_path / "x.gguf")
    assert "blk.0.attn_q.weight is Q4_0: this package reads F32, F16, BF16, MXFP4 and Q8_0" in text
    struct.pack_into("<I", raw, kind, 99)
    (tmp_path / "y.gguf").write_bytes(raw)
    assert "is of ggml type 99" in refusal(tmp_path / "y.gguf")


def test_every_truncation_is_refused_in_a_line(demo: Path, tmp_path: Path) -> None:
    raw = demo.read_bytes()
    start = gguffile.read_file(demo).tensors["token_embd.weight"].data
    header = len(raw) - sum(-(-t.data.size // 32) * 32 for t in gguffile.read_file(demo).tensors.values())
    assert raw[header : header + 64] == start[:64].tobytes()
    rng = np.random.default_rng(2)
    lengths = [0, 3, 4, 8, 23, 24, 30, header - 1, header, len(raw) // 2, len(raw) - 40]
    for number, length in enumerate([*lengths, *rng.integers(24, header, 60).tolist()]):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(raw[:length])
        text = refusal(path)
        assert "truncated" in text or "no GGUF" in text or "cannot be read" in text, (length, text)


def test_random_damage_to_a_header_never_escapes_as_another_error(demo: Path, tmp_path: Path) -> None:
    raw = demo.read_bytes()
    header = 4096 * 24  # the keys, and the beginning of the vocabulary
    rng = np.random.default_rng(3)
    for number in range(150):
        damaged = bytearray(raw)
        for at in rng.integers(4, header, 3):
            damaged[at] = int(rng.integers(256))
        path = tmp_path / f"{number % 2}.gguf"
        path.unlink(missing_ok=True)
        path.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(path)
            load_tokenizer(path, checkpoint.config.vocab_size)
        except (CheckpointError, FormatError) as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("dtype", ["MXFP4", "Q8_0"])
def test_impossible_scales_are_found_in_blocks(dtype: str) -> None:
    raw = np.full((3, 5, 2, 17 if dtype == "MXFP4" else 34), 0x33, np.uint8)
    assert ggufblocks.invalid_scale(raw, dtype) is None
    for place in (0, 0, 0), (1, 4, 1), (2, 4, 1):
        raw[place][:2] = (254, 0x33) if dtype == "MXFP4" else (0xFF, 0xFB)  # the largest there are
        assert ggufblocks.invalid_scale(raw, dtype) is None
        raw[place][:2] = (254, 0x43) if dtype == "MXFP4" else (0x00, 0xFC)
        assert ggufblocks.invalid_scale(raw, dtype) == place
        assert ggufblocks.scales(raw, dtype)[place] == (254 if dtype == "MXFP4" else -np.inf)
        raw[place] = 0x33


def test_a_directory_may_hold_one_gguf_file(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").symlink_to(demo)
    assert open_checkpoint(tmp_path).layout == "gguf"
    (tmp_path / "b.gguf").symlink_to(demo)
    assert "holds several GGUF files: name one of a.gguf, b.gguf" in refusal(tmp_path)


def test_damaged_values_are_found_by_verify(demo: Path, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(demo)
    tensors = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    tensors["blk.2.ffn_up_exps.weight"][5, 17, 34] = 255  # the third block's scale
    tensors["blk.1.attn_q.bias"][3] = np.nan
    path = rewrite(demo, tmp_path / "x.gguf", {gguffile.CHECKSUMS: None}, tensors)
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"blk.2.ffn_up_exps.weight holds 255 at \(5, 17, 2\)"):
        checkpoint.verify("model.layers.2.mlp.experts.gate_up_proj")
    with pytest.raises(CheckpointError, match=r"blk.1.attn_q.bias holds nan at \(3,\)"):
        checkpoint.verify("model.layers.1.self_attn.q_proj.bias")
