"""Every kernel, compiled for every architecture: nothing spilt in decode, and tensor cores used."""

import ast
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

import pytest

from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cuda import build, sass, source
from gptoss_lite.kernels.cuda.variants import ARCHS, SWITCHES, variants

FOLDER = files("gptoss_lite.kernels.cuda")
DECODE = ("attention_decode.cu", "lm_head.cu", "moe_decode.cu", "out_proj.cu", "qkv.cu", "router.cu")
PREFILL = ("attention_prefill.cu", "combine.cu", "linear.cu", "moe_prefill.cu", "repack.cu", "rope.cu")
MOST_SPILT = 8  # bytes a thread in prefill, outside the loop: two registers
TENSOR_CORES = ("attention_prefill.cu", "linear.cu", "moe_prefill.cu", *DECODE[:-1])

Program = tuple[str, build.Defines, str]


@pytest.fixture(autouse=True)
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> build.NVRTC:
    """Keep compiled kernels in pytest's cache, where the next run finds those that have not changed."""
    assert request.config.cache is not None
    monkeypatch.setenv("GPTOSS_LITE_CACHE", str(request.config.cache.mkdir("cubins")))
    try:
        return build.nvrtc()
    except DeviceError as error:
        pytest.skip(str(error))


def typical(file: str, arch: str) -> build.Defines:
    """The variant that gpt-oss as published needs: MXFP4 experts and fp16 operands, the rest bf16."""
    wanted: set[str] = set()
    if "WEIGHTS" in SWITCHES[file]:
        wanted = {"WEIGHTS_MXFP4"} if file.startswith("moe_") else {"WEIGHTS_DENSE", "OPERAND_BF16"}
    [found] = (defines for defines in variants(file, arch) if {name for name, _ in defines} == wanted)
    return found


def programs(file: str) -> list[Program]:
    """All variants on sm_90, or, as it takes long to compile, each format once in prefill.

    On Turing, whose code differs, each format once; elsewhere the typical one.
    """
    found: list[Program] = []
    for arch in ARCHS:
        if arch in ("sm_75", "sm_90"):
            once = file in PREFILL or arch == "sm_75"
            chosen = [names for names in variants(file, arch) if not (once and ("SCALE_BF16", 1) in names)]
        else:
            chosen = [typical(file, arch)]
        found += [(file, defines, arch) for defines in chosen]
    return found


