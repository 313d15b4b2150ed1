"""What this machine has: processors, memory and what is free of it; and what this process took at most."""

import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = "numpy", "numba", "llvmlite", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x"
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """What figures were measured on; versions: of Python and of the packages that computing rests on."""

    system: str
    processor: str
    cores: int
    versions: dict[str, str]


def machine() -> Machine:
    """Describe this machine."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return Machine(platform.platform(), processor(), cores(), versions)


def cores() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Name the processor, as far as it is known."""
    if sys.platform == "linux":
        with suppress(OSError):
            text = (PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace")
            if found := re.search(r"^model name\s*: *(.+)$", text, re.MULTILINE):
                return found[1]
    if sys.platform == "darwin" and (name := _output("sysctl", "-n", "machdep.cpu.brand_string").strip()):
        return name
    return platform.processor() or platform.machine()


def peak_memory() -> int | None:
    """Return the most bytes that were resident at once, mapped pages of files among them; None on Windows."""
    # What getrusage says on Linux may be the peak of the process that started this one.
    if (peak := _field(_read(PROC / "self" / "status"), r"^VmHWM:\s*(\d+) kB", 1024)) is not None:
        return peak
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> int | None:
    """Return the bytes that can be taken without swapping, within the limits of the process's control group.

    Pages of files that the system would give up count as free. None where it cannot be told.
    """
    free = {"linux": _linux_free, "darwin": _macos_free, "win32": _windows_free}.get(sys.platform)
    found = [*_group_free(), *([] if free is None else [free()])]
    known = [nbytes for nbytes in found if nbytes is not None]
    return max(0, min(known)) if known else None


def _linux_free() -> int | None:
    return _field(_read(PROC / "meminfo"), r"MemAvailable: *(\d+) kB", 1024)


def _macos_free() -> int | None:
    text = _output("vm_stat")
    page = _field(text, r"page size of (\d+) bytes")
    kinds = ("free", "inactive", "speculative", "purgeable")
    counts = [_field(text, rf"Pages {kind}: *(\d+)\.") for kind in kinds]
    known = [count for count in counts if count is not None]
    return page * sum(known) if page and known else None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total", "available", *"abcde")),
    )


def _windows_free() -> int | None:
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    windows = getattr(ctypes, "windll", None)
    if windows is None or not windows.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.available)


def _group_free() -> Iterator[int]:
    """Yield what is left of each limit on this process: its control group's, and of those around it."""
    for line in _read(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):  # a container may see its own group as the root
            most, taken = _field(_read(folder / limit), r"^(\d+)$"), _field(_read(folder / used), r"^(\d+)$")
            if most is not None and taken is not None:
                reclaimable = _field(_read(folder / "memory.stat"), r"^(?:total_)?inactive_file (\d+)$") or 0
                yield most - taken + reclaimable
            if folder == root:
                break


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _output(*command: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    return ""


def _field(text: str, pattern: str, unit: int = 1) -> int | None:
    found = re.search(pattern, text, re.MULTILINE)
    return None if found is None else int(found[1]) * unit
