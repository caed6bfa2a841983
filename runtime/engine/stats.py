"""What the engine is doing, as numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, and gauges of now.

    Attributes:
        queued, prefilling, running: requests in each status now (preempted ones are queued).
        finished, cancelled, failed: requests that ended; finished counts all of them.
        preemptions: how often a request lost its state.
        prompt_tokens, generated_tokens, reused_tokens: tokens so far.
        blocks_total, blocks_used, blocks_cached: blocks of growing state: all, held by requests,
            held only for reuse.
        slots_total, slots_used: slots of fixed state.
        steps: steps so far.
        step_seconds: duration of the last step.
        layer_ops: for each op that keeps state, how many running requests use which op.
        policy: what the policy that changes ops tells of itself, by name.
    """

    queued: int = 0
    prefilling: int = 0
    running: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    reused_tokens: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    slots_total: int = 0
    slots_used: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    layer_ops: Mapping[int, Mapping[str, int]] = field(default_factory=dict[int, Mapping[str, int]])
    policy: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass
class Counters:
    """The counts that the engine keeps."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    reused_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
