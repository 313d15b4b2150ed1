"""Sizes of memory as people write and read them."""

import re
from fractions import Fraction

from gptoss_lite.errors import RequestError

_GIB = 1 << 30
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Read a size of memory as bytes: "8GB" is 8 * 2**30, as cards are sold, and so is "8GiB".

    Raises RequestError, naming the text, for anything but a positive number with B, KB, MB, GB, TB or none.
    """
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?(?:([KMGT])I?)?B?", text.strip().upper(), re.ASCII)
    size = int(Fraction(match[1]) * 2 ** _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise RequestError(f"{text!r} is no size of memory: give bytes, or a number with MB or GB, as in 8GB")
    return size


def format_gib(nbytes: float) -> str:
    """Write a size for people: "12.8 GiB"; below a tenth with three digits."""
    gib = nbytes / _GIB
    return f"{gib:.1f} GiB" if gib >= 0.1 or not gib else f"{gib:.3f} GiB"


def format_bytes(nbytes: float) -> str:
    """Write a size of any magnitude for people: "12.8 GiB", "35.0 MiB", "512 B"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes:.0f} B"
