"""Pack o200k_base.tiktoken into the file that gptoss_lite ships: its tokens in rank order, under xz."""

import base64
import hashlib
import lzma
import sys
from pathlib import Path

SOURCE_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"


def pack(tiktoken_text: bytes) -> bytes:
    r"""Return the tokens of a .tiktoken file, one a line, ``\`` and newline escaped as ``\\`` and ``\n``."""
    lines = [line.split() for line in tiktoken_text.splitlines()]
    if [int(rank) for _, rank in lines] != list(range(len(lines))):
        raise SystemExit("ranks are not 0, 1, 2, ...: only the order of the tokens is kept")
    tokens = (base64.b64decode(token) for token, _ in lines)
    return b"\n".join(token.replace(b"\\", b"\\\\").replace(b"\n", b"\\n") for token in tokens)


def main(source: Path, target: Path) -> None:
    """Write `target` and print the SHA-256 that gptoss_lite/vocab/__init__.py expects of its contents."""
    text = source.read_bytes()
    if hashlib.sha256(text).hexdigest() != SOURCE_SHA256:
        raise SystemExit(f"{source} is not the published o200k_base.tiktoken")
    payload = pack(text)
    target.write_bytes(lzma.compress(payload, preset=9 | lzma.PRESET_EXTREME))
    print(f"{target}: {target.stat().st_size:,} bytes, payload sha256 {hashlib.sha256(payload).hexdigest()}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: pack_vocab.py o200k_base.tiktoken gptoss_lite/vocab/o200k_base.xz")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
