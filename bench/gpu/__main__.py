"""`make gpu`: everything that only a GPU can tell of the CUDA path, by one command, in some minutes.

Needs NumPy, ml_dtypes, safetensors and CuPy, and nothing installed from here. Each part runs in a process of
its own, since a kernel that fails takes its process's GPU with it. Tables go to standard error; the last line
of standard output is one JSON document.
"""

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.gpu import report
from bench.gpu.device import Device, Result, ceilings, first_line, open_device
from bench.gpu.kernels import kernels
from bench.gpu.timing import REAL, SMALL
from gptoss_lite.errors import DeviceError, GptOssError
from gptoss_lite.kernels.cuda.checks import all_checks

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("20b", "120b")
PARTS = ("checks", "golden", "ceilings", "kernels", "models", *MODELS)
_WORKERS = 8  # children that check at once: much of that is compiling
_FATAL = 3  # exit status of a child whose GPU can do no more
_UNUSABLE = 4


def main() -> int:
    """Run as the parent of all parts, or as the child that runs one."""
    options = _options()
    if options.part is not None:
        return _child(options)
    return Run(options).all()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.gpu", description="Check and time the CUDA path on a GPU."
    )
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="for everything [480]")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument(
        "--checks", default="", metavar="TEXT", help="run only checks with TEXT in their name"
    )
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}; the facts come always")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the document to FILE, too")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write gpu.json and gpu.txt to DIR")
    parser.add_argument(
        "--silence", type=float, default=90, metavar="SECONDS",
        help="after which a check that does not end has failed [90]",
    )  # fmt: skip
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set((options.only or PARTS[0]).split(",")) - set(PARTS):
        parser.error(f"no part {min(unknown)!r}: choose from {', '.join(PARTS)}")
    return options


# What a child does: results as JSON lines on standard output, as they come.


def _child(options: argparse.Namespace) -> int:
    try:
        device = open_device(options.device)
    except DeviceError as error:
        _say({"unusable": str(error)})
        return _UNUSABLE
    part: str = options.part
    if part.startswith("checks:"):
        return _check_all(device, _names(options.checks, part.removeprefix("checks:"))[options.first :])
    for result in _results(device, part, options.quick):
        _say(result)
    return 0


def _results(device: Device, part: str, quick: bool) -> Iterator[Result]:
    match part:
        case "facts":
            return iter([device.facts()])
        case "ceilings":
            return iter([ceilings(device)])
        case "kernels":
            return kernels(device, SMALL if quick else REAL)
    from bench.gpu import models  # wants ml_dtypes, which kernels do not

    return models.golden(device, quick) if part == "golden" else models.full_size(device, part)


def _say(result: Result) -> None:
    print(json.dumps(_finite(result)), flush=True)


