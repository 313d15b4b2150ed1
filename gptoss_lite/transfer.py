"""Files of one commit of a hub repository, brought into huggingface_hub's cache, each from where it stopped.

Weights go by plain HTTP, for huggingface_hub itself begins a file anew where a run was broken off, and these
have gigabytes each.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from gptoss_lite.errors import CheckpointError
from gptoss_lite.model import Progress
from gptoss_lite.sizes import format_gib

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling
    from huggingface_hub.utils.tqdm import tqdm

T = TypeVar("T")

_STREAMS = 4  # files under way at a time: one connection alone seldom fills a fast line


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of the hub is asked for: a repository at a revision, or one GGUF file of it."""

    repo: str
    file: str | None
    revision: str

    @property
    def storage(self) -> Path:
        """The repository's folder in the cache, whose layout huggingface_hub documents."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"

    @property
    def reference(self) -> Path:
        """The file that holds the commit which the revision was when it was downloaded."""
        return self.storage / "refs" / self.revision


class Transfer:
    """Downloads files of one commit into the cache; weights several at a time, each from where it stopped."""

    def __init__(
        self, wanted: Wanted, commit: str, files: "Mapping[str, RepoSibling]", progress: Progress | None
    ) -> None:
        self._wanted, self._commit, self._files, self._progress = wanted, commit, files, progress
        self._blobs = wanted.storage / "blobs"
        self._done = self._total = 0  # bytes of weights
        self._lock = Lock()
        self._stopped = False
        self._bar = self._bar_class()

    def file(self, name: str) -> Path:
        """Download one file, unless the cache has it; return where it lies."""
        from huggingface_hub import hf_hub_download

        lfs = self._files[name].lfs
        if lfs is not None and not self._is_there(name):
            self._fill(name, lfs.sha256, lfs.size)
        # Links the blob that is there now; downloads small files, and what is too big for plain HTTP.
        path = Path(hf_hub_download(self._wanted.repo, name, revision=self._commit, tqdm_class=self._bar))
        if lfs is not None and not path.is_symlink():  # no links here, so the blob is a second copy
            (self._blobs / lfs.sha256).unlink(missing_ok=True)
        return path

    def weights(self, names: list[str]) -> Path:
        """Download these files, telling how far they are; return where the first of them lies."""
        sizes = {name: self._files[name].size or 0 for name in names}
        self._done, self._total = 0, sum(sizes.values())
        self._advance(sum(sizes[name] for name in names if self._is_there(name)))
        self._check_space(self._total - self._done - sum(map(self._begun, names)))
        pending = iter(names)  # whichever worker asks, each name is given out once

        def work() -> None:
            for name in pending:
                self.file(name)

        try:
            for worker in as_completed([start(work) for _ in range(_STREAMS)]):
                worker.result()
        finally:
            self._stopped = True  # after an error or Ctrl-C, at their next chunk
        return self.file(names[0])

    def _fill(self, name: str, sha256: str, size: int) -> None:
        """Download a file to where hf_hub_download looks for it, going on from what an earlier run left."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

        if not 0 < size <= MAX_HTTP_DOWNLOAD_SIZE:
            return
        blob, partial = self._blobs / sha256, self._partial(sha256)
        storage = self._wanted.storage
        lock = storage.parent / ".locks" / storage.name / f"{sha256}.lock"  # huggingface_hub's own
        for path in blob, lock:
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():  # another process was faster
                self._advance(size)
                return
            if self._begun(name) > size:
                partial.unlink()
            url = hf_hub_url(self._wanted.repo, name, revision=self._commit)
            headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
            while (begun := self._begun(name)) < size:
                try:
                    with partial.open("ab") as out:
                        http_get(
                            url,
                            out,
                            resume_size=begun,
                            headers=headers,
                            expected_size=size,
                            tqdm_class=self._bar,
                        )
                except Exception:
                    come = self._begun(name)
                    if come <= begun or self._stopped:
                        raise
                    with self._lock:
                        self._done -= come  # the next bar counts it again
            with partial.open("rb") as written:
                intact = hashlib.file_digest(written, "sha256").hexdigest() == sha256
            if not intact:
                partial.unlink()
                raise CheckpointError(
                    f"{self._wanted.repo}/{name} arrived damaged, by its checksum: run it again"
                )
            partial.replace(blob)

    def _is_there(self, name: str) -> bool:
        lfs = self._files[name].lfs
        blob = lfs is not None and (self._blobs / lfs.sha256).exists()
        return blob or (self._wanted.storage / "snapshots" / self._commit / name).exists()

    def _partial(self, sha256: str) -> Path:
        return self._blobs / f"{sha256}.incomplete"

    def _begun(self, name: str) -> int:
        """The bytes that an earlier run left of a file."""
        lfs = self._files[name].lfs
        partial = self._partial(lfs.sha256) if lfs is not None else None
        return partial.stat().st_size if partial is not None and partial.exists() else 0

    def _check_space(self, needed: int) -> None:
        self._blobs.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._blobs).free
        if needed > free:
            raise CheckpointError(
                f"{self._wanted.repo} takes {format_gib(needed)} more, and {self._blobs} has "
                f"{format_gib(free)} free: make room, or set HF_HOME to a folder on another disk"
            )

    def _advance(self, nbytes: float) -> None:
        with self._lock:
            if self._stopped:
                raise InterruptedError("the download was stopped")
            self._done += int(nbytes)
            if self._progress is not None and self._total:
                self._progress(self._done, self._total)

    def _bar_class(self) -> "type[tqdm]":
        """Make what huggingface_hub reports to; draws, as its own does, where nobody else is told."""
        from huggingface_hub.utils.tqdm import tqdm

        advance, told = self._advance, self._progress is not None

        class Bar(tqdm):
            def __init__(self, *args: Any, **options: Any) -> None:
                options |= {"disable": True} if told else {}
                super().__init__(*args, **options)  # type: ignore[no-untyped-call]
                advance(options.get("initial") or 0)

            def update(self, n: float | None = 1) -> bool | None:
                advance(n or 0)
                drawn: bool | None = super().update(n)
                return drawn

        return Bar


def start(call: Callable[[], T]) -> "Future[T]":
    """Run a call in a thread that a program which ends does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
