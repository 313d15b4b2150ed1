"""The runtime that launches CUDA kernels on a CPU, over NumPy arrays; needs g++ or clang++."""

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gptoss_lite.errors import DeviceError, GptOssError, OutOfMemoryError
from gptoss_lite.kernels.cuda import source
from gptoss_lite.kernels.cuda.runtime import Argument, Grid
from gptoss_lite.kernels.cuda.source import Kernel
from gptoss_lite.kernels.diskcache import cached

Array: TypeAlias = npt.NDArray[Any]
Order: TypeAlias = Literal["forward", "reversed", "random"]

ORDERS: tuple[Order, ...] = ("forward", "reversed", "random")
ALIGNMENT = 256  # bytes, of every array: what cudaMalloc gives
MOST_SHARED = 227 * 1024  # bytes of a block on sm_90
POISON = 0xFF  # what memory holds before it is written: NaN in every format
MESSAGE = 1024  # bytes

_ENTRY = re.compile(
    r'^extern "C"\s+__global__\s+void\s+(?:__launch_bounds__\(([^,()]*)[^()]*\)\s*)?(\w+)\s*\(', re.MULTILINE
)
# How emulator.h spells a parameter's type: pointer, float, double, or an integer's bytes.
_KINDS = {"P": "a pointer", "F": "a float", "D": "a double", "1": "an 8-bit integer"} | {
    str(size): f"a {8 * size}-bit integer" for size in (2, 4, 8)
}
_FLAGS = (
    # Kernels read memory as other types than it was written as, and integers wrap, as in nvcc's C++; products
    # are fused only where they say so, so that a sum does not depend on what the optimiser made of its loop.
    *("-std=c++17", "-O2", "-fno-strict-aliasing", "-fwrapv", "-ffp-contract=off", "-fno-math-errno"),
    *("-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-pthread"),
)
_CHECKED = ("-DEMULATOR_CHECKED", "-fsanitize=kernel-address", "-fsanitize=alignment,bounds,shift-exponent")
_CHECKED_GCC = tuple(
    word
    for name in ("instrumentation-with-call-threshold", "stack", "globals")
    for word in ("--param", f"asan-{name}=0")
)
_CHECKED_CLANG = tuple(
    word
    for name in ("instrumentation-with-call-threshold", "stack", "globals")
    for word in ("-mllvm", f"-asan-{name}=0")
)


class EmulatorError(GptOssError):
    """A kernel did what a GPU would fail at, or a launch does not fit its kernel."""


class _Launch(ctypes.Structure):
    """`Launch` of emulator.h."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("dynamic_bytes", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("workers", ctypes.c_uint32),
        ("message_bytes", ctypes.c_uint32),
        ("arguments", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("arrays", ctypes.c_uint64),
        ("message", ctypes.c_char_p),
    )


class _Entry:
    """A loaded kernel: what calls it, and what it wants."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.launch = library[f"emulator_launch_{name}"]
        self.launch.argtypes = [ctypes.POINTER(_Launch)]
        signature = library[f"emulator_signature_{name}"]
        signature.restype = ctypes.c_char_p
        self.parameters: str = signature().decode()
        self.bound: int = library[f"emulator_bound_{name}"]()


@cache
def compiler() -> tuple[str, ...]:
    """Return the command of the C++ compiler, $CXX, g++ or clang++; raises DeviceError if there is none."""
    if named := os.environ.get("CXX"):
        command = tuple(shlex.split(named))
        if shutil.which(command[0]):
            return command
    for name in ("g++", "clang++"):
        if path := shutil.which(name):
            return (path,)
    raise DeviceError("the emulator needs a C++ compiler: install g++ (or clang++), or name one in CXX")


@cache
def _compiler_version() -> str:
    return subprocess.run((*compiler(), "--version"), capture_output=True, text=True, check=False).stdout


