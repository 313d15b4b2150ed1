"""What weights multiply: against a plain run of the reference network, and what is made of it."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptoss_lite as gl
from gptoss_lite.calibrate import CalibratedEncoder, Calibration, read_rows
from gptoss_lite.checkpoint import Checkpoint, open_checkpoint
from gptoss_lite.checkpoint.names import Name, names
from gptoss_lite.errors import RequestError
from gptoss_lite.model import GptOss
from gptoss_lite.ops import Linear, Norm, Ops
from gptoss_lite.ops.base import _linear, _rms_norm, _swiglu
from gptoss_lite.quant import codecs
from gptoss_lite.quant.formats import MXFP4, Int8
from gptoss_lite.tokenizer import Tokenizer, load_tokenizer

DEMO = Path(gl.__file__).parent / "demo"
ROWS = [np.random.default_rng(n).integers(0, 1000, n).tolist() for n in (70, 33, 129, 16)]
Array = np.ndarray[Any, np.dtype[Any]]


class Recording(Ops):
    """The reference, which notes what products multiply, by layer and kind, and of experts by number."""

    def __init__(self, layers: int) -> None:
        self.layer, self.layers = 0, layers
        self.inputs: dict[tuple[Any, ...], list[Array]] = {}

    def note(self, key: tuple[Any, ...], x: Array) -> None:
        self.inputs.setdefault(key, []).append(x.astype(np.float64))

    def qkv(self, x: Array, norm: Norm, *rest: Any) -> Array:
        self.note((self.layer, "q_proj"), _rms_norm(x, norm))
        return super().qkv(x, norm, *rest)

    def out_proj(self, a: Array, w: Linear, x: Array) -> Array:
        self.note((self.layer, "o_proj"), a.reshape(len(a), -1))
        return super().out_proj(a, w, x)

    def experts(
        self, h: Array, ids: Array, weights: Array, gate_up: Linear, down: Linear, limit: float, x: Array
    ) -> Array:
        assert gate_up.bias is not None
        for token, choice in np.ndindex(ids.shape):
            e, share = ids[token, choice], weights[token, choice]
            inner = _swiglu(_linear(h[token : token + 1], Linear(gate_up.weight[e], gate_up.bias[e])), limit)
            self.note((self.layer, "gate_up_proj", int(e)), share * h[token : token + 1])
            self.note((self.layer, "down_proj", int(e)), share * inner)
        self.layer = (self.layer + 1) % self.layers
        return super().experts(h, ids, weights, gate_up, down, limit, x)

    def logits(self, x: Array, norm: Norm, lm_head: Linear, batch: Any) -> Array:
        self.note(("lm_head",), _rms_norm(x[batch.rows], norm))
        return super().logits(x, norm, lm_head, batch)

    def gram(self, *key: Any) -> tuple[Array, int]:
        x = np.concatenate(self.inputs[key])
        return x.T @ x, len(x)


@pytest.fixture(scope="module")
def checkpoint(tiny_path: Path) -> Checkpoint:
    return open_checkpoint(tiny_path)


@pytest.fixture(scope="module")
def recorded(checkpoint: Checkpoint) -> Recording:
    """What the rows give when the whole network runs over each by itself."""
    ops = Recording(checkpoint.config.num_hidden_layers)
    model = GptOss(checkpoint, ops)
    for row in ROWS:
        model.logits(row)
    return ops


def named(checkpoint: Checkpoint, layer: int | None, kind: str) -> Name:
    return next(name for name in names(checkpoint.config) if name.layer == layer and kind in name.name)


def assert_close(found: Array, wanted: Array) -> None:
    # Two float32 evaluations in different order differ by about 1e-6.
    assert np.linalg.norm(found - wanted) <= 1e-5 * np.linalg.norm(wanted)


def test_sums_are_those_of_what_the_network_multiplies(checkpoint: Checkpoint, recorded: Recording) -> None:
    calibration = Calibration(checkpoint, ROWS)
    for layer in range(checkpoint.config.num_hidden_layers):
        for kind, shared in (("q", "q_proj"), ("k", "q_proj"), ("v", "q_proj"), ("o", "o_proj")):
            gram = calibration.gram(named(checkpoint, layer, f"{kind}_proj.weight"))
            wanted, count = recorded.gram(layer, shared)
            assert gram is not None and gram.count == count
            assert_close(gram.matrix, wanted)
        for expert in range(checkpoint.config.num_local_experts):
            for kind in ("gate_up_proj", "down_proj"):
                gram = calibration.gram(named(checkpoint, layer, kind), expert)
                wanted, count = recorded.gram(layer, kind, expert)
                assert gram is not None and gram.count == count
                assert_close(gram.matrix, wanted)
    gram = calibration.gram(named(checkpoint, None, "lm_head"))
    assert gram is not None and gram.count == sum(map(len, ROWS))
    assert_close(gram.matrix, recorded.gram("lm_head")[0])


def test_all_experts_together_are_the_sum_of_each(checkpoint: Checkpoint) -> None:
    calibration, name = Calibration(checkpoint, ROWS), named(checkpoint, 1, "gate_up_proj")
    together = calibration.gram(name)
    single = [calibration.gram(name, expert) for expert in range(checkpoint.config.num_local_experts)]
    assert together is not None and together.count == sum(gram.count for gram in single if gram is not None)
    assert_close(together.matrix, np.sum([g.matrix for g in single if g is not None], axis=0))


def test_weights_that_multiply_nothing_have_no_sum(checkpoint: Checkpoint) -> None:
    calibration = Calibration(checkpoint, ROWS)
    for name in names(checkpoint.config):
        if "norm" in name.name or "router" in name.name or "bias" in name.name or "embed" in name.name:
            assert calibration.gram(name) is None


def test_whatever_was_asked_before_the_answer_has_the_same_bits(checkpoint: Checkpoint) -> None:
    late, early = named(checkpoint, 3, "o_proj.weight"), named(checkpoint, 0, "down_proj")
    first, again = Calibration(checkpoint, ROWS), Calibration(checkpoint, ROWS)
    for name, expert in (
        (late, None),
        (early, 2),
        (named(checkpoint, 2, "k_proj.weight"), None),
        (late, None),
    ):
        a, b = first.gram(name, expert), Calibration(checkpoint, ROWS).gram(name, expert)
        assert a is not None and b is not None
        np.testing.assert_array_equal(a.matrix, b.matrix)
    last = named(checkpoint, None, "lm_head")
    a, b = first.gram(last), again.gram(last)
    assert a is not None and b is not None
    np.testing.assert_array_equal(a.matrix, b.matrix)


def test_rows_do_not_see_each_other_nor_what_they_are_computed_with(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = named(checkpoint, 3, "o_proj.weight")
    together = Calibration(checkpoint, ROWS).gram(name)
    monkeypatch.setattr("gptoss_lite.calibrate._BATCH_TOKENS", 1)
    apart = Calibration(checkpoint, ROWS).gram(name)
    assert together is not None and apart is not None
    assert_close(apart.matrix, together.matrix)


def test_progress_counts_tokens_through_layers(checkpoint: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    calibration = Calibration(checkpoint, ROWS, progress=lambda done, total: told.append((done, total)))
    assert not told
    calibration.gram(named(checkpoint, None, "lm_head"))
    total = 4 * sum(map(len, ROWS))
    assert told[-1] == (total, total) and told == sorted(told)


def test_more_tokens_than_there_is_room_for_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(RequestError, match=r"2000000 tokens are too many.*at most 1677721"):
        Calibration(checkpoint, [range(2_000_000)])


def test_one_layer_is_in_memory_at_a_time(tiny_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_path.with_name("original"))
    one_layer = 4 * (2 * 160**2 + 384**2)  # of sums; what is read of a file is mapped, and not counted
    peaks = []
    for layer in (0, 3):
        calibration = Calibration(checkpoint, ROWS[:1])
        tracemalloc.start()
        try:
            calibration.gram(named(checkpoint, layer, "o_proj"))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < peaks[0] + one_layer / 2


def drawn(name: Name) -> Array:
    """Draw weights for one expert: the checkpoint's own are exact in MXFP4."""
    return np.random.default_rng(0).standard_normal(name.shape[1:], np.float32)


