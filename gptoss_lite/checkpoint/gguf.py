"""GGUF files of gpt-oss, as llama.cpp has them: their metadata as a config.json, their tensors as weights.

GGUF has no key for whether YaRN's range is rounded. gpt-oss was trained without rounding, so that is what a
file means that does not say otherwise in `gptoss-lite.config`, the config.json that files of ours carry.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_lite.checkpoint.names import EMBEDDING, LM_HEAD, names
from gptoss_lite.checkpoint.weights import Alternating, Dense, GGUFBlocks, Weight
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import CheckpointError
from gptoss_lite.quant import ggufblocks
from gptoss_lite.quant.gguffile import GGUFFile, read_file
from gptoss_lite.quant.tensorfile import FLOATS, StoredTensor, abbreviated, parse_json

ARCHITECTURE = "gpt-oss"
CONFIG = "gptoss-lite.config"

# Keys of config.json, and of GGUF less the architecture.
KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "expert_feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "rope_theta": "rope.freq_base",
}
ROPE_KEYS = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


def read(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Read a file's header -> what config.json would say, and the stored tensors by GGUF's names.

    Raises CheckpointError naming the file, and what in it is missing, damaged or of another architecture.
    """
    file = read_file(path)
    architecture = file.metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        shown = abbreviated(architecture)
        raise CheckpointError(f"{path}: general.architecture is {shown}: must be '{ARCHITECTURE}'")
    parts = _scalar(file, "split.count")
    if parts not in (None, 0, 1):
        raise CheckpointError(f"{path} is one of {abbreviated(parts)} parts: join them by gguf-split")
    return settings(file), dict(file.tensors)


def settings(file: GGUFFile) -> dict[str, Any]:
    """Spell a file's hyperparameters as config.json does."""
    own = file.metadata.get(CONFIG)
    if isinstance(own, str):
        return parse_json(own.encode(), f"{file.path}: {CONFIG}")
    found = {key: _scalar(file, f"{ARCHITECTURE}.{name}") for key, name in KEYS.items()}
    if found["intermediate_size"] is None:
        found["intermediate_size"] = _scalar(file, f"{ARCHITECTURE}.feed_forward_length")
    rope = None
    if file.metadata.get(f"{ARCHITECTURE}.rope.scaling.type") == "yarn":
        scaling = {key: _scalar(file, f"{ARCHITECTURE}.{name}") for key, name in ROPE_KEYS.items()}
        rope = {"rope_type": "yarn", "truncate": False, **scaling}
    embedding = file.tensors.get("token_embd.weight")
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": embedding.shape[0] if embedding is not None and embedding.shape else None,
        **found,
        "rope_scaling": rope,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _scalar(file: GGUFFile, key: str) -> Any:
    """Look a number or a word up; None where it is absent, or anything else."""
    value = file.metadata.get(key)
    if isinstance(value, float):  # float32 in the file: 1e-5 would come back with digits that nobody wrote
        return float(str(np.float32(value)))
    return value if isinstance(value, int | str) else None


def find_weights(path: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, Weight]:
    """Find every weight of the model, and check that the file has it in a known type and the right shape.

    Raises CheckpointError naming the tensor.
    """
    weights: dict[str, Weight] = {}
    for name in names(config):
        shape = name.shape
        if len(name.gguf) == 2:  # gates and ups, half of the rows each
            shape = (shape[0], shape[1] // 2, *shape[2:])
        sources = tuple(_checked(path, stored, source, shape) for source in name.gguf)
        if len({source.dtype for source in sources}) > 1:
            raise sources[1].error(f"is {sources[1].dtype}, and {sources[0].name} is {sources[0].dtype}")
        if sources[0].dtype in ggufblocks.FORMATS:
            if not name.is_quantisable:
                raise sources[0].error(f"is {sources[0].dtype}: must be {' or '.join(FLOATS)}")
            weights[name.name] = GGUFBlocks(name.shape, sources)
        elif len(sources) == 2:
            weights[name.name] = Alternating(name.shape, *sources)
        else:
            weights[name.name] = Dense(name.shape, sources[0], slice(0, shape[0]))
    if config.tie_word_embeddings:
        weights[LM_HEAD] = weights[EMBEDDING]
    return weights


def _checked(
    path: Path, stored: Mapping[str, StoredTensor], source: str, shape: tuple[int, ...]
) -> StoredTensor:
    known = (*FLOATS, *ggufblocks.FORMATS)
    if source not in stored:
        raise CheckpointError(f"{path}: tensor {source} is missing: must be {shape}")
    tensor = stored[source]
    if tensor.dtype not in known:
        raise tensor.error(f"is {tensor.dtype}: this package reads {', '.join(known[:-1])} and {known[-1]}")
    if tensor.shape != shape:
        raise tensor.error(f"has shape {tensor.shape}: by the file's metadata it is {shape}")
    return tensor
