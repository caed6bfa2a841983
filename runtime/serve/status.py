"""The status page and the numbers that it shows."""

from __future__ import annotations

import functools
import time
from collections import Counter
from typing import Any

from fxgraft import pages
from fxgraft.runtime.serve.metrics import quantiles
from fxgraft.runtime.serve.service import Service
from fxgraft.version import __version__


@functools.lru_cache(maxsize=8)
def _page(name: str) -> str:
    return pages.render("serve", f"fxgraft · {name}", data={"model": name})


def page(service: Service) -> str:
    """A self-contained page that asks for ``status.json`` every second."""
    return _page(service.model.name)


def numbers(service: Service) -> dict[str, Any]:
    """What the page shows, as JSON values."""
    stats, model = service.worker.stats, service.model
    return {
        "state": service.state,
        "problem": service.worker.problem,
        "version": __version__,
        "time": time.time(),
        "model": {
            "name": model.name,
            "source": model.source,
            "backend": model.backend,
            "passes": list(model.passes),
            "context_length": model.context_length,
            "created": model.created,
        },
        "limits": {"max_batch": service.options.max_batch, "max_queue": service.options.max_queue},
        "requests": {
            "open": len(service.worker.open_streams),
            "queued": stats.queued,
            "prefilling": stats.prefilling,
            "running": stats.running,
            "finished": stats.finished - stats.cancelled - stats.failed,
            "cancelled": stats.cancelled,
            "failed": stats.failed,
            "refused": service.refused,
            "preemptions": stats.preemptions,
        },
        "tokens": {
            "per_second": service.throughput.rate,
            "prompt": stats.prompt_tokens,
            "generated": stats.generated_tokens,
            "reused": stats.reused_tokens,
        },
        "seconds": {
            "to_first_token": quantiles(service.metrics.recent_first),
            "per_output_token": quantiles(service.metrics.recent_each),
            "last_step": stats.step_seconds,
        },
        "steps": stats.steps,
        "blocks": {
            "total": stats.blocks_total,
            "used": stats.blocks_used,
            "cached": stats.blocks_cached,
        },
        "slots": {"total": stats.slots_total, "used": stats.slots_used},
        "layers": _layers(service),
        "policy": dict(stats.policy),
    }


def _layers(service: Service) -> list[dict[str, Any]]:
    """The op of each layer, and how many running requests use which."""
    model = service.model
    counts = [Counter[str]() for _ in model.layers]
    for number, ops in service.worker.stats.layer_ops.items():
        layer = model.op_layers[number] if number < len(model.op_layers) else -1
        if 0 <= layer < len(counts):
            counts[layer].update(ops)
    kinds = enumerate(zip(model.layers, counts, strict=True))
    return [{"index": index, "kind": kind, "ops": ops} for index, (kind, ops) in kinds]
