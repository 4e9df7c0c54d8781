"""Errors that a client of the server gets, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

INVALID, AUTHENTICATION, PERMISSION, NOT_FOUND, LIMIT, SERVER = (
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
)


class ApiError(Exception):
    """An answer other than success: HTTP status, and the fields of OpenAI's `error` object.

    `param`: the request's field. `code`: a word for programs, such as `model_not_found`. `retry_after`: whole seconds after
    which the client may try again (the header Retry-After); None: it should not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind = status, message, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
