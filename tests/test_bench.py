"""`gptoss-lite bench`: figures that agree with one another, bytes counted twice, refusals, one document."""

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, Self

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from gptoss_lite import benchmark, footprint, machine, measure
from gptoss_lite.benchmark import Report, run, scaled, to_json
from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.cli import progress
from gptoss_lite.cli.main import main
from gptoss_lite.cli.options import model_options
from gptoss_lite.engine import Engine, Request, TokenEvent
from gptoss_lite.errors import DeviceError, OutOfMemoryError, RequestError
from gptoss_lite.footprint import Limits, Need, host_need, model_bytes, require_room, step_bytes
from gptoss_lite.hub import DEMO
from gptoss_lite.measure import WARM_UP_STEPS, MeasuredEngine, Workload, measure_decode, measure_prefill
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.packing import CPU_TILES
from gptoss_lite.sampling import SamplingParams
from gptoss_lite.synthetic import NETWORKS, synthetic
from gptoss_lite.yardstick import DeviceYardstick, HostYardstick

MIB = 1 << 20
SMALL = Workload(prompt_tokens=40, tokens=5, repeat=2)
LAYERS_AND_ALL = {"layers", "whole_layers"}


@pytest.fixture(scope="module", params=["cpu", "reference"])
def report(request: pytest.FixtureRequest) -> Report:
    """The demo's shape, two of its layers, measured on each device of main memory."""
    return run(synthetic("demo", layers=2), SMALL, request.param, yardstick_bytes=4 * MIB)


@pytest.fixture(scope="module")
def reference() -> GptOss:
    return GptOss(synthetic("demo"), get_ops("reference"))


# What the demo's shape takes, worked out here.

HIDDEN, VOCAB, QUERIES, KEYS, EXPERTS, CHOSEN = 192, 4096, 512, 64, 8, 4
ATTENTION = (
    2 * ((QUERIES + 2 * KEYS) * HIDDEN + HIDDEN * QUERIES)  # bf16
    + 4 * (QUERIES + 2 * KEYS + HIDDEN + 8 + HIDDEN)  # biases, sinks and the norm, float32
)
ROUTER = 2 * EXPERTS * HIDDEN + 4 * (EXPERTS + HIDDEN)
EXPERT = (2 * HIDDEN * HIDDEN + HIDDEN * HIDDEN) * 17 // 32 + 4 * (2 * HIDDEN + HIDDEN)
LM_HEAD = 2 * VOCAB * HIDDEN + 4 * HIDDEN
KV_ITEM = {"cpu": 2, "reference": 4}
VISIBLE = 40 + WARM_UP_STEPS + 3  # of the middle one of five steps


def token_bytes(layers: int, device: str) -> int:
    kv = layers * VISIBLE * 2 * KEYS * KV_ITEM[device]
    return layers * (ATTENTION + ROUTER + CHOSEN * EXPERT) + LM_HEAD + kv


def test_bytes_of_a_token_are_those_counted_by_hand(report: Report) -> None:
    step, device = report.figures.step_bytes, report.device.name
    assert step.attention == 2 * ATTENTION
    assert step.routers == 2 * ROUTER
    assert step.experts == 2 * CHOSEN * EXPERT
    assert step.lm_head == LM_HEAD
    assert step.keys_and_values == 2 * VISIBLE * 2 * KEYS * KV_ITEM[device]
    assert step.total == report.figures.bytes_per_token == token_bytes(2, device)
    assert report.load.weight_bytes == (
        2 * (ATTENTION + ROUTER + EXPERTS * EXPERT) + LM_HEAD + 2 * VOCAB * HIDDEN
    )


