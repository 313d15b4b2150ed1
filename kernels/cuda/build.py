"""Compiles a kernel file with NVRTC, through its C interface: needs no GPU, no CuPy and no toolkit."""

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels import diskcache
from gptoss_lite.kernels.cuda import source

Defines = tuple[tuple[str, int], ...]

_WINDOWS = sys.platform == "win32"
_LIBRARY = "nvrtc64_*_0.dll" if _WINDOWS else "libnvrtc.so.*"
# Below a wheel's folder (nvidia/cu13, nvidia/cuda_nvrtc) or a toolkit's.
_FOLDERS = ("bin", "bin/x86_64", "bin/x64") if _WINDOWS else ("lib", "lib64", "targets/*/lib")
# Denormal float32 count as zero, which makes exponentials and divisions shorter. No weight, key or value is
# lost by it: they are widened and narrowed by cvt and by shifts, which keep denormal ones, those of fp16 are
# normal in float32, and arithmetic on pairs of 16 bits is not concerned. Scales of 2^-127 count as zero (see
# weights.cuh), and logits are put in order by their bits (see philox.cuh).
_OPTIONS = ("-std=c++17", "-default-device", "-ftz=true")


class CompileError(RuntimeError):
    """A kernel that NVRTC refused: the text ends with its log."""


