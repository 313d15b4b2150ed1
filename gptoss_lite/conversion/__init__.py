"""Checkpoint to checkpoint: another layout, or quantised; streamed, in bounded memory, resumable."""

from gptoss_lite.conversion.convert import plan_conversion, plan_quantization
from gptoss_lite.conversion.writer import execute

__all__ = ["execute", "plan_conversion", "plan_quantization"]
