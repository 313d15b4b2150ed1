"""What the tests share: opened golden networks and their reference logits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fixtures import LAYOUTS

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops


@pytest.fixture(scope="session", params=LAYOUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def layout(request: pytest.FixtureRequest) -> Path:
    """One on-disk layout of one golden network; its reference.npz lies in the folder above."""
    path: Path = request.param
    return path


@pytest.fixture(scope="session")
def golden() -> Callable[[Path], dict[str, np.ndarray]]:
    """Read the reference logits of a layout's network."""

    def read(path: Path) -> dict[str, np.ndarray]:
        with np.load(path.parent / "reference.npz") as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def tiny() -> GptOss:
    """The first golden network on the CPU, for tests that need any network at all."""
    return GptOss(open_checkpoint(LAYOUTS[0]), get_ops("cpu"))
