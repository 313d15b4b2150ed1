"""Steps and the tasks of them: each is done once, by any number of threads, and after all those before."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import cfunc, types
from numpy.typing import NDArray

from gptoss_lite.batch import Batch
from gptoss_lite.engine import Engine, Request
from gptoss_lite.kernels.cpu import (
    activations,
    attention,
    elementwise,
    experts,
    isa,
    linear,
    rope,
    router,
)
from gptoss_lite.kernels.cpu.program import Rooms, Steps
from gptoss_lite.kernels.cpu.steps import LANES
from gptoss_lite.kernels.cpu.workers import TASK, Operands, array, count
from gptoss_lite.model import GptOss
from gptoss_lite.sampling import SamplingParams

Numbers = NDArray[np.int64]

OPERANDS = Operands(
    array(types.int64, 1),  # counts: of each task, how often it was done
    array(types.int64, 2),  # earlier: sums of an earlier step's tasks
    array(types.int64, 1),  # sums: of all counts so far, as each task finds them
    array(types.int64, 1),  # tasks: of the next step
    types.float64,  # half
    types.boolean,  # is_whole
)
read = OPERANDS.read


@pytest.fixture(scope="module")
def step() -> Any:
    @cfunc(TASK)
    def work(place, task, worker):  # type: ignore[no-untyped-def]
        counts, earlier, sums, tasks, half, is_whole = read("test", place)
        if task == len(counts) - 1:  # the others are long done
            for _ in range(20_000):
                count(tasks, 0, 0)
        count(counts, task, 1)
        sums[task] = earlier.sum()
        if task == len(counts) - 1:
            tasks[0] = np.int64(2 * half) * len(counts) if is_whole else -1

    return work


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_task_is_done_once_and_after_all_of_the_steps_before(step: Any, threads: int) -> None:
    steps, sizes = Steps(threads), [1, 7, 64, 3, 1000, 2]
    counts = [np.zeros(size, np.int64) for size in sizes]
    sums = [np.zeros(size, np.int64) for size in sizes]
    earlier = np.zeros((1, 1), np.int64)
    for i, size in enumerate(sizes):
        steps.add(step, size, OPERANDS, counts[i], earlier, sums[i], np.zeros(1, np.int64), 0.5, True)
        earlier = counts[i][None]
    steps.run()
    for i, size in enumerate(sizes):
        np.testing.assert_array_equal(counts[i], np.ones(size))
        np.testing.assert_array_equal(sums[i], np.full(size, sizes[i - 1] if i else 0))
    assert steps.runs == 1
    steps.run()  # nothing is left to be done
    assert steps.runs == 1 and counts[0][0] == 1
    assert steps.last is not None
    steps.last.run()
    assert all((done == 2).all() for done in counts)


@pytest.mark.parametrize(("half", "is_whole", "tasks"), [(0.5, True, 40), (1.0, True, 80), (0.5, False, 0)])
def test_a_step_may_say_how_many_tasks_a_later_one_has(
    step: Any, half: float, is_whole: bool, tasks: int
) -> None:
    steps, found, nothing = Steps(3), np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
    first, second = np.zeros(40, np.int64), np.zeros(100, np.int64)
    steps.add(step, 40, OPERANDS, first, nothing, np.zeros(40, np.int64), found, half, is_whole)
    rest = np.zeros(100, np.int64), np.zeros(1, np.int64), 0.0, False
    steps.add(step, found, OPERANDS, second, nothing, *rest)
    steps.run()
    np.testing.assert_array_equal(second, np.arange(100) < tasks)


def test_no_two_steps_have_their_number_of_tasks_in_one_place(step: Any) -> None:
    steps, place = Steps(2), np.zeros(1, np.int64)
    given = (
        np.zeros(1, np.int64),
        np.zeros((1, 1), np.int64),
        np.zeros(1, np.int64),
        np.zeros(1, np.int64),
        0.5,
        True,
    )
    steps.add(step, place, OPERANDS, *given)
    with pytest.raises(AssertionError, match="a place of its own"):
        steps.add(step, place, OPERANDS, *given)
    steps.run()
    steps.add(step, place, OPERANDS, *given)  # when all threads are through


def test_rooms_are_kept_until_they_are_too_small() -> None:
    rooms = Rooms()
    first = rooms.room("a", (3, 5), np.float32)
    assert first.ctypes.data % 64 == 0 and first.shape == (3, 5)
    assert np.shares_memory(first, rooms.room("a", (15,), np.int32))
    assert not np.shares_memory(first, rooms.room("b", (3, 5), np.float32))
    moves = rooms.moves
    assert not np.shares_memory(first, rooms.room("a", (16,), np.float32))
    assert rooms.moves == moves + 1


def generate(engine: Engine, prompt: list[int], tokens: int) -> list[int]:
    engine.submit(Request(prompt, SamplingParams(), 3, tokens))
    found = []
    while engine.has_work:
        found += [event.sampled.token for event in engine.step() if event.sampled is not None]
    return found


def test_a_pass_is_noted_once_for_its_shape(tiny: GptOss, monkeypatch: pytest.MonkeyPatch) -> None:
    passes, layers = [], type(tiny).network

    def network(model: GptOss, batch: Batch, cache: Any) -> Any:
        passes.append(len(batch.tokens))
        return layers(model, batch, cache)

    engine = Engine(tiny, max_sequences=2)
    want = generate(engine, list(range(1, 40)), 20)
    monkeypatch.setattr(type(tiny), "network", network)
    assert generate(Engine(tiny, max_sequences=2), list(range(1, 40)), 20) == want
    assert passes == [39, 1]


def test_steps_close_over_nothing_that_another_process_has_not() -> None:
    kind = isa.host()
    steps = [
        rope._make_rotate(), router._make_choose(), elementwise._make_swiglu(), elementwise._make_combine(),
        activations._make_normalise(), activations._make_quantise(), attention._make_plan(),
        attention._make_attend(kind.lanes == LANES, "float32"), experts._make_plan(),
        experts._make_quantise(), experts._make_gate_up(kind, "mxfp4", "mxfp4", "accurate"),
        experts._make_down(kind, "mxfp4", "accurate"), linear._make_dense(kind, "bf16"),
        linear._make_packed(kind, "mxfp4", "accurate"),
    ]  # fmt: skip
    for made in steps:
        closed = [cell.cell_contents for cell in made.__wrapped__.__closure__]
        assert all(isinstance(value, str | int | float) for value in closed), made
        assert any(isinstance(value, str) and isa.key() in value for value in closed), made


@pytest.mark.soak
def test_steps_are_compiled_once_for_all_processes(tmp_path: Path) -> None:
    program = (
        "import numpy as np; from gptoss_lite.kernels.cpu import isa;"
        "from gptoss_lite.kernels.cpu.program import Steps; from gptoss_lite.kernels.cpu.router import route;"
        "steps, h, added = Steps(1), np.zeros((1, 32), 'f4'), np.zeros(8, 'f4');"
        "route(steps, isa.host(), 'float32', h, np.zeros((8, 32), 'u4'), added, 2); steps.run()"
    )
    kept = []
    for _ in range(2):
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)
        kept.append(sorted(path.name for path in tmp_path.rglob("*.nbc")))
    assert len(kept[0]) == 3
    assert kept[1] == kept[0]
