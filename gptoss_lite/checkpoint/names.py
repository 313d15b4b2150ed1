"""Every weight of a gpt-oss network: its canonical name, which is Hugging Face's, others, and shape."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from gptoss_lite.config import ModelConfig

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Canonical name, the names in original/ and in GGUF, and the axes. In original/, q, k and v are rows of one
# tensor; in GGUF the rows of gates and of ups, which alternate, are two. `*` stands for either. Experts'
# matrices have the names of packed ones less their suffix.
_Table = tuple[tuple[str, str, str, str], ...]
_MODEL: _Table = (
    (EMBEDDING, "embedding.weight", "token_embd.weight", "vocab hidden"),
    ("model.norm.weight", "norm.scale", "output_norm.weight", "hidden"),
    (LM_HEAD, "unembedding.weight", "output.weight", "vocab hidden"),
)
_LAYER: _Table = (
    ("input_layernorm.weight", "attn.norm.scale", "attn_norm.weight", "hidden"),
    ("self_attn.q_proj.weight", "attn.qkv.weight", "attn_q.weight", "queries hidden"),
    ("self_attn.k_proj.weight", "attn.qkv.weight", "attn_k.weight", "keys hidden"),
    ("self_attn.v_proj.weight", "attn.qkv.weight", "attn_v.weight", "keys hidden"),
    ("self_attn.q_proj.bias", "attn.qkv.bias", "attn_q.bias", "queries"),
    ("self_attn.k_proj.bias", "attn.qkv.bias", "attn_k.bias", "keys"),
    ("self_attn.v_proj.bias", "attn.qkv.bias", "attn_v.bias", "keys"),
    ("self_attn.sinks", "attn.sinks", "attn_sinks.weight", "heads"),
    ("self_attn.o_proj.weight", "attn.out.weight", "attn_output.weight", "hidden queries"),
    ("self_attn.o_proj.bias", "attn.out.bias", "attn_output.bias", "hidden"),
    ("post_attention_layernorm.weight", "mlp.norm.scale", "post_attention_norm.weight", "hidden"),
    ("mlp.router.weight", "mlp.gate.weight", "ffn_gate_inp.weight", "experts hidden"),
    ("mlp.router.bias", "mlp.gate.bias", "ffn_gate_inp.bias", "experts"),
    ("mlp.experts.gate_up_proj", "mlp.mlp1_weight", "ffn_*_exps.weight", "experts gate_up hidden"),
    ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias", "ffn_*_exps.bias", "experts gate_up"),
    ("mlp.experts.down_proj", "mlp.mlp2_weight", "ffn_down_exps.weight", "experts hidden intermediate"),
    ("mlp.experts.down_proj_bias", "mlp.mlp2_bias", "ffn_down_exps.bias", "experts hidden"),
)
_QUANTISABLE = re.compile(r"embed_tokens|lm_head|self_attn\.[qkvo]_proj\.weight|experts\.\w+_proj$")
_GROUPS = {
    "embed_tokens": "embedding", "lm_head": "lm_head", ".self_attn.": "attention", ".experts.": "experts"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Name:
    """One weight: its names in the layouts, and its logical shape (..., N, K).

    gguf: two names, of gates and ups, where GGUF has them apart. layer: None outside the layers.
    """

    name: str
    original: str
    gguf: tuple[str, ...]
    shape: tuple[int, ...]
    layer: int | None

    @property
    def is_experts(self) -> bool:
        """Whether it is a stack of experts' matrices."""
        return len(self.shape) == 3

    @property
    def is_quantisable(self) -> bool:
        """Whether it may be quantised: a matrix, and not a router's."""
        return is_quantisable(self.name)

    @property
    def group(self) -> str:
        """The group of weights it belongs to."""
        return group_of(self.name)


def is_quantisable(name: str) -> bool:
    """Tell whether a canonical name is a weight that may be quantised: a matrix, and not a router's."""
    return bool(_QUANTISABLE.search(name))


def group_of(name: str) -> str:
    """Name the group of a canonical name: embedding, attention, experts, lm_head, norms and routers."""
    return next((group for part, group in _GROUPS.items() if part in name), "norms and routers")


def names(config: ModelConfig) -> Iterator[Name]:
    """Yield every weight of a network in the order in which it computes; of tied ones, the embedding."""
    sizes = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "gate_up": 2 * config.intermediate_size,
        "heads": config.num_attention_heads,
        "queries": config.num_attention_heads * config.head_dim,
        "keys": config.num_key_value_heads * config.head_dim,
        "experts": config.num_local_experts,
    }

    def expand(
        table: _Table, layer: int | None, prefix: str = "", original_prefix: str = "", gguf_prefix: str = ""
    ) -> Iterator[Name]:
        for name, original, gguf, axes in table:
            parts = tuple(gguf.replace("*", part) for part in ("gate", "up")) if "*" in gguf else (gguf,)
            yield Name(
                prefix + name,
                original_prefix + original,
                tuple(gguf_prefix + part for part in parts),
                tuple(sizes[axis] for axis in axes.split()),
                layer,
            )

    yield from expand(_MODEL[:1], None)
    for n in range(config.num_hidden_layers):
        yield from expand(_LAYER, n, f"model.layers.{n}.", f"block.{n}.", f"blk.{n}.")
    yield from expand(_MODEL[1:2] if config.tie_word_embeddings else _MODEL[1:], None)
