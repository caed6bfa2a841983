"""The ONNX backend: what the rest of fxgraft calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fxgraft.backend import Backend
from fxgraft.backends.onnx.options import OnnxOptions, parse
from fxgraft.collectives import require_whole
from fxgraft.packed_weights import unpack_weights
from fxgraft.program import Program

if TYPE_CHECKING:
    from fxgraft.backends.onnx.compiled import OnnxCompiled

_PACKAGES = ("onnx", "onnxruntime")


class OnnxBackend(Backend):
    """Writes Programs as ONNX and runs them in onnxruntime on the CPU."""

    name: ClassVar[str] = "onnx"

    def available(self) -> str | None:
        """Which package is missing, if one is."""
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None

    def check_options(self, options: Mapping[str, Any]) -> OnnxOptions:
        """The options as an object; see ``Backend.check_options``."""
        return parse(dict(options))

    def lower(self, program: Program, **options: Any) -> OnnxCompiled:
        """See ``Backend.lower``; options are the fields of ``OnnxOptions``.

        Operators are translated at the first call or generation, and fail then.
        """
        from fxgraft.backends.onnx.compiled import OnnxCompiled

        require_whole(program, "backend 'onnx' runs in one process")
        chosen = parse(options)
        return OnnxCompiled(_stored(program, chosen), chosen)

    def export(self, program: Program, folder: Path, **options: Any) -> Path:
        """Write a Program as ONNX files and check them in onnxruntime.

        Causal language models become ``prefill.onnx``, ``decode.onnx`` and ``weights.bin``, others
        ``model.onnx``, with ``weights.bin`` if they are larger than 1.5 GB; ``fxgraft.json`` says
        what is there. See ``docs/onnx.md``.

        Args:
            program: what to write; it is not changed.
            folder: is created; an older export there is replaced when all is well.
            options: fields of ``OnnxOptions``.

        Raises:
            LoweringError: a node has no ONNX form, or the result differs from the Program.
            InputError: an option is unknown or wrong.
            SerializationError: the folder cannot be written, or holds something else.
        """
        from fxgraft.backends.onnx.exporting import export

        require_whole(program, "ONNX files hold whole models")
        chosen = parse(options)
        return export(_stored(program, chosen), folder, chosen)


def _stored(program: Program, options: OnnxOptions) -> Program:
    """The Program, or a copy with the weights as they are to be stored."""
    if not options.dense_weights:
        return program
    dense = program.copy()
    unpack_weights(dense)
    return dense


BACKEND = OnnxBackend()
