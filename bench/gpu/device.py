"""What is measured on: an NVIDIA GPU, or the emulator, on which the same script can be tried without one."""

import shutil
import subprocess
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cuda.launch import memory
from gptoss_lite.kernels.cuda.runtime import Array, Runtime

Result: TypeAlias = dict[str, Any]

_CHUNK = 1 << 24  # bytes that are made up and uploaded at a time
_SMI = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


class Device(Protocol):
    """A runtime, and what only its own library can measure."""

    runtime: Runtime
    name: str
    l2_bytes: int
    ceiling_bytes: int  # of the arrays that bandwidth is measured with

    def facts(self) -> Result:
        """Describe the hardware and the versions of what drives it."""

    def seconds(self, work: Callable[[], None], rounds: int) -> list[float]:
        """Run `work` once unmeasured, then time each of some rounds of what it queues."""

    def half_product(self) -> tuple[Callable[[], None], float]:
        """Return a large fp16 matrix product of the vendor's library, and its operations."""

    def used_bytes(self) -> int:
        """Count the device memory in use, by whomever."""


class Emulated:
    """The CPU in a GPU's place: its times mean nothing."""

    def __init__(self) -> None:
        from gptoss_lite.kernels.emulator.runtime import Emulator

        self.runtime: Runtime = Emulator()
        self.name = "emulated"
        self.l2_bytes = 1 << 12
        self.ceiling_bytes = 1 << 20

    def facts(self) -> Result:
        """See Device.facts."""
        free, total = self.runtime.memory()
        return {
            "card": "none: the kernels run on the CPU, and no time here means anything",
            "multiprocessors": self.runtime.multiprocessors, "arch": self.runtime.arch,
            "memory_bytes": total, "free_bytes": free, "l2_bytes": self.l2_bytes,
        }  # fmt: skip

    def seconds(self, work: Callable[[], None], rounds: int) -> list[float]:
        """See Device.seconds."""
        work()
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            self.runtime.synchronize()
            times.append(time.perf_counter() - start)
        return times

    def half_product(self) -> tuple[Callable[[], None], float]:
        """See Device.half_product; in float32, as NumPy has no fast fp16."""
        a = np.ones((256, 256), np.float32)

        def work() -> None:
            np.matmul(a, a)

        return work, 2.0 * 256**3

    def used_bytes(self) -> int:
        """See Device.used_bytes."""
        free, total = self.runtime.memory()
        return total - free


