"""The runtime over CuPy: what it says where there is no GPU, and what it does where there is one."""

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gptoss_lite.errors import DeviceError, OutOfMemoryError
from gptoss_lite.kernels.cuda import build, cupy_runtime
from gptoss_lite.kernels.cuda.cupy_runtime import LARGE, SMALL, CuPyRuntime


class CUDARuntimeError(RuntimeError):
    """Stands for CuPy's."""


def machine(driver: int, gpus: list[str], error: str | None = None) -> Any:
    """Stand for CuPy with these GPUs' compute capabilities: only what tells whether one can be used."""

    def count() -> int:
        if error:
            raise CUDARuntimeError(error)
        return len(gpus)

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        driverGetVersion=lambda: driver,
        runtimeGetVersion=lambda: 13020,
        getDeviceCount=count,
        getDeviceProperties=lambda index: {"name": b"GeForce GTX 1080"},
    )

    def device(index: int) -> SimpleNamespace:
        return SimpleNamespace(compute_capability=gpus[index])

    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=device))


def test_without_cupy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_runtime, "find_spec", lambda name: None)
    said = cupy_runtime.why_not()
    assert said == (
        "--device cuda needs CuPy: pip install 'gptoss-lite[cuda13]' (driver 580 or newer) "
        "or 'gptoss-lite[cuda12]'"
    )
    assert not cupy_runtime.usable()
    with pytest.raises(DeviceError, match="needs CuPy"):
        CuPyRuntime()


def test_a_broken_cupy_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("=====\na page of advice\n=====") from ImportError("libcudart.so.13:\ncannot open")

    monkeypatch.setattr(cupy_runtime, "find_spec", lambda name: object())
    monkeypatch.setattr(cupy_runtime, "import_module", broken)
    assert cupy_runtime.why_not() == "CuPy cannot be imported: libcudart.so.13: cannot open"


@pytest.mark.parametrize(
    ("cupy", "index", "said"),
    [
        (machine(0, []), 0, "no NVIDIA driver found: --device cuda needs one, and a GPU"),
        (
            machine(12040, ["90"], "cudaErrorInsufficientDriver: too old"),
            0,
            "the NVIDIA driver knows CUDA 12.4 and this CuPy needs 13: "
            "update the driver, or install 'gptoss-lite[cuda12]' instead",
        ),
        (
            machine(11080, ["90"], "cudaErrorInsufficientDriver: too old"),
            0,
            "the NVIDIA driver knows CUDA 11.8 and this CuPy needs 13: update the driver",
        ),
        (machine(13000, [], "cudaErrorNoDevice"), 0, "no usable NVIDIA GPU: cudaErrorNoDevice"),
        (machine(13000, ["90"]), 1, "no cuda:1 here: 1 GPU, counted from 0"),
        (machine(13000, ["90", "90"]), -1, "no cuda:-1 here: 2 GPUs, counted from 0"),
        (
            machine(13000, ["90", "61"]),
            1,
            "cuda:1, GeForce GTX 1080, has compute capability 6.1: 7.5 (Turing) or newer is needed",
        ),
    ],
)
def test_it_says_why_a_gpu_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, cupy: Any, index: int, said: str
) -> None:
    monkeypatch.setattr(cupy_runtime, "_cupy", lambda: cupy)
    assert cupy_runtime.why_not(index) == said
    with pytest.raises(DeviceError):
        CuPyRuntime(index)


def test_a_gpu_without_a_compiler_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_runtime, "_cupy", lambda: machine(13000, ["90"]))
    monkeypatch.setattr(build, "_candidates", lambda: iter(()))
    monkeypatch.setattr(build, "nvrtc", build.nvrtc.__wrapped__)
    assert "no NVRTC, CUDA's compiler, found" in str(cupy_runtime.why_not())


@pytest.fixture(scope="module")
def gpu() -> CuPyRuntime:
    """The real thing, where there is one."""
    if reason := cupy_runtime.why_not():
        pytest.skip(reason)
    return CuPyRuntime()


@pytest.mark.parametrize("nbytes", [0, 1, SMALL, SMALL + 1, 3 * LARGE + 5])
def test_what_goes_up_comes_down(gpu: CuPyRuntime, nbytes: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    want, array = source.copy(), gpu.empty(nbytes, np.uint8)
    gpu.upload(source, array)
    source[:] = 0  # allowed on return
    np.testing.assert_array_equal(gpu.download(array), want)


def test_many_small_uploads_stay_in_order(gpu: CuPyRuntime) -> None:
    arrays = [gpu.empty((), np.int64) for _ in range(100)]
    for n, array in enumerate(arrays):
        gpu.upload(np.array(n), array)
    assert [int(gpu.download(array)) for array in arrays] == list(range(100))


def test_pinned_memory_has_an_address_and_is_given_back(gpu: CuPyRuntime) -> None:
    host, device = gpu.pinned((2, 4), np.float32), gpu.empty((4,), np.float32)
    host[:] = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert gpu.address(host[1]) == gpu.address(host) + 16
    gpu.copy(host[1], device)
    np.testing.assert_array_equal(gpu.download(device), host[1])
    row = host[1]
    del host
    gc.collect()
    assert row[0] == 5  # the array over it is alive
    with pytest.raises(ValueError, match="pin it"):
        gpu.address(np.zeros(3))


def test_a_recording_runs_when_replayed_and_keeps_its_arrays(gpu: CuPyRuntime) -> None:
    source, target = gpu.empty(8, np.int32), gpu.empty(8, np.int32)
    gpu.upload(np.arange(8, dtype=np.int32), source)
    gpu.upload(np.zeros(8, np.int32), target)
    recording = gpu.capture(lambda: gpu.copy(source, target))
    assert not gpu.download(target).any()
    gpu.replay(recording)
    np.testing.assert_array_equal(gpu.download(target), np.arange(8))
    assert len(recording.arrays) == 2


def test_too_much_memory_is_refused_in_words(gpu: CuPyRuntime) -> None:
    _, total = gpu.memory()
    with pytest.raises(OutOfMemoryError, match=r"no room for .* GiB are free"):
        gpu.empty(2 * total, np.uint8)
