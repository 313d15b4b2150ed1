"""Safetensors files: the header checked, the data mapped, values and checksums verified; and a writer."""

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from gptoss_lite.errors import CheckpointError, FormatError
from gptoss_lite.quant.checksum import Checksum, lanes, read
from gptoss_lite.quant.qtensor import Int8Tensor, MXFP4Tensor, QTensor
from gptoss_lite.threads import spread

FORMAT, FORMAT_VERSION = "gptoss-lite", "1"  # __metadata__ of the files we write

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
}
_EXPONENT_BITS: dict[str, np.uint32 | np.uint16] = {
    "F32": np.uint32(0x7F800000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}
FLOATS = tuple(_EXPONENT_BITS)
_LINE = 64  # bytes of a cache line: where the data begins, and each tensor as far as the format allows
_PART, _PAGE = (
    1 << 24,
    1 << 12,
)  # bytes of a tensor that a thread verifies at most, of which they are multiples
_CHUNK = 1 << 18  # floats looked at together

Note: TypeAlias = Callable[[int], None]  # told how many bytes more are done


def ignore(nbytes: int) -> None:
    """Take no note."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as its file holds it: what the header says, and its mapped bytes.

    dtype: safetensors' name for it, such as "BF16"; checksum: eight hex digits, or None in a file not ours.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    checksum: str | None

    def error(self, text: str) -> CheckpointError:
        """Make an error of a predicate, with file and tensor as its subject."""
        return CheckpointError(f"{self.file}: tensor {self.name} {text}")

    def array(self, *parts: int | slice) -> NDArray[Any]:
        """View the bytes as a read-only array, or a part of a part of it; misaligned ones are copied."""
        array = self.data.view(_DTYPES[self.dtype]).reshape(self.shape)
        for part in parts:
            array = array[part]
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return array

    def verify(self, threads: int = 1, note: Note = ignore) -> None:
        """Compare the data with the checksum, if there is one, and refuse NaN and infinity, in one pass.

        threads: that share the work. note: told, on the caller's thread, how many bytes more are done.
        Raises CheckpointError naming file and tensor, and the position of what is not finite.
        """
        checksum, size = Checksum(self.name, self.dtype, self.shape), self.data.size
        count = max(1, -(-size // _PART))
        step = max(1, -(-size // (count * _PAGE))) * _PAGE
        parts = [self.data[start : start + step] for start in range(0, size, step)]
        for number, (crc, bad) in enumerate(spread(self._look, parts, threads)):
            if bad is not None:
                index = (number * step + bad) // _DTYPES[self.dtype].itemsize
                position = tuple(int(i) for i in np.unravel_index(index, self.shape))
                raise self.error(f"holds {float(self.array()[position])} at {position}: must be finite")
            checksum.append(crc, parts[number].size)
            note(parts[number].size)
        if self.checksum is not None and self.checksum != str(checksum):
            raise self.error(f"is damaged: its checksum is {checksum}, and was {self.checksum} when written")

    def _look(self, part: NDArray[np.uint8]) -> tuple[int, int | None]:
        """Look at some of the data -> its CRC-32, if that is wanted, and where a float is not finite."""
        mask, wide = _EXPONENT_BITS.get(self.dtype), lanes(part.size)
        if mask is None:
            return (0 if self.checksum is None else read(part, lanes=wide)[0]), None
        crc = finite = 0
        if wide or self.checksum is not None:
            crc, finite = read(part, lanes=wide, exponent=int(mask) * (0x10001 if mask.itemsize == 2 else 1))
        bad = _not_finite(part[finite:].view(mask.dtype), mask)
        return crc, None if bad is None else finite + bad * mask.itemsize


def _not_finite(bits: NDArray[Any], mask: Any) -> int | None:
    """Find the first of floats, by their bits, whose exponent is all ones: its index; None where none is."""
    sign = 1 << 8 * bits.itemsize - 1
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        # As unsigned numbers, floats are highest furthest below zero, as signed ones, furthest above it.
        if chunk.max() >= sign + int(mask) or chunk.view(f"i{bits.itemsize}").max() >= mask:
            return start + int((chunk & mask == mask).argmax())
    return None


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Map one safetensors file, after the safetensors library has found its header sound.

    The library refuses headers that are not UTF-8 JSON of the right form, and offsets that overlap, leave
    gaps, disagree with dtype and shape, or end before or after the file. It lets a name given twice pass; we
    do not.
    Raises CheckpointError naming the file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, or not a file")
    try:
        with path.open("rb") as file:  # the library says of a file that it may not read that it is not there
            pass
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        with safe_open(path, "numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(size), str(path))
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)[8 + size :]
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split()).removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"{path} is not a sound safetensors file: {reason[:200]}") from None
    metadata = header.pop("__metadata__", None) or {}
    # Either key makes it a file of ours, so that no single damaged bit can switch the checksums off.
    ours = metadata.get("format") == FORMAT or "checksums" in metadata
    checksums = _checksums(path, metadata, set(header)) if ours else {}
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(path, name, entry["dtype"], shape, data[start:stop], checksums.get(name))
    return tensors


def save_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any] | QTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors to one safetensors file, with a CRC-32 of each over its name, dtype, shape and data.

    tensors: float32, float16, bfloat16, int8 or uint8; an MXFP4Tensor is written as name_blocks and
    name_scales, an Int8Tensor as name_codes and name_scales.
    The file appears under its name only once it is whole and on disk.
    Raises FormatError on another dtype, CheckpointError where the file cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        match tensor:
            case MXFP4Tensor(blocks=blocks, scales=scales):
                arrays |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            case Int8Tensor(codes=codes, scales=scales):
                arrays |= {f"{name}_codes": codes, f"{name}_scales": scales}
            case QTensor():
                raise FormatError(f"cannot save {name!r}: {type(tensor).__name__} has no form on disk")
            case _:
                arrays[name] = tensor
    entries = {name: (dtype_name(name, array.dtype), array.shape) for name, array in arrays.items()}
    entries = dict(sorted(entries.items(), key=lambda item: rank(*item[1])))
    checksums = {}
    for name, entry in entries.items():
        checksum = Checksum(name, *entry)
        checksum.update(as_bytes(arrays[name]))
        checksums[name] = str(checksum)
    start = header(entries, checksums, {"format": FORMAT, **(metadata or {})})
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(start)
            for name in entries:
                file.write(as_bytes(arrays[name]))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; raise CheckpointError naming the file where it does not."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, or not a file")
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """Parse one UTF-8 JSON object with no duplicate keys; raise CheckpointError naming the source."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"{abbreviated(key)} is there twice")
            values[key] = value
        return values

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not sound JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} holds {abbreviated(value)}: must be a JSON object")
    return value


