"""The text of a kernel file and of every header of ours that it includes."""

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r'^#include "([\w.]+)"', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Kernel:
    """An `extern "C"` entry point of a .cu file, compiled with some -D definitions: (name, value) pairs."""

    file: str
    name: str
    defines: tuple[tuple[str, int], ...] = ()


@cache
def read(file: str) -> str:
    """Return the text of a .cu or .cuh file of this folder."""
    return (files(__package__) / file).read_text(encoding="utf-8")


@cache
def headers(file: str) -> tuple[str, ...]:
    """Name the headers that a file includes, directly or through another, in a fixed order."""
    found: dict[str, None] = {}
    for name in _INCLUDE.findall(read(file)):
        found |= dict.fromkeys([name, *headers(name)])
    return tuple(found)
