"""The web page at /: one document, put together from its parts when the server starts."""

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_PART = re.compile(
    r'<(?:link rel="stylesheet" href="(?P<style>[^"]+)">|script src="(?P<script>[^"]+)"></script>)'
)


def page_routes() -> list[Route]:
    """Return the route that serves the page, complete in itself and forbidden to fetch from anywhere else."""
    document, hashes = _assemble()
    headers = _headers(hashes) | {"ETag": f'"{sha256(document).hexdigest()[:32]}"'}

    async def page(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(document, headers=headers, media_type="text/html")

    return [Route("/", page)]


def _assemble() -> tuple[bytes, dict[str, list[str]]]:
    """Set each part that index.html names in its place; return all that and the hash of each part."""
    folder = files("gptoss_lite.serve").joinpath("page")
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inline(match: re.Match[str]) -> str:
        kind = "style" if match["style"] else "script"
        text = folder.joinpath(match[kind]).read_text(encoding="utf-8")
        digest = b64encode(sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
        return f"<{kind}>{text}</{kind}>"

    document = _PART.sub(inline, folder.joinpath("index.html").read_text(encoding="utf-8"))
    return document.encode(), hashes


def _headers(hashes: dict[str, list[str]]) -> dict[str, str]:
    """Allow just these scripts and styles, requests to this server alone, and no text to be read as HTML."""
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(hashes["script"]),
        "style-src": " ".join(hashes["style"]),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-cache",  # a newer server's page is seen at once
    }
