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
        self._pool: Any = None

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
        with torch.cuda.graph(graph, pool=self._pool):
            result = step()
        if self._pool is None:
            self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
