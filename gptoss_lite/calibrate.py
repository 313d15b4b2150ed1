"""What a network's weights multiply, summed over a text, layer by layer; and quantising with regard to it."""

import codecs
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_lite.batch import Batch
from gptoss_lite.cache import BLOCK_TOKENS
from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.checkpoint.names import EMBEDDING, Name
from gptoss_lite.checkpoint.weights import Part
from gptoss_lite.errors import RequestError
from gptoss_lite.model import Block, Experts, Progress, WeightReader
from gptoss_lite.ops import Linear, Norm, Ops, Use
from gptoss_lite.quant import QTensor
from gptoss_lite.quant.codecs import encode
from gptoss_lite.quant.formats import MXFP4, Format
from gptoss_lite.quant.gptq import Costs, Feedback, Gram
from gptoss_lite.rope import yarn
from gptoss_lite.tokenizer import Tokenizer

ROW_TOKENS = 512  # of a text that see each other
MAX_TOKENS = 16384

_TOKEN_BYTES = 32  # of a text that are read for each token wanted: few are longer
_BATCH_TOKENS = 4096  # computed together: half a GB of scratch in gpt-oss-20b
_ROOM = 2 << 30  # bytes of activations that are kept
_PRIOR = 64  # tokens of its own, after which an expert's inputs tell it as much as those of all experts

Array = NDArray[Any]


def read_rows(path: Path, tokenizer: Tokenizer, max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """Read the beginning of a text as rows of token ids, 512 each, the last perhaps fewer.

    Raises RequestError, naming the file, where it cannot be read, is not UTF-8, or has less than one row.
    """
    limit = max_tokens * _TOKEN_BYTES
    try:
        with path.open("rb") as file:
            data = file.read(limit)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    try:
        # Only a text that was read to its end must not end within a character.
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < limit)
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{data[error.start]:02x} at position {error.start}"
        raise RequestError(f"{path} is not UTF-8: {wrong}") from None
    tokens = tokenizer.encode(text)[:max_tokens]
    if len(tokens) < min(ROW_TOKENS, max_tokens):
        raise RequestError(f"{path} has {len(tokens)} tokens: give a text of at least {ROW_TOKENS}")
    return [tokens[start : start + ROW_TOKENS] for start in range(0, len(tokens), ROW_TOKENS)]


@dataclass(frozen=True, slots=True)
class _Layer:
    """What the weights of one layer multiply: the sums, or for single experts what it takes to make them.

    h (T, hidden): what experts multiply; ids and shares (T, k): which of them do, and what each counts for.
    """

    qkv: NDArray[np.float32]
    out: NDArray[np.float32]
    gate_up: NDArray[np.float32]
    h: NDArray[np.float32]
    ids: NDArray[np.int32]
    shares: NDArray[np.float32]
    experts: Experts


