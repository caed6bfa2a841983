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
Plan = tuple[tuple[int, ...], ...]
"""Tokens to emit by each branch of each decode stage."""


@dataclass(slots=True, eq=False)
class Request:
    """One user query; times in seconds, lengths in tokens.

    Attributes:
        index: unique number, in order of creation.
        arrival: when it enters the system.
        prompt: tokens that attention must have read before the next token can be emitted; grows
            by retrieved documents, by tools' answers and by what was emitted in earlier rounds.
        output: tokens to emit in the present decode stage by its longest branch.
        chain: its stages.
        model: the model that its LLM stages run on, unless a stage names another.
        workload: index of the workload that made it.
        context: tokens of prior context, for stages that retrieve it.
        key: what its prior context is called in KV stores; -1 for none.
        prefix: content of the prompt's start, for prefix caches.
        plan: outputs where there are several decode stages or branches; else empty.
        preferred: names of clients to choose where they can run a stage, best first.
        deadline: when it gives up if it still waits for its first token.
        branch_outputs: tokens to emit by each branch of the present decode stage; empty for one.
        position: index of the present stage in the chain.
        decodes: whether the present prefill, or the last one, is followed by a decode.
        round: decode stages that it has finished.
        state: waiting, running, transfer, or one of the terminal states.
        loaded: context tokens whose keys and values arrive with it (KV retrieval); they are not
            computed again.
        handed_over: its KV is computed already: by another client, or swapped out by this one.
        previous: client of the stage before.
        client: client of the present stage.
        assigned: when the present stage was given to its client.
        arrived: when it reached that client.
        started: when the present stage first ran, -1 before.
        todo: prompt tokens still to compute.
        computed: context tokens present in memory while prefilling.
        skipped: those of them that were there when it was admitted.
        lost: tokens whose keys and values a preemption freed.
        held: blocks held while prefilling.
        shared: hashes of the blocks that it shares with the prefix cache.
        hashes: what ``blocks.chain`` found, with the length and block size that it is for.
        emitted: tokens per live branch, as of the last change of its client's batch.
        base: ``emitted`` when it joined the decodes.
        joined: the decode clock when it joined.
        live: branches still running.
        level: layers that were converted for it, where a client has a policy.
        kv_layers: blocks per ``block_size`` tokens: 1, or where a client has a policy the layers
            that keep keys and values.
        incarnation: counts preemptions, so that stale entries are recognised.
        stopped: when it was last preempted while decoding, -1 if it goes on.
        asked: prompt tokens when it arrived.
    """

    index: int
    arrival: float
    prompt: int
    output: int
    chain: Chain
    model: str = ""
    workload: int = 0
    context: int = 0
    key: int = -1
    prefix: Prefix = ()
    plan: Plan = ()
    preferred: tuple[str, ...] = ()
    deadline: float = float("inf")
    branch_outputs: tuple[int, ...] = ()
    position: int = 0
    decodes: bool = False
    round: int = 0
    state: str = WAITING
    loaded: int = 0
    handed_over: bool = False
    previous: Client | None = None
    client: Client | None = None
    assigned: float = 0.0
    arrived: float = 0.0
    started: float = -1.0
    todo: int = 0
    computed: int = 0
    skipped: int = 0
    lost: int = 0
    held: int = 0
    shared: tuple[int, ...] = ()
    hashes: tuple[int, int, list[int]] | None = None
    emitted: int = 0
    base: int = 0
    joined: int = 0
    live: int = 0
    level: int = 0
    kv_layers: int = 1
    incarnation: int = 0
    total_emitted: int = 0
    first_token: float = -1.0
    prefill_started: float = -1.0
    stage_first: float = -1.0
    last_token: float = -1.0
    stopped: float = -1.0
    decode_span: float = 0.0
    decode_gaps: int = 0
    max_gap: float = 0.0
    queue_time: float = 0.0
    transfer_time: float = 0.0
    preemptions: int = 0
    recomputed: int = 0
    reused: int = 0
    asked: int = 0

    def outputs(self) -> tuple[int, ...]:
        """Tokens to emit by each branch of the decode that follows or is under way."""
        return self.branch_outputs or (self.output,)

    def decodes_next(self) -> bool:
        """Whether the stage after the present one emits tokens."""
        following = self.position + 1
        return following < len(self.chain) and self.chain[following].kind in DECODE_KINDS

    def use_plan(self) -> None:
        """Take the outputs of the decode stage that follows."""
        outputs = self.plan[self.round]
        self.output = max(outputs)
        self.branch_outputs = outputs if len(outputs) > 1 else ()

    def wanted(self) -> int:
        """Tokens to emit in all decode stages by all branches."""
        return sum(map(sum, self.plan)) if self.plan else self.output

    def so_far(self) -> int:
        """Tokens emitted in the present decode stage."""
        if self.branch_outputs:
            return sum(min(output, self.emitted) for output in self.branch_outputs)
        return self.emitted