def test_figures_agree_with_one_another(report: Report) -> None:
    figures, repetitions = report.figures, report.repetitions
    assert len(repetitions) == SMALL.repeat
    for one in (*repetitions, *report.rest):
        assert one.prefill.tokens == SMALL.prompt_tokens
        assert one.prefill.tokens_per_s == SMALL.prompt_tokens / one.prefill.seconds
        assert len(one.decode.step_seconds) == SMALL.tokens
        assert one.decode.median_step_seconds == median(one.decode.step_seconds)
        assert one.decode.tokens_per_s == 1 / one.decode.median_step_seconds
        assert one.decode.context == SMALL.prompt_tokens
        assert one.decode.filled == "by prefill"
    steps = [seconds for one in repetitions for seconds in one.decode.step_seconds]
    assert figures.step_seconds == median(steps) > 0
    assert figures.decode_tokens_per_s == 1 / figures.step_seconds
    assert figures.first_token_seconds == median(one.prefill.seconds for one in repetitions) > 0
    assert figures.prefill_tokens_per_s == SMALL.prompt_tokens / figures.first_token_seconds
    assert len(report.readings.rates) == SMALL.repeat + 1
    assert report.readings.median == median(report.readings.rates) > 0
    assert report.readings.nbytes == 4 * MIB
    share = figures.bytes_per_token * figures.decode_tokens_per_s / report.readings.median
    assert math.isclose(figures.read_share, share)


def test_an_estimate_scales_the_layers_and_keeps_the_rest(report: Report) -> None:
    estimate, figures, rest = report.estimate, report.figures, report.rest
    assert estimate is not None
    assert (report.layers, report.whole_layers, len(rest)) == (2, 4, SMALL.repeat)
    bare_step = median(seconds for one in rest for seconds in one.decode.step_seconds)
    bare_prefill = median(one.prefill.seconds for one in rest)
    # A busy machine may have held up the smaller network more than the larger.
    step = bare_step + 2 * max(0, figures.step_seconds - bare_step)
    assert math.isclose(estimate.step_seconds, step)
    prefill = bare_prefill + 2 * max(0, figures.first_token_seconds - bare_prefill)
    assert math.isclose(estimate.first_token_seconds, prefill)
    assert math.isclose(estimate.prefill_tokens_per_s, SMALL.prompt_tokens / prefill)
    assert math.isclose(estimate.decode_tokens_per_s, 1 / estimate.step_seconds)
    assert estimate.step_bytes.total == token_bytes(4, report.device.name)


def test_scaling() -> None:
    assert scaled(7.0, 1.0, 4) == 25.0
    assert scaled(1.0, 2.0, 4) == 2.0  # a layer takes no less than nothing


def test_a_whole_network_needs_no_estimate() -> None:
    found = run(synthetic("demo"), replace(SMALL, tokens=1, repeat=1), "reference", yardstick_bytes=MIB)
    assert found.estimate is None
    assert found.rest == ()
    assert found.layers == found.whole_layers == 4
    assert not found.load.mapped_bytes


def keys(value: Any, prefix: str = "") -> set[str]:
    """Name every place of a document, those of a list by its first element."""
    match value:
        case dict():
            return {name for key, one in value.items() for name in keys(one, f"{prefix}.{key}")}
        case [first, *_]:
            return keys(first, f"{prefix}[]")
    return {prefix.removeprefix(".")}


FIGURES = {
    "prefill_tokens_per_s", "first_token_seconds", "step_seconds", "decode_tokens_per_s", "bytes_per_token",
    "read_share", *(f"step_bytes.{part}" for part in (
        "attention", "routers", "experts", "lm_head", "keys_and_values", "total",
    )),
}  # fmt: skip
REPETITION = {
    *(f"prefill.{name}" for name in ("tokens", "seconds", "tokens_per_s")),
    *(f"decode.{name}" for name in (
        "sequences", "context", "filled", "step_seconds[]", "median_step_seconds", "tokens_per_s",
    )),
}  # fmt: skip
DOCUMENT = {
    "schema", "version", "model", "is_synthetic", "layers", "whole_layers", "warm_up_seconds",
    *(f"config.{name}" for name in asdict(NETWORKS["demo"]) if name not in ("rope", "layer_types")),
    "config.layer_types[]", *(f"config.rope.{name}" for name in asdict(NETWORKS["demo"].rope)),
    *(f"workload.{name}" for name in (
        "prompt_tokens", "tokens", "context", "concurrency", "repeat", "seed",
    )),
    *(f"device.{name}" for name in ("name", "threads", "isa", "arch")),
    "options.threads",
    *(f"machine.{name}" for name in ("system", "processor", "cores")),
    *(f"machine.versions.{name}" for name in ("python", "numpy", "numba", "llvmlite", "ml_dtypes")),
    *(f"load.{name}" for name in (
        "seconds", "making_seconds", "checkpoint_bytes", "weight_bytes", "mapped_bytes",
    )),
    *(f"memory.needed.{name}" for name in ("weights", "keys_and_values", "scratch")),
    *(f"memory.{name}" for name in ("free", "peak", "cache_tokens")),
    *(f"readings.{name}" for name in ("nbytes", "rates[]", "median")),
    *(f"{part}.{name}" for part in ("figures", "estimate") for name in FIGURES),
    *(f"{part}[].{name}" for part in ("repetitions", "rest") for name in REPETITION),
}  # fmt: skip


