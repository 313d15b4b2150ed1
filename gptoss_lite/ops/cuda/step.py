"""A batch as the kernels want it: decode rows first, and all that changes between steps in one upload."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS, MAX_SEQUENCES
from gptoss_lite.kernels.cuda.launch.attention import prefill_tiles
from gptoss_lite.kernels.cuda.runtime import Array, Runtime
from gptoss_lite.sampling import Draw

_ALIGNMENT = 64  # bytes, of each field in the upload
MOST_ROWS = MAX_SEQUENCES  # wanted without a draw: more than this are a prompt's
_MIN_WIDTH = 16  # blocks of a table, so that short contexts share one recording


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes the launches of a step: steps of one shape without prefill replay the same recording.

    decodes: rows that go on with an answer, padded; prefills: rows of prompts, in so many tiles; sequences
    and width: rows and columns of a block table; rows: logits wanted, padded as the decodes are. draws:
    whether tokens are drawn; filtered: whether some by top_k, top_p or min_p; logits: whether they are kept.
    """

    decodes: int
    prefills: int
    sequences: int
    tiles: int
    width: int
    rows: int
    draws: bool
    filtered: bool
    logits: bool

    @property
    def tokens(self) -> int:
        """Rows in all."""
        return self.decodes + self.prefills

    @property
    def is_prompt(self) -> bool:
        """Whether the logits of so many rows are wanted that they are computed as a prompt's."""
        return self.rows > MOST_ROWS and not self.draws


@dataclass(frozen=True, slots=True)
class Step:
    """A batch on the device; fields as in Batch, rows and sequences in the order of the kernels.

    sequence_of int32 (T,); tiles int32 (n, 4) of prefill rows; the last seven (R,), one per wanted row.
    """

    shape: Shape
    tokens: Array
    positions: Array
    sequence_of: Array
    full_table: Array
    sliding_table: Array
    tiles: Array
    rows: Array
    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    seed: Array
    choice: Array
    draw_positions: Array


def drawn_on_device(draw: Draw) -> bool:
    """Whether a draw wants nothing that only the host does: processors, biases, penalties, logprobs."""
    params = draw.params
    return not (
        params.logits_processors
        or params.logit_bias
        or params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logprobs is not None
    )


def is_filtered(draw: Draw) -> bool:
    """Whether more than the temperature stands between the logits and the draw."""
    params = draw.params
    return not params.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


def lay_out(
    batch: Batch, draws: Sequence[Draw] | None, logits: bool
) -> tuple[Shape, dict[str, npt.NDArray[Any]]]:
    """Bring a batch into the kernels' order: its shape, and the fields of a Step but the shape.

    A batch of nothing but decode rows is padded to a power of two with rows at position -1.
    """
    counts = np.diff(batch.query_start)
    order = np.argsort(~batch.decoding, kind="stable")  # sequences, decode rows first
    starts = batch.query_start[:-1]
    taken = np.concatenate(
        [np.arange(starts[s], starts[s] + counts[s]) for s in order]
    )  # old row of each new
    new_row = np.empty(len(taken), np.int32)
    new_row[taken] = np.arange(len(taken))
    answering = int(batch.decoding.sum())
    prefills = len(taken) - answering
    decodes = answering if prefills else _power_of_two(answering)
    padding = decodes - answering
    sequences, rows = len(counts) + padding, len(batch.rows)
    if not prefills and rows == answering:
        rows = decodes
    prompts = order[answering:]
    tiles = prefill_tiles(counts[prompts].tolist(), batch.positions[starts[prompts]].tolist())
    tiles[:, 0] += answering
    width = max(_power_of_two(int(batch.positions.max()) // BLOCK_TOKENS + 1), _MIN_WIDTH)
    fields = {
        "tokens": _padded(batch.tokens[taken], decodes + prefills, 0),
        "positions": _padded(batch.positions[taken], decodes + prefills, -1),
        "sequence_of": _padded(
            np.repeat(np.arange(len(counts)), counts[order]), decodes + prefills, len(counts)
        ),
        "full_table": _table(batch.full_table[order], sequences, width),
        "sliding_table": _table(batch.sliding_table[order], sequences, width),
        "tiles": tiles,
        "rows": _padded(new_row[batch.rows], rows, -1),
    }
    draws = draws or ()
    params = [draw.params for draw in draws]
    columns: dict[str, tuple[npt.DTypeLike, list[Any], float]] = {
        "temperature": (np.float32, [p.temperature for p in params], 0),
        "top_k": (np.int32, [p.top_k for p in params], 0),
        "top_p": (np.float32, [p.top_p for p in params], 1),
        "min_p": (np.float32, [p.min_p for p in params], 0),
        "seed": (np.uint64, [draw.seed for draw in draws], 0),
        "choice": (np.int32, [draw.choice for draw in draws], 0),
        "draw_positions": (np.int32, [draw.position for draw in draws], -1),
    }
    for name, (dtype, values, default) in columns.items():
        fields[name] = _padded(np.array(values, dtype), rows, default)
    shape = Shape(
        decodes, prefills, sequences, len(fields["tiles"]), width, rows,
        draws=bool(draws), filtered=any(map(is_filtered, draws)), logits=logits,
    )  # fmt: skip
    return shape, fields


class StepBuffers:
    """Device memory for the fields of steps: a place for each shape that is recorded, one for all others."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._recorded: dict[Shape, tuple[Array, Step]] = {}
        self._shared: Array | None = None

    def upload(self, shape: Shape, fields: dict[str, npt.NDArray[Any]]) -> Step:
        """Copy all fields at once and return where they are."""
        offsets, end = {}, 0
        for name, array in fields.items():
            offsets[name] = end
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        host = np.empty(end, np.uint8)
        for name, array in fields.items():
            part = host[offsets[name] : offsets[name] + array.nbytes]
            part[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        device, step = self._recorded.get(shape, (None, None))
        if device is None or step is None:
            device = self._place(shape, end)
            views = {
                name: device[at : at + fields[name].nbytes]
                .view(fields[name].dtype)
                .reshape(fields[name].shape)
                for name, at in offsets.items()
            }
            step = Step(shape, **views)
            if not shape.prefills:
                self._recorded[shape] = device, step
        self._runtime.upload(host, device)
        return step

    def _place(self, shape: Shape, nbytes: int) -> Array:
        if not shape.prefills:
            return self._runtime.empty((nbytes,), np.uint8)
        if self._shared is None or len(self._shared) < nbytes:
            self._shared = self._runtime.empty((_power_of_two(nbytes),), np.uint8)
        return self._shared[:nbytes]


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n else 0


def _padded(values: npt.NDArray[Any], length: int, default: float) -> npt.NDArray[Any]:
    padded = np.full(length, default, values.dtype if values.dtype != np.int64 else np.int32)
    padded[: len(values)] = values
    return padded


def _table(table: npt.NDArray[Any], sequences: int, width: int) -> npt.NDArray[Any]:
    padded = np.zeros((sequences, width), np.int32)
    used = min(width, table.shape[1])
    padded[: len(table), :used] = table[:, :used]
    return padded
