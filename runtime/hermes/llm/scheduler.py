"""What runs in the next step of an LLM client: the batching strategies (spec section 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fxgraft.runtime.hermes.llm.blocks import BlockPool, blocks_for
from fxgraft.runtime.hermes.llm.decodes import Decodes, branch_blocks, decode_blocks
from fxgraft.runtime.hermes.llm.levels import LevelPolicy
from fxgraft.runtime.hermes.llm.queue import Order, Queue
from fxgraft.runtime.hermes.request import RUNNING, WAITING, Request

Strategy = Literal["static", "continuous", "mixed", "chunked", "running_first", "alternating"]
Admission = Literal["prompt", "sequence", "chunk"]
WHOLE: tuple[Strategy, ...] = ("static", "continuous", "mixed")
"""Strategies that do not cut prompts."""
_ENDLESS = 1 << 60
Chunk = tuple[Request, int, int]
"""A request, the prompt tokens it computes in this step, and its context before."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may contain.

    Attributes:
        strategy: how prompts and decodes share steps:
            *static* prefills a batch and decodes it to the end;
            *continuous* prefills whole prompts in steps of their own, before decodes;
            *mixed* puts whole prompts and all decodes together;
            *chunked* gives each decode a token and cuts prompts at the token budget;
            *running_first* is chunked as vLLM's and SGLang's schedulers do it: blocks are taken
            chunk by chunk, not prompt by prompt;
            *alternating* computes chunks of prompts, in turn, in steps of their own, each followed
            by a step of decodes, as this package's engine does.
        max_batched_tokens: token budget of a step.
        max_sequences: most queries in flight; a request with B branches counts B.
        blocks: KV blocks.
        block_size: tokens per block.
        order: of the queue.
        admission: what must fit when a request is admitted.
        prefix_cache: whether computed blocks are found again by their content.
        swap: whether preempted requests move to host memory instead of being recomputed.
    """

    strategy: Strategy = "chunked"
    max_batched_tokens: int = 2048
    max_sequences: int = 256
    blocks: int = 1 << 40
    block_size: int = 16
    order: Order = "fcfs"
    admission: Admission = "prompt"
    prefix_cache: bool = False
    swap: bool = False


class Scheduler:
    """Chooses the contents of steps and keeps account of blocks.

    Attributes:
        running: admitted requests in the order of admission.
        prefilling: those whose prompt is not computed yet.
        chunks: prompt work of the present step.
        with_decodes: whether the present step advances the decodes.
        queries: of all running requests.
        pending_prompt: prompt tokens still to compute, of all requests given to the client.
        owed: output tokens of requests that do not decode yet.
        preempted: whether planning the present step preempted anybody.
        one_step: whether the step after the present one may differ although nothing happens.
        swapped_tokens: tokens moved from or to the host since the last step was priced.
        now: time of the present step, set by the client.
        by_chunk: whether blocks are taken chunk by chunk, not prompt by prompt.
        hands_over: whether requests decode elsewhere.
        levels: the policy that converts layers of requests, if there is one.
        units: blocks of the pool per KV block of ``limits``: with a policy one per layer.
        resumed: called with a request whose decode goes on after a preemption.
    """

    def __init__(self, limits: Limits, decodes: Decodes, units: int = 1) -> None:
        self.limits = limits
        self.decodes = decodes
        self.units = units
        self.levels: LevelPolicy | None = None
        self.pool = BlockPool(
            limits.blocks * units, limits.block_size, prefix_cache=limits.prefix_cache
        )
        self.queue = Queue(limits.order)
        self.running: dict[Request, None] = {}
        self.prefilling: list[Request] = []
        self.chunks: list[Chunk] = []
        self.with_decodes = False
        self.queries = 0
        self.pending_prompt = 0
        self.owed = 0
        self.swapped_tokens = 0
        self.preempted = False
        self.one_step = False
        self._prompts_ran = False
        self.now = 0.0
        self.hands_over = False
        self.resumed: Callable[[Request], None] = _ignore
        self.by_chunk = limits.admission == "chunk" or limits.strategy == "running_first"
        self.whole = limits.strategy in WHOLE
        self.plan: Callable[[], None] = {
            "static": self._plan_static,
            "continuous": self._plan_continuous,
            "alternating": self._plan_alternating,
        }.get(limits.strategy, self._plan_together)

    def _plan_static(self) -> None:
        self.preempted = False
        if not self.running:
            self._admit(self.limits.max_batched_tokens)
        if self.levels is not None:
            self.levels.decide()
        self._decode_if_no_prompts()

    def _plan_continuous(self) -> None:
        self.preempted = False
        if self.queue.size:
            self._admit(self.limits.max_batched_tokens)
        if self.levels is not None:
            self.levels.decide()
        self._decode_if_no_prompts()

    def _plan_alternating(self) -> None:
        self.preempted = False
        decodes_turn = self._prompts_ran and self.decodes.count > 0
        if not decodes_turn:
            if self.queue.size:
                self._admit(_ENDLESS)
                self.chunks.clear()
            if self.levels is not None:
                self.levels.decide()
            self._take_turns(self.limits.max_batched_tokens)
        self._decode_if_no_prompts()
        self._prompts_ran = not decodes_turn and bool(self.chunks)
        self.one_step = bool(self.prefilling) or (decodes_turn and self.queue.size > 0)

    def _take_turns(self, budget: int) -> None:
        """A chunk of each prompt, beginning with the one whose turn is the longest ago."""
        for request in self.prefilling[:]:
            if budget <= 0:
                return
            new = min(request.todo, budget)
            self.chunks.append((request, new, request.computed))
            self.prefilling.remove(request)
            self.prefilling.append(request)
            budget -= new

    def _decode_if_no_prompts(self) -> None:
        self.with_decodes = not self.chunks and self.decodes.count > 0
        if self.with_decodes and self.decodes.due > self.pool.free:
            self._make_room()
            self.with_decodes = self.decodes.count > 0

    def _plan_together(self) -> None:
        decodes = self.decodes
        self.preempted = False
        pool = self.pool
        if self.levels is not None:
            self.levels.decide()
        if decodes.count and decodes.due > pool.capacity - pool.used:
            self._make_room()
        budget = self.limits.max_batched_tokens - decodes.count
        if self.prefilling:
            budget = self._continue_prompts(budget)
        if self.queue.size:
            if not self.preempted:
                if budget > 0 or self.whole:
                    self._admit(budget)
            elif not (self.chunks or decodes.count):
                # A step that preempted admits nobody; but without anybody there is no step.
                self._admit(self.limits.max_batched_tokens)
        self.with_decodes = decodes.count > 0

    def _continue_prompts(self, budget: int) -> int:
        """Chunks of prompts that are under way; returns the budget left."""
        for request in list(self.prefilling):
            if budget <= 0:
                break
            if request not in self.running:
                continue
            new = min(request.todo, budget)
            if self.by_chunk:
                end = request.computed + new
                more = prompt_blocks(request, end, self.pool.size) - request.held
                if more > 0:
                    if not self._room_for(more, request):
                        continue
                    self.pool.take(more)
                    request.held += more
            self.chunks.append((request, new, request.computed))
            budget -= new
        return budget

    def _room_for(self, blocks: int, request: Request) -> bool:
        """Preempt later requests until blocks are free; False if it came to ``request`` itself."""
        while blocks > self.pool.free - self.decodes.due:
            victim = next(reversed(self.running))
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _admit(self, budget: int) -> None:
        """Admit from the queue until something does not fit."""
        while (request := self.queue.head()) is not None:
            branches = request.live
            if self.levels is not None and request.started < 0:
                self.levels.start(request)
            if self.queries + branches > self.limits.max_sequences:
                return
            if request.handed_over:
                if not self._admit_decode(request):
                    return
                budget -= branches
                continue
            new = self._admit_prompt(request, budget)
            if new == 0:
                return
            budget -= new
            if budget <= 0:
                return

    def _admit_decode(self, request: Request) -> bool:
        """A request whose KV is here already joins the decodes of this step."""
        size = self.pool.size
        blocks = decode_blocks(request, request.emitted, size)
        next_blocks = decode_blocks(request, request.emitted + 1, size)
        if next_blocks > self.pool.free - self.decodes.due:
            return False
        self.pool.take(blocks)
        self._start(request)
        if self.limits.swap and request.preemptions:
            self.swapped_tokens += request.prompt + request.live * (request.emitted - 1)
        request.handed_over = False
        self.owed -= owed_by(request)
        self.decodes.join(request)
        if request.stopped >= 0:
            self.resumed(request)
        return True

    def _start(self, request: Request) -> None:
        self.queue.pop()
        request.state = RUNNING
        self.running[request] = None
        self.queries += request.live
        if request.started < 0:
            request.started = now = self.now
            request.queue_time += now - request.arrived
            if not request.handed_over:
                request.prefill_started = now

    def _admit_prompt(self, request: Request, budget: int) -> int:
        """Admit a prompt if it fits; returns the tokens of it that run now, 0 if none."""
        size, pool = self.pool.size, self.pool
        total = request.prompt + request.live * request.emitted
        hits = self._cached(request, total) if pool.prefix_cache else []
        computed = len(hits) * size
        if request.loaded > computed:
            computed = request.loaded
        new = todo = total - computed
        if new > budget and not self.whole:
            new = budget
        if new <= 0 or (new > budget and (self.chunks or not request.emitted)):
            return 0
        end = computed + new if self.by_chunk else total
        blocks = prompt_blocks(request, end, size) - len(hits)
        wanted = blocks
        if self.limits.admission == "sequence" and self._grows(request):
            wanted = final_blocks(request, size) * request.kv_layers - len(hits)
        if hits:
            wanted += pool.idle_among(hits)
        if wanted > pool.capacity - pool.used - self.decodes.due:
            return 0
        if pool.prefix_cache:
            self._share(request, hits, total)
        self._start(request)
        self.pending_prompt -= request.todo - todo
        request.todo, request.computed, request.held = todo, computed, len(hits)
        request.skipped = computed
        if request.lost:
            request.recomputed += max(request.lost - computed, 0)
            request.lost = 0
        self.prefilling.append(request)
        pool.take(blocks)
        request.held += blocks
        self.chunks.append((request, new, computed))
        return new

    def _grows(self, request: Request) -> bool:
        """Whether it decodes here after its prompt."""
        return request.decodes and not self.hands_over

    def _cached(self, request: Request, total: int) -> list[int]:
        """Cached blocks of a prompt; its last token is always computed."""
        hits = self.pool.match(request, (total - 1) // self.pool.size)
        return hits if len(hits) * self.pool.size >= request.loaded else []

    def _share(self, request: Request, hits: list[int], total: int) -> None:
        """Use cached blocks for the start of a prompt of ``total`` tokens."""
        pool = self.pool
        pool.take(pool.share(hits))
        request.shared = tuple(hits)
        request.reused += len(hits) * pool.size
        pool.hit_tokens += len(hits) * pool.size
        pool.asked_tokens += total

    def _make_room(self) -> None:
        """Preempt from the tail until every decode that is left has its next block."""
        order = list(self.running)
        free, place = self.pool.free, 0
        while place < len(order):
            request = order[place]
            need = 0 if request.todo else self.decodes.needed_by(request)
            while need > free:
                victim = order.pop()
                before = self.pool.free
                self._preempt(victim)
                free += self.pool.free - before
                if victim is request:
                    need = 0
            free -= need
            place += 1

    def _preempt(self, request: Request) -> None:
        """Back to the front of the queue, without its blocks."""
        self.preempted = True
        del self.running[request]
        request.state = WAITING
        self.queries -= request.live
        if request.todo:
            self.prefilling.remove(request)
            held = request.held
            request.lost = request.computed if request.computed > request.skipped else 0
        else:
            held = self.decodes.held_by(request)
            self.decodes.drop(request)
            if not self.limits.swap:
                request.lost = request.prompt + request.live * (request.emitted - 1)
            self.owed += owed_by(request)
            request.stopped = self.now
        self.free(request, held)
        request.preemptions += 1
        request.loaded = request.held = request.computed = 0
        if self.limits.swap and not request.todo:
            request.handed_over = True
            self.swapped_tokens += request.prompt + request.live * (request.emitted - 1)
        else:
            todo = request.prompt + request.live * request.emitted
            self.pending_prompt += todo - request.todo
            request.todo = todo
        self.queue.push_front(request)

    def free(self, request: Request, blocks: int) -> None:
        """Give back blocks; those that others share, or that stay cached, are kept."""
        if request.shared:
            blocks -= self.pool.unshare(request.shared)
            request.shared = ()
        self.pool.give(blocks)

    def publish(self, request: Request, tokens: int) -> None:
        """Let others find a request's computed blocks."""
        if self.pool.prefix_cache:
            self.pool.give(self.pool.publish(request, tokens))

    def branch_ended(self, request: Request, blocks: int, *, is_last: bool) -> None:
        """One branch of a decode has ended."""
        self.queries -= 1
        if not is_last:
            self.pool.give(blocks)
            return
        if not request.branch_outputs:
            self.publish(request, request.prompt + request.emitted - 1)
        self.free(request, blocks)
        del self.running[request]

    def prompt_ended(self, request: Request) -> None:
        """A prompt is computed, and no longer prefilling."""
        self.prefilling.remove(request)
        self.publish(request, request.prompt)

    def leave(self, request: Request, *, keep_blocks: bool = False) -> None:
        """A request that does not decode here is done with."""
        del self.running[request]
        self.queries -= request.live
        if not keep_blocks:
            self.free(request, request.held)

    def join(self, request: Request) -> None:
        """A computed prompt goes on as decode; branches that want no more tokens end."""
        outputs = request.branch_outputs
        live = sum(output > request.emitted for output in outputs) if outputs else 1
        if live < request.live:
            size = self.pool.size
            while request.live > live:
                self.pool.give(branch_blocks(request, request.emitted, size))
                request.live -= 1
                self.queries -= 1
        self.owed -= owed_by(request)
        self.decodes.join(request)


def owed_by(request: Request) -> int:
    """Tokens that a request still has to emit."""
    emitted = request.emitted
    if not request.branch_outputs:
        return request.output - emitted if request.output > emitted else 0
    return sum([output - emitted for output in request.branch_outputs if output > emitted])


def prompt_blocks(request: Request, tokens: int, size: int) -> int:
    """Blocks for the first ``tokens`` tokens of what a (re-)prefill computes."""
    if not request.branch_outputs or tokens <= request.prompt:
        return blocks_for(tokens, size) * request.kv_layers
    own = request.live * blocks_for(request.emitted, size)
    return (blocks_for(request.prompt, size) + own) * request.kv_layers


def final_blocks(request: Request, size: int) -> int:
    """Blocks, of all layers, when a request emits its last tokens, if all branches were as long."""
    longest = max(request.outputs())
    if not request.branch_outputs:
        return blocks_for(request.prompt + longest, size)
    return blocks_for(request.prompt, size) + sum(
        blocks_for(output, size) for output in request.branch_outputs
    )


def _ignore(request: Request) -> None:
    pass
