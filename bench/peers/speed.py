"""How fast llama.cpp and we are with the same weights, or transformers and we: leg by leg, in turns.

    pip install '.[peers]'    # builds llama-cpp-python, which takes a compiler, CMake and some minutes
    python -m bench.peers.speed llama.cpp [--layers N] [--rounds N] [--contexts N,N] [--json FILE]
    python -m bench.peers.speed transformers [--rounds N] [--json FILE]

llama.cpp: random weights in the shapes of gpt-oss-20b, its first N layers, quantised to what GGUF holds
exactly, experts in MXFP4 and all else but norms and routers in Q8_0, and written twice: as GGUF, and packed
for us. transformers: the bundled model, in bf16 for it and as it is for us.

Each leg is a process of its own. It loads, warms up, reads a prompt of random tokens that it has not seen,
then computes tokens one by one after each context; we also find the best next token each time.
Legs take turns, and each round begins with another; a plain read of memory comes between them. Medians of all
rounds and their ratios are printed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.conversion import execute, plan_conversion, plan_quantization
from gptoss_lite.quant.formats import Int8
from gptoss_lite.quant.policy import GROUPS, Policy, Rule
from gptoss_lite.synthetic import synthetic

ROOT = Path(__file__).resolve().parents[2]
PROMPT, STEPS, WARM_UP = 512, 32, 16
Q8_0 = Policy(
    tuple(Rule(GROUPS[group], Int8(32, "float16")) for group in ("attention", "lm_head", "embedding"))
)
OURS = {"ours, accurate": "accurate", "ours, int8": "int8"}


@dataclass(frozen=True, slots=True)
class Runner:
    """A loaded program: how to forget all tokens, and how to compute some more and wait for the logits."""

    vocabulary: int
    reset: Callable[[], None]
    compute: Callable[[Sequence[int]], Any]


def _ours(path: Path, activations: str, tokens: int) -> Runner:
    import gptoss_lite as gl
    from gptoss_lite.batch import Batch
    from gptoss_lite.cache import BLOCK_TOKENS
    from gptoss_lite.sampling import Draw, SamplingParams

    model = gl.load_model(path, device="cpu", activations=activations)  # type: ignore[arg-type]
    blocks = -(-tokens // BLOCK_TOKENS)
    cache, table = model.ops.new_cache(model.config, blocks, blocks), np.arange(blocks, dtype=np.int32)[None]
    greedy = Draw(SamplingParams(temperature=0), 0, 0, (), 0)
    done = 0

    def reset() -> None:
        nonlocal done
        done = 0

    def compute(more: Sequence[int]) -> None:
        nonlocal done
        for first in range(0, len(more), model.ops.step_tokens):
            part = np.asarray(more[first : first + model.ops.step_tokens], np.int32)
            is_last = first + len(part) == len(more)
            rows = np.array([len(part) - 1] if is_last else [], np.int32)
            positions = np.arange(done, done + len(part), dtype=np.int32)
            starts, decoding = np.array([0, len(part)], np.int32), np.array([len(part) == 1])
            batch = Batch(part, positions, starts, table, table, rows, decoding)
            model.begin(batch, cache, [greedy] * len(rows))()  # as an Engine does
            done += len(part)

    return Runner(model.config.vocab_size, reset, compute)


def _llama_cpp(path: Path, tokens: int) -> Runner:
    from llama_cpp import Llama

    threads = os.cpu_count()
    peer = Llama(
        str(path), n_ctx=tokens, n_batch=PROMPT, n_ubatch=PROMPT, n_threads=threads, n_threads_batch=threads,
        verbose=False,
    )  # fmt: skip
    return Runner(peer.n_vocab(), peer.reset, peer.eval)


def _transformers(path: Path) -> Runner:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    past: Any = None

    def reset() -> None:
        nonlocal past
        past = None

    @torch.inference_mode()  # type: ignore[untyped-decorator]
    def compute(more: Sequence[int]) -> None:
        nonlocal past
        ids = torch.tensor([list(more)])
        past = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values

    return Runner(model.config.vocab_size, reset, compute)


def leg(name: str, path: Path, contexts: Sequence[int], seed: int) -> dict[str, Any]:
    """Run one leg in this process -> seconds to load, and tokens per second."""
    start = time.perf_counter()
    tokens = max(PROMPT, *contexts) + STEPS + WARM_UP
    if name in OURS:
        runner = _ours(path, OURS[name], tokens)
    else:
        runner = _llama_cpp(path, tokens) if name == "llama.cpp" else _transformers(path)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    rng = np.random.default_rng(seed)

    def some(count: int) -> list[int]:
        ids: list[int] = rng.integers(0, runner.vocabulary, count).tolist()
        return ids

    runner.compute(some(WARM_UP))
    runner.compute(some(1))
    runner.reset()
    result["prefill"] = PROMPT / _seconds(lambda: runner.compute(some(PROMPT)))
    for context in contexts:
        runner.reset()
        runner.compute(some(context))
        steps = [_seconds(lambda: runner.compute(some(1))) for _ in range(STEPS)]
        result[f"decode at {context}"] = 1 / median(steps)
    return result


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def write(peer: str, layers: int, directory: Path) -> dict[str, Path]:
    """Write the same weights for each leg."""
    if peer == "transformers":
        demo = ROOT / "gptoss_lite" / "demo"
        return {peer: ROOT / "tests" / "data" / "demo" / "bf16", **dict.fromkeys(OURS, demo)}
    quantised, gguf, packed = (directory / name for name in ("quantised", "model.gguf", "packed"))
    workers = os.cpu_count() or 1
    execute(plan_quantization(synthetic("20b", layers=layers), quantised, Q8_0), workers=workers)
    execute(plan_conversion(open_checkpoint(quantised), gguf, "gguf"), workers=workers)
    execute(plan_conversion(open_checkpoint(quantised), packed, "packed-cpu"), workers=workers)
    return {peer: gguf, **dict.fromkeys(OURS, packed)}


def main() -> None:
    """Measure, print a table, and the figures of every leg with --json."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.speed", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("peer", choices=["llama.cpp", "transformers"])
    parser.add_argument("--layers", type=int, default=12, help="of the network, for llama.cpp [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="of all legs [%(default)s]")
    parser.add_argument("--contexts", default="128", help="tokens before those that are given [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of every leg, too")
    parser.add_argument("--leg", nargs=3, metavar=("NAME", "PATH", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    contexts = [int(context) for context in options.contexts.split(",")]
    if options.leg:
        name, path, seed = options.leg
        print(json.dumps(leg(name, Path(path), contexts, int(seed))))
        return
    from gptoss_lite.yardstick import HostYardstick

    yardstick = HostYardstick(1 << 30, os.cpu_count() or 1)
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        paths = write(options.peer, options.layers, Path(directory))
        for number in range(options.rounds):
            first = number % len(paths)  # a leg may suffer from the one before it
            for name in [*list(paths)[first:], *list(paths)[:first]]:
                command = [
                    sys.executable,
                    "-m",
                    "bench.peers.speed",
                    options.peer,
                    "--contexts",
                    options.contexts,
                ]
                command += ["--leg", name, str(paths[name]), str(number)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                figures = {**json.loads(done.stdout.splitlines()[-1]), "read": yardstick.rate() / 1e9}
                found.setdefault(name, []).append(figures)
                print(name, {key: round(value, 2) for key, value in figures.items()}, flush=True)
    theirs = found[options.peer]
    for key in theirs[0]:
        reference = median(figures[key] for figures in theirs)
        shown = {name: median(figures[key] for figures in rounds) for name, rounds in found.items()}
        print(
            f"{key:16}", *(f"{name}: {rate:8.2f} ({rate / reference:.2f}x)" for name, rate in shown.items())
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