def test_an_encoder_makes_outputs_err_less(checkpoint: Checkpoint) -> None:
    rows = [np.random.default_rng(n).integers(0, 1000, 512).tolist() for n in range(3)]
    encoder = CalibratedEncoder(Calibration(checkpoint, rows[:2]))
    others = Calibration(checkpoint, rows[2:])
    for name in (named(checkpoint, 0, "gate_up_proj"), named(checkpoint, 1, "down_proj")):
        w, costs = drawn(name), np.zeros(2)
        for expert in range(8):
            gram = others.gram(name, expert)
            assert gram is not None
            q = encoder(name, expert, w, MXFP4()), codecs.encode(w, MXFP4(), search=True)
            for i, error in enumerate(tensor.dequantize().astype(np.float64) - w for tensor in q):
                costs[i] += ((error @ gram.matrix) * error).sum()
        # Random tokens and weights make inputs that hardly go together: little is to be gained.
        assert costs[0] < 0.97 * costs[1]
        assert encoder.costs[name.name].outputs < 0.97 * encoder.costs[name.name].outputs_plain


def test_an_expert_that_was_never_chosen_goes_by_what_the_others_see(checkpoint: Checkpoint) -> None:
    calibration = Calibration(checkpoint, [[5, 7]])
    encoder = CalibratedEncoder(calibration)
    for kind in ("gate_up_proj", "down_proj"):
        name = named(checkpoint, 0, kind)
        grams = [calibration.gram(name, expert) for expert in range(8)]
        idle = next(expert for expert, gram in enumerate(grams) if gram is not None and gram.count == 0)
        w = drawn(name)
        q = encoder(name, idle, w, MXFP4()).dequantize()
        alone = codecs.encode(w, MXFP4(), search=True).dequantize()
        assert (q == alone).all() == (kind == "down_proj")
        assert np.linalg.norm(q - w) < 1.2 * np.linalg.norm(alone - w)


