"""What networks the CUDA kernels can compute."""

from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.cuda.launch import routing, sampling
from gptoss_lite.kernels.cuda.layout import BLOCK, HEAD_DIM


def require(config: ModelConfig) -> None:
    """Raise DeviceError for a network beyond what the kernels are written for."""
    limits = {  # key -> value, whether it will do, what would
        "head_dim": (config.head_dim, config.head_dim == HEAD_DIM, f"{HEAD_DIM}"),
        "hidden_size": (
            config.hidden_size,
            config.hidden_size % BLOCK == 0 and config.hidden_size <= routing.MAX_ROUTED_HIDDEN,
            f"a multiple of {BLOCK} up to {routing.MAX_ROUTED_HIDDEN}",
        ),
        "intermediate_size": (
            config.intermediate_size, config.intermediate_size % BLOCK == 0, f"a multiple of {BLOCK}"
        ),
        "num_local_experts": (
            config.num_local_experts,
            config.num_local_experts <= routing.MAX_EXPERTS,
            f"at most {routing.MAX_EXPERTS}",
        ),
        "num_experts_per_tok": (
            config.num_experts_per_tok,
            config.num_experts_per_tok <= routing.MAX_K,
            f"at most {routing.MAX_K}",
        ),
        "vocab_size": (
            config.vocab_size,
            config.vocab_size <= sampling.MAX_SAMPLED_VOCAB,
            f"at most {sampling.MAX_SAMPLED_VOCAB}",
        ),
    }  # fmt: skip
    for key, (value, fits, wanted) in limits.items():
        if not fits:
            raise DeviceError(f"{key} is {value}: the CUDA kernels want {wanted}; device cpu takes any")
