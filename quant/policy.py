"""Which weights are to be quantised, and how: patterns of names with a format each, as data."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from gptoss_lite.errors import FormatError
from gptoss_lite.quant.formats import BLOCK, MXFP4, Format, Int8, Scales

GROUPS = {
    "experts": "model.layers.*.mlp.experts.*_proj",
    "attention": "model.layers.*.self_attn.?_proj.weight",
    "lm_head": "lm_head.weight",
    "embedding": "model.embed_tokens.weight",
}
_EXACT_OF_MXFP4 = Int8(BLOCK, "e8m0")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a policy has to know of a weight: its name, its columns, and the format it has, None if dense.

    allowed: whether it may be quantised at all.
    """

    name: str
    columns: int
    format: Format | None
    allowed: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern of names, as of files in a shell, and the format for them; None leaves them as they are.

    told: whether it also holds for what is quantised already. exact: whether MXFP4 that becomes int8 by
    groups of 32 gets E8M0 scales instead, which hold it exactly.
    """

    pattern: str
    format: Format | None
    told: bool = False
    exact: bool = False

    def format_after(self, before: Format | None) -> Format | None:
        """The format for a weight that has the format `before`."""
        if before is not None and not self.told:
            return before
        if self.exact and before == MXFP4() and isinstance(self.format, Int8):
            return _EXACT_OF_MXFP4 if self.format.group_size == BLOCK else self.format
        return before if self.format is None else self.format


@dataclass(frozen=True, slots=True)
class Policy:
    """Rules, of which the first that matches a name counts."""

    rules: tuple[Rule, ...]

    def choose(self, candidates: Iterable[Candidate]) -> dict[str, Format | None]:
        """Decide the format that each weight shall have, None for dense.

        A weight that is quantised already keeps its format, unless a rule tells otherwise. Raises FormatError
        where a rule asks for what is never quantised, a router or a norm, where a weight's columns cannot be
        grouped as asked, and where a rule that tells otherwise matches nothing, naming weight or pattern.
        """
        chosen: dict[str, Format | None] = {}
        idle = [rule.pattern for rule in self.rules if rule.told]
        for candidate in candidates:
            matching = [rule for rule in self.rules if fnmatchcase(candidate.name, rule.pattern)]
            idle = [pattern for pattern in idle if all(rule.pattern != pattern for rule in matching)]
            form = matching[0].format_after(candidate.format) if matching else candidate.format
            if matching and form is not None and not candidate.allowed:
                raise FormatError(
                    f"{matching[0].pattern} asks to quantise {candidate.name}:"
                    " routers, norms, sinks and biases are never quantised"
                )
            if form is not None:
                form.check(candidate.columns, candidate.name)
            chosen[candidate.name] = form
        if idle:
            tied = ": its output matrix is its embedding" if idle[0] == GROUPS["lm_head"] else ""
            raise FormatError(f"{idle[0]!r} matches no weight of this model{tied}")
        return chosen


def _preset(**formats: Format) -> Policy:
    return Policy(tuple(Rule(GROUPS[group], form) for group, form in formats.items()))


PRESETS = {
    "experts": _preset(experts=MXFP4()),
    "balanced": _preset(experts=MXFP4(), attention=Int8(), lm_head=Int8()),
    "small": _preset(experts=MXFP4(), attention=Int8(), lm_head=Int8(), embedding=Int8()),
    "smallest": _preset(experts=MXFP4(), attention=MXFP4(), lm_head=Int8(), embedding=Int8()),
}


def make_policy(
    preset: str = "experts",
    *,
    groups: Mapping[str, str] | None = None,
    tensors: Sequence[str] = (),
    group_size: int | None = BLOCK,
    scales: Scales | None = None,
) -> Policy:
    """Make a policy as people ask for one: a preset, and what shall be otherwise.

    groups: of GROUPS, to "mxfp4", "int8" or "keep"; it holds for what is quantised already, too. tensors: the
    same for names, "PATTERN=FORMAT", where int8 may have a group and scales of its own: "int8:64",
    "int8:row:float16". group_size and scales: of int8 elsewhere; without scales they are bf16, or E8M0 where
    those hold MXFP4 exactly. Raises FormatError naming what is not one of the choices.
    """
    if preset not in PRESETS:
        raise FormatError(f"unknown preset {preset!r}: choose {', '.join(PRESETS)}")
    int8 = Int8(group_size, scales or "bf16")
    rules = [_read_rule(text, int8, exact=scales is None) for text in tensors]
    for group, choice in (groups or {}).items():
        if group not in GROUPS:
            raise FormatError(f"unknown group of weights {group!r}: choose {', '.join(GROUPS)}")
        rules.append(_read_rule(f"{GROUPS[group]}={choice}", int8, exact=scales is None))
    for rule in PRESETS[preset].rules:
        rules.append(replace(rule, format=int8) if isinstance(rule.format, Int8) else rule)
    return Policy(tuple(rules))


def _read_rule(text: str, int8: Int8, *, exact: bool) -> Rule:
    pattern, _, spelled = text.rpartition("=")
    match spelled.split(":"):
        case ["keep"]:
            return Rule(pattern, None, told=True)
        case ["mxfp4"]:
            return Rule(pattern, MXFP4(), told=True)
        case ["int8"]:
            return Rule(pattern, int8, told=True, exact=exact)
        case ["int8", group]:
            return Rule(pattern, Int8(_read_group(group), int8.scales), told=True, exact=exact)
        case ["int8", group, ("bf16" | "float16" | "e8m0") as scales]:
            return Rule(pattern, Int8(_read_group(group), scales), told=True)
    raise FormatError(f"{text!r} is no format for a weight: give PATTERN=mxfp4, int8, int8:64:bf16 or keep")


def _read_group(text: str) -> int | None:
    if text == "row":
        return None
    if not text.isdecimal():
        raise FormatError(f"{text!r} is no group of columns: give their number, or row")
    return int(text)
