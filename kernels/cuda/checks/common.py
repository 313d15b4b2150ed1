"""What several subjects' checks share: copies, roundings, weights of every form, groups of tokens."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.layout import (
    BLOCK,
    Format,
    Layout,
    from_bits,
    pack_dense,
    pack_int8,
    pack_mxfp4,
    to_bits,
)
from gptoss_lite.kernels.cuda.runtime import Array as DeviceArray
from gptoss_lite.kernels.cuda.runtime import Runtime

Array = npt.NDArray[Any]

POISON = 0xCDCD  # of operands: a plain number in fp16 and in bf16
LIMIT = 7.0  # of SwiGLU
WHOLE_ROW = 1 << 20  # as the group of a Form
_E2M1 = np.array((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))


def upload(rt: Runtime, array: Array) -> DeviceArray:
    """Copy an array to the device."""
    target = rt.empty(array.shape, array.dtype)
    rt.upload(np.ascontiguousarray(array), target)
    return target


def to_values(bits: Array, bf16: bool) -> Array:
    """Widen the bits of bf16 or fp16 to float64."""
    return from_bits(bits, bf16).astype(np.float64)


def rounded(x: Array, bf16: bool) -> Array:
    """Round to bf16 or fp16 -> float64."""
    return to_values(to_bits(x, bf16), bf16)


def assert_close(got: Array, want: Array, allowed: Array | float) -> None:
    """Expect each number within what is allowed for it; say how many are not, and which is the first."""
    wrong = ~(np.abs(got - want) <= allowed)  # a NaN is wrong
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.size} wrong, first at {at}: {got[at]} for {want[at]}"
        )


def assert_same(got: Array, want: Array) -> None:
    """Expect the same bits."""
    assert got.tobytes() == want.tobytes(), "not the same bits"


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of weights: what Layout needs besides the shape."""

    format: Format
    bf16: bool = False
    group: int = BLOCK
    scale_bf16: bool = False

    def layout(self, rows: int, columns: int) -> Layout:
        """Lay a matrix out."""
        group = columns if self.group == WHOLE_ROW else self.group
        return Layout(self.format, rows, columns, group, self.bf16, self.scale_bf16)

    def __str__(self) -> str:
        kind = "bf16" if self.bf16 else "fp16"
        scales = f" groups {self.group} {'bf16' if self.scale_bf16 else 'fp16'} scales"
        return f"{self.format.name.lower()}{scales if self.format is Format.INT8 else ''}, {kind}"


FORMS = (
    Form(Format.DENSE),
    Form(Format.DENSE, bf16=True),
    Form(Format.INT8, group=32),
    Form(Format.INT8, group=WHOLE_ROW, scale_bf16=True),
    Form(Format.INT8, bf16=True, scale_bf16=True),
    Form(Format.MXFP4),
    Form(Format.MXFP4, bf16=True),
)


