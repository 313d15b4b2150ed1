"""Launches of whole steps, recorded once for their shape and then replayed."""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from gptoss_lite.cache import KVCache
from gptoss_lite.kernels.cuda.runtime import Runtime
from gptoss_lite.ops.cuda.step import Shape


class Recordings:
    """What to replay for a step of a shape over a cache; it holds while the cache lives and nothing moves."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._of: WeakKeyDictionary[KVCache, dict[Shape, Any]] = WeakKeyDictionary()

    def launch(self, cache: KVCache, shape: Shape, work: Callable[[], None]) -> None:
        """Queue what `work` launches.

        The first step of a shape runs as it is, so that every kernel is loaded and every buffer there; the
        second is recorded. Steps with prefill, whose shapes seldom come twice, never are.
        """
        if shape.prefills or shape.is_prompt:
            work()
            return
        known = self._of.get(cache, {})
        if shape not in known:
            work()
            self._of.setdefault(cache, {})[shape] = None
            return
        if known[shape] is None:
            known[shape] = self._runtime.capture(work)
        self._runtime.replay(known[shape])

    def forget(self) -> None:
        """Drop all: memory that they launch on has another place now."""
        self._of.clear()
