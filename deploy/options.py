"""What an operator decides about replicas: arguments of the application, or the environment."""

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt, TypeAdapter, model_validator

from gptoss_lite.serve.settings import LOOPBACK, Settings
from gptoss_lite.sizes import parse_size

ENVIRONMENT = "GPTOSS_LITE_"
_SIZES = ("max_body", "device_memory")
_LISTS = ("api_keys", "cors_origins", "allowed_hosts")
_OF_THE_SOCKET = {"head_seconds", "idle_seconds", "write_seconds"}  # that is Ray's proxy's
_SPARE = 64  # requests that no model answers


class Options(BaseModel):
    """How many replicas, what each loads, and, in the fields of `Settings`, how they serve it.

    What is not given is taken from the environment: `threads` from GPTOSS_LITE_THREADS, and so on; keys, with
    spaces between them, from GPTOSS_LITE_API_KEY. A text will do for a size, as in 8MB, and for a list, with
    commas in it.

    model: a name, or a path that every machine has. name: what clients call it. replicas: engines. gateways:
    processes that pass requests on to them. device: "cuda" gives each replica a GPU. threads: CPU threads of
    a replica, by default its share of all there are. device_memory, cache_tokens, activations, dense: as
    `gptoss_lite.load` has them. max_sequences: answers at once, of each replica. drain_seconds: time for
    answers under way when a replica is to stop. access_log: whether replicas write one.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str = "demo"
    name: str | None = None
    replicas: PositiveInt = 1
    gateways: PositiveInt = 1
    device: Literal["cpu", "cuda"] = "cpu"
    threads: PositiveInt | None = None
    device_memory: PositiveInt | None = None
    cache_tokens: PositiveInt | None = None
    activations: Literal["accurate", "int8"] | None = None
    dense: Literal["int8"] | None = None
    max_sequences: PositiveInt = 16
    drain_seconds: NonNegativeFloat = 30
    access_log: bool = True

    @property
    def settings(self) -> Settings:
        """How each replica serves."""
        given = {"allowed_hosts": LOOPBACK, **(self.model_extra or {}), "model": self.name or self.model}
        return TypeAdapter(Settings).validate_python(given)

    @property
    def most_requests(self) -> int:
        """What Ray may hand one replica: more than that accepts, so that its own refusal is what is told."""
        return self.max_sequences + self.settings.max_waiting + _SPARE

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        known = {*cls.model_fields, *(field.name for field in fields(Settings))} - _OF_THE_SOCKET
        if unknown := set(given) - known:
            raise ValueError(f"unknown option {min(unknown)!r}: choose from {', '.join(sorted(known))}")
        values = {name: os.environ.get(ENVIRONMENT + name.upper()) for name in known}
        values["api_keys"] = ",".join(os.environ.get(f"{ENVIRONMENT}API_KEY", "").split())
        values |= given
        return {name: _read(name, value) for name, value in values.items() if value not in (None, "")}

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.settings  # what is wrong there is told before anything starts
        return self


def _read(name: str, value: Any) -> Any:
    """Turn the text of a size or a list into what it stands for."""
    if name in _SIZES and isinstance(value, str):
        return parse_size(value)
    if name in _LISTS and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value
