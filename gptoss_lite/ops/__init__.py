"""The operations a model is made of, and the choice of who carries them out."""

from gptoss_lite.errors import DeviceError
from gptoss_lite.ops.base import Linear, Norm, Ops, Use

DEVICES = ("auto", "cpu", "reference")

__all__ = ["DEVICES", "Linear", "Norm", "Ops", "Use", "get_ops"]


def get_ops(device: str = "auto", threads: int | None = None) -> Ops:
    """Open a device by name: `cpu`, `reference`, or `auto`, which takes the best there is.

    threads is for the CPU alone; None means every core the process may use. Raises DeviceError for another
    name.
    """
    if device == "reference":
        return Ops()
    if device in ("auto", "cpu"):
        try:
            from gptoss_lite.ops.cpu import CPUOps
        except RuntimeError as error:  # Numba found no directory to write to
            raise DeviceError(
                f"compiled kernels have nowhere to be kept ({error}): name a directory in NUMBA_CACHE_DIR"
            ) from error
        return CPUOps(threads)
    raise DeviceError(f"unknown device {device!r}: choose {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")
