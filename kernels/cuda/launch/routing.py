"""Which experts each token goes to, and the pairs of token and expert in the order that the products want."""

import numpy as np

from gptoss_lite.kernels.cuda.launch.arguments import require
from gptoss_lite.kernels.cuda.layout import MAX_K as MAX_K
from gptoss_lite.kernels.cuda.layout import padded
from gptoss_lite.kernels.cuda.runtime import Array, Runtime, f32, i32
from gptoss_lite.kernels.cuda.source import Kernel

MAX_EXPERTS = 1024
MAX_ROUTED_HIDDEN = 12_160  # one token's row in shared memory
_SHARED_BYTES = 48 * 1024 - 512  # what every GPU gives a block unasked, less the kernels' own
_TOKENS = 4  # router.cu's
_MANY_TOKENS = 256  # from here on there are blocks enough, and each takes more experts
_WALKERS = 32
_GROUP_OWN_BYTES = 13 * 1024  # group.cu's static shared memory


def route_workspace(T: int, experts: int) -> tuple[tuple[int, int], int]:
    """Size `route`'s logits float32 and counters uint32 for up to T tokens."""
    return (T, experts), T


def route(
    rt: Runtime, x: Array, norm_weight: Array, router: Array, bias: Array, positions: Array, h: Array,
    ids: Array, weights: Array, logits: Array, counters: Array, *, eps: float, bf16: bool,
) -> None:  # fmt: skip
    """Normalise rows and choose k experts for each: the largest logits, ties to the lower index; softmax.

    x float32 (T, hidden); norm_weight float32 (hidden,); router (E, hidden), bf16 bits in uint16 or float32;
    bias float32 (E,); positions int32 (T,), -1 for rows that get ids -1 and zeros. Out: h operands
    (T, padded hidden), ids int32 (T, k), best first, weights float32 (T, k). Workspace: see
    `route_workspace`; logits are left there, counters are zero before and after.
    """
    (T, hidden), (experts, _), k = x.shape, router.shape, ids.shape[1]
    router_f32 = router.dtype == np.float32
    require("x", x, np.float32, T, hidden)
    require("norm_weight", norm_weight, np.float32, hidden)
    require("router", router, np.float32 if router_f32 else np.uint16, experts, hidden)
    require("bias", bias, np.float32, experts)
    require("positions", positions, np.int32, T)
    require("h", h, np.uint16, T, padded(hidden))
    require("ids", ids, np.int32, T, k)
    require("weights", weights, np.float32, T, k)
    require("logits", logits, np.float32, None, experts)
    require("counters", counters, np.uint32, None)
    if hidden % 32 or not 0 < hidden <= MAX_ROUTED_HIDDEN:
        raise ValueError(f"hidden is {hidden}: must be a multiple of 32, at most {MAX_ROUTED_HIDDEN}")
    if not (0 < k <= min(MAX_K, experts) and experts <= MAX_EXPERTS):
        raise ValueError(f"{k} of {experts} experts: at most {MAX_K} of {MAX_EXPERTS}")
    if T == 0:
        return
    row_bytes = max(4 * hidden, 8 * experts)  # a normalised row; then the experts' keys
    tokens = min(_TOKENS, T, _SHARED_BYTES // row_bytes)
    groups = -(-T // tokens)
    if len(logits) < T or len(counters) < groups:
        raise ValueError(f"logits {logits.shape}, counters {counters.shape}: must be for {T} tokens")
    name, per_block = ("route_many", 32) if T >= _MANY_TOKENS else ("route_few", 8)
    kernel = Kernel("router.cu", name, (("OPERAND_BF16", 1),) if bf16 else ())
    args = (
        x, norm_weight, router, bias, positions, h, ids, weights, logits, counters,
        i32(T), i32(hidden), i32(experts), i32(k), i32(tokens), f32(eps), i32(router_f32),
    )  # fmt: skip
    rt.launch(kernel, (-(-experts // per_block), groups), 256, args, tokens * row_bytes)


def tile_capacity(pairs: int, experts: int, tile: int) -> int:
    """Count the tiles that `pairs` pairs can take at most."""
    return min(pairs, pairs // tile + experts)


def group(
    rt: Runtime, ids: Array, order: Array, place: Array, tile_expert: Array, tile_start: Array,
    tile_rows: Array, count: Array, *, experts: int, tile: int,
) -> None:  # fmt: skip
    """Sort the pairs (token, choice) by expert, then by token, and cut each expert's into tiles.

    ids int32 (T, k), -1 for pairs to leave out. Out, all int32: order (pairs,), the token of each sorted
    place; place (T, k), the sorted place of each pair or -1; tile_expert, tile_start and tile_rows (n,), n at
    least `tile_capacity`; count (1,), how many tiles there are. What lies past the end is left alone.
    """
    T, k = ids.shape
    pairs = T * k
    require("ids", ids, np.int32, T, k)
    require("order", order, np.int32, pairs)
    require("place", place, np.int32, T, k)
    n = len(tile_expert)
    require("tile_expert", tile_expert, np.int32, n)
    require("tile_start", tile_start, np.int32, n)
    require("tile_rows", tile_rows, np.int32, n)
    require("count", count, np.int32, 1)
    if not 0 < experts <= MAX_EXPERTS or tile < 1:
        raise ValueError(f"{experts} experts, tiles of {tile}: at most {MAX_EXPERTS}, at least 1")
    if n < (needed := tile_capacity(pairs, experts, tile)):
        raise ValueError(f"tiles have {n} entries: must be at least {needed}")
    walkers = max(1, min(_WALKERS, -(-pairs // 32), (_SHARED_BYTES - _GROUP_OWN_BYTES) // (4 * experts)))
    args = (
        ids, order, place, tile_expert, tile_start, tile_rows, count,
        i32(pairs), i32(k), i32(experts), i32(tile), i32(walkers),
    )  # fmt: skip
    rt.launch(Kernel("group.cu", "group"), (1,), 1024, args, 4 * walkers * experts)
