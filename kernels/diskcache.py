"""Compiled kernels kept on disk: made once, found again by a hash of all that went into them."""

import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path


def directory() -> Path:
    """Say where compiled kernels are kept: GPTOSS_LITE_CACHE, or the user's cache folder."""
    if named := os.environ.get("GPTOSS_LITE_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", tempfile.gettempdir())) / "gptoss-lite"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gptoss-lite"


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="gptoss-lite-", ignore_cleanup_errors=True)


def cached(parts: tuple[str, ...], suffix: str, make: Callable[[Path], None]) -> Path:
    """Return the file that `make(path)` wrote for the same `parts`, calling it only where there is none yet.

    Several processes may make the same file at once: each writes its own and the last one's name stays. A
    folder that cannot be written to is replaced by a temporary one, for the life of the process.
    """
    digest = blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()
    folder = directory()
    path = folder / f"{digest}{suffix}"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=suffix, dir=folder)
    except OSError:
        path = Path(_temporary().name) / path.name
        if path.exists():
            return path
        handle, name = tempfile.mkstemp(suffix=suffix, dir=path.parent)
    os.close(handle)
    try:
        make(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path
