"""What a model will need of a CUDA device, to the byte, from its headers alone: before anything is loaded.

Where all of it does not fit, a plan moves the embedding to pinned host memory, which kernels read a row at a
time, and then the experts of the last layers, of which the device keeps those in demand.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from gptoss_lite.cache import BLOCK_TOKENS, MAX_SEQUENCES, pool_blocks
from gptoss_lite.checkpoint import StoredForm
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import OutOfMemoryError
from gptoss_lite.kernels.cuda.launch import attention, moe
from gptoss_lite.kernels.cuda.launch.routing import tile_capacity
from gptoss_lite.kernels.cuda.layout import padded
from gptoss_lite.sizes import format_gib
from gptoss_lite.weightbytes import WeightGroup, expert_bytes, weight_groups

# Left free: CUDA's own context and the loaded kernels, 300 to 500 MiB by GPU and driver, and what is lost
# between allocations.
RESERVED = 600 << 20
MOST_SPLITS = 64  # parts that decode attention takes the keys of one sequence in
_KV_ITEM = 2  # bytes: bf16 or fp16
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """What lies where, in bytes.

    weights: by group, wherever they lie. expert_bytes: one expert's packed matrices, by layer; the rest of
    the group experts, biases and pointer tables, is on the device always. full_kv, sliding_kv: keys and
    values of the two kinds of layers. host_layers: how many of the last layers have their experts in host
    memory; hot_experts: how many of each such layer have a copy on the device.
    """

    weights: tuple[WeightGroup, ...]
    num_experts: int
    expert_bytes: tuple[int, ...]
    cache_tokens: int
    full_kv: int
    sliding_kv: int
    workspace: tuple[tuple[str, int], ...]
    host_embedding: bool = False
    host_layers: int = 0
    hot_experts: int = 0

    @property
    def first_host_layer(self) -> int:
        """The first layer with experts in host memory; the number of layers where there is none."""
        return len(self.expert_bytes) - self.host_layers

    @property
    def checkpoint_bytes(self) -> int:
        """All weights, as the checkpoint has them."""
        return sum(group.checkpoint for group in self.weights)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of all layers."""
        return self.full_kv + self.sliding_kv

    @property
    def workspace_bytes(self) -> int:
        """All scratch memory."""
        return sum(nbytes for _, nbytes in self.workspace)

    @property
    def host_embedding_bytes(self) -> int:
        """The embedding, where it is in host memory."""
        return self._packed("embedding") if self.host_embedding else 0

    @property
    def host_expert_bytes(self) -> int:
        """The experts in host memory, all of each such layer."""
        return self.num_experts * sum(self.expert_bytes[self.first_host_layer :])

    @property
    def hot_expert_bytes(self) -> int:
        """The copies of some of those on the device."""
        return self.hot_experts * sum(self.expert_bytes[self.first_host_layer :])

    @property
    def host_bytes(self) -> int:
        """Pinned host memory in all."""
        return self.host_embedding_bytes + self.host_expert_bytes

    @property
    def weight_bytes(self) -> int:
        """Weights on the device, hot experts included."""
        return sum(group.packed for group in self.weights) - self.host_bytes + self.hot_expert_bytes

    @property
    def device_bytes(self) -> int:
        """Device memory in all, without what is left free for CUDA."""
        return self.weight_bytes + self.kv_bytes + self.workspace_bytes

    def fits(self, device_bytes: int) -> bool:
        """Whether a device with so many bytes can hold this, and CUDA beside it."""
        return self.device_bytes + RESERVED <= device_bytes

    def _packed(self, name: str) -> int:
        return next(group.packed for group in self.weights if group.name == name)


