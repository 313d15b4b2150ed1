"""Run OpenAI's gpt-oss models from packed weights, without PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptoss_lite import quant
    from gptoss_lite.async_engine import AsyncEngine
    from gptoss_lite.engine import Engine
    from gptoss_lite.errors import (
        CheckpointError,
        DeviceError,
        FormatError,
        GptOssError,
        OutOfMemoryError,
        RequestError,
    )
    from gptoss_lite.generation import (
        async_stream_generate,
        batch_generate,
        generate,
        load,
        load_model,
        stream_generate,
    )
    from gptoss_lite.sampling import SamplingParams
    from gptoss_lite.stream import GenerationEvent, Usage

__version__ = "0.1.0"

_HOMES = {
    name: module
    for module, names in {
        "async_engine": ("AsyncEngine",),
        "engine": ("Engine",),
        "errors": (
            "CheckpointError", "DeviceError", "FormatError", "GptOssError", "OutOfMemoryError",
            "RequestError",
        ),
        "generation": (
            "async_stream_generate", "batch_generate", "generate", "load", "load_model", "stream_generate",
        ),
        "sampling": ("SamplingParams",),
        "stream": ("GenerationEvent", "Usage"),
    }.items()
    for name in names
}  # fmt: skip

__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "DeviceError",
    "Engine",
    "FormatError",
    "GenerationEvent",
    "GptOssError",
    "OutOfMemoryError",
    "RequestError",
    "SamplingParams",
    "Usage",
    "async_stream_generate",
    "batch_generate",
    "generate",
    "load",
    "load_model",
    "quant",
    "stream_generate",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used, so that the package itself is free."""
    if name == "quant":
        return importlib.import_module("gptoss_lite.quant")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
