"""What a request that fails tells its user."""

from __future__ import annotations

import torch

from fxgraft.errors import Error
from fxgraft.runtime.engine.request import Request


def not_finite(request: Request) -> Error:
    """The error of a request whose logits are NaN or infinite."""
    step = len(request.tokens)
    return Error(
        f"the logits of {request.id} are not finite at generation step {step} "
        f"(new token {step + 1})",
        "check the weights for NaN, and use float32 or bfloat16 if the model runs in float16",
    )


def as_error(error: Exception, doing: str) -> Error:
    """An exception of a step as an error with a remedy."""
    if isinstance(error, Error):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return Error(
            f"the device is out of memory while {doing}",
            "lower memory_bytes, max_batch or chunk_tokens of the engine",
        )
    return Error(f"{type(error).__name__} while {doing}: {error}", "see the server's log")