def abbreviated(value: object) -> str:
    """Return repr(value), cut to what fits into an error line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    checksums: Mapping[str, str],
    metadata: Mapping[str, str],
) -> bytes:
    """Make the bytes that precede the data: as many for the same names, whatever the checksums.

    tensors: safetensors' dtype and shape by name, in the order of their data. metadata: other than of
    checksums; its "format" is "gptoss-lite" in what only this package reads, "pt" where others look for it.
    """
    entries: dict[str, Any] = {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + nbytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
        start = stop
    ours = {"format_version": FORMAT_VERSION, "checksums": json.dumps(dict(checksums))}
    text = json.dumps({"__metadata__": {**metadata, **ours}, **entries}).encode()
    text += b" " * (-(8 + len(text)) % _LINE)
    return len(text).to_bytes(8, "little") + text


def rank(dtype: str, shape: tuple[int, ...]) -> tuple[bool, int]:
    """Tell where a tensor shall come among those of a file: sorted so, all start where they should.

    The format allows no gaps. So tensors of whole cache lines come first and begin at one, and then the
    others, widest elements first, each at a multiple of its element size.
    """
    is_ragged = nbytes(dtype, shape) % _LINE != 0
    return is_ragged, -_DTYPES[dtype].itemsize if is_ragged else 0


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Count the bytes of a tensor."""
    return math.prod(shape) * _DTYPES[dtype].itemsize


def dtype_name(name: str, dtype: np.dtype[Any]) -> str:
    """Spell a NumPy dtype as safetensors does; raises FormatError, naming the tensor, on another."""
    for code, known in _DTYPES.items():
        if known == dtype:
            return code
    raise FormatError(f"cannot save {name!r}, {dtype}: give a float, int8 or uint8")


def _checksums(path: Path, metadata: Mapping[str, str], names: set[str]) -> dict[str, str]:
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version is {version!r}: this release reads {FORMAT_VERSION!r}")
    checksums = parse_json(metadata.get("checksums", "").encode(), f"{path}: checksums")
    if unpaired := set(checksums) ^ names:
        raise CheckpointError(f"{path} is damaged: {min(unpaired)!r} is only one of tensor and checksum")
    return checksums


def as_bytes(array: NDArray[Any]) -> memoryview:
    """View the bytes of an array; they are copied only where they do not lie in order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
