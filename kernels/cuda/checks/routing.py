"""The router and the sorting of its choices, against float64 and against NumPy's stable sort."""

from functools import partial

import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.checks import Check
from gptoss_lite.kernels.cuda.checks.common import Array, upload
from gptoss_lite.kernels.cuda.launch import routing as launch
from gptoss_lite.kernels.cuda.layout import from_bits, from_operands, padded, to_bits
from gptoss_lite.kernels.cuda.runtime import Array as DeviceArray
from gptoss_lite.kernels.cuda.runtime import Runtime

_EPS = 1e-5
_POISON = 0xCD


def _poisoned(rt: Runtime, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
    items = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return upload(rt, np.full(items, _POISON, np.uint8).view(dtype).reshape(shape))


def _route(
    rt: Runtime,
    x: Array,
    norm_weight: Array,
    router: Array,
    bias: Array,
    positions: Array,
    k: int,
    bf16: bool,
) -> tuple[Array, Array, Array, Array]:
    """Launch -> h (operands), ids, weights, logits."""
    T, hidden = x.shape
    h = _poisoned(rt, (T, padded(hidden)), np.uint16)
    ids, weights = _poisoned(rt, (T, k), np.int32), _poisoned(rt, (T, k), np.float32)
    shape, count = launch.route_workspace(T, len(router))
    logits, counters = _poisoned(rt, shape, np.float32), upload(rt, np.zeros(count, np.uint32))
    launch.route(
        rt, upload(rt, x), upload(rt, norm_weight), upload(rt, router), upload(rt, bias),
        upload(rt, positions), h, ids, weights, logits, counters, eps=_EPS, bf16=bf16,
    )  # fmt: skip
    assert not rt.download(counters).any(), "the counters are not zero afterwards"
    return rt.download(h), rt.download(ids), rt.download(weights), rt.download(logits)


def _check_route(
    rt: Runtime, T: int, hidden: int, experts: int, k: int, f32: bool = False, bf16: bool = False,
    scale: float = 1.0, empty: bool = False,
) -> None:  # fmt: skip
    rng = np.random.default_rng(T + hidden + experts)
    x = (scale * rng.normal(size=(T, hidden))).astype(np.float32)
    norm_weight = rng.uniform(0.5, 2, hidden).astype(np.float32)
    router = (rng.normal(size=(experts, hidden)) / np.sqrt(hidden)).astype(np.float32)
    bias = rng.normal(size=experts).astype(np.float32)
    positions = np.arange(T, dtype=np.int32)
    if empty:
        positions[::2] = -1
        x[::2] = np.nan
    stored = router if f32 else to_bits(router, True)
    h, ids, weights, logits = _route(rt, x, norm_weight, stored, bias, positions, k, bf16)

    used = positions >= 0
    assert (ids[~used] == -1).all() and not weights[~used].any() and not h[~used].any(), "an empty row"
    x, h, ids, weights, logits = (array[used].astype(array.dtype) for array in (x, h, ids, weights, logits))
    exact = x.astype(np.float64)
    exact *= norm_weight / np.sqrt(np.mean(exact**2, axis=1, keepdims=True) + _EPS)
    assert not h[:, hidden:].any(), "the padding of h is not zero"
    # Half a step of the operands' type, and what float32 arithmetic leaves just beside a tie.
    relative = (2.0**-8 if bf16 else 2.0**-11) + 1e-6
    assert (np.abs(from_operands(h, hidden, bf16) - exact) <= relative * np.abs(exact) + 2.0**-25).all(), "h"

    wide = (router if f32 else from_bits(stored, True)).astype(np.float64)
    want = exact @ wide.T + bias
    # float32 sums of `hidden` products in a tree: a few roundings of the sum of their sizes.
    allowed = 4e-7 * (np.abs(exact) @ np.abs(wide).T + np.abs(bias))
    assert (np.abs(logits - want) <= allowed).all(), f"logits: off by {np.abs(logits - want).max()}"
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert np.array_equal(ids, order), "ids are not the best logits' in order"
    chosen = np.take_along_axis(logits, ids, axis=1).astype(np.float64)
    shares = np.exp(chosen - chosen.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    assert (np.abs(weights - shares) <= 1e-6).all(), "weights"  # float32 exp and division


def _check_ties(rt: Runtime, experts: int, k: int) -> None:
    """Equal logits, in groups: of each the lower ids come first."""
    T, hidden = 3, 32
    rng = np.random.default_rng(experts)
    x = rng.normal(size=(T, hidden)).astype(np.float32)
    bias = np.where(rng.integers(0, 3, experts) == 0, np.float32(0.0), np.float32(-0.0))
    bias[rng.integers(0, experts)] = 1
    router = np.zeros((experts, hidden), np.uint16)
    positions = np.zeros(T, np.int32)
    _, ids, weights, _ = _route(rt, x, np.ones(hidden, np.float32), router, bias, positions, k, False)
    order = np.argsort(-bias, kind="stable")[:k]
    assert (ids == order).all(), f"ids {ids[0]}: must be {order}"
    shares = np.exp(bias[order].astype(np.float64))
    assert np.allclose(weights, shares / shares.sum(), atol=1e-6)


def _check_alone(rt: Runtime) -> None:
    """A row gives the same bits alone, among few, and among many."""
    T, hidden, experts, k = 257, 96, 40, 4
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, hidden)).astype(np.float32)
    router = to_bits(rng.normal(size=(experts, hidden)), True)
    bias, norm_weight = (rng.normal(size=n).astype(np.float32) for n in (experts, hidden))
    positions = np.zeros(T, np.int32)
    everything = _route(rt, x, norm_weight, router, bias, positions, k, False)
    for rows in (slice(7, 8), slice(5, 10)):
        some = _route(rt, x[rows], norm_weight, router, bias, positions[rows], k, False)
        for part, whole in zip(some, everything, strict=True):
            assert np.array_equal(part, whole[rows]), f"rows {rows} depend on the others"


