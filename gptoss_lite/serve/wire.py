"""JSON in and out: bodies are typed records, and what does not fit them is refused by name."""

import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from gptoss_lite.errors import RequestError
from gptoss_lite.serve.errors import ApiError


class Record(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An object whose fields are all known; one that may be left out may be null, too."""


class Reply(msgspec.Struct, omit_defaults=True, kw_only=True):
    """An object that the server writes; a field that stands at its default is left out."""


Body = TypeVar("Body", bound=Record)

encode = msgspec.json.Encoder().encode
_AT = re.compile(r"(?P<problem>.*) - at `(?:key in )?\$\.?(?P<path>.*)`", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`", re.DOTALL)
_FIELD = re.compile(r"(?:a token of )?(?P<path>(?!(?:an?|the|there)\b)[a-z_]+(?:\[\d+\]|\.[a-z_]+)*)")
_STEP = re.compile(r"\[[^\]]*\]|[^.\[\]]+")
_LONGEST = 200


def decode(body: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Read a request's body; ApiError, status 400, says which field is wrong and how."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _refused(str(error), decoder.type) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(f"the body is no sound JSON: {error}") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None


def convert(value: Any, kind: Any, path: str) -> Any:
    """Read a part of a body, already parsed, as another record; errors name it under `path`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _refused(str(error), kind, path) from None


def refused(error: RequestError) -> ApiError:
    """Say who is to blame for a value that was refused further in: those messages begin with the field."""
    field = _FIELD.match(str(error))
    return ApiError(str(error), param=field["path"] if field else None)


def builtin(value: Any) -> Any:
    """Turn records into dictionaries."""
    return msgspec.to_builtins(value)


def _refused(text: str, kind: Any, prefix: str = "") -> ApiError:
    """Put msgspec's message about a value of some kind into a line that says what would do."""
    at = _AT.fullmatch(text)
    problem, inner = (at["problem"], at["path"]) if at else (text, "")
    path = f"{prefix}.{inner}".strip(".")
    named = _UNKNOWN.fullmatch(problem) or _MISSING.fullmatch(problem)
    if named:
        path = f"{path}.{named['name']}" if path else named["name"]
        problem = "is missing" if problem.startswith("Object missing") else "is no field that is supported"
    elif problem.startswith("Expected `null`"):
        problem = "is not supported"
    else:
        problem = f"is not right: {problem[0].lower()}{problem[1:]}"
        if allowed := _allowed(kind, inner):
            problem += f", and there is {' or '.join(allowed)}"
        if re.search(r"content\[(\d+|\.\.\.)\]\.type$", path):
            problem += "; gpt-oss reads text only"
    path = path[:_LONGEST]
    return ApiError(f"{path or 'the body'} {problem[:_LONGEST]}", param=path or None)


def _allowed(kind: Any, path: str) -> list[str]:
    """List what a field may be, where that is one of some names."""
    places = [inspect.type_info(kind)]
    for step in _STEP.findall(path):
        places = [inner for place in places for inner in _inside(place, step)]
    names = [name for place in places for option in _options(place) for name in _names(option)]
    return list(dict.fromkeys(names))


def _options(place: inspect.Type) -> tuple[inspect.Type, ...]:
    return place.types if isinstance(place, inspect.UnionType) else (place,)


def _names(place: inspect.Type) -> list[str]:
    return [json.dumps(value) for value in place.values] if isinstance(place, inspect.LiteralType) else []


def _inside(place: inspect.Type, step: str) -> Iterator[inspect.Type]:
    """Go one step on: to a field, or to the items of a list."""
    for option in _options(place):
        match option:
            case inspect.ListType(item_type=item) if step[0] == "[":
                yield item
            case inspect.StructType(tag_field=tag_field, tag=str(tag)) if step == tag_field:
                yield inspect.LiteralType((tag,))
            case inspect.StructType(fields=fields):
                yield from (field.type for field in fields if field.encode_name == step)
