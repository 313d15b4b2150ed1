"""CRC-32 as zlib computes it, of tensors in our files: as fast as the machine can, put together of parts."""

import json
import zlib
from functools import lru_cache
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

_LARGE = 1 << 22  # bytes from which compiling, or loading what is compiled, pays
_POLYNOMIAL = 0xEDB88320  # as zlib has it: x^0 is the highest bit
_ONE = 1 << 31


def lanes(nbytes: int) -> int:
    """Choose how `read` shall read so many bytes: in registers of so many lanes, or by zlib, which is 0."""
    kernels = _kernels() if nbytes >= _LARGE else None
    return kernels.usable()[0] if kernels is not None and kernels.usable() else 0


def read(data: NDArray[np.uint8], value: int = 0, *, lanes: int, exponent: int = 0) -> tuple[int, int]:
    """Go on from the CRC-32 of what came before with uint8 (n,) -> the CRC-32, bytes found to be finite.

    exponent: its bits in each 32 of the data. Of so many bytes at the beginning, no float has all of them
    set; zlib finds none.
    """
    kernels = _kernels() if lanes else None
    return (
        (zlib.crc32(data.data, value), 0) if kernels is None else kernels.read(data, value, lanes, exponent)
    )


def combine(first: int, second: int, nbytes: int) -> int:
    """Compute the CRC-32 of two runs of bytes in a row from that of each; nbytes: of the second."""
    return _product(first, _shift(nbytes)) ^ second


class Checksum:
    """What a file of ours says of a tensor: CRC-32 over its name, dtype, shape and data, in hex."""

    __slots__ = ("_crc",)

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        self._crc = zlib.crc32(json.dumps([name, dtype, shape]).encode())

    def update(self, data: memoryview) -> None:
        """Go on with the next of the data."""
        self._crc, _ = read(np.frombuffer(data, np.uint8), self._crc, lanes=lanes(len(data)))

    def append(self, crc: int, nbytes: int) -> None:
        """Go on with so many bytes of the data by their own CRC-32."""
        self._crc = combine(self._crc, crc, nbytes)

    def __str__(self) -> str:
        return f"{self._crc:08x}"


def _product(a: int, b: int) -> int:
    """Multiply two polynomials modulo that of the CRC."""
    product, power = 0, _ONE
    while power:
        if a & power:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
        power >>= 1
    return product


@lru_cache(maxsize=1024)
def _shift(nbytes: int) -> int:
    """Compute the polynomial that puts a CRC so many bytes ahead: x^(8 * nbytes)."""
    shift, square = _ONE, _ONE >> 8
    while nbytes:
        if nbytes & 1:
            shift = _product(shift, square)
        square = _product(square, square)
        nbytes >>= 1
    return shift


def _kernels() -> ModuleType | None:
    try:
        from gptoss_lite.kernels.cpu import crc
    except (ImportError, RuntimeError):  # beside a GPU, Numba may be missing, or have nowhere to write
        return None
    return crc
