"""A run's figures as text, and as tables for the command."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = list[list[str]]
LATENCIES = (
    ("ttft", "time to first token"), ("tpot", "time per output token"),
    ("itl", "gap between tokens"), ("e2e", "end to end"), ("queue", "waiting"),
    ("transfer", "in transfer"),
)  # fmt: skip
LATENCY_COLUMNS = ("", "mean", "p50", "p90", "p95", "p99")
CLIENT_COLUMNS = ("client", "served", "steps", "busy", "batch", "queue", "blocks", "energy")


def duration(seconds: float) -> str:
    """``12.3 ms``; what never came is ``cut off``."""
    if math.isnan(seconds):
        return "–"
    if math.isinf(seconds):
        return "cut off"
    return f"{seconds:.3f} s" if seconds >= 1.0 else f"{1e3 * seconds:.2f} ms"


def number(value: float) -> str:
    """``1.23 K``, or a dash for what is not known."""
    if math.isnan(value):
        return "–"
    for prefix in ("", " K", " M", " G"):
        if abs(value) < 1000:
            return f"{value:.4g}{prefix}"
        value /= 1000
    return f"{value:.4g} T"


def latency_rows(figures: Mapping[str, Any]) -> Rows:
    """One row per latency."""
    return [
        [title, *(duration(figures[name][column]) for column in LATENCY_COLUMNS[1:])]
        for name, title in LATENCIES
        if name in figures and figures[name]["count"]
        and (name != "transfer" or figures[name]["mean"] > 0)
    ]  # fmt: skip


def client_rows(clients: Sequence[Mapping[str, Any]]) -> Rows:
    """One row per client."""
    return [
        [
            client["name"],
            str(client["served"]),
            number(client["steps"]),
            f"{100 * client['utilisation']:.1f} %",
            number(client.get("mean_batch", math.nan)),
            number(client.get("mean_queue", math.nan)),
            _blocks(client),
            f"{number(client['joules'])}J" if client["joules"] else "–",
        ]
        for client in clients
    ]


def _blocks(client: Mapping[str, Any]) -> str:
    if "blocks" not in client:
        return "–"
    most = client["blocks"]
    return f"{client['peak_blocks']}" + (f" of {most}" if most < 1 << 40 else "")


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What was done, what was cut off, what was good."""
    total = summary["total"]
    cut = [f"{total[state]} {state.replace('_', ' ')}"
           for state in ("rejected", "timed_out", "censored") if total[state]]  # fmt: skip
    lines = [
        f"{total['completed']} of {total['accepted']} requests completed in "
        f"{summary['seconds']:.1f} s" + (f" ({', '.join(cut)})" if cut else ""),
        f"{number(total['input_tokens_per_second'])} tokens/s in, "
        f"{number(total['output_tokens_per_second'])} tokens/s out"
        + (f", {total['tokens_per_joule']:.3g} tokens/J" if total["joules"] else ""),
    ]
    for name, figures in summary["workloads"].items():
        if "slo" in figures:
            lines.append(f"{name}: {goodput(figures['slo'])}")
    if total["preemptions"]:
        lines.append(f"{total['preemptions']} preemptions, {total['recomputed_tokens']} tokens "
                     "computed again")  # fmt: skip
    lines += [f"rejected {entry['count']}: request {entry['request']}: {entry['reason']}"
              for entry in summary["rejections"]]  # fmt: skip
    return lines + list(summary["notes"])


def goodput(slo: Mapping[str, Any]) -> str:
    """Goodput, and which percentiles break their limits."""
    missed = [f"p{row['percent']} of {row['of']} is {duration(row['seconds'])}, "
              f"limit {duration(row['limit'])}"
              for row in slo["percentiles"] if not row["met"]]  # fmt: skip
    text = f"goodput {slo['goodput']:.3g} requests/s ({100 * slo['share']:.1f} % are good)"
    if not slo["percentiles"]:
        return text
    return text + ("; " + "; ".join(missed) if missed else "; all percentiles hold")


def grid(columns: Sequence[str], rows: Rows) -> str:
    """Aligned columns, the first to the left."""
    cells = [list(columns), *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    )  # fmt: skip


def report(summary: Mapping[str, Any]) -> str:
    """The whole report."""
    return "\n".join([
        f"{summary['name']}:",
        *(f"  {line}" for line in sentences(summary)),
        grid(LATENCY_COLUMNS, latency_rows(summary["total"])),
        grid(CLIENT_COLUMNS, client_rows(summary["clients"])),
    ])  # fmt: skip
