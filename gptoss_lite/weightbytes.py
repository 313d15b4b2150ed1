"""What each weight takes in the checkpoint, and in the form that the CUDA kernels read, to the byte."""

from collections.abc import Mapping
from dataclasses import dataclass

from gptoss_lite.checkpoint import StoredForm
from gptoss_lite.checkpoint.names import EMBEDDING, LM_HEAD, group_of
from gptoss_lite.config import ModelConfig
from gptoss_lite.kernels.cuda.layout import TILE_ROWS, Format, Layout, gate_up_rows


@dataclass(frozen=True, slots=True)
class WeightGroup:
    """Bytes of some of the weights: in the checkpoint, and in the form that the kernels read."""

    name: str
    checkpoint: int
    packed: int


def weight_groups(config: ModelConfig, stored: Mapping[str, StoredForm]) -> tuple[WeightGroup, ...]:
    """Count every weight; vectors are float32 on the device, routers and embeddings much as stored."""
    hidden, vocab, E = config.hidden_size, config.vocab_size, config.num_local_experts
    queries, keys = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    packed = {
        "embedding": _table_bytes(stored[EMBEDDING], vocab * hidden),
        "attention": 0,
        "norms and routers": hidden * 4,  # the last norm
        "experts": 0,
        "lm_head": _matrix_bytes(_lm_head(config, stored), vocab, hidden),
    }
    for layer in range(config.num_hidden_layers):
        qkv = stored[_layer_name(layer, "self_attn.q_proj.weight")]
        out = stored[_layer_name(layer, "self_attn.o_proj.weight")]
        router = stored[_layer_name(layer, "mlp.router.weight")]
        packed["attention"] += _matrix_bytes(qkv, queries + 2 * keys, hidden)
        packed["attention"] += _matrix_bytes(out, hidden, queries)
        packed["attention"] += 4 * (queries + 2 * keys + hidden + config.num_attention_heads)  # with sinks
        packed["norms and routers"] += 4 * 2 * hidden
        packed["norms and routers"] += E * (hidden * (2 if router.dtype == "BF16" else 4) + 4)
        packed["experts"] += E * expert_bytes(config, stored, layer)
        packed["experts"] += E * (4 * (2 * config.intermediate_size + hidden) + 2 * 8)  # with two addresses
    checkpoint = dict.fromkeys(packed, 0)
    for name, form in stored.items():
        checkpoint[group_of(name)] += form.nbytes
    return tuple(WeightGroup(name, checkpoint[name], packed[name]) for name in packed)


def expert_bytes(config: ModelConfig, stored: Mapping[str, StoredForm], layer: int) -> int:
    """One expert's two packed matrices."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    gate_up = stored[_layer_name(layer, "mlp.experts.gate_up_proj")]
    down = stored[_layer_name(layer, "mlp.experts.down_proj")]
    rows = len(gate_up_rows(intermediate))
    return _layout(gate_up, rows, hidden).nbytes + _layout(down, hidden, intermediate).nbytes


def _layer_name(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}"


def _layout(form: StoredForm, rows: int, columns: int) -> Layout:
    """The form that the kernels read a matrix in; floats of every width become 16 bits."""
    match form.dtype:
        case "MXFP4":
            return Layout(Format.MXFP4, rows, columns)
        case "INT8":
            return Layout(Format.INT8, rows, columns, form.group)
    return Layout(Format.DENSE, rows, columns)


def _table_bytes(form: StoredForm, count: int) -> int:
    """The embedding, whose rows, and their scales, stay as the checkpoint has them."""
    match form.dtype:
        case "MXFP4" | "INT8":
            return form.nbytes
        case "F32":
            return 4 * count
    return 2 * count


def _matrix_bytes(form: StoredForm, rows: int, columns: int) -> int:
    """A packed matrix outside the experts, with the int32 list of which row is where."""
    layout = _layout(form, rows, columns)
    return layout.nbytes + layout.tiles * TILE_ROWS * 4


def _lm_head(config: ModelConfig, stored: Mapping[str, StoredForm]) -> StoredForm:
    return stored[EMBEDDING if config.tie_word_embeddings else LM_HEAD]
