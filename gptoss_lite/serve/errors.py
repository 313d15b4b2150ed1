"""What a client is told when a request cannot be served: OpenAI's error bodies."""

import re
from typing import Any

from gptoss_lite.errors import GptOssError


class ApiError(GptOssError):
    """An answer other than success; `param` names the field that is wrong."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API spells it."""
        return error_body(str(self), self.status, self.param, self.code)


_BREAKS = re.compile(r"[\s\x00-\x1f\x7f]+")


def error_body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Put an error into the object that clients expect; it takes one line, whatever a field was called."""
    kind = (
        "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    )
    message, param = _BREAKS.sub(" ", message), param and _BREAKS.sub(" ", param)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
