"""How many tokens several sequences decode at once, against one, in turns in one run.

Random weights of gpt-oss-20b, all dense ones in int8. A machine drifts from minute to minute, so each round
takes every number of sequences in turn, and its ratios are those of neighbours.
"""

import argparse
from statistics import median

import numpy as np

from gptoss_lite.measure import MeasuredEngine, Workload, measure_decode, measure_prefill
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.synthetic import synthetic
from gptoss_lite.yardstick import open_yardstick

SEQUENCES = 1, 2, 4, 8
CONTEXT, STEPS = 128, 8


def main() -> None:
    """Measure, and print each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, help="only the first so many, best an even number")
    parser.add_argument("--activations", choices=("accurate", "int8"), default="accurate")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}: give at least 1")
    ops = get_ops("cpu", dense="int8", activations=args.activations)
    workload = Workload(CONTEXT, STEPS, concurrency=max(SEQUENCES))
    model = GptOss(synthetic("20b", layers=args.layers), ops, cache_tokens=workload.cache_tokens)
    engine, yardstick = MeasuredEngine(model, workload), open_yardstick(ops)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab_size, (max(SEQUENCES), CONTEXT)).tolist()
    for prompt in prompts:
        measure_prefill(engine, prompt)
    ratios: dict[int, list[float]] = {count: [] for count in SEQUENCES}
    for number in range(1, args.rounds + 1):
        rates, reads = {}, [yardstick.rate()]
        for count in SEQUENCES:
            rates[count] = measure_decode(engine, prompts[:count], STEPS, seed=number).tokens_per_s
            reads.append(yardstick.rate())
            ratios[count].append(rates[count] / rates[1])
        tokens = ", ".join(f"{count}: {rate:.1f}" for count, rate in rates.items())
        read = ", ".join(f"{rate / 1e9:.0f}" for rate in reads)
        print(f"round {number}: tokens/s of {tokens}; GB/s read between them: {read}", flush=True)
    print("median of times one sequence's: " + ", ".join(f"{n}: {median(ratios[n]):.2f}" for n in SEQUENCES))


if __name__ == "__main__":
    main()
