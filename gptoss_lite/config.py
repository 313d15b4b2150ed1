"""The model's hyperparameters, read from config.json in any of its spellings and checked once, here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from gptoss_lite.errors import CheckpointError

ATTENTION_KINDS = ("sliding_attention", "full_attention")

_MXFP4_BLOCK = 32
_QUANT_METHODS = ("mxfp4", "gptoss-lite")
_EXPERT_KEYS = ("num_local_experts", "num_experts_per_tok")
_ORIGINAL_EXPERT_KEYS = ("num_experts", "experts_per_token")
_MAX_POSITION = 2**31 - 1  # positions and token ids are int32


class _Section:
    """One object of config.json; its getters check presence, type and range, and name file, key and value."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def error(self, key: str, expected: str) -> CheckpointError:
        if self.values.get(key) is None:
            return CheckpointError(f"{self.source}: {self.prefix}{key} is missing: must be {expected}")
        value = repr(self.values[key])
        shown = value if len(value) <= 60 else f"{value[:57]}..."
        return CheckpointError(f"{self.source}: {self.prefix}{key} is {shown}: must be {expected}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = default if self.values.get(key) is None else self.values[key]
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise self.error(key, f"an integer from {low} to {high}")

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = default if self.values.get(key) is None else self.values[key]
        # No range holds NaN.
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return float(value)
        raise self.error(key, f"a number from {low:g} to {high:g}")

    def flag(self, key: str, default: bool) -> bool:
        value = default if self.values.get(key) is None else self.values[key]
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def section(self, key: str) -> "_Section | None":
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "an object")
        return _Section(value, self.source, f"{self.prefix}{key}.")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Settings of rotary positions with YaRN; a factor of 1 is plain RoPE.

    truncate: whether the correction range is rounded outwards to whole dimensions; OpenAI's models say no.
    Source: Peng et al., YaRN, arXiv 2309.00071.
    """

    theta: float
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Hyperparameters of one gpt-oss network, named after the keys of a Hugging Face config.json.

    quant_method: "mxfp4" where the experts are stored packed, "gptoss-lite" where weights have formats of
    their own, None where everything is stored dense.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    sliding_window: int
    max_position_embeddings: int
    rms_norm_eps: float
    swiglu_limit: float
    layer_types: tuple[str, ...]
    rope: RopeConfig
    quant_method: str | None = None
    tie_word_embeddings: bool = False

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = "config.json") -> Self:
        """Read and check a parsed config.json, spelled as by Hugging Face or as in OpenAI's original/ folder.

        source: the file's name, for errors. Raises CheckpointError naming source, key and value.
        """
        top = _Section(config, source)
        original = "num_experts" in config and "model_type" not in config
        if not original and config.get("model_type") != "gpt_oss":
            raise top.error("model_type", "'gpt_oss', the one architecture there is here")
        if not top.flag("attention_bias", True):
            raise top.error("attention_bias", "true, as in every gpt-oss")
        rope = _original_rope(top) if original else _huggingface_rope(top)
        experts, active = _ORIGINAL_EXPERT_KEYS if original else _EXPERT_KEYS
        extended = min(int(rope.original_max_position_embeddings * rope.factor), _MAX_POSITION)
        layers = top.integer("num_hidden_layers", 1, 1024)
        checked = cls(
            vocab_size=top.integer("vocab_size", 1, 2**24),
            hidden_size=top.integer("hidden_size", 1, 2**18),
            intermediate_size=top.integer("intermediate_size", 1, 2**18),
            num_hidden_layers=layers,
            num_attention_heads=top.integer("num_attention_heads", 1, 1024),
            num_key_value_heads=top.integer("num_key_value_heads", 1, 1024),
            head_dim=top.integer("head_dim", 2, 1024),
            num_local_experts=top.integer(experts, 1, 4096),
            num_experts_per_tok=top.integer(active, 1, 4096),
            sliding_window=top.integer("sliding_window", 1, _MAX_POSITION),
            max_position_embeddings=top.integer("max_position_embeddings", 1, _MAX_POSITION, extended),
            rms_norm_eps=top.number("rms_norm_eps", 1e-30, 1.0, 1e-5),
            swiglu_limit=top.number("swiglu_limit", 1e-6, 1e6, 7.0),
            layer_types=_layer_types(top, layers),
            rope=rope,
            quant_method="mxfp4" if original else _quant_method(top),  # original/ is packed without saying so
            tie_word_embeddings=top.flag("tie_word_embeddings", False),
        )
        checked._check_consistency(top, active)
        return checked

    def _check_consistency(self, top: _Section, active: str) -> None:
        if self.head_dim % 2:
            raise top.error("head_dim", "even, for rotary positions turn its two halves")
        if self.num_attention_heads % self.num_key_value_heads:
            groups = self.num_key_value_heads
            raise top.error("num_attention_heads", f"a multiple of num_key_value_heads, {groups}")
        if self.num_experts_per_tok > self.num_local_experts:
            raise top.error(active, f"at most the number of experts, {self.num_local_experts}")
        for key, size in (("hidden_size", self.hidden_size), ("intermediate_size", self.intermediate_size)):
            if self.quant_method == "mxfp4" and size % _MXFP4_BLOCK:
                raise top.error(key, f"a multiple of {_MXFP4_BLOCK}, the block of mxfp4")


def _huggingface_rope(top: _Section) -> RopeConfig:
    # transformers 4 writes rope_scaling beside rope_theta; transformers 5 puts both into rope_parameters.
    rope = top.section("rope_scaling") or top.section("rope_parameters") or _Section({}, top.source)
    theta = (rope if "rope_theta" in rope.values else top).number("rope_theta", 2.0, 1e12)
    key = "type" if "type" in rope.values and "rope_type" not in rope.values else "rope_type"
    kind = rope.values.get(key)
    if kind == "default" or (kind is None and "factor" not in rope.values):
        context = top.integer("max_position_embeddings", 1, _MAX_POSITION)
        return RopeConfig(theta, 1.0, context, 32.0, 1.0, True)
    if kind != "yarn":
        raise rope.error(key, "'yarn' or 'default'")
    for key in ("attention_factor", "mscale", "mscale_all_dim"):
        if rope.values.get(key) is not None:
            raise rope.error(key, "absent: only YaRN's own concentration is supported")
    keys = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    return _yarn(rope, theta, *keys, truncate=True)


def _original_rope(top: _Section) -> RopeConfig:
    theta = top.number("rope_theta", 2.0, 1e12)
    keys = ("rope_scaling_factor", "initial_context_length", "rope_ntk_beta", "rope_ntk_alpha")
    return _yarn(top, theta, *keys, truncate=False)


def _yarn(
    rope: _Section, theta: float, factor: str, context: str, beta_fast: str, beta_slow: str, *, truncate: bool
) -> RopeConfig:
    settings = RopeConfig(
        theta=theta,
        factor=rope.number(factor, 1.0, 1e6),
        original_max_position_embeddings=rope.integer(context, 1, _MAX_POSITION),
        beta_fast=rope.number(beta_fast, 1e-6, 1e6, 32.0),
        beta_slow=rope.number(beta_slow, 1e-6, 1e6, 1.0),
        truncate=rope.flag("truncate", truncate),
    )
    if settings.beta_fast <= settings.beta_slow:
        raise rope.error(beta_fast, f"more than {beta_slow}, {settings.beta_slow:g}")
    return settings


def _layer_types(top: _Section, layers: int) -> tuple[str, ...]:
    kinds = top.values.get("layer_types")
    if kinds is None:
        return tuple(ATTENTION_KINDS[layer % 2] for layer in range(layers))
    if isinstance(kinds, list) and len(kinds) == layers and all(kind in ATTENTION_KINDS for kind in kinds):
        return tuple(kinds)
    raise top.error("layer_types", f"a list of {layers}, each {' or '.join(ATTENTION_KINDS)}")


def _quant_method(top: _Section) -> str | None:
    quantization = top.section("quantization_config")
    if quantization is None:
        return None
    method = quantization.values.get("quant_method")
    if method not in _QUANT_METHODS:
        raise quantization.error("quant_method", "'mxfp4' or 'gptoss-lite', or quantization_config absent")
    return str(method)