class GPU:
    """An NVIDIA GPU through CuPy; raises DeviceError where there is none that can be used."""

    def __init__(self, index: int = 0) -> None:
        from gptoss_lite.kernels.cuda.cupy_runtime import CuPyRuntime

        runtime = CuPyRuntime(index)
        cupy = import_module("cupy")
        self._cupy: Any = cupy
        self._index = index
        self._stream: Any = runtime._stream
        self.runtime: Runtime = runtime
        self._properties: dict[str, Any] = cupy.cuda.runtime.getDeviceProperties(index)
        self.name = self._properties["name"].decode(errors="replace")
        api = cupy.cuda.runtime
        self.l2_bytes = int(api.deviceGetAttribute(api.cudaDevAttrL2CacheSize, index))
        self.ceiling_bytes = min(4 << 30, self.runtime.memory()[0] // 4 // _CHUNK * _CHUNK)

    def facts(self) -> Result:
        """See Device.facts."""
        from gptoss_lite.kernels.cuda import build

        api = self._cupy.cuda.runtime
        driver = int(api.driverGetVersion())
        free, total = api.memGetInfo()
        facts: Result = {
            "card": self.name, "arch": self.runtime.arch, "multiprocessors": self.runtime.multiprocessors,
            "memory_bytes": int(total), "free_bytes": int(free), "l2_bytes": self.l2_bytes,
            "driver_cuda": driver, "runtime_cuda": int(api.runtimeGetVersion()),
            "cupy": self._cupy.__version__, "nvrtc": list(build.nvrtc(driver // 1000).version),
            "memory_bus_bits": self._properties.get("memoryBusWidth"),
        }  # fmt: skip
        return facts | _smi(self._index)

    def seconds(self, work: Callable[[], None], rounds: int) -> list[float]:
        """See Device.seconds; by events, so that the host's time does not count where the GPU is behind."""
        cuda = self._cupy.cuda
        with cuda.Device(self._index), self._stream:
            start, end = cuda.Event(), cuda.Event()
            work()
            times = []
            for _ in range(rounds):
                start.record(self._stream)
                work()
                end.record(self._stream)
                end.synchronize()
                times.append(cuda.get_elapsed_time(start, end) / 1e3)
        return times

    def half_product(self) -> tuple[Callable[[], None], float]:
        """See Device.half_product; `seconds` makes our stream CuPy's current one."""
        n = 8192
        rng = np.random.default_rng(0)
        arrays = []
        for _ in range(2):
            array = self.runtime.empty((n, n), np.float16)
            self.runtime.upload(rng.standard_normal((n, n), np.float32).astype(np.float16), array)
            arrays.append(array)

        def work() -> None:
            self._cupy.matmul(*arrays)

        return work, 2.0 * n**3

    def used_bytes(self) -> int:
        """See Device.used_bytes."""
        with self._cupy.cuda.Device(self._index):
            free, total = self._cupy.cuda.runtime.memGetInfo()
        return int(total - free)


def open_device(name: str) -> Device:
    """Open "emulated", or "cuda": the first GPU."""
    return Emulated() if name == "emulated" else GPU()


def _smi(index: int) -> Result:
    """Ask nvidia-smi, where there is one, for what CUDA does not tell."""
    if (smi := shutil.which("nvidia-smi")) is None:
        return {}
    command = [smi, f"--id={index}", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    names = [name.replace(".", "_") for name in _SMI.split(",")]
    return dict(zip(names, [value.strip() for value in done.stdout.splitlines()[0].split(",")], strict=False))


def median(times: list[float]) -> float:
    """Return the middle one, and never 0."""
    return max(float(np.median(times)), 1e-9)


def ceilings(device: Device) -> Result:
    """Measure what the hardware gives: bytes per second of a copy, of reading, from the host; fp16 products.

    A copy counts the bytes read and those written.
    """
    runtime, nbytes = device.runtime, device.ceiling_bytes
    found: Result = {"bytes": nbytes}
    source, target = runtime.empty((nbytes // 2,), np.uint8), runtime.empty((nbytes // 2,), np.uint8)
    times = device.seconds(lambda: runtime.copy(source, target), 7)
    found["copy_bytes_per_s"] = 2 * source.nbytes / median(times)

    words = runtime.empty((nbytes,), np.uint8)
    host = np.random.default_rng(0).integers(0, 256, min(nbytes, _CHUNK), np.uint8)
    for start in range(0, nbytes, len(host)):
        runtime.upload(host, words[start : start + len(host)])
    total = nbytes // len(host) * int(host.view(np.uint32).sum(dtype=np.uint64))
    found |= _read_ceiling(device, words, total % (1 << 32))

    pinned = runtime.pinned((min(nbytes, 1 << 28),), np.uint8)
    pinned[:] = 1
    part = words[: pinned.size]
    times = device.seconds(lambda: runtime.copy(pinned, part), 5)
    found["host_to_device_bytes_per_s"] = pinned.nbytes / median(times)

    try:  # cuBLAS is a library of its own, and not part of every CuPy
        work, operations = device.half_product()
        found["half_flops_per_s"] = operations / median(device.seconds(work, 7))
    except Exception as error:
        found["half_flops_per_s"] = None
        found["half_why_not"] = first_line(error)
    return found


def _read_ceiling(device: Device, words: Array, total: int) -> Result:
    """Take the best of a few grids: how many blocks a plain read wants differs from GPU to GPU."""
    runtime, rates = device.runtime, {}
    for blocks in (2, 4, 8, 16):
        sums = runtime.empty((blocks * runtime.multiprocessors, memory.READ_THREADS), np.uint32)
        rates[blocks] = words.nbytes / median(device.seconds(partial(memory.read, runtime, words, sums), 5))
        found = int(runtime.download(sums).sum(dtype=np.uint64)) % (1 << 32)
        if found != total:
            raise DeviceError(f"the read kernel added up {found}, and the memory holds {total}")
    best = max(rates, key=lambda blocks: rates[blocks])
    return {"read_bytes_per_s": rates[best], "read_blocks_per_multiprocessor": best}


def first_line(error: BaseException) -> str:
    """Say what an error was in one line."""
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def bits16(rng: np.random.Generator, shape: tuple[int, ...], bf16: bool) -> npt.NDArray[np.uint16]:
    """Make the bits of numbers of either sign from 2^-6 to 2^-5, quickly: a deviation of about 0.024."""
    count = int(np.prod(shape))
    bits = rng.integers(0, 1 << 64, -(-count // 4), np.uint64).view(np.uint16)[:count]
    mantissa, exponent = (0x807F, 121 << 7) if bf16 else (0x83FF, 9 << 10)
    bits &= np.uint16(mantissa)
    bits |= np.uint16(exponent)
    return bits.reshape(shape)
