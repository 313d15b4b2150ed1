"""A model that says what a test wants it to say, token by token, through the real engine."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_lite.batch import Batch
from gptoss_lite.cache import KVCache
from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops
from gptoss_lite.ops.base import Pending
from gptoss_lite.sampling import Draw
from gptoss_lite.tokenizer import Tokenizer

Script = Callable[[Sequence[int]], Sequence[int]]  # a prompt -> the tokens that answer it


class ScriptedModel(GptOss):
    """Stands in for a network: its logits prefer the script's next token so much that it is always drawn.

    Logits processors, biases and log-probabilities work as with any model. seconds: how long a step takes.
    """

    def __init__(self, checkpoint: Path, tokenizer: Tokenizer, script: Script, context: int = 4096) -> None:
        config = open_checkpoint(checkpoint).config
        self.config = replace(
            config, vocab_size=tokenizer.vocab_size, max_position_embeddings=context, num_hidden_layers=2,
            layer_types=("sliding_attention", "full_attention"),
        )  # fmt: skip
        self.ops = get_ops("cpu")
        self.cache_tokens = context
        self.script = script
        self.seconds = 0.0
        self._end = tokenizer.special["<|return|>"]

    def begin(self, batch: Batch, cache: KVCache, draws: Sequence[Draw]) -> Pending:
        """See GptOss."""
        time.sleep(self.seconds)
        logits = np.zeros((len(draws), self.config.vocab_size), np.float32)
        for row, draw in zip(logits, draws, strict=True):
            row[self._next(draw)] = 60
        drawn = self.ops.sample(logits, draws)
        return lambda: drawn

    def _next(self, draw: Draw) -> int:
        said: Any = self.script(draw.tokens[: draw.prompt_length])
        place = len(draw.tokens) - draw.prompt_length
        return int(said[place]) if place < len(said) else self._end
