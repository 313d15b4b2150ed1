"""The yardstick of decode: device memory read as fast as a plain kernel can."""

import numpy as np

from gptoss_lite.kernels.cuda.launch.arguments import require
from gptoss_lite.kernels.cuda.runtime import Array, Runtime
from gptoss_lite.kernels.cuda.source import Kernel

READ_THREADS = 512
_WORD = 16  # bytes


def read(rt: Runtime, data: Array, sums: Array) -> None:
    """Read `data` by as many blocks as `sums` has rows; each thread adds up what it has read, modulo 2^32.

    data uint8 (multiple of 16,); sums uint32 (blocks, 512): together they are the sum of data's 32-bit words.
    """
    require("data", data, np.uint8, None)
    require("sums", sums, np.uint32, None, READ_THREADS)
    if data.nbytes % _WORD:
        raise ValueError(f"data has {data.nbytes} bytes: must be a multiple of {_WORD}")
    args = data, np.uint64(data.nbytes // _WORD), sums
    rt.launch(Kernel("read.cu", "read_words"), (len(sums),), READ_THREADS, args)
