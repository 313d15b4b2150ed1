"""JSON schema as the TypeScript that gpt-oss was trained to read, to the letter as openai-harmony writes it.

The layout has odd corners (where a nested object's description stands, what is quoted); they are
part of the format, and the tests hold them to openai-harmony's output.
"""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

SCALARS = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def to_typescript(schema: Any, indent: str = "") -> str:
    """Return the TypeScript type of a JSON schema; what it has no form for (anyOf, $ref) is ``any``."""
    if not isinstance(schema, dict):
        return "any"
    if isinstance(variants := schema.get("oneOf"), list):
        return "".join(f"\n{indent} | {_variant(variant, indent, quote=True)}" for variant in variants)
    match schema.get("type"):
        case list(types) if names := [name for name in types if isinstance(name, str)]:
            return " | ".join("number" if name == "integer" else name for name in names)
        case "object":
            return _object(schema, indent)
        case "string" if isinstance(schema.get("enum"), list):
            return " | ".join(f'"{v}"' for v in schema["enum"] if isinstance(v, str)) or "string"
        case "array" if "items" in schema:
            return to_typescript(schema["items"], indent) + "[]"
        case "array":
            return "Array<any>"
        case str(name):
            return SCALARS.get(name, "any")
    return "any"


def _object(schema: dict[str, Any], indent: str) -> str:
    lines = [f"{indent}// {text}" for text in _strings(schema.get("description"))]
    lines.append("{")
    properties = schema.get("properties")
    required = schema.get("required")
    for name, value in (properties if isinstance(properties, dict) else {}).items():
        optional = "" if isinstance(required, list) and name in required else "?"
        lines += _property(f"{name}{optional}", value if isinstance(value, dict) else {}, indent)
    lines.append(f"{indent}}}")
    return "\n".join(lines)


def _property(name: str, schema: dict[str, Any], indent: str) -> Iterator[str]:
    for title in _strings(schema.get("title")):
        yield f"{indent}// {title}"
        yield f"{indent}//"
    if "oneOf" not in schema:
        yield from (f"{indent}// {text}" for text in _strings(schema.get("description")))
    if isinstance(examples := schema.get("examples"), list) and examples:
        yield f"{indent}// Examples:"
        yield from (f'{indent}// - "{example}"' for example in examples if isinstance(example, str))
    if isinstance(variants := schema.get("oneOf"), list):
        yield from _union(name, schema, variants, indent)
        return
    comment = f" // {_default(schema)}" if "default" in schema and "oneOf" not in schema else ""
    yield f"{indent}{name}: {_nullable(schema, indent + '    ')},{comment}"


def _union(name: str, schema: dict[str, Any], variants: list[Any], indent: str) -> Iterator[str]:
    """Write a oneOf property: its description above, unless the first variant says the same."""
    description = next(_strings(schema.get("description")), None)
    first = variants[0].get("description") if variants and isinstance(variants[0], dict) else None
    above = description is not None and description != first
    if above:
        yield f"{indent}// {description}"
    if "default" in schema:
        yield f"{indent}// {_default(schema)}"
    yield f"{indent}{name}:"
    for i, variant in enumerate(variants):
        skip = first if above and i == 0 else description
        yield f"{indent} | {_variant(variant, indent, skip=skip)}"
    yield f"{indent},"


def _variant(schema: Any, indent: str, *, skip: str | None = None, quote: bool = False) -> str:
    """Write one variant of a oneOf and, behind it, its description (unless it is `skip`) and default."""
    if not isinstance(schema, dict):
        return "any"
    comments = [text for text in _strings(schema.get("description")) if text != skip]
    if "default" in schema:
        comments.append(_default(schema, quote))
    tail = f" // {' '.join(comments)}" if comments else ""
    return _nullable(schema, indent + "   ") + tail


def _nullable(schema: dict[str, Any], indent: str) -> str:
    text = to_typescript(schema, indent)
    return f"{text} | null" if schema.get("nullable") is True and "null" not in text else text


def _default(schema: dict[str, Any], quote: bool = False) -> str:
    """Write a default; a string is quoted, one of an enum only if `quote` says so, and then as JSON."""
    value = schema["default"]
    if not isinstance(value, str):
        return f"default: {compact_json(value)}"
    if isinstance(values := schema.get("enum"), list) and values:
        return f"default: {compact_json(value) if quote else value}"
    return f'default: "{value}"'


def _strings(value: Any) -> Iterator[str]:
    return iter([value] if isinstance(value, str) else [])


def compact_json(value: Any) -> str:
    """Return JSON without blanks, keys in the order given, numbers spelled as by Rust's serde_json."""
    match value:
        case dict():
            return "{" + ",".join(f"{compact_json(k)}:{compact_json(v)}" for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ",".join(map(compact_json, value)) + "]"
        case bool() | None | str():
            return json.dumps(value, ensure_ascii=False)
        case int() if -(1 << 63) <= value < 1 << 64:
            return str(value)
        case int() | float():
            return _float(float(value))
        case _:
            return "null"


def _float(value: float) -> str:
    if not math.isfinite(value):
        return "null"
    digits, _, exponent = repr(value).partition("e")
    if not exponent:
        return digits
    if int(exponent) == -5:  # the one decade where Python writes an exponent and serde_json does not
        return f"{Decimal(repr(value)):f}"
    return f"{digits}e{int(exponent)}"
