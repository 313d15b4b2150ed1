"""Loading keeps experts packed: the peak memory of a process that loads and runs a gigabyte of them."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

GIB = 1 << 30
EXPERTS = 82
CONFIG = {
    "model_type": "gpt_oss", "vocab_size": 1024, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 1, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 4, "sliding_window": 128,
    "max_position_embeddings": 4096, "rope_theta": 150000, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
# What has to differ from zero for tokens to reach every expert.
SCATTERING = (
    "model.embed_tokens.weight", "model.layers.0.post_attention_layernorm.weight",
    "model.layers.0.mlp.router.weight",
)  # fmt: skip
PROGRAM = """
import resource, sys
import gptoss_lite as gl
model = gl.load_model(sys.argv[1], device="cpu")
assert model.logits(list(range(1024)), last=1).shape == (1, 1024)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def write_checkpoint(directory: Path) -> int:
    """Write a checkpoint of zeros whose router chooses all over; returns the bytes of its packed experts."""
    experts, hidden = EXPERTS, 2880
    shapes = {
        "model.embed_tokens.weight": [1024, hidden], "lm_head.weight": [1024, hidden],
        "model.norm.weight": [hidden],
    }  # fmt: skip
    layer: dict[str, list[int]] = {
        "input_layernorm.weight": [hidden], "post_attention_layernorm.weight": [hidden],
        "self_attn.sinks": [64], "self_attn.o_proj.weight": [hidden, 4096], "self_attn.o_proj.bias": [hidden],
        "mlp.router.weight": [experts, hidden], "mlp.router.bias": [experts],
        "mlp.experts.gate_up_proj_bias": [experts, 2 * hidden],
        "mlp.experts.down_proj_bias": [experts, hidden],
        "mlp.experts.gate_up_proj_blocks": [experts, 2 * hidden, 90, 16],
        "mlp.experts.gate_up_proj_scales": [experts, 2 * hidden, 90],
        "mlp.experts.down_proj_blocks": [experts, hidden, 90, 16],
        "mlp.experts.down_proj_scales": [experts, hidden, 90],
    }  # fmt: skip
    for part, width in (("q", 4096), ("k", 512), ("v", 512)):
        layer |= {f"self_attn.{part}_proj.weight": [width, hidden], f"self_attn.{part}_proj.bias": [width]}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    header: dict[str, Any] = {}
    end = packed = 0
    for name, shape in shapes.items():
        is_packed = name.endswith(("_blocks", "_scales"))
        size = math.prod(shape) * (1 if is_packed else 2)
        dtype = "U8" if is_packed else "BF16"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end, packed = end + size, packed + size * is_packed
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        rng = np.random.default_rng(0)
        for name in SCATTERING:
            values = rng.standard_normal(shapes[name], np.float32).astype(ml_dtypes.bfloat16)
            file.seek(8 + len(text) + header[name]["data_offsets"][0])
            file.write(values.tobytes())
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return packed


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_a_gigabyte_of_packed_experts_runs_in_little_more(tmp_path: Path) -> None:
    assert write_checkpoint(tmp_path) > GIB
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    # The mapped experts count once, as all of them were used; copies in bf16 would add 4 GiB.
    assert GIB < int(run.stdout) < 2.2 * GIB
