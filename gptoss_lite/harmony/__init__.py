"""Harmony, the conversation format of gpt-oss: typed messages to tokens, and sampled tokens to messages."""

from gptoss_lite.harmony.builtin import BROWSER, PYTHON
from gptoss_lite.harmony.chat import from_chat
from gptoss_lite.harmony.messages import (
    DeveloperContent,
    Message,
    Namespace,
    ResponseFormat,
    SystemContent,
    Tool,
    conversation_from_dict,
)
from gptoss_lite.harmony.parse import (
    Event,
    MessageEnd,
    MessageStart,
    TextDelta,
    TurnParser,
    parse_messages,
    turn_messages,
)
from gptoss_lite.harmony.render import render_messages, render_prompt, render_training

__all__ = [
    "BROWSER",
    "PYTHON",
    "DeveloperContent",
    "Event",
    "Message",
    "MessageEnd",
    "MessageStart",
    "Namespace",
    "ResponseFormat",
    "SystemContent",
    "TextDelta",
    "Tool",
    "TurnParser",
    "conversation_from_dict",
    "from_chat",
    "parse_messages",
    "render_messages",
    "render_prompt",
    "render_training",
    "turn_messages",
]
