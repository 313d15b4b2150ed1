"""Constraining one assistant turn: JSON answers, forced calls, strict arguments, a reasoning budget."""

from gptoss_lite.constrain.grammar import Grammar, GrammarCompiler
from gptoss_lite.constrain.headers import TurnRules
from gptoss_lite.constrain.turn import TurnConstraint

__all__ = ["Grammar", "GrammarCompiler", "TurnConstraint", "TurnRules"]
