"""Every program that there is: which -D definitions each kernel file can be compiled with."""

from itertools import product

from gptoss_lite.kernels.cuda.build import Defines

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

# What a file can be compiled for: WEIGHTS stands for one of the three formats, the others are there or not.
SWITCHES: dict[str, tuple[str, ...]] = {
    "attention_decode.cu": ("KV_FP16", "OPERAND_BF16"),
    "attention_prefill.cu": ("KV_FP16", "OPERAND_BF16"),
    "combine.cu": (),
    "embed.cu": (),
    "group.cu": (),
    "linear.cu": ("WEIGHTS", "OPERAND_BF16"),
    "lm_head.cu": ("WEIGHTS", "OPERAND_BF16"),
    "moe_decode.cu": ("WEIGHTS", "OPERAND_BF16"),
    "moe_prefill.cu": ("WEIGHTS", "OPERAND_BF16"),
    "norm.cu": ("OPERAND_BF16",),
    "out_proj.cu": ("WEIGHTS", "OPERAND_BF16"),
    "qkv.cu": ("WEIGHTS", "OPERAND_BF16", "KV_FP16"),
    "read.cu": (),
    "repack.cu": (),
    "rope.cu": ("KV_FP16",),
    "router.cu": ("OPERAND_BF16",),
    "sample.cu": (),
}


def _choices(switch: str) -> tuple[tuple[str, ...], ...]:
    if switch == "WEIGHTS":
        return ("WEIGHTS_DENSE",), ("WEIGHTS_INT8",), ("WEIGHTS_INT8", "SCALE_BF16"), ("WEIGHTS_MXFP4",)
    return (), (switch,)


def variants(file: str, arch: str) -> list[Defines]:
    """List the definitions that the launch functions can ask for on a GPU of this architecture.

    Before sm_80 there is no bf16 arithmetic: operands are fp16 there, and so are keys and values.
    """
    found = []
    for chosen in product(*map(_choices, SWITCHES[file])):
        names = [name for choice in chosen for name in choice]
        old = int(arch.removeprefix("sm_")) < 80
        if not (old and ("OPERAND_BF16" in names or ("KV_FP16" in SWITCHES[file]) > ("KV_FP16" in names))):
            found.append(tuple((name, 1) for name in names))
    return found