def test_the_embedding_is_rounded_by_itself(tiny_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_path.with_name("bf16"))
    name, form = named(checkpoint, None, "embed"), Int8()
    table = checkpoint.tensor(name.name)
    assert isinstance(table, np.ndarray)
    q = CalibratedEncoder(Calibration(checkpoint, ROWS))(name, slice(0, 64), table[:64], form)
    np.testing.assert_array_equal(q.dequantize(), codecs.encode(table[:64], form).dequantize())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO, open_checkpoint(DEMO).config.vocab_size)


Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(data: bytes) -> Path:
        (tmp_path / "text.txt").write_bytes(data)
        return tmp_path / "text.txt"

    return to_file


def test_a_text_is_read_as_rows(tokenizer: Tokenizer, write: Write) -> None:
    text = "The sea was calm, and the ship lay still. " * 200
    rows = read_rows(write(text.encode()), tokenizer)
    assert [len(row) for row in rows[:-1]] == [512] * (len(rows) - 1) and 0 < len(rows[-1]) <= 512
    assert [token for row in rows for token in row] == tokenizer.encode(text)
    assert read_rows(write(text.encode()), tokenizer, 700) == [rows[0], rows[1][:188]]


def test_no_more_of_a_text_is_read_than_needed_even_within_a_character(
    tokenizer: Tokenizer, write: Write
) -> None:
    text = "é" * 20_000
    path = write(b"a" + text.encode() + b"\xff")  # what is wrong comes after the 32 bytes of each token
    assert sum(map(len, read_rows(path, tokenizer, 600))) == 600


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "text.txt has 0 tokens: give a text of at least 512"),
        (b"Too short.", "text.txt has [0-9]+ tokens: give a text of at least 512"),
        (b"caf\xe9 " * 1000, "text.txt is not UTF-8: byte 0xe9 at position 3"),
        (b"a " * 2000 + b"\xc3", "text.txt is not UTF-8: byte 0xc3 at position 4000"),
    ],
    ids=["empty", "short", "latin-1", "ends within a character"],
)
def test_a_text_of_no_use_is_refused_by_name(
    tokenizer: Tokenizer, write: Write, data: bytes, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        read_rows(write(data), tokenizer)


def test_a_text_that_is_not_there_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.txt"):
        with pytest.raises(RequestError, match=f"{path} cannot be read"):
            read_rows(path, tokenizer)
