"""What a conversion will write, to the byte, from the headers of its source: before anything is written."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gptoss_lite import __version__
from gptoss_lite.checkpoint import Checkpoint, StoredForm
from gptoss_lite.checkpoint.names import Name, names
from gptoss_lite.checkpoint.quantization import METHOD
from gptoss_lite.conversion import texts
from gptoss_lite.conversion.encoders import Encoder
from gptoss_lite.conversion.files import SHARD_BYTES, File, nbytes, shards
from gptoss_lite.conversion.forms import forms
from gptoss_lite.conversion.recode import Recoded
from gptoss_lite.conversion.targets import Job, jobs
from gptoss_lite.errors import CheckpointError
from gptoss_lite.quant.formats import MXFP4, Format, Int8
from gptoss_lite.quant.tensorfile import FORMAT

GGUF_SUFFIX = ".gguf"
PROVENANCE = "gptoss-lite.provenance"  # GGUF's key for what safetensors files have in their metadata


@dataclass(frozen=True, slots=True)
class Plan:
    """One conversion, decided: the files with their jobs, and the texts beside them.

    destination: a directory, or a GGUF file. method: how values were rounded, in words. in_order: whether
    jobs must be done one by one. digest: of everything that decides what is written.
    """

    checkpoint: Checkpoint
    target: str
    destination: Path
    files: tuple[File, ...]
    texts: Mapping[str, bytes]
    method: str
    in_order: bool
    digest: str

    @property
    def is_single_file(self) -> bool:
        """Whether the destination is a file, not a directory."""
        return self.destination.suffix == GGUF_SUFFIX

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs, in the order of the network."""
        return tuple(job for file in self.files for job in file.jobs)

    @property
    def weights(self) -> tuple[Recoded, ...]:
        """All weights, in the order of the network."""
        return tuple(weight for job in self.jobs for weight in job.weights)

    @property
    def sources(self) -> set[Path]:
        """The files that are read."""
        return _sources(self.checkpoint)

    @property
    def size(self) -> int:
        """Bytes that will be written."""
        return sum(file.size for file in self.files) + sum(map(len, self.texts.values()))

    def bytes_after(self) -> dict[str, int]:
        """Count the bytes that each weight will take; of weights that share a tensor, each its rows."""
        counts: dict[str, int] = {}
        for file in self.files:
            for job in file.jobs:
                total = sum(nbytes(tensor, file.is_gguf) for tensor in job.tensors)
                rows = sum(weight.name.shape[0] for weight in job.weights)
                for weight in job.weights:
                    counts[weight.name.name] = total * weight.name.shape[0] // rows
        return counts

    def stored_forms(self) -> dict[str, StoredForm]:
        """Tell how the result will hold its weights, as Checkpoint.forms does, for a memory plan."""
        after = self.bytes_after()
        return {weight.name.name: stored_form(weight, after[weight.name.name]) for weight in self.weights}


def stored_form(weight: Recoded, size: int) -> StoredForm:
    """Describe one weight of the result."""
    match weight.form:
        case MXFP4():
            return StoredForm("MXFP4", size)
        case Int8() as form:
            group = form.group(weight.name.shape[-1])
            return StoredForm("INT8", size, group, form.scales, form.group_size is None)
        case dtype:
            return StoredForm(dtype, size)