def test_the_document_has_all_of_it_and_stays_as_it_is() -> None:
    found = run(synthetic("demo", layers=1), replace(SMALL, tokens=1), "cpu", yardstick_bytes=MIB, threads=1)
    document = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert document["schema"] == 1
    found_keys = {key for key in keys(document) if not key.startswith("machine.versions.cupy")}
    assert found_keys == DOCUMENT
    assert document["device"]["threads"] == document["options"]["threads"] == 1
    assert document["device"]["isa"]
    assert document["machine"]["versions"]["numpy"] == np.__version__


def test_several_sequences_share_the_reading_of_weights(reference: GptOss) -> None:
    workload = replace(SMALL, concurrency=3, repeat=1)
    engine = MeasuredEngine(reference, workload)
    decode = measure.repetition(engine, workload, 1).decode
    assert decode.sequences == 3
    assert decode.tokens_per_s == 3 / decode.median_step_seconds
    one, three = (
        step_bytes(reference, sequences=count, visible=decode.visible, kv_itemsize=4) for count in (1, 3)
    )
    assert (three.attention, three.lm_head) == (one.attention, one.lm_head)
    assert three.keys_and_values == 3 * one.keys_and_values
    assert math.isclose(three.experts, one.experts * (1 - 0.5**3) / 0.5)  # half of all are chosen by each


def test_sliding_layers_read_their_window(reference: GptOss) -> None:
    item = 2 * KEYS * 4
    found = step_bytes(reference, sequences=1, visible=1000, kv_itemsize=4)
    assert found.keys_and_values == item * 2 * (1000 + 128)


def cached_tokens(engine: Engine, prompt: list[int]) -> int:
    engine.submit(Request(prompt, SamplingParams(), 0, 1))
    while engine.has_work:
        for event in engine.step():
            return event.cached_tokens
    raise AssertionError("no token came")


@pytest.mark.parametrize("device", ["cpu", "reference"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 700])
def test_an_assumed_prompt_is_in_the_cache(device: str, length: int) -> None:
    model = GptOss(synthetic("demo", layers=2), get_ops(device))
    engine = MeasuredEngine(model, Workload(context=length, concurrency=2))
    prompts = [np.random.default_rng(i).integers(0, VOCAB, length).tolist() for i in range(2)]
    for prompt in prompts:
        engine.assume(prompt)
    for prompt in prompts:
        assert cached_tokens(engine, prompt) == (length - 1) // 16 * 16


def test_assumed_keys_and_values_are_random_numbers(reference: GptOss) -> None:
    engine = MeasuredEngine(reference, SMALL)
    engine.assume(list(range(40)))
    for array in (*engine._cache.keys, *engine._cache.values):
        assert np.isfinite(array).all()
        assert 0.7 < np.sqrt(np.mean(array**2)) < 0.8
        assert abs(array.mean()) < 0.02


