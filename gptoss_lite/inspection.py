"""What a checkpoint holds, from its headers alone: tensors by group, their formats and bytes."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from gptoss_lite.checkpoint import Checkpoint, StoredForm
from gptoss_lite.checkpoint.names import group_of, names
from gptoss_lite.quant.formats import Int8
from gptoss_lite.quant.report import GROUPS


@dataclass(frozen=True, slots=True)
class Group:
    """Some of the weights: how many tensors and parameters, in which forms, and their bytes."""

    name: str
    tensors: int
    parameters: int
    forms: tuple[str, ...]
    nbytes: int


def groups(checkpoint: Checkpoint, forms: Mapping[str, StoredForm] | None = None) -> list[Group]:
    """Sum up a checkpoint by groups; forms: as they would be, by default as they are."""
    forms = checkpoint.forms() if forms is None else forms
    members: dict[str, list[tuple[int, StoredForm]]] = {}
    for name in names(checkpoint.config):
        members.setdefault(group_of(name.name), []).append((math.prod(name.shape), forms[name.name]))
    return [
        Group(
            group,
            len(members[group]),
            sum(size for size, _ in members[group]),
            _labels([form for _, form in members[group]]),
            sum(form.nbytes for _, form in members[group]),
        )
        for group in GROUPS
        if group in members
    ]


def label(form: StoredForm) -> str:
    """Name a form for people: "mxfp4", "bf16", "int8 (32, bf16)"."""
    match form.dtype:
        case "MXFP4":
            return "mxfp4"
        case "INT8":
            assert form.scales is not None
            return str(Int8(None if form.is_row else form.group, form.scales))
    return form.dtype.lower()


def _labels(forms: list[StoredForm]) -> tuple[str, ...]:
    """The forms there are, those of most bytes first."""
    counts: Counter[str] = Counter()
    for form in forms:
        counts[label(form)] += form.nbytes
    return tuple(name for name, _ in counts.most_common())
