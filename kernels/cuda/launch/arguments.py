"""What launch functions check their arrays with, and the scalars that several kernels take."""

from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.layout import Layout
from gptoss_lite.kernels.cuda.runtime import Array, i32


def require(name: str, array: Any, dtype: npt.DTypeLike, *shape: int | None) -> None:
    """Raise ValueError unless `array` is C-contiguous with this dtype and shape; None is any length."""
    fits = array.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, array.shape, strict=False)
    )
    if array.dtype != np.dtype(dtype) or not fits or not array.flags.c_contiguous:
        wanted = ", ".join("*" if want is None else str(want) for want in shape)
        order = "" if array.flags.c_contiguous else ", not contiguous"
        raise ValueError(
            f"{name} is {array.dtype} {array.shape}{order}: must be {np.dtype(dtype)} ({wanted}), contiguous"
        )


def require_tiles(expert: Array, start: Array, rows: Array, count: Array) -> None:
    """Check the arrays that say which sorted pairs each tile has."""
    require("tile_expert", expert, np.int32, None)
    require("tile_start", start, np.int32, *expert.shape)
    require("tile_rows", rows, np.int32, *expert.shape)
    require("count", count, np.int32, 1)


def matrix(layout: Layout) -> tuple[np.int32, np.int32, np.int32]:
    """Pass the sizes of a packed matrix."""
    return i32(layout.tiles), i32(layout.chunks), i32(layout.group_blocks)
