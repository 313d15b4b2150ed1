"""Carries a plan out: workers fill files beside the destination, which appears once all of it is whole."""

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict
from io import IOBase, RawIOBase
from pathlib import Path
from threading import Event, Lock
from typing import TypeAlias

from gptoss_lite.conversion import journal as journals
from gptoss_lite.conversion.files import File, nbytes
from gptoss_lite.conversion.journal import Journal
from gptoss_lite.conversion.plan import Plan
from gptoss_lite.conversion.recode import Errors
from gptoss_lite.conversion.targets import Job
from gptoss_lite.errors import CheckpointError, FormatError
from gptoss_lite.quant import gguffile, tensorfile
from gptoss_lite.quant.checksum import Checksum
from gptoss_lite.quant.gptq import Costs
from gptoss_lite.quant.tensorfile import as_bytes
from gptoss_lite.sizes import format_bytes

Progress: TypeAlias = Callable[[int, int], None]  # bytes of tensors written, of how many

_CHUNK = 8 << 20  # bytes of a finished tensor that are checked at a time


class _NoRoom(CheckpointError):
    """Refuses a plan for which there is too little disk."""


class _Stopped(Exception):
    """Ends a worker's job when another has failed."""


def execute(plan: Plan, *, workers: int, progress: Progress | None = None) -> bool:
    """Write a planned checkpoint, or go on with one that was interrupted.

    Returns False where there was nothing to do: the destination is just what would be written, made since
    the source last changed. workers: how many jobs are done at a time, unless the plan wants them in order.

    The source is not touched. Everything is written into DESTINATION.partial; what an earlier run of the same
    plan has finished there is checked and kept. Raises CheckpointError where the destination is in use, where
    the disk is too small or full, and, as FormatError too, what reading a source raises: of one that cannot
    be converted nothing is left; in all other cases what is done stays for the next run.
    """
    partial = plan.destination.parent / f"{plan.destination.name}.partial"
    if _is_there(plan):
        _tidy(plan, partial)  # the last run may have been stopped at its very end
        return False
    _refuse_destination(plan)
    is_new = not partial.exists()
    journal = Journal.open(partial, plan.digest)
    try:
        _check_disk(plan, partial)
        _Writer(plan, partial, journal, progress).run(workers)
        if os.name != "posix":  # where what is open cannot be moved; elsewhere it stays locked
            journal.close()
        _move_into_place(plan, partial)
    except _NoRoom:
        if is_new:
            shutil.rmtree(partial)
        raise
    except (CheckpointError, FormatError):
        shutil.rmtree(partial)
        raise
    except OSError as error:
        raise CheckpointError(_explained(error, partial)) from error
    finally:
        journal.close()
    return True


class _Writer:
    """One run over a plan's jobs, by several workers."""

    def __init__(self, plan: Plan, partial: Path, journal: Journal, progress: Progress | None) -> None:
        self._plan, self._partial, self._journal, self._progress = plan, partial, journal, progress
        self._files = {job.name: file for file in plan.files for job in file.jobs}
        self._total = sum(_size(job, file) for file in plan.files for job in file.jobs)
        self._done, self._lock, self._stop = 0, Lock(), Event()

    def run(self, workers: int) -> None:
        """Do all jobs that are not done, then write headers and texts."""
        for file in self._plan.files:  # the place of its header stays zero until the end: it is not sound yet
            with (self._partial / file.name).open("ab") as opened:
                opened.truncate(file.size)
        with ThreadPoolExecutor(1 if self._plan.in_order else workers) as pool:
            self._do(pool, self._check_finished, self._plan.jobs)
            left = [job for job in self._plan.jobs if job.name not in self._journal.records]
            self._do(pool, self._write, left)
        for file in self._plan.files:
            self._finish(file)
        for name, text in self._plan.texts.items():
            with (self._partial / name).open("wb") as opened:
                opened.write(text)
                _sync_file(opened)

    def _do(self, pool: ThreadPoolExecutor, work: Callable[[Job], None], jobs: Sequence[Job]) -> None:
        """Have the workers do some jobs; an error ends them all, and the first one is raised."""
        futures = [pool.submit(work, job) for job in jobs]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:  # by Ctrl-C, too
            if not all(future.done() and future.exception() is None for future in futures):
                self._stop.set()
                for future in futures:
                    future.cancel()
        wait(futures)
        for future in futures:
            if not future.cancelled() and not isinstance(future.exception(), _Stopped | None):
                future.result()

    def _write(self, job: Job) -> None:
        """Check a job's weights and write its tensors, and note their checksums."""
        file = self._files[job.name]
        for weight in job.weights:
            weight.errors = Errors()
            weight.weight.verify()
        places = [file.starts[tensor.name] for tensor in job.tensors]
        checksums = [Checksum(tensor.name, tensor.dtype, tensor.shape) for tensor in job.tensors]
        with (self._partial / file.name).open("r+b", buffering=0) as opened:
            for piece in job.pieces():
                for index, array in enumerate(piece):
                    if self._stop.is_set():
                        raise _Stopped
                    data = as_bytes(array)
                    checksums[index].update(data)
                    _write_at(opened, data, places[index])
                    places[index] += len(data)
                self._advance(sum(array.nbytes for array in piece))
        ends = [file.starts[tensor.name] + nbytes(tensor, file.is_gguf) for tensor in job.tensors]
        assert places == ends, f"{job.name}: written to {places}, not to {ends}"
        with self._lock:
            self._journal.add(
                job.name,
                checksums={t.name: str(c) for t, c in zip(job.tensors, checksums, strict=True)},
                errors=[asdict(weight.errors) for weight in job.weights],
            )

    def _check_finished(self, job: Job) -> None:
        """Read again what an earlier run has written of a job, and forget it unless it is whole."""
        record = self._journal.records.get(job.name)
        if record is None:
            return
        file = self._files[job.name]
        with (self._partial / file.name).open("rb", buffering=0) as opened:
            for tensor in job.tensors:
                checksum = Checksum(tensor.name, tensor.dtype, tensor.shape)
                opened.seek(file.starts[tensor.name])
                left = nbytes(tensor, file.is_gguf)
                while left and (data := opened.read(min(_CHUNK, left))):
                    checksum.update(memoryview(data))
                    left -= len(data)
                if left or str(checksum) != record["checksums"].get(tensor.name):
                    with self._lock:
                        del self._journal.records[job.name]
                    return
        for weight, errors in zip(job.weights, record["errors"], strict=True):
            costs = errors["costs"] and Costs(**errors["costs"])
            weight.errors = Errors(**errors | {"costs": costs})
        self._advance(_size(job, file))

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)

    def _finish(self, file: File) -> None:
        """Write the header, now that the checksums are known, and wait until all is on disk."""
        checksums: dict[str, str] = {}
        for job in file.jobs:
            checksums |= self._journal.records[job.name]["checksums"]
        with (self._partial / file.name).open("r+b", buffering=0) as opened:
            _write_at(opened, memoryview(file.header({name: checksums[name] for name in file.starts})), 0)
            _sync_file(opened)


