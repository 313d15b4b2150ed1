"""Text to token ids and back, from a checkpoint's tokenizer.json alone; never touches the network."""

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import tiktoken

from gptoss_lite import vocab
from gptoss_lite.checkpoint import gguf_vocabulary
from gptoss_lite.errors import CheckpointError

HARMONY_TOKENS = (
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|end|>",
    "<|call|>",
    "<|return|>",
    "<|endoftext|>",
)
EMBEDDED_VOCAB_SIZE = 201088  # width of the logits of gpt-oss-20b and gpt-oss-120b
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# tiktoken panics (StackOverflow in its regex engine) on a run of about a million white-space characters
LONGEST_SPACE_RUN = 100_000

# Letters, marks, digits, signs and white space of several scripts, one by one and in runs.
_PROBE = (
    "Once upon a  time, in 1234:\n\n\t d\u00e9j\u00e0-vu's (\u4f60\u597d) e\u0301 \u00bd_\U0001f642!! \r\n "
)


class Tokenizer:
    """Byte-pair tokenizer with harmony's special tokens, over ids 0 to `vocab_size` - 1.

    Every id below `vocab_size` decodes: ids that the vocabulary leaves free are special tokens
    named ``<|reserved_i|>``. Text is only ever encoded as ordinary text; special tokens are
    placed by id, from `special`.
    """

    def __init__(self, pattern: str, ranks: dict[bytes, int], special: Mapping[str, int], vocab_size: int):
        taken = set(ranks.values()) | set(special.values())
        reserved = {f"<|reserved_{i}|>": i for i in range(vocab_size) if i not in taken}
        for name in reserved.keys() & special.keys():
            raise ValueError(f"added token {name!r} has id {special[name]}, but {reserved[name]} is free")
        self.special: Mapping[str, int] = {**special, **reserved}
        self.special_ids = frozenset(self.special.values())
        self.vocab_size = vocab_size
        self._encoding = tiktoken.Encoding(
            "gptoss_lite", pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(self.special)
        )

    @classmethod
    def embedded(cls, vocab_size: int = EMBEDDED_VOCAB_SIZE) -> Self:
        """Build o200k_harmony, the vocabulary of gpt-oss, from the copy inside this package."""
        ranks = {token: rank for rank, token in enumerate(vocab.read_tokens())}
        return cls(vocab.PATTERN, ranks, vocab.SPECIAL_TOKENS, vocab_size)

    @classmethod
    def from_file(cls, path: str | Path, vocab_size: int) -> Self:
        """Read a Hugging Face tokenizer.json; CheckpointError says what in it is damaged or not supported.

        A token's id is its merge rank, so the file's merges are not read.
        """
        try:
            text = Path(path).read_bytes().decode("utf-8")
            document = _parse_without_merges(text)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not sound JSON: {error}") from error
        return cls.from_document(document, vocab_size, str(path))

    @classmethod
    def from_document(cls, document: Any, vocab_size: int, source: str) -> Self:
        """Read a parsed tokenizer.json; CheckpointError, naming the source, says what is not supported."""
        try:
            pattern, ranks, special = _read_document(document)
            _check_ids(ranks, special, vocab_size)
            tokenizer = cls(pattern, ranks, special, vocab_size)
            tokenizer._check_pattern()
            return tokenizer
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            problem = str(error) if type(error) is ValueError else f"not a tokenizer file ({error!r})"
            raise CheckpointError(f"{source}: {problem}") from error

    def _check_pattern(self) -> None:
        """Raise ValueError if the pattern leaves out parts of a text, which would silently be lost."""
        try:
            kept = self.decode(self.encode(_PROBE)) == _PROBE
        except KeyboardInterrupt:
            raise
        except BaseException:  # tiktoken panics on a pattern that matches nothing, past Exception
            kept = False
        if not kept:
            raise ValueError("the pattern of pre_tokenizer does not cover every text")

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text; the spelling of a special token in it is text like any other."""
        if len(text) <= LONGEST_SPACE_RUN:
            return self._encoding.encode_ordinary(text)
        cuts = [
            cut
            for run in re.finditer(r"\s+", text)
            for cut in range(run.start() + LONGEST_SPACE_RUN, run.end(), LONGEST_SPACE_RUN)
        ]
        bounds = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [token for start, end in bounds for token in self._encoding.encode_ordinary(text[start:end])]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, special tokens by name; invalid UTF-8 and ids outside the vocabulary give U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, those of U+FFFD for an id outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            return REPLACEMENT.encode()
        return self._encoding.decode_single_token_bytes(token)

    def is_special(self, token: int) -> bool:
        """Tell whether an id is one of `special`, the reserved ones included."""
        return token in self.special_ids

    def decoder(self) -> "StreamDecoder":
        """Return a fresh decoder for tokens that arrive one by one."""
        return StreamDecoder(self)


class StreamDecoder:
    """Turns tokens into text one by one, holding a character back until its last byte has come.

    The pieces, joined, equal `Tokenizer.decode` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._token_bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Return the whole characters that are complete with this token, perhaps none."""
        return self._utf8.decode(self._token_bytes(token))

    def finish(self) -> str:
        """Return what is still held back, as U+FFFD, and start afresh."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def load_tokenizer(checkpoint: str | Path, vocab_size: int) -> Tokenizer:
    """Load the tokenizer of a checkpoint, a directory or a GGUF file, whose logits are `vocab_size` wide.

    Where there is none the embedded vocabulary stands in, if the size is that of gpt-oss.
    """
    path = Path(checkpoint)
    if path.is_file():
        document = gguf_vocabulary.read(path)
        if document is not None:
            return Tokenizer.from_document(document, vocab_size, str(path))
        path = path.with_name("tokenizer.json")
    else:
        path /= "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(path, vocab_size)
    if vocab_size == EMBEDDED_VOCAB_SIZE:
        return Tokenizer.embedded()
    raise CheckpointError(
        f"{path} is missing, and the embedded tokenizer has {EMBEDDED_VOCAB_SIZE} ids where this checkpoint "
        f"has {vocab_size}: add the file, or use load_model for work on token ids"
    )


