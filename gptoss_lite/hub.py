"""Models by name: where the files of one lie, downloaded from the Hugging Face hub if they must be."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptoss_lite.checkpoint.directory import INDEX
from gptoss_lite.checkpoint.gguf import ARCHITECTURE
from gptoss_lite.checkpoint.quantization import Quantization
from gptoss_lite.config import ModelConfig
from gptoss_lite.errors import CheckpointError
from gptoss_lite.model import Progress
from gptoss_lite.quant.tensorfile import read_json
from gptoss_lite.transfer import Transfer, Wanted, start

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


def resolve(path: str | os.PathLike[str], progress: Progress | None = None) -> Path:
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
    wanted = Wanted(OPENAI.get(match["repo"], match["repo"]), match["file"], match["revision"] or "main")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise CheckpointError(
            f"{name} is no path, and to download it takes huggingface_hub: pip install 'gptoss-lite[hub]'"
        ) from None
    return _download(wanted, progress)


def _download(wanted: Wanted, progress: Progress | None) -> Path:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT as patience

    def ask() -> Any:
        return HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)

    # huggingface_hub lets through the errors of its HTTP client, and which that is depends on the release.
    try:
        # A socket's own timeout bounds neither the look-up of a name nor the addresses tried one by one.
        info = start(ask).result(patience)
    except Exception as error:
        cached = _cached(wanted)
        if cached is None:
            raise _refusal(error, wanted) from error
        return cached
    files = {file.rfilename: file for file in info.siblings or ()}
    transfer = Transfer(wanted, info.sha, files, progress)
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


def _download_directory(wanted: Wanted, transfer: Transfer, folder: str, files: Collection[str]) -> Path:
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


def _cached(wanted: Wanted) -> Path | None:
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


def _choose(wanted: Wanted, names: Collection[str]) -> str:
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


def _check_architecture(wanted: Wanted, gguf: Mapping[str, Any]) -> None:
    """Refuse a GGUF file of another model; the hub tells the architecture of those that it could read."""
    architecture = gguf.get("architecture", ARCHITECTURE)
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{wanted.repo}: the architecture is {architecture!r}: must be {ARCHITECTURE!r}"
        )


def _refusal(error: Exception, wanted: Wanted, *, under_way: bool = False) -> CheckpointError:
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
