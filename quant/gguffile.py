"""GGUF files: the header read and checked, the data mapped; and the header of a file to be written.

Source: ggml's docs/gguf.md, version 3, little-endian. Strings in long arrays, the vocabulary's, are found by
one walk over their lengths, which takes a fraction of a second where 650,000 of them precede the weights.
"""

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.errors import CheckpointError
from gptoss_lite.quant.tensorfile import StoredTensor, abbreviated, parse_json

ALIGNMENT = 32  # of tensors in files we write
CHECKSUMS = "gptoss-lite.checksums"  # our key for them: a JSON object

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = dict(enumerate("BbHhIif?"))  # value type -> struct format; 8 and 9 are strings and arrays
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS, _MOST_NAME = 4, 1 << 16
# ggml type -> our name for it, weights in a block, bytes of a block
_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 20: ("IQ4_NL", 32, 18),
    23: ("IQ4_XS", 256, 136), 30: ("BF16", 1, 2), 39: ("MXFP4", 32, 17),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StringArray:
    """An array of strings in a mapped header, decoded only when asked for."""

    data: NDArray[np.uint8]
    starts: Sequence[int]
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)

    def decode(self) -> list[str]:
        """Return all the strings; raises UnicodeDecodeError where one is not UTF-8."""
        raw = self.data.data
        return [
            str(raw[start : start + length], "utf-8")
            for start, length in zip(self.starts, self.lengths, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An opened file: metadata by key, and tensors by name, mapped.

    A tensor's dtype is F32, F16, BF16, MXFP4, Q8_0 or another of ggml's; its shape is as NumPy has it, the
    quantised axis last.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


class _Cursor:
    """Reads values from the mapped header; running past the file's end is an error of the caller's."""

    INTEGERS: ClassVar[dict[int, struct.Struct]] = {4: struct.Struct("<I"), 8: struct.Struct("<Q")}

    def __init__(self, data: NDArray[np.uint8], path: Path) -> None:
        self.raw, self.data, self.path, self.at = data.data, data, path, 0

    def integer(self, size: int) -> int:
        (value,) = self.INTEGERS[size].unpack_from(self.raw, self.at)
        self.at += size
        return int(value)

    def text(self) -> str:
        size = self.integer(8)
        if size > len(self.data) - self.at:
            raise struct.error("a string runs past the end")
        start, self.at = self.at, self.at + size
        return str(self.raw[start : self.at], "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.integer(4), self.integer(8)
            return self._strings(count) if inner == _STRING else self._numbers(inner, count)
        (value,) = struct.unpack_from(f"<{_SCALARS[kind]}", self.raw, self.at)
        self.at += struct.calcsize(_SCALARS[kind])
        return value

    def _numbers(self, kind: int, count: int) -> NDArray[Any]:
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        if count > (len(self.data) - self.at) // dtype.itemsize:
            raise struct.error("an array runs past the end")
        start, self.at = self.at, self.at + count * dtype.itemsize
        return np.frombuffer(self.raw, dtype, count, start)

    def _strings(self, count: int) -> StringArray:
        if count > (len(self.data) - self.at) // 8:
            raise struct.error("an array runs past the end")
        unpack, raw, at = self.INTEGERS[8].unpack_from, self.raw, self.at
        starts, lengths = [0] * count, [0] * count
        for i in range(count):
            (length,) = unpack(raw, at)
            starts[i], lengths[i] = at + 8, length
            at += 8 + length
        self.at = at
        if at > len(self.data):
            raise struct.error("an array runs past the end")
        return StringArray(self.data, starts, lengths)


def read_file(path: Path) -> GGUFFile:
    """Map one GGUF file and check its header: that all it announces lies inside the file.

    Raises CheckpointError naming the file, and where the data end before a tensor does, the tensor.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, or not a file")
    try:
        with path.open("rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:  # mmap refuses an empty file
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None
    if data[:4].tobytes() != _MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it begins with {data[:4].tobytes()!r}")
    try:
        return _read(_Cursor(data, path))
    except (struct.error, IndexError):
        raise CheckpointError(f"{path} is truncated: its header runs past the end of the file") from None
    except (KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is not a sound GGUF file: {type(error).__name__} {error}") from None


def _read(cursor: _Cursor) -> GGUFFile:
    path, cursor.at = cursor.path, 4
    version, tensor_count, value_count = cursor.integer(4), cursor.integer(8), cursor.integer(8)
    if version not in _VERSIONS:
        raise CheckpointError(f"{path} has GGUF version {version}: 2 and 3 are read, little-endian")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.text()
        if key in metadata:
            raise CheckpointError(f"{path}: key {abbreviated(key)} is there twice")
        metadata[key] = cursor.value(cursor.integer(4))
    entries = [_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{path}: general.alignment is {abbreviated(alignment)}: must be a power of two"
        )
    first = -(-cursor.at // alignment) * alignment
    checksums = _checksums(path, metadata, {name for name, *_ in entries})
    tensors: dict[str, StoredTensor] = {}
    for name, dtype, shape, offset, nbytes in entries:
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {abbreviated(name)} is there twice")
        start = first + offset
        if start + nbytes > len(cursor.data):
            missing = start + nbytes - len(cursor.data)
            raise CheckpointError(f"{path} is truncated: tensor {name} lacks its last {missing:,} bytes")
        part = cursor.data[start : start + nbytes]
        tensors[name] = StoredTensor(path, name, dtype, shape, part, checksums.get(name))
    return GGUFFile(path, metadata, tensors)


def _entry(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int, int]:
    """Read what the header says of one tensor: name, dtype, shape, offset, bytes."""
    name, dimensions = cursor.text(), cursor.integer(4)
    if dimensions > _MOST_DIMENSIONS or len(name) > _MOST_NAME:
        raise CheckpointError(f"{cursor.path}: tensor {abbreviated(name)} has {dimensions} axes: not sound")
    shape = tuple(cursor.integer(8) for _ in range(dimensions))[::-1]
    kind, offset = cursor.integer(4), cursor.integer(8)
    if kind not in _TYPES:
        raise CheckpointError(f"{cursor.path}: tensor {name} is of ggml type {kind}, which is not known here")
    dtype, block, size = _TYPES[kind]
    count = 1
    for axis in shape:
        count *= axis
    if shape and shape[-1] % block:
        raise CheckpointError(
            f"{cursor.path}: tensor {name} has shape {shape}: {dtype} has blocks of {block}"
        )
    return name, dtype, shape, offset, count // block * size


def _checksums(path: Path, metadata: Mapping[str, Any], names: set[str]) -> dict[str, str]:
    text = metadata.get(CHECKSUMS)
    if not isinstance(text, str):
        return {}
    checksums = parse_json(text.encode(), f"{path}: checksums")
    if unpaired := set(checksums) ^ names:
        raise CheckpointError(f"{path} is damaged: {min(unpaired)!r} is only one of tensor and checksum")
    return checksums


def header(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Make the bytes that precede the data: as many for the same keys, names and lengths of strings.

    metadata: str, bool, int (uint32), float (float32), and lists of str or int (int32) that are not empty.
    tensors: name, dtype ("F32", "MXFP4" and so on) and shape of each, in the order of `offsets`.
    """
    numbers = {dtype: (kind, block, size) for kind, (dtype, block, size) in _TYPES.items()}
    parts = [_MAGIC, struct.pack("<IQQ", _VERSIONS[-1], len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, packed = _packed(value)
        parts += [_text(key), struct.pack("<I", kind), packed]
    for (name, dtype, shape), offset in zip(tensors, offsets(tensors), strict=True):
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        parts += [_text(name), axes, struct.pack("<IQ", numbers[dtype][0], offset)]
    whole = b"".join(parts)
    return whole + bytes(-len(whole) % ALIGNMENT)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Count the bytes of a tensor."""
    block, size = next((block, size) for name, block, size in _TYPES.values() if name == dtype)
    return int(np.prod(shape, dtype=np.int64)) // block * size


def offsets(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> list[int]:
    """Place tensors behind one another, aligned: bytes from the header's end."""
    places, at = [], 0
    for _, dtype, shape in tensors:
        places.append(at)
        at += -(-nbytes(dtype, shape) // ALIGNMENT) * ALIGNMENT
    return places


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _packed(value: Any) -> tuple[int, bytes]:
    """Pack one value with its type."""
    match value:
        case str():
            return _STRING, _text(value)
        case bool():
            return _BOOL, struct.pack("<?", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case [str(), *_]:
            return _ARRAY, struct.pack("<IQ", _STRING, len(value)) + b"".join(map(_text, value))
        case [int(), *_]:
            return _ARRAY, struct.pack(f"<IQ{len(value)}i", 5, len(value), *value)
    raise TypeError(f"no GGUF value for {value!r}")
