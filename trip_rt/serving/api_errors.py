"""Errors as clients of the API see them: OpenAI's envelope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trip_rt.errors import InputError, one_line

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than the one that was asked for: a status, a line for people, the field it is about, a word for
    programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def envelope(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@contextmanager
def of_inputs(params: dict[str, str]) -> Iterator[None]:
    """An InputError inside is 400 with the runtime's own line; `params` says which field of a request the line's first
    words name."""
    try:
        yield
    except InputError as error:
        line = one_line(error, 500)
        raise ApiError(400, line, params.get(line.partition(":")[0])) from error
