"""The record of a conversion under way, from which it goes on after a kill: finished jobs, and checksums."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from gptoss_lite.errors import CheckpointError

NAME = ".gptoss-lite-journal"


@dataclass(slots=True)
class Journal:
    """Lines of JSON: first what is being made, as a digest of everything that decides it; then finished jobs.

    records: of each job that is done, by its name.
    """

    path: Path
    digest: str
    records: dict[str, Any] = field(default_factory=dict)
    _file: Any = None

    @classmethod
    def open(cls, directory: Path, digest: str) -> Self:
        """Open the journal in a directory of a conversion, or begin one in a directory that is empty.

        Raises CheckpointError where the directory holds anything else, another conversion's journal, or one
        that another process is writing.
        """
        journal = cls(directory / NAME, digest)
        if not journal.path.exists() and directory.exists() and any(directory.iterdir()):
            raise CheckpointError(f"{directory} is in the way and no conversion of ours: move it elsewhere")
        directory.mkdir(exist_ok=True)
        journal._file = journal.path.open("a+b")
        try:
            _lock(journal._file)
            journal._read()
        except BaseException:
            journal._file.close()
            raise
        return journal

    def _read(self) -> None:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]  # a line that was cut short never ended
        end = sum(len(line) + 1 for line in lines)
        self._file.truncate(end)
        if not lines:
            self._append({"digest": self.digest})
            return
        try:
            head, *records = map(json.loads, lines)
            found = head["digest"]
            self.records = {
                record["job"]: {key: record[key] for key in ("checksums", "errors")} for record in records
            }
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(
                f"{self.path} is damaged: remove {self.path.parent}, and begin anew"
            ) from None
        if found != self.digest:
            raise CheckpointError(
                f"{self.path.parent} is left from a conversion of other things or in another way:"
                " repeat that one to finish it, or remove the directory"
            )

    def add(self, job: str, checksums: dict[str, str], errors: list[dict[str, Any]]) -> None:
        """Note that a job is done: the checksums of its tensors, and what its weights lost."""
        self.records[job] = {"checksums": checksums, "errors": errors}
        self._append({"job": job, **self.records[job]})

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Let go of it; the record stays."""
        self._file.close()


def matches(directory: Path, digest: str) -> bool:
    """Tell whether a directory holds the journal of just this conversion."""
    try:
        with (directory / NAME).open("rb") as file:
            return bool(json.loads(file.readline())["digest"] == digest)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lock(file: IO[bytes]) -> None:
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            where = Path(file.name).parent
            raise CheckpointError(f"{where} is being written by another process: wait for it") from None