@dataclass(frozen=True, slots=True)
class NVRTC:
    """A loaded compiler: its version, and the architectures that it knows, 90 for sm_90."""

    library: ctypes.CDLL
    version: tuple[int, int]
    archs: tuple[int, ...]

    def target(self, arch: str) -> str:
        """Choose what to compile for: `arch`, an older one of its family, or PTX for the driver to finish.

        Machine code runs on any later minor version of the same major one. PTX is what remains for a GPU that
        is newer than this compiler; the driver must be at least as new as the compiler to take it.
        """
        wanted = int(arch.removeprefix("sm_"))
        older = [known for known in self.archs if known <= wanted]
        if not older:
            raise DeviceError(f"NVRTC {self.version[0]}.{self.version[1]} cannot compile for {arch}")
        best = max(older)
        return f"{'sm' if best // 10 == wanted // 10 else 'compute'}_{best}"

    def compile(self, file: str, defines: Defines, target: str) -> bytes:
        """Return machine code for an sm_ target, PTX for a compute_ one; raises CompileError."""
        call, program = self.library, ctypes.c_void_p()
        names = source.headers(file)
        texts = [source.read(name) for name in names]
        _check(
            call.nvrtcCreateProgram(
                ctypes.byref(program),
                source.read(file).encode(),
                file.encode(),
                len(names),
                _strings(texts),
                _strings(names),
            ),
            f"cannot create a program of {file}",
        )
        try:
            options = _options(defines, target)
            status = call.nvrtcCompileProgram(program, len(options), _strings(options))
            if status:
                log = self._result(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
                raise CompileError(f"{file} {' '.join(options)}: NVRTC error {status}\n{log}")
            return self._result(program, "CUBIN" if target.startswith("sm_") else "PTX")
        finally:
            call.nvrtcDestroyProgram(ctypes.byref(program))

    def _result(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        _check(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"no {what} size")
        text = ctypes.create_string_buffer(size.value)
        _check(getattr(self.library, f"nvrtcGet{what}")(program, text), f"no {what}")
        return text.raw


def _strings(texts: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _check(status: int, failure: str) -> None:
    if status:
        raise CompileError(f"{failure}: NVRTC error {status}")


def _options(defines: Defines, target: str) -> tuple[str, ...]:
    return (f"-arch={target}", *_OPTIONS, *(f"-D{name}={value}" for name, value in defines))


def _below(folders: Iterable[Path]) -> list[str]:
    """List the libraries in wheels' or toolkits' folders, newest first."""
    found = [path for folder in folders for sub in _FOLDERS for path in folder.glob(f"{sub}/{_LIBRARY}")]
    return [str(path) for path in sorted(found, key=lambda path: _numbers(path.name), reverse=True)]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _candidates() -> Iterator[str]:
    """Yield where the library may be: wheels first, then what CuPy would take, then toolkits."""
    wheels = find_spec("nvidia")  # a namespace that all of NVIDIA's wheels share
    places = (wheels and wheels.submodule_search_locations) or ()
    yield from _below(wheel for place in places for wheel in Path(place).glob("*"))
    with suppress(ImportError, RuntimeError, OSError):  # not installed, or it finds none either
        yield str(import_module("cuda.pathfinder").load_nvidia_dynamic_lib("nvrtc").abs_path)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(name):
            yield from _below([Path(home)])
    if _WINDOWS:
        yield from ("nvrtc64_130_0.dll", "nvrtc64_120_0.dll")
    else:
        yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
        yield from _below([Path("/usr/local/cuda")])


def _load(path: str) -> NVRTC | None:
    """Load the library at a path, or a name for the loader; None where that is none."""
    try:
        library = ctypes.CDLL(path)
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)):
            return None
        if library.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
            return None
        archs = (ctypes.c_int * count.value)()
        if library.nvrtcGetSupportedArchs(archs):
            return None
        if Path(path).is_absolute():
            # NVRTC opens its builtins by their bare name, which the loader knows once they are loaded.
            name = "nvrtc-builtins64_{}{}.dll" if _WINDOWS else "libnvrtc-builtins.so.{}.{}"
            ctypes.CDLL(str(Path(path).with_name(name.format(major.value, minor.value))))
    except (OSError, AttributeError):
        return None
    # Arguments wider than an int must be declared, or a pointer loses its upper half.
    pointer, size = ctypes.c_void_p, ctypes.c_int
    text, texts = ctypes.c_char_p, ctypes.POINTER(ctypes.c_char_p)
    library.nvrtcCreateProgram.argtypes = [pointer, text, text, size, texts, texts]
    library.nvrtcCompileProgram.argtypes = [pointer, size, texts]
    library.nvrtcDestroyProgram.argtypes = [pointer]
    for what in ("ProgramLog", "CUBIN", "PTX"):
        getattr(library, f"nvrtcGet{what}Size").argtypes = [pointer, pointer]
        getattr(library, f"nvrtcGet{what}").argtypes = [pointer, pointer]
    return NVRTC(library, (major.value, minor.value), tuple(archs))


@cache
def nvrtc(newest: int | None = None) -> NVRTC:
    """Find the compiler; raises DeviceError. `newest` is the CUDA major version that the driver knows.

    Machine code of any 12.x loads on every 12.x driver and on newer ones, but that of 13.x on no 12.x driver.
    """
    for path in _candidates():
        found = _load(path)
        if found and (newest is None or found.version[0] <= newest):
            return found
    of = "" if newest is None else f" for a CUDA {newest} driver"
    extra = "cuda12" if newest == 12 else "cuda13"
    raise DeviceError(f"no NVRTC, CUDA's compiler, found{of}: pip install 'gptoss-lite[{extra}]'")


def cubin_path(file: str, defines: Defines, arch: str, newest: int | None = None) -> Path:
    """Compile a .cu file of this folder for `arch`, sm_90 say, or find it compiled; return where it lies.

    All entry points of the file share it. It ends in .cubin, or in .ptx where the compiler is older than the
    GPU (see NVRTC.target). Safe to call from several threads and processes. Raises DeviceError where there is
    no compiler, and CompileError.
    """
    compiler = nvrtc(newest)
    target = compiler.target(arch)
    texts = [part for name in (file, *source.headers(file)) for part in (name, source.read(name))]
    parts = (f"nvrtc {compiler.version}", *_options(defines, target), *texts)

    def make(path: Path) -> None:
        path.write_bytes(compiler.compile(file, defines, target))

    return diskcache.cached(parts, ".cubin" if target.startswith("sm_") else ".ptx", make)


def cubin(file: str, defines: Defines, arch: str, newest: int | None = None) -> bytes:
    """Compile as cubin_path does and return what it holds: what a CUDA module is loaded from."""
    return cubin_path(file, defines, arch, newest).read_bytes()
