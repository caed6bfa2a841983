"""Running ONNX models in onnxruntime, with torch tensors in and out and no copies between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor

from fxgraft.backends.onnx.options import OnnxOptions
from fxgraft.backends.onnx.types import stored_dtype
from fxgraft.errors import LoweringError

ort = cast(Any, onnxruntime)  # it has no types
OrtValue = Any


class Session:
    """A model in onnxruntime.

    Args:
        path: of the ``.onnx`` file.
        inputs: names, in the order in which values are given.
        outputs: names, in the order in which results are wanted.
        options: threads and optimisation.
        prepack: rearrange weights for speed, which takes a second copy of them in memory.

    Raises:
        LoweringError: onnxruntime does not take the model.
    """

    def __init__(
        self,
        path: Path,
        inputs: Sequence[str],
        outputs: Sequence[str],
        options: OnnxOptions,
        *,
        prepack: bool = True,
    ) -> None:
        self.inputs, self.outputs = list(inputs), list(outputs)
        try:
            self._session: Any = ort.InferenceSession(
                str(path), _settings(options, prepack), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no common base
            raise _refused(path, error) from error

    def run(self, values: Sequence[OrtValue]) -> list[OrtValue]:
        """Run on values in the order of ``inputs``; results are in the order of ``outputs``.

        Raises:
            LoweringError: onnxruntime fails.
        """
        try:
            return self._session.run_with_ort_values(
                self.outputs, dict(zip(self.inputs, values, strict=True))
            )
        except Exception as error:  # onnxruntime's errors have no common base
            raise LoweringError(
                f"onnxruntime failed while running the model: {_text(error)}",
                "use backend 'torch', and report the model",
            ) from error


def to_ort(tensor: Tensor) -> OrtValue:
    """An onnxruntime value that shares a CPU tensor's memory."""
    tensor = tensor.detach().to("cpu", stored_dtype(tensor.dtype)).contiguous()
    return ort.OrtValue.ortvalue_from_numpy(tensor.numpy())


def to_torch(value: OrtValue) -> Tensor:
    """A tensor that shares an onnxruntime value's memory."""
    return cast(Any, torch).from_numpy(value.numpy())


def _settings(options: OnnxOptions, prepack: bool) -> Any:
    levels = ort.GraphOptimizationLevel
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads or torch.get_num_threads()
    settings.inter_op_num_threads = 1
    settings.graph_optimization_level = {
        "none": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[options.optimization]
    settings.log_severity_level = 3  # errors; they are raised as well
    if not prepack:
        settings.add_session_config_entry("session.disable_prepacking", "1")
    return settings


def _refused(path: Path, error: Exception) -> LoweringError:
    return LoweringError(
        f"onnxruntime {ort.__version__} does not take {path.name}: {_text(error)}",
        "choose a lower opset or a newer onnxruntime",
    )


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
