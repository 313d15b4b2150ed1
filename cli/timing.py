"""What `--verbose` says of a run: times, rates and memory."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss_lite.model import GptOss
    from gptoss_lite.stream import GenerationEvent, Usage


class Stopwatch:
    """Times the load of a model, from its own creation on, and then one stream of events."""

    def __init__(self) -> None:
        self._start = self._loaded = self._first = self._last = time.perf_counter()

    def watch(self, events: Iterator["GenerationEvent"]) -> Iterator["GenerationEvent"]:
        """Hand events on, noting when the stream was asked for, when it began and when it ended."""
        self._loaded = time.perf_counter()
        for number, event in enumerate(events):
            self._last = time.perf_counter()
            if number == 0:
                self._first = self._last
            yield event

    def report(self, model: "GptOss", usage: "Usage") -> str:
        """Return one line for each figure; a rate counts the tokens that were computed in that time."""
        from gptoss_lite.machine import peak_memory

        prompt, answer = self._first - self._loaded, self._last - self._first
        peak = peak_memory()
        figures = {
            "device": model.ops.name,
            "load": f"{self._loaded - self._start:.2f} s",
            "first token": f"after {prompt:.3f} s",
            "prompt": _rate(usage.prompt_tokens - usage.cached_tokens, prompt),
            "generation": _rate(usage.completion_tokens - 1, answer),
            "peak memory": "-" if peak is None else f"{peak / 2**30:.2f} GiB",
            "seed": usage.seed,
        }
        return "\n".join(f"{name + ':':13}{figure}" for name, figure in figures.items())


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s ({tokens} tokens)" if tokens > 0 and seconds > 0 else "-"