def test_a_context_that_takes_long_is_assumed_and_told(
    reference: GptOss, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = replace(SMALL, context=300, concurrency=2, repeat=1)
    assert measure.repetition(MeasuredEngine(reference, workload), workload, 1).decode.filled == "by prefill"
    monkeypatch.setattr(measure, "PATIENCE", 0.0)
    decode = measure.repetition(MeasuredEngine(reference, workload), workload, 1).decode
    assert (decode.filled, decode.context, len(decode.step_seconds)) == ("at random", 300, 5)


def test_steps_are_those_after_the_context_and_the_warm_up(reference: GptOss) -> None:
    engine = MeasuredEngine(reference, SMALL)
    prompt = list(range(100, 140))
    measure_prefill(engine, prompt)
    lengths: list[int] = []
    step = engine.step

    def noted() -> Any:
        events = step()
        lengths.append(engine.computed(1))
        return events

    engine.step = noted  # type: ignore[method-assign]
    decode = measure_decode(engine, [prompt], 5)
    assert lengths == [40 + i for i in range(1 + WARM_UP_STEPS + 5)]
    assert decode.visible == median(lengths[-5:])
    assert not engine.has_work


def test_no_prompt_is_known_to_the_cache_before_it_is_timed(reference: GptOss) -> None:
    workload = replace(SMALL, concurrency=2, tokens=1)
    engine = MeasuredEngine(reference, workload)
    events: list[TokenEvent] = []
    step = engine.step

    def noted() -> list[TokenEvent]:
        found = step()
        events.extend(found)
        return found

    engine.step = noted  # type: ignore[method-assign]
    prefills = []
    for number in (1, 2):
        before = len(events)
        measure.repetition(engine, workload, number)
        # A prompt, the other's context, and then both: their beginnings are known.
        prefills += events[before : before + 2]
        assert [event.cached_tokens for event in events[before + 2 : before + 4]] == [32, 32]
    assert [event.cached_tokens for event in prefills] == [0] * 4
    assert all(event.finish_reason == "length" for event in prefills)  # one token each


def test_a_failing_token_is_an_error(reference: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = MeasuredEngine(reference, SMALL)
    monkeypatch.setattr(reference.ops, "run", lambda *_: np.full((1, VOCAB), np.nan, np.float32))
    with pytest.raises(Exception, match="not finite"):
        measure_prefill(engine, list(range(20)))


@pytest.mark.parametrize(
    ("workload", "needed"),
    [
        (Workload(prompt_tokens=512, tokens=64), 624),  # 512 + 4 + 64 + 32 to spare, in blocks
        (Workload(prompt_tokens=512, tokens=64, context=16), 528),
        (Workload(prompt_tokens=16, tokens=64, context=4096, concurrency=4), 4 * 4208),
    ],
)
def test_the_cache_is_as_large_as_the_run_needs(workload: Workload, needed: int) -> None:
    assert workload.cache_tokens == needed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"tokens": -1}, "tokens is -1"),
        ({"context": 0}, "context is 0"),
        ({"repeat": 0}, "repeat is 0"),
        ({"concurrency": 257}, "concurrency is 257: give 1 to 256"),
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(options: dict[str, int], text: str) -> None:
    with pytest.raises(RequestError, match=text):
        Workload(**options)


def test_a_context_beyond_the_models_is_refused() -> None:
    config = NETWORKS["demo"]
    most = config.max_position_embeddings - WARM_UP_STEPS - 32 - 64
    Workload(context=most).check(config)
    for workload in (Workload(context=most + 1), Workload(prompt_tokens=config.max_position_embeddings)):
        with pytest.raises(RequestError, match="beyond the model's context of 131072"):
            workload.check(config)


# Memory.


