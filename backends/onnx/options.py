"""Options of the ONNX backend."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxgraft.errors import InputError, LoweringError

FIRST_OPSET, LAST_OPSET = 18, 27
"""Opsets that are written; each is tested. 18 is the default: every runtime of use reads it."""

Optimization = Literal["none", "basic", "extended", "all"]


class OnnxOptions(BaseModel):
    """Options of the ONNX backend.

    Attributes:
        opset: ONNX opset of the files, 18 to 27.
        threads: CPU threads of onnxruntime; default as many as torch uses.
        optimization: how far onnxruntime rewrites the graph when it loads it.
        check: run the result and compare it with the Program.
        dense_weights: write weights that are packed as N:M sparse ones as dense ones; else the
            files hold them packed, and the operators that unpack them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    opset: int = 18
    threads: int | None = Field(default=None, ge=1)
    optimization: Optimization = "all"
    check: bool = True
    dense_weights: bool = False


def parse(options: dict[str, Any]) -> OnnxOptions:
    """Check options.

    Raises:
        InputError: one is unknown or wrong.
        LoweringError: the opset is not supported.
    """
    try:
        chosen = OnnxOptions(**options)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise InputError(
            f"backend 'onnx': option {'.'.join(map(str, wrong['loc']))!r}: {wrong['msg']}",
            f"the options are: {', '.join(OnnxOptions.model_fields)}",
        ) from error
    if not FIRST_OPSET <= chosen.opset <= LAST_OPSET:
        raise LoweringError(
            f"ONNX opset {chosen.opset} is not supported",
            f"choose one from {FIRST_OPSET} to {LAST_OPSET}",
        )
    return chosen