def make_plan(
    config: ModelConfig,
    stored: Mapping[str, StoredForm],
    *,
    device_bytes: int | None,
    cache_tokens: int | None = None,
    max_sequences: int = MAX_SEQUENCES,
    step_tokens: int,
) -> Plan:
    """Decide what lies where on a device with `device_bytes`; None sets no bound.

    stored: the checkpoint's tensors, see `Checkpoint.forms`. The others are as the Engine takes them, None
    cache_tokens being one model context. All goes to the device if it can; else the embedding goes to the
    host; else the experts of as few of the last layers as will do, and what the device has left keeps the
    experts of those layers that are most in demand.
    Raises RequestError for a limit below 1; OutOfMemoryError where nothing fits, saying what would.
    """
    tokens = config.max_position_embeddings if cache_tokens is None else cache_tokens
    full_kv, sliding_kv = kv_bytes(config, tokens, max_sequences, step_tokens)
    plan = Plan(
        weights=weight_groups(config, stored),
        num_experts=config.num_local_experts,
        expert_bytes=tuple(expert_bytes(config, stored, n) for n in range(config.num_hidden_layers)),
        cache_tokens=tokens,
        full_kv=full_kv,
        sliding_kv=sliding_kv,
        workspace=workspace(config, step_tokens, max_sequences),
    )
    if device_bytes is None:
        return plan
    # Two tokens in a row seldom agree on all their experts: with room for both, neither evicts the other's.
    fewest_hot = 2 * config.num_experts_per_tok
    for least in _placements(plan, fewest_hot):
        if least.fits(device_bytes):
            return _with_more_hot_experts(least, device_bytes)
    room = device_bytes - RESERVED - (least.device_bytes - least.kv_bytes)
    fitting = _most_cache_tokens(config, tokens, max_sequences, step_tokens, room)
    raise OutOfMemoryError(_refusal(plan, least, device_bytes, fitting))


def kv_bytes(config: ModelConfig, cache_tokens: int, max_sequences: int, step_tokens: int) -> tuple[int, int]:
    """Count the bytes of keys and values in 16 bits: of all full layers, of all sliding ones."""
    full_blocks, sliding_blocks = pool_blocks(config, cache_tokens, max_sequences, step_tokens)
    block = 2 * config.num_key_value_heads * BLOCK_TOKENS * config.head_dim * _KV_ITEM  # keys and values
    full_layers = config.layer_types.count("full_attention")
    sliding_layers = config.num_hidden_layers - full_layers
    return full_layers * full_blocks * block, sliding_layers * sliding_blocks * block


