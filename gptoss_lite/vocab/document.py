"""The document that a tokenizer.json holds, made of its parts; and that of the embedded vocabulary."""

from collections.abc import Mapping, Sequence
from typing import Any

from gptoss_lite import vocab


def document(
    pattern: str, names: Mapping[str, int], merges: Sequence[Sequence[str]], special: Mapping[str, int]
) -> dict[str, Any]:
    """Set a byte-level BPE out as Hugging Face's tokenizers do.

    names: tokens in GPT-2's alphabet, and their ids; merges: pairs of them, the first to be merged first.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
    }
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": token, "content": text, **flags} for text, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_only]},
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {**model, "vocab": dict(names), "merges": [list(pair) for pair in merges]},
    }  # fmt: skip


def embedded() -> dict[str, Any]:
    """Make the tokenizer.json that gpt-oss checkpoints ship, of the vocabulary inside this package.

    Raises CheckpointError where that is damaged.
    """
    tokens = vocab.read_tokens()
    ranks = {token: rank for rank, token in enumerate(tokens)}
    alphabet = _alphabet()

    def name(token: bytes) -> str:
        return token.decode("latin-1").translate(alphabet)

    merges = []
    for token in tokens:
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = sorted(
            (ranks[left], ranks[right]) for left, right in halves if left in ranks and right in ranks
        )
        merges += [(name(tokens[left]), name(tokens[right])) for left, right in pairs]
    named = {token: text for text, token in vocab.SPECIAL_TOKENS.items()}
    ids = range(len(tokens), max(named) + 1)
    special = {named.get(token, f"<|reserved_{token}|>"): token for token in ids}
    return document(vocab.PATTERN, {name(token): rank for token, rank in ranks.items()}, merges, special)


def _alphabet() -> dict[int, str]:
    """GPT-2's table: each byte as a printable character, itself where it is one."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
