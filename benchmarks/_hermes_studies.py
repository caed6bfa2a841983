"""The published case studies of HERMES: what is simulated, and which statements then hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from _hermes_systems import (
    KV_BYTES,
    LENGTHS,
    STRATEGIES,
    Content,
    cost,
    engines,
    search,
    system,
    thoughts,
)

Key = tuple[Any, ...]
Run = Callable[[Mapping[Key, Content]], Mapping[Key, dict[str, Any]]]
"""Simulates systems; gives the ``total`` of each summary."""
Lines = dict[str, tuple[Sequence[float], Sequence[float]]]


@dataclass(frozen=True)
class Statement:
    """What the publication says, whether the simulation agrees, and its figures."""

    text: str
    holds: bool
    figures: str


@dataclass(frozen=True)
class Panel:
    """A plot: lines by label."""

    title: str
    x: str
    y: str
    lines: Lines


@dataclass(frozen=True)
class Study:
    """A case study, simulated."""

    name: str
    statements: list[Statement]
    panels: list[Panel]


def per_second(total: dict[str, Any]) -> float:
    """Output tokens per second."""
    return float(total["output_tokens_per_second"])


def reasoning(run: Run) -> Study:
    """Parallel thoughts of Llama-3.1-70B on 64 H100s, 8 in each client."""
    strategies = ("continuous", "chunked", "4P/4D", "2P/6D", "1P/7D")
    loads, rates = {"conversation": 8, "code": 4}, (2, 5, 10, 20, 40)
    found = run({
        (trace, strategy, rate): system(
            engines(strategy, 8, 8, "bfloat16"), thoughts(trace, branches), rate, 30.0
        )
        for trace, branches in loads.items() for strategy in strategies for rate in rates
    })  # fmt: skip
    ttft = {key: total["ttft"]["p50"] for key, total in found.items()}
    tpot = {key: total["tpot"]["p50"] for key, total in found.items()}
    limit, rate = 0.5, 5
    conversation = {one: found["conversation", one, rate] for one in strategies}
    best = max(map(per_second, conversation.values()))
    share = per_second(conversation["continuous"]) / best
    start = conversation["continuous"]["ttft"]["p50"]
    slower = [ttft["conversation", "chunked", r] / ttft["conversation", "continuous", r]
              for r in rates]  # fmt: skip
    last = ("code", "1P/7D", rate)
    gain = tpot["code", "continuous", rate] / tpot[last]
    wait = ttft[last] / ttft["code", "continuous", rate]
    statements = [
        Statement("conversation: chunked has the worse time to first token",
                  min(slower) > 1.0, ", ".join(f"{one:.2f}x" for one in slower)),
        Statement("conversation: continuous meets the objective of the first token (p50 0.5 s) "
                  "within 5 % of the best throughput", start <= limit and share >= 0.95,
                  f"{start:.3f} s, {100 * share:.0f} %"),
        Statement("code: with more decode clients tokens come much faster (1.2x) than continuous, "
                  "with a similar time to first token (1.2x)", gain >= 1.2 and wait <= 1.2,
                  f"{gain:.2f}x faster, first token {wait:.2f}x"),
    ]  # fmt: skip
    return Study("reasoning", statements, [
        _panel(f"{trace}: {name}", "requests/s", "ms", values, trace, strategies, rates, 1e3)
        for trace in loads
        for name, values in (("time to first token, p50", ttft), ("per token, p50", tpot))
    ])  # fmt: skip


def retrieval(run: Run) -> Study:
    """Where to embed and search: Llama-3.1-8B on one H100 behind 20 documents of 512 tokens."""
    places = {"Grace": ("grace", "grace"), "Xeon": ("xeon-8480", "xeon-8480"),
              "A100 + Grace": ("a100-sxm-80gb", "grace")}  # fmt: skip
    chain = ["embed", {"kind": "retrieve", "docs": 20, "tokens_per_doc": 512}, "prefill", "decode"]
    link = {"bandwidth": 32e9, "latency": 10e-6}
    engine: Content = {"name": "engine", "cost": cost(1, "bfloat16", "llama-3.1-8b"),
                       "max_batched_tokens": 32768, "batching": "continuous"}  # fmt: skip
    found = run({
        (embedder, place): system(
            [engine, *search(embedder, *devices)], {**LENGTHS["conversation"], "chain": chain},
            0.5, 1000.0, network={"inside_node": link, "text_bytes": 4},
        )
        for embedder in ("E5-base", "Mistral-7B") for place, devices in places.items()
    })  # fmt: skip
    start = {key: total["ttft"]["p50"] for key, total in found.items()}
    alone = start["E5-base", "A100 + Grace"]
    moved = start["Mistral-7B", "A100 + Grace"]
    on_cpu = {place: start["Mistral-7B", place] for place in ("Grace", "Xeon")}
    shares = [total["transfer"]["mean"] / total["e2e"]["mean"] for total in found.values()]
    statements = [
        Statement(f"a 7 B embedder on {place} takes over half of the time to first token",
                  seconds > 2 * alone, f"{seconds:.2f} s against {alone:.2f} s with E5-base")
        for place, seconds in on_cpu.items()
    ]  # fmt: skip
    statements += [
        Statement("on an A100 it adds under a tenth", moved < 1.1 * alone, f"{moved:.2f} s"),
        Statement("transfers are under 1 % of the time", max(shares) < 0.01,
                  f"at most {100 * max(shares):.3f} %"),
    ]  # fmt: skip
    lines: Lines = {
        embedder: (list(range(len(places))), [start[embedder, place] for place in places])
        for embedder in ("E5-base", "Mistral-7B")
    }
    title = "first token, p50; embed + search on " + ", ".join(places)
    return Study("retrieval", statements, [Panel(title, "place", "s", lines)])


# The published recommendations: least time to first token, most throughput, most per joule.
CHUNKED_OR = frozenset({"chunked", "disaggregated"})
DISAGGREGATED, CONTINUOUS = frozenset({"disaggregated"}), frozenset({"continuous"})
RECOMMENDED: dict[tuple[str, str], tuple[frozenset[str], frozenset[str], frozenset[str]]] = {
    ("code", "prefill-decode"): (CONTINUOUS | DISAGGREGATED, CHUNKED_OR, DISAGGREGATED),
    ("code", "RAG"): (CONTINUOUS, CHUNKED_OR, DISAGGREGATED),
    ("code", "retrieved KV"): (CONTINUOUS | DISAGGREGATED, CHUNKED_OR, DISAGGREGATED),
    ("conversation", "prefill-decode"): (DISAGGREGATED, DISAGGREGATED, DISAGGREGATED),
    ("conversation", "RAG"): (CONTINUOUS, CHUNKED_OR, DISAGGREGATED),
    ("conversation", "retrieved KV"): (DISAGGREGATED, CHUNKED_OR, DISAGGREGATED),
}


def batching(run: Run) -> Study:
    """Batching strategies of 32 clients of two H100s, for three kinds of pipelines."""
    rates = {"prefill-decode": (1.0, 3.0, 5.0), "RAG": (0.5, 1.5, 3.0),
             "retrieved KV": (1.0, 3.0, 5.0)}  # fmt: skip
    found = run({
        (trace, pipeline, strategy, rate): _pipeline(trace, pipeline, strategy, 32, rate)
        for trace in LENGTHS for pipeline, choices in rates.items()
        for strategy in STRATEGIES for rate in choices
    })  # fmt: skip
    statements: list[Statement] = []
    for (trace, pipeline), published in RECOMMENDED.items():
        totals = {one: [found[trace, pipeline, one, rate] for rate in rates[pipeline]]
                  for one in STRATEGIES}  # fmt: skip
        best = _best(totals)
        for what, allowed in zip(
            ("first token", "throughput", "per joule"), published, strict=True
        ):
            chosen, figures = best[what]
            kind = chosen if chosen in ("continuous", "chunked") else "disaggregated"
            words = " or ".join(sorted(allowed))
            statements.append(Statement(
                f"{trace}, {pipeline}: best {what} with {words}", kind in allowed, figures
            ))  # fmt: skip
    panels = [
        Panel(f"{trace}, {pipeline}", "requests/s and client", "tokens/s in objective", {
            one: (rates[pipeline], [good(found[trace, pipeline, one, rate])
                                    for rate in rates[pipeline]]) for one in STRATEGIES
        })
        for trace in LENGTHS for pipeline in rates
    ]  # fmt: skip
    return Study("batching", statements, panels)


def good(total: dict[str, Any]) -> float:
    """Output tokens per second times the share of requests that met their objectives."""
    return per_second(total) * total["slo"]["good"] / max(total["accepted"], 1)


def _best(totals: dict[str, list[dict[str, Any]]]) -> dict[str, tuple[str, str]]:
    """The best strategy at the middle load for each aim; throughput is that in the objectives."""
    first = {one: rows[1]["ttft"]["p50"] for one, rows in totals.items()}
    through = {one: max(map(good, rows)) for one, rows in totals.items()}
    joule = {one: rows[1]["tokens_per_joule"] for one, rows in totals.items()}
    return {
        "first token": (min(first, key=first.__getitem__), _listed(first, 1e3, "ms")),
        "throughput": (max(through, key=through.__getitem__), _listed(through, 1.0, "tokens/s")),
        "per joule": (max(joule, key=joule.__getitem__), _listed(joule, 1.0, "tokens/J")),
    }


def _listed(values: dict[str, float], factor: float, unit: str) -> str:
    return ", ".join(f"{one} {factor * value:.3g}" for one, value in values.items()) + f" {unit}"


def _pipeline(trace: str, pipeline: str, strategy: str, count: int, rate: float) -> Content:
    """A system of one of the three pipelines; the rate is per client."""
    clients, load = engines(strategy, count, 2), dict(LENGTHS[trace])
    with_more = pipeline != "prefill-decode"
    first = 0.25 * (4 if with_more else 1)
    if pipeline == "RAG":
        helpers = search("E5-base", "a100-sxm-80gb", "grace", grouped=True)
        clients += [{**one, "count": max(count // 4, 1)} for one in helpers]
        load["chain"] = ["embed", {"kind": "retrieve", "docs": 6, "tokens_per_doc": 512},
                         "prefill", "decode"]  # fmt: skip
    if pipeline == "retrieved KV":
        clients += [{"kind": "storage", "name": "storage", "count": max(count // 4, 1),
                     "per_node": 1, "mode": "sampled", "kv_bytes": float(KV_BYTES),
                     "levels": [{"bandwidth": 32e9, "latency": 1e-4, "hit": 1.0}]}]  # fmt: skip
        load |= {"context": 3000, "chain": ["kv_retrieval", "prefill", "decode"]}
    slo = {"ttft": 6 * first, "tpot": 0.125}
    return system(clients, load, rate * count, 60.0, slo=slo)


def scaling(run: Run) -> Study:
    """How much load 2 to 32 clients bear at a p99 of 25 or 50 tokens per second.

    Outputs have at least 32 tokens: the time per token of shorter ones is that of a few gaps.
    """
    sizes, strategies = (2, 8, 32), ("continuous", "chunked", "12P/20D", "20P/12D")
    rates = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)
    found = run({
        (strategy, size, rate): _conversations(strategy, size, rate)
        for strategy in strategies for size in sizes for rate in rates
    })  # fmt: skip

    def borne(strategy: str, size: int, tokens: float) -> float:
        held = [rate for rate in rates
                if found[strategy, size, rate]["tpot"]["p99"] <= 1.0 / tokens
                and found[strategy, size, rate]["ttft"]["p99"] <= 1.5]  # fmt: skip
        return max(held, default=0.0)

    loose = {one: borne(one, 32, 25.0) for one in strategies}
    tight = {one: borne(one, 32, 50.0) for one in strategies}
    statements = [
        Statement("loose (25 tokens/s): chunked bears most", _leads("chunked", loose),
                  _listed(loose, 1.0, "requests/s and client")),
        Statement("tight (50 tokens/s): chunked falls", tight["chunked"] < loose["chunked"],
                  f"from {loose['chunked']:g} to {tight['chunked']:g}"),
        Statement("tight: disaggregated with 60 % prefill bears most", _leads("20P/12D", tight),
                  _listed(tight, 1.0, "requests/s and client")),
    ]  # fmt: skip
    panels = [
        Panel(f"p99 of {tokens:g} tokens/s", "clients", "requests/s and client", {
            one: (sizes, [borne(one, size, tokens) for size in sizes]) for one in strategies
        })
        for tokens in (25.0, 50.0)
    ]  # fmt: skip
    return Study("scaling", statements, panels)


def _conversations(strategy: str, count: int, rate: float) -> Content:
    content = _pipeline("conversation", "prefill-decode", strategy, count, rate)
    [load] = content["workloads"]
    load["output"] = {**load["output"], "minimum": 32}
    return content


def _leads(name: str, values: dict[str, float]) -> bool:
    return values[name] > 0 and values[name] == max(values.values())


TIERS: dict[str, tuple[int, float, float, float]] = {
    "A client": (1, 1e12, 128e9, 1e-4), "B platform": (4, 4e12, 32e9, 1e-4),
    "C rack": (32, 32e12, 2e9, 2e-3), "D data centre": (32, 32e12, 2e9, 22e-3),
    "E recompute": (1, 0.0, 1.0, 0.0),
}  # fmt: skip
"""Clients that share one store, its bytes, bytes per second, seconds of a lookup."""


def storage(run: Run) -> Study:
    """Where prior context is kept: 128 clients of two H100s, 240 requests per second."""
    contexts, kinds = (4096, 24576), ("private", "shared")
    found = run({
        (tier, tokens, kind, sharing): _stored(tier, tokens, kind, sharing)
        for tier in TIERS for tokens in contexts for kind in kinds for sharing in ("own", True)
    })  # fmt: skip
    ends = {key: total["e2e"]["p90"] for key, total in found.items()}

    def order(tokens: int, kind: str, sharing: str | bool = "own") -> dict[str, float]:
        return {tier: ends[tier, tokens, kind, sharing] for tier in TIERS}

    short, long, shared = order(4096, "private"), order(24576, "private"), order(24576, "shared")
    ties = [abs(one["A client"] / one["B platform"] - 1.0) for one in (short, long)]
    again = [one["E recompute"] / min(one.values()) for one in (short, long)]
    crowded = _listed(order(24576, "shared", sharing=True), 1.0, "s")
    statements = [
        Statement("private: A and B nearly tie (5 %) and are best",
                  max(ties) <= 0.05 and _least(short)[0] in "AB" and _least(long)[0] in "AB",
                  f"4 K {_listed(short, 1.0, 's')}; 24 K {_listed(long, 1.0, 's')}"),
        Statement("shared and long: C is best", _least(shared)[0] == "C",
                  f"{_listed(shared, 1.0, 's')}; if lookups share bandwidth: {crowded}"),
        Statement("recompute is competitive (1.3x) at 4 K", again[0] <= 1.3, f"{again[0]:.2f}x"),
        Statement("recompute is hopeless (3x) at 24 K", again[1] >= 3.0, f"{again[1]:.2f}x"),
        Statement("D, C over the data centre's network, is never better than C",
                  all(one["D data centre"] >= one["C rack"] for one in (short, long, shared)),
                  "of three loads"),
    ]  # fmt: skip
    names = list(range(len(TIERS)))
    panels = [
        Panel(f"{kind}, end to end, p90; A to E", "tier", "s", {
            f"{tokens} tokens, {words}": (names, list(order(tokens, kind, sharing).values()))
            for tokens in contexts for sharing, words in (("own", "as published"), (True, "shared"))
        })
        for kind in kinds
    ]  # fmt: skip
    return Study("storage", statements, panels)


def _least(values: dict[str, float]) -> str:
    return min(values, key=values.__getitem__)


def _stored(tier: str, tokens: int, kind: str, sharing: str | bool) -> Content:
    """128 clients with a store; private contexts are found for certain, shared ones by contents."""
    count = 128
    clients = engines("chunked", count, 2)
    clients[0]["max_batched_tokens"] = 2048
    shared_by, capacity, bandwidth, latency = TIERS[tier]
    level: Content = {"bandwidth": bandwidth, "latency": latency, "capacity": capacity,
                      "shared_by": shared_by}  # fmt: skip
    load: Content = {**LENGTHS["conversation"], "context": tokens,
                     "chain": ["kv_retrieval", "prefill", "decode"]}  # fmt: skip
    mode = "contents"
    if kind == "private":
        level["hit"], mode = 1.0, "sampled"
    else:
        load["keys"] = {"law": "zipf", "count": 2000, "exponent": 1.0}
    clients.append({
        "kind": "storage", "name": "storage", "count": count, "per_node": 4, "mode": mode,
        "kv_bytes": float(KV_BYTES), "levels": [level] if capacity else [], "sharing": sharing,
    })  # fmt: skip
    routing = {"default": "load", "kv_retrieval": "round_robin",
               "prefill": {"policy": "load", "near": True}}  # fmt: skip
    return system(clients, load, 240.0, 40.0, routing=routing)


def _panel(
    title: str, x: str, y: str, values: Mapping[Key, float], trace: str,
    strategies: Sequence[str], rates: Sequence[float], factor: float,
) -> Panel:  # fmt: skip
    lines: Lines = {
        one: (rates, [factor * values[trace, one, rate] for rate in rates]) for one in strategies
    }
    return Panel(title, x, y, lines)


STUDIES: tuple[Callable[[Run], Study], ...] = (reasoning, retrieval, batching, scaling, storage)
