"""What every request passes before anything of it is parsed, and what every answer carries."""

from __future__ import annotations

import json
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trip_rt.serving.api_errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_READS = ("GET", "HEAD", "OPTIONS")
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; object-src 'none'; base-uri 'none';"
    " form-action 'self'; frame-ancestors 'none'"
)
_DOCS_POLICY = _POLICY + "; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses a body larger than `most_bytes`, whether or not its length is announced; a request for another host than
    `hosts`, where there are any, which a page elsewhere could reach by a name of its own; and a change that a page
    elsewhere asks for."""

    def __init__(self, app: ASGIApp, most_bytes: int, hosts: Iterable[str] = ()):
        self._app, self._most_bytes, self._hosts = app, most_bytes, set(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, begun = Headers(scope=scope), False
        docs = scope["path"].startswith("/docs")

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                sent = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    sent[name] = value
                sent["Content-Security-Policy"] = _DOCS_POLICY if docs else _POLICY
                sent.setdefault("Cache-Control", "no-store")
            await send(message)

        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most_bytes:
                raise self._too_large(f"more than {self._most_bytes}")
            return message

        try:
            self._check(scope["method"], headers)
            await self._app(scope, counted, answer)
        except ApiError as error:
            if begun:
                raise
            body = json.dumps(error.envelope()).encode()
            head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            # What is left of the body is not read: the connection cannot be used again.
            head.append((b"connection", b"close"))
            await answer({"type": "http.response.start", "status": error.status, "headers": head})
            await answer({"type": "http.response.body", "body": body})

    def _check(self, method: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._hosts and _hostname(host) not in self._hosts:
            raise ApiError(403, "host: found another name than this server's; ask for it at localhost", code="bad_host")
        if method not in _READS:
            site, origin = headers.get("sec-fetch-site"), headers.get("origin")
            elsewhere = site is not None and site not in ("same-origin", "none")
            if elsewhere or (origin is not None and urlsplit(origin).netloc != host):
                raise ApiError(
                    403, "origin: found a page of another site, expected this server's own", code="bad_origin"
                )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._most_bytes:
            raise self._too_large(length[:20])

    def _too_large(self, found: str) -> ApiError:
        return ApiError(
            413,
            f"body: found {found} bytes, expected at most {self._most_bytes}; scale the picture down",
            code="too_large",
        )


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
