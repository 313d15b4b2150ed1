"""Every CUDA kernel against float64, on the emulator in three thread orders; and broken ones found out."""

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from gptoss_lite.kernels.cuda import checks, source
from gptoss_lite.kernels.cuda.runtime import Argument, Grid
from gptoss_lite.kernels.cuda.source import Kernel
from gptoss_lite.kernels.emulator.runtime import ORDERS, Emulator, EmulatorError, Order

pytestmark = pytest.mark.usefixtures("needs_compiler")
CHECKS = checks.all_checks()
SUBJECT = {  # whose checks run a kernel file
    "attention_decode.cu": "attention", "attention_prefill.cu": "attention", "group.cu": "routing",
    "lm_head.cu": "dense", "norm.cu": "dense", "qkv.cu": "dense", "out_proj.cu": "dense",
    "linear.cu": "gemm", "moe_prefill.cu": "gemm", "moe_decode.cu": "moe", "router.cu": "routing",
    "sample.cu": "sampling",
}  # fmt: skip
BARRIER = "__syncthreads();"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CHECKS)
def test_kernel(name: str, order: Order) -> None:
    CHECKS[name](Emulator(order))


@pytest.mark.soak
@pytest.mark.parametrize("name", CHECKS)
def test_kernel_touches_nothing_but_its_arrays(name: str) -> None:
    CHECKS[name](Emulator(checked=True))


def flat(file: str, included: set[str]) -> str:
    """Return a kernel file with its headers in it."""

    def include(match: re.Match[str]) -> str:
        if match[1] in included:
            return ""
        included.add(match[1])
        return flat(match[1], included).replace("#pragma once", "")

    return re.sub(r'^#include "([\w.]+)"$', include, source.read(file), flags=re.MULTILINE)


class Mutant(Emulator):
    """An emulator that takes another text for one kernel file."""

    def __init__(self, order: Order, file: str, text: str, folder: Path) -> None:
        super().__init__(order)
        self._file, self._mutated = file, folder / file
        self._mutated.write_text(text)

    def launch(
        self, kernel: Kernel, grid: Grid, block: int, args: Sequence[Argument], shared_memory: int = 0
    ) -> None:
        """Launch the mutated kernel in place of the real one."""
        if kernel.file == self._file:
            kernel = replace(kernel, file=str(self._mutated))
        super().launch(kernel, grid, block, args, shared_memory)


def is_found_out(file: str, text: str, folder: Path) -> bool:
    """Whether a check of the kernel's subject fails, in some order, with another text of its file."""
    cases = import_module(f"{checks.__name__}.{SUBJECT[file]}").CHECKS
    for order in ("reversed", "random", "forward"):
        runtime = Mutant(order, file, text, folder)
        for check in cases.values():
            try:
                check(runtime)
            except (AssertionError, EmulatorError):
                return True
    return False


def without_barrier(file: str, index: int) -> str:
    """Remove one barrier, counted over the file and its headers."""
    parts = flat(file, set()).split(BARRIER)
    return BARRIER.join(parts[: index + 1]) + ";" + BARRIER.join(parts[index + 1 :])


def barriers(file: str) -> list[int]:
    """Number the barriers of a file and its headers that a check can miss.

    Not those before a block counts itself done: what they protect is read by a block that runs at the same
    time, and the emulator's blocks take turns, but for chance.
    """
    _, *followed_by = flat(file, set()).split(BARRIER)
    return [index for index, text in enumerate(followed_by) if "atomicInc(" not in text[:100]]


BARRIERS = [(file, index) for file in SUBJECT for index in barriers(file)]


@pytest.mark.parametrize("file", ["attention_decode.cu", "moe_decode.cu", "moe_prefill.cu", "qkv.cu"])
def test_a_missing_barrier_is_noticed(file: str, tmp_path: Path) -> None:
    last = max(index for name, index in BARRIERS if name == file)
    assert is_found_out(file, without_barrier(file, last), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize(("file", "index"), BARRIERS)
def test_every_barrier_is_needed(file: str, index: int, tmp_path: Path) -> None:
    assert is_found_out(file, without_barrier(file, index), tmp_path)


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("attention_decode.cu", "sinks[first_head + head] * LOG2_E : 0.f, 1.f", "0.f : 0.f, 0.f"),
        ("attention_prefill.cu", "exp2f(sink - largest)", "0.f"),
        ("attention_decode.cu", "window > 0 ? max(0, position - window + 1) : 0", "0"),
        ("attention_prefill.cu", "window > 0 ? window : last + 1", "last + 1"),
    ],
    ids=["sink in decode", "sink in prefill", "window in decode", "window in prefill"],
)
def test_a_missing_sink_or_window_is_noticed(file: str, right: str, wrong: str, tmp_path: Path) -> None:
    text = flat(file, set())
    assert text.count(right) == 1
    assert is_found_out(file, text.replace(right, wrong), tmp_path)
