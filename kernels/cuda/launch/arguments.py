"""What every launch function checks its arrays with."""

from typing import Any

import numpy as np
import numpy.typing as npt


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
