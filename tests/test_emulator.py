"""The CUDA emulator: each family of builtins against NumPy, thread orders, and each fault found and named."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cuda.runtime import f32, i32
from gptoss_lite.kernels.cuda.source import Kernel
from gptoss_lite.kernels.emulator import runtime
from gptoss_lite.kernels.emulator.runtime import ORDERS, Emulator, EmulatorError, Order

pytestmark = pytest.mark.usefixtures("needs_compiler")
DATA = Path(__file__).parent / "data" / "emulator"

Array = npt.NDArray[Any]


def builtin(name: str) -> Kernel:
    return Kernel(str(DATA / "builtins.cu"), name)


def fault(name: str) -> Kernel:
    return Kernel(str(DATA / "faults.cu"), name)


def put(rt: Emulator, values: Array) -> Array:
    array = rt.empty(values.shape, values.dtype)
    rt.upload(values, array)
    return array


@pytest.fixture(params=ORDERS)
def rt(request: pytest.FixtureRequest) -> Emulator:
    return Emulator(request.param, seed=3)


@pytest.mark.parametrize("bf16", [False, True])
def test_mma_is_a_matrix_product_in_the_fragments_of_ptx(rt: Emulator, bf16: bool) -> None:
    rng = np.random.default_rng(0)
    kind = ml_dtypes.bfloat16 if bf16 else np.float16
    a, b = rng.normal(size=(16, 16)).astype(kind), rng.normal(size=(16, 8)).astype(kind)
    d = rng.normal(size=(16, 8)).astype(np.float32)
    g, t = np.divmod(np.arange(32), 4)

    def pair(low: Array, high: Array) -> Array:
        return low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16

    def fragment(rows: Array, columns: Array) -> Array:
        return pair(a[rows, columns], a[rows, columns + 1])

    words_a = np.stack([fragment(g + r, 2 * t + c) for c in (0, 8) for r in (0, 8)], axis=1)
    words_b = np.stack([pair(b[2 * t + r, g], b[2 * t + r + 1, g]) for r in (0, 8)], axis=1)

    def corners(m: Array) -> Array:
        return np.stack([m[g + r, 2 * t + c] for r in (0, 8) for c in (0, 1)], axis=1)

    out = put(rt, corners(d))
    rt.launch(builtin("product"), (1,), 32, [put(rt, words_a), put(rt, words_b), out, i32(bf16), i32(1)])
    want = d + a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(out, corners(want), atol=1e-5)  # sixteen roundings of numbers below 16


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(rt: Emulator, transposed: bool) -> None:
    values = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    out = rt.empty((32, 4), np.uint32)
    rt.launch(builtin("matrices"), (1,), 32, [put(rt, values), out, i32(transposed)])
    g, t = np.divmod(np.arange(32), 4)
    want = values.swapaxes(1, 2) if transposed else values
    pairs = want[:, g, 2 * t].astype(np.uint32) | want[:, g, 2 * t + 1].astype(np.uint32) << 16
    np.testing.assert_array_equal(out, pairs.T)


def test_warp_collectives(rt: Emulator) -> None:
    x = np.random.default_rng(1).permutation(32).astype(np.int32)
    out = rt.empty((12, 32), np.int32)
    rt.launch(builtin("collectives"), (1,), 32, [put(rt, x), out])
    lane = np.arange(32)
    half = lane // 16
    np.testing.assert_array_equal(out[0], np.full(32, x[5]))
    np.testing.assert_array_equal(out[1], x[lane // 8 * 8 + lane * 7 % 8])
    np.testing.assert_array_equal(out[2], x[lane ^ 9])
    np.testing.assert_array_equal(out[3], x[np.where(lane % 16 >= 3, lane - 3, lane)])
    np.testing.assert_array_equal(out[4], x[np.where(lane % 16 < 13, lane + 3, lane)])
    np.testing.assert_array_equal(
        out[5].view(np.uint32), np.full(32, int(((x & 1) << lane.astype(np.int64)).sum()))
    )
    halves = x.reshape(2, 16)
    np.testing.assert_array_equal(out[6], np.any(halves == 3, axis=1)[half])
    np.testing.assert_array_equal(out[7], np.all(halves < 16, axis=1)[half])
    np.testing.assert_array_equal(out[8], halves.sum(1)[half])
    np.testing.assert_array_equal(out[9], np.full(32, 31))
    same = (x[:, None] % 3 == x[None, :] % 3).astype(np.uint64)
    np.testing.assert_array_equal(out[10].view(np.uint32), (same << lane.astype(np.uint64)).sum(1))
    turns = half * 3 + 2
    sums = turns * x[lane ^ 1] + turns * (turns - 1) // 2
    np.testing.assert_array_equal(out[11], sums[31 - lane])


def test_bits(rt: Emulator) -> None:
    halves = np.array([1.5, -0.25, 3.0, 1024.0], np.float16)
    bf16s = np.array([1.5, -0.25, 3.0, 1e30], ml_dtypes.bfloat16)
    x = np.array([0x12345678, 0x009ABCDE, 0x5140, *halves.view(np.uint32), *bf16s.view(np.uint32)], np.uint32)
    out = rt.empty(10, np.uint32)
    rt.launch(builtin("bits"), (1,), 1, [put(rt, x), out])
    a, b, selector = (int(v) for v in x[:3])
    assert out[0] == 0xBC56DE78
    assert list(out[1:4]) == [a.bit_count(), 8, 4]
    assert out[4] == int(f"{a:032b}"[::-1], 2)
    assert out[5] == a * b >> 32
    assert out[6] == a & b | selector
    np.testing.assert_array_equal(out[7:8].view(np.float16), halves[:2] * halves[2:])
    np.testing.assert_array_equal(out[8:9].view(np.float16), halves[:2] + halves[2:])
    np.testing.assert_array_equal(out[9:10].view(ml_dtypes.bfloat16), bf16s[:2] * bf16s[2:])


def test_conversions_round_as_numpy_does(rt: Emulator) -> None:
    rng = np.random.default_rng(2)
    x = (rng.normal(size=4096) * 10.0 ** rng.uniform(-9, 6, 4096)).astype(np.float32)
    x[:5] = [0.0, -0.0, np.inf, -np.inf, 65519.996]
    halves, bf16s = rt.empty(4096, np.uint16), rt.empty(4096, np.uint16)
    back, roots = rt.empty(4096, np.float32), rt.empty(4096, np.float32)
    rt.launch(builtin("conversions"), (16,), 256, [put(rt, x), halves, bf16s, back, roots])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(halves, x.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(bf16s, x.astype(ml_dtypes.bfloat16).view(np.uint16))
    np.testing.assert_array_equal(
        back, halves.view(np.float16).astype(np.float32) + bf16s.view(ml_dtypes.bfloat16).astype(np.float32)
    )
    np.testing.assert_allclose(roots, 1 / np.sqrt(np.maximum(x, 1)), rtol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_atomics_over_blocks_that_run_at_once(order: Order) -> None:
    rt = Emulator(order, threads=2)
    blocks, block = 40, 96
    n = blocks * block
    counters, largest = put(rt, np.zeros(3, np.uint32)), put(rt, np.zeros(1, np.uint64))
    total, indices = put(rt, np.zeros(1, np.float32)), rt.empty((n, 3), np.int32)
    rt.launch(builtin("atomics"), (blocks,), block, [counters, largest, total, indices])
    i = np.arange(n, dtype=np.uint64)
    assert counters[0] == i.sum()
    assert counters[1] == n % 10
    assert counters[2] == (i * 2654435761 % 2**32).max()
    assert largest[0] == (n - 1) << 40 | 7
    assert total[0] == n
    np.testing.assert_array_equal(indices[:, 0], i // block)
    np.testing.assert_array_equal(indices[:, 1], i % block)


def test_grids_have_three_dimensions(rt: Emulator) -> None:
    counters, largest = put(rt, np.zeros(3, np.uint32)), put(rt, np.zeros(1, np.uint64))
    total, indices = put(rt, np.zeros(1, np.float32)), rt.empty((2, 3), np.int32)
    rt.launch(builtin("atomics"), (2, 3, 4), 1, [counters, largest, total, indices])
    assert total[0] == 24
    assert list(indices[:, 2]) == [1432, 1432]


def test_orders() -> None:
    def order(rt: Emulator) -> list[int]:
        counter, out = put(rt, np.zeros(1, np.uint32)), rt.empty(4 * 64, np.uint32)
        rt.launch(builtin("arrivals"), (4,), 64, [counter, out])
        return [int(i) for i in out]

    everybody = list(range(256))
    assert order(Emulator("forward", threads=1)) == everybody
    assert order(Emulator("reversed", threads=1)) == everybody[::-1]
    shuffled = order(Emulator("random", threads=1))
    assert sorted(shuffled) == everybody != shuffled
    assert order(Emulator("random", threads=1)) == shuffled
    assert order(Emulator("random", seed=1, threads=1)) != shuffled


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_shows(order: Order) -> None:
    rt = Emulator(order)
    x = np.arange(128, dtype=np.float32)
    source, out = put(rt, x), rt.empty(128, np.float32)
    rt.launch(builtin("turn"), (1,), 128, [source, out, f32(1), i32(1)])
    np.testing.assert_array_equal(out, x[::-1] + 1)
    rt.launch(builtin("turn"), (1,), 128, [source, out, f32(1), i32(0)])
    assert np.isnan(out).any()


@pytest.mark.parametrize(("pending", "arrived"), [(0, (True, True)), (1, (True, False)), (2, (False, False))])
def test_copies_arrive_only_when_waited_for(rt: Emulator, pending: int, arrived: tuple[bool, bool]) -> None:
    x = np.arange(64, dtype=np.float32).reshape(16, 4)
    out = rt.empty((2, 16, 4), np.float32)
    rt.launch(builtin("copies"), (1,), 16, [put(rt, x), out, i32(pending)], shared_memory=2 * 16 * 16)
    zeros = np.where(np.arange(16)[:, None] % 2 == 0, x, 0)
    for got, want, there in zip(out, (x, zeros), arrived, strict=True):
        np.testing.assert_array_equal(got, want if there else np.full((16, 4), np.nan))


def test_capture_and_replay(rt: Emulator) -> None:
    x = put(rt, np.arange(128, dtype=np.float32))
    y, z = rt.empty(128, np.float32), rt.empty(128, np.float32)

    def work() -> None:
        rt.launch(builtin("turn"), (1,), 128, [x, y, f32(1), i32(1)])
        rt.copy(y, z)

    fresh = Emulator()
    with pytest.raises(EmulatorError, match="before it ever ran"):
        fresh.capture(lambda: fresh.launch(builtin("turn"), (1,), 128, [x, y, f32(1), i32(1)]))
    work()
    z[:] = 0
    recording = rt.capture(work)
    assert not z.any()
    rt.upload(np.arange(128, dtype=np.float32) * 2, x)
    rt.replay(recording)
    np.testing.assert_array_equal(rt.download(z), 2 * np.arange(128)[::-1] + 1)
    with pytest.raises(EmulatorError, match="upload inside capture"):
        rt.capture(lambda: rt.upload(y, z))
    rt.synchronize()
    free, total = rt.memory()
    assert 0 < free <= total


def test_arguments_are_compared_with_the_parameters(rt: Emulator) -> None:
    x, y = rt.empty(128, np.float32), rt.empty(128, np.float32)
    good: list[Any] = [x, y, f32(1), i32(1)]

    def refused(match: str, args: list[Any], block: int = 128, grid: tuple[int, ...] = (1,)) -> None:
        with pytest.raises(EmulatorError, match=match):
            rt.launch(builtin("turn"), grid, block, args)

    refused("3 arguments for 4 parameters", good[:3])
    refused("argument 2 is int32, the parameter is a float", [x, y, i32(1), i32(1)])
    refused("argument 2 is float64, the parameter is a float", [x, y, np.float64(1), i32(1)])
    refused("argument 3 is float32, the parameter is a 32-bit integer", [x, y, f32(1), f32(1)])
    refused("argument 3 is uint64, the parameter is a 32-bit integer", [x, y, f32(1), np.uint64(1)])
    refused("argument 3 is int, the parameter", [x, y, f32(1), 1])
    refused("argument 3 is ndarray, the parameter is a 32-bit integer", [x, y, f32(1), x])
    refused("argument 0 is int32, the parameter is a pointer", [i32(0), y, f32(1), i32(1)])
    refused("argument 0 is not C-contiguous", [x[::2], y, f32(1), i32(1)])
    refused("a block of 129 threads, the kernel takes 1 to 128", good, block=129)
    refused("no grid is", good, grid=(0,))
    with pytest.raises(EmulatorError, match=r"has no kernel nothing, but product"):
        rt.launch(builtin("nothing"), (1,), 1, [])


def test_what_does_not_compile_is_shown(rt: Emulator) -> None:
    with pytest.raises(EmulatorError, match="this_is_not_there"):
        rt.launch(Kernel(str(DATA / "broken.cu"), "broken"), (1,), 1, [])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "two_barriers",
            r"waits at __syncthreads, faults.cu:\d+, but thread \d+ waits at another, faults.cu:\d+",
        ),
        ("lane_exited", r"__shfl_sync at faults.cu:\d+ has mask 0xffffffff, but lane 3 has exited"),
        ("lane_at_barrier", r"__ballot_sync at .* lane 3 waits at __syncthreads, faults.cu:\d+"),
        ("other_collective", r"but lane \d+ waits in __(syncwarp|shfl_sync) at faults.cu:\d+ with mask"),
        (
            "not_in_mask",
            r"__shfl_sync at faults.cu:\d+ has mask 0x0000ffff without the lane itself",
        ),
    ],
)
def test_waits_without_end_are_named(rt: Emulator, name: str, says: str) -> None:
    with pytest.raises(EmulatorError, match=rf"faults.cu, {name}: block \(0, 0, 0\), thread \d+: .*" + says):
        rt.launch(fault(name), (1,), 64, [rt.empty(64, np.int32)])


def test_lanes_that_never_were_are_named(rt: Emulator) -> None:
    with pytest.raises(EmulatorError, match="lane 2 does not exist"):
        rt.launch(fault("other_collective"), (1,), 2, [rt.empty(64, np.int32)])


def test_threads_that_are_gone_count_as_arrived(rt: Emulator) -> None:
    x = put(rt, np.zeros(64, np.int32))
    rt.launch(fault("exited_at_barrier"), (1,), 64, [x])
    assert x.sum() == 32


@pytest.mark.parametrize("checked", [False, True])
def test_shared_memory_overruns_are_found(checked: bool) -> None:
    rt = Emulator(checked=checked)
    y = rt.empty(1, np.int32)
    rt.launch(fault("write_shared"), (1,), 1, [y, i32(7)])
    rt.launch(fault("write_dynamic"), (1,), 1, [y, i32(7)], shared_memory=32)
    said = "byte 32 of an array in shared memory of 32" if checked else "0 bytes past the end of an array"
    with pytest.raises(EmulatorError, match=said):
        rt.launch(fault("write_shared"), (1,), 1, [y, i32(8)])
    said = "writes 4 bytes at byte 36 of dynamic" if checked else "4 bytes past the end of dynamic"
    with pytest.raises(EmulatorError, match=said):
        rt.launch(fault("write_dynamic"), (1,), 1, [y, i32(9)], shared_memory=32)


def test_accesses_outside_arrays_are_found() -> None:
    rt = Emulator(checked=True)
    x, y = put(rt, np.arange(8, dtype=np.int32)), rt.empty(8, np.int32)
    rt.launch(fault("read_at"), (1,), 8, [x, y, i32(7)])
    assert y[0] == 7
    says = "reads 4 bytes at 0x[0-9a-f]+, 0 bytes past the end of an array of 32 bytes"
    with pytest.raises(EmulatorError, match=says):
        rt.launch(fault("read_at"), (1,), 8, [x, y, i32(8)])
    with pytest.raises(EmulatorError, match=r"writes 4 bytes at 0x[0-9a-f]+, 4 bytes before an array"):
        rt.launch(fault("write_at"), (1,), 1, [y, i32(-1)])
    with pytest.raises(EmulatorError, match=r"writes 4 bytes at .* 8 bytes past the end"):
        rt.launch(fault("add_at"), (1,), 1, [y, i32(10)])
    with pytest.raises(EmulatorError, match="4 bytes"):
        rt.launch(fault("read_at"), (1,), 1, [None, y, i32(1)])
    rt.launch(fault("read_words"), (1,), 1, [x, y, i32(16)])
    with pytest.raises(EmulatorError, match=r"misaligned access at 0x[0-9a-f]+, faults.cu:\d+"):
        rt.launch(fault("read_words"), (1,), 1, [x, y, i32(4)])
    with pytest.raises(EmulatorError, match=r"shift by 32, faults.cu:\d+"):
        rt.launch(fault("shift_by"), (1,), 1, [y, i32(32)])


def test_arrays_may_be_used_while_they_live() -> None:
    rt = Emulator(checked=True)
    kept, y = rt.empty((4, 8), np.int32), rt.empty(8, np.int32)
    rt.launch(fault("read_at"), (1,), 1, [kept[1], y, i32(-8)])  # another row of the same allocation
    foreign = np.arange(64, dtype=np.int32)
    with pytest.raises(EmulatorError):
        rt.launch(fault("read_at"), (1,), 1, [kept, y, i32(2**30)])
    rt.address(foreign)
    rt.launch(fault("read_at"), (1,), 1, [foreign[32:], y, i32(-1)])
    assert y[0] == 31
    alive = len(rt._arrays)
    view = kept[2]
    del kept
    assert len(rt._arrays) == alive
    del view
    assert len(rt._arrays) == alive - 1


def test_a_kernel_that_needs_too_much_stack_does_not_compile() -> None:
    rt = Emulator()
    with pytest.raises(EmulatorError, match="frame"):
        rt.launch(Kernel(str(DATA / "stack.cu"), "stack"), (1,), 1, [rt.empty(1, np.int32), i32(0)])


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(DeviceError, match="install g"):
        Emulator()
    runtime.compiler.cache_clear()
