"""What the benchmarks share: a rate beside a yardstick's, kept in a file, and compared with a stored one."""

import json
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.shares import Report, Shares
from gptoss_lite.kernels.cpu import isa
from gptoss_lite.ops import get_ops

BASELINE = Path(__file__).parent / "baseline.json"
LATEST = Path(".benchmarks") / "shares.json"
_SHARES = pytest.StashKey[Shares]()


@pytest.fixture
def report(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Report:
    """Run this benchmark beside the yardsticks, with threads that wait as they do for a model."""
    get_ops("cpu")  # which says how they wait, before the first of them starts
    shares = request.config.stash.setdefault(_SHARES, {})
    return Report(benchmark, request.node.name.removeprefix("bench_"), shares)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the baseline be stored anew."""
    parser.addoption("--store-baseline", action="store_true", help=f"store shares in {BASELINE.name}")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print each share beside the stored one of the same kind of CPU, and keep what was found."""
    shares = config.stash.get(_SHARES, {})
    if not shares:
        return
    host = isa.host().name
    LATEST.parent.mkdir(exist_ok=True)
    LATEST.write_text(json.dumps({host: shares}, indent=1) + "\n", encoding="utf-8")
    stored = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    terminalreporter.section(f"shares of the yardsticks, {host}; kept in {LATEST}")
    width = max(map(len, shares))
    for name, found in shares.items():
        before = stored.get(host, {}).get(name)
        ratio = f"{found['share'] / before['share']:.2f} times the stored" if before else "nothing stored"
        rate = f"{found['rate']:8.2f} {found['unit']:6}"
        terminalreporter.write_line(
            f"{name:{width}}  {rate}  {found['share']:4.0%} of {found['of']:12}  {ratio}"
        )
    if config.getoption("--store-baseline"):
        stored[host] = {**stored.get(host, {}), **shares}
        BASELINE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")
