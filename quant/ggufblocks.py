"""The blocks of GGUF: MXFP4 and Q8_0 as ggml interleaves them, to and from our codes and scales, exactly.

A block of 32 weights is 17 bytes of MXFP4, the scale first, byte j holding code j in its low nibble and code
j + 16 in its high one; or 34 bytes of Q8_0, an fp16 scale and 32 codes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.quant import int8, mxfp4
from gptoss_lite.quant.formats import BLOCK, MXFP4, Format, Int8
from gptoss_lite.quant.mxfp4 import BLOCK_BYTES, SUSPECT
from gptoss_lite.quant.qtensor import Int8Tensor, MXFP4Tensor, QTensor

MXFP4_BYTES, Q8_0_BYTES = 1 + BLOCK_BYTES, 2 + BLOCK
FORMATS: dict[str, Format] = {"MXFP4": MXFP4(), "Q8_0": Int8(BLOCK, "float16")}


def from_blocks(raw: NDArray[np.uint8], dtype: str) -> MXFP4Tensor | Int8Tensor:
    """Take blocks apart: raw uint8 (..., K/32, 17) of "MXFP4", or (..., K/32, 34) of "Q8_0"."""
    if dtype == "Q8_0":
        codes = np.ascontiguousarray(raw[..., 2:]).view(np.int8)
        return Int8Tensor(codes.reshape(*codes.shape[:-2], -1), scales(raw, dtype))
    blocks = np.empty((*raw.shape[:-1], BLOCK_BYTES), np.uint8)
    exponents = np.empty(raw.shape[:-1], np.uint8)
    kernels = _kernels()
    apply = take_apart if kernels is None else kernels.take_apart
    apply(raw.reshape(-1, MXFP4_BYTES), blocks.reshape(-1, BLOCK_BYTES), exponents.reshape(-1))
    return MXFP4Tensor(blocks, exponents)


def scales(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Take the scales alone out of blocks such as `from_blocks` takes: uint8 or float16 (..., K/32)."""
    if dtype == "Q8_0":
        return np.ascontiguousarray(raw[..., :2]).view(np.float16)[..., 0]
    return raw[..., 0]


def invalid_scale(raw: NDArray[np.uint8], dtype: str) -> tuple[int, ...] | None:
    """Do what qtensor.invalid_scale does for blocks, and take them apart only where a scale is suspect."""
    if dtype == "Q8_0":
        return int8.invalid_scale(scales(raw, dtype))
    if scales(raw, dtype).max() < SUSPECT:
        return None
    tensor = from_blocks(raw, dtype)
    assert isinstance(tensor, MXFP4Tensor)
    return mxfp4.invalid_scale(tensor.blocks, tensor.scales)


def to_blocks(tensor: QTensor) -> NDArray[np.uint8]:
    """Put a tensor (..., K) together as blocks uint8 (..., K/32, 17 or 34).

    MXFP4, or int8 in groups of 32 with fp16 scales.
    """
    match tensor:
        case MXFP4Tensor(blocks=blocks, scales=scales):
            flat = (
                np.ascontiguousarray(blocks).reshape(-1, BLOCK_BYTES),
                np.ascontiguousarray(scales).reshape(-1),
            )
            return _put_together(*flat).reshape(*scales.shape, MXFP4_BYTES)
        case Int8Tensor(codes=codes, scales=scales):
            raw = np.empty((*scales.shape, Q8_0_BYTES), np.uint8)
            raw[..., :2] = np.ascontiguousarray(scales)[..., None].view(np.uint8)
            raw[..., 2:] = codes.reshape(*scales.shape, BLOCK).view(np.uint8)
            return raw
    raise TypeError(f"GGUF has no blocks for {type(tensor).__name__}")


def _put_together(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Use the compiled kernel for as many blocks as make whole words, the definition for the rest."""
    kernels = _kernels()
    count = 0 if kernels is None or not blocks.flags.aligned else len(blocks) // 8 * 8
    raw = np.empty((len(blocks), MXFP4_BYTES), np.uint8)
    if count:
        words = raw.reshape(-1)[: count * MXFP4_BYTES].view(np.uint64)
        kernels.put_together(blocks[:count].view(np.uint64), scales[:count], words)
    put_together(blocks[count:], scales[count:], raw[count:])
    return raw


def take_apart(raw: NDArray[np.uint8], blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> None:
    """Write blocks (n, 16) and scales (n,) of MXFP4 from ggml's raw (n, 17): the definition."""
    codes = np.concatenate([raw[:, 1:] & 15, raw[:, 1:] >> 4], axis=1)  # (n, 32), in order
    blocks[:] = codes[:, 0::2] | codes[:, 1::2] << 4
    scales[:] = raw[:, 0]


def put_together(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], raw: NDArray[np.uint8]) -> None:
    """Write ggml's raw (n, 17) from blocks (n, 16) and scales (n,): the definition."""
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(-1, BLOCK)
    raw[:, 0] = scales
    raw[:, 1:] = codes[:, :BLOCK_BYTES] | codes[:, BLOCK_BYTES:] << 4


def _kernels() -> Any:
    """Numba's versions of these, of the same bytes; None without Numba, or where it has nowhere to write."""
    try:
        from gptoss_lite.kernels.cpu import ggufblocks
    except (ImportError, RuntimeError):
        return None
    return ggufblocks
