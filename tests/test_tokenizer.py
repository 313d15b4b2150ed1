"""The tokenizer against the published vocabulary, openai-harmony, and damaged files."""

import base64
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss_lite
from gptoss_lite import vocab
from gptoss_lite.errors import CheckpointError
from gptoss_lite.tokenizer import EMBEDDED_VOCAB_SIZE, HARMONY_TOKENS, Tokenizer, load_tokenizer

TIKTOKEN_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

TEXTS = [
    "",
    "Hello, world! It's 2,147,483,648 o'clock.",
    "def f(x):\n\treturn x ** 2  # square\r\n\n\n    print(f(3))",
    "Grüße aus Zürich, 你好, नमस्ते, مرحبا, こんにちは, Ελληνικά, Кириллица",
    "👩‍👩‍👧‍👦 🇨🇭 👋🏾 é e\u0301 \u200d \ufeff \x00\x1f",
    "<|start|>assistant<|channel|>final<|message|>not special<|return|><|reserved_200500|>",
    "   leading, trailing   \n \t ",
    "ǅungla ʰa ªº XMLHttpRequest iPhone12Pro",
]


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return Tokenizer.embedded()


def tiktoken_text() -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(vocab.read_tokens()))


def byte_names() -> list[str]:
    """GPT-2's names of the 256 bytes, in its own formulation."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    names, spare = [], 256
    for byte in range(256):
        names.append(chr(byte if byte in printable else spare))
        spare += byte not in printable
    return names


def tokenizer_json(tokens: list[bytes], special: dict[str, int]) -> dict[str, Any]:
    names = byte_names()
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True} for name, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": vocab.PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "vocab": {"".join(names[byte] for byte in token): i for i, token in enumerate(tokens)},
            "merges": [["a", "b"]],
        },
    }


@pytest.fixture
def small() -> dict[str, Any]:
    """A vocabulary of 260 tokens and harmony's special tokens behind them, in an order of its own."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b" a", b"\n\n"]
    return tokenizer_json(tokens, {name: 260 + i for i, name in enumerate(sorted(HARMONY_TOKENS))})


def write(folder: Path, document: object) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return path


def test_the_embedded_vocabulary_is_the_published_one() -> None:
    assert hashlib.sha256(tiktoken_text()).hexdigest() == TIKTOKEN_SHA256


def test_the_embedded_vocabulary_is_under_a_megabyte() -> None:
    assert Path(vocab.__file__).with_name("o200k_base.xz").stat().st_size < 1_000_000


def test_a_rebuilt_tokenizer_json_equals_the_embedded_vocabulary(embedded: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, tokenizer_json(vocab.read_tokens(), vocab.SPECIAL_TOKENS))
    tokenizer = Tokenizer.from_file(path, EMBEDDED_VOCAB_SIZE)
    assert tokenizer.special == embedded.special
    for token in range(EMBEDDED_VOCAB_SIZE):
        assert tokenizer.token_bytes(token) == embedded.token_bytes(token)
    for text in TEXTS:
        assert tokenizer.encode(text) == embedded.encode(text)


