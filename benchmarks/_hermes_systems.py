"""Clients, networks and workloads of the published case studies of HERMES, as system files."""

from __future__ import annotations

from typing import Any

Content = dict[str, Any]
STRATEGIES = ("continuous", "chunked", "12P/20D", "16P/16D", "20P/12D")
"""Batching of aggregated clients, or how 32 clients are divided into prefill and decode."""
KV_BYTES = 2 * 80 * 8 * 128 * 2
"""Keys and values per token of Llama-3.1-70B in bfloat16."""
# Medians and means of the public Azure traces of 2023, as lognormal laws.
LENGTHS: dict[str, Content] = {
    "conversation": {
        "prompt": {"kind": "lognormal", "median": 1020.0, "deviation": 0.5, "maximum": 14050},
        "output": {"kind": "lognormal", "median": 129.0, "deviation": 0.99, "maximum": 1000},
    },
    "code": {
        "prompt": {"kind": "lognormal", "median": 1500.0, "deviation": 0.79, "maximum": 7437},
        "output": {"kind": "lognormal", "median": 13.0, "deviation": 1.24, "maximum": 1899},
    },
}


def cost(devices: int, weights: str = "float8", model: str = "llama-3.1-70b") -> Content:
    """A dense model on H100s."""
    return {"kind": "dense", "model": model, "device": "h100-sxm", "weights": weights,
            "state": "bfloat16", "devices": devices}  # fmt: skip


def engines(strategy: str, count: int, devices: int, weights: str = "float8") -> list[Content]:
    """Clients of Llama-3.1-70B on so many devices each, nodes of eight devices.

    A strategy ``aP/bD`` divides the clients in the proportion of a to b.
    """
    common: Content = {
        "cost": cost(devices, weights), "per_node": 8 // devices, "max_sequences": 512,
        "max_batched_tokens": 32768,
    }  # fmt: skip
    if "/" not in strategy:
        budget = 1024 if strategy == "chunked" else 32768
        return [{**common, "name": "engine", "count": count, "batching": strategy,
                 "max_batched_tokens": budget}]  # fmt: skip
    prefill, decode = (int(part[:-1]) for part in strategy.split("/"))
    first = max(round(count * prefill / (prefill + decode)), 1)
    nodes = -(-first * devices // 8)
    return [
        {**common, "name": "prefill", "role": "prefill", "count": first, "batching": "continuous"},
        {**common, "name": "decode", "role": "decode", "count": count - first, "node": nodes},
    ]


def system(
    clients: list[Content], workload: Content, rate: float, seconds: float, **more: Any
) -> Content:
    """A system under a Poisson load for so many seconds."""
    load = {"name": "load", "requests": max(int(rate * seconds), 50),
            "arrivals": {"kind": "poisson", "rate": float(rate)}, **workload}  # fmt: skip
    return {"seed": 1, "clients": clients, "workloads": [load], "logs": ["requests"],
            "network": {"preset": "h100"}, "routing": {"default": "load"}, **more}  # fmt: skip


def thoughts(trace: str, branches: int) -> Content:
    """Requests that think along parallel branches of 2,000 tokens."""
    return {
        "prompt": LENGTHS[trace]["prompt"],
        "output": {"kind": "normal", "mean": 2000.0, "deviation": 600.0},
        "chain": ["prefill", {"kind": "reasoning", "branches": branches}],
    }


SIZES: dict[str, Content] = {
    # Two matrices of 3,072 are as much work as a gated perceptron of 2,048.
    "E5-base": {"name": "e5-base", "layers": 12, "hidden": 768, "heads": 12, "kv_heads": 12,
                "head_dim": 64, "intermediate": 2048, "vocabulary": 1},
    "Mistral-7B": {"name": "mistral-7b", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8,
                   "head_dim": 128, "intermediate": 14336, "vocabulary": 1},
}  # fmt: skip
RATES = {"grace": (7.14e12, 500e9), "xeon-8480": (7.17e12, 307.2e9)}


def search(embedder: str, embed_on: str, search_on: str, *, grouped: bool = False) -> list[Content]:
    """An embedding client and one that searches 4 M lists of 5,000 vectors.

    Args:
        embedder: of ``SIZES``.
        embed_on, search_on: devices.
        grouped: whether the centroids have a coarse index of their own.
    """
    embed = {"kind": "dense", "model": SIZES[embedder], "device": embed_on,
             "weights": "bfloat16"}  # fmt: skip
    flops, bandwidth = RATES[search_on]
    index: Content = {
        "dimension": 768, "centroids": 4_000_000, "probes": 50, "vectors_per_list": 5000,
        "subquantizers": 64, "candidates": 20, "flops": flops, "bandwidth": bandwidth,
    }  # fmt: skip
    if grouped:
        index |= {"groups": 2000, "group_probes": 20}
    return [
        {"kind": "rag", "name": "embedder", "embed": embed, "batch": 32},
        {"kind": "rag", "name": "index", "index": index, "batch": 32},
    ]