class Calibration:
    """Runs a network over rows of tokens as far as it is asked about, with one layer in memory at a time.

    Ask in the order in which the network computes, from one thread at a time: for an earlier layer it begins
    anew. With the same checkpoint, rows and BLAS, what it answers has the same bits.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: Sequence[Sequence[int]],
        progress: Progress | None = None,
    ) -> None:
        """Take an opened checkpoint and rows of token ids; reads no weights yet.

        progress: told how many tokens have passed a layer, added up over the layers, and how many will.
        Raises RequestError for more tokens than there is room for.
        """
        self._config = config = checkpoint.config
        self.tokens = sum(map(len, rows))
        if self.tokens > (most := _ROOM // (8 * config.hidden_size)):
            raise RequestError(f"{self.tokens} tokens are too many to calibrate with: give at most {most}")
        self._ops = Ops()  # the reference: in products of so many rows, BLAS outruns our own kernels
        self._read = WeightReader(checkpoint, self._ops, lambda nbytes: None)
        self._progress = progress
        self._batches = list(_batches(rows))
        blocks = max(batch.full_table.size for _, batch in self._batches)
        one_layer = replace(config, num_hidden_layers=1, layer_types=config.layer_types[:1])
        self._cache = self._ops.new_cache(one_layer, blocks, blocks)
        # Where a step multiplies by an identity, its result is what it multiplies otherwise.
        self._same = {
            size: np.eye(size, dtype=np.float32) for size in (config.hidden_size, config.intermediate_size)
        }
        self._x = np.empty((self.tokens, config.hidden_size), np.float32)
        self._rotations: list[Any] = []
        self._passed = 0  # layers that _x has passed
        self._layer: _Layer | None = None  # the last of them

    def gram(self, name: Name, expert: int | None = None) -> Gram | None:
        """Sum up x x^T for what a weight multiplies: of experts, one; of gate_up_proj, with None, all.

        An expert's inputs count as much as its result does, by the square of the router's weight. None for a
        weight of which no inputs are known: the embedding, and what is never quantised.
        """
        kind = name.name.removesuffix(".weight").rpartition(".")[2]
        if kind == "lm_head":
            return self._final()
        if name.layer is None or not name.is_quantisable:
            return None
        layer = self._enter(name.layer)
        if expert is None:
            if kind == "gate_up_proj":
                return Gram(layer.gate_up, layer.ids.size)
            return Gram(layer.out if kind == "o_proj" else layer.qkv, self.tokens)
        tokens, choice = np.nonzero(layer.ids == expert)
        gram = _zeros(name.shape[-1])
        for start in range(0, len(tokens), _BATCH_TOKENS):
            part = tokens[start : start + _BATCH_TOKENS]
            x = layer.h[part]
            if kind == "down_proj":
                x = self._inner(layer.experts, expert, x)
            _add(gram, x * layer.shares[part, choice[start : start + _BATCH_TOKENS], None])
        return Gram(gram, len(tokens))

    def _final(self) -> Gram:
        self._enter(self._config.num_hidden_layers - 1)
        norm, _ = self._read.norm("model.norm.weight", self._config.rms_norm_eps)
        gram = _zeros(self._config.hidden_size)
        for span, batch in self._batches:
            _add(gram, self._normalised(self._x[span], norm, batch))
        return Gram(gram, self.tokens)

    def _enter(self, number: int) -> _Layer:
        """Run the network through a layer, from where it is or from the beginning."""
        if number < self._passed - 1:
            self._passed = 0
        if self._passed == 0:
            self._embed()
        while self._layer is None or self._passed <= number:
            self._layer = None  # its weights go before those of the next come
            self._layer = self._pass(self._passed)
            self._passed += 1
        return self._layer

    def _embed(self) -> None:
        table = self._read.matrix(EMBEDDING, Use("embedding"))
        rope = yarn(self._config.rope, self._config.head_dim)
        self._rotations, self._layer = [], None
        for span, batch in self._batches:
            self._x[span], rotation = self._ops.embed(table, rope, batch)
            self._rotations.append(rotation)

    def _pass(self, number: int) -> _Layer:
        """Take x through one layer, as model.Block does, and note what its weights multiply."""
        ops, config = self._ops, self._config
        block = Block.load(self._read, config, number)
        attention, experts = block.attention, block.experts
        h = np.empty_like(self._x)
        ids = np.empty((self.tokens, experts.num_experts_per_tok), np.int32)
        shares = np.empty(ids.shape, np.float32)
        qkv, gate_up = _zeros(config.hidden_size), _zeros(config.hidden_size)
        out = _zeros(config.num_attention_heads * config.head_dim)
        for (span, batch), rotation in zip(self._batches, self._rotations, strict=True):
            x, table = self._x[span], batch.full_table
            _add(qkv, self._normalised(x, attention.norm, batch))
            q = ops.qkv(x, attention.norm, attention.qkv, rotation, self._cache, 0, table, batch)
            a = ops.attention(q, self._cache, 0, table, batch, attention.sinks, attention.window)
            _add(out, a.reshape(len(a), -1))
            x = ops.out_proj(a, attention.out, x)
            routed = ops.route(x, experts.norm, experts.router, experts.num_experts_per_tok)
            h[span], ids[span], shares[span] = routed
            _add(gate_up, h[span] * np.linalg.norm(shares[span], axis=1, keepdims=True))
            self._x[span] = ops.experts(*routed, experts.gate_up, experts.down, experts.limit, x)
            if self._progress is not None:
                self._progress(number * self.tokens + span.stop, config.num_hidden_layers * self.tokens)
        return _Layer(qkv, out, gate_up, h, ids, shares, experts)

    def _normalised(self, x: Array, norm: Norm, batch: Batch) -> Array:
        return self._ops.logits(x, norm, Linear(self._same[x.shape[1]]), batch)

    def _inner(self, experts: Experts, expert: int, h: Array) -> Array:
        """Compute what an expert's down_proj multiplies, for some of its tokens."""
        size = self._config.intermediate_size
        ids, weights = np.zeros((len(h), 1), np.int32), np.ones((len(h), 1), np.float32)
        one = slice(expert, expert + 1)
        assert experts.gate_up.bias is not None
        gate_up = Linear(experts.gate_up.weight[one], experts.gate_up.bias[one])
        down = Linear(self._same[size][None], np.zeros((1, size), np.float32))
        nothing = np.zeros((len(h), size), np.float32)
        return self._ops.experts(h, ids, weights, gate_up, down, experts.limit, nothing)


