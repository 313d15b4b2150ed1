"""The two things to do with a checkpoint: give it another layout, or quantise it by a policy."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptoss_lite.calibrate import CalibratedEncoder, Calibration
from gptoss_lite.checkpoint import Checkpoint
from gptoss_lite.checkpoint.names import names
from gptoss_lite.conversion.encoders import Encoder, Plain
from gptoss_lite.conversion.files import SHARD_BYTES
from gptoss_lite.conversion.forms import TARGETS
from gptoss_lite.conversion.plan import Plan, make_plan
from gptoss_lite.errors import FormatError
from gptoss_lite.quant.formats import Format
from gptoss_lite.quant.policy import Candidate, Policy


def plan_conversion(
    checkpoint: Checkpoint, destination: Path, target: str, *, shard_bytes: int = SHARD_BYTES
) -> Plan:
    """Plan to write a checkpoint in another layout, every value as it is.

    target: "hf", Hugging Face's names and what formats there are; "bf16", the same all in bf16; "original",
    OpenAI's; "gguf", llama.cpp's; "packed-cpu", "packed-cuda", the tiles that the kernels read.
    Raises FormatError where that layout would lose something, naming it, and what would do instead;
    DeviceError where its tiles are for kernels that cannot compute the network.
    """
    if target not in TARGETS:
        raise FormatError(f"unknown layout {target!r}: choose {', '.join(TARGETS[:-1])} or {TARGETS[-1]}")
    kept = {name: weight.format for name, weight in checkpoint.weights.items()}
    return make_plan(checkpoint, destination, target, kept, Plain(), "kept", shard_bytes=shard_bytes)


def plan_quantization(
    checkpoint: Checkpoint,
    destination: Path,
    policy: Policy,
    *,
    search: bool = True,
    calibration_rows: Sequence[Sequence[int]] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Plan to write a checkpoint quantised by a policy, under Hugging Face's names.

    search: for the exponents of MXFP4 that leave the least squared error, instead of the specification's
    rule. calibration_rows: rows of token ids to run the network over, so that errors are made where they
    matter least; see calibrate. Raises FormatError where the policy asks for what cannot be, by name.
    """
    chosen = policy.choose(
        Candidate(name.name, name.shape[-1], checkpoint.weights[name.name].format, name.is_quantisable)
        for name in names(checkpoint.config)
    )
    _refuse_mixed(chosen, checkpoint.config.num_hidden_layers)
    encode: Encoder
    if calibration_rows is None:
        encode, method = Plain(search=search), f"mxfp4 scales by {'search' if search else 'the OCP rule'}"
    else:
        encode = CalibratedEncoder(Calibration(checkpoint, calibration_rows))
        tokens = json.dumps(list(map(list, calibration_rows)))
        text = hashlib.blake2b(tokens.encode(), digest_size=8).hexdigest()
        method = f"calibrated over {sum(map(len, calibration_rows))} tokens, {text}"
    in_order = calibration_rows is not None
    return make_plan(
        checkpoint, destination, "hf", chosen, encode, method, in_order=in_order, shard_bytes=shard_bytes
    )


def _refuse_mixed(chosen: Mapping[str, Format | None], layers: int) -> None:
    """Raise FormatError where queries, keys and values, which are multiplied as one, would differ."""
    for layer in range(layers):
        q, k, v = (f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkv")
        for other in (k, v):
            if chosen[other] != chosen[q]:
                shown = f"{chosen[other] or 'not quantised'}, and {q} {chosen[q] or 'not quantised'}"
                raise FormatError(f"{other} is to be {shown}: they are one matrix, give them one format")
