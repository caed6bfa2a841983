"""API keys."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable

from fastapi import Request

from fxgraft.errors import InputError
from fxgraft.runtime.serve.refusals import refusal

VARIABLE = "FXGRAFT_API_KEYS"


def keys_from_environment() -> tuple[str, ...]:
    """The keys in ``FXGRAFT_API_KEYS``, separated by commas; none: everybody may ask.

    Raises:
        InputError: the variable is set and has no key in it.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return ()
    keys = tuple(key for part in text.split(",") if (key := part.strip()))
    if not keys:
        raise InputError(
            f"the environment variable {VARIABLE} is set and holds no key",
            "set it to keys separated by commas, or unset it to let everybody in",
        )
    return keys


class KeyCheck:
    """A dependency of routes: refuses requests without a key.

    Args:
        keys: those that are let in; none lets in everybody.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = [key.encode() for key in keys]

    async def __call__(self, request: Request) -> None:
        """Check one request.

        Raises:
            HTTPException: status 401.
        """
        if not self._keys:
            return
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Every key is compared, each in constant time, so that the time says nothing about them.
        # Headers are Latin-1; any text may stand in one.
        word = given.strip().encode("latin-1", errors="replace")
        matches = [hmac.compare_digest(word, key) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise refusal(
                401,
                "no valid API key: send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )
