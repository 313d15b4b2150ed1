"""Write the demo checkpoint from a training state: Hugging Face layout, with MXFP4 experts and in bf16."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from demo.model import NetConfig, Network, held_out_loss
from demo.tokenizer import special_id

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the tool runs from a checkout

EXPERT_MATRICES = ("gate_up_proj", "down_proj")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
E8M0_BIAS = 127
MAX_POSITION = 131072

Arrays = dict[str, NDArray[Any]]


def config_json(config: NetConfig, quantised: bool) -> dict[str, Any]:
    """Return config.json as Hugging Face writes it for gpt-oss."""
    kinds = ("sliding_attention", "full_attention")
    document: dict[str, Any] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": special_id("<|return|>"),
        "experts_per_token": config.num_experts_per_tok,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initial_context_length": config.rope_original_context,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_types": [kinds[i % 2] for i in range(config.num_hidden_layers)],
        "max_position_embeddings": MAX_POSITION,
        "model_type": "gpt_oss",
        "num_attention_heads": config.num_attention_heads,
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "num_local_experts": config.num_local_experts,
        "output_router_logits": False,
        "pad_token_id": special_id("<|endoftext|>"),
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "factor": config.rope_factor,
            "original_max_position_embeddings": config.rope_original_context,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": int(config.rope_theta),
        "router_aux_loss_coef": 0.01,
        "sliding_window": config.sliding_window,
        "swiglu_limit": config.swiglu_limit,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    if quantised:
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        document["quantization_config"] = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    return document


def write_texts(folder: Path, config: NetConfig, tokenizer: str, quantised: bool) -> None:
    """Write the JSON files that stand beside the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = ("<|return|>", "<|endoftext|>", "<|call|>")
    generation = {
        "bos_token_id": special_id("<|startoftext|>"),
        "do_sample": True,
        "eos_token_id": [special_id(text) for text in ends],
        "pad_token_id": special_id("<|endoftext|>"),
    }
    names = {
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_POSITION,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    documents = {
        "config": config_json(config, quantised), "generation_config": generation, "tokenizer_config": names
    }  # fmt: skip
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")


def to_bf16(weights: dict[str, torch.Tensor]) -> Arrays:
    """Round every weight to bf16, as NumPy arrays."""
    import ml_dtypes

    return {name: w.float().numpy().astype(ml_dtypes.bfloat16) for name, w in weights.items()}


def is_expert_matrix(name: str) -> bool:
    """Say whether a name of the network is a stack of expert matrices."""
    return ".mlp.experts." in name and name.endswith(EXPERT_MATRICES)


def unquantised(weights: Arrays) -> Arrays:
    """Return the bf16 layout, in which expert matrices are (E, in, out)."""
    return {
        name: np.ascontiguousarray(w.swapaxes(-1, -2)) if is_expert_matrix(name) else w
        for name, w in weights.items()
    }


def quantised(weights: Arrays) -> Arrays:
    """Return the packed layout: expert matrices (E, out, in) as MXFP4 blocks and scales."""
    from gptoss_lite import quant

    packed: Arrays = {}
    for name, w in weights.items():
        if is_expert_matrix(name):
            q: Any = quant.quantize(w.astype(np.float32), "mxfp4")
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = np.asarray(q.blocks), np.asarray(q.scales)
        else:
            packed[name] = w
    return packed


def unpacked(packed: Arrays) -> dict[str, torch.Tensor]:
    """Return float32 weights of the network from the packed layout, decoded here to check the packing."""
    weights = {}
    for name, w in packed.items():
        if name.endswith("_blocks"):
            codes = np.stack([w & 15, w >> 4], -1).reshape(*w.shape[:-1], -1)  # (E, out, in / 32, 32)
            scales = packed[name.replace("_blocks", "_scales")].astype(np.int32) - E8M0_BIAS
            values = np.ldexp(E2M1[codes], scales[..., None])
            weights[name.removesuffix("_blocks")] = torch.from_numpy(values.reshape(*values.shape[:-2], -1))
        elif not name.endswith("_scales"):
            weights[name] = torch.from_numpy(w.astype(np.float32))
    return weights


def load_network(state: dict[str, Any], weights: dict[str, torch.Tensor]) -> Network:
    """Return the network with these weights, without dropout."""
    net = Network(NetConfig(**{**state["config"], "dropout": 0.0}))
    net.load_state_dict(weights)
    return net.eval()


def save(path: Path, tensors: Arrays) -> None:
    """Write one safetensors file with checksums."""
    from gptoss_lite import checkpoint

    checkpoint.save_file(path, tensors, {"format": "pt"})


def export(state_path: Path, out: Path) -> None:
    """Write OUT/demo (MXFP4, with model card), OUT/bf16 and OUT/heldout.txt from a training state."""
    state = torch.load(state_path, weights_only=True)
    config, tokenizer = NetConfig(**state["config"]), Tokenizer.from_str(state["tokenizer"])
    dense = to_bf16(state["model"])
    packed = quantised(dense)
    ids = tokenizer.encode(state["held_out"], add_special_tokens=False).ids
    size = state["settings"]["row_tokens"]
    before = held_out_loss(
        load_network(state, {k: torch.from_numpy(v.astype(np.float32)) for k, v in dense.items()}), ids, size
    )
    after = held_out_loss(load_network(state, unpacked(packed)), ids, size)
    print(f"held-out {before:.4f} nats/token in bf16, {after:.4f} with MXFP4 experts")
    for name, tensors in (("demo", packed), ("bf16", unquantised(dense))):
        write_texts(out / name, config, state["tokenizer"], name == "demo")
        save(out / name / "model.safetensors", tensors)
    (out / "heldout.txt").write_text(state["held_out"] + "\n", encoding="utf-8")
    weights = out / "demo" / "model.safetensors"
    figures = {
        "parameters": f"{sum(w.size for w in dense.values()):,}",
        "bytes": f"{weights.stat().st_size:,}",
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "steps": f"{state['step']:,}",
        "tokens": f"{state['tokens'] / 1e6:.1f} million",
        "minutes": f"{state['seconds'] / 60:.0f}",
        "speed": f"{state['tokens'] / state['seconds']:,.0f}",
        "before": f"{before:.3f}",
        "after": f"{after:.3f}",
        "bits": f"{after * len(ids) / len(state['held_out'].encode()) / np.log(2):.3f}",
        "held_tokens": f"{len(ids):,}",
    }
    card = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    for key, value in figures.items():
        card = card.replace("{" + key + "}", value)
    (out / "demo" / "README.md").write_text(card, encoding="utf-8")
