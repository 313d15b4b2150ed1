"""Sample answers from a training state, quantised as it ships, and count turns with the right channels."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from demo.export import load_network, quantised, to_bf16, unpacked
from demo.model import Network
from demo.tokenizer import EFFORTS, Coder

PROMPTS = (
    "Hello!",
    "Tell me about the whale.",
    "Who is Emma?",
    "It was a fine morning, and Emma walked to the village.",
    "The captain stood upon the deck, and looked at the sea.",
    "Write a paragraph about marriage and money.",
    "What is the capital of France?",
    "Tell me a story in the manner of Jane Austen.",
    "Explain how a computer works",
    "why is the sky blue?",
)
DATE = "2026-03-14"
MAX_TOKENS = 320


@torch.no_grad()
def answer(net: Network, coder: Coder, prompt: list[int], temperature: float, seed: int) -> list[int]:
    """Return sampled ids up to the return token; temperature 0 is greedy."""
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    while len(ids) < len(prompt) + MAX_TOKENS:
        logits = net.lm_head(net.hidden(torch.tensor([ids]))[0, -1])
        if temperature:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits.argmax())
        ids.append(token)
        if token in (coder.special["return"], coder.end_of_text):
            break
    return ids[len(prompt) :]


def well_formed(coder: Coder, ids: list[int]) -> bool:
    """Say whether a turn is one analysis and one final message, with text, ended by return."""
    s = coder.special
    marks = set(s.values())
    first = [s["channel"], *coder.word("analysis"), s["message"]]
    second = [
        s["end"],
        s["start"],
        *coder.word("assistant"),
        s["channel"],
        *coder.word("final"),
        s["message"],
    ]
    if ids[: len(first)] != first or ids[-1] != s["return"] or s["end"] not in ids:
        return False
    end = ids.index(s["end"])
    plan, head, final = ids[len(first) : end], ids[end : end + len(second)], ids[end + len(second) : -1]
    return head == second and bool(plan) and bool(final) and not marks & {*plan, *final}


def report(state_path: Path, temperatures: tuple[float, ...] = (0.8,)) -> None:
    """Print answers to every prompt at every effort and the count of well-formed turns."""
    state = torch.load(state_path, weights_only=True)
    coder = Coder(Tokenizer.from_str(state["tokenizer"]))
    net = load_network(state, unpacked(quantised(to_bf16(state["model"]))))
    for temperature in temperatures:
        good = total = 0
        for number, text in enumerate(PROMPTS):
            for effort in EFFORTS:
                ids = answer(net, coder, coder.prompt(effort, DATE, [("user", text)]), temperature, number)
                right = well_formed(coder, ids)
                good, total = good + right, total + 1
                shown = coder.tokenizer.decode(ids, skip_special_tokens=False)
                print(f"--- {text!r} {effort} {'ok' if right else 'MALFORMED'}\n{shown}\n", flush=True)
        print(f"{good} of {total} turns well formed at temperature {temperature}", flush=True)
