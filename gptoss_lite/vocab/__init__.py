"""The vocabulary o200k_harmony, for checkpoints that come without a tokenizer; see NOTICE for its licence."""

import hashlib
import lzma
import re
from importlib import resources

from gptoss_lite.errors import CheckpointError

# of the unpacked file; a test rebuilds o200k_base.tiktoken and compares its published SHA-256
PAYLOAD_SHA256 = "944c87918588f4b9b2b51ee09c95633efd68a2f46926d36cdfc51a6093a4a732"

PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

SPECIAL_TOKENS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}


def read_tokens() -> list[bytes]:
    """Return the 199,998 ordinary tokens, each at its id; CheckpointError if the file is damaged."""
    packed = resources.files(__name__).joinpath("o200k_base.xz").read_bytes()
    try:
        payload = lzma.decompress(packed)
    except lzma.LZMAError as error:
        raise CheckpointError(f"o200k_base.xz is damaged ({error}): reinstall gptoss-lite") from error
    if hashlib.sha256(payload).hexdigest() != PAYLOAD_SHA256:
        raise CheckpointError("o200k_base.xz is not the one of this version: reinstall gptoss-lite")
    return [_unescape(line) if b"\\" in line else line for line in payload.split(b"\n")]


def _unescape(line: bytes) -> bytes:
    return re.sub(rb"\\(.)", lambda match: b"\n" if match[1] == b"n" else match[1], line)
