"""Checksums: what is folded and put together is what zlib has, and a tensor in parts is wholly looked at."""

import threading
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from ml_dtypes import bfloat16

from gptoss_lite.checkpoint import save_file
from gptoss_lite.errors import CheckpointError
from gptoss_lite.kernels.cpu import crc, isa
from gptoss_lite.quant import checksum, tensorfile
from gptoss_lite.quant.checksum import Checksum, combine
from gptoss_lite.quant.tensorfile import StoredTensor, read_file

DATA = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8)
VALUES = (0, 0xFFFFFFFF, 0x12345678)


@pytest.fixture
def lanes(request: pytest.FixtureRequest) -> int:
    if request.param not in crc.usable():
        pytest.skip("this CPU multiplies no such registers without carries")
    return int(request.param)


@pytest.mark.parametrize("lanes", [1, 2, 4], indirect=True)
def test_every_length_and_address_gives_what_zlib_does(lanes: int) -> None:
    for length in range(301):
        for start in (0, 1, length % 64):
            for value in VALUES:
                data = DATA[start : start + length]
                assert crc.read(data, value, lanes)[0] == zlib.crc32(data.data, value), (length, start)


@pytest.mark.parametrize("lanes", [1, 2, 4], indirect=True)
def test_long_runs_give_what_zlib_does(lanes: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        start, stop = sorted(rng.integers(0, len(DATA), 2))
        value = int(rng.integers(1 << 32))
        data = DATA[start:stop]
        assert crc.read(data, value, lanes)[0] == zlib.crc32(data.data, value), (start, stop, value)
    for data in np.zeros(100_000, np.uint8), np.full(100_000, 255, np.uint8):
        assert crc.read(data, 7, lanes)[0] == zlib.crc32(data.data, 7)


@pytest.mark.parametrize("lanes", [1, 2, 4], indirect=True)
@pytest.mark.parametrize(
    ("width", "mask"), [(4, 0x7F800000), (2, 0x7F80), (2, 0x7C00)], ids=["float32", "bfloat16", "float16"]
)
def test_exponents_of_ones_are_noticed_on_the_way(lanes: int, width: int, mask: int) -> None:
    """Bits of any other kind are not taken for them, nor the low halves of float32 for exponents."""
    exponent = mask * (0x10001 if width == 2 else 1)
    every = np.arange(1 << 16, dtype=np.uint32)
    bits = (
        every.astype(np.uint16) if width == 2 else np.concatenate([every << 16 | 0x7F80, every | 0x3F800000])
    )
    finite, not_finite = bits[bits & mask != mask], bits[bits & mask == mask]
    data = np.concatenate([np.zeros(1, np.uint8), finite[: len(finite) // 2048 * 2048].view(np.uint8)])[1:]
    assert crc.read(data, 0, lanes, exponent) == (zlib.crc32(data.data), data.size)
    assert crc.read(data[: data.size - 9], 0, lanes, exponent)[1] == data.size - 64 * lanes
    message = np.zeros(3 * 64 * lanes // width, bits.dtype)
    for place in range(message.size):
        message[place] = not_finite[place % len(not_finite)]
        assert crc.read(message.view(np.uint8), 0, lanes, exponent)[1] == 0
        assert crc.read(message.view(np.uint8), 0, lanes)[1] == message.nbytes  # where no floats are
        message[place] = 0


@pytest.mark.parametrize(
    ("features", "usable"),
    [
        ({"pclmul", "avx2"}, (1,)),
        ({"pclmul", "vpclmulqdq", "avx2"}, (2, 1)),
        ({"pclmul", "vpclmulqdq", "avx2", "avx512f"}, (4, 2, 1)),
        ({"pclmul", "avx2", "avx512f"}, (1,)),
        ({"neon", "dotprod"}, ()),
    ],
)
def test_registers_are_as_wide_as_the_cpu_multiplies(
    monkeypatch: pytest.MonkeyPatch, features: set[str], usable: tuple[int, ...]
) -> None:
    monkeypatch.setattr(isa, "features", lambda: frozenset(features))
    assert crc.usable.__wrapped__() == usable


def test_runs_are_put_together() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        places = np.sort(rng.integers(0, 100_000, int(rng.integers(1, 6))))
        whole = DATA[:100_000]
        total = 0
        for part in np.split(whole, places):
            total = combine(total, zlib.crc32(part.data), part.size)
        assert total == zlib.crc32(whole.data), places
    huge = (1 << 40) + 3
    assert combine(combine(1, 0, huge), 0, huge) == combine(1, 0, 2 * huge)


def test_checksums_cover_name_dtype_shape_and_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_LARGE", 1000)
    data = DATA[:50_000]
    before = zlib.crc32(b'["w", "U8", [100, 500]]')
    at_once, in_parts = (Checksum("w", "U8", (100, 500)) for _ in range(2))
    at_once.update(data.data)
    for part in np.split(data, [3, 40_000]):
        in_parts.append(zlib.crc32(part.data), part.size)
    assert str(at_once) == str(in_parts) == f"{zlib.crc32(data.data, before):08x}"


def test_small_data_and_cpus_that_cannot_are_left_to_zlib(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checksum.lanes(4_000_000) == 0
    best = (*crc.usable(), 0)[0]
    assert checksum.lanes(1 << 30) == best
    monkeypatch.setattr(crc, "usable", lambda: ())
    assert checksum.lanes(1 << 30) == 0
    monkeypatch.setattr(checksum, "_kernels", lambda: None)
    assert checksum.lanes(1 << 30) == 0
    assert checksum.read(DATA, 5, lanes=0) == (zlib.crc32(DATA.data, 5), 0)


# Tensors read in parts


@pytest.fixture(params=["compiled", "plain"])
def in_parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a small tensor as a large one is read."""
    monkeypatch.setattr(checksum, "_LARGE", 1)
    monkeypatch.setattr(tensorfile, "_PART", 1 << 15)
    monkeypatch.setattr(tensorfile, "_CHUNK", 1 << 10)
    if request.param == "plain":
        monkeypatch.setattr(checksum, "_kernels", lambda: None)


def stored(path: Path, array: Any) -> StoredTensor:
    path.unlink(missing_ok=True)  # an earlier mapping of it may live on
    save_file(path, {"x": array})
    return read_file(path)["x"]


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("threads", [1, 3])
def test_damage_anywhere_is_found(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "x.safetensors"
    stored(path, DATA[:100_001]).verify(threads)
    raw = path.read_bytes()
    start = len(raw) - 100_001
    for place in (0, 4095, 4096, 16383, 16384, 50_000, 98_304, 100_000):
        damaged = bytearray(raw)
        damaged[start + place] ^= 0x10
        path.unlink()
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="x is damaged: its checksum is"):
            read_file(path)["x"].verify(threads)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_the_first_of_what_is_not_finite_is_named(tmp_path: Path, dtype: Any, threads: int) -> None:
    largest = np.finfo(np.float16).max if dtype == np.float16 else 3e38
    array = (np.full(50_000, largest, np.float32) * (-1) ** np.arange(50_000, dtype=np.float32)).astype(dtype)
    stored(tmp_path / "x.safetensors", array.reshape(500, 100)).verify(threads)
    for value in np.nan, np.inf, -np.inf:
        for place in (0, 2047, 8192, 31_901, 49_998):
            wrong = array.copy()
            wrong[[place, place if place % 2 else 49_999]] = value
            tensor = stored(tmp_path / "x.safetensors", wrong.reshape(500, 100))
            with pytest.raises(CheckpointError, match=rf"holds {value} at \({place // 100}, {place % 100}\)"):
                tensor.verify(threads)


@pytest.mark.usefixtures("in_parts")
def test_what_is_done_is_told_on_the_way_and_on_the_caller_s_thread(tmp_path: Path) -> None:
    tensor, told = stored(tmp_path / "x.safetensors", DATA[:100_001]), []
    tensor.verify(3, lambda count: told.append((count, threading.get_ident())))
    step = 7 << 12  # of four parts alike
    assert told == [(count, threading.get_ident()) for count in (step, step, step, 100_001 - 3 * step)]


def test_large_tensors_are_verified_in_little_memory(tmp_path: Path) -> None:
    array = np.zeros((4, 5_000_000), bfloat16)
    array[3, -1] = 1
    large = stored(tmp_path / "x.safetensors", array)
    others = tmp_path / "y.safetensors"
    safetensors.numpy.save_file({"x": array}, others)
    for tensor in large, read_file(others)["x"]:
        tensor.verify(2)
        tracemalloc.start()
        try:
            tensor.verify(2)
            assert tracemalloc.get_traced_memory()[1] < 3 << 20
        finally:
            tracemalloc.stop()
