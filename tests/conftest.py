"""What the tests share: the golden networks, under tests/data or where GPTOSS_LITE_FIXTURES says."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.errors import DeviceError
from gptoss_lite.kernels.emulator.runtime import compiler
from gptoss_lite.model import GptOss
from gptoss_lite.ops import get_ops

DATA = Path(__file__).parent / "data"
FIXTURES = Path(os.environ.get("GPTOSS_LITE_FIXTURES", DATA))
if not FIXTURES.is_dir():
    raise pytest.UsageError(f"GPTOSS_LITE_FIXTURES names {FIXTURES}, which is no directory")
LAYOUTS = sorted(path.parent for path in FIXTURES.glob("checkpoints/*/*/config.json"))


@pytest.fixture(scope="session")
def needs_compiler() -> None:
    """Skip where the emulator has nothing to compile with."""
    try:
        compiler()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session", params=LAYOUTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def layout(request: pytest.FixtureRequest) -> Path:
    """One on-disk layout of one golden network; its reference.npz lies in the folder above."""
    path: Path = request.param
    return path


@pytest.fixture(
    scope="session", params=sorted({path.parent for path in LAYOUTS}), ids=lambda path: str(path.name)
)
def network(request: pytest.FixtureRequest) -> list[Path]:
    """All layouts of one golden network."""
    return [path for path in LAYOUTS if path.parent == request.param]


@pytest.fixture(scope="session")
def golden() -> Callable[[Path], dict[str, np.ndarray]]:
    """Read the reference logits of a layout's network."""

    def read(path: Path) -> dict[str, np.ndarray]:
        with np.load(path.parent / "reference.npz") as file:
            return dict(file)

    return read


@pytest.fixture(scope="session")
def tiny_path() -> Path:
    """A small random checkpoint, for tests that need any network at all."""
    return DATA / "checkpoints" / "tiny" / "mxfp4"


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> GptOss:
    """That checkpoint on the CPU."""
    return GptOss(open_checkpoint(tiny_path), get_ops("cpu"))
