"""Checkpoints as named, memory-mapped tensors: every layout on disk, one naming here."""

from gptoss_lite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from gptoss_lite.checkpoint.weights import StoredForm
from gptoss_lite.quant.tensorfile import save_file

__all__ = ["Checkpoint", "StoredForm", "open_checkpoint", "save_file"]
