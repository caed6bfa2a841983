"""Errors as OpenAI's clients expect them: a status and ``{"error": {...}}``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import HTTPException
from pydantic import ValidationError

from fxgraft.errors import Error, InputError
from fxgraft.validation import suggestion

_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error",
    429: "rate_limit_error", 503: "unavailable_error", 504: "timeout_error",
}  # fmt: skip
_TYPES = ("str", "int", "float", "bool", "none", "constrained-str")
_MOST_LINES = 8


def refusal(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after: int | None = None,
) -> HTTPException:
    """An answer that is no success.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        param: the request's field that is wrong.
        code: for programs, for example ``model_not_found``.
        retry_after: seconds after which to try again.
    """
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    detail = error_object(status, message, param=param, code=code)
    return HTTPException(status, detail, headers)


def error_object(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The value of ``error`` in a body or an event."""
    kind = _KINDS.get(status, "server_error")
    return {"message": message, "type": kind, "param": param, "code": code}


def wrong_field(name: str, message: str, *, code: str | None = None) -> HTTPException:
    """Status 400 for one field of the request."""
    return refusal(400, f"'{name}' {message}", param=name, code=code)


def of_error(error: Exception) -> HTTPException:
    """An error of the engine: 400 where the request is to blame, else 500."""
    if isinstance(error, InputError):
        return refusal(400, _sentence(error))
    if isinstance(error, Error):
        return refusal(500, _sentence(error))
    return refusal(500, f"the server failed: {type(error).__name__}")


def of_validation(error: ValidationError, fields: Iterable[str]) -> HTTPException:
    """Status 400 for a body that is no JSON or has wrong fields; says what is wrong.

    Args:
        error: what pydantic found.
        fields: names of the request's fields.
    """
    found: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False, include_context=False, include_input=False):
        place, kind = _split(detail["loc"])
        message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if detail["type"] == "extra_forbidden":
            message = f"there is no such field{suggestion(place, fields)}"
        found.setdefault(place, []).append(kind or _lower(message))
    if "" in found:
        return refusal(400, f"the body is not valid: {found[''][0]}", code="invalid_json")
    lines = [f"'{place}': {_one_of(reasons)}" for place, reasons in found.items()]
    return refusal(400, "; ".join(lines[:_MOST_LINES]), param=next(iter(found)))


def _split(loc: tuple[int | str, ...]) -> tuple[str, str]:
    """The client's part of a place, and the type out of several that was tried there."""
    # In angle brackets are names of ours for forms that a field may have.
    parts = [str(part) for part in loc if not str(part).startswith("<")]
    depth = next((i for i, part in enumerate(parts) if "[" in part or part in _TYPES), len(parts))
    return ".".join(parts[:depth]), parts[depth] if depth < len(parts) else ""


def _one_of(reasons: list[str]) -> str:
    if len(reasons) == 1:
        return reasons[0]
    return f"should be one of {', '.join(dict.fromkeys(reasons))}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _sentence(error: Error) -> str:
    return f"{error.problem} ({error.remedy})" if error.remedy else error.problem