def mxfp4_values(blocks: Array, scales: Array) -> Array:
    """Decode blocks (..., 16) with their scales -> float64 (..., K)."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, BLOCK)
    values = _E2M1[codes & 7] * np.where(codes & 8, -1.0, 1.0)
    scaled: Array = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return scaled.reshape(*scales.shape[:-1], -1)


def random_weights(
    rng: np.random.Generator, form: Form, shape: tuple[int, int, int], order: Array, *, prefill: bool = False
) -> tuple[Array, Array]:
    """Make (E, N, K) weights, rows of length about 1 -> packed uint8 (E, nbytes), their float64 values.

    prefill: the values that its products see, into which scales are multiplied as operands.
    """
    E, N, K = shape
    layout, size = form.layout(len(order), K), 1 / np.sqrt(K)
    match form.format:
        case Format.DENSE:
            bits = to_bits(rng.standard_normal(shape) * size, form.bf16)
            return pack_dense(layout, bits, order), to_values(bits, form.bf16)
        case Format.INT8:
            codes = rng.integers(-127, 128, shape).astype(np.int8)
            scales = rng.uniform(0.01, 0.03, (E, N, -(-K // layout.group))) * size
            bits = to_bits(scales, form.scale_bf16)
            factors = to_values(bits, form.scale_bf16)
            factors = rounded(factors, form.bf16) if prefill else factors
            values = codes * np.repeat(factors, layout.group, axis=-1)[..., :K]
            return pack_int8(layout, codes, bits, order), rounded(values, form.bf16) if prefill else values
    blocks = rng.integers(0, 256, (E, N, K // BLOCK, BLOCK // 2)).astype(np.uint8)
    bytes_ = (rng.integers(123, 127, (E, N, K // BLOCK)) + round(np.log2(size))).astype(np.uint8)
    if K > BLOCK:
        bytes_[..., -1] = 108  # a small one, still exact in fp16
    return pack_mxfp4(layout, blocks, bytes_, order), mxfp4_values(blocks, bytes_)


def product(x: Array, w: Array, partial_sums: int = 0) -> tuple[Array, Array]:
    """Multiply (T, K) with (N, K) in float64 -> the product, and how far the kernel's float32 may be from it.

    Tensor cores add in float32, some by cutting digits off: for each 16 columns, and each of the partial sums
    that are added up, at most 2^-22 of what the magnitudes add up to.
    """
    steps = x.shape[1] / 16 + partial_sums
    return x @ w.T, 2.0**-22 * steps * (np.abs(x) @ np.abs(w).T) + 1e-9


@dataclass(frozen=True, slots=True)
class Groups:
    """Pairs (token, choice) sorted by expert, then by token, in tiles; past their count lies poison."""

    order: Array
    place: Array
    expert: Array
    start: Array
    rows: Array
    count: Array

    def tiles(self, rt: Runtime) -> tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray]:
        """Upload expert, start, rows and count."""
        device = partial(upload, rt)
        return device(self.expert), device(self.start), device(self.rows), device(self.count)

    def experts(self) -> Array:
        """Name the expert of each sorted place in use."""
        n = int(self.count[0])
        return np.repeat(self.expert[:n], self.rows[:n])


def group(ids: Array, E: int, tile: int) -> Groups:
    """Group the choices ids (T, k) of E experts, -1 for none, in tiles of up to `tile` pairs."""
    T, k = ids.shape
    order, place = np.full(T * k, 1 << 30, np.int32), np.full((T, k), -1, np.int32)
    tiles: list[tuple[int, int, int]] = []
    used = 0
    for e in range(E):
        tokens, choices = np.nonzero(ids == e)
        order[used : used + len(tokens)] = tokens
        place[tokens, choices] = used + np.arange(len(tokens))
        for first in range(0, len(tokens), tile):
            tiles.append((e, used + first, min(tile, len(tokens) - first)))
        used += len(tokens)
    grouped = np.full((3, len(tiles) + 3), 1 << 30, np.int32)  # three blocks too many
    grouped[:, : len(tiles)] = np.array(tiles, np.int32).reshape(-1, 3).T
    expert, start, rows = grouped
    return Groups(order, place, expert, start, rows, np.array([len(tiles)], np.int32))


def choose(rng: np.random.Generator, T: int, k: int, E: int, spread: str = "uneven") -> Array:
    """Choose experts int32 (T, k), some much more often than others; a token of several is skipped.

    spread: "uneven", or "ragged" where a third of the experts get no token, all the same "one", or "none".
    """
    if spread == "none":
        return np.full((T, k), -1, np.int32)
    if spread == "one":
        return np.tile(np.arange(E - k, E, dtype=np.int32), (T, 1))
    usable = [e for e in range(E) if spread == "uneven" or e % 3 != 1]
    odds = 1.0 / (1 + np.arange(len(usable))) ** 2
    ids = np.array([rng.choice(usable, k, replace=False, p=odds / odds.sum()) for _ in range(T)], np.int32)
    if T > 1:
        ids[T // 2] = -1
    return ids


def upload_experts(rt: Runtime, packed: Array, groups: Groups) -> tuple[DeviceArray, list[DeviceArray]]:
    """Upload each expert to a place of its own, one of them to the host -> pointer table, what it points to.

    Experts without a token have no address.
    """
    kept: list[DeviceArray] = []
    table = np.zeros(len(packed), np.uint64)
    for e in sorted(set(groups.experts().tolist()), reverse=True):
        if kept:
            kept.append(upload(rt, packed[e]))
        else:
            kept.append(rt.pinned(packed[e].shape, np.uint8))
            kept[0][:] = packed[e]
        table[e] = rt.address(kept[-1])
    return upload(rt, table), kept


def swiglu(gate: Array, up: Array) -> Array:
    """Bound both and combine them, in float64."""
    gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
    result: Array = gate / (1 + np.exp(-1.702 * gate)) * (up + 1)
    return result
