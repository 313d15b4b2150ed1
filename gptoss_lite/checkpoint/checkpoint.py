"""An opened checkpoint, whatever its layout: every weight of the model by its canonical name."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptoss_lite.checkpoint import gguf
from gptoss_lite.checkpoint.directory import find_weights, is_original, read_tensors
from gptoss_lite.checkpoint.quantization import Quantization
from gptoss_lite.checkpoint.weights import StoredForm, Tensor, Weight
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import CheckpointError
from gptoss_lite.quant.tensorfile import Note, StoredTensor, ignore, read_json


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint: every tensor of the model under Hugging Face's names, still on disk.

    path: the directory, or the GGUF file. layout: "mxfp4" (Hugging Face's, packed), "bf16" (Hugging Face's,
    dense), "original" (OpenAI's), "gguf", "gptoss-lite" (Hugging Face's names, with other formats), or the
    name of the tiles that it is packed in. settings: config.json, or what stands for it, parsed. ignored:
    tensors of its files that the network does not ask for.
    """

    path: Path
    config: ModelConfig
    layout: str
    settings: Mapping[str, Any]
    weights: Mapping[str, Weight]
    ignored: tuple[str, ...] = ()

    def names(self) -> tuple[str, ...]:
        """List the canonical names; an expert weight is one name, packed or not."""
        return tuple(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    @property
    def nbytes(self) -> int:
        """Bytes of all these tensors on disk; tied ones count once."""
        sizes = {stored.name: stored.data.size for w in self.weights.values() for stored in w.stored}
        return sum(sizes.values())

    def forms(self) -> dict[str, StoredForm]:
        """Tell how each tensor is held, from the headers alone; of tied tensors the first has the bytes."""
        forms: dict[str, StoredForm] = {}
        seen: list[Weight] = []
        for name, weight in self.weights.items():
            form = weight.form
            tied = any(weight is other for other in seen)
            forms[name] = replace(form, nbytes=0) if tied else form
            seen.append(weight)
        return forms

    def tensor(self, name: str) -> Tensor:
        """Return one tensor, mapped and read-only where the file has it so: disk is read at first touch.

        Dense tensors keep the dtype of the file: float32, float16 or ml_dtypes.bfloat16. Expert weights are
        (experts, 2*intermediate_size, hidden_size) and (experts, hidden_size, intermediate_size) whatever the
        layout: a QTensor, or in bf16 perhaps a transposed view. Raises CheckpointError on an unknown name.
        """
        return self._weight(name).tensor()

    def verify(self, name: str, threads: int | None = None, note: Note = ignore) -> None:
        """Read one tensor through and refuse what no model may hold; call it once, before first use.

        threads: that share the work, by default one a core. note: told on the way, on the caller's thread,
        how many bytes more are done, in all those that the tensor has on disk.
        Raises CheckpointError naming file, tensor and position on NaN, infinity, and a scale that is NaN or
        takes a value of its block beyond float32; and on a wrong checksum in a file that this package wrote.
        """
        self._weight(name).verify(threads or os.cpu_count() or 1, note)

    def _weight(self, name: str) -> Weight:
        if name not in self.weights:
            raise CheckpointError(f"{self.path}: no tensor {name!r}: names() lists those there are")
        return self.weights[name]


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint, and check its headers against its config; loads no weights.

    path: a GGUF file or a directory that holds one and nothing else; or a directory with config.json and
    safetensors files, one or several, with or without an index, in any layout.
    Raises CheckpointError, naming file, tensor or key, where what the model needs is missing or malformed.
    """
    directory = Path(path)
    if not os.fspath(path) or not os.path.isdir(directory):  # unlike Path's, it takes any string
        if directory.suffix == ".gguf" and os.path.isfile(directory):
            return _open_gguf(directory)
        what = "is not a directory" if os.path.exists(directory) else "does not exist"
        raise CheckpointError(f"{directory} {what}: give a directory with config.json, or a GGUF file")
    if not (directory / "config.json").exists() and (files := sorted(directory.glob("*.gguf"))):
        if len(files) > 1:
            shown = ", ".join(file.name for file in files[:5])
            raise CheckpointError(f"{directory} holds several GGUF files: name one of {shown}")
        return _open_gguf(files[0])
    settings = read_json(directory / "config.json")
    config = ModelConfig.from_dict(settings, str(directory / "config.json"))
    quantization = Quantization.from_config(settings, str(directory / "config.json"))
    stored = read_tensors(directory)
    _refuse_further_layers(config, stored)
    layout = "original" if is_original(stored) else quantization.layout or config.quant_method or "bf16"
    weights = find_weights(directory, config, quantization, stored)
    return Checkpoint(directory, config, layout, settings, weights, _ignored(stored, weights))


def _open_gguf(file: Path) -> Checkpoint:
    settings, stored = gguf.read(file)
    config = ModelConfig.from_dict(settings, str(file))
    _refuse_further_layers(config, stored)
    weights = gguf.find_weights(file, config, stored)
    return Checkpoint(file, config, "gguf", settings, weights, _ignored(stored, weights))


def _ignored(stored: Mapping[str, StoredTensor], weights: Mapping[str, Weight]) -> tuple[str, ...]:
    asked = {tensor.name for weight in weights.values() for tensor in weight.stored}
    return tuple(name for name in stored if name not in asked)


def _refuse_further_layers(config: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    # Other tensors that nothing asks for are ignored: fine-tunes leave buffers and extra heads behind. But a
    # layer past the last one means that config.json is of another model, and the answers would be nonsense.
    for name, tensor in stored.items():
        layer = re.match(r"(?:model\.layers|block|blk)\.(\d{1,9})\.", name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            raise tensor.error(f"is of a layer past num_hidden_layers, {config.num_hidden_layers}")