def test_equals_openai_harmony(embedded: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harmony = pytest.importorskip("openai_harmony", reason="openai-harmony is the oracle")
    (tmp_path / "o200k_base.tiktoken").write_bytes(tiktoken_text())
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    oracle = harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    for name in HARMONY_TOKENS:
        assert oracle.encode(name, allowed_special="all") == [embedded.special[name]]
    every_character = "".join(chr(i) for i in range(0x30000) if not 0xD800 <= i < 0xE000)
    for text in [*TEXTS, every_character, " ".join(every_character)]:
        assert embedded.encode(text) == oracle.encode(text, disallowed_special=())


@given(st.text())
@settings(deadline=None, database=None)
def test_decoding_undoes_encoding(embedded: Tokenizer, text: str) -> None:
    assert embedded.decode(embedded.encode(text)) == text


def test_text_never_becomes_a_special_token(embedded: Tokenizer) -> None:
    assert not embedded.special_ids & set(embedded.encode("".join(embedded.special)))


def test_a_long_run_of_spaces_is_encoded(embedded: Tokenizer) -> None:
    text = "x" + " " * 1_200_000 + "y"  # tiktoken alone panics
    assert embedded.decode(embedded.encode(text)) == text


def test_a_lone_surrogate_is_replaced(embedded: Tokenizer) -> None:
    assert embedded.decode(embedded.encode("a\ud800b")) == "a\ufffdb"


def test_every_id_decodes_and_only_the_named_ones_are_special(small: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(write(tmp_path, small), vocab_size=300)
    assert tokenizer.encode("abc ab") == [257, ord(" "), 256]
    assert tokenizer.special_ids == frozenset(range(260, 300))
    assert tokenizer.is_special(299) and not tokenizer.is_special(259) and not tokenizer.is_special(300)
    assert tokenizer.token_bytes(268) == b"<|reserved_268|>"
    assert [tokenizer.decode([token]) for token in (-1, 300, 10**12)] == ["\ufffd"] * 3


@given(st.lists(st.integers(-2, 300) | st.integers(128, 255)))
@settings(deadline=None, database=None)
def test_a_stream_decodes_to_the_same_text_in_whole_characters(embedded: Tokenizer, ids: list[int]) -> None:
    decoder = embedded.decoder()
    pieces = [decoder.feed(token) for token in ids]
    assert "".join(pieces) + decoder.finish() == embedded.decode(ids)
    assert decoder.finish() == ""


def test_a_stream_holds_a_character_back_until_it_is_whole(embedded: Tokenizer) -> None:
    ids = [next(i for i in range(256) if embedded.token_bytes(i) == bytes([byte])) for byte in "é😀".encode()]
    decoder = embedded.decoder()
    assert [decoder.feed(token) for token in ids] == ["", "é", "", "", "", "😀"]


def test_nothing_is_lost_after_invalid_utf8(embedded: Tokenizer) -> None:
    emoji_head = next(i for i in range(256) if embedded.token_bytes(i) == b"\xf0")
    decoder = embedded.decoder()
    assert decoder.feed(emoji_head) == ""
    assert decoder.feed(EMBEDDED_VOCAB_SIZE) == "\ufffd\ufffd"
    assert decoder.feed(emoji_head) + decoder.feed(embedded.encode("hello")[0]) == "\ufffdhello"


def test_load_tokenizer_falls_back_on_the_embedded_vocabulary(tmp_path: Path, small: dict[str, Any]) -> None:
    assert load_tokenizer(tmp_path, EMBEDDED_VOCAB_SIZE).special["<|call|>"] == 200012
    with pytest.raises(CheckpointError, match="load_model"):
        load_tokenizer(tmp_path, 300)
    write(tmp_path, small)
    assert load_tokenizer(tmp_path, 300).special["<|call|>"] == small["added_tokens"][0]["id"]


def test_keys_behind_the_merges_are_seen(small: dict[str, Any], tmp_path: Path) -> None:
    document = {"model": small["model"], **{k: v for k, v in small.items() if k != "model"}}
    assert Tokenizer.from_file(write(tmp_path, document), 300).encode("ab") == [256]
    document["normalizer"] = {"type": "NFC"}
    with pytest.raises(CheckpointError, match="normalizer"):
        Tokenizer.from_file(write(tmp_path, document), 300)


Change = Callable[[dict[str, Any]], object]

DAMAGE: dict[str, tuple[Change, str]] = {
    "normalizer": (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer {'type': 'NFC'}"),
    "byte fallback": (lambda d: d["model"].update(byte_fallback=True), "byte_fallback True"),
    "dropout": (lambda d: d["model"].update(dropout=0.1), "dropout 0.1"),
    "model type": (lambda d: d["model"].update(type="Unigram"), "'Unigram'"),
    "prefix": (lambda d: d["model"].update(continuing_subword_prefix="##"), "'##'"),
    "decoder": (lambda d: d["decoder"].update(type="WordPiece"), "'WordPiece'"),
    "no model": (lambda d: d.pop("model"), "KeyError"),
    "no vocab": (lambda d: d["model"].pop("vocab"), "KeyError"),
    "pre-tokenizer": (
        lambda d: d.update(pre_tokenizer={"type": "Whitespace"}),
        "Split followed by ByteLevel",
    ),
    "no pre-tokenizer": (lambda d: d.update(pre_tokenizer=None), "not a tokenizer file"),
    "split": (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "Isolated Regex"),
    "prefix space": (
        lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "add_prefix_space",
    ),
    "regex": (
        lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}),
        "Parsing error",
    ),
    "id twice": (lambda d: d["model"]["vocab"].update(zz=260), "share id 260"),
    "id too large": (lambda d: d["model"]["vocab"].update(zz=300), "id 300, not one of 0 to 299"),
    "id negative": (lambda d: d["model"]["vocab"].update(zz=-1), "id -1"),
    "id no number": (lambda d: d["model"]["vocab"].update(zz="7"), "id '7'"),
    "no byte": (lambda d: d["model"]["vocab"].pop("A"), "byte 0x41"),
    "no byte name": (lambda d: d["model"]["vocab"].update({"a b": 280}), "' '"),
    "no <|call|>": (lambda d: d["added_tokens"].pop(0), "<|call|>"),
    "not special": (lambda d: d["added_tokens"][0].update(special=False), "not special"),
    "reserved elsewhere": (
        lambda d: d["added_tokens"].append({"id": 270, "content": "<|reserved_280|>", "special": True}),
        "<|reserved_280|>",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_not_supported_is_refused_in_one_line(
    name: str, small: dict[str, Any], tmp_path: Path
) -> None:
    change, message = DAMAGE[name]
    change(small)
    path = write(tmp_path, small)
    with pytest.raises(CheckpointError) as raised:
        Tokenizer.from_file(path, 300)
    text = str(raised.value)
    assert message in text and str(path) in text and "\n" not in text


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"model": {"merges": []}}', "\x00"])
def test_a_garbled_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_file(path, 300)


def test_a_cut_off_or_missing_file_is_refused(small: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, small)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="not sound JSON"):
        Tokenizer.from_file(path, 300)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not sound JSON"):
        Tokenizer.from_file(path, 300)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "absent.json", 300)


@pytest.mark.parametrize("pattern", ["", "(?i)", "a", "(?=x)", r"\p{L}+"])
def test_a_pattern_that_would_lose_text_is_refused(tmp_path: Path, pattern: str) -> None:
    document = json.loads((Path(gptoss_lite.__file__).parent / "demo" / "tokenizer.json").read_text("utf-8"))
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(CheckpointError, match="does not cover"):
        Tokenizer.from_file(path, 4096)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not sound JSON"):
        Tokenizer.from_file(path, 4096)
