"""Everything that gptoss_lite raises on purpose."""


class GptOssError(Exception):
    """Base of all errors a caller can cause; its text is one line fit to show to a person."""


class CheckpointError(GptOssError):
    """A checkpoint directory that is missing, damaged, or not a gpt-oss model."""


class FormatError(GptOssError, ValueError):
    """An array, a quantised tensor or a tokenizer file whose form is not the one required."""


class DeviceError(GptOssError):
    """A device that is unknown or cannot be used here."""


class OutOfMemoryError(GptOssError, MemoryError):
    """Not enough memory on a device: says what is needed, what is free, and what would fit."""


class RequestError(GptOssError, ValueError):
    """A prompt, a message or a sampling option that cannot be served."""
