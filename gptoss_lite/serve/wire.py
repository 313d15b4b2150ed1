"""JSON in and out: bodies are typed records, and what does not fit them is refused by name."""

import re
from typing import Any, TypeVar

import msgspec

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
_LONGEST = 200


def decode(body: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Read a request's body; ApiError, status 400, says which field is wrong and how."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _refused(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(f"the body is no sound JSON: {error}") from None
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None


def convert(value: Any, kind: Any, path: str) -> Any:
    """Read a part of a body, already parsed, as another record; errors name it under `path`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _refused(str(error), path) from None


def refused(error: RequestError) -> ApiError:
    """Say who is to blame for a value that was refused further in: those messages begin with the field."""
    field = _FIELD.match(str(error))
    return ApiError(str(error), param=field["path"] if field else None)


def builtin(value: Any) -> Any:
    """Turn records into dictionaries."""
    return msgspec.to_builtins(value)


def _refused(text: str, prefix: str = "") -> ApiError:
    at = _AT.fullmatch(text)
    problem, path = (at["problem"], at["path"]) if at else (text, "")
    path = f"{prefix}.{path}".strip(".")
    named = _UNKNOWN.fullmatch(problem) or _MISSING.fullmatch(problem)
    if named:
        path = f"{path}.{named['name']}" if path else named["name"]
        problem = "is missing" if problem.startswith("Object missing") else "is no field that is supported"
    else:
        problem = f"is not right: {problem[0].lower()}{problem[1:]}"
        if re.search(r"content\[(\d+|\.\.\.)\]\.type$", path):
            problem += "; gpt-oss reads text only"
    path = path[:_LONGEST]
    return ApiError(f"{path or 'the body'} {problem[:_LONGEST]}", param=path or None)