@cache
def _processor() -> str:
    """Name this CPU: -march=native code of another one may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if re.match(r"(flags|Features|model name)\s*:", line)}))


@cache
def _load(file: str, defines: tuple[tuple[str, int], ...], checked: bool) -> dict[str, _Entry]:
    """Compile a .cu file, or find it compiled, and return its kernels by name."""
    text = source.read(file)
    here = Path(str(files(__package__)))
    kernels = Path(str(files(source.__package__)))
    header = here / "emulator.h"
    version = _compiler_version()
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    # A kernel may take half of its thread's stack; the two compilers take the limit under different options.
    frame = "-Wframe-larger-than=65536 -Werror=frame-larger-than="
    frames = frame.split() if "clang" in version else ["-Werror=frame-larger-than=65536"]
    flags = [*_FLAGS, *frames, native, *(f"-D{name}={value}" for name, value in defines)]
    if checked:
        flags += [*_CHECKED, *(_CHECKED_CLANG if "clang" in version else _CHECKED_GCC)]
    program = f'#include "{kernels / file}"\n{_entries(text)}'

    def make(target: Path) -> None:
        unit = target.with_suffix(".o")
        paths = ("-include", str(header), "-I", str(kernels))
        _run((*compiler(), *flags, *paths, "-x", "c++", "-c", "-", "-o", str(unit)), program, file)
        # Linked without the sanitizers: what they call is in emulator.h, not in their libraries.
        try:
            _run((*compiler(), "-shared", "-pthread", str(unit), "-o", str(target), "-lm"), "", file)
        finally:
            unit.unlink(missing_ok=True)

    parts = (
        *("emulator", version, " ".join(compiler()), _processor(), " ".join(flags), program, text),
        header.read_text(encoding="utf-8"),
        *(source.read(name) for name in source.headers(file)),
    )
    library = ctypes.CDLL(str(cached(parts, ".so", make)))
    names = [name for _, name in _ENTRY.findall(text)]
    return {name: _Entry(library, name) for name in names if hasattr(library, f"emulator_launch_{name}")}


def _entries(text: str) -> str:
    """Write an EMULATOR_ENTRY for each kernel of a file, inside the same #if that the kernel is in."""
    lines = []
    for found in _ENTRY.finditer(text):
        conditions: list[list[str]] = []
        for line in text[: found.start()].splitlines():
            if re.match(r"#\s*if", line):
                conditions.append([line])
            elif re.match(r"#\s*el", line):
                conditions[-1].append(line)
            elif re.match(r"#\s*endif", line):
                conditions.pop()
        bound, name = found.groups()
        lines += [line for condition in conditions for line in condition]
        lines += [f"EMULATOR_ENTRY({name}, ({bound or '1024'}))", *("#endif" for _ in conditions)]
    return "\n".join(lines) + "\n"


def _run(command: tuple[str, ...], program: str, file: str) -> None:
    done = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulatorError(f"{file} does not compile for the emulator:\n{done.stderr}")


