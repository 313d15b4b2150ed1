"""Work divided among threads, for what runs without Python's lock: NumPy, zlib and compiled kernels."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def spread(work: Callable[[_Task], _Result], tasks: Sequence[_Task], threads: int) -> Iterator[_Result]:
    """Do tasks on so many threads, and yield their results in order; the first error in order is raised."""
    if threads == 1 or len(tasks) < 2:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, tasks)
