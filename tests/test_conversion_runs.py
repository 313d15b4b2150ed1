"""Conversions as processes: killed at random moments, watched for the memory they take, timed on headers."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss_lite.checkpoint import open_checkpoint, save_file
from gptoss_lite.checkpoint.names import names
from gptoss_lite.config import ModelConfig
from gptoss_lite.conversion import journal
from gptoss_lite.errors import CheckpointError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and kills")

COMMAND = [sys.executable, "-c", "from gptoss_lite.cli.main import main; main(prog_name='gptoss-lite')"]
MIB = 1 << 20
# Runs a command and prints the most anonymous memory that it had, in KiB, as its last line.
WATCHED = """
import re, sys, threading, time
from pathlib import Path
from gptoss_lite.cli.main import main
most = 0
def watch():
    global most
    while True:
        found = int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        most = max(most, found)
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
try:
    main(sys.argv[1:])
finally:
    print(most)
"""


def settings(layers: int, experts: int, size: int, vocab: int, *, packed: bool) -> dict[str, Any]:
    """A config.json in gpt-oss's proportions; `size` is both hidden and intermediate."""
    document: dict[str, Any] = {
        "model_type": "gpt_oss", "vocab_size": vocab, "hidden_size": size, "intermediate_size": size,
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "num_local_experts": experts, "num_experts_per_tok": 4, "sliding_window": 128,
        "max_position_embeddings": 131072, "rope_theta": 150000,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
                         "truncate": False},
    }  # fmt: skip
    return document | ({"quantization_config": {"quant_method": "mxfp4"}} if packed else {})