def _size(job: Job, file: File) -> int:
    return sum(nbytes(tensor, file.is_gguf) for tensor in job.tensors)


def _write_at(file: RawIOBase, data: memoryview, at: int) -> None:
    file.seek(at)
    while data:
        written = file.write(data)
        assert written is not None
        data = data[written:]


def _sync_file(file: IOBase) -> None:
    file.flush()
    os.fsync(file.fileno())


def _check_disk(plan: Plan, partial: Path) -> None:
    """Refuse to begin what there is no room for; what is there already needs none."""
    present = [path for file in plan.files if (path := partial / file.name).exists()]
    there = sum(getattr(path.stat(), "st_blocks", 0) * 512 for path in present)
    needed, free = plan.size - there, shutil.disk_usage(partial).free
    if needed > free:
        sizes = f"needs {format_bytes(needed)} of disk, and {format_bytes(free)} are free"
        raise _NoRoom(f"{plan.destination} {sizes}")


def _refuse_destination(plan: Plan) -> None:
    destination = plan.destination
    if not destination.parent.is_dir():
        raise CheckpointError(
            f"{destination.parent} is not a directory: make it, or give another destination"
        )
    is_directory = destination.is_dir() and not destination.is_symlink()
    may_be_there = is_directory and not plan.is_single_file and not any(destination.iterdir())
    if not may_be_there and (destination.exists() or destination.is_symlink()):
        raise CheckpointError(f"{destination} exists already: give another destination, or remove it")


def _is_there(plan: Plan) -> bool:
    """Tell whether the destination is what the plan would write, by all but the data, and not out of date."""
    directory = plan.destination.parent if plan.is_single_file else plan.destination
    paths = [directory / file.name for file in plan.files]
    if not all(
        path.is_file() and path.stat().st_size == f.size for path, f in zip(paths, plan.files, strict=True)
    ):
        return False
    if any(not (directory / n).is_file() or (directory / n).read_bytes() != t for n, t in plan.texts.items()):
        return False
    changed = max(max(source.stat().st_mtime_ns, source.stat().st_ctime_ns) for source in plan.sources)
    return all(
        path.stat().st_mtime_ns >= changed and _has_header(path, file)
        for path, file in zip(paths, plan.files, strict=True)
    )


def _has_header(path: Path, file: File) -> bool:
    """Tell whether a file begins as a finished one does, whatever its checksums are."""
    try:
        stored = gguffile.read_file(path).tensors if file.is_gguf else tensorfile.read_file(path)
    except CheckpointError:
        return False
    if stored.keys() != file.starts.keys():
        return False
    wanted = file.header({name: stored[name].checksum or "" for name in file.starts})
    with path.open("rb") as opened:
        return opened.read(len(wanted)) == wanted


def _move_into_place(plan: Plan, partial: Path) -> None:
    """Give the whole its name, in one step: before it there is nothing there, and after it everything."""
    if plan.is_single_file:
        (partial / plan.files[0].name).replace(plan.destination)
    else:
        _sync(partial)
        partial.replace(plan.destination)
    _sync(plan.destination.parent)
    _tidy(plan, partial)


def _tidy(plan: Plan, partial: Path) -> None:
    """Remove the journal of a conversion that has its result."""
    if not plan.is_single_file:
        (plan.destination / journals.NAME).unlink(missing_ok=True)
    elif journals.matches(partial, plan.digest):
        shutil.rmtree(partial)


def _sync(directory: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _explained(error: OSError, partial: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: free some space and repeat the command, which goes on from {partial}"
    return f"{error.filename or partial} cannot be written: {error.strerror}; repeat the command to go on"
