"""What `gptoss-lite bench` measures: loading, prefill, decode, memory; beside what the machine could do."""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from gptoss_lite import __version__
from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.config import ModelConfig
from gptoss_lite.footprint import Limits, Need, StepBytes, model_bytes, require_room, step_bytes
from gptoss_lite.machine import Machine, machine, peak_memory
from gptoss_lite.measure import MeasuredEngine, Repetition, Workload, repetition, warm_up
from gptoss_lite.memory import Plan
from gptoss_lite.model import GptOss, Progress
from gptoss_lite.ops import Ops, get_ops
from gptoss_lite.synthetic import SyntheticCheckpoint
from gptoss_lite.yardstick import HOST_BYTES, HostYardstick, open_yardstick, threads_of

SCHEMA = 1  # of the document, raised when a key changes its meaning or goes


@dataclass(frozen=True, slots=True)
class Device:
    """What computed: its name; of a CPU its threads and kind of instructions, of a GPU its architecture."""

    name: str
    threads: int | None = None
    isa: str | None = None
    arch: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Reading a checkpoint and packing it; seconds: without those that making random weights took.

    weight_bytes: as the backend holds them, mapped_bytes of them as a file has them.
    """

    seconds: float
    making_seconds: float
    checkpoint_bytes: int
    weight_bytes: int
    mapped_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory in bytes: what was planned and what was free, None where that is unknown.

    peak: the most that the process had at once without the yardstick's; pages of a mapped file count as far
    as they have been touched. cache_tokens: that keys and values had room for.
    """

    needed: Need
    free: int | None
    peak: int | None
    cache_tokens: int


@dataclass(frozen=True, slots=True)
class Readings:
    """How fast plain reading was, in bytes per second: before the repetitions, between and after them."""

    nbytes: int
    rates: tuple[float, ...]
    median: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the repetitions come to: medians, over all prompts and over all steps of decode.

    read_share: of the median reading's rate, that at which decode reads what it must.
    """

    prefill_tokens_per_s: float
    first_token_seconds: float
    step_seconds: float
    decode_tokens_per_s: float
    step_bytes: StepBytes
    bytes_per_token: float
    read_share: float


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured, and on what.

    rest: the same repetitions without any layer, where `layers` are only the first of `whole_layers`; then
    estimate has what all of them would come to, each costing as much as those measured on average.
    """

    version: str
    model: str
    is_synthetic: bool
    layers: int
    whole_layers: int
    config: ModelConfig
    workload: Workload
    device: Device
    options: dict[str, Any]
    machine: Machine
    load: Load
    memory: Memory
    readings: Readings
    warm_up_seconds: float
    repetitions: tuple[Repetition, ...]
    figures: Figures
    rest: tuple[Repetition, ...]
    estimate: Figures | None


def run(
    checkpoint: Checkpoint,
    workload: Workload,
    device: str = "auto",
    *,
    yardstick_bytes: int = HOST_BYTES,
    progress: Progress | None = None,
    measured: Progress | None = None,
    **options: Any,
) -> Report:
    """Load a checkpoint, read or synthetic, and measure a workload on it.

    device and options: see `get_ops`. yardstick_bytes: of main memory, to be read. progress: as GptOss has
    it; measured: told the repetitions done and those in all, first before any.
    Raises OutOfMemoryError, before anything is made, where main memory is too small; RequestError where the
    model's context is.
    """
    workload.check(checkpoint.config)
    ops = get_ops(device, **options)
    dense = options.get("dense")
    limits = Limits(workload.cache_tokens, workload.concurrency, yardstick_bytes, dense)
    needed, free = require_room(checkpoint, ops, limits)
    model, load = load_model(checkpoint, ops, limits, progress)
    tell = measured or (lambda done, total: None)
    tell(0, workload.repeat)
    peak = peak_memory()
    yardstick = open_yardstick(ops, yardstick_bytes)
    engine = MeasuredEngine(model, workload)
    warm_up_seconds = warm_up(engine, workload)
    repetitions, rates = [], [yardstick.rate()]
    for number in range(1, workload.repeat + 1):
        repetitions.append(repetition(engine, workload, number))
        rates.append(yardstick.rate())
        tell(number, workload.repeat)
    rate = median(rates)
    whole = checkpoint.whole if isinstance(checkpoint, SyntheticCheckpoint) else checkpoint.config
    rest: list[Repetition] = []
    if whole.num_hidden_layers > len(model.layers):
        rest = _rest(model, workload)
    last = peak_memory()
    if peak is not None and last is not None:
        peak = max(peak, last - (yardstick.nbytes if isinstance(yardstick, HostYardstick) else 0))
    return Report(
        version=__version__,
        model=str(checkpoint.path),
        is_synthetic=isinstance(checkpoint, SyntheticCheckpoint),
        layers=len(model.layers),
        whole_layers=whole.num_hidden_layers,
        config=checkpoint.config,
        workload=workload,
        device=_device(ops),
        options=dict(options),
        machine=machine(),
        load=load,
        memory=Memory(needed, free, peak, workload.cache_tokens),
        readings=Readings(yardstick.nbytes, tuple(rates), rate),
        warm_up_seconds=warm_up_seconds,
        repetitions=tuple(repetitions),
        figures=_figures(engine, repetitions, rate),
        rest=tuple(rest),
        estimate=_figures(engine, repetitions, rate, rest, whole) if rest else None,
    )


