"""Numba kernels; each gives the same bits whatever the number of threads."""

from typing import Any, TypeAlias

import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