class CalibratedEncoder:
    """Quantises parts of weights so that what they do to a text's tokens changes least; see quant.gptq.

    Call it in the order in which the network computes, from one thread at a time. The embedding, which
    multiplies nothing, is rounded by itself.

    costs: by canonical name, of what was quantised so far, but for the embedding.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.costs: dict[str, Costs] = {}
        self._calibration = calibration
        self._last: tuple[Any, Feedback] | None = None  # rows share one; so do q, k and v

    def __call__(self, name: Name, part: Part, array: NDArray[Any], form: Format) -> QTensor:
        """Quantise an expert of a weight, or some rows (N, K): float16, bfloat16 or float32."""
        expert = part if isinstance(part, int) else None
        key = (re.sub("[qkv]_proj", "qkv_proj", name.name), expert, form)
        if self._last is None or self._last[0] != key:
            self._last = None
            gram = self._gram(name, expert)
            if gram is None:
                return encode(array, form, search=isinstance(form, MXFP4))
            self._last = key, Feedback(gram, form)
        return self._last[1].quantize(array, self.costs.setdefault(name.name, Costs()))

    def _gram(self, name: Name, expert: int | None) -> Gram | None:
        own = self._calibration.gram(name, expert)
        if own is None or not name.name.endswith("gate_up_proj"):
            return own
        # An expert that was chosen seldom, or never, is told what the others see.
        common = self._calibration.gram(name)
        assert common is not None
        return Gram(own.matrix + np.float32(_PRIOR / common.count) * common.matrix, own.count + _PRIOR)


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[tuple[slice, Batch]]:
    """Lay rows end to end, as many as are computed together, each a sequence with blocks of its own."""
    start, waiting = 0, list(rows)
    while waiting:
        taken = [waiting.pop(0)]
        while waiting and sum(map(len, taken)) + len(waiting[0]) <= _BATCH_TOKENS:
            taken.append(waiting.pop(0))
        lengths = [len(row) for row in taken]
        total, blocks = sum(lengths), -(-max(lengths) // BLOCK_TOKENS)
        table = np.arange(len(taken) * blocks, dtype=np.int32).reshape(len(taken), blocks)
        yield (
            slice(start, start + total),
            Batch(
                tokens=np.concatenate(taken).astype(np.int32),
                positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
                query_start=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                full_table=table,
                sliding_table=table,
                rows=np.arange(total, dtype=np.int32),
                decoding=np.zeros(len(taken), np.bool_),
            ),
        )
        start += total


def _zeros(size: int) -> NDArray[np.float32]:
    return np.zeros((size, size), np.float32)


def _add(gram: NDArray[np.float32], x: Array) -> None:
    gram += x.T @ x
