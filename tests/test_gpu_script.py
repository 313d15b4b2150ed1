"""`make gpu`, tried without a GPU: over the emulator, with nothing but NumPy and its like to import."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

# What a machine with a GPU need not have, and what no run on the emulator may ask for.
ONLY_NUMPY = """
import sys
for name in "click cupy numba pip pytest rich tiktoken".split():
    sys.modules[name] = None
"""

# Checks of which some fail, end their process, or never end themselves.
BAD_CHECKS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import os, time
from gptoss_lite.kernels.cuda import checks

def passes(rt):
    pass

def fails(rt):
    raise AssertionError("2 of 3 numbers are off\\nand so on")

def ends(rt):
    os.write(2, b"illegal address\\n")
    os.abort()

def hangs(rt):
    time.sleep(1000)

checks.all_checks = lambda: {{
    "one: passes": passes, "one: fails": fails, "one: ends": ends, "one: passes again": passes,
    "two: hangs": hangs, "two: passes": passes,
}}
"""

PARTS = ("facts", "checks", "golden", "ceilings", "kernels", "models", "skipped", "errors", "seconds")
DECODE = {
    "embed", "qkv_decode", "attention_decode", "out_proj_decode", "route", "group", "gate_up_decode",
    "down_decode", "lm_head_decode", "sample", "finish",
}  # fmt: skip
PREFILL = {
    "rms_norm", "linear", "rotate_append", "attention_prefill", "route", "group", "moe_gate_up_prefill",
    "moe_down_prefill", "combine",
}  # fmt: skip


def run(tmp_path: Path, custom: str, *options: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(custom)
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *options],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def emulated(tmp_path: Path, custom: str, *options: str) -> tuple[int, dict[str, Any]]:
    done = run(tmp_path, custom, "--device", "emulated", "--quick", *options)
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, document


def test_every_part_runs_without_a_gpu_on_numpy_alone(tmp_path: Path) -> None:
    options = (
        "--checks",
        "routing: ",
        "--json",
        str(tmp_path / "one.json"),
        "--out",
        str(tmp_path / "results"),
    )
    status, document = emulated(tmp_path, ONLY_NUMPY, *options)
    assert set(PARTS) <= set(document)
    assert not document["errors"]
    assert not document["skipped"]
    assert status == 0
    assert document["ok"]
    assert json.loads((tmp_path / "one.json").read_text()) == document
    assert json.loads((tmp_path / "results" / "gpu.json").read_text()) == document
    assert "golden network" in (tmp_path / "results" / "gpu.txt").read_text()

    checks = document["checks"]
    assert checks["total"] == checks["passed"] == len(checks["results"]) > 10
    assert all(name.startswith("routing: ") for name in (one["name"] for one in checks["results"]))

    (golden,) = document["golden"]
    assert golden["ok"]
    assert 0 < golden["median"] <= 2e-3
    assert golden["decode_replays"] > 3

    assert all(
        document["ceilings"][f"{name}_per_s"] > 0
        for name in ("read_bytes", "copy_bytes", "host_to_device_bytes", "half_flops")
    )
    assert {one["kernel"] for one in document["kernels"] if "batch" in one} == DECODE
    assert {one["kernel"] for one in document["kernels"] if "tokens" in one} == PREFILL
    assert all(one["us"] > 0 for one in document["kernels"])
    assert all(one["of_read"] > 0 for one in document["kernels"] if "bytes_per_s" in one)
    assert all(one["of_half"] > 0 for one in document["kernels"] if "flops_per_s" in one)

    tiny = document["models"]["tiny"]
    decodes = [one for one in tiny if one["what"] == "decode"]
    assert [one["batch"] for one in decodes] == [1, 3]
    for one in decodes:
        assert one["replays"] == one["steps"]
        assert one["different_tokens"] > 1  # it computes something, and not the same for ever
        assert 0 < one["host_us"] <= one["step_us"]
        assert one["replay_us"] > 0
        assert one["bytes_per_step"] > 0
    parts = decodes[0]["account"]
    assert {part["kernel"].split(",")[0] for part in parts} == DECODE - {"group", "sample"}
    assert abs(sum(part["share"] for part in parts) - 1) < 1e-6
    assert all(one["tokens_per_s"] > 0 for one in tiny if one["what"] in ("decode", "prefill"))


def test_a_bad_kernel_hides_no_other(tmp_path: Path) -> None:
    status, document = emulated(tmp_path, BAD_CHECKS, "--only", "checks", "--silence", "4")
    results = {one["name"]: one for one in document["checks"]["results"]}
    assert status == 1
    assert not document["ok"]
    assert {name for name, one in results.items() if one["ok"]} == {
        "one: passes", "one: passes again", "two: passes"
    }  # fmt: skip
    assert results["one: fails"]["error"] == "AssertionError: 2 of 3 numbers are off"
    assert "illegal address" in results["one: ends"]["error"]
    assert results["two: hangs"]["error"] == "no end after 4 s"


def test_what_does_not_fit_the_budget_is_named(tmp_path: Path) -> None:
    # A part is begun with 5 seconds left or more, and the facts alone take some tenths of one.
    _, document = emulated(tmp_path, ONLY_NUMPY, "--checks", "routing: group", "--budget", "5.1")
    assert document["facts"]
    assert {"golden", "ceilings", "kernels", "tiny"} <= set(document["skipped"])


def test_no_gpu_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, ONLY_NUMPY)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("no usable GPU: ")
    assert done.stderr.count("\n") == 1
