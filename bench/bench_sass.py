"""Machine instructions that decode spends on a weight: what limits it once memory is no longer the limit."""

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cuda import build, sass

LANES = 32
WEIGHTS_PER_PRODUCT = 16 * 16  # of the A operand of one m16n8k16, by one warp

# An H200 reads 4.3 TB/s of MXFP4, 8.1e12 weights/s, and issues for 132 SMs x 128 lanes x 1.98 GHz: 4.1
# instructions a weight. Three quarters of it leave room for what waits.
TARGET = 3.2


@pytest.mark.parametrize("name", ["gate_up_decode", "down_decode"])
def bench_mxfp4_decode_instructions(benchmark: BenchmarkFixture, tmp_path: Path, name: str) -> None:
    """Count the main loop of the experts' decode kernels on sm_90; what is timed is NVRTC."""
    if sass.tool() is None:
        pytest.skip("cuobjdump is not installed")
    try:
        compiler = build.nvrtc()
    except DeviceError as error:
        pytest.skip(str(error))
    program = "moe_decode.cu", (("WEIGHTS_MXFP4", 1),), "sm_90"
    cubin = tmp_path / "moe_decode.cubin"
    cubin.write_bytes(benchmark.pedantic(compiler.compile, program, rounds=1))

    loop = sass.main_loop(sass.disassemble(cubin)[name])
    weights = sass.count(loop, "HMMA.16816") * WEIGHTS_PER_PRODUCT
    assert weights, f"{name} has no loop of tensor core products"
    benchmark.extra_info["instructions per weight"] = round(len(loop) * LANES / weights, 2)
    assert len(loop) * LANES / weights <= TARGET
