"""What quantising cost, tensor by tensor: squared errors and bytes, as data."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor before and after.

    name: canonical; layer: its number, None outside the layers; group: "embedding", "attention", "experts",
    "lm_head" or "norms and routers". before, after: formats as people read them, "BF16" or "mxfp4".
    squared: sum of squared values of the source; squared_error: of source less result; largest_error: the
    largest magnitude of that. All zero errors where the tensor was kept.
    """

    name: str
    layer: int | None
    group: str
    before: str
    after: str
    bytes_before: int
    bytes_after: int
    squared: float = 0.0
    squared_error: float = 0.0
    largest_error: float = 0.0

    @property
    def relative_error(self) -> float:
        """||source - result|| / ||source||."""
        return math.sqrt(self.squared_error / self.squared) if self.squared else 0.0
