"""What the server counts, in Prometheus' text form."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gptoss_lite.engine import Engine
from gptoss_lite.stream import Usage

ABANDONED = "abandoned"  # the reason why an answer ended whose client was gone
_WAITS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """One server's counters, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "gptoss_lite_requests", "Requests answered.", ["path", "status"], registry=self._registry
        )
        self._completion = Counter(
            "gptoss_lite_completion_tokens", "Tokens of finished answers.", registry=self._registry
        )
        self._reasoning = Counter(
            "gptoss_lite_reasoning_tokens", "Tokens of them that were reasoning.", registry=self._registry
        )
        self._finished = Counter(
            "gptoss_lite_finished", "Answers, by why they ended.", ["reason"], registry=self._registry
        )
        self._first = self._histogram("time_to_first_token", "Wait for an answer's first token.", _WAITS)
        self._token = self._histogram("time_per_output_token", "Mean time of a token after it.", _TOKEN_TIMES)
        self._whole = self._histogram("answer", "Time from a request to the end of its answers.", _WAITS)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"gptoss_lite_{name}_seconds", text, buckets=buckets, registry=self._registry)

    def first_token(self, seconds: float) -> None:
        """Note how long an answer's first token took."""
        self._first.observe(seconds)

    def finished(self, reason: str, usage: Usage, seconds_after_first: float) -> None:
        """Note the end of one answer."""
        self._finished.labels(reason).inc()
        self._completion.inc(usage.completion_tokens)
        self._reasoning.inc(usage.reasoning_tokens)
        if usage.completion_tokens > 1:
            self._token.observe(seconds_after_first / (usage.completion_tokens - 1))

    def abandoned(self) -> None:
        """Note an answer that nobody waited for any more."""
        self._finished.labels(ABANDONED).inc()

    def answered(self, seconds: float) -> None:
        """Note the end of all answers of a request."""
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """Return everything in the text exposition format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Reads an engine when asked; its numbers are plain integers, which another thread changes."""

    _COUNTERS: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
        ("steps", "Batches computed.", lambda e: e.statistics.steps),
        (
            "prompt_tokens",
            "Tokens of prompts begun: cached and prefilled ones.",
            lambda e: e.statistics.prompt_tokens,
        ),
        ("cached_tokens", "Tokens of prompts found in the cache.", lambda e: e.statistics.cached_tokens),
        ("prefilled_tokens", "Tokens of prompts computed.", lambda e: e.statistics.prefilled_tokens),
        ("recomputed_tokens", "Tokens computed again.", lambda e: e.statistics.recomputed_tokens),
        ("generated_tokens", "Tokens drawn.", lambda e: e.statistics.generated_tokens),
        ("preemptions", "Requests that stepped back for want of room.", lambda e: e.statistics.preemptions),
    )
    _GAUGES: tuple[tuple[str, str, Callable[[Engine], float]], ...] = (
        ("running_requests", "Requests in the batch.", lambda e: e.running),
        ("waiting_requests", "Requests in the queue.", lambda e: e.waiting),
        ("free_cache_tokens", "Tokens whose keys and values there is room for.", lambda e: e.free_tokens),
    )

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, text, read in self._COUNTERS:
            yield CounterMetricFamily(f"gptoss_lite_{name}", text, value=read(self._engine))
        for name, text, read in self._GAUGES:
            yield GaugeMetricFamily(f"gptoss_lite_{name}", text, value=read(self._engine))
