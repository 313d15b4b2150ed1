"""The operations a model is made of, and the choice of who carries them out."""

import re

from gptoss_lite.errors import DeviceError
from gptoss_lite.ops.base import Linear, Norm, Ops, Use

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "emulated", "reference")

__all__ = ["DEVICES", "Linear", "Norm", "Ops", "Use", "get_ops"]


def get_ops(
    device: str = "auto",
    threads: int | None = None,
    device_memory: int | None = None,
    activations: str | None = None,
    dense: str | None = None,
) -> Ops:
    """Open a device by name.

    auto: a GPU where there is a usable one, else the CPU. cuda, cuda:1: an NVIDIA GPU, by its number.
    emulated: the CUDA kernels on the CPU, for tests; very slow. reference: plain NumPy. threads is for `cpu`
    alone; None means every core the process may use. device_memory, in bytes, is for a GPU alone; None means
    all that is free. activations ("accurate", the default, or "int8") and dense ("int8", or None for what the
    checkpoint has) are for `cpu`, see CPUOps. Raises DeviceError where the device cannot be had, or does not
    take such a choice.
    """
    if device == "auto":
        from gptoss_lite.kernels.cuda import cupy_runtime

        device = "cuda" if cupy_runtime.usable() else "cpu"
    if device == "cpu":
        return _cpu(threads, activations, dense)
    for name, choice in (("activations", activations), ("dense", dense)):
        if choice is not None:
            raise DeviceError(f"{name} is {choice!r}, which is for device cpu: {device} takes none")
    if device == "reference":
        return Ops()
    if device == "emulated":
        from gptoss_lite.kernels.emulator.runtime import Emulator
        from gptoss_lite.ops.cuda import CUDAOps

        return CUDAOps(Emulator(), "emulated", device_memory)
    if match := re.fullmatch(r"cuda(?::(\d+))?", device):
        from gptoss_lite.kernels.cuda.cupy_runtime import CuPyRuntime
        from gptoss_lite.ops.cuda import CUDAOps

        return CUDAOps(CuPyRuntime(int(match[1] or 0)), "cuda", device_memory)
    raise DeviceError(f"unknown device {device!r}: choose {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")


def _cpu(threads: int | None, activations: str | None, dense: str | None) -> Ops:
    try:
        from gptoss_lite.ops.cpu import CPUOps
    except RuntimeError as error:  # Numba found no directory to write to
        raise DeviceError(
            f"compiled kernels have nowhere to be kept ({error}): name a directory in NUMBA_CACHE_DIR"
        ) from error
    return CPUOps(threads, activations or "accurate", dense)