def _finite(value: Any) -> Any:
    """Replace what JSON has no number for."""
    match value:
        case dict():
            return {key: _finite(one) for key, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _names(text: str, subject: str | None = None) -> list[str]:
    """List the checks with a text in their name, of one subject or of all."""
    return [name for name in all_checks() if text in name and subject in (None, name.split(":")[0])]


def _check_all(device: Device, names: Sequence[str]) -> int:
    checks = all_checks()
    for name in names:
        _say({"begins": name})
        start, error = time.perf_counter(), None
        try:
            checks[name](device.runtime)
            device.runtime.synchronize()
        except Exception as problem:
            error = first_line(problem)
        _say({"name": name, "ok": error is None, "error": error, "seconds": time.perf_counter() - start})
        if error is not None:
            try:
                device.runtime.synchronize()
            except GptOssError:  # nothing works any more after a fault on the device
                return _FATAL
    return 0


# What the parent does: one child after another, within the budget.


class Run:
    """One run of everything, and the document that comes of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._start = time.monotonic()
        self._text: list[str] = []
        self.document: Result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
            "device": options.device, "quick": options.quick, "budget": options.budget, "facts": {},
            "checks": {}, "golden": [], "ceilings": {}, "kernels": [], "models": {}, "skipped": {},
            "errors": {}, "seconds": {},
        }  # fmt: skip

    def all(self) -> int:
        """Run every part; return the exit status."""
        document, budget = self.document, self._options.budget
        facts = self._part("facts", 90)
        if not facts or "unusable" in facts[0]:
            reason = facts[0]["unusable"] if facts else document["errors"].get("facts", "it does not answer")
            print(f"no usable GPU: {reason}", file=sys.stderr)
            return 1
        document["facts"] = facts[0]
        shown = {"date": document["date"], "commit": document["commit"]} | facts[0]
        self._show("facts", report.facts(shown))

        if self._wanted("checks"):
            with self._timed("checks"):
                document["checks"] = self._checks(0.45 * budget)
            self._show("checks", report.checks(document["checks"]))

        document["golden"] = self._part("golden", 0.25 * budget)
        if document["golden"]:
            self._show("golden network", report.golden(document["golden"]))

        document["ceilings"] = next(iter(self._part("ceilings", 60)), {})
        if document["ceilings"]:
            self._show("ceilings", report.ceilings(document["ceilings"]))

        document["kernels"] = self._part("kernels", 0.3 * budget)
        report.add_shares(document["kernels"], document["ceilings"])
        if document["kernels"]:
            self._show("kernels", report.kernels(document["kernels"]))

        for name, least in (("tiny", 5),) if self._options.quick else (("20b", 30), ("120b", 60)):
            found = self._part(name, budget, least)
            report.add_accounts(name, found, document["kernels"], document["ceilings"])
            document["models"][name] = found
            if found and found[0]["what"] == "skipped":
                document["skipped"][name] = found[0]["reason"]
            if found:
                self._show(name, report.model(name, found))
        return self._finish()

    def _finish(self) -> int:
        document = self.document
        document["seconds"]["all"] = time.monotonic() - self._start
        document["ok"] = (
            all(one["ok"] for one in document["checks"].get("results", ()))
            and all(one["ok"] for one in document["golden"])
            and not document["errors"]
        )
        if document["skipped"]:
            self._show("skipped", "\n".join(f"{name}: {why}" for name, why in document["skipped"].items()))
        if document["errors"]:
            self._show("errors", "\n".join(f"{name}: {why}" for name, why in document["errors"].items()))
        line = json.dumps(_finite(document))
        if self._options.json:
            self._options.json.write_text(line + "\n", encoding="utf-8")
        if self._options.out:
            self._options.out.mkdir(parents=True, exist_ok=True)
            (self._options.out / "gpu.json").write_text(line + "\n", encoding="utf-8")
            (self._options.out / "gpu.txt").write_text("\n".join(self._text), encoding="utf-8")
        print(line, flush=True)
        return 0 if document["ok"] else 1

    @property
    def _left(self) -> float:
        return float(self._options.budget - (time.monotonic() - self._start))

    def _show(self, title: str, text: str) -> None:
        block = f"\n== {title} ==\n{text}\n"
        self._text.append(block)
        print(block, file=sys.stderr, flush=True)

    def _timed(self, name: str) -> "_Timed":
        return _Timed(self.document["seconds"], name)

    def _part(self, part: str, most: float, least: float = 5) -> list[Result]:
        """Run one part in a child, for some seconds at most; what it said before it failed counts."""
        if part != "facts" and not self._wanted(part):
            return []
        if self._left < least:
            self.document["skipped"][part] = f"{self._left:.0f} s were left, and it takes {least:.0f} or more"
            return []
        with self._timed(part):
            seconds = min(most, self._left)
            child = Child(self._options, part)
            results = list(child.results(seconds))
        if child.timed_out:
            self.document["skipped"][part] = f"cut off after {seconds:.0f} s, with {len(results)} results"
        elif child.status and child.status != _UNUSABLE:
            self.document["errors"][part] = child.failure()
        return results

    def _wanted(self, part: str) -> bool:
        only = PARTS if self._options.only is None else self._options.only.split(",")
        wanted = part in only or ("models" in only and part in (*MODELS, "tiny"))
        if not wanted:
            self.document["skipped"][part] = "not asked for"
        return wanted

    def _checks(self, seconds: float) -> Result:
        """Run all checks, the subjects side by side where there are processors enough to compile."""
        start = time.monotonic()
        until = start + min(seconds, self._left)
        names = _names(self._options.checks)
        subjects = list(dict.fromkeys(name.split(":")[0] for name in names))
        workers = min(_WORKERS, max(1, (os.cpu_count() or 1) // 2))
        with ThreadPoolExecutor(workers) as pool:
            lists = pool.map(lambda subject: self._subject(subject, until), subjects)
            results = [result for found in lists for result in found]
        known = {result["name"] for result in results}
        not_run = [name for name in names if name not in known]
        if not_run:
            self.document["skipped"]["checks"] = f"no time for {len(not_run)} of {len(names)}"
        return {
            "total": len(names), "passed": sum(result["ok"] for result in results),
            "failed": [result for result in results if not result["ok"]], "results": results,
            "not_run": not_run, "seconds": time.monotonic() - start,
        }  # fmt: skip

    def _subject(self, subject: str, until: float) -> list[Result]:
        """Run one subject's checks; a child that a check ends is followed by one for the rest."""
        total, done = len(_names(self._options.checks, subject)), list[Result]()
        while len(done) < total and time.monotonic() < until:
            child = Child(self._options, f"checks:{subject}", len(done), self._options.silence)
            begun = None
            for result in child.results(until - time.monotonic()):
                if "begins" in result:
                    begun = result["begins"]
                elif "name" in result:
                    done.append(result)
                    begun = None
            if child.timed_out and not child.silent:
                break
            if begun is not None:
                error = f"no end after {self._options.silence:g} s" if child.silent else child.failure()
                done.append({"name": begun, "ok": False, "error": error, "seconds": None})
            elif child.status not in (0, _FATAL):  # it does not even come to a check
                name = _names(self._options.checks, subject)[len(done)] if len(done) < total else subject
                done.append({"name": name, "ok": False, "error": child.failure(), "seconds": None})
        return done


class _Timed:
    """Notes how long a part took."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.monotonic() - self._start


class Child:
    """A process that runs one part, and what it says, line by line."""

    def __init__(
        self, options: argparse.Namespace, part: str, first: int = 0, silence: float = math.inf
    ) -> None:
        command = [sys.executable, "-m", "bench.gpu", "--part", part, "--first", str(first)]
        command += ["--device", options.device, "--checks", options.checks, *["--quick"] * options.quick]
        self._silence = silence
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - read once the child has ended
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.status = 0
        self.timed_out = self.silent = False

    def results(self, seconds: float) -> Iterator[Result]:
        """Yield what it says until it ends, says nothing for too long, or has had its time."""
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            try:
                line = lines.get(timeout=max(0.01, min(left, self._silence)))
            except queue.Empty:
                self.timed_out, self.silent = True, left > self._silence
                self._process.kill()
                break
            if line is None:
                break
            if line.startswith("{"):
                yield json.loads(line)
        self.status = self._process.wait()

    def _read(self, lines: "queue.Queue[str | None]") -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            lines.put(line)
        lines.put(None)

    def failure(self) -> str:
        """Say in one line how it ended: by the last line of its standard error."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        how = f"signal {-self.status}" if self.status < 0 else f"status {self.status}"
        return f"{lines[-1][:300] if lines else 'the process ended'} ({how})"


def commit() -> str:
    """Name the commit that is checked out, from git's own files; "unknown" where there are none."""
    git = ROOT / ".git"
    try:
        if git.is_file():  # a worktree
            git = (ROOT / git.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        shared = git / (git / "commondir").read_text().strip() if (git / "commondir").exists() else git
        for folder in (git, shared):
            if (folder / name).exists():
                return (folder / name).read_text().strip()
        for line in (shared / "packed-refs").read_text().splitlines():
            if line.endswith(f" {name}"):
                return line.split()[0]
    except OSError:
        pass
    return "unknown"


if __name__ == "__main__":
    sys.exit(main())
