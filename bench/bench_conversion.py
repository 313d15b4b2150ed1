"""Whole conversions beside a copy of the same file on the same disk, in turns: the ratio is what counts.

Two layers of gpt-oss-20b's shapes with half its experts, random: 0.5 GB in MXFP4, 1.7 GB in bf16. A copy has
the bytes of the larger side of a conversion. Both ends are on disk when the clock stops.
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.checkpoint.directory import pair_shapes
from gptoss_lite.checkpoint.names import names
from gptoss_lite.config import ModelConfig
from gptoss_lite.conversion import execute, plan_conversion, plan_quantization
from gptoss_lite.conversion.plan import Plan
from gptoss_lite.quant import QTensor
from gptoss_lite.quant.policy import PRESETS

CONFIG: dict[str, Any] = {
    "model_type": "gpt_oss", "vocab_size": 2048, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 16, "num_experts_per_tok": 4, "sliding_window": 128,
    "max_position_embeddings": 131072, "rope_theta": 150000,
    "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
                     "truncate": False},
}  # fmt: skip
PACKED = CONFIG | {"quantization_config": {"quant_method": "mxfp4"}}
ROUNDS = 5
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(directory: Path, document: dict[str, Any]) -> Path:
    """Write a random checkpoint, without our checksums in the header: as one finds it."""
    import safetensors.numpy

    directory.mkdir()
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    for name in names(ModelConfig.from_dict(document)):
        if name.is_experts and "quantization_config" in document:
            blocks, scales = pair_shapes(name.shape)
            tensors[f"{name.name}_blocks"] = rng.integers(0, 256, blocks, np.uint8)
            tensors[f"{name.name}_scales"] = rng.integers(118, 123, scales, np.uint8)
        else:
            shape = (name.shape[0], name.shape[2], name.shape[1]) if name.is_experts else name.shape
            tensors[name.name] = (rng.standard_normal(shape, np.float32) / 50).astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(document))
    return directory


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {"mxfp4": write(root / "mxfp4", PACKED), "bf16": write(root / "bf16", CONFIG)}


def copy(source: Path, target: Path) -> float:
    """Copy a file to disk -> bytes per second."""
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return source.stat().st_size / seconds


def values(path: Path, name: str) -> Any:
    tensor = open_checkpoint(path).weights[name].part(5)
    return tensor.dequantize() if isinstance(tensor, QTensor) else np.asarray(tensor, np.float32)


def measure(
    benchmark: BenchmarkFixture, source: Path, destination: Path, plan: Callable[[], Plan], exact: bool
) -> None:
    """Time a conversion and a copy of its larger side in turns; note the median of the rates' ratios."""
    file = source / "model.safetensors"
    ratios: list[float] = []

    def convert() -> None:
        made = plan()
        if destination.exists():
            shutil.rmtree(destination)
        start = time.perf_counter()
        assert execute(made, workers=WORKERS)
        seconds = time.perf_counter() - start
        larger = max(file, next(destination.glob("model.*")), key=lambda path: path.stat().st_size)
        ratios.append(larger.stat().st_size / seconds / copy(larger, destination.with_name("copy")))

    benchmark.pedantic(convert, rounds=ROUNDS, warmup_rounds=1)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    before, after = values(source, name), values(destination, name)
    error = np.linalg.norm(before - after) / np.linalg.norm(before)
    assert error == 0 if exact else 0 < error < 0.2
    benchmark.extra_info["of a copy"] = round(statistics.median(ratios[1:]), 2)


@pytest.mark.parametrize("target", ["hf", "original", "gguf", "packed-cpu", "packed-cuda", "bf16"])
def bench_convert(benchmark: BenchmarkFixture, sources: dict[str, Path], tmp_path: Path, target: str) -> None:
    """From Hugging Face's MXFP4 to every layout."""
    source, out = sources["mxfp4"], tmp_path / "out"
    measure(benchmark, source, out, lambda: plan_conversion(open_checkpoint(source), out, target), exact=True)


@pytest.mark.parametrize("search", [False, True], ids=["ocp", "search"])
def bench_quantize(
    benchmark: BenchmarkFixture, sources: dict[str, Path], tmp_path: Path, search: bool
) -> None:
    """From bf16 to MXFP4 experts."""
    source, out = sources["bf16"], tmp_path / "out"

    def plan() -> Plan:
        return plan_quantization(open_checkpoint(source), out, PRESETS["experts"], search=search)

    measure(benchmark, source, out, plan, exact=False)
