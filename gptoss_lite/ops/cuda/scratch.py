"""Device memory that steps work in: by name, kept from step to step, since recordings know where it lies."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gptoss_lite.kernels.cuda.runtime import Array, Runtime


class Scratch:
    """Named arrays that keep their place until a larger one of the name is asked for.

    step_tokens: how long steps are at most, as a rule. moved: called whenever an array gets a new place, for
    whoever remembers the old one.
    """

    def __init__(self, runtime: Runtime, step_tokens: int, moved: Callable[[], None]) -> None:
        self._runtime = runtime
        self._step_tokens = step_tokens
        self._moved = moved
        self._arrays: dict[str, Array] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Give an array of undefined contents: those of the last use, or none."""
        count = math.prod(shape)
        if not self._has(name, count):
            self._keep(name, self._runtime.empty((max(count, 1),), dtype))
        return self._arrays[name][:count].reshape(shape)

    def rows(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike, per_token: int = 1) -> Array:
        """Give an array of shape[0] rows, so many per token, with room for a step of any length."""
        most = max(shape[0], self._step_tokens * per_token)
        return self.array(name, (most, *shape[1:]), dtype)[: shape[0]]

    def counters(self, name: str, count: int) -> Array:
        """Give uint32 counters that kernels find at zero and leave at zero."""
        return self.filled(name, np.zeros(count, np.uint32))

    def filled(self, name: str, values: npt.NDArray[np.generic]) -> Array:
        """Give an array that held these values when it was new."""
        if not self._has(name, values.size):
            array = self._runtime.empty(values.shape, values.dtype)
            self._runtime.upload(values, array)
            self._keep(name, array.reshape(-1))
        return self.array(name, values.shape, values.dtype)

    def clear(self) -> None:
        """Forget every array and what it held."""
        self._arrays.clear()
        self._moved()

    def _keep(self, name: str, array: Array) -> None:
        self._arrays[name] = array
        self._moved()

    def _has(self, name: str, count: int) -> bool:
        return name in self._arrays and len(self._arrays[name]) >= count