@pytest.mark.parametrize("free_layers", [3, 1, 0])
def test_what_does_not_fit_is_refused_before_anything_is_made(
    free_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, ops = synthetic("20b"), get_ops("cpu")
    limits = Limits(SMALL.cache_tokens, 1, 1 << 30)
    least = host_need(synthetic("20b", layers=max(1, free_layers)), ops, limits).total
    monkeypatch.setattr(footprint, "free_memory", lambda: least if free_layers else least - 1)
    with pytest.raises(OutOfMemoryError) as caught:
        run(checkpoint, SMALL, "cpu")
    text = str(caught.value)
    assert "\n" not in text
    assert "synthetic-20b-24-layers-seed-0 needs 1" in text
    assert all(word in text for word in ("weights 12.9 GiB", "keys and values", "scratch", "are free: "))
    advice = f"--layers {free_layers} would fit" if free_layers else "even --layers 1 takes 3.8 GiB"
    assert text.endswith(f" free: {advice}")
    assert checkpoint.clock.seconds == 0


def test_keys_and_values_and_scratch_must_fit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, ops, limits = synthetic("demo"), get_ops("cpu"), Limits(1 << 20, 1, 0)
    need = host_need(checkpoint, ops, limits)
    assert need.total == need.weights + need.keys_and_values + need.scratch
    assert need.keys_and_values > (1 << 20) * 2 * 2 * KEYS * 2  # full layers, keys and values, bf16
    for free, fits in ((need.total, True), (need.total - 1, False)):
        monkeypatch.setattr(footprint, "free_memory", lambda free=free: free)
        if fits:
            assert require_room(checkpoint, ops, limits) == (need, free)
        else:
            with pytest.raises(OutOfMemoryError):
                require_room(checkpoint, ops, limits)


def test_what_is_needed_depends_on_the_device() -> None:
    checkpoint, limits = synthetic("20b", layers=2), Limits(1024, 1, 1 << 20)
    cpu, reference = (host_need(checkpoint, get_ops(device), limits) for device in ("cpu", "reference"))
    assert reference.keys_and_values == 2 * cpu.keys_and_values  # float32
    assert reference.scratch - cpu.scratch > 1 << 30  # lm_head in float32
    gpu: Any = SimpleNamespace(name="cuda")
    assert host_need(checkpoint, gpu, limits, pinned=7) == Need(7, 0, 2 * 201_088 * 2880)
    tiled = replace(checkpoint, layout=CPU_TILES)
    assert host_need(tiled, get_ops("cpu"), limits) == replace(cpu, weights=0)
    assert host_need(tiled, get_ops("reference"), limits) == reference


def test_a_checkpoint_that_does_not_fit_is_refused_with_other_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_memory", lambda: MIB)
    with pytest.raises(OutOfMemoryError, match="convert --to packed-cpu"):
        run(open_checkpoint(DEMO), SMALL, "cpu")


def test_memory_that_is_not_known_is_taken_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "free_memory", lambda: None)
    found = run(
        synthetic("demo", layers=1), replace(SMALL, tokens=1, repeat=1), "reference", yardstick_bytes=MIB
    )
    assert found.memory.free is None


def test_what_is_expected_of_weights_is_what_they_take(report: Report) -> None:
    needed = report.memory.needed.weights
    assert abs(needed - report.load.weight_bytes) < 0.01 * needed
    assert report.memory.needed.keys_and_values > 0
    assert report.memory.needed.scratch > 4 * MIB


def test_weights_that_are_quantised_while_loading_are_expected_and_read_so(report: Report) -> None:
    quick = replace(SMALL, tokens=1, repeat=1)
    found = run(synthetic("demo", layers=2), quick, "cpu", yardstick_bytes=MIB, dense="int8")
    step, dense = found.figures.step_bytes, report.figures.step_bytes
    assert step.lm_head - 4 * HIDDEN == (dense.lm_head - 4 * HIDDEN) * 17 / 32
    assert step.attention < 0.54 * dense.attention
    assert abs(found.memory.needed.weights - found.load.weight_bytes) < 0.01 * found.load.weight_bytes


def test_weights_that_a_file_has_are_told_apart(tiny_path: Path) -> None:
    mapped = GptOss(open_checkpoint(tiny_path), get_ops("reference"))
    held, of_file = model_bytes(mapped)
    assert 0 < of_file < held
    assert model_bytes(GptOss(synthetic("demo", layers=1), get_ops("reference")))[1] == 0


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Put files in the place of the system's, by their names under /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