def to_json(report: Report) -> dict[str, Any]:
    """Make a report a document of plain values."""
    return {"schema": SCHEMA, **asdict(report)}


def load_model(
    checkpoint: Checkpoint, ops: Ops, limits: Limits, progress: Progress | None = None
) -> tuple[GptOss, Load]:
    """Load a checkpoint, and time it; raises OutOfMemoryError where a GPU leaves main memory too much."""

    def planned(plan: Plan) -> None:
        require_room(checkpoint, ops, limits, plan.host_bytes)

    start = time.perf_counter()
    model = GptOss(checkpoint, ops, progress, cache_tokens=limits.cache_tokens, planned=planned)
    seconds = time.perf_counter() - start
    making = checkpoint.clock.seconds if isinstance(checkpoint, SyntheticCheckpoint) else 0.0
    return model, Load(max(0.0, seconds - making), making, checkpoint.nbytes, *model_bytes(model))


def _device(ops: Ops) -> Device:
    if ops.name == "cpu":
        from gptoss_lite.kernels.cpu import isa

        return Device(ops.name, threads=threads_of(ops), isa=isa.host().name)
    runtime = getattr(ops, "_runtime", None)
    return Device(ops.name, arch=None if runtime is None else runtime.arch)


def _rest(model: GptOss, workload: Workload) -> list[Repetition]:
    """Measure what is not in the layers: the embedding, lm_head, the drawing of tokens, and the engine."""
    bare = copy.copy(model)
    bare.layers = []
    bare.config = replace(model.config, num_hidden_layers=0, layer_types=())
    engine = MeasuredEngine(bare, workload)
    warm_up(engine, workload)
    return [repetition(engine, workload, number) for number in range(1, workload.repeat + 1)]


def _figures(
    engine: MeasuredEngine,
    repetitions: Sequence[Repetition],
    rate: float,
    rest: Sequence[Repetition] = (),
    whole: ModelConfig | None = None,
) -> Figures:
    """Sum repetitions up; with what they took without layers, estimate what the whole network would take."""
    prefill, step = _medians(repetitions)
    if whole is not None:
        bare_prefill, bare_step = _medians(rest)
        layers = whole.num_hidden_layers / len(engine.model.layers)
        prefill = scaled(prefill, bare_prefill, layers)
        step = scaled(step, bare_step, layers)
    decode = repetitions[0].decode
    sequences = decode.sequences
    read = step_bytes(
        engine.model,
        sequences=sequences,
        visible=decode.visible,
        kv_itemsize=engine.kv_itemsize,
        whole=whole,
    )
    return Figures(
        prefill_tokens_per_s=repetitions[0].prefill.tokens / prefill,
        first_token_seconds=prefill,
        step_seconds=step,
        decode_tokens_per_s=sequences / step,
        step_bytes=read,
        bytes_per_token=read.total / sequences,
        read_share=read.total / step / rate,
    )


def _medians(repetitions: Sequence[Repetition]) -> tuple[float, float]:
    """Take the median prompt's seconds, and the median step's."""
    steps = [seconds for one in repetitions for seconds in one.decode.step_seconds]
    return median(one.prefill.seconds for one in repetitions), median(steps)


def scaled(seconds: float, rest: float, layers: float) -> float:
    """Estimate what a network with so many times the layers takes, when `rest` is not spent in them."""
    return rest + layers * max(0.0, seconds - rest)
