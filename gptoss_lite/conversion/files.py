"""Files whose size is known before their contents: the header first made, the data written in any order."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptoss_lite.checkpoint.directory import INDEX
from gptoss_lite.conversion.targets import Entry, Job
from gptoss_lite.quant import gguffile, tensorfile

SHARD_BYTES = 5 * 10**9  # of a safetensors file, about, as Hugging Face cuts them

_NO_CHECKSUM = "0" * 8


@dataclass(frozen=True, slots=True)
class File:
    """One file of weights: the jobs that fill it, and where each of their tensors starts.

    metadata: of the header. starts: bytes from the beginning of the file, by tensor.
    """

    name: str
    jobs: tuple[Job, ...]
    metadata: Mapping[str, Any]
    is_gguf: bool = False
    starts: Mapping[str, int] = field(init=False)
    size: int = field(init=False)

    def __post_init__(self) -> None:
        """Lay the tensors out."""
        at = len(self.header({tensor.name: _NO_CHECKSUM for tensor in self.tensors}))
        starts, end = {}, at
        for tensor, offset in zip(self.tensors, self._offsets(), strict=True):
            starts[tensor.name] = at + offset
            end = at + offset + nbytes(tensor, self.is_gguf)
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "size", end)

    @property
    def tensors(self) -> tuple[Entry, ...]:
        """All tensors in the order of their data."""
        tensors = [tensor for job in self.jobs for tensor in job.tensors]
        if self.is_gguf:
            return tuple(tensors)
        return tuple(sorted(tensors, key=lambda tensor: tensorfile.rank(tensor.dtype, tensor.shape)))

    def _offsets(self) -> list[int]:
        if self.is_gguf:
            return gguffile.offsets([(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors])
        offsets, at = [], 0
        for tensor in self.tensors:
            offsets.append(at)
            at += nbytes(tensor, False)
        return offsets

    def header(self, checksums: Mapping[str, str]) -> bytes:
        """Make the bytes that precede the data, as many whatever the checksums of the tensors."""
        if self.is_gguf:
            entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in self.tensors]
            ours = {gguffile.CHECKSUMS: json.dumps(dict(checksums))}
            return gguffile.header({**self.metadata, **ours}, entries)
        named = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self.tensors}
        return tensorfile.header(named, checksums, self.metadata)


def nbytes(tensor: Entry, is_gguf: bool) -> int:
    """Count the bytes of a tensor's data."""
    if is_gguf:
        return gguffile.nbytes(tensor.dtype, tensor.shape)
    return tensorfile.nbytes(tensor.dtype, tensor.shape)


def shards(
    jobs: Sequence[Job], metadata: Mapping[str, str], shard_bytes: int
) -> tuple[list[File], dict[str, bytes]]:
    """Divide jobs among safetensors files of about so many bytes -> the files, and their index if several."""
    groups: list[list[Job]] = [[]]
    filled = 0
    for job in jobs:
        size = sum(nbytes(tensor, False) for tensor in job.tensors)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(job)
        filled += size
    if len(groups) == 1:
        return [File("model.safetensors", tuple(jobs), metadata)], {}
    files = [
        File(f"model-{number:05}-of-{len(groups):05}.safetensors", tuple(group), metadata)
        for number, group in enumerate(groups, 1)
    ]
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(nbytes(tensor, False) for file in files for tensor in file.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return files, {INDEX: json.dumps(index, indent=2).encode() + b"\n"}
