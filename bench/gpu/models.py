"""Whole networks through the real path: a small one against transformers, large ones against the clock."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.gpu.device import Device, Result, first_line, median
from bench.gpu.timing import network
from gptoss_lite.checkpoint import Checkpoint, open_checkpoint
from gptoss_lite.config import ModelConfig
from gptoss_lite.engine import Engine, Request, TokenEvent
from gptoss_lite.errors import OutOfMemoryError
from gptoss_lite.footprint import step_bytes
from gptoss_lite.kernels.cuda.runtime import Runtime
from gptoss_lite.memory import Plan, make_plan
from gptoss_lite.model import GptOss
from gptoss_lite.ops.cuda import CUDAOps
from gptoss_lite.sampling import SamplingParams
from gptoss_lite.synthetic import synthetic

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "data" / "checkpoints" / "tiny"
GREEDY = SamplingParams(temperature=0.0)
# What the CUDA path may be off from transformers in float32: fp16 operands, bf16 keys and values, near-ties
# of the router that flip.
MEDIAN, P90, FAR, FAR_SHARE = 2e-3, 1e-2, 0.1, 0.05
CLEAR_GAP = 0.1  # between the best two logits: below it either may win


@dataclass(slots=True)
class Watch:
    """What a runtime was asked for: the last recording replayed, and the time spent waiting for results."""

    recording: Any = None
    replays: int = 0
    waited: float = 0.0


@contextmanager
def watched(runtime: Runtime) -> Iterator[Watch]:
    """Note what passes through a runtime's `replay` and `fetch`."""
    watch = Watch()
    handle: Any = runtime
    replay, fetch = handle.replay, handle.fetch

    def watched_replay(recording: Any) -> None:
        watch.recording, watch.replays = recording, watch.replays + 1
        replay(recording)

    def watched_fetch(array: Any) -> Callable[[], Any]:
        results = fetch(array)

        def wait() -> Any:
            start = time.perf_counter()
            found = results()
            watch.waited += time.perf_counter() - start
            return found

        return wait

    handle.replay, handle.fetch = watched_replay, watched_fetch
    try:
        yield watch
    finally:
        del handle.replay, handle.fetch


def golden(device: Device, quick: bool) -> Iterator[Result]:
    """Hold every layout of the golden network against logits of transformers, decode against prefill."""
    with np.load(GOLDEN / "reference.npz") as file:
        reference = dict(file)
    layouts = sorted(path.parent for path in GOLDEN.glob("*/config.json"))
    for layout in [GOLDEN / "mxfp4"] if quick else layouts:
        yield {"layout": layout.name} | _golden(device, layout, reference, quick)


def _golden(device: Device, layout: Path, reference: dict[str, Any], quick: bool) -> Result:
    start = time.perf_counter()
    model = GptOss(open_checkpoint(layout), CUDAOps(device.runtime), cache_tokens=8192)
    errors, prompts = [], []
    for key, want in reference.items():
        if key.startswith("logits_"):
            prompt = reference[key.replace("logits", "tokens")].tolist()
            if len(prompt) < 10 or not quick:
                prompts.append(len(prompt))
                errors += _row_errors(model.logits(prompt, last=len(want)), want)
    prompt, greedy = reference["tokens_7"].tolist(), reference["greedy_7"].tolist()
    best = model.logits(prompt + greedy[:-1], last=len(greedy)).argmax(axis=1)
    clear = reference["greedy_gap"] > CLEAR_GAP
    result: Result = {
        "prompts": prompts, "rows": len(errors), "median": float(np.median(errors)),
        "p90": float(np.quantile(errors, 0.9)), "far_share": float(np.mean(np.array(errors) > FAR)),
        "greedy_rows": int(clear.sum()), "greedy_wrong": int((best != np.array(greedy))[clear].sum()),
    }  # fmt: skip
    result |= _decode_against_prefill(device, model, prompt, 8 if quick else len(greedy))
    result["ok"] = (
        result["median"] <= MEDIAN and result["p90"] <= P90 and result["far_share"] <= FAR_SHARE
        and not result["greedy_wrong"] and result["decode_median"] <= MEDIAN
        and result["decode_far_share"] <= FAR_SHARE and result["runs_ahead_alike"]
    )  # fmt: skip
    return result | {"seconds": time.perf_counter() - start}


def _row_errors(got: Any, want: Any) -> list[float]:
    errors: list[float] = (np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).tolist()
    return errors


def _decode_against_prefill(device: Device, model: GptOss, prompt: list[int], count: int) -> Result:
    """Generate token by token, from recordings; then compute the same tokens at once, as a prompt."""
    decoded: list[Any] = []

    def keep(tokens: Sequence[int], logits: Any) -> Any:
        decoded.append(np.array(logits))
        return logits

    watching = SamplingParams(temperature=0.0, logits_processors=[keep])
    with watched(device.runtime) as watch:
        tokens = _generate(model, prompt, count, watching)
        replays = watch.replays
    errors = _row_errors(np.stack(decoded), model.logits(prompt + tokens[:-1], last=count))
    return {
        "decode_rows": len(errors), "decode_replays": replays, "decode_median": float(np.median(errors)),
        "decode_worst": max(errors), "decode_far_share": float(np.mean(np.array(errors) > FAR)),
        # Drawn on the device, each step begun before the last token is known: the same tokens.
        "runs_ahead_alike": _generate(model, prompt, count, GREEDY) == tokens,
    }  # fmt: skip


def _generate(model: GptOss, prompt: list[int], count: int, params: SamplingParams) -> list[int]:
    engine = Engine(model, max_sequences=2, cache_tokens=1024)
    engine.submit(Request(prompt, params, 0, count))
    tokens = []
    while engine.has_work:
        for event in engine.step():
            tokens.append(_token(event))
    return tokens


