"""What stands beside the weights: config.json in a target's spelling, the tokenizer, other small files."""

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_lite import vocab
from gptoss_lite.checkpoint import Checkpoint, gguf, gguf_vocabulary
from gptoss_lite.checkpoint.quantization import Quantization, summarised
from gptoss_lite.config import ModelConfig
from gptoss_lite.conversion.targets import TILES
from gptoss_lite.errors import CheckpointError
from gptoss_lite.quant.formats import MXFP4, Format, Int8
from gptoss_lite.quant.gguffile import read_file
from gptoss_lite.quant.tensorfile import parse_json, read_json
from gptoss_lite.tokenizer import EMBEDDED_VOCAB_SIZE, Tokenizer
from gptoss_lite.vocab.document import embedded

TOKENIZER = "tokenizer.json"
CARRIED = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json", "LICENSE",
    "USAGE_POLICY", "NOTICE",
)  # fmt: skip

_FILES = "gptoss-lite.files"  # GGUF's key for such files, in those we write
_TEMPLATE = "chat_template.jinja"
_GGUF_TEMPLATE = "tokenizer.chat_template"


def huggingface_config(
    checkpoint: Checkpoint, target: str, forms: Mapping[str, Format | str]
) -> dict[str, Any]:
    """Spell config.json as Hugging Face does: the source's own keys where it has such, less its formats."""
    settings = dict(checkpoint.settings)
    if "model_type" not in settings:
        settings = _huggingface(checkpoint.config)
    settings.pop("quantization_config", None)
    quantised = {name: form for name, form in forms.items() if isinstance(form, MXFP4 | Int8)}
    patterns = summarised(quantised, checkpoint.config.num_hidden_layers)
    section = Quantization(patterns, TILES.get(target)).to_config()
    return settings | ({} if section is None else {"quantization_config": section})


def original_config(config: ModelConfig) -> dict[str, Any]:
    """Spell config.json as OpenAI's original/ does."""
    rope = config.rope
    return {
        "num_hidden_layers": config.num_hidden_layers,
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": rope.original_max_position_embeddings,
        "rope_theta": rope.theta,
        "rope_scaling_factor": rope.factor,
        "rope_ntk_alpha": rope.beta_slow,
        "rope_ntk_beta": rope.beta_fast,
    }


def gguf_metadata(checkpoint: Checkpoint, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Make GGUF's keys: llama.cpp's for the model and its tokenizer, and ours for what those leave out.

    Raises CheckpointError for a tokenizer that neither we nor llama.cpp can do.
    """
    config, prefix = checkpoint.config, gguf.ARCHITECTURE
    values: dict[str, Any] = {
        "general.architecture": prefix,
        "general.type": "model",
        "general.quantization_version": 2,
    }
    values |= {
        f"{prefix}.{key}": getattr(config, name) for name, key in gguf.KEYS.items() if name != "rope_theta"
    }
    values |= {
        f"{prefix}.feed_forward_length": config.intermediate_size,
        f"{prefix}.attention.value_length": config.head_dim,
        f"{prefix}.rope.dimension_count": config.head_dim,
        f"{prefix}.rope.freq_base": float(config.rope.theta),
        f"{prefix}.vocab_size": config.vocab_size,
    }
    if config.rope.factor != 1.0:  # whether its range is rounded stands in the config that goes along
        values[f"{prefix}.rope.scaling.type"] = "yarn"
        values |= {f"{prefix}.{key}": getattr(config.rope, name) for name, key in gguf.ROPE_KEYS.items()}
    vocabulary: dict[str, Any] = {"tokenizer.ggml.model": "none"}
    if TOKENIZER in files:
        document = parse_json(files[TOKENIZER], TOKENIZER)
        Tokenizer.from_document(document, config.vocab_size, TOKENIZER)  # raises if it is not sound
        vocabulary = gguf_vocabulary.to_metadata(document, config.vocab_size)
    if (template := _chat_template(files)) is not None:
        vocabulary[_GGUF_TEMPLATE] = template
    settings = huggingface_config(checkpoint, "hf", {})
    carried = {name: b64encode(text).decode() for name, text in files.items() if name != TOKENIZER}
    return values | vocabulary | {gguf.CONFIG: json.dumps(settings), _FILES: json.dumps(carried)}


def _chat_template(files: Mapping[str, bytes]) -> str | None:
    """Find the template in a file of its own or, as older ones have it, in tokenizer_config.json."""
    if _TEMPLATE in files:
        return files[_TEMPLATE].decode("utf-8", "replace")
    if "tokenizer_config.json" not in files:
        return None
    template = parse_json(files["tokenizer_config.json"], "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def side_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Gather the small files of a checkpoint, its tokenizer among them: contents by name.

    What a GGUF file has in its metadata becomes files again. OpenAI's original/ lies in a directory with the
    rest; and where there is no tokenizer but the vocabulary's size is gpt-oss's, it is the embedded one.
    """
    path = checkpoint.path
    if checkpoint.layout == "gguf":
        files = _from_gguf(path)
    else:
        is_bare = checkpoint.layout == "original" and not (path / TOKENIZER).exists()
        places = [path, path.parent] if is_bare and _is_huggingface(path.parent) else [path]
        found = {
            name: place / name for place in reversed(places) for name in CARRIED if (place / name).is_file()
        }
        files = {name: file.read_bytes() for name, file in found.items()}
    if TOKENIZER not in files and checkpoint.config.vocab_size == EMBEDDED_VOCAB_SIZE:
        files[TOKENIZER] = _document(embedded())
    return files


def _from_gguf(path: Path) -> dict[str, bytes]:
    metadata = read_file(path).metadata
    carried = metadata.get(_FILES)
    if isinstance(carried, str):
        try:
            named = parse_json(carried.encode(), f"{path}: {_FILES}")
            files = {name: b64decode(text, validate=True) for name, text in named.items() if name in CARRIED}
        except (ValueError, TypeError):
            raise CheckpointError(f"{path}: {_FILES} is damaged: it must hold files in base64") from None
    elif isinstance(template := metadata.get(_GGUF_TEMPLATE), str):
        files = {_TEMPLATE: template.encode()}
    else:
        files = {}
    if (document := gguf_vocabulary.to_document(metadata, str(path))) is not None:
        files[TOKENIZER] = _document(document)
    return files


def _is_huggingface(directory: Path) -> bool:
    try:
        return read_json(directory / "config.json").get("model_type") == "gpt_oss"
    except CheckpointError:
        return False


def _document(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()


def _huggingface(config: ModelConfig) -> dict[str, Any]:
    """Spell what original/ says as Hugging Face's config.json of the same model does."""
    rope = config.rope
    special = vocab.SPECIAL_TOKENS if config.vocab_size == EMBEDDED_VOCAB_SIZE else {}
    ends = {"eos_token_id": "<|return|>", "pad_token_id": "<|endoftext|>"}
    return {
        **{key: special[token] for key, token in ends.items() if token in special},
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": rope.original_max_position_embeddings,
        "intermediate_size": config.intermediate_size,
        "layer_types": list(config.layer_types),
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "factor": rope.factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "rope_type": "yarn",
            "truncate": rope.truncate,
        },
        "rope_theta": rope.theta,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
    }