def compile_all(programs: Iterable[Program]) -> dict[Program, Path]:
    """Compile on all cores; NVRTC leaves Python's lock alone."""
    programs = list(programs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(
            zip(programs, pool.map(lambda program: build.cubin_path(*program), programs), strict=True)
        )


def hot(arch: str, file: str) -> dict[str, list[sass.Instruction]]:
    """Disassemble the typical variant of a file."""
    if sass.tool() is None:
        pytest.skip("cuobjdump is not installed")
    return sass.disassemble(build.cubin_path(file, typical(file, arch), arch))


def check_resources(file: str, programs: Iterable[Program]) -> None:
    """Compile; kernels stay within their registers and within the shared memory that all GPUs have."""
    compiled = compile_all(programs)
    assert all(path.suffix == ".cubin" for path in compiled.values())
    if sass.tool() is None:
        pytest.skip("cuobjdump is not installed")
    for program, path in compiled.items():
        for name, taken in sass.resources(path).items():
            reserved = 1024 * (int(program[2].removeprefix("sm_")) >= 90)
            assert taken.shared <= (48 << 10) + reserved, (program, name, taken)
            assert taken.local <= (MOST_SPILT if file in PREFILL else 0), (program, name, taken)


@pytest.mark.parametrize("file", SWITCHES)
def test_kernels_compile_within_their_registers(file: str) -> None:
    check_resources(file, programs(file))


@pytest.mark.soak
@pytest.mark.parametrize("file", SWITCHES)
def test_every_variant_compiles_within_its_registers_everywhere(file: str) -> None:
    check_resources(file, [(file, defines, arch) for arch in ARCHS for defines in variants(file, arch)])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", TENSOR_CORES)
def test_products_run_on_tensor_cores_from_registers(file: str, arch: str) -> None:
    for name, instructions in hot(arch, file).items():
        loop = sass.main_loop(instructions)
        assert sass.count(loop, "HMMA"), f"{name} has no loop of tensor core products"
        assert not sass.count(loop, "LDL") + sass.count(loop, "STL"), f"{name} spills in its loop"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", DECODE)
def test_decode_reads_sixteen_bytes_at_a_time(file: str, arch: str) -> None:
    for name, instructions in hot(arch, file).items():
        wide = [
            step for step in instructions if step.operation.startswith("LDG") and ".128" in step.operation
        ]
        assert wide, f"{name} has no 16-byte load"


def test_the_table_lists_every_kernel_file() -> None:
    assert set(SWITCHES) == {path.name for path in FOLDER.iterdir() if path.name.endswith(".cu")}


@pytest.mark.parametrize("file", SWITCHES)
def test_the_table_lists_the_switches_that_a_file_knows(file: str) -> None:
    text = "".join(map(source.read, (file, *source.headers(file))))
    known = set(re.findall(r"\b(WEIGHTS|OPERAND_BF16|KV_FP16)(?:_DENSE|_INT8|_MXFP4)?\b", text))
    assert set(SWITCHES[file]) == known


def test_what_launch_functions_name_is_what_there_is() -> None:
    entry = re.compile(r'extern "C" __global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(')
    exist = {(file, name) for file in SWITCHES for name in entry.findall(source.read(file))}
    named, texts = set(), set()
    for path in (FOLDER / "launch").iterdir():
        if path.name.endswith(".py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                match node:
                    case ast.Call(ast.Name("Kernel"), [ast.Constant(file), ast.Constant(name), *_]):
                        named.add((file, name))
                    case ast.Constant(str(text)):
                        texts.add(text)
    assert named <= exist
    assert {name for _, name in exist} <= texts  # some choose between names before


def test_a_changed_header_is_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    read = source.read
    monkeypatch.setattr(source, "read", lambda file: read(file))
    before = build.cubin_path("rope.cu", (), "sm_90")
    assert build.cubin_path("rope.cu", (), "sm_90") == before
    monkeypatch.setattr(source, "read", lambda file: read(file) + "// changed\n" * (file == "ptx.cuh"))
    after = build.cubin_path("rope.cu", (), "sm_90")
    others = build.cubin_path("rope.cu", (("KV_FP16", 1),), "sm_90"), build.cubin_path("rope.cu", (), "sm_80")
    assert len({before, after, *others}) == 4


def test_what_is_compiled_for_suits_the_gpu() -> None:
    compiler = build.NVRTC(build.nvrtc().library, (12, 8), (75, 80, 86, 90, 120))
    assert compiler.target("sm_90") == "sm_90"
    assert compiler.target("sm_89") == "sm_86"  # the same family
    assert compiler.target("sm_130") == "compute_120"  # a family it does not know: PTX
    with pytest.raises(DeviceError, match=r"NVRTC 12\.8 cannot compile for sm_70"):
        compiler.target("sm_70")


def test_a_newer_gpu_gets_ptx() -> None:
    path = build.cubin_path("rope.cu", (), "sm_999")
    assert path.suffix == ".ptx"
    assert b".entry" in path.read_bytes()


def test_a_refused_kernel_shows_the_log(compiler: build.NVRTC) -> None:
    with pytest.raises(
        build.CompileError, match=r'(?s)linear\.cu -arch=sm_90.*identifier "VECTORS" is undefined'
    ):
        compiler.compile("linear.cu", (), "sm_90")


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_candidates", lambda: iter(["/nowhere/libnvrtc.so.13", "libnothing.so"]))
    for newest, extra in ((None, "cuda13"), (13, "cuda13"), (12, "cuda12")):
        with pytest.raises(DeviceError) as caught:
            build.nvrtc.__wrapped__(newest)
        assert f"pip install 'gptoss-lite[{extra}]'" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_compiler_newer_than_the_driver_is_passed_over(compiler: build.NVRTC) -> None:
    major = compiler.version[0]
    assert build.nvrtc(major).version == compiler.version
    with suppress(DeviceError):  # there is only the one
        assert build.nvrtc(major - 1).version[0] < major
