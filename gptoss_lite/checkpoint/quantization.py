"""What config.json says of how its weights are held: `quantization_config`, read and written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Self

from gptoss_lite.checkpoint.names import is_quantisable
from gptoss_lite.errors import CheckpointError, FormatError
from gptoss_lite.packing import LAYOUTS
from gptoss_lite.quant.formats import MXFP4, Format, from_json, to_json
from gptoss_lite.quant.tensorfile import abbreviated

METHOD, VERSION = "gptoss-lite", 1
EXPERTS = "model.layers.*.mlp.experts.*_proj"
# What Hugging Face's own reader of MXFP4 wants to be told.
_NOT_CONVERTED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which weights are quantised, and how: patterns of canonical names with a format each, the first counts.

    layout: the tiles that they are packed in, None where they lie in their natural order.
    """

    tensors: Mapping[str, Format] = field(default_factory=dict)
    layout: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str) -> Self:
        """Read the section of a parsed config.json; raises CheckpointError naming source and key."""
        section = config.get("quantization_config")
        if section is None:
            # original/ is packed without saying so.
            return cls({EXPERTS: MXFP4()} if "model_type" not in config and "num_experts" in config else {})
        if section["quant_method"] == "mxfp4":
            return cls({EXPERTS: MXFP4()})
        where = f"{source}: quantization_config"
        if section.get("version") != VERSION:
            found = abbreviated(section.get("version"))
            raise CheckpointError(f"{where}.version is {found}: this release reads {VERSION}")
        layout, tensors = section.get("layout"), section.get("tensors")
        if layout is not None and layout not in LAYOUTS:
            known = " or ".join(map(repr, LAYOUTS))
            raise CheckpointError(f"{where}.layout is {abbreviated(layout)}: must be {known}, or absent")
        if not isinstance(tensors, dict):
            raise CheckpointError(f"{where}.tensors is {abbreviated(tensors)}: must be an object")
        try:
            return cls({pattern: from_json(value) for pattern, value in tensors.items()}, layout)
        except FormatError as error:
            raise CheckpointError(f"{where}.tensors: {error}") from None

    def format(self, name: str) -> Format | None:
        """The format of a canonical name, None where it is dense."""
        if not is_quantisable(name):
            return None
        return next((form for pattern, form in self.tensors.items() if fnmatchcase(name, pattern)), None)

    def to_config(self) -> dict[str, Any] | None:
        """Spell the section: as Hugging Face does where it can be, None where nothing is quantised."""
        if not self.tensors:
            return None
        if self.layout is None and dict(self.tensors) == {EXPERTS: MXFP4()}:
            return {"modules_to_not_convert": _NOT_CONVERTED, "quant_method": "mxfp4"}
        layout = {} if self.layout is None else {"layout": self.layout}
        tensors = {pattern: to_json(form) for pattern, form in self.tensors.items()}
        return {"quant_method": METHOD, "version": VERSION, **layout, "tensors": tensors}


def summarised(formats: Mapping[str, Format], layers: int) -> dict[str, Format]:
    """Write the formats of single weights, by canonical name, as few patterns that match these alone."""
    alike: dict[str, dict[str, Format]] = {}
    for name, form in formats.items():
        alike.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), {})[name] = form
    patterns: dict[str, Format] = {}
    for pattern, members in alike.items():
        every_layer = len(members) == (layers if "*" in pattern else 1)
        if every_layer and len(set(members.values())) == 1:
            patterns[pattern] = next(iter(members.values()))
        else:
            patterns |= members
    experts = [patterns.get(EXPERTS.replace("*_proj", f"{kind}_proj")) for kind in ("gate_up", "down")]
    if experts[0] is not None and experts[0] == experts[1]:
        for kind in ("gate_up", "down"):
            del patterns[EXPERTS.replace("*_proj", f"{kind}_proj")]
        patterns[EXPERTS] = experts[0]
    return patterns
