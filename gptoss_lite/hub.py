"""Models by name: where the files of one lie, downloaded from the Hugging Face hub if they must be.

Weights go by plain HTTP into the cache of huggingface_hub, which itself begins a file anew where a run was
broken off, and these have gigabytes each.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from gptoss_lite.checkpoint.directory import INDEX
from gptoss_lite.checkpoint.gguf import ARCHITECTURE
from gptoss_lite.checkpoint.quantization import Quantization
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import CheckpointError
from gptoss_lite.quant.tensorfile import read_json
from gptoss_lite.sizes import format_gib

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling
    from huggingface_hub.utils.tqdm import tqdm

    from gptoss_lite.model import Progress

T = TypeVar("T")

DEMO = Path(__file__).parent / "demo"
OPENAI = {"20b": "openai/gpt-oss-20b", "120b": "openai/gpt-oss-120b"}

_NAME = re.compile(
    r"(?P<repo>20b|120b|\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>\w[\w./-]*))?",
    re.ASCII,
)
_CONFIG = "config.json"
_TEXTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    INDEX,
)
_STREAMS = 4  # files under way at a time: one connection alone seldom fills a fast line


@dataclass(frozen=True, slots=True)
class _Wanted:
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


def resolve(path: str | os.PathLike[str], progress: "Progress | None" = None) -> Path:
    """Return where a model lies on this machine, downloading it if it is only on the Hugging Face hub.

    path: a path, "demo" for the bundled model, "20b" or "120b" for OpenAI's own, `org/name` for a repository
    of the hub or `org/name/file.gguf` for one file of it, each perhaps with `@revision`. What exists as a
    path is that path, and what has none of these forms comes back as it is.
    progress: called with the bytes of weights that are there and the bytes in all; without it huggingface_hub
    draws its own bars on a terminal.

    Only what a checkpoint is read from is downloaded, into the cache of huggingface_hub (HF_HOME); what was
    broken off goes on where it stopped; what is all there needs no network. Raises CheckpointError where the
    model cannot be had, or by its config.json cannot be run, which is found out before any weights.
    """
    name = os.fspath(path)
    if not name:
        raise CheckpointError("the name of the model is empty: give a directory, org/name, 20b or 120b")
    if path == "demo":
        return DEMO
    match = _NAME.fullmatch(name)
    if match is None or os.path.exists(name):
        return Path(path)
    wanted = _Wanted(OPENAI.get(match["repo"], match["repo"]), match["file"], match["revision"] or "main")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"{name} does not exist, and downloading it takes huggingface_hub: pip install 'gptoss-lite[hub]'"
        ) from None
    return _download(wanted, progress)


def _download(wanted: _Wanted, progress: "Progress | None") -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT as patience

    def ask() -> Any:
        return HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)

    # huggingface_hub lets through the errors of its HTTP client, and which that is depends on the release.
    try:
        # A socket's own timeout bounds neither the look-up of a name nor the addresses tried one by one.
        info = _start(ask).result(patience)
    except Exception as error:
        cached = _cached(wanted)
        if cached is None:
            raise _refusal(error, wanted) from error
        return cached
    files = {file.rfilename: file for file in info.siblings or ()}
    transfer = _Transfer(wanted, info.sha, files, progress)
    chosen = _choose(wanted, files)
    try:
        if chosen.endswith(".gguf"):
            _check_architecture(wanted, info.gguf or {})
            path = transfer.weights([chosen])
        else:
            path = _download_directory(wanted, transfer, chosen, files).parent
    except CheckpointError:
        raise
    except Exception as error:
        raise _refusal(error, wanted, under_way=True) from error
    if info.sha != wanted.revision:  # only now, so that offline it never leads to half a checkpoint
        with suppress(OSError):  # the cache may be another's, who has filled it
            wanted.reference.parent.mkdir(parents=True, exist_ok=True)
            wanted.reference.write_text(info.sha)
    return path


def _download_directory(wanted: _Wanted, transfer: "_Transfer", folder: str, files: Collection[str]) -> Path:
    """Download a folder, first what tells whether the model can be run; return one of its files."""
    beside = _inside(folder, files)
    if _CONFIG not in beside:
        raise CheckpointError(f"{wanted.repo} has no {_CONFIG}: that is no checkpoint of gpt-oss")
    config = transfer.file(folder + _CONFIG)
    settings, source = read_json(config), f"{wanted.repo}/{folder}{_CONFIG}"
    ModelConfig.from_dict(settings, source)
    Quantization.from_config(settings, source)
    for name in _TEXTS:
        if name in beside:
            transfer.file(folder + name)
    weights = _weights(config.parent, beside)
    if missing := [name for name in weights if name not in beside]:
        raise CheckpointError(f"{wanted.repo}/{folder}{INDEX} names {missing[0]}, which is not there")
    return transfer.weights([folder + name for name in weights])


def _cached(wanted: _Wanted) -> Path | None:
    """Return where the model lies in the cache, None where any of it is missing."""
    commit = wanted.reference.read_text() if wanted.reference.is_file() else wanted.revision
    snapshot = wanted.storage / "snapshots" / commit
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    try:
        chosen = _choose(wanted, names)
        beside = _inside(chosen, names)
        complete = chosen in names or beside.issuperset([_CONFIG, *_weights(snapshot / chosen, beside)])
    except CheckpointError:
        return None
    return snapshot / chosen if complete else None


def _choose(wanted: _Wanted, names: Collection[str]) -> str:
    """Return which part of a repository is the model: a GGUF file, "original/", or "" for the top folder."""
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    whole = [name for name in ggufs if not re.search(r"-\d{5}-of-\d{5}\.gguf$", name)]
    if wanted.file is None:
        for folder in ("", "original/"):
            if any(name.endswith(".safetensors") for name in _inside(folder, names)):
                return folder
        if len(whole) > 1:
            shown = ", ".join(whole)
            raise CheckpointError(
                f"{wanted.repo} holds several GGUF files, {shown}: name one, as in {wanted.repo}/{whole[0]}"
            )
    elif wanted.file not in ggufs:
        raise CheckpointError(
            f"{wanted.repo} has no {wanted.file}: it has {', '.join(ggufs) or 'no GGUF file'}"
        )
    file = wanted.file or next(iter(whole or ggufs), None)
    if file is None:
        raise CheckpointError(f"{wanted.repo} holds no model: neither *.safetensors nor a GGUF file")
    if file not in whole:
        raise CheckpointError(f"{wanted.repo}/{file} is one part of several: only whole GGUF files are read")
    return file


def _inside(folder: str, names: Iterable[str]) -> set[str]:
    """The names of the files directly in a folder, "" or one that ends in a slash, without it."""
    inside = (name.removeprefix(folder) for name in names if name.startswith(folder))
    return {name for name in inside if "/" not in name}


def _weights(directory: Path, beside: Collection[str]) -> list[str]:
    """List the files that open_checkpoint reads of a directory: those of its index, or else all."""
    if INDEX in beside:
        weight_map = read_json(directory / INDEX).get("weight_map")
        shards = weight_map.values() if isinstance(weight_map, Mapping) else ()
        return sorted({shard for shard in shards if isinstance(shard, str)})
    if "model.safetensors" in beside:
        return ["model.safetensors"]
    return sorted(name for name in beside if name.endswith(".safetensors"))


def _check_architecture(wanted: _Wanted, gguf: Mapping[str, Any]) -> None:
    """Refuse a GGUF file of another model; the hub tells the architecture of those that it could read."""
    architecture = gguf.get("architecture", ARCHITECTURE)
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{wanted.repo}: the architecture is {architecture!r}: must be {ARCHITECTURE!r}"
        )


class _Transfer:
    """Downloads files of one commit into the cache; weights several at a time, each from where it stopped."""

    def __init__(
        self, wanted: _Wanted, commit: str, files: "Mapping[str, RepoSibling]", progress: "Progress | None"
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
            for worker in as_completed([_start(work) for _ in range(_STREAMS)]):
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


def _refusal(error: Exception, wanted: _Wanted, *, under_way: bool = False) -> CheckpointError:
    """Say in a line what the hub, or the way to it, refused and what would do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    repo, address = wanted.repo, f"{constants.ENDPOINT}/{wanted.repo}"
    what = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{repo} has no revision {wanted.revision!r}: see {address}/commits")
    gated = isinstance(error, errors.GatedRepoError)  # which is a RepositoryNotFoundError too
    unknown = isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError)
    if status == 404 or (unknown and not gated):
        return CheckpointError(
            f"{repo} does not exist, neither as a path here nor on the hub, or it is private there: "
            "correct the name, or set HF_TOKEN to a token that may read it"
        )
    if status in (401, 403):
        return CheckpointError(
            f"{repo} is gated, and the hub refuses its files: ask for access at {address}, "
            "then set HF_TOKEN or run `hf auth login`"
        )
    if under_way:
        return CheckpointError(
            f"{repo}: the download broke off ({what}): run it again, and it goes on from there"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        what = "HF_HUB_OFFLINE is set"
    return CheckpointError(
        f"{repo} is not in the cache, and the hub cannot be reached ({what}): "
        "go online, or give a directory that holds the model"
    )


def _start(call: Callable[[], T]) -> "Future[T]":
    """Run a call in a thread that a program which ends does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future
