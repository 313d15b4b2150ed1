"""Directories of safetensors files as the weights of a model: Hugging Face's, OpenAI's original/, ours."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from gptoss_lite.checkpoint.names import EMBEDDING, LM_HEAD, Name, names
from gptoss_lite.checkpoint.quantization import Quantization
from gptoss_lite.checkpoint.weights import Dense, Int8Pair, MXFP4Pair, Tiled, Weight
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import CheckpointError
from gptoss_lite.packing import kind_of, packed_shape
from gptoss_lite.quant.formats import BLOCK, MXFP4, Int8
from gptoss_lite.quant.mxfp4 import BLOCK_BYTES
from gptoss_lite.quant.tensorfile import FLOATS, StoredTensor, abbreviated, read_file, read_json

INDEX = "model.safetensors.index.json"

_Take: TypeAlias = Callable[..., StoredTensor]  # of a name, a shape, and the dtypes that will do
SCALE_DTYPES = {"bf16": "BF16", "float16": "F16", "e8m0": "U8"}


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Read the headers of the files that hold the weights: those of the index, or else all there are.

    Raises CheckpointError, naming file and tensor, where they are missing, damaged or contradict each other.
    """
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


def find_weights(
    directory: Path, config: ModelConfig, quantization: Quantization, stored: dict[str, StoredTensor]
) -> dict[str, Weight]:
    """Find every weight of the model, and check that its file has it in the right dtype and shape."""
    original = is_original(stored)
    shapes = _original_shapes(config) if original else {}
    firsts: dict[str, int] = {}  # of rows, in tensors that several weights share
    weights: dict[str, Weight] = {}
    for name in names(config):

        def take(source: str, shape: tuple[int, ...], *dtypes: str) -> StoredTensor:
            return _checked(directory, stored, source, shape, dtypes)

        form = quantization.format(name.name)
        if not original:
            weights[name.name] = _huggingface(name, form, quantization.layout, take)
        elif isinstance(form, MXFP4):
            blocks, scales = pair_shapes(name.shape)
            weights[name.name] = MXFP4Pair(
                name.shape,
                take(f"{name.original}.blocks", blocks, "U8"),
                take(f"{name.original}.scales", scales, "U8"),
            )
        else:
            source = take(name.original, shapes[name.original], *FLOATS)
            first = firsts.get(name.original, 0)
            firsts[name.original] = first + name.shape[0]
            weights[name.name] = Dense(name.shape, source, slice(first, first + name.shape[0]))
    if config.tie_word_embeddings:
        weights[LM_HEAD] = weights[EMBEDDING]
    return weights


def is_original(stored: dict[str, StoredTensor]) -> bool:
    """Tell whether tensors have the names of OpenAI's original/."""
    return "embedding.weight" in stored


def _huggingface(name: Name, form: MXFP4 | Int8 | None, layout: str | None, take: _Take) -> Weight:
    base, shape = name.name, name.shape
    kind = kind_of(base)
    if form is not None:
        form.check(shape[-1], base)
    if form is not None and layout is not None and kind is not None:
        source = take(f"{base}_packed", packed_shape(form, shape, kind, layout), "U8")
        return Tiled(shape, source, layout, kind, form)
    match form:
        case MXFP4():
            blocks, scales = pair_shapes(shape)
            return MXFP4Pair(
                shape, take(f"{base}_blocks", blocks, "U8"), take(f"{base}_scales", scales, "U8")
            )
        case Int8():
            groups = (*shape[:-1], shape[-1] // form.group(shape[-1]))
            scales_dtype = SCALE_DTYPES[form.scales]
            return Int8Pair(
                shape, take(f"{base}_codes", shape, "I8"), take(f"{base}_scales", groups, scales_dtype), form
            )
    if name.is_experts:  # stored input-major, unlike every other weight
        source = take(base, (shape[0], shape[2], shape[1]), *FLOATS)
        return Dense(shape, source, slice(0, shape[0]), turned=True)
    return Dense(shape, take(base, shape, *FLOATS), slice(0, shape[0]))


def pair_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of blocks and scales of MXFP4."""
    scales = (*shape[:-1], shape[-1] // BLOCK)
    return (*scales, BLOCK_BYTES), scales


def _original_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of original/'s dense tensors: rows of all weights that share one are added up."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names(config):
        rows = shapes[name.original][0] if name.original in shapes else 0
        shapes[name.original] = (rows + name.shape[0], *name.shape[1:])
    return shapes


def _checked(
    directory: Path, stored: dict[str, StoredTensor], source: str, shape: tuple[int, ...],
    dtypes: tuple[str, ...],
) -> StoredTensor:  # fmt: skip
    wanted = " or ".join(dtypes)
    if source not in stored:
        raise CheckpointError(f"{directory}: tensor {source} is missing: must be {wanted} {shape}")
    if stored[source].dtype not in dtypes:
        raise stored[source].error(f"is {stored[source].dtype}: must be {wanted}")
    if stored[source].shape != shape:
        raise stored[source].error(f"has shape {stored[source].shape}: by config.json it is {shape}")
    return stored[source]
