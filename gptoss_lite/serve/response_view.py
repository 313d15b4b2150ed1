"""A turn as /v1/responses shows it: its items, and the events by which they grow."""

import time
import uuid
from typing import Any, Literal

from gptoss_lite.harmony.chat import call_name
from gptoss_lite.serve.logprobs import ContentLogprobs
from gptoss_lite.serve.response_types import ResponseRequest
from gptoss_lite.serve.service import Answer, Events, Service
from gptoss_lite.serve.wire import builtin, encode
from gptoss_lite.stream import ANALYSIS, GenerationEvent, Usage

Fields = dict[str, Any]
Kind = Literal["reasoning", "message", "function_call"]
_TEXT = {"reasoning": "reasoning_text", "message": "output_text"}
_PREFIX = {"reasoning": "rs", "message": "msg", "function_call": "fc"}


class ResponseView:
    """The one answer of a request, item by item; the whole is what its events add up to."""

    def __init__(self, service: Service, request: ResponseRequest, wants_logprobs: bool) -> None:
        self._logprobs = ContentLogprobs(service.tokenizer) if wants_logprobs else None
        self._streams = bool(request.stream)
        self._items: list[_Item] = []
        self._number = 0
        self._written: list[bytes] = []
        self._response: Fields = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": (request.reasoning and request.reasoning.effort) or "medium",
                "summary": None,
            },
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": builtin(request.text and request.text.format) or {"type": "text"}},
            "tool_choice": builtin(request.tool_choice) or "auto",
            "tools": builtin(request.tools or []),
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
        }

    def feed(self, events: Events) -> bytes:
        """See View."""
        if self._number == 0:
            self._tell("response.created", response=self._response)
            self._tell("response.in_progress", response=self._response)
        for _, event in events:
            self._take(event)
        return self._told()

    def finish(self, answer: Answer) -> bytes:
        """See View."""
        self._complete(answer.usage, answer.account.finish_reasons[0])
        self._tell(f"response.{self._response['status']}", response=self._response)
        return self._told()

    def body(self, answer: Answer) -> Fields:
        """See View."""
        self._complete(answer.usage, answer.account.finish_reasons[0])
        return self._response

    def failed(self, error: Fields) -> bytes:
        """See View."""
        what = error["error"]
        self._response |= {
            "status": "failed",
            "error": {"code": what["code"] or what["type"], "message": what["message"]},
            "output": [item.shown("incomplete") for item in self._items],
        }
        self._tell("response.failed", response=self._response)
        return self._told()

    def _complete(self, usage: Usage, reason: str) -> None:
        cut = reason == "length"
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [item.shown() for item in self._items],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def _take(self, event: GenerationEvent) -> None:
        entries: list[Any] = []
        if self._logprobs is not None and event.message is not None and event.is_content:
            entries = [builtin(entry) for entry in self._logprobs.feed(event)]
        if event.message is not None and (event.text or event.is_call):
            self._grow(self._item(event), event.text, entries)
        if event.finish_reason is not None:
            self._close("incomplete" if event.finish_reason == "length" else "completed")

    def _item(self, event: GenerationEvent) -> "_Item":
        """Return the item that an event's text belongs to, a new one at the beginning of a message."""
        if self._items and self._items[-1].message == event.message:
            return self._items[-1]
        self._close("completed")
        kind: Kind = (
            "function_call" if event.is_call else "reasoning" if event.channel == ANALYSIS else "message"
        )
        item = _Item(
            kind, len(self._items), event.message, call_name(event.recipient) if event.is_call else ""
        )
        self._tell("response.output_item.added", output_index=item.index, item=item.shown("in_progress"))
        if kind != "function_call":
            self._tell("response.content_part.added", **item.place, part=item.part())
        self._items.append(item)
        return item

    def _grow(self, item: "_Item", text: str, entries: list[Any]) -> None:
        item.text += text
        item.logprobs += entries
        match item.kind:
            case _ if not text:
                pass
            case "function_call":
                self._tell("response.function_call_arguments.delta", **item.name, delta=text)
            case "reasoning":
                self._tell("response.reasoning_text.delta", **item.place, delta=text)
            case "message":
                self._tell("response.output_text.delta", **item.place, delta=text, logprobs=entries)

    def _close(self, status: str) -> None:
        """Tell that the last item is done, unless that was told."""
        if not self._items or self._items[-1].status != "in_progress":
            return
        item = self._items[-1]
        item.status = status
        if item.kind == "function_call":
            self._tell(
                "response.function_call_arguments.done", **item.name, name=item.function, arguments=item.text
            )
        else:
            logprobs = {"logprobs": item.logprobs} if item.kind == "message" else {}
            self._tell(f"response.{_TEXT[item.kind]}.done", **item.place, text=item.text, **logprobs)
            self._tell("response.content_part.done", **item.place, part=item.part())
        self._tell("response.output_item.done", output_index=item.index, item=item.shown())

    def _tell(self, kind: str, **fields: Any) -> None:
        if not self._streams:
            return
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        self._written.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), encode(event)))

    def _told(self) -> bytes:
        told, self._written = b"".join(self._written), []
        return told


class _Item:
    """One message of the turn, as far as it has come."""

    def __init__(self, kind: Kind, index: int, message: int | None, function: str) -> None:
        self.kind: Kind = kind
        self.index = index
        self.message = message
        self.function = function
        self.text = ""
        self.logprobs: list[Any] = []
        self.status = "in_progress"
        self._id = f"{_PREFIX[kind]}_{uuid.uuid4().hex}"
        self._call_id = f"call_{uuid.uuid4().hex[:24]}"

    @property
    def name(self) -> Fields:
        """Which item an event is about."""
        return {"item_id": self._id, "output_index": self.index}

    @property
    def place(self) -> Fields:
        """Which part of it: there is one."""
        return {**self.name, "content_index": 0}

    def part(self) -> Fields:
        """Return the part with the text so far."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def shown(self, status: str | None = None) -> Fields:
        """Return the item as clients have it."""
        shown: Fields = {"type": self.kind, "id": self._id, "status": status or self.status}
        match self.kind:
            case "function_call":
                return shown | {"call_id": self._call_id, "name": self.function, "arguments": self.text}
            case "reasoning":
                return shown | {"summary": [], "content": [self.part()] if self.text else []}
            case "message":
                return shown | {"role": "assistant", "content": [self.part()] if self.text else []}
