"""Checkpoint directories as named, memory-mapped tensors: three layouts on disk, one naming here."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import CheckpointError
from gptoss_lite.quant import MXFP4Tensor, mxfp4
from gptoss_lite.quant.formats import BLOCK
from gptoss_lite.quant.tensorfile import FLOATS, StoredTensor, abbreviated, read_file, read_json, save_file

__all__ = ["Checkpoint", "open_checkpoint", "save_file"]

INDEX = "model.safetensors.index.json"

# Hugging Face's name, the name in original/ and the axes. In original/, q, k and v are rows of one tensor.
_Table = tuple[tuple[str, str, str], ...]
_MODEL: _Table = (
    ("model.embed_tokens.weight", "embedding.weight", "vocab hidden"),
    ("model.norm.weight", "norm.scale", "hidden"),
    ("lm_head.weight", "unembedding.weight", "vocab hidden"),
)
_LAYER: _Table = (
    ("input_layernorm.weight", "attn.norm.scale", "hidden"),
    ("self_attn.q_proj.weight", "attn.qkv.weight", "queries hidden"),
    ("self_attn.k_proj.weight", "attn.qkv.weight", "keys hidden"),
    ("self_attn.v_proj.weight", "attn.qkv.weight", "keys hidden"),
    ("self_attn.q_proj.bias", "attn.qkv.bias", "queries"),
    ("self_attn.k_proj.bias", "attn.qkv.bias", "keys"),
    ("self_attn.v_proj.bias", "attn.qkv.bias", "keys"),
    ("self_attn.sinks", "attn.sinks", "heads"),
    ("self_attn.o_proj.weight", "attn.out.weight", "hidden queries"),
    ("self_attn.o_proj.bias", "attn.out.bias", "hidden"),
    ("post_attention_layernorm.weight", "mlp.norm.scale", "hidden"),
    ("mlp.router.weight", "mlp.gate.weight", "experts hidden"),
    ("mlp.router.bias", "mlp.gate.bias", "experts"),
    ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias", "experts gate_up"),
    ("mlp.experts.down_proj_bias", "mlp.mlp2_bias", "experts hidden"),
)
_PACKED_EXPERTS: _Table = (
    ("mlp.experts.gate_up_proj_blocks", "mlp.mlp1_weight.blocks", "experts gate_up hidden/32 16"),
    ("mlp.experts.gate_up_proj_scales", "mlp.mlp1_weight.scales", "experts gate_up hidden/32"),
    ("mlp.experts.down_proj_blocks", "mlp.mlp2_weight.blocks", "experts hidden intermediate/32 16"),
    ("mlp.experts.down_proj_scales", "mlp.mlp2_weight.scales", "experts hidden intermediate/32"),
)
_DENSE_EXPERTS: _Table = (  # stored input-major, unlike every other weight
    ("mlp.experts.gate_up_proj", "", "experts hidden gate_up"),
    ("mlp.experts.down_proj", "", "experts intermediate hidden"),
)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a stored tensor: what one canonical name stands for."""

    stored: StoredTensor
    rows: slice

    def array(self) -> NDArray[Any]:
        return self.stored.array()[self.rows]


