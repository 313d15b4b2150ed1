"""The CPU kernels for every kind of CPU that this host can be: exact sums, the same bits everywhere."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import llvmlite.binding as llvm
import ml_dtypes
import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import njit
from numpy.typing import NDArray

from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cpu import isa
from gptoss_lite.kernels.cpu import tile as tiles
from gptoss_lite.kernels.cpu.activations import quantized, rms_norm
from gptoss_lite.kernels.cpu.linear import linear_dense, linear_packed
from gptoss_lite.kernels.cpu.program import Steps
from gptoss_lite.kernels.cpu.router import route
from gptoss_lite.kernels.cpu.tile import ROWS, dense_tile, dense_tokens, tile
from gptoss_lite.ops import get_ops
from gptoss_lite.ops.base import Linear, Ops
from gptoss_lite.ops.cpu_weights import Tiles
from gptoss_lite.ops.cpu_weights import tiles as in_tiles
from gptoss_lite.quant import Int8Tensor, MXFP4Tensor, QTensor, codecs
from gptoss_lite.quant.formats import MXFP4, Format, Int8

Array = NDArray[Any]
RNG = np.random.default_rng(5)
HOST = isa.by_name(isa.usable()[0])
FORMATS: list[Format] = [MXFP4(), Int8(), Int8(64, "float16"), Int8(None, "e8m0")]

every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
every_kind = pytest.mark.parametrize("kind", list(map(isa.by_name, isa.usable())), ids=isa.usable())
both_activations = pytest.mark.parametrize("activations", ["accurate", "int8"])


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape, np.float32)


def quantised(format: Format, *shape: int) -> QTensor:
    return codecs.encode(normal(*shape) / np.float32(8), format)


def name_of(format: Format) -> str:
    return "mxfp4" if isinstance(format, MXFP4) else "int8"


def product_of(kind: isa.ISA, weight: QTensor, activations: str, x: Array) -> Array:
    """Multiply by the whole kernel."""
    w, y, steps = in_tiles(weight, 1), np.empty((len(x), weight.shape[0]), np.float32), Steps()
    rows = quantized(steps, kind, w.format, activations, x)
    linear_packed(steps, kind, w.format, activations, w.packed(), rows, y)
    steps.run()
    return y


def quantised_rows(kind: isa.ISA, format: str, activations: str, x: Array) -> tuple[Array, Array, Array]:
    """Quantise activations at once."""
    steps = Steps()
    rows = quantized(steps, kind, format, activations, x)
    steps.run()
    return rows


@cache
def tile_of(kind: isa.ISA, format: str, activations: str) -> Callable[..., None]:
    """Compile one tile by itself, which is quick."""
    key = isa.key(kind.name, format, activations)

    @njit
    def run(room, w, codes_at, scales_at, is_fp16, x, x_scales, starts, slot, y, y_at, groups, blocks):  # type: ignore[no-untyped-def]
        tile(key, room, w, codes_at, scales_at, is_fp16, x, x_scales, starts, slot, y, y_at, groups, blocks)

    compiled: Callable[..., None] = run
    return compiled


@cache
def dense_tile_of(kind: isa.ISA, format: str) -> Callable[..., None]:
    """Compile one tile of dense weights by itself."""
    key = isa.key(kind.name, format)

    @njit
    def run(weights, at, rows, x, row, count, y):  # type: ignore[no-untyped-def]
        dense_tile(key, weights, at, rows, x, row, count, y)

    compiled: Callable[..., None] = run
    return compiled


def first_tile(run: Callable[..., None], w: Tiles, rows: tuple[Array, ...], room: int, slot: int) -> Array:
    """Multiply the first 16 rows of a matrix with a chunk."""
    y = np.full(3 + room * ROWS, np.nan, np.float32)
    run(room, w.records, 0, w.code_bytes, w.is_fp16, *rows, slot, y, 3, w.groups, w.group_blocks)
    assert np.isnan(y[:3]).all()
    return y[3:].reshape(room, ROWS)


@both_activations
@every_format
def test_tiles_have_the_same_bits_on_every_kind_of_cpu(format: Format, activations: str) -> None:
    weight, x = quantised(format, ROWS, 192), normal(16, 192)
    w, found, second = in_tiles(weight, 1), {}, {}
    for name in isa.usable():
        kind = isa.by_name(name)
        run = tile_of(kind, w.format, activations)
        rooms = sorted({1, 2, 4, kind.tokens})
        for room in rooms:  # chunks of `room` rows, which the last of all fills
            rows = quantised_rows(kind, w.format, activations, x[:room])
            found[name, room] = first_tile(run, w, rows, room, 0)
        together = quantised_rows(kind, w.format, activations, x)
        second[name] = first_tile(run, w, together, kind.tokens, kind.tokens)
    exact = x[:1].astype(np.float64) @ weight.dequantize().astype(np.float64).T
    bound = {"accurate": 1e-4, "int8": 2e-2}[activations] * np.abs(exact).max()
    one = found[isa.usable()[0], 1]
    np.testing.assert_allclose(one, exact, rtol=0, atol=bound)
    for (name, room), y in found.items():
        np.testing.assert_array_equal(y[0], one[0], err_msg=f"{name} {room}")
    for name in isa.usable():
        kind = isa.by_name(name)
        alone = quantised_rows(kind, w.format, activations, x[kind.tokens : kind.tokens + 1])
        y = first_tile(tile_of(kind, w.format, activations), w, alone, 1, 0)
        np.testing.assert_array_equal(second[name][0], y[0])


@every_kind
@both_activations
def test_sums_of_integers_are_exact(kind: isa.ISA, activations: str) -> None:
    """Codes at both ends of their range, where sums in too few bits would overflow or saturate."""
    top = 32512 if activations == "accurate" else 127
    for format, weights in ((MXFP4(), [6.0, -6.0]), (Int8(), [127.0, -127.0])):
        for sign, value in product((1, -1), weights):
            columns = np.where(np.arange(64) % 3 == 2, -value, value)
            weight = (
                MXFP4Tensor(
                    np.where(columns[None] > 0, 7, 15).astype(np.uint8).reshape(1, 2, 16, 2)
                    @ np.array([1, 16], np.uint8),
                    np.full((1, 2), 127, np.uint8),
                )
                if isinstance(format, MXFP4)
                else Int8Tensor(columns[None].astype(np.int8), np.ones((1, 2), ml_dtypes.bfloat16))
            )
            np.testing.assert_array_equal(weight.dequantize()[0], columns)
            x = np.full((1, 64), sign * top, np.float32)
            x[0, ::5] = sign * (top - 1)
            w = in_tiles(weight, 1)
            rows = quantised_rows(kind, w.format, activations, x)
            y = first_tile(tile_of(kind, w.format, activations), w, rows, 1, 0)
            want = x[0].astype(np.int64) @ columns.astype(np.int64)
            assert y[0, 0] == pytest.approx(want, rel=2e-7)  # each block's sum becomes a float32
            assert not y[0, 1:].any()  # the tile is filled up with zeros


@both_activations
def test_activations_are_rounded_to_the_nearest_code(activations: str) -> None:
    x = np.concatenate([normal(3, 96), np.linspace(-1, 1, 3 * 96, dtype=np.float32).reshape(3, 96)])
    x[0, :32], x[1, 32:64] = 0, 1e-35
    each = [quantised_rows(HOST, "int8", activations, x[r : r + 1]) for r in range(6)]
    chunks = [[part[: len(part) // HOST.tokens] for part in rows] for rows in each]
    codes, scales, starts = map(np.concatenate, zip(*chunks, strict=True))
    passes = 2 if activations == "accurate" else 1
    parts = codes.reshape(6, 3, passes, 32).astype(np.int64)
    assert parts.min() >= -127
    values = parts[:, :, 0] if passes == 1 else 256 * parts[:, :, 0] + parts[:, :, 1]
    got = values * scales.reshape(6, 3, 1).astype(np.float64)
    # A low byte of -128 has become -127, which is further off by one.
    off = 0.5 if passes == 1 else 1.5
    step = np.abs(x.reshape(6, 3, 32)).max(axis=2, keepdims=True) / (127 if passes == 1 else 32512)
    assert (np.abs(got - x.reshape(6, 3, 32)) <= off * step + 1e-30).all()
    np.testing.assert_array_equal(starts.reshape(6, 3), -HOST.int8_bias * values.sum(axis=2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_every_result(bad: float) -> None:
    x = normal(2, 64)
    x[1, 40] = bad
    y = product_of(HOST, quantised(Int8(), 20, 64), "accurate", x)
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


@both_activations
@every_format
def test_products_of_any_number_of_rows_are_those_of_each_alone(format: Format, activations: str) -> None:
    weight, x = quantised(format, 101, 192), normal(21, 192)
    together = product_of(HOST, weight, activations, x)
    exact = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    error = np.linalg.norm(together - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < {"accurate": 5e-5, "int8": 1.2e-2}[activations]
    for rows in (1, 2, 4, 5, 8, 9, 12, 13, 20):
        np.testing.assert_array_equal(product_of(HOST, weight, activations, x[:rows]), together[:rows])


@pytest.mark.parametrize("scale", [0, 1, 127, 200])
def test_scales_down_to_the_smallest_are_exact(scale: int) -> None:
    blocks = RNG.integers(0, 256, (24, 3, 16), np.uint8)
    weight = MXFP4Tensor(blocks, np.full(blocks.shape[:2], scale, np.uint8))
    x = np.ldexp(normal(2, 96), 120 - scale)  # which brings the products back near one
    want = x.astype(np.float64) @ weight.dequantize().astype(np.float64).T
    y = product_of(HOST, weight, "accurate", x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-4 * np.abs(want).max())


@every_kind
@pytest.mark.parametrize("extreme", [0, 62, 63, 64, 65, 110])
def test_scales_of_any_size_are_multiplied_as_those_of_one_row(kind: isa.ISA, extreme: int) -> None:
    """A whole tile adds exponents, where no product leaves the normal floats; a single row multiplies."""
    run, tokens = tile_of(kind, "mxfp4", "accurate"), kind.tokens
    for of_weights, of_rows in product((-extreme, extreme), (-extreme, -40, 40, extreme)):
        scales = np.full((ROWS, 3), 127 + of_weights, np.uint8)
        scales[::5, 1] = 127
        w = in_tiles(MXFP4Tensor(RNG.integers(0, 256, (ROWS, 3, 16), np.uint8), scales), 1)
        x = np.ldexp(normal(tokens, 96) * 32512, of_rows)
        x[1, :32] = np.ldexp(x[1, :32], -of_rows)
        x[:, 40] = np.ldexp(np.float32(32512), of_rows + 1)  # a block's scale is a power of two, too
        together = first_tile(run, w, quantised_rows(kind, "mxfp4", "accurate", x), tokens, 0)
        for row, got in zip(x, together, strict=True):
            alone = first_tile(run, w, quantised_rows(kind, "mxfp4", "accurate", row[None]), 1, 0)
            np.testing.assert_array_equal(got, alone[0])
        assert together.any()


@every_kind
@pytest.mark.parametrize("columns", [7, 33, 128])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_dense_tiles_are_exact_for_any_columns_and_rows(kind: isa.ISA, columns: int, dtype: Any) -> None:
    name = "bf16" if dtype != np.float32 else "float32"
    run = dense_tile_of(kind, name)
    weight = RNG.integers(-9, 10, (7, columns)).astype(np.float32)
    x = RNG.integers(-9, 10, (6, columns)).astype(np.float32)
    bits = weight.astype(dtype).view(np.uint16 if name == "bf16" else np.uint32)
    for first, row, count in ((0, 0, 1), (4, 1, min(4, dense_tokens(kind))), (3, 5, 1), (0, 4, 2)):
        rows = min(4, 7 - first)
        y = np.zeros((dense_tokens(kind), 4), np.float32)
        run(bits, first * columns, rows, x, row, count, y)
        np.testing.assert_array_equal(y[:count, :rows], x[row : row + count] @ weight[first : first + rows].T)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_dense_products_of_groups_are_those_of_each_row_alone(dtype: Any) -> None:
    name, bits = ("bf16", np.uint16) if dtype != np.float32 else ("float32", np.uint32)
    weight, x = normal(3, 37, 50).astype(dtype), normal(40, 50)
    groups, starts = np.array([2, 0], np.int32), np.array([0, 1, 40], np.int32)
    added, residual = normal(37), normal(40, 37)

    def product(groups: Array, starts: Array, x: Array, residual: Array) -> Array:
        y, steps = np.empty((len(x), 39), np.float32), Steps()
        sums = np.concatenate([[0, 0], added]).astype(np.float32), np.pad(residual, ((0, 0), (2, 0)))
        linear_dense(steps, HOST, name, weight.view(bits), groups, starts, x, y, 2, *sums)
        steps.run()
        return y[:, 2:]

    y = product(groups, starts, x, residual)
    exact = weight.astype(np.float64)
    for r in range(40):
        want = exact[2 if r == 0 else 0] @ x[r].astype(np.float64) + added + residual[r]
        np.testing.assert_allclose(y[r], want, rtol=0, atol=1e-5)
    one = np.array([0, 1], np.int32)
    for r in (1, 7, 39):
        again = product(groups[1:], one, x[r : r + 1], residual[r : r + 1])
        np.testing.assert_array_equal(again[0], y[r])


@pytest.mark.parametrize(
    ("up", "down", "activations"),
    [
        (MXFP4(), MXFP4(), "accurate"),
        (MXFP4(), Int8(), "int8"),
        pytest.param(MXFP4(), MXFP4(), "int8", marks=pytest.mark.soak),
        pytest.param(MXFP4(), Int8(), "accurate", marks=pytest.mark.soak),
        pytest.param(Int8(96, "float16"), Int8(None), "accurate", marks=pytest.mark.soak),
        pytest.param(Int8(96, "float16"), Int8(None), "int8", marks=pytest.mark.soak),
    ],
    ids=str,
)
def test_experts_are_those_of_the_specification(up: Format, down: Format, activations: str) -> None:
    E, hidden, inner, k, T = 6, 96, 64, 3, 40
    gate_up = Linear(quantised(up, E, 2 * inner, hidden), normal(E, 2 * inner))
    back = Linear(quantised(down, E, hidden, inner), normal(E, hidden))
    h, x = normal(T, hidden) * 3, normal(T, hidden)
    ids = np.stack([RNG.permutation(E)[:k] for _ in range(T)]).astype(np.int32)
    ids[:20] = [4, 0, 2]  # so that some dozen tokens share an expert
    weights = RNG.random((T, k), np.float32)
    want = Ops().experts(h, ids, weights, gate_up, back, 7.0, x)
    ops = get_ops("cpu", activations=activations)
    first, last = (Linear(in_tiles(w.weight, 1), w.bias) for w in (gate_up, back))
    got = ops.experts(h, ids, weights, first, last, 7.0, x)
    bound = {"accurate": 2e-4, "int8": 5e-2}[activations]
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max())
    for rows in (slice(0, 1), slice(7, 8), slice(3, 9), slice(20, 40)):
        part = ops.experts(h[rows], ids[rows], weights[rows], first, last, 7.0, x[rows])
        np.testing.assert_array_equal(part, got[rows])


def test_the_router_takes_the_best_and_of_equal_ones_the_first() -> None:
    h, weight, added = normal(9, 64), normal(13, 64), normal(13)
    weight[[2, 11]], added[[2, 11]] = weight[5], 50.0
    added[5] = 50.0
    steps = Steps()
    ids, weights = route(steps, HOST, "float32", h, weight.view(np.uint32), added, 4)
    steps.run()
    logits = h @ weight.T + added
    np.testing.assert_array_equal(ids[:, :3], np.tile([2, 5, 11], (9, 1)))
    rest = np.delete(logits, [2, 5, 11], axis=1)
    np.testing.assert_allclose(np.take_along_axis(logits, ids[:, 3:], 1)[:, 0], rest.max(axis=1))
    chosen = np.exp(np.take_along_axis(logits, ids, 1).astype(np.float64) - 50)
    np.testing.assert_allclose(weights, chosen / chosen.sum(axis=1, keepdims=True), rtol=2e-5)


@pytest.mark.parametrize("rows", [3, 20])
def test_rms_norm_divides_by_the_root_of_the_mean_square(rows: int) -> None:
    x, weight = normal(rows, 96) * 5, normal(96)
    want = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 0.5) * weight
    steps = Steps()
    y = rms_norm(steps, x, weight, 0.5)
    steps.run()
    np.testing.assert_allclose(y, want, rtol=2e-6, atol=1e-6)


@both_activations
def test_rows_are_normalised_before_they_are_quantised(activations: str) -> None:
    x, weight, steps = normal(11, 96) * 5, normal(96), Steps()
    rows = quantized(steps, HOST, "int8", activations, x, (weight, 0.5))
    y = rms_norm(steps, x, weight, 0.5)
    want = quantized(steps, HOST, "int8", activations, y)
    steps.run()
    slots = np.arange(len(rows[1])) // (HOST.tokens * 3) * HOST.tokens  # the chunk's first row
    used = slots < 8  # the second chunk has fewer rows than room
    for got, exact in zip(rows[1:], want[1:], strict=True):
        np.testing.assert_array_equal(got[used], exact[used])
    part = len(rows[0]) * used.sum() // len(used)
    np.testing.assert_array_equal(rows[0][:part], want[0][:part])


def test_a_kind_of_cpu_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isa.usable()[-1] == "generic"
    for name in isa.usable():
        monkeypatch.setenv(isa.VARIABLE, name)
        assert isa.host().name == name
    monkeypatch.setenv(isa.VARIABLE, "")
    assert isa.host().name == isa.usable()[0]
    monkeypatch.setenv(isa.VARIABLE, "z80")
    with pytest.raises(DeviceError, match=r"GPTOSS_LITE_CPU is 'z80': this CPU can run .*generic"):
        get_ops("cpu")


def test_features_are_what_numba_compiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, names in (
        ({"CPU_NAME": "generic", "CPU_FEATURES": None}, ("generic",)),
        ({"CPU_NAME": "x", "CPU_FEATURES": "+avx2,+fma,-avx512f"}, ("avx2", "generic")),
        ({"CPU_NAME": "x", "CPU_FEATURES": "+neon,+dotprod"}, ("neon", "generic")),
    ):
        isa.usable.cache_clear()
        for setting, value in settings.items():
            monkeypatch.setattr(numba.config, setting, value)
        assert isa.usable() == names
    isa.usable.cache_clear()


@pytest.mark.parametrize(
    ("name", "triple", "features", "instructions"),
    [
        ("neon", "aarch64-unknown-linux-gnu", "+neon,+dotprod", ("sdot", "tbl", "fmla")),
        ("avx2", "x86_64-unknown-linux-gnu", "+avx2,+fma", ("vpmaddubsw", "vpshufb", "vfmadd")),
        ("avxvnni", "x86_64-unknown-linux-gnu", "+avx2,+fma,+avxvnni", ("vpdpbusd", "vpshufb", "vfmadd")),
        (
            "avx512",
            "x86_64-unknown-linux-gnu",
            "+avx512f,+avx512bw,+avx512vnni,+fma",
            ("vpdpbusd", "{1to16}"),
        ),
        pytest.param(
            "generic", "riscv64-unknown-linux-gnu", "+m,+f,+d", ("mul", "fmul.s"), marks=pytest.mark.soak
        ),
    ],
)
@both_activations
def test_tiles_compile_for_other_machines(
    name: str, triple: str, features: str, instructions: tuple[str, ...], activations: str
) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 9)
    for format, tokens in product(("mxfp4", "int8"), (1, isa.by_name(name).tokens)):
        function = ir.Function(module, kind, f"{format}_{tokens}")
        builder = ir.IRBuilder(function.append_basic_block())
        codes, scales, fp16, *others = function.args
        tiles._PackedTile(builder, f"{name}/{format}/{activations}/", tokens).write(
            codes, scales, fp16, *others
        )
        builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this LLVM writes no code for {triple}")
    assembly = target.create_target_machine(features=features, opt=2).emit_assembly(parsed)
    assert all(instruction in assembly for instruction in instructions)
