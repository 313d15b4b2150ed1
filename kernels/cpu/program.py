"""Steps as Python writes them down, and has them done; and the room that they take.

See `workers` for what a step is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from numpy.typing import DTypeLike

from gptoss_lite.kernels.cpu import Array, workers
from gptoss_lite.kernels.cpu.workers import DONE, LINE, TASKS, TASKS_AT, Operands


class Rooms:
    """Memory that steps write to, kept by name from one time to the next, and as large as it ever was."""

    def __init__(self) -> None:
        self._bytes: dict[str, Array] = {}
        self.moves = 0  # how often some of it had to become larger, and so has another place

    def room(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> Array:
        """Give an array, C-contiguous, which begins at a cache line and holds anything."""
        empty = np.empty(shape, dtype)
        if name not in self._bytes or len(self._bytes[name]) < empty.nbytes:
            self._bytes[name] = _aligned(empty.nbytes)
            self.moves += 1
        return self._bytes[name][: empty.nbytes].view(dtype).reshape(shape)


class Steps:
    """Steps in the order in which they are to be done.

    threads: at most so many do them, by default all that Numba is told to use. rooms: where results lie; by
    default each has a new place.
    """

    def __init__(self, threads: int | None = None, rooms: Rooms | None = None) -> None:
        self.threads = numba.get_num_threads() if threads is None else threads
        self.runs = 0
        self.last: Program | None = None  # that was run
        self._rooms = rooms
        self._functions: list[int] = []
        self._places: list[int] = []
        self._words: list[int] = []
        self._kept: list[Any] = []
        self._counted: set[int] = set()  # places where steps write how many tasks another has

    def room(self, name: str, shape: Sequence[int], dtype: DTypeLike = np.float32) -> Array:
        """Give an array to write to; another of the same name may take its place once this one is read."""
        if self._rooms is not None:
            return self._rooms.room(name, shape, dtype)
        return _aligned(np.empty(shape, dtype).nbytes).view(dtype).reshape(shape)

    def add(self, function: Any, tasks: int | Array, operands: Operands, *values: Any) -> None:
        """Add a step; tasks: how many it has, or an int64 (1,) in which a step before it writes that.

        No other step may write there: a thread that comes late reads it when others are long past it.
        """
        header = [0] * (LINE * (1 + self.threads))
        if isinstance(tasks, int):
            header[TASKS] = tasks
        else:
            header[TASKS_AT] = tasks.ctypes.data
            assert header[TASKS_AT] not in self._counted, "each step's number of tasks has a place of its own"
            self._counted.add(header[TASKS_AT])
        self._functions.append(function.address)
        self._places.append(len(self._words))
        words = operands.words(*values)
        self._words += header + words + [0] * (-len(words) % LINE)
        self._kept += (function, tasks, values)

    def _finished(self) -> "Program":
        """Take what there is to do so far, and begin anew."""
        words = _aligned(8 * len(self._words)).view(np.int64)
        words[:] = self._words
        functions, places = np.array(self._functions, np.int64), np.array(self._places, np.int64)
        program = Program(functions, places, words, self.threads, tuple(self._kept))
        self._functions, self._places, self._words, self._kept = [], [], [], []
        self._counted = set()
        return program

    def run(self) -> None:
        """Do what there is to do so far."""
        if self._functions:
            self.last = self._finished()
            self.last.run()
            self.runs += 1


@dataclass(frozen=True, slots=True)
class Program:
    """Steps that can be done any number of times; see `workers.run`. kept: what they read and write."""

    functions: Array
    places: Array
    words: Array
    threads: int
    kept: tuple[Any, ...] = field(repr=False)

    def run(self) -> None:
        """Do all steps."""
        for line in range(1 + self.threads):
            self.words[self.places + LINE * line + DONE] = 0
        workers.run(self.functions, self.places, self.words, self.words.ctypes.data, self.threads)


def _aligned(size: int) -> Array:
    """Make room for so many bytes that begin at a cache line."""
    line = 8 * LINE
    bytes_ = np.empty(size + line, np.uint8)
    start = -bytes_.ctypes.data % line
    return bytes_[start : start + size]
