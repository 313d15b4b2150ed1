"""Formats as data: what a weight is, or is to be, quantised to; knows nothing of the numbers themselves."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from gptoss_lite.errors import FormatError

BLOCK = 32  # MXFP4 scales cover this many columns, int8 groups are a multiple of it

Scales = Literal["bf16", "float16", "e8m0"]


@dataclass(frozen=True, slots=True)
class MXFP4:
    """Four-bit floats E2M1, of which 32 share a power of two E8M0 (OCP Microscaling Formats 1.0)."""

    def check(self, columns: int, name: str) -> None:
        """Raise FormatError, naming the tensor, unless rows of so many columns can be held."""
        if columns % BLOCK:
            raise FormatError(f"{name} has {columns} columns: mxfp4 needs a multiple of {BLOCK}")

    def __str__(self) -> str:
        return "mxfp4"


@dataclass(frozen=True, slots=True)
class Int8:
    """Signed codes from -127 to 127, of which a group in each row shares a scale; no zero point.

    group_size: columns, a multiple of 32, or None for the whole row. scales: "bf16", "float16", or "e8m0",
    powers of two.
    """

    group_size: int | None = BLOCK
    scales: Scales = "bf16"

    def __post_init__(self) -> None:
        """Check the choices; raises FormatError."""
        size = self.group_size
        if size is not None and (type(size) is not int or size < BLOCK or size % BLOCK):
            raise FormatError(f"int8 group_size is {size!r}: give a multiple of {BLOCK}, or a whole row")
        if self.scales not in get_args(Scales):
            raise FormatError(f"unknown int8 scales {self.scales!r}: choose bf16, float16 or e8m0")

    def group(self, columns: int) -> int:
        """Columns that share a scale in rows of so many."""
        return columns if self.group_size is None else self.group_size

    def check(self, columns: int, name: str) -> None:
        """Raise FormatError, naming the tensor, unless rows of so many columns can be held."""
        if columns % BLOCK:
            raise FormatError(f"{name} has {columns} columns: int8 needs a multiple of {BLOCK}")
        if columns % self.group(columns):
            fitting = [str(size) for size in (32, 64, 96, 128) if columns % size == 0]
            raise FormatError(
                f"{name} has {columns} columns, which groups of {self.group_size} do not divide:"
                f" choose {', '.join(fitting)} or row"
            )

    def __str__(self) -> str:
        return f"int8 ({'row' if self.group_size is None else self.group_size}, {self.scales})"


Format: TypeAlias = MXFP4 | Int8


def to_json(format: Format) -> dict[str, Any]:
    """Spell a format as config.json's quantization_config does."""
    match format:
        case MXFP4():
            return {"format": "mxfp4"}
        case Int8(group_size=size, scales=scales):
            return {"format": "int8", "group_size": size, "scales": scales}


def from_json(value: Any) -> Format:
    """Read what `to_json` returned; raises FormatError on anything else."""
    match value:
        case {"format": "mxfp4", **rest} if not rest:
            return MXFP4()
        case {"format": "int8", "group_size": size, "scales": scales, **rest} if not rest:
            return Int8(size, scales)
    raise FormatError(f"{value!r} is no format: must name mxfp4, or int8 with group_size and scales")