MEMINFO = "MemTotal:       16000 kB\nMemFree:         1000 kB\nMemAvailable:    9000 kB\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"proc/meminfo": MEMINFO}, 9000 * 1024),
        ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"}, 9000 * 1024),
        (
            {
                "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "cgroup/memory.max": "5000000\n",
                "cgroup/memory.current": "1000000\n", "cgroup/memory.stat": "anon 7\ninactive_file 300\n",
            },
            4_000_300,
        ),
        (  # no limit on its own group, but one around it
            {
                "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b\n", "cgroup/a/b/memory.max": "max\n",
                "cgroup/a/b/memory.current": "1\n", "cgroup/a/memory.max": "4096\n",
                "cgroup/a/memory.current": "96\n",
            },
            4000,
        ),
        (  # more taken than the limit
            {
                "proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", "cgroup/memory.max": "5\n",
                "cgroup/memory.current": "10\n",
            },
            0,
        ),
        (  # version 1, where some groups have nothing to do with memory
            {
                "proc/meminfo": MEMINFO, "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/y\n0::/\n",
                "cgroup/memory/y/memory.limit_in_bytes": "8000\n",
                "cgroup/memory/y/memory.usage_in_bytes": "1000\n",
                "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cgroup/memory/memory.usage_in_bytes": "50000\n",
            },
            7000,
        ),
        ({}, None),
    ],
)  # fmt: skip
def test_free_memory_is_the_least_of_all_limits(
    files: dict[str, str], free: int | None, system: Callable[[dict[str, str]], None]
) -> None:
    system(files)
    assert machine.free_memory() == free