def make_plan(
    checkpoint: Checkpoint,
    destination: Path,
    target: str,
    chosen: Mapping[str, Format | None],
    encode: Encoder,
    method: str,
    *,
    in_order: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Decide what a conversion writes.

    chosen: the format that every weight shall have, None for floats. encode: quantises; method: how, in
    words that stand in the files' metadata; in_order: whether that wants weights in the order of the network.
    shard_bytes: of a safetensors file, about.
    Raises FormatError where the target would lose something, naming it.
    """
    destination = Path(os.path.abspath(destination))
    if checkpoint.path.resolve() == destination.resolve():
        raise CheckpointError(f"{destination} is the source itself: give another destination")
    known = _names(checkpoint, target)
    decided = forms(checkpoint, target, known, {name: chosen.get(name) for name in known})
    recoded = [Recoded(name, checkpoint.weights[key], decided[key], encode) for key, name in known.items()]
    made, origin = jobs(target, recoded), _origin(checkpoint, method)
    side: dict[str, bytes] = {}
    if target == "gguf":
        files = [_gguf_file(checkpoint, destination, made, origin)]
    else:
        if destination.suffix == GGUF_SUFFIX:
            raise CheckpointError(f"{destination} ends in {GGUF_SUFFIX}, and --to {target} makes a directory")
        files, side = _directory(checkpoint, target, made, decided, origin, shard_bytes)
    digest = _digest(checkpoint, files, side)
    return Plan(checkpoint, target, destination, tuple(files), side, method, in_order, digest)


def _gguf_file(checkpoint: Checkpoint, destination: Path, made: list[Job], origin: dict[str, str]) -> File:
    name = destination.name if destination.suffix == GGUF_SUFFIX else f"model{GGUF_SUFFIX}"
    metadata = texts.gguf_metadata(checkpoint, texts.side_files(checkpoint))
    return File(name, tuple(made), metadata | {PROVENANCE: json.dumps(origin)}, is_gguf=True)


def _directory(
    checkpoint: Checkpoint,
    target: str,
    made: list[Job],
    decided: Mapping[str, Format | str],
    origin: dict[str, str],
    shard_bytes: int,
) -> tuple[list[File], dict[str, bytes]]:
    """Lay out a directory: its files of weights, and the texts beside them."""
    if target == "original":
        config, others_read = texts.original_config(checkpoint.config), True
    else:
        config = texts.huggingface_config(checkpoint, target, decided)
        others_read = config.get("quantization_config", {}).get("quant_method") != METHOD
    # Others look for "pt" there; a file that only this package can read says so.
    metadata = {"format": "pt" if others_read else FORMAT, **origin}
    files, index = shards(made, metadata, shard_bytes)
    text = json.dumps(config, indent=2).encode() + b"\n"
    return files, {**texts.side_files(checkpoint), "config.json": text, **index}


def _names(checkpoint: Checkpoint, target: str) -> dict[str, Name]:
    """List the weights to be written; original/ and GGUF know no tied ones."""
    config = checkpoint.config
    if target in ("original", "gguf"):
        config = replace(config, tie_word_embeddings=False)
    return {name.name: name for name in names(config)}


def _origin(checkpoint: Checkpoint, method: str) -> dict[str, str]:
    """Say where the weights come from, by what stays the same wherever the source lies."""
    stored = {(t.file.name, t.name, t.dtype, t.shape) for w in checkpoint.weights.values() for t in w.stored}
    fingerprint = hashlib.blake2b(json.dumps(sorted(stored)).encode(), digest_size=16).hexdigest()
    return {
        "created_by": f"gptoss-lite {__version__}",
        "source": _model_name(checkpoint.path),
        "source_layout": checkpoint.layout,
        "source_headers": fingerprint,
        "method": method,
    }


def _sources(checkpoint: Checkpoint) -> set[Path]:
    return {stored.file for weight in checkpoint.weights.values() for stored in weight.stored}


def _model_name(path: Path) -> str:
    """Name a source by its last folder, or in the hub's cache by the model."""
    path = path.absolute()
    snapshot = next((part for part in (path, *path.parents) if part.parent.name == "snapshots"), None)
    if snapshot is not None and (hub := snapshot.parent.parent.name).startswith("models--"):
        return "/".join([hub.removeprefix("models--").replace("--", "/"), *path.relative_to(snapshot).parts])
    return path.name


def _digest(checkpoint: Checkpoint, files: list[File], side: Mapping[str, bytes]) -> str:
    """Sum up everything that decides the bytes of the result, the state of the source's files included."""
    state = hashlib.blake2b(digest_size=16)
    for source in sorted(_sources(checkpoint)):
        stat = source.stat()
        state.update(json.dumps([str(source.resolve()), stat.st_size, stat.st_mtime_ns]).encode())
    for file in files:
        state.update(file.header(dict.fromkeys(file.starts, "")))
        state.update(json.dumps([str(w.form) for job in file.jobs for w in job.weights]).encode())
    for name, text in sorted(side.items()):
        state.update(name.encode() + b"\0" + text)
    return state.hexdigest()
