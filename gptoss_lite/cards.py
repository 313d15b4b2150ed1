"""Which GPUs, by the memory they are sold with, a model fits on, and with how long a context."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptoss_lite.checkpoint import StoredForm
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import OutOfMemoryError
from gptoss_lite.memory import Plan, make_plan
from gptoss_lite.ops.cuda import CUDAOps

SOLD = (8, 12, 16, 24, 32, 48, 80, 141)  # GB
_USABLE = 0.995  # of 2^30 bytes each: 81,559 MiB of 80 GB
_CONTEXTS = (131072, 65536, 32768, 16384, 8192, 4096)


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model lies on a card: context None where nothing fits; host_layers with experts on the host."""

    card: int
    context: int | None
    host_layers: int = 0


def summary(found: Sequence[Fit]) -> list[str]:
    """Tell how a model lies on cards, from the smallest on: a line where something changes."""
    lines: list[str] = []
    last: tuple[int | None, int] | None = None
    for fit in found:
        if (fit.context, fit.host_layers) == last:
            continue
        last = fit.context, fit.host_layers
        where = f", experts of {fit.host_layers} layers in host memory" if fit.host_layers else ""
        what = "too small" if fit.context is None else f"{fit.context:,} tokens of context{where}"
        lines.append(f"from {fit.card} GB: {what}")
    return lines


def fits(config: ModelConfig, forms: Mapping[str, StoredForm]) -> list[Fit]:
    """Plan a model on every card: with the longest context that leaves all experts there, if any does."""
    return [_fit(config, forms, card) for card in SOLD]


def _fit(config: ModelConfig, forms: Mapping[str, StoredForm], card: int) -> Fit:
    contexts = [min(context, config.max_position_embeddings) for context in _CONTEXTS]
    plans = [(context, _plan(config, forms, card, context)) for context in dict.fromkeys(contexts)]
    possible = [(context, plan) for context, plan in plans if plan is not None]
    whole = [(context, plan) for context, plan in possible if not plan.host_layers]
    for context, plan in whole or possible:
        return Fit(card, context, plan.host_layers)
    return Fit(card, None)


def _plan(config: ModelConfig, forms: Mapping[str, StoredForm], card: int, context: int) -> Plan | None:
    try:
        return make_plan(
            config, forms, device_bytes=int(card * _USABLE * 2**30), cache_tokens=context,
            step_tokens=CUDAOps.step_tokens,
        )  # fmt: skip
    except OutOfMemoryError:
        return None