def _check_group(rt: Runtime, T: int, k: int, experts: int, tile: int, kind: str = "random") -> None:
    rng = np.random.default_rng(T * k + experts)
    ids = np.argsort(rng.random((T, experts)), axis=1)[:, :k].astype(np.int32)
    if kind == "holes":
        ids[rng.random(T) < 0.4] = -1
    elif kind == "empty":
        ids[:] = -1
    elif kind == "one":
        ids[:] = np.arange(experts - k, experts)
    pairs, n = T * k, launch.tile_capacity(T * k, experts, tile) + 3
    order, place = _poisoned(rt, (pairs,), np.int32), _poisoned(rt, (T, k), np.int32)
    tile_expert, tile_start, tile_rows = (_poisoned(rt, (n,), np.int32) for _ in range(3))
    count = _poisoned(rt, (1,), np.int32)
    launch.group(
        rt, upload(rt, ids), order, place, tile_expert, tile_start, tile_rows, count,
        experts=experts, tile=tile,
    )  # fmt: skip

    flat = ids.reshape(-1)
    by_expert = np.argsort(flat, kind="stable")
    by_expert = by_expert[flat[by_expert] >= 0]
    want_place = np.full(pairs, -1, np.int32)
    want_place[by_expert] = np.arange(len(by_expert))
    want_tiles = []
    for e in range(experts):
        (sorted_places,) = np.nonzero(flat[by_expert] == e)
        want_tiles += [
            (e, sorted_places[i], min(tile, len(sorted_places) - i))
            for i in range(0, len(sorted_places), tile)
        ]
    poison = np.full(4, _POISON, np.uint8).view(np.int32)[0]
    got_order = rt.download(order)
    assert np.array_equal(got_order[: len(by_expert)], by_expert // k), "order"
    assert (got_order[len(by_expert) :] == poison).all(), "order is written past its end"
    assert np.array_equal(rt.download(place).reshape(-1), want_place), "place"
    assert rt.download(count)[0] == len(want_tiles), "count"
    tiles = map(rt.download, (tile_expert, tile_start, tile_rows))
    for got, want in zip(tiles, np.array(want_tiles, np.int32).reshape(-1, 3).T, strict=True):
        assert np.array_equal(got[: len(want)], want), "tiles"
        assert (got[len(want) :] == poison).all(), "tiles are written past their end"


CHECKS: dict[str, Check] = {
    "route: one token, 4 experts": partial(_check_route, T=1, hidden=32, experts=4, k=4),
    "route: one token, one expert": partial(_check_route, T=1, hidden=160, experts=1, k=1),
    "route: 3 tokens, 8 experts": partial(_check_route, T=3, hidden=160, experts=8, k=2),
    "route: 4 tokens, 32 experts": partial(_check_route, T=4, hidden=544, experts=32, k=4),
    "route: 5 tokens, 128 experts": partial(_check_route, T=5, hidden=160, experts=128, k=4),
    "route: 33 tokens, 200 experts, k 8": partial(_check_route, T=33, hidden=64, experts=200, k=8),
    "route: 257 tokens": partial(_check_route, T=257, hidden=96, experts=40, k=4),
    "route: rows of gpt-oss": partial(_check_route, T=5, hidden=2880, experts=8, k=4),
    "route: rows that leave room for two": partial(_check_route, T=3, hidden=5120, experts=4, k=1),
    "route: float32 weights": partial(_check_route, T=5, hidden=1632, experts=10, k=3, f32=True),
    "route: float32 weights, 258 tokens": partial(_check_route, T=258, hidden=544, experts=9, k=3, f32=True),
    "route: bf16 operands": partial(_check_route, T=3, hidden=160, experts=8, k=2, bf16=True),
    "route: big values": partial(_check_route, T=3, hidden=160, experts=8, k=2, scale=1e6),
    "route: small values": partial(_check_route, T=3, hidden=160, experts=8, k=2, scale=1e-4),
    "route: empty rows": partial(_check_route, T=9, hidden=160, experts=8, k=3, empty=True),
    "route: empty rows among many": partial(_check_route, T=259, hidden=32, experts=8, k=3, empty=True),
    "route: ties, 8 experts": partial(_check_ties, experts=8, k=8),
    "route: ties, 100 experts": partial(_check_ties, experts=100, k=5),
    "route: a row does not depend on the others": _check_alone,
    "group: one token": partial(_check_group, T=1, k=4, experts=32, tile=8),
    "group: one token, one expert": partial(_check_group, T=1, k=1, experts=1, tile=8),
    "group: 5 tokens": partial(_check_group, T=5, k=4, experts=128, tile=8),
    "group: 33 tokens, k 8": partial(_check_group, T=33, k=8, experts=9, tile=8),
    "group: 300 tokens in tiles of 64": partial(_check_group, T=300, k=4, experts=32, tile=64),
    "group: 1024 experts": partial(_check_group, T=100, k=8, experts=1024, tile=64),
    "group: empty rows": partial(_check_group, T=77, k=4, experts=32, tile=8, kind="holes"),
    "group: empty rows only": partial(_check_group, T=9, k=4, experts=32, tile=8, kind="empty"),
    "group: all to the same experts": partial(_check_group, T=200, k=2, experts=32, tile=8, kind="one"),
    "group: tiles of one": partial(_check_group, T=10, k=2, experts=4, tile=1),
}
