"""Every kernel against a float64 oracle, on whatever runtime is handed in: the emulator or a GPU.

Plain functions over NumPy, so that the test suite and `make gpu` run the very same ones. A check raises
AssertionError; its name says what holds.
"""

from collections.abc import Callable
from importlib import import_module

from gptoss_lite.kernels.cuda.runtime import Runtime

Check = Callable[[Runtime], None]
SUBJECTS = ("attention", "dense", "gemm", "moe", "routing", "sampling", "weights")


def all_checks() -> dict[str, Check]:
    """Name every check of every subject: "attention: decode, one key" -> function of a runtime."""
    return {
        f"{subject}: {name}": check
        for subject in SUBJECTS
        for name, check in import_module(f"{__name__}.{subject}").CHECKS.items()
    }
