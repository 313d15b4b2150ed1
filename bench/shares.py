"""A benchmark's rate as a share of a yardstick's."""

from collections.abc import Callable
from statistics import median
from typing import Any, TypeAlias, TypeVar

from pytest_benchmark.fixture import BenchmarkFixture

from bench import yardsticks
from gptoss_lite.kernels.cpu.program import Rooms, Steps

Shares: TypeAlias = dict[str, dict[str, Any]]  # by the name of the benchmark

_Result = TypeVar("_Result")


class Report:
    """Runs a benchmark between two looks at the yardsticks, and notes its share of one."""

    def __init__(self, benchmark: BenchmarkFixture, name: str, shares: Shares) -> None:
        self._benchmark, self._name, self._shares = benchmark, name, shares
        self._before: dict[str, float] = {}

    def run(self, function: Callable[[], _Result], rounds: int = 15) -> _Result:
        """Time a function, two calls to warm up aside."""
        self._before = {kind: yardsticks.rate(kind) for kind in yardsticks.UNITS}  # type: ignore[arg-type]
        result: _Result = self._benchmark.pedantic(function, rounds=rounds, warmup_rounds=2)
        return result

    def share(self, kind: yardsticks.Kind, amount: float) -> None:
        """Note the rate of the median, of bytes or products a call, and its share of a yardstick's."""
        assert self._benchmark.stats is not None
        rate = amount / self._benchmark.stats.stats.median
        yardstick = median([self._before[kind], yardsticks.rate(kind)])
        unit = yardsticks.UNITS[kind]
        self._benchmark.extra_info[unit] = round(rate / 1e9, 2)
        self._benchmark.extra_info["share"] = round(rate / yardstick, 3)
        self._shares[self._name] = {
            "share": round(rate / yardstick, 3), "of": kind, "rate": round(rate / 1e9, 2), "unit": unit,
        }  # fmt: skip


def noted(note: Callable[[Steps], None]) -> Callable[[], None]:
    """Note steps; what is timed is doing them again, as a model does for each token."""
    steps = Steps(rooms=Rooms())
    note(steps)
    steps.run()
    assert steps.last is not None
    return steps.last.run