def _token(event: TokenEvent) -> int:
    if event.sampled is None:
        raise event.error or RuntimeError("a token was neither drawn nor refused")
    return event.sampled.token


@dataclass(frozen=True, slots=True)
class Load:
    """What to run on a model: (sequences, context) of decode, prompts of prefill, and how long."""

    cache_tokens: int
    decodes: tuple[tuple[int, int], ...]
    prefills: tuple[int, ...]
    steps: int


LOADS = {
    "20b": Load(40_960, ((1, 120), (1, 4096), (8, 120), (16, 120), (1, 32_768)), (2048, 8192), 100),
    "120b": Load(16_384, ((1, 120), (1, 4096), (8, 120), (16, 120)), (2048, 8192), 100),
    "tiny": Load(2048, ((1, 20), (3, 20)), (70,), 4),
}


def plan_of(device: Device, checkpoint: Checkpoint, cache_tokens: int) -> Plan:
    """Make the plan that loading will make; raises OutOfMemoryError."""
    free, _ = device.runtime.memory()
    return make_plan(
        checkpoint.config, checkpoint.forms(), device_bytes=free, cache_tokens=cache_tokens,
        step_tokens=CUDAOps.step_tokens,
    )  # fmt: skip


def full_size(device: Device, name: str) -> Iterator[Result]:
    """Load a model of random weights and time it; each result says what of."""
    config, load = network(name), LOADS[name]
    checkpoint = synthetic(config)
    before = device.used_bytes()
    try:
        plan = plan_of(device, checkpoint, load.cache_tokens)
    except OutOfMemoryError as error:
        yield {"what": "skipped", "reason": first_line(error)}
        return
    if plan.host_layers:
        yield {"what": "skipped", "reason": f"{plan.host_layers} of its layers would not fit the device"}
        return
    start = time.perf_counter()
    model = GptOss(checkpoint, CUDAOps(device.runtime), cache_tokens=load.cache_tokens)
    device.runtime.synchronize()
    seconds, made = time.perf_counter() - start, checkpoint.clock.seconds
    yield {
        "what": "load", "made_seconds": made, "load_seconds": seconds - made,
        "checkpoint_bytes": checkpoint.nbytes, "plan_device_bytes": plan.device_bytes,
        "embedding_on_host": plan.host_embedding,
    }  # fmt: skip
    engine = Engine(model)
    prompts = _prompts(config)
    (batch, context), *others = load.decodes
    yield _decode(device, engine, prompts, batch, context, load.steps)
    for tokens in load.prefills:
        yield _prefill(device, engine, prompts, tokens, model.ops.step_tokens)
    for batch, context in others:
        yield _decode(device, engine, prompts, batch, context, load.steps)
    yield {
        "what": "memory", "used_bytes": max(0, device.used_bytes() - before),
        "plan_device_bytes": plan.device_bytes,
    }  # fmt: skip


def _prompts(config: ModelConfig) -> Callable[[int], list[int]]:
    """Return what makes a prompt of so many tokens that begins like no other."""
    rng = np.random.default_rng(1)
    return lambda tokens: rng.integers(0, config.vocab_size, tokens).tolist()


def _submit(engine: Engine, prompt: list[int], seed: int, max_tokens: int) -> int:
    return engine.submit(Request(prompt, SamplingParams(), seed, max_tokens))


def _prefill(
    device: Device, engine: Engine, prompts: Callable[[int], list[int]], tokens: int, step_tokens: int
) -> Result:
    """Time a prompt up to its first token, through the engine."""
    times = []
    for seed in range(4):
        _submit(engine, prompts(tokens), seed, 1)
        device.runtime.synchronize()
        start = time.perf_counter()
        while engine.has_work:
            for event in engine.step():
                _token(event)
        times.append(time.perf_counter() - start)
    seconds = median(times[1:])
    return {
        "what": "prefill", "tokens": tokens, "step_tokens": step_tokens, "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }  # fmt: skip


def _decode(
    device: Device, engine: Engine, prompts: Callable[[int], list[int]], batch: int, context: int, steps: int
) -> Result:  # fmt: skip
    """Time steps that give every sequence a token; then the last one's recording alone."""
    runtime = device.runtime
    with watched(runtime) as watch:
        waiting = {_submit(engine, prompts(context), seed, 2 * steps + 64) for seed in range(batch)}
        ids = sorted(waiting)
        while waiting:
            waiting -= {event.request_id for event in engine.step()}
        for _ in range(4):  # one as it is, one recorded, two replayed
            engine.step()
        runtime.synchronize()
        watch.waited, watch.replays = 0.0, 0
        start = time.perf_counter()
        tokens = [_token(event) for _ in range(steps) for event in engine.step()]
        wall = time.perf_counter() - start
        result: Result = {
            "what": "decode", "batch": batch, "context": context + 4 + steps // 2, "steps": steps,
            "tokens_per_s": len(tokens) / wall, "step_us": wall / steps * 1e6,
            "host_us": (wall - watch.waited) / steps * 1e6, "replays": watch.replays,
            "different_tokens": len(set(tokens)),
        }  # fmt: skip
        if watch.recording is not None:
            times = device.seconds(lambda: runtime.replay(watch.recording), min(steps, 30))
            result |= {"replay_us": median(times) * 1e6, "replay_tokens_per_s": batch / median(times)}
    for request_id in ids:
        engine.cancel(request_id)
    read = step_bytes(engine.model, sequences=batch, visible=result["context"], kv_itemsize=2)
    return result | {"bytes_per_step": int(read.total)}
