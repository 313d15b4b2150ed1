"""What launches kernels: implemented over CuPy for a GPU, and over NumPy by the emulator."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.source import Kernel

Array: TypeAlias = Any  # a device array: CuPy's, or NumPy's on the emulator; C-contiguous where launched
Argument: TypeAlias = Any  # a device array, None for a null pointer, or a NumPy scalar of the exact C type
Grid: TypeAlias = tuple[int, ...]


class Runtime(Protocol):
    """One device: memory, launches in order, and recordings of them."""

    arch: str  # "sm_90"; what kernels are compiled for
    multiprocessors: int

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Set aside device memory of undefined contents; raises OutOfMemoryError."""

    def pinned(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Set aside host memory that kernels and copies can reach; its address is valid on the device."""

    def address(self, array: Array) -> int:
        """Return the address that kernels know an array by, device or pinned."""

    def upload(self, source: npt.NDArray[Any], target: Array) -> None:
        """Copy host to device, in order with the launches; `source` may be changed on return."""

    def download(self, array: Array) -> npt.NDArray[Any]:
        """Wait for everything launched, and return a host copy."""

    def fetch(self, array: Array) -> Callable[[], npt.NDArray[Any]]:
        """Queue a copy to the host; what is returned waits for it, and for nothing launched later."""

    def copy(self, source: Array, target: Array) -> None:
        """Copy device to device, in order with the launches."""

    def launch(
        self, kernel: Kernel, grid: Grid, block: int, args: Sequence[Argument], shared_memory: int = 0
    ) -> None:
        """Queue a kernel: a grid of up to 3 dimensions, `block` threads, bytes of dynamic shared memory."""

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` launches without running it; each kernel must have run once before."""

    def replay(self, recording: Any) -> None:
        """Queue a recording."""

    def synchronize(self) -> None:
        """Wait for everything that was launched."""

    def memory(self) -> tuple[int, int]:
        """Return the device's free and total bytes."""


def i32(value: int) -> np.int32:
    """Pass a C int."""
    return np.int32(value)


def f32(value: float) -> np.float32:
    """Pass a C float."""
    return np.float32(value)