def workspace(config: ModelConfig, step_tokens: int, max_sequences: int) -> tuple[tuple[str, int], ...]:
    """List the scratch arrays of a step with their bytes; the largest step there can be decides.

    T tokens, S sequences, each with one wanted row of logits, k experts per token.
    """
    T, S, k = max(step_tokens, max_sequences), max_sequences, config.num_experts_per_tok
    H, Hk, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden, E = config.hidden_size, config.num_local_experts
    pairs = T * k
    tiles = tile_capacity(pairs, E, moe.TOKENS)
    prefill_tiles = -(-T // attention.PREFILL_TILE) + S
    partials, counters = attention.decode_workspace(S, H, Hk, MOST_SPLITS)
    width = -(-config.max_position_embeddings // BLOCK_TOKENS)
    sampling = 7 * 4 + 3 * 8  # of a row: its options, row and positions; seed, key and result
    small = (
        T * 12  # tokens, positions, sequences
        + prefill_tiles * 16
        + 2 * S * width * 4  # block tables
        + S * sampling
        + D // 2 * 4  # inverse frequencies
        + counters * 4
        + T * 4  # counters of the router
    )
    return (
        ("residual stream", T * hidden * 4),
        ("normalised", 2 * T * padded(hidden) * 2),  # attention's and the experts'
        ("projections", T * (H + 2 * Hk) * D * 4),
        ("queries", T * H * D * 4),
        ("attention", T * padded(H * D) * 2),
        ("attention partials", partials * 4),
        ("rotations", T * D * 4),
        ("router logits", T * E * 4),
        ("chosen experts", T * k * 8),
        ("choices of host layers", config.num_hidden_layers * T * k * 4),
        ("grouping", 2 * pairs * 4 + 3 * tiles * 4 + 4),
        ("inner", pairs * padded(config.intermediate_size) * 2),
        ("expert outputs", pairs * hidden * 4),
        ("logits", S * config.vocab_size * 4),
        ("small arrays", small),
    )


def lines(plan: Plan) -> list[str]:
    """Set a plan out in two columns, what and how much."""
    rows = [("weights in the checkpoint", plan.checkpoint_bytes)]
    for group in plan.weights:
        match group.name:
            case "embedding" if plan.host_embedding:
                continue
            case "experts" if plan.host_layers:
                rows.append((_experts_label(plan), group.packed - plan.host_expert_bytes))
                hot = f"experts cached, {plan.hot_experts} of {plan.num_experts} in each other layer"
                rows.append((hot, plan.hot_expert_bytes))
            case _:
                rows.append((group.name, group.packed))
    rows.append((f"keys and values of {plan.cache_tokens} tokens", plan.full_kv))
    rows.append(("keys and values of sliding windows", plan.sliding_kv))
    rows.append(("workspace", plan.workspace_bytes))
    rows.append(("on the device", plan.device_bytes))
    rows.append(("left free for CUDA", RESERVED))
    if plan.host_embedding:
        rows.append(("embedding, in host memory", plan.host_embedding_bytes))
    if plan.host_layers:
        first, last = plan.first_host_layer, len(plan.expert_bytes) - 1
        rows.append((f"experts of layers {first} to {last}, in host memory", plan.host_expert_bytes))
    widest = max(len(label) for label, _ in rows)
    return [f"{label:{widest}}  {format_gib(nbytes):>10}" for label, nbytes in rows]


def _experts_label(plan: Plan) -> str:
    if not plan.first_host_layer:
        return "biases of experts"
    return f"experts of layers 0 to {plan.first_host_layer - 1}, biases of all"


def _placements(plan: Plan, fewest_hot: int) -> Iterator[Plan]:
    """Yield ever smaller placements of the same model, the best first."""
    yield plan
    plan = replace(plan, host_embedding=True)
    yield plan
    if fewest_hot < plan.num_experts:
        for layers in range(1, len(plan.expert_bytes) + 1):
            yield replace(plan, host_layers=layers, hot_experts=fewest_hot)


def _with_more_hot_experts(plan: Plan, device_bytes: int) -> Plan:
    """Fill what is left of the device with copies of experts."""
    if not plan.host_layers:
        return plan
    one_each = sum(plan.expert_bytes[plan.first_host_layer :])
    more = (device_bytes - RESERVED - plan.device_bytes) // one_each
    return replace(plan, hot_experts=plan.hot_experts + more)


def _most_cache_tokens(
    config: ModelConfig, cache_tokens: int, max_sequences: int, step_tokens: int, room: int
) -> int:
    """Find how many of `cache_tokens` have room for their keys and values; 0 if not even one block."""
    blocks = range(1, -(-cache_tokens // BLOCK_TOKENS) + 1)

    def needed(count: int) -> int:
        return sum(kv_bytes(config, count * BLOCK_TOKENS, max_sequences, step_tokens))

    return bisect_right(blocks, room, key=needed) * BLOCK_TOKENS


def _refusal(plan: Plan, least: Plan, device_bytes: int, fitting: int) -> str:
    """Say on one line what is needed, what there is, and what would fit."""
    needs = f"needs {_rounded_up(plan.device_bytes)} of device memory"
    where = "all experts" if least.host_layers else "its embedding"
    needs += f", {_rounded_up(least.device_bytes)} with {where} in host memory"
    usable = max(0, device_bytes - RESERVED)
    free = f"{_rounded_down(usable)} can be used of {_rounded_down(device_bytes)}"
    if fitting:
        advice = f"--cache-tokens {fitting} would fit"
    else:
        smallest = _rounded_up(least.device_bytes - least.kv_bytes + RESERVED)
        advice = f"even with hardly any --cache-tokens it takes a device with {smallest}"
    return f"the model {needs}, and {free}: {advice}"


def _rounded_up(nbytes: int) -> str:
    return format_gib(math.ceil(nbytes * 10 / _GIB) * _GIB / 10)


def _rounded_down(nbytes: int) -> str:
    return format_gib(math.floor(nbytes * 10 / _GIB) * _GIB / 10)
