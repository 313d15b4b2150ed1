"""The runtime of a real GPU: memory, launches and graphs through CuPy's public interface."""

import ctypes
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_lite.errors import DeviceError, OutOfMemoryError
from gptoss_lite.kernels.cuda import build
from gptoss_lite.kernels.cuda.runtime import Argument, Array, Grid
from gptoss_lite.kernels.cuda.source import Kernel

OLDEST = 75  # compute capability 7.5: the first with the mma and ldmatrix that the kernels use
SMALL, SMALL_SLOTS = 64 << 10, 32  # bytes of a slot for token ids, tables and the like; how many of them
LARGE, LARGE_SLOTS = 64 << 20, 2  # the same for weights: one is filled while the other is sent
SHARED_MEMORY = 48 << 10  # bytes that a block may have without asking
MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation, which CuPy does not name


def _cupy() -> Any:
    if find_spec("cupy") is None:
        raise DeviceError(
            "--device cuda needs CuPy: pip install 'gptoss-lite[cuda13]' (driver 580 or newer) "
            "or 'gptoss-lite[cuda12]'"
        )
    try:
        return import_module("cupy")
    except Exception as error:  # a broken installation can raise anything
        reason = " ".join(str(error.__cause__ or error).split())  # CuPy wraps it in a page of advice
        raise DeviceError(f"CuPy cannot be imported: {reason}") from error


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _probe(cupy: Any, index: int) -> str:
    """Return the GPU's architecture; raises DeviceError where it cannot be used."""
    runtime = cupy.cuda.runtime
    try:
        driver = runtime.driverGetVersion()
        if driver == 0:
            raise DeviceError("no NVIDIA driver found: --device cuda needs one, and a GPU")
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as error:
            needed = runtime.runtimeGetVersion()
            if driver // 1000 < needed // 1000:
                older = ", or install 'gptoss-lite[cuda12]' instead" * (driver // 1000 == 12)
                raise DeviceError(
                    f"the NVIDIA driver knows CUDA {_version(driver)} and this CuPy needs {needed // 1000}: "
                    f"update the driver{older}"
                ) from error
            raise DeviceError(f"no usable NVIDIA GPU: {error}") from error
        if not 0 <= index < count:
            raise DeviceError(f"no cuda:{index} here: {count} GPU{'s' * (count != 1)}, counted from 0")
        capability = str(cupy.cuda.Device(index).compute_capability)
        if int(capability) < OLDEST:
            name = runtime.getDeviceProperties(index)["name"].decode(errors="replace")
            raise DeviceError(
                f"cuda:{index}, {name}, has compute capability {capability[:-1]}.{capability[-1]}: "
                f"7.5 (Turing) or newer is needed"
            )
        build.nvrtc(driver // 1000).target(f"sm_{capability}")
    except runtime.CUDARuntimeError as error:
        raise DeviceError(f"no usable NVIDIA GPU: {error}") from error
    return f"sm_{capability}"


def why_not(index: int = 0) -> str | None:
    """Say in one line why a GPU cannot be used, None where it can; cheap where CuPy is not installed."""
    try:
        _probe(_cupy(), index)
    except Exception as error:
        return str(error)
    return None


def usable(index: int = 0) -> bool:
    """Whether a GPU can be used; never raises."""
    return why_not(index) is None


@dataclass(frozen=True, slots=True)
class Recording:
    """A CUDA graph, and the arrays that its launches use."""

    graph: Any
    arrays: list[Array]


@dataclass(slots=True)
class _Entry:
    """A loaded kernel, and how much dynamic shared memory it may be launched with so far and ever."""

    function: Any
    allowed: int
    limit: int


@dataclass(frozen=True, slots=True)
class _Slot:
    """A pinned buffer, and an event after the last copy out of it."""

    buffer: npt.NDArray[np.uint8]
    address: int
    event: Any


def _pinned(runtime: Any, nbytes: int) -> npt.NDArray[np.uint8]:
    """Set aside page-locked host memory, which is returned with the last array over it."""
    try:
        address = runtime.hostAlloc(nbytes, runtime.hostAllocPortable | runtime.hostAllocMapped)
    except runtime.CUDARuntimeError as error:
        if error.status != MEMORY_ALLOCATION:
            raise
        raise OutOfMemoryError(
            f"the system grants no {nbytes / 2**30:.2f} GiB of page-locked host memory"
        ) from error
    buffer: Any = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(buffer, runtime.freeHost, address).atexit = False  # CUDA may be gone by then
    return np.frombuffer(buffer, np.uint8)


def _slot(cuda: Any, nbytes: int) -> _Slot:
    buffer = _pinned(cuda.runtime, nbytes)
    return _Slot(buffer, buffer.ctypes.data, cuda.Event(disable_timing=True))


class _Ring:
    """Pinned buffers taken in turn, made at first need; taking one waits until its last copy is done."""

    def __init__(self, make: Callable[[], _Slot], slots: int) -> None:
        self._make, self._count, self._taken = make, slots, 0
        self._slots: list[_Slot] = []

    def take(self) -> _Slot:
        turn = self._taken % self._count
        self._taken += 1
        if turn == len(self._slots):
            self._slots.append(self._make())
        self._slots[turn].event.synchronize()
        return self._slots[turn]


class CuPyRuntime:
    """One GPU, one stream, and a memory pool of its own; to be used by one thread at a time.

    Raises DeviceError where CuPy, the driver or the GPU is missing or too old. Later failures on the device,
    an illegal address say, are DeviceErrors too, mostly of a later call than the one that caused them.
    """

    def __init__(self, index: int = 0) -> None:
        self._cupy: Any = _cupy()
        self.index = index
        self.arch = _probe(self._cupy, index)
        cuda = self._cupy.cuda
        self._cuda, self._runtime = cuda, cuda.runtime
        self._newest = int(self._runtime.driverGetVersion()) // 1000
        with self._device():
            self.multiprocessors = int(
                self._runtime.deviceGetAttribute(self._runtime.cudaDevAttrMultiProcessorCount, index)
            )
            self._shared_memory = int(
                self._runtime.deviceGetAttribute(self._runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index)
            )
            # Neither waits for the legacy default stream nor holds it up; needed for capturing.
            self._stream = cuda.Stream(non_blocking=True)
        # Our own, since blocks of a shared pool could be handed on to another stream while still in use here.
        self._pool = cuda.MemoryPool()
        self._modules: dict[tuple[str, build.Defines], Any] = {}
        self._entries: dict[Kernel, _Entry] = {}
        # Of functions that know no runtime: one that held itself would keep its memory after its last use.
        self._small = _Ring(partial(_slot, self._cupy.cuda, SMALL), SMALL_SLOTS)
        self._large = _Ring(partial(_slot, self._cupy.cuda, LARGE), LARGE_SLOTS)
        self._idle: dict[int, list[npt.NDArray[np.uint8]]] = {}  # pinned buffers for `fetch`, by size
        self._recorded: list[Array] | None = None

    @contextmanager
    def _device(self) -> Iterator[None]:
        """Make the device current, and put its errors into our words."""
        try:
            with self._cuda.Device(self.index):
                yield
        except (self._runtime.CUDARuntimeError, self._cuda.driver.CUDADriverError) as error:
            raise DeviceError(f"cuda:{self.index}: {error}") from error

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Set aside device memory of undefined contents; raises OutOfMemoryError."""
        nbytes = math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
        with self._device():
            try:
                memory = self._pool.malloc(nbytes)
            except self._cuda.memory.OutOfMemoryError as error:
                free, total = (n / 2**30 for n in self.memory())
                raise OutOfMemoryError(
                    f"cuda:{self.index} has no room for {nbytes / 2**30:.2f} GiB: "
                    f"{free:.2f} of {total:.2f} GiB are free"
                ) from error
            return self._cupy.ndarray(shape, np.dtype(dtype), memory)

    def pinned(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Set aside host memory that kernels and copies can reach; its address is valid on the device.

        It is returned to the system with the last array over it. CuPy's pool is not used: it would round each
        request up to a power of two.
        """
        nbytes = math.prod(np.atleast_1d(shape).tolist()) * np.dtype(dtype).itemsize
        if nbytes == 0:
            return np.empty(shape, dtype)
        with self._device():
            return _pinned(self._runtime, nbytes).view(dtype).reshape(shape)

    def address(self, array: Array) -> int:
        """Return the address that kernels know an array by, device or pinned."""
        if not isinstance(array, np.ndarray):
            return int(array.data.ptr)
        if array.size == 0:
            return 0
        with self._device():
            address = int(self._runtime.pointerGetAttributes(array.ctypes.data).devicePointer)
        if not address:
            raise ValueError("a NumPy array in ordinary memory has no address on the device: pin it")
        return address

    def _bytes(self, array: Array, nbytes: int) -> int:
        """Check what is copied, and return its address."""
        if not array.flags.c_contiguous:
            raise ValueError(f"cannot copy {array.dtype} {array.shape}: not contiguous")
        if array.nbytes != nbytes:
            raise ValueError(f"cannot copy {nbytes} bytes to or from {array.dtype} {array.shape}")
        return self.address(array)

    def _enqueue(self, target: int, source: int, nbytes: int, kind: int) -> None:
        self._runtime.memcpyAsync(target, source, nbytes, kind, self._stream.ptr)

    def upload(self, source: npt.NDArray[Any], target: Array) -> None:
        """Copy host to device, in order with the launches; `source` may be changed on return.

        Goes through pinned buffers of a bounded size, so that a memory-mapped file streams.
        """
        assert self._recorded is None, "an upload cannot be recorded"
        raw = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
        with self._device():
            address = self._bytes(target, raw.nbytes)
            ring = self._small if raw.nbytes <= SMALL else self._large
            start = 0
            while start < raw.nbytes:
                slot = ring.take()
                piece = raw[start : start + slot.buffer.nbytes]
                slot.buffer[: piece.nbytes] = piece
                self._enqueue(address + start, slot.address, piece.nbytes, self._runtime.memcpyHostToDevice)
                slot.event.record(self._stream)
                start += piece.nbytes

    def download(self, array: Array) -> npt.NDArray[Any]:
        """Wait for everything launched, and return a host copy."""
        host = np.empty(array.shape, array.dtype)
        raw = host.reshape(-1).view(np.uint8)
        with self._device():
            address = self._bytes(array, raw.nbytes)
            ring = self._small if raw.nbytes <= SMALL else self._large
            start = 0
            while start < raw.nbytes:
                slot = ring.take()
                piece = raw[start : start + slot.buffer.nbytes]
                self._enqueue(slot.address, address + start, piece.nbytes, self._runtime.memcpyDeviceToHost)
                self._stream.synchronize()
                piece[:] = slot.buffer[: piece.nbytes]
                start += piece.nbytes
            self._stream.synchronize()
        return host

    def fetch(self, array: Array) -> Callable[[], npt.NDArray[Any]]:
        """Queue a copy to the host; what is returned waits for it, and for nothing launched later."""
        idle = self._idle.setdefault(array.nbytes, [])
        with self._device():
            buffer = idle.pop() if idle else self.pinned(array.nbytes, np.uint8)
            if array.nbytes:
                source, kind = self._bytes(array, array.nbytes), self._runtime.memcpyDeviceToHost
                self._enqueue(buffer.ctypes.data, source, array.nbytes, kind)
            done = self._cuda.Event(disable_timing=True)
            done.record(self._stream)

        shape, dtype = array.shape, array.dtype

        def wait() -> npt.NDArray[Any]:
            with self._device():
                done.synchronize()
            host: npt.NDArray[Any] = buffer.view(dtype).reshape(shape).copy()
            return host

        # Waited for or not, the buffer is free then: a later copy into it comes after this one in the stream.
        weakref.finalize(wait, idle.append, buffer).atexit = False
        return wait

    def copy(self, source: Array, target: Array) -> None:
        """Copy device to device, in order with the launches; a pinned array may be either, too."""
        with self._device():
            addresses = self._bytes(target, source.nbytes), self._bytes(source, source.nbytes)
            if source.nbytes:
                self._enqueue(*addresses, source.nbytes, self._runtime.memcpyDefault)
        self._keep((source, target))

    def _keep(self, arrays: Sequence[Argument]) -> None:
        if self._recorded is not None:
            self._recorded += [array for array in arrays if not isinstance(array, np.generic | None)]

    def _entry(self, kernel: Kernel) -> _Entry:
        entry = self._entries.get(kernel)
        if entry is None:
            assert self._recorded is None, f"{kernel.name} has not run before it is recorded"
            program = kernel.file, kernel.defines
            module = self._modules.get(program)
            if module is None:
                code = build.cubin(*program, self.arch, self._newest)
                module = self._cuda.function.Module()
                module.load(code)
                self._modules[program] = module
            function, driver = module.get_function(kernel.name), self._cuda.driver
            static = driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, function.ptr)
            entry = _Entry(function, SHARED_MEMORY - static, self._shared_memory - static)
            self._entries[kernel] = entry
        return entry

    def _argument(self, value: Argument) -> Argument:
        if value is None:
            return np.uint64(0)  # not every CuPy makes a null pointer of None
        if isinstance(value, np.ndarray):
            return np.uint64(self.address(value))  # pinned; CuPy would pass the contents
        if not isinstance(value, np.generic | self._cupy.ndarray):
            raise TypeError(f"a kernel takes arrays, None and NumPy scalars, not {type(value).__name__}")
        return value

    def launch(
        self, kernel: Kernel, grid: Grid, block: int, args: Sequence[Argument], shared_memory: int = 0
    ) -> None:
        """Queue a kernel: a grid of up to 3 dimensions, `block` threads, bytes of dynamic shared memory."""
        if 0 in grid:
            return  # CuPy would make it 1
        with self._device():
            entry = self._entry(kernel)
            if shared_memory > entry.allowed:
                if shared_memory > entry.limit:
                    raise DeviceError(
                        f"{kernel.name} wants {shared_memory} bytes of shared memory: "
                        f"cuda:{self.index} has {max(entry.limit, 0)} for it"
                    )
                driver = self._cuda.driver
                attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                driver.funcSetAttribute(entry.function.ptr, attribute, entry.limit)
                entry.allowed = entry.limit
            values = tuple(map(self._argument, args))
            entry.function(tuple(grid), (block,), values, shared_memory, self._stream)
        self._keep(args)

    def capture(self, work: Callable[[], None]) -> Recording:
        """Record what `work` launches without running it; each kernel must have run once before.

        The recording keeps the arrays alive that are launched with, but not what is known by an address only.
        """
        with self._device():
            self._stream.begin_capture()
            arrays: list[Array] = []
            self._recorded = arrays
            try:
                work()
            except BaseException:
                with suppress(Exception):  # of a recording that is broken anyway
                    self._stream.end_capture()
                raise
            finally:
                self._recorded = None
            return Recording(self._stream.end_capture(), arrays)

    def replay(self, recording: Recording) -> None:
        """Queue a recording."""
        with self._device():
            recording.graph.launch(self._stream)

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        with self._device():
            self._stream.synchronize()

    def memory(self) -> tuple[int, int]:
        """Return the device's free and total bytes; those that the pool would hand out again are free."""
        with self._device():
            free, total = self._runtime.memGetInfo()
            return free + self._pool.free_bytes(), total