class Emulator:
    """A `Runtime` whose device is this CPU: every CUDA thread is run, in an order that can be chosen.

    `order` is that of threads within a block and of blocks within a grid; "random" follows from `seed`.
    `threads` blocks run at once (default: one per core). Kernels that wait for what cannot come, overrun
    their shared memory or are launched with other arguments than they take raise EmulatorError. With
    `checked` so does every access outside the arrays made here or given to the launch, and every misaligned
    one; without it, such an access may end the process: use checked=True to find it.
    """

    arch = "emulated"

    def __init__(
        self, order: Order = "forward", *, seed: int = 0, threads: int | None = None, checked: bool = False
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"unknown order {order!r}: choose {', '.join(ORDERS)}")
        compiler()
        self.order = order
        self.seed = seed
        self.threads = threads or os.cpu_count() or 1
        self.checked = checked
        self.multiprocessors = 4
        self._arrays: dict[int, int] = {}  # address -> bytes of what lives
        self._recording: list[Callable[[], None]] | None = None
        self._launched: set[Kernel] = set()

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Set aside memory, aligned as a GPU's and filled with NaN; raises OutOfMemoryError."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        nbytes = count * kind.itemsize
        try:
            # Aligned by hand, and the byte after the end is in no array.
            owner = np.full(nbytes + ALIGNMENT + 1, POISON, np.uint8)
        except MemoryError:
            raise OutOfMemoryError(f"cannot set aside {nbytes:,} bytes of host memory") from None
        start = -owner.ctypes.data % ALIGNMENT
        self._register(owner, owner.ctypes.data + start, nbytes)
        return owner[start : start + nbytes].view(kind).reshape(shape)

    def pinned(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Set aside memory: host and device are one."""
        return self.empty(shape, dtype)

    def address(self, array: Array) -> int:
        """Return where an array starts; from now on kernels may use it, as long as it lives."""
        if not self._covers(array):
            owner = array
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            self._register(owner, array.ctypes.data, array.nbytes)
        return int(array.ctypes.data)

    def upload(self, source: Array, target: Array) -> None:
        """Copy host to device."""
        self._refuse_while_recording("upload")
        np.copyto(target, source, casting="no")

    def download(self, array: Array) -> Array:
        """Return a copy."""
        self._refuse_while_recording("download")
        return np.array(array, order="C")

    def fetch(self, array: Array) -> Callable[[], Array]:
        """Copy now, for everything launched is done."""
        host = self.download(array)
        return lambda: host

    def copy(self, source: Array, target: Array) -> None:
        """Copy device to device."""
        self._do(lambda: np.copyto(target, source, casting="no"))

    def launch(
        self, kernel: Kernel, grid: Grid, block: int, args: Sequence[Argument], shared_memory: int = 0
    ) -> None:
        """Run a kernel to its end, or record it; raises EmulatorError."""
        if self._recording is not None and kernel not in self._launched:
            raise EmulatorError(f"{kernel.file}, {kernel.name}: recorded before it ever ran")
        entry = self._entry(kernel)
        where = f"{kernel.file}, {kernel.name}"
        if not 1 <= len(grid) <= 3 or min(grid) < 1 or max(grid[1:], default=1) > 65535:
            raise EmulatorError(f"{where}: no grid is {grid}")
        if not 1 <= block <= entry.bound:
            raise EmulatorError(f"{where}: a block of {block} threads, the kernel takes 1 to {entry.bound}")
        if not 0 <= shared_memory <= MOST_SHARED:
            raise EmulatorError(f"{where}: {shared_memory} bytes of shared memory, {MOST_SHARED} at most")
        words = _words(where, entry.parameters, args)
        arguments = tuple(args)  # kept alive by a recording
        self._launched.add(kernel)
        self._do(lambda: self._call(where, entry, grid, block, words, arguments, shared_memory))

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` launches without running it; each kernel must have run once before."""
        self._refuse_while_recording("capture")
        recording: list[Callable[[], None]] = []
        self._recording = recording
        try:
            work()
        finally:
            self._recording = None
        return recording

    def replay(self, recording: Any) -> None:
        """Run a recording."""
        for step in recording:
            self._do(step)

    def synchronize(self) -> None:
        """Do nothing: every launch has ended when it returns."""

    def memory(self) -> tuple[int, int]:
        """Return the host's memory, as free and as total: how much of it is in use is not looked at."""
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total

    def _do(self, step: Callable[[], None]) -> None:
        if self._recording is None:
            step()
        else:
            self._recording.append(step)

    def _refuse_while_recording(self, what: str) -> None:
        if self._recording is not None:
            raise EmulatorError(f"{what} inside capture: only launches and device copies can be recorded")

    def _entry(self, kernel: Kernel) -> _Entry:
        entries = _load(kernel.file, kernel.defines, self.checked)
        if kernel.name not in entries:
            raise EmulatorError(f"{kernel.file} has no kernel {kernel.name}, but {', '.join(entries)}")
        return entries[kernel.name]

    def _register(self, owner: Array, start: int, nbytes: int) -> None:
        self._arrays[start] = max(nbytes, self._arrays.get(start, 0))
        weakref.finalize(owner, self._arrays.pop, start, None).atexit = False

    def _covers(self, array: Array) -> bool:
        start, end = array.ctypes.data, array.ctypes.data + array.nbytes
        return any(s <= start and end <= s + n for s, n in self._arrays.items())

    def _call(
        self,
        where: str,
        entry: _Entry,
        grid: Grid,
        block: int,
        words: npt.NDArray[np.uint64],
        args: tuple[Argument, ...],
        shared_memory: int,
    ) -> None:
        known = np.empty((0, 2), np.uint64)
        if self.checked:
            known = self._known(args)
        starts, sizes = np.ascontiguousarray(known[:, 0]), np.ascontiguousarray(known[:, 1])
        message = ctypes.create_string_buffer(MESSAGE)
        launch = _Launch(
            (ctypes.c_uint32 * 3)(*grid, *(1,) * (3 - len(grid))),
            block,
            shared_memory,
            ORDERS.index(self.order),
            self.seed % 2**63,
            self.threads,
            MESSAGE,
            words.ctypes.data,
            starts.ctypes.data,
            sizes.ctypes.data,
            len(starts),
            ctypes.cast(message, ctypes.c_char_p),
        )
        if entry.launch(ctypes.byref(launch)):
            raise EmulatorError(f"{where}: {message.value.decode(errors='replace')}")

    def _known(self, args: tuple[Argument, ...]) -> npt.NDArray[np.uint64]:
        """Address and bytes of every array that kernels may touch, in order and without overlap."""
        found = dict(self._arrays)
        for array in args:
            if isinstance(array, np.ndarray) and not self._covers(array):
                found[array.ctypes.data] = max(array.nbytes, found.get(array.ctypes.data, 0))
        merged: list[list[int]] = []
        for start, nbytes in sorted(found.items()):
            if merged and start < sum(merged[-1]):
                merged[-1][1] = max(merged[-1][1], start + nbytes - merged[-1][0])
            else:
                merged.append([start, nbytes])
        return np.array(merged, np.uint64).reshape(-1, 2)


def _words(where: str, parameters: str, args: Sequence[Argument]) -> npt.NDArray[np.uint64]:
    """Check the arguments against the parameters, and return each as a word of eight bytes."""
    if len(args) != len(parameters):
        raise EmulatorError(f"{where}: {len(args)} arguments for {len(parameters)} parameters")
    words = np.zeros(max(len(args), 1), np.uint64)
    raw = words.view(np.uint8)
    for i, (kind, value) in enumerate(zip(parameters, args, strict=True)):
        match value:
            case None if kind == "P":
                continue
            case np.ndarray() if kind == "P":
                if not value.flags.c_contiguous:
                    raise EmulatorError(f"{where}: argument {i} is not C-contiguous")
                words[i] = value.ctypes.data
            case np.generic() if _fits(kind, value.dtype):
                raw[8 * i : 8 * i + value.dtype.itemsize] = np.frombuffer(value.tobytes(), np.uint8)
            case _:
                got = value.dtype if isinstance(value, np.generic) else type(value).__name__
                raise EmulatorError(f"{where}: argument {i} is {got}, the parameter is {_KINDS[kind]}")
    return words


def _fits(kind: str, dtype: np.dtype[Any]) -> bool:
    if kind in "FD":
        return dtype == (np.float32 if kind == "F" else np.float64)
    return dtype.kind in "iub" and kind == str(dtype.itemsize)
