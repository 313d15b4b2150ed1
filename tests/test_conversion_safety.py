"""Destinations and interruptions: nothing of anybody's is lost, and what is done is gone on with."""

import errno
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gptoss_lite.checkpoint import open_checkpoint
from gptoss_lite.conversion import execute, journal, plan_conversion, plan_quantization, writer
from gptoss_lite.errors import CheckpointError
from gptoss_lite.quant.policy import PRESETS
from tests.test_conversion import (
    BF16,
    DEMO,
    Interrupted,
    assert_same,
    contents,
    convert,
    quantize,
    refusal,
)

# Destinations


def test_a_destination_that_exists_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for taken in ("mine", "file"):
        text = refusal(partial(convert, DEMO, tmp_path / taken, "hf"), CheckpointError)
        assert f"{taken} exists already" in text
    assert (tmp_path / "mine" / "letter.txt").read_text() == (tmp_path / "file").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    assert_same(DEMO, convert(DEMO, tmp_path / "empty", "hf"))


def test_a_directory_in_the_way_of_the_partial_result_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("dear")
    text = refusal(lambda: convert(DEMO, tmp_path / "out", "hf"), CheckpointError)
    assert "out.partial is in the way" in text
    assert (tmp_path / "out.partial" / "letter.txt").read_text() == "dear"


def test_source_and_destination_must_differ(tmp_path: Path) -> None:
    source = convert(DEMO, tmp_path / "s", "hf")
    link = tmp_path / "link"
    link.symlink_to(source)
    before = contents(source)
    for destination in (source, link, tmp_path / "s" / ".." / "s"):
        text = refusal(partial(convert, source, destination, "hf"), CheckpointError)
        assert "is the source itself" in text
    assert contents(source) == before


def test_a_destination_must_fit_the_layout_and_lie_somewhere(tmp_path: Path) -> None:
    assert "makes a directory" in refusal(lambda: convert(DEMO, tmp_path / "x.gguf", "hf"), CheckpointError)
    text = refusal(lambda: convert(DEMO, tmp_path / "no" / "x", "hf"), CheckpointError)
    assert "no is not a directory" in text


def test_too_small_a_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    text = refusal(lambda: convert(DEMO, tmp_path / "out", "hf"), CheckpointError)
    assert "needs 6.8 MiB of disk, and 1.0 MiB are free" in text
    assert list(tmp_path.iterdir()) == []


def test_a_gguf_file_does_not_take_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").mkdir()
    text = refusal(lambda: convert(DEMO, tmp_path / "x.gguf", "gguf"), CheckpointError)
    assert "x.gguf exists already" in text
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_paths_may_be_relative_and_strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "an \u00e4 b").mkdir()
    for destination in ("x/", "./y", "an \u00e4 b/z"):
        assert_same(DEMO, convert(DEMO, Path(destination), "hf"))
    for taken in (".", "/"):
        assert "exists already" in refusal(partial(convert, DEMO, Path(taken), "hf"), CheckpointError)


# Interruptions


