"""A request on its way through its chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxgraft.runtime.hermes.stages import DECODE_KINDS, Chain

if TYPE_CHECKING:
    from fxgraft.runtime.hermes.client import Client

WAITING, RUNNING, TRANSFER = "waiting", "running", "transfer"
COMPLETED, REJECTED, TIMED_OUT, CENSORED = "completed", "rejected", "timed_out", "censored"
TERMINAL = (COMPLETED, REJECTED, TIMED_OUT, CENSORED)

Prefix = tuple[tuple[int, int], ...]
"""Parts of a prompt with known content, first to last: (key of the content, tokens)."""


@dataclass(slots=True, eq=False)
class Request:
    """One user query; times in seconds, lengths in tokens.

    Attributes:
        index: unique number, in order of creation.
        arrival: when it enters the system.
        prompt: tokens that attention must have read before the next token can be emitted; grows
            by retrieved documents, by tools' answers and by what was emitted in earlier rounds.
        output: tokens to emit in each decode stage, per branch.
        chain: its stages.
        model: the model that its LLM stages run on, unless a stage names another.
        key: what its prior context is called in KV stores; -1 for none.
        prefix: content of the prompt's start, for prefix caches.
        workload: index of the workload that made it.
        deadline: when it gives up if it still waits.
        position: index of the present stage in the chain.
        state: waiting, running, transfer, or one of the terminal states.
        loaded: context tokens whose keys and values arrive with it (KV retrieval, prefill
            elsewhere); they are not computed again.
        handed_over: its KV was computed by another client's prefill.
        previous: client of the stage before.
        client: client of the present stage.
        assigned: when the present stage was given to its client.
        arrived: when it reached that client.
        started: when the present stage first ran, -1 before.
        todo: prompt tokens still to compute.
        computed: context tokens present in memory while prefilling.
        held: blocks held while prefilling.
        emitted: tokens per live branch, as of the last change of its client's batch.
        base: ``emitted`` when it joined the decodes.
        joined: the decode clock when it joined.
        live: branches still running.
        asked: prompt tokens when it arrived.
        incarnation: counts preemptions, so that stale entries are recognised.
    """

    index: int
    arrival: float
    prompt: int
    output: int
    chain: Chain
    model: str
    key: int = -1
    prefix: Prefix = ()
    workload: int = 0
    deadline: float = float("inf")
    branch_outputs: tuple[int, ...] = ()
    position: int = 0
    state: str = WAITING
    reason: str = ""
    loaded: int = 0
    handed_over: bool = False
    previous: Client | None = None
    client: Client | None = None
    assigned: float = 0.0
    arrived: float = 0.0
    started: float = -1.0
    todo: int = 0
    computed: int = 0
    cached: int = 0
    held: int = 0
    shared: tuple[int, ...] = ()
    emitted: int = 0
    base: int = 0
    joined: int = 0
    target: int = 0
    live: int = 0
    incarnation: int = 0
    total_emitted: int = 0
    first_token: float = -1.0
    prefill_started: float = -1.0
    stage_first: float = -1.0
    last_token: float = -1.0
    decode_span: float = 0.0
    decode_gaps: int = 0
    max_gap: float = 0.0
    queue_time: float = 0.0
    transfer_time: float = 0.0
    preemptions: int = 0
    recomputed: int = 0
    reused: int = 0
    retrieval_hits: int = 0
    asked: int = 0

    def outputs(self) -> tuple[int, ...]:
        """Tokens to emit by each branch of the decode that follows or is under way."""
        return self.branch_outputs or (self.output,)

    def decodes_next(self) -> bool:
        """Whether the stage after the present one emits tokens."""
        following = self.position + 1
        return following < len(self.chain) and self.chain[following].kind in DECODE_KINDS
