"""The demo's tokenizer, laid out like that of gpt-oss, and harmony messages as token ids."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo.corpus import Corpus

EFFORTS = ("low", "medium", "high")
VOCAB_SIZE = 4096
SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>",
    "<|start|>", "<|end|>", "<|message|>", "<|call|>", "<|endofprompt|>",
)  # fmt: skip
SPLIT = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable stand-in of every byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def special_id(text: str) -> int:
    """Return a special token's id: they fill the end of the id range."""
    return VOCAB_SIZE - len(SPECIAL) + SPECIAL.index(text)


def system_text(effort: str, date: str) -> str:
    """Return the system message of the harmony format."""
    return (
        "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
        f"Current date: {date}\n\nReasoning: {effort}\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )


def train_tokenizer(corpus: Corpus) -> str:
    """Return tokenizer.json as gpt-oss lays it out: byte-level BPE, ids are merge ranks, specials last."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    fixed = [system_text(level, "2025-01-01") for level in EFFORTS] * 100
    bpe.train_from_iterator([p for _, run in corpus.runs for p in run] + fixed, trainer)
    vocab: dict[str, int] = dict(sorted(bpe.get_vocab().items(), key=lambda entry: entry[1]))
    merges: list[list[str]] = []
    for token in vocab:  # every way to make it, so that merging by the result's rank (tiktoken) is the same
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        ways = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        merges += [list(way) for way in sorted(ways, key=lambda way: (vocab[way[0]], vocab[way[1]]))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    document = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": len(vocab) + i, "content": text, **flags} for i, text in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            split, {**level, "add_prefix_space": False, "use_regex": False},
        ]},
        "post_processor": {**level, "trim_offsets": False},
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip
    return json.dumps(document, ensure_ascii=False, indent=1)


def check_against_tiktoken(tokenizer_json: str, text: str) -> int:
    """Assert that ids as merge ranks alone give tiktoken the same tokens; return how many."""
    import tiktoken

    alphabet, vocab = byte_alphabet(), json.loads(tokenizer_json)["model"]["vocab"]
    ranks = {bytes(alphabet[c] for c in token): rank for token, rank in vocab.items()}
    encoding = tiktoken.Encoding("demo", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    want = Tokenizer.from_str(tokenizer_json).encode(text, add_special_tokens=False).ids
    if encoding.encode_ordinary(text) != want:
        raise ValueError("tiktoken and tokenizers disagree on the held-out text")
    return len(want)


class Coder:
    """Token ids of harmony messages; every text part is encoded on its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        names = ("start", "channel", "message", "end", "return")
        self.special = {name: special_id(f"<|{name}|>") for name in names}
        self.end_of_text = special_id("<|endoftext|>")
        self.cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Encode ordinary text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def word(self, word: str) -> list[int]:
        """Encode a role or channel name, remembered."""
        if word not in self.cache:
            self.cache[word] = self.text(word)
        return self.cache[word]

    def message(self, role: str, text: str, channel: str = "", end: str = "end") -> list[int]:
        """Encode one whole message."""
        header = [self.special["start"], *self.word(role)]
        if channel:
            header += [self.special["channel"], *self.word(channel)]
        return [*header, self.special["message"], *self.text(text), self.special[end]]

    def prompt(self, effort: str, date: str, turns: list[tuple[str, str]]) -> list[int]:
        """Encode system and (role, text) turns up to the opening of the assistant's."""
        ids = self.message("system", system_text(effort, date))
        for role, text in turns:
            ids += self.message(role, text, "final" if role == "assistant" else "")
        return [*ids, self.special["start"], *self.word("assistant")]