@pytest.mark.parametrize("target", ["hf", "gguf", "packed-cuda"])
def test_a_full_disk_leaves_what_is_done_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    whole = convert(DEMO, tmp_path / "whole", target)
    with monkeypatch.context() as patch:
        Interrupted(patch, 60, OSError(errno.ENOSPC, "No space left on device"))
        text = refusal(lambda: convert(DEMO, tmp_path / "out", target), CheckpointError)
    assert "the disk is full" in text
    assert "out.partial" in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "out.partial")
    written, original = 0, writer._write_at

    def counted(file: Any, data: memoryview, at: int) -> None:
        nonlocal written
        written += len(data)
        original(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_at", counted)
        convert(DEMO, tmp_path / "out", target)
    assert written < 0.9 * sum(map(len, contents(whole).values()))
    assert contents(tmp_path / "out") == contents(whole)
    assert not (tmp_path / "out.partial").exists()


def test_ctrl_c_leaves_what_is_done_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Interrupted(patch, 40, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(DEMO, tmp_path / "out", "hf")
    assert (tmp_path / "out.partial" / journal.NAME).read_text().count("\n") > 5
    assert_same(DEMO, convert(DEMO, tmp_path / "out", "hf"))


def test_a_finished_tensor_that_was_damaged_since_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_errors = {
        w.name.name: w.errors for w in quantize(BF16, tmp_path / "whole", PRESETS["small"]).weights
    }
    with monkeypatch.context() as patch:
        Interrupted(patch, 80, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(CheckpointError):
            quantize(BF16, tmp_path / "out", PRESETS["small"])
    records = (tmp_path / "out.partial" / journal.NAME).read_text().splitlines()[1:]
    finished = next(iter(json.loads(records[-1])["checksums"]))
    starts = plan_quantization(open_checkpoint(BF16), tmp_path / "out", PRESETS["small"]).files[0].starts
    with (tmp_path / "out.partial" / "model.safetensors").open("r+b") as file:
        file.seek(starts[finished])
        byte = file.read(1)
        file.seek(starts[finished])
        file.write(bytes([byte[0] ^ 1]))
    plan = quantize(BF16, tmp_path / "out", PRESETS["small"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {w.name.name: w.errors for w in plan.weights} == plan_errors


def test_the_rest_of_another_conversion_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Interrupted(patch, 40, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(CheckpointError):
            quantize(BF16, tmp_path / "out", PRESETS["small"])
    before = contents(tmp_path / "out.partial")
    text = refusal(lambda: quantize(BF16, tmp_path / "out", PRESETS["experts"]), CheckpointError)
    assert "is left from a conversion of other things or in another way" in text
    assert contents(tmp_path / "out.partial") == before
    quantize(BF16, tmp_path / "out", PRESETS["small"])


def test_too_small_a_disk_at_the_second_try_costs_nothing_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Interrupted(patch, 60, OSError(errno.ENOSPC, "No space left on device"))
        refusal(lambda: convert(DEMO, tmp_path / "out", "hf"), CheckpointError)
    before = contents(tmp_path / "out.partial")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert "of disk, and" in refusal(lambda: convert(DEMO, tmp_path / "out", "hf"), CheckpointError)
    assert contents(tmp_path / "out.partial") == before
    with monkeypatch.context() as patch:  # what is there already needs no room
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=6 << 20))
        assert_same(DEMO, convert(DEMO, tmp_path / "out", "hf"))


def test_a_source_that_has_changed_since_is_not_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = convert(DEMO, tmp_path / "s", "hf")
    with monkeypatch.context() as patch:
        Interrupted(patch, 40, OSError(errno.ENOSPC, "No space left on device"))
        refusal(lambda: convert(source, tmp_path / "out", "hf"), CheckpointError)
    (source / "model.safetensors").touch()
    assert "in another way" in refusal(lambda: convert(source, tmp_path / "out", "hf"), CheckpointError)


def test_one_destination_is_written_by_one_process(tmp_path: Path) -> None:
    plan = plan_conversion(open_checkpoint(DEMO), tmp_path / "out", "hf")
    held = journal.Journal.open(tmp_path / "out.partial", plan.digest)
    assert "is being written by another process" in refusal(lambda: execute(plan, workers=1), CheckpointError)
    held.close()
    execute(plan, workers=1)


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_a_stop_between_the_move_and_the_end_is_made_good(tmp_path: Path, target: str) -> None:
    plan = plan_conversion(
        open_checkpoint(DEMO), tmp_path / ("out.gguf" if target == "gguf" else "out"), target
    )
    assert execute(plan, workers=1)
    directory = tmp_path if plan.is_single_file else plan.destination
    before = contents(directory)
    leftover = tmp_path / "out.gguf.partial" if plan.is_single_file else plan.destination
    leftover.mkdir(exist_ok=True)
    (leftover / journal.NAME).write_text(json.dumps({"digest": plan.digest}) + "\n")
    assert not execute(plan, workers=1)
    assert contents(directory) == before


def test_a_result_that_is_out_of_date_or_of_something_else_is_not_taken_for_done(tmp_path: Path) -> None:
    source = convert(BF16, tmp_path / "s", "hf")
    quantize(source, tmp_path / "out", PRESETS["small"])
    again = plan_quantization(open_checkpoint(source), tmp_path / "out", PRESETS["small"])
    assert not execute(again, workers=1)
    other = plan_quantization(open_checkpoint(source), tmp_path / "out", PRESETS["balanced"])
    assert "exists already" in refusal(lambda: execute(other, workers=1), CheckpointError)
    (source / "model.safetensors").touch()
    assert "exists already" in refusal(lambda: execute(again, workers=1), CheckpointError)