def _parse_without_merges(text: str) -> Any:
    """Parse tokenizer.json up to its merges, most of the file, if only closing brackets follow them."""
    merges = re.search(r'[{,]\s*"merges"\s*:', text)  # outside a string: inside one the quote is escaped
    if merges and re.search(r"\]\s*\}\s*\}\s*\Z", text[-100:]):
        try:
            document = json.loads(text[: merges.start()] + "}}")
        except ValueError:
            return json.loads(text)
        if document.keys() >= {"added_tokens", "normalizer", "pre_tokenizer", "decoder", "model"}:
            return document
    return json.loads(text)


def _read_document(document: Any) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Return pattern, ranks and special tokens; ValueError for what this tokenizer cannot do."""
    model = document["model"]
    wanted: list[tuple[str, Any, Any]] = [
        ("normalizer", document.get("normalizer"), None),
        ("decoder type", document["decoder"]["type"], "ByteLevel"),
        ("model type", model["type"], "BPE"),
        ("model byte_fallback", model.get("byte_fallback") or False, False),
        ("model dropout", model.get("dropout") or None, None),
        ("model unk_token", model.get("unk_token"), None),
        ("model continuing_subword_prefix", model.get("continuing_subword_prefix") or None, None),
        ("model end_of_word_suffix", model.get("end_of_word_suffix") or None, None),
    ]
    for key, value, expected in wanted:
        if value != expected:
            raise ValueError(f"{key} {value!r} is not supported, only {expected!r}")
    special = {}
    for token in document["added_tokens"]:
        if not token["special"]:
            raise ValueError(f"added token {token['content']!r} is not special, which is not supported")
        special[token["content"]] = token["id"]
    missing = [name for name in HARMONY_TOKENS if name not in special]
    if missing:
        raise ValueError(f"no added token {missing[0]!r}: not a tokenizer for gpt-oss")
    return _read_pattern(document["pre_tokenizer"]), _read_ranks(model["vocab"]), special


def _read_pattern(pre_tokenizer: Any) -> str:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"]:
        raise ValueError("pre_tokenizer is not a Split followed by ByteLevel, which alone is supported")
    split, byte_level = steps
    if split["behavior"] != "Isolated" or split.get("invert") or "Regex" not in split["pattern"]:
        raise ValueError("pre_tokenizer Split is not by an Isolated Regex, which alone is supported")
    if byte_level.get("add_prefix_space", True) or byte_level.get("use_regex", True):
        raise ValueError("pre_tokenizer ByteLevel with add_prefix_space or use_regex is not supported")
    pattern: str = split["pattern"]["Regex"]
    return pattern


def _byte_of_character() -> dict[int, int]:
    """Return GPT-2's table: each byte stands in the file as a printable character, itself where it is one."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


def _read_ranks(names: dict[str, int]) -> dict[bytes, int]:
    table = _byte_of_character()
    joined = "".join(names)
    strange = set(joined) - set(map(chr, table))
    if strange:
        raise ValueError(f"model vocab has the character {min(strange)!r}, which stands for no byte")
    blob = joined.translate(table).encode("latin-1")  # one call for all: far quicker than one each
    ranks, start = {}, 0
    for name, rank in names.items():
        end = start + len(name)
        ranks[blob[start:end]] = rank
        start = end
    absent = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if absent:
        raise ValueError(f"model vocab has no token for byte 0x{absent[0]:02x}")
    return ranks


def _check_ids(ranks: Mapping[bytes, int], special: Mapping[str, int], vocab_size: int) -> None:
    ids = [*ranks.values(), *special.values()]
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size and len(set(ids)) == len(ids):
        return
    owner: dict[int, str | bytes] = {}
    named: list[tuple[str | bytes, int]] = [*ranks.items(), *special.items()]
    for name, token in named:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"token {name!r} has id {token!r}, not one of 0 to {vocab_size - 1}")
        if token in owner:
            raise ValueError(f"tokens {owner[token]!r} and {name!r} share id {token}")
        owner[token] = name
