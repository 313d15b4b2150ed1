"""Files in the tiles of a backend: where their data begin, how they are verified, and older ones read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss_lite.checkpoint import Checkpoint, open_checkpoint, save_file
from gptoss_lite.checkpoint.quantization import Quantization
from gptoss_lite.conversion import recode
from gptoss_lite.errors import CheckpointError
from gptoss_lite.packing import CPU_ROWS, CPU_TILES, CUDA_TILES, PackedTensor, kind_of, pack
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor, codecs
from gptoss_lite.quant.formats import MXFP4, Format, Int8
from gptoss_lite.quant.tensorfile import StoredTensor, read_file
from tests.test_checkpoint import CONFIG, EXPERTS, weights
from tests.test_conversion import TINY, assert_same, convert

HEAD = "lm_head.weight"
INT8: list[Format] = [Int8(), Int8(32, "float16"), Int8(32, "e8m0")]


def write_packed(folder: Path, tensors: dict[str, Any], settings: dict[str, Any], layout: str) -> Path:
    """Write a checkpoint of which everything that is quantised and has a kind is packed."""
    arrays, formats = {}, {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QTensor):
            formats[name] = tensor.format
            kind = kind_of(name)
            assert kind is not None
            arrays[f"{name}_packed"] = pack(tensor, kind, layout)
        else:
            arrays[name] = tensor
    section = Quantization(formats, layout).to_config()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": section}))
    (folder / "model.safetensors").unlink(missing_ok=True)  # an earlier mapping of it may live on
    save_file(folder / "model.safetensors", arrays)
    return folder


def small(head: Format, vocabulary: int = 6) -> dict[str, Any]:
    """A network of one layer, its head quantised, too; rows that do not fill their last tile."""
    tensors = {name: tensor for name, tensor in weights().items() if "proj_" not in name}
    tensors |= {name: tensor for name, tensor in weights().items() if name.endswith("proj_bias")}
    rng = np.random.default_rng(1)
    matrices = ("gate_up_proj", (2, 128, 32)), ("down_proj", (2, 32, 64))
    values = {f"{EXPERTS}.{name}": rng.standard_normal(shape).astype(np.float32) for name, shape in matrices}
    quantised = {name: codecs.encode(array, MXFP4()) for name, array in values.items()}
    quantised[HEAD] = codecs.encode(rng.standard_normal((vocabulary, 32)).astype(np.float32), head)
    embedding = {"model.embed_tokens.weight": np.ones((vocabulary, 32), np.float32)}
    return tensors | quantised | embedding


def verify(checkpoint: Checkpoint) -> None:
    for name in checkpoint.names():
        told: list[int] = []
        checkpoint.verify(name, 2, told.append)
        assert sum(told) == checkpoint.weights[name].nbytes


@pytest.mark.parametrize("layout", [CPU_TILES, CUDA_TILES, CPU_ROWS])
@pytest.mark.parametrize("head", [MXFP4(), *INT8], ids=str)
def test_impossible_scales_are_refused_by_their_place(tmp_path: Path, head: Format, layout: str) -> None:
    good = small(head)
    verify(open_checkpoint(write_packed(tmp_path, good, CONFIG, layout)))
    down = good[f"{EXPERTS}.down_proj"]
    cases: list[tuple[str, Any, tuple[int, ...], bool]] = []
    for scale, code, is_sound in ((255, 0, False), (254, 0x33, True), (254, 0x40, False), (253, 0x66, False)):
        blocks, scales = down.blocks.copy(), down.scales.copy()
        blocks[1, 30, 1], scales[1, 30, 1] = code, scale
        cases.append((f"{EXPERTS}.down_proj", MXFP4Tensor(blocks, scales), (1, 30, 1), is_sound))
    if isinstance(head, Int8):
        codes, scales = good[HEAD].codes, good[HEAD].scales.copy()
        scales[5, 0] = 255 if head.scales == "e8m0" else -np.inf
        cases.append((HEAD, Int8Tensor(codes, scales), (5, 0), False))
    for name, tensor, place, is_sound in cases:
        checkpoint = open_checkpoint(write_packed(tmp_path, good | {name: tensor}, CONFIG, layout))
        if is_sound:
            verify(checkpoint)
            continue
        with pytest.raises(CheckpointError) as caught:
            verify(checkpoint)
        assert f"tensor {name}_packed holds" in str(caught.value)
        assert f" at {place}" in str(caught.value)


def test_older_files_of_rows_are_read_and_packed_again(tmp_path: Path) -> None:
    source = open_checkpoint(TINY / "mxfp4")
    tensors = {name: source.tensor(name) for name in source.names()}
    settings = json.loads((TINY / "mxfp4" / "config.json").read_text())
    rows = write_packed(tmp_path / "rows", tensors, settings, CPU_ROWS)
    assert open_checkpoint(rows).layout == CPU_ROWS
    assert_same(TINY / "mxfp4", rows)
    packed = convert(rows, tmp_path / "packed", "packed-cpu")
    assert_same(TINY / "mxfp4", packed)
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"]["layout"] == CPU_TILES
    experts = open_checkpoint(packed).tensor("model.layers.0.mlp.experts.down_proj")
    assert isinstance(experts, PackedTensor) and experts.layout == CPU_TILES


def starts(file: Path) -> dict[str, tuple[int, StoredTensor]]:
    """Tell where each tensor's data begin in a file."""
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    stored = read_file(file)
    return {name: (8 + size + header[name]["data_offsets"][0], stored[name]) for name in stored}