def write_sparse(directory: Path, document: dict[str, Any], floats: str = "BF16") -> Path:
    """Write a checkpoint of holes: it has the size of a real one and takes no disk."""
    width = {"BF16": 2, "F32": 4}[floats]
    directory.mkdir()
    header: dict[str, Any] = {}
    end = 0
    for name in names(ModelConfig.from_dict(document)):
        stored = [(name.name, floats, list(name.shape), width)]
        if name.is_experts and "quantization_config" in document:
            groups = [*name.shape[:-1], name.shape[-1] // 32]
            stored = [
                (f"{name.name}_blocks", "U8", [*groups, 16], 1),
                (f"{name.name}_scales", "U8", groups, 1),
            ]
        elif name.is_experts:
            stored = [(name.name, floats, [name.shape[0], name.shape[2], name.shape[1]], width)]
        for stored_name, dtype, shape, size in stored:
            start, end = end, end + math.prod(shape) * size
            header[stored_name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (directory / "config.json").write_text(json.dumps(document))
    return directory


def write_random(directory: Path, document: dict[str, Any]) -> Path:
    """Write a bf16 checkpoint of random weights."""
    import ml_dtypes

    directory.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for name in names(ModelConfig.from_dict(document)):
        shape = (name.shape[0], name.shape[2], name.shape[1]) if name.is_experts else name.shape
        tensors[name.name] = rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
    save_file(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(document))
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(*arguments: str | Path) -> float:
    """Run a command to its end -> seconds."""
    start = time.monotonic()
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - start


def assert_not_half(partial: Path, whole: dict[str, bytes]) -> None:
    """See that what an interrupted run has left is either not taken for a checkpoint, or all of one."""
    try:
        open_checkpoint(partial)
    except CheckpointError:
        return
    found = contents(partial)
    assert {name: found.get(name) for name in whole} == whole


def kill_and_resume(tmp_path: Path, kills: int, arguments: list[str]) -> tuple[int, int]:
    """Kill a conversion at random moments, let it go on each time, and compare the result.

    Returns how often it was killed, and how often of these in the midst of writing tensors.
    """
    source = write_random(tmp_path / "s", settings(3, 8, 512, 4096, packed=False))
    command, *options = arguments
    run(command, source, tmp_path / "whole", *options)  # compiles, too
    seconds = run(command, source, tmp_path / "again", *options)
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "again") == whole
    moments, killed, amid = random.Random(1), 0, 0
    for number in range(kills):
        out = tmp_path / f"out{number}"
        process = subprocess.Popen(
            [*COMMAND, command, str(source), str(out), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            # From when it has begun to write to its end, as far as one can foresee it.
            begun = out.with_name(f"{out.name}.partial") / journal.NAME
            while process.poll() is None and not begun.exists():
                time.sleep(0.001)
            process.wait(moments.uniform(0, 0.6 * seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        if process.returncode == -signal.SIGKILL:
            killed += 1
            partial = out.with_name(f"{out.name}.partial")
            if partial.exists():
                records = (partial / journal.NAME).read_text().count("\n") - 1
                amid += 0 < records < 3 * 17 + 3
                assert_not_half(partial, whole)
        else:
            assert process.returncode == 0, said
            assert contents(out) == whole
            continue
        run(command, source, out, *options)
        assert contents(out) == whole
        assert not out.with_name(f"{out.name}.partial").exists()
    return killed, amid


@pytest.mark.soak
def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    killed, _ = kill_and_resume(tmp_path, 2, ["quantize", "--preset", "small"])
    assert killed >= 1


@pytest.mark.soak
@pytest.mark.parametrize("command", ["quantize --preset smallest", "convert --to gguf", "convert --to bf16"])
def test_twenty_kills_at_random_moments_do_no_harm(tmp_path: Path, command: str) -> None:
    killed, amid = kill_and_resume(tmp_path, 20, command.split())
    assert killed >= 10
    assert amid >= 3


def most_memory(*arguments: str | Path) -> int:
    """Run a command -> the most anonymous memory it had, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.soak
def test_memory_stays_below_2_gib_whatever_the_size_and_the_source(tmp_path: Path) -> None:
    """One layer of 120b's shapes: memory has nothing to do with how many experts there are, or layers."""

    def bounded(command: str, source: Path, name: str, *options: str) -> Path:
        assert most_memory(command, source, tmp_path / name, *options) < 2048 * MIB, (source, *options)
        return tmp_path / name

    def remove(*paths: Path) -> None:
        subprocess.run(["rm", "-r", *map(str, paths)], check=True)

    packed = write_sparse(tmp_path / "packed", settings(1, 128, 2880, 201088, packed=True))
    for target in ("hf", "bf16", "original", "packed-cpu"):
        remove(bounded("convert", packed, target, "--to", target))
    gguf = bounded("convert", packed, "x.gguf", "--to", "gguf")
    remove(bounded("convert", gguf, "from-gguf", "--to", "bf16"), gguf)
    small = bounded("quantize", packed, "small", "--preset", "small")
    tiles = bounded("convert", small, "tiles", "--to", "packed-cuda")
    remove(bounded("quantize", tiles, "again", "--lm-head", "mxfp4"), tiles, small, packed)
    dense = write_sparse(tmp_path / "dense", settings(1, 128, 2880, 201088, packed=False))
    for preset in ("experts", "smallest"):
        remove(bounded("quantize", dense, preset, "--preset", preset))
    wide = write_sparse(tmp_path / "wide", settings(1, 64, 2880, 201088, packed=False), floats="F32")
    remove(bounded("convert", wide, "narrow", "--to", "bf16"))


@pytest.mark.soak
def test_quantising_one_layer_takes_little_memory(tmp_path: Path) -> None:
    # Two experts of 50 MB in bf16, and what NumPy and Numba are.
    dense = write_sparse(tmp_path / "dense", settings(1, 16, 2880, 4096, packed=False))
    assert most_memory("quantize", dense, tmp_path / "x") < 500 * MIB


def test_inspecting_120b_reads_headers_alone(tmp_path: Path) -> None:
    source = write_sparse(tmp_path / "120b", settings(36, 128, 2880, 201088, packed=True))
    assert (source / "model.safetensors").stat().st_size > 65e9
    assert run("inspect", source, "--device-memory", "80GB", "--json") < 5  # about 0.6 s, of them 0.4 imports
    assert os.stat(source / "model.safetensors").st_blocks * 512 < MIB
