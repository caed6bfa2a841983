"""Capturing a function in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UPS = 3


class GraphCapture:
    """Captures functions that always use the same tensors; all graphs share one memory pool.

    Each capture runs the function a few times before, so that kernels are compiled and chosen.
    """

    def __init__(self) -> None:
        self._anchor: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture; the result's tensor is overwritten by each call."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool()):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def _pool(self) -> Any:
        """The pool of all graphs; an empty graph keeps it alive when the others are gone."""
        if self._anchor is None:
            self._anchor = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._anchor):
                torch.zeros(1, device="cuda")
        return self._anchor.pool()