def test_free_memory_of_a_mac_is_read_from_vm_stat(
    system: Callable[[dict[str, str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                3.
Pages active:                            900.
Pages inactive:                           20.
Pages speculative:                       100.
Pages purgeable:                           0.
"""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_output", lambda *_: text)
    assert machine.free_memory() == 123 * 16384
    monkeypatch.setattr(machine, "_output", lambda *_: "")
    assert machine.free_memory() is None


def test_a_peak_is_this_process_own(system: Callable[[dict[str, str]], None]) -> None:
    system({"proc/self/status": "VmPeak:\t 9000 kB\nVmHWM:\t    5000 kB\nVmRSS:\t 4000 kB\n"})
    assert machine.peak_memory() == 5000 * 1024


def test_this_machine_is_described() -> None:
    free, peak = machine.free_memory(), machine.peak_memory()
    assert free is None or free > 0
    assert peak is None or 10 * MIB < peak < 1 << 40
    assert machine.cores() >= 1
    assert machine.processor()


# The yardstick.


def test_a_plain_read_is_timed_and_its_sum_checked() -> None:
    yardstick = HostYardstick(3 * MIB + 8, threads=1)  # the last part is a short one
    assert yardstick.nbytes == 3 * MIB + 8
    assert yardstick.rate() > 0
    yardstick._total += 1
    with pytest.raises(DeviceError, match="the read kernel added up"):
        yardstick.rate()


def test_a_device_is_read_by_its_own_kernel(needs_compiler: None) -> None:
    from gptoss_lite.kernels.emulator.runtime import Emulator

    yardstick = DeviceYardstick(MIB, Emulator())
    assert yardstick.rate() > 0
    yardstick._total ^= 1
    with pytest.raises(DeviceError, match="the read kernel added up"):
        yardstick.rate()


# The command.


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments])


@pytest.fixture
def small_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "run", functools.partial(run, yardstick_bytes=MIB))


QUICK = ["--prompt-tokens", "20", "--tokens", "2", "--repeat", "2", "--device", "reference"]


@pytest.mark.usefixtures("small_yardstick")
def test_people_get_a_table() -> None:
    result = command("--synthetic", "demo", "--layers", "1", "--concurrency", "2", *QUICK)
    assert (result.exit_code, result.stderr) == (0, "")
    text = result.stdout
    for part in (
        "model:   synthetic-demo-1-layers-seed-0, 1 of 4 layers\n",
        "device:  reference\n",
        "estimate for 4 layers",
        "prefill of 20 tokens ",
        "decode after 20 tokens, 2 sequences in all ",
        "share of the reading rate ",
        "Estimate: each of 4 layers is taken to cost what these 1 did on average",
    ):
        assert part in text
    assert "random numbers" not in text


@pytest.mark.usefixtures("small_yardstick")
def test_the_bundled_model_is_measured_by_default_and_its_pages_are_told() -> None:
    result = command(*QUICK)
    assert result.exit_code == 0
    assert f"model:   {DEMO}\n" in result.stdout
    assert "pages of the mapped file included" in result.stdout
    assert "stimate" not in result.stdout


@pytest.mark.usefixtures("small_yardstick")
def test_one_bar_follows_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Bar(progress.Bar):
        def __enter__(self) -> Self:
            told.append(f"begin {self._label.split()[0]}")
            return self

        def advance(self, done: int, total: int) -> None:
            told.append((self._label.split()[0], done == total))

        def close(self) -> None:
            told.append(f"end {self._label.split()[0]}")

    monkeypatch.setattr("gptoss_lite.cli.bench.Bar", Bar)
    command("--synthetic", "demo", "--layers", "1", *QUICK)
    loading = told.index("end Loading")
    assert told[0] == "begin Loading"
    assert told[loading - 1] == ("Loading", True)
    assert told[loading + 1 : loading + 5] == [
        "begin Measuring", ("Measuring", False), ("Measuring", False), ("Measuring", True)
    ]  # fmt: skip


@pytest.mark.usefixtures("small_yardstick")
def test_random_keys_and_values_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PATIENCE", 0.0)
    result = command("demo", "--context", "100", *QUICK)
    assert "decode after 100 tokens" in result.stdout
    assert "keys and values were random numbers" in result.stdout


# The command with a yardstick that is not small.
COMMAND = """
from functools import partial
from gptoss_lite import benchmark
from gptoss_lite.cli import progress
from gptoss_lite.cli.main import main
benchmark.run = partial(benchmark.run, yardstick_bytes=3 << 27)
main(prog_name="gptoss-lite")
"""


def test_programs_get_one_document_and_a_peak_without_the_yardstick() -> None:
    arguments = ["bench", "--synthetic", "demo", "--json", *QUICK]
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["workload"]["prompt_tokens"] == 20
    assert document["readings"]["nbytes"] == 3 << 27
    assert document["memory"]["peak"] is None or 20 * MIB < document["memory"]["peak"] < 3 << 27


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["demo", "--synthetic", "demo"], 2, "--synthetic demo is a model already: leave demo out"),
        (["--layers", "1"], 2, "--layers are those of --synthetic: give both"),
        (["demo", "--layers", "1"], 2, "--layers are those of --synthetic"),
        (["--synthetic", "7b"], 2, "'7b' is not one of"),
        (["--tokens", "-1"], 2, "x>=1"),
        (["--repeat", "0"], 2, "x>=1"),
        (["--concurrency", "1000"], 2, "1<=x<=256"),
        (["--device", "abacus"], 2, "'abacus' is not one of"),
        (["--cache-tokens", "9"], 2, "No such option"),
        (["--synthetic", "demo", "--layers", "5"], 1, "layers is 5: demo has 1 to 4"),
        (["--context", "200000", "--device", "cpu"], 1, "beyond the model's context of 131072"),
        (["/no/such/folder"], 1, "/no/such/folder"),
    ],
)
def test_nonsense_is_refused_in_one_line(arguments: list[str], code: int, text: str) -> None:
    result = command(*arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert text in result.stderr.splitlines()[-1]
    assert code == 2 or result.stderr.count("\n") == 1


def test_options_to_load_with_are_those_of_the_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def noted(checkpoint: Any, workload: Any, device: str, **options: Any) -> None:
        given.update(options, device=device, workload=workload)
        raise RequestError("noted")

    monkeypatch.setattr(benchmark, "run", noted)
    command("--device", "reference", "--threads", "1", "--device-memory", "1KB", "--seed", "3")
    shared = click.command("load")(model_options(lambda load_model: None)).params
    names = {option.name for option in shared} - {"model", "cache_tokens"}
    assert given.keys() == names | {"workload", "progress", "measured"}
    assert (given["device"], given["threads"], given["device_memory"]) == ("reference", 1, 1024)
    assert given["workload"].seed == 3
