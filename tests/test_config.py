"""config.json in its spellings, and everything in it that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptoss_lite.config import ModelConfig, RopeConfig
from gptoss_lite.errors import CheckpointError

MISSING = object()


def huggingface() -> dict[str, Any]:
    """Spell the 20b model as its own config.json does."""
    return {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }


def original() -> dict[str, Any]:
    """Spell the same model as the config.json of its original/ folder does."""
    return {
        "num_hidden_layers": 24,
        "num_experts": 32,
        "experts_per_token": 4,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "swiglu_limit": 7.0,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "initial_context_length": 4096,
        "rope_theta": 150000,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    }


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set or drop one key, given with a dot where it lies in a section."""
    section, _, key = path.rpartition(".")
    target = config[section] if section else config
    if value is MISSING:
        del target[key]
    else:
        target[key] = value
    return config


def test_the_spellings_mean_the_same() -> None:
    want = ModelConfig.from_dict(huggingface())
    assert want.rope == RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, truncate=False)
    assert want.num_local_experts == 32
    assert want.quant_method == "mxfp4"
    assert want.layer_types[:3] == ("sliding_attention", "full_attention", "sliding_attention")
    assert ModelConfig.from_dict(original()) == want
    fifth = huggingface()
    fifth["rope_parameters"] = fifth.pop("rope_scaling") | {"rope_theta": fifth.pop("rope_theta")}
    assert ModelConfig.from_dict(fifth) == want


def test_a_configuration_survives_json(layout: Path) -> None:
    config = json.loads((layout / "config.json").read_text())
    checked = ModelConfig.from_dict(config)
    assert (checked.hidden_size, checked.head_dim) == (config["hidden_size"], config["head_dim"])
    assert len(checked.layer_types) == checked.num_hidden_layers


@pytest.mark.parametrize(
    ("path", "value", "field", "want"),
    [
        ("layer_types", MISSING, "layer_types", ("sliding_attention", "full_attention") * 12),
        ("layer_types", ["full_attention"] * 24, "layer_types", ("full_attention",) * 24),
        ("quantization_config", MISSING, "quant_method", None),
        ("quantization_config", None, "quant_method", None),
        ("rms_norm_eps", MISSING, "rms_norm_eps", 1e-5),
        ("swiglu_limit", MISSING, "swiglu_limit", 7.0),
        ("max_position_embeddings", MISSING, "max_position_embeddings", 131072),
        ("tie_word_embeddings", True, "tie_word_embeddings", True),
        (
            "rope_scaling.truncate",
            MISSING,
            "rope",
            RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, truncate=True),
        ),
        (
            "rope_scaling.beta_fast",
            MISSING,
            "rope",
            RopeConfig(150000.0, 32.0, 4096, 32.0, 1.0, truncate=False),
        ),
        (
            "rope_scaling",
            {"type": "default"},
            "rope",
            RopeConfig(150000.0, 1.0, 131072, 32.0, 1.0, truncate=True),
        ),
        ("rope_scaling", None, "rope", RopeConfig(150000.0, 1.0, 131072, 32.0, 1.0, truncate=True)),
    ],
)
def test_what_may_be_absent_has_a_default(path: str, value: Any, field: str, want: Any) -> None:
    assert getattr(ModelConfig.from_dict(changed(huggingface(), path, value)), field) == want


SIZES = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "sliding_window",
]
BAD: list[tuple[str, Any]] = [
    *((key, value) for key in SIZES for value in (MISSING, None, -1, 0, 10**12, True, 64.0, "64", [64])),
    *(("max_position_embeddings", value) for value in (0, -1, 2**31, "131072", False)),
    ("head_dim", 63),
    ("num_key_value_heads", 7),
    ("num_experts_per_tok", 33),
    ("hidden_size", 2881),
    ("intermediate_size", 2890),
    *(("rms_norm_eps", value) for value in (0, -1e-5, float("nan"), float("inf"), 2.0, "1e-5", True)),
    *(("swiglu_limit", value) for value in (0, -7.0, float("nan"), float("inf"), "7")),
    *(
        ("rope_theta", value)
        for value in (MISSING, 0, 1, -5, float("nan"), float("inf"), 10**400, "150000", True)
    ),
    ("rope_scaling.rope_type", MISSING),  # a factor is there, and would silently count for nothing
    *(("rope_scaling.factor", value) for value in (MISSING, 0, 0.5, -1, float("nan"), float("inf"), "32")),
    *(("rope_scaling.original_max_position_embeddings", value) for value in (MISSING, 0, -1, 4096.5, 2**31)),
    ("rope_scaling.beta_fast", 0),
    ("rope_scaling.beta_fast", 1.0),
    ("rope_scaling.beta_slow", float("nan")),
    ("rope_scaling.truncate", "no"),
    ("rope_scaling.rope_type", "linear"),
    ("rope_scaling.rope_type", 7),
    ("rope_scaling.attention_factor", 1.5),
    ("rope_scaling", "yarn"),
    ("layer_types", []),
    ("layer_types", ["full_attention"] * 23),
    ("layer_types", ["chunked_attention"] * 24),
    ("layer_types", [[]] * 24),
    ("layer_types", "full_attention"),
    ("model_type", MISSING),
    ("model_type", "llama"),
    ("attention_bias", False),
    ("tie_word_embeddings", 1),
    ("quantization_config.quant_method", MISSING),
    ("quantization_config.quant_method", "awq"),
    ("quantization_config", "mxfp4"),
]


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict(config, "somewhere/config.json")
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 250
    assert text.startswith("somewhere/config.json: ")
    return text.removeprefix("somewhere/config.json: ")


@pytest.mark.parametrize(("path", "value"), BAD, ids=[f"{path}={str(value)[:24]}" for path, value in BAD])
def test_a_bad_value_is_refused_by_file_key_and_value(path: str, value: Any) -> None:
    text = refusal(changed(huggingface(), path, value))
    # A key that must divide or bound another is named with it, so either may lead.
    assert path in text
    if value is MISSING or value is None:
        assert text.startswith(f"{path} is missing: must be ")
    else:
        assert repr(value)[:50] in text
        assert ": must be " in text


@pytest.mark.parametrize(
    "key", [key for key in original() if key not in ("swiglu_limit", "rope_ntk_alpha", "rope_ntk_beta")]
)
@pytest.mark.parametrize("value", [MISSING, -1, "1", True, float("nan")])
def test_bad_values_of_the_original_spelling_are_refused_under_its_keys(key: str, value: Any) -> None:
    config = changed(original(), key, value)
    if key == "num_experts" and value is MISSING:
        assert "model_type" in refusal(config)  # nothing then says which spelling it is
    else:
        assert refusal(config).startswith(f"{key} is ")


def test_a_long_value_is_cut_short() -> None:
    assert len(refusal(changed(huggingface(), "vocab_size", "9" * 10**6))) < 200
