"""What NVIDIA's disassembler says of a compiled kernel; for tests and benchmarks, which install it."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# "/*0130*/  @P0 BRA 0x42f0 ;": address, predicate, operation, operands
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_RESOURCES = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction, without its predicate: HMMA.16816.F32 and what follows it."""

    address: int
    operation: str
    operands: str


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes: registers and bytes of local memory per thread, bytes of static shared memory.

    From sm_90 on, the shared memory includes 1 KiB that is the system's.
    """

    registers: int
    shared: int
    local: int


def tool() -> str | None:
    """Find cuobjdump, nvdisasm being beside it: in NVIDIA's wheels, else on the path."""
    wheels = find_spec("nvidia")
    for folder in (wheels and wheels.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*/bin/cuobjdump*")):
            return str(path)
    return shutil.which("cuobjdump")


def _dump(cubin: Path, what: str) -> str:
    command = tool()
    if command is None:
        raise FileNotFoundError("cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return subprocess.run([command, what, str(cubin)], check=True, capture_output=True, text=True).stdout


def resources(cubin: Path) -> dict[str, Resources]:
    """Return what each entry point of a cubin takes; spilt registers and indexed arrays are local memory."""
    return {
        name: Resources(int(registers), int(shared), int(stack) + int(local))
        for name, registers, stack, shared, local in _RESOURCES.findall(_dump(cubin, "--dump-resource-usage"))
    }


def disassemble(cubin: Path) -> dict[str, list[Instruction]]:
    """Return the instructions of each entry point of a cubin."""
    functions = {}
    for text in re.split(r"\n\s+Function : ", _dump(cubin, "--dump-sass"))[1:]:
        name, _, body = text.partition("\n")
        functions[name.strip()] = [
            Instruction(int(address, 16), operation, operands.strip())
            for address, operation, operands in _INSTRUCTION.findall(body)
        ]
    return functions


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """Return the loop body with the most tensor core products, of those that have no such loop inside.

    A loop is what lies between a backward branch and its target. Empty where no loop has such a product.
    """
    loops = []
    for branch in instructions:
        target = re.search(r"0x([0-9a-f]+)$", branch.operands)
        if branch.operation.startswith("BRA") and target and int(target[1], 16) < branch.address:
            start = int(target[1], 16)
            body = [step for step in instructions if start <= step.address <= branch.address]
            if count(body, "HMMA"):
                loops.append(body)
    innermost = [
        body
        for body in loops
        if not any(other[0] in body and other[-1] in body for other in loops if other is not body)
    ]
    return max(innermost, key=lambda body: count(body, "HMMA"), default=[])


def count(instructions: list[Instruction], prefix: str) -> int:
    """Count the instructions whose operation begins so."""
    return sum(step.operation.startswith(prefix) for step in instructions)