@dataclass(frozen=True, slots=True)
class StoredForm:
    """How a checkpoint holds one tensor.

    dtype: "BF16", "F16", "F32", or of a packed one, scales included, "MXFP4" or "INT8". group: columns
    that share a scale, for INT8.
    """

    dtype: str
    nbytes: int
    group: int = 32


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: every tensor of the model under Hugging Face's names, still on disk.

    layout: "mxfp4" (Hugging Face's, packed), "bf16" (Hugging Face's, dense) or "original" (OpenAI's).
    """

    path: Path
    config: ModelConfig
    layout: str
    _pieces: dict[str, _Piece]

    def names(self) -> tuple[str, ...]:
        """List the canonical names; an expert weight is one name, packed or not."""
        return tuple(name.removesuffix("_blocks") for name in self._pieces if not name.endswith("_scales"))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    @property
    def nbytes(self) -> int:
        """Bytes of all these tensors on disk; tied ones count once."""
        sizes = {piece.stored.name: piece.stored.data.size for piece in self._pieces.values()}
        return sum(sizes.values())

    def forms(self) -> dict[str, StoredForm]:
        """Tell how each tensor is held, from the headers alone; of tied tensors the first has the bytes."""
        forms: dict[str, StoredForm] = {}
        seen: set[tuple[str, str]] = set()
        for name, piece in self._pieces.items():
            stored, rows = piece.stored, piece.rows.stop - piece.rows.start
            tied = (stored.name, str(piece.rows)) in seen
            seen.add((stored.name, str(piece.rows)))
            nbytes = 0 if tied else stored.data.size // stored.shape[0] * rows
            base = re.sub("_(blocks|scales)$", "", name)
            dtype = stored.dtype if base == name else "MXFP4"
            forms[base] = StoredForm(dtype, nbytes + (forms[base].nbytes if base in forms else 0))
        return forms

    def tensor(self, name: str) -> NDArray[Any] | MXFP4Tensor:
        """Return one tensor, mapped and read-only: disk is read where it is first touched.

        Dense tensors keep the dtype of the file: float32, float16 or ml_dtypes.bfloat16. Expert weights are
        (experts, 2*intermediate_size, hidden_size) and (experts, hidden_size, intermediate_size) whatever the
        layout: MXFP4Tensor, or in bf16 a transposed view. Raises CheckpointError on an unknown name.
        """
        if name in self._pieces:
            array = self._pieces[name].array()
            return array.swapaxes(1, 2) if array.ndim == 3 else array
        blocks, scales = self._packed(name)
        return MXFP4Tensor(blocks.array(), scales.array())

    def verify(self, name: str) -> None:
        """Read one tensor through and refuse what no model may hold; call it once, before first use.

        Raises CheckpointError naming file, tensor and position on NaN, infinity, and a scale that is NaN or
        takes a value of its block beyond float32; and on a wrong checksum in a file that this package wrote.
        """
        if name in self._pieces:
            self._pieces[name].stored.verify()
            return
        blocks, scales = self._packed(name)
        blocks.verify()
        scales.verify()
        if (position := mxfp4.invalid_scale(blocks.array(), scales.array())) is not None:
            byte = scales.array()[position]
            raise scales.error(f"holds {byte} at {position}: with its block, that is NaN or beyond float32")

    def _packed(self, name: str) -> tuple[StoredTensor, StoredTensor]:
        try:
            return self._pieces[f"{name}_blocks"].stored, self._pieces[f"{name}_scales"].stored
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name!r}: names() lists those there are") from None


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a directory with config.json and safetensors files, and check the headers against the config.

    Reads one file or several, with or without an index, in any of the three layouts; loads no weights.
    Raises CheckpointError, naming file, tensor or key, where what the model needs is missing or malformed.
    """
    directory = Path(path)
    if not os.fspath(path) or not os.path.isdir(directory):  # unlike Path's, it takes any string
        raise CheckpointError(f"{directory} is not a directory: give the one that holds config.json")
    config = ModelConfig.from_dict(read_json(directory / "config.json"), str(directory / "config.json"))
    stored = _read_directory(directory)
    layout = "original" if "embedding.weight" in stored else config.quant_method or "bf16"
    _refuse_further_layers(config, stored)
    pieces = _pieces(directory, config, layout, stored)
    return Checkpoint(directory, config, layout, pieces)


def _read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Read the headers of the files that hold the weights: those of the index, or else all there are."""
    index = directory / INDEX
    if index.exists():
        return _read_indexed(index)
    single = directory / "model.safetensors"
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{directory} holds no *.safetensors file")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_file(file).items():
            if name in stored:
                raise tensor.error(f"is also in {stored[name].file.name}, and there is no {INDEX} to decide")
            stored[name] = tensor
    return stored


def _read_indexed(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map is {abbreviated(weight_map)}: must be an object")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for name, file in weight_map.items():
        # A bare name, never a path. The file may itself be a link elsewhere: the hub's cache is made of them.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            shown = abbreviated(file)
            raise CheckpointError(f"{index}: {name!r} is in {shown}: must be *.safetensors beside it")
        if file not in shards:
            shards[file] = read_file(index.parent / file)
        if name not in shards[file]:
            raise CheckpointError(f"{index.parent / file}: tensor {name!r} is missing, but indexed here")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _refuse_further_layers(config: ModelConfig, stored: dict[str, StoredTensor]) -> None:
    # Other tensors that nothing asks for are ignored: fine-tunes leave buffers and extra heads behind. But a
    # layer past the last one means that config.json is of another model, and the answers would be nonsense.
    for name, tensor in stored.items():
        layer = re.match(r"(?:model\.layers|block)\.(\d{1,9})\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            raise tensor.error(f"is of a layer past num_hidden_layers, {config.num_hidden_layers}")


def _pieces(
    directory: Path, config: ModelConfig, layout: str, stored: dict[str, StoredTensor]
) -> dict[str, _Piece]:
    """Find every tensor of the model, and check that its file has it in the right dtype and shape."""
    shapes: dict[str, tuple[int, ...]] = {}  # of stored tensors, by their own names
    places: dict[str, tuple[str, slice]] = {}
    for name, source, shape in _expected(config, layout):
        start = shapes[source][0] if source in shapes else 0
        shapes[source] = (start + shape[0], *shape[1:])
        places[name] = source, slice(start, start + shape[0])
    for source, shape in shapes.items():
        dtypes = ("U8",) if source.endswith(("blocks", "scales")) else FLOATS
        wanted = " or ".join(dtypes)
        if source not in stored:
            raise CheckpointError(f"{directory}: tensor {source} is missing: must be {wanted} {shape}")
        if stored[source].dtype not in dtypes:
            raise stored[source].error(f"is {stored[source].dtype}: must be {wanted}")
        if stored[source].shape != shape:
            raise stored[source].error(f"has shape {stored[source].shape}: by config.json it is {shape}")
    pieces = {name: _Piece(stored[source], rows) for name, (source, rows) in places.items()}
    if config.tie_word_embeddings:
        pieces["lm_head.weight"] = pieces["model.embed_tokens.weight"]
    return pieces


def _expected(config: ModelConfig, layout: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield canonical name, stored name and shape of everything that the files must hold."""
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "hidden/32": config.hidden_size // BLOCK,
        "intermediate": config.intermediate_size,
        "intermediate/32": config.intermediate_size // BLOCK,
        "gate_up": 2 * config.intermediate_size,
        "heads": config.num_attention_heads,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "experts": config.num_local_experts,
        "16": mxfp4.BLOCK_BYTES,
    }
    experts = _DENSE_EXPERTS if layout == "bf16" else _PACKED_EXPERTS
    layer = _LAYER + experts
    tables = [("", "", _MODEL)]
    tables += [(f"model.layers.{n}.", f"block.{n}.", layer) for n in range(config.num_hidden_layers)]
    for prefix, original_prefix, table in tables:
        for name, original, axes in table:
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            source = original_prefix + original if layout == "original" else prefix + name
            yield prefix + name, source, tuple(sizes[axis] for axis in axes.split())
