"""The vocabulary in GGUF's metadata, to and from the document that Hugging Face's tokenizer.json holds."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_lite import vocab
from gptoss_lite.errors import CheckpointError
from gptoss_lite.quant.gguffile import StringArray, read_file
from gptoss_lite.quant.tensorfile import abbreviated
from gptoss_lite.vocab.document import document

PRETOKENIZER = "gpt-4o"  # llama.cpp's name for the pattern of o200k, the one of gpt-oss

_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # types of tokens


def read(path: Path) -> dict[str, Any] | None:
    """Read the vocabulary of a GGUF file; see to_document."""
    return to_document(read_file(path).metadata, str(path))


def to_document(metadata: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """Make a tokenizer.json of a file's metadata; None where it has no vocabulary.

    Raises CheckpointError naming the source and the key of what is not supported.
    """
    model, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model in (None, "none", "no_vocab"):
        return None
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if model != "gpt2" or pre != PRETOKENIZER:
        found = f"{abbreviated(model)} with {abbreviated(pre)}"
        raise CheckpointError(f"{source}: tokenizer.ggml.model is {found}: must be 'gpt2' with 'gpt-4o'")
    if not (isinstance(tokens, StringArray) and isinstance(types, np.ndarray) and len(types) == len(tokens)):
        raise CheckpointError(f"{source}: tokenizer.ggml.tokens and token_type are not lists of one length")
    merges = metadata.get("tokenizer.ggml.merges")
    try:
        kinds = list(zip(tokens.decode(), types.tolist(), strict=True))
        pairs = [merge.split(" ", 1) for merge in merges.decode()] if isinstance(merges, StringArray) else []
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source}: tokenizer.ggml.tokens or merges are not UTF-8: {error}") from None
    names = {text: token for token, (text, kind) in enumerate(kinds) if kind == _NORMAL}
    # llama.cpp takes some special tokens for the user's.
    special = {
        text: token
        for token, (text, kind) in enumerate(kinds)
        if kind == _CONTROL or (kind == _USER and re.fullmatch(r"<\|.+\|>", text))
    }
    if other := [text for text, kind in kinds if kind == _USER and text not in special]:
        shown = abbreviated(other[0])
        raise CheckpointError(f"{source}: added token {shown} is not special, which is not supported")
    return document(vocab.PATTERN, names, pairs, special)


def to_metadata(tokenizer: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Make GGUF's keys of a parsed tokenizer.json, whose form a Tokenizer has found sound.

    Raises CheckpointError where its pattern is none that llama.cpp knows for gpt-oss.
    """
    pattern = tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    if pattern != vocab.PATTERN:
        raise CheckpointError(
            "tokenizer.json splits text by a pattern of its own, for which GGUF has no name"
        )
    tokens = [f"[PAD{token}]" for token in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for text, token in tokenizer["model"]["vocab"].items():
        tokens[token], types[token] = text, _NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL
    # tokenizer.json has merges as pairs, or in older files as one text with a blank.
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    special = {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": PRETOKENIZER,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **({"tokenizer.ggml.merges": merges} if merges else {}),
        "tokenizer.ggml.bos_token_id": special["<|startoftext|>"],
        "tokenizer.ggml.eos_token_id": special["<|return|>"],
        "tokenizer.ggml.padding_token_id": special["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
    }
