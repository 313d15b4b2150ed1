"""How fast a plain kernel reads memory here: what decode, which reads each weight in use, is held against."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import numpy as np

from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cuda.launch.memory import READ_THREADS
from gptoss_lite.kernels.cuda.launch.memory import read as read_on_device
from gptoss_lite.kernels.cuda.runtime import Runtime
from gptoss_lite.ops import Ops
from gptoss_lite.synthetic import random_bytes

HOST_BYTES, DEVICE_BYTES = 1 << 30, 4 << 30  # more than any cache
_EMULATED_BYTES = 1 << 20
_PIECE = 1 << 20  # bytes that a GPU's memory is filled with at a time
_READS = 3
_GRIDS = 2, 4, 8, 16  # blocks a multiprocessor: how many a plain read wants differs from GPU to GPU


class Yardstick(Protocol):
    """Memory to be read; nbytes: how much."""

    @property
    def nbytes(self) -> int:
        """See the class."""

    def rate(self) -> float:
        """Read all of it -> bytes per second; raises DeviceError where the sum of what was read is wrong."""


class HostYardstick:
    """Main memory, read by so many of Numba's threads."""

    def __init__(self, nbytes: int, threads: int) -> None:
        from gptoss_lite.kernels.cpu import yardstick

        self._threads = threads
        self._kernel: Any = yardstick.read
        self._words = random_bytes(nbytes).view(np.uint64)
        self._sums = np.empty(-(-len(self._words) // yardstick.PART), np.uint64)
        self._total = int(self._words.sum(dtype=np.uint64))
        self.rate()  # compiled

    @property
    def nbytes(self) -> int:
        """See Yardstick."""
        return self._words.nbytes

    def rate(self) -> float:
        """See Yardstick.rate."""
        import numba

        numba.set_num_threads(self._threads)
        seconds = _seconds(lambda: self._kernel(self._words, self._sums))
        _check(int(self._sums.sum(dtype=np.uint64)), self._total)
        return self.nbytes / seconds


class DeviceYardstick:
    """A GPU's own memory; nbytes: a multiple of 1 MiB."""

    def __init__(self, nbytes: int, runtime: Runtime) -> None:
        self._runtime = runtime
        self._data = runtime.empty((nbytes,), np.uint8)
        piece = random_bytes(_PIECE)
        for start in range(0, nbytes, _PIECE):
            runtime.upload(piece, self._data[start : start + _PIECE])
        self._total = nbytes // _PIECE * int(piece.view(np.uint32).sum(dtype=np.uint64)) % (1 << 32)
        self._sums = runtime.empty((max(_GRIDS) * runtime.multiprocessors, READ_THREADS), np.uint32)

    @property
    def nbytes(self) -> int:
        """See Yardstick."""
        return int(self._data.nbytes)

    def rate(self) -> float:
        """See Yardstick.rate; of several grids, the fastest."""
        runtime, fastest = self._runtime, float("inf")
        for each in _GRIDS:
            sums = self._sums[: each * runtime.multiprocessors]

            def read(sums: Any = sums) -> None:
                read_on_device(runtime, self._data, sums)
                runtime.synchronize()

            fastest = min(fastest, _seconds(read))
            _check(int(runtime.download(sums).sum(dtype=np.uint64)) % (1 << 32), self._total)
        return self.nbytes / fastest


def open_yardstick(ops: Ops, host_bytes: int = HOST_BYTES) -> Yardstick:
    """Open what a backend's memory is measured with; host_bytes: where that is main memory."""
    owner: Any = ops
    if ops.name == "cuda":
        free, _ = owner._runtime.memory()
        return DeviceYardstick(max(_PIECE, min(DEVICE_BYTES, free // 2) // _PIECE * _PIECE), owner._runtime)
    if ops.name == "emulated":
        return DeviceYardstick(_EMULATED_BYTES, owner._runtime)
    return HostYardstick(host_bytes, threads_of(ops))


def threads_of(ops: Ops) -> int:
    """Tell the threads that a backend computes with: those of all cores but where it was told otherwise."""
    import numba

    config: Any = numba.config
    threads: int = getattr(ops, "threads", config.NUMBA_NUM_THREADS)
    return threads


def _seconds(read: Callable[[], None]) -> float:
    times = []
    for _ in range(_READS):
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return median(times)


def _check(found: int, total: int) -> None:
    if found != total:
        raise DeviceError(f"the read kernel added up {found}, and the memory holds {total}")
