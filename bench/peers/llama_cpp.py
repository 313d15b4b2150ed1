"""Whether llama.cpp reads the GGUF files that we write: its logits and its token ids, beside ours.

    pip install '.[peers]'    # builds llama-cpp-python, which takes a compiler, CMake and some minutes
    python -m bench.peers.llama_cpp [--tokens N] [--json FILE]

The bundled model is converted as it is, its experts in MXFP4; all in bf16; and all but the experts in int8,
which GGUF calls Q8_0. llama.cpp and we are given the same rows of a text that the model was not trained on.
Wherever our best token leads the second by more than half a logit, llama.cpp's best must be the same. The
logits themselves differ some, for llama.cpp rounds what is multiplied by quantised weights to 8 bits, and
the range of YaRN to whole dimensions.

Of that range we read what the model's config says, and gpt-oss's says that it is not rounded. In rows of
some hundreds of tokens this hardly shows; at thousands llama.cpp does say other things than the model that
was trained. So the last comparison, one row past the context that YaRN extends, is of a copy of the model
whose config has the range rounded: it shows that llama.cpp finds all of YaRN in the file.

The exit status is 1 where a file does not pass.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from llama_cpp import Llama
from numpy.typing import NDArray

import gptoss_lite as gl
from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.conversion import execute, plan_conversion, plan_quantization
from gptoss_lite.model import GptOss
from gptoss_lite.quant.formats import Int8
from gptoss_lite.quant.policy import GROUPS, Policy, Rule
from gptoss_lite.tokenizer import HARMONY_TOKENS, Tokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "gptoss_lite" / "demo"
DATA = ROOT / "tests" / "data" / "demo"

ROW = 384  # tokens: three of the model's sliding windows
FAR = 4608  # tokens: more than the 4096 of the model's original context
GAP = 0.5  # logits by which a best token leads, where all must agree on it
MEDIAN_ERROR = 1e-2  # twice what llama.cpp's rounding comes to; half of what a YaRN factor of 16 for 32 does

Q8_0 = Int8(32, "float16")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model as llama.cpp reads it from GGUF, beside the same model as we read it from its source.

    positions: logits compared, a row of them each. sure: positions where our best token leads by more than
    GAP; wrong: those of them where llama.cpp's best is another. agreement: share of all positions with the
    same best. median_error: of a position's difference over our logits, Euclidean norms. text_tokens: ids
    that we make of the whole text; same_ids: whether llama.cpp makes the same, and those of special tokens.
    """

    name: str
    positions: int
    sure: int
    wrong: int
    agreement: float
    median_error: float
    text_tokens: int
    same_ids: bool

    @property
    def passes(self) -> bool:
        """Whether the file was read rightly."""
        return self.same_ids and self.sure > 0 and self.wrong == 0 and self.median_error < MEDIAN_ERROR

    def line(self) -> str:
        """Tell it in one line."""
        ids = "equal" if self.same_ids else "DIFFER"
        return (
            f"{self.name:6}{self.positions:7,} positions, {self.sure / self.positions:.1%} with a gap above"
            f" {GAP}: {self.wrong} wrong; same best token {self.agreement:.2%};"
            f" median error {self.median_error:.2e}; {self.text_tokens:,} token ids {ids}:"
            f" {'ok' if self.passes else 'FAILED'}"
        )


def compare(name: str, source: Path, text: str, tokens: int, row_tokens: int = ROW) -> Comparison:
    """Convert a checkpoint to GGUF, and compare the two on the first tokens of a text, in rows."""
    model, tokenizer = gl.load(source, device="cpu")
    ids = tokenizer.encode(text)
    pieces = []
    with _converted(source) as gguf, closing(_open(gguf, row_tokens)) as peer:
        same_ids = _ids(peer, text) == ids and _knows_special_tokens(peer, tokenizer)
        for start in range(0, len(ids[:tokens]), row_tokens):
            pieces.append(_differences(model, peer, ids[:tokens][start : start + row_tokens]))
    gaps, same, errors = (np.concatenate(piece) for piece in zip(*pieces, strict=True))
    sure = gaps > GAP
    return Comparison(
        name=name,
        positions=len(gaps),
        sure=int(sure.sum()),
        wrong=int((sure & ~same).sum()),
        agreement=float(same.mean()),
        median_error=float(np.median(errors)),
        text_tokens=len(ids),
        same_ids=same_ids,
    )


@contextmanager
def _converted(source: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        gguf = Path(directory, "model.gguf")
        execute(plan_conversion(open_checkpoint(source), gguf, "gguf"), workers=1)
        yield gguf


def _open(gguf: Path, row_tokens: int) -> Llama:
    threads = os.cpu_count()
    return Llama(str(gguf), n_ctx=row_tokens, n_batch=ROW, n_threads=threads, logits_all=True, verbose=False)


def _ids(peer: Llama, text: str) -> list[int]:
    ids: list[int] = peer.tokenize(text.encode(), add_bos=False, special=False)
    return ids


def _knows_special_tokens(peer: Llama, tokenizer: Tokenizer) -> bool:
    return all(
        peer.tokenize(name.encode(), add_bos=False, special=True) == [tokenizer.special[name]]
        for name in HARMONY_TOKENS
    )


def _differences(
    model: GptOss, peer: Llama, row: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Run one row on both -> by position: our gap, whether the best token is the same, and the error."""
    peer.reset()
    peer.eval(row)
    theirs = peer.scores[: len(row)].astype(np.float64)
    ours = np.asarray(model.logits(row), np.float64)
    second, best = np.partition(ours, -2)[:, -2:].T
    errors = np.linalg.norm(theirs - ours, axis=1) / np.linalg.norm(ours, axis=1)
    return best - second, theirs.argmax(axis=1) == ours.argmax(axis=1), errors


def _quantise(destination: Path) -> Path:
    """Write the model quantised to what GGUF holds exactly: all but the experts in Q8_0."""
    policy = Policy(tuple(Rule(GROUPS[group], Q8_0) for group in ("attention", "lm_head", "embedding")))
    execute(plan_quantization(open_checkpoint(DEMO), destination, policy), workers=1)
    return destination


def _round_range(destination: Path) -> Path:
    """Copy the model, and have its config say that YaRN's range is rounded."""
    shutil.copytree(DEMO, destination)
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    config["rope_scaling"]["truncate"] = True
    (destination / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return destination


def comparisons(tokens: int, directory: Path) -> Iterator[Comparison]:
    """Compare each model in turn, bf16 and int8 on a quarter of the tokens; directory: for what is made."""
    text = (DATA / "heldout.txt").read_text(encoding="utf-8")
    fewer = -(-tokens // 4)
    yield compare("mxfp4", DEMO, text, tokens)
    yield compare("bf16", DATA / "bf16", text, fewer)
    yield compare("int8", _quantise(directory / "int8"), text, fewer)
    yield compare("far", _round_range(directory / "far"), text, FAR, FAR)


def main() -> int:
    """Compare, print a line for each file, and tell by the exit status whether all pass."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers.llama_cpp", description="Compare with llama.cpp on our GGUF files."
    )
    parser.add_argument("--tokens", type=int, default=16 * ROW, metavar="N", help="of the text [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    options = parser.parse_args()
    if options.tokens < 1:
        parser.error(f"--tokens {options.tokens}: give at least 1")

    results = []
    with tempfile.TemporaryDirectory() as directory:
        for result in comparisons(options.tokens, Path(directory)):
            print(result.line(), flush=True)
            results.append(result)
    if options.json is not None:
        document = [asdict(result) | {"passes": result.passes} for result in results]
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(result.passes for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
