"""From logits to keys, and from keys to the next step's tokens."""

import numpy as np

from gptoss_lite.kernels.cuda.launch.arguments import require
from gptoss_lite.kernels.cuda.runtime import Array, Runtime, i32
from gptoss_lite.kernels.cuda.source import Kernel

MAX_SAMPLED_VOCAB = 2**18  # sample.cu's sums of probabilities hold no more


def sample(
    rt: Runtime, logits: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array, seed: Array,
    choice: Array, positions: Array, best: Array,
) -> None:  # fmt: skip
    """Draw a token from each row, as gptoss_lite.sampling does but in float32 -> its key.

    logits float32 (R, V), adjusted already; temperature, top_p and min_p float32 (R,); top_k, choice and
    positions int32 (R,), seed uint64 (R,). positions: where the drawn tokens will stand; -1 for an empty row,
    whose key is 0. best uint64 (R,): see philox.cuh; the larger key wins, `finish` reads it.
    """
    R, V = logits.shape
    require("logits", logits, np.float32, R, V)
    require("temperature", temperature, np.float32, R)
    require("top_k", top_k, np.int32, R)
    require("top_p", top_p, np.float32, R)
    require("min_p", min_p, np.float32, R)
    require("seed", seed, np.uint64, R)
    require("choice", choice, np.int32, R)
    require("positions", positions, np.int32, R)
    require("best", best, np.uint64, R)
    if not 0 < V <= MAX_SAMPLED_VOCAB:
        raise ValueError(f"the vocabulary has {V} tokens: must have 1 to {MAX_SAMPLED_VOCAB}")
    if R:
        args = (logits, temperature, top_k, top_p, min_p, seed, choice, positions, best, i32(V))
        rt.launch(Kernel("sample.cu", "sample"), (R,), 1024, args)


def finish(rt: Runtime, best: Array, drawn: Array, result: Array) -> None:
    """Turn keys into tokens, for the host and for the next step.

    best uint64 (R,): keys, left as 0. drawn int32 (R,): the tokens. result int32 (R, 2): the token, and 0, or
    1 where nothing could be drawn because the logits were not finite (the token is 0 then).
    """
    (R,) = best.shape
    require("best", best, np.uint64, R)
    require("drawn", drawn, np.int32, R)
    require("result", result, np.int32, R, 2)
    if R:
        rt.launch(Kernel("sample.cu", "finish"), (1,), 256, (best, drawn, result, i32(R)))