def check_alignment(file: Path) -> None:
    found = starts(file)
    ragged = [name for name, (_, stored) in found.items() if stored.data.size % 64]
    assert min(start for start, _ in found.values()) % 64 == 0
    for name, (start, stored) in found.items():
        assert start % (64 if name not in ragged else stored.array().itemsize) == 0, name
    # All but the first of the ragged ones come after those that begin at a cache line.
    assert {name for name, (start, _) in found.items() if start % 64} <= set(ragged)


@pytest.mark.parametrize("target", ["hf", "bf16", "original", "packed-cpu"])
def test_data_of_written_files_begin_at_cache_lines(tmp_path: Path, target: str) -> None:
    head = MXFP4() if target in ("bf16", "original") else Int8()
    tensors = small(head)
    if target == "original":
        tensors[HEAD] = tensors["model.embed_tokens.weight"]
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "truncate": False}
    source = write_packed(tmp_path / "s", tensors, CONFIG | {"rope_scaling": rope}, CPU_TILES)
    there = convert(source, tmp_path / "d", target)
    assert_same(source, there)
    check_alignment(there / "model.safetensors")


def test_records_that_fill_no_cache_line_are_filled_up(tmp_path: Path) -> None:
    source = write_packed(tmp_path / "s", small(Int8()), CONFIG, CUDA_TILES)
    packed = convert(source, tmp_path / "d", "packed-cpu")
    assert_same(source, packed)
    head = read_file(packed / "model.safetensors")[f"{HEAD}_packed"]
    assert head.shape == (576,)  # 16 rows of 32 codes and a scale, 544 bytes
    assert not head.data[544:].any()
    assert head.data[6 * 4 : 16 * 4].tobytes() == bytes(40)  # rows past the sixth


@pytest.mark.parametrize("head", [MXFP4(), *INT8], ids=str)
def test_a_matrix_packed_in_parts_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: Format
) -> None:
    monkeypatch.setattr(recode, "PART_BYTES", 1)  # 64 rows at a time
    tensors = small(head, vocabulary=150)
    source = write_packed(tmp_path / "s", tensors, CONFIG | {"vocab_size": 150}, CPU_ROWS)
    packed = convert(source, tmp_path / "d", "packed-cpu")
    data = read_file(packed / "model.safetensors")[f"{HEAD}_packed"].data
    assert data.tobytes() == pack(tensors[HEAD], "lm_head", CPU_TILES).tobytes()
    assert_same(source, packed)


def test_saved_files_begin_at_cache_lines(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for count in range(1, 30):  # headers of every length
        tensors: dict[str, Any] = {"r" * count: rng.integers(0, 256, count, np.uint8)}
        tensors |= {"w": np.ones((count, 64), np.float16), "norm": np.ones(count, np.float32)}
        path = tmp_path / f"{count}.safetensors"
        save_file(path, tensors)
        check_alignment(path)
