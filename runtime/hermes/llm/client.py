"""An LLM client: runs the steps that its scheduler plans, at the price of its cost table."""

from __future__ import annotations

import math
from typing import Literal

from fxgraft.runtime.hermes.client import Client, Hub, Place
from fxgraft.runtime.hermes.costs import NO_LIMIT, StepCost
from fxgraft.runtime.hermes.llm.blocks import blocks_for
from fxgraft.runtime.hermes.llm.decodes import JumpingDecodes
from fxgraft.runtime.hermes.llm.reference import ListedDecodes
from fxgraft.runtime.hermes.llm.scheduler import Limits, Scheduler, owed_by
from fxgraft.runtime.hermes.log import Rows
from fxgraft.runtime.hermes.request import WAITING, Request
from fxgraft.runtime.hermes.stages import DECODE_KINDS, PREFILL, Stage

Role = Literal["both", "prefill", "decode"]


class LlmClient(Client):
    """One server of one model.

    Args:
        index, name, hub, place, idle_watts, dollars_per_hour: see ``Client``.
        model: the model it serves.
        cost: price of its steps.
        limits: what a step may contain.
        role: ``"prefill"`` hands requests over after their first token; ``"decode"`` takes them
            (and computes a preempted request's prompt again by itself).
        stepwise: use the reference, one step at a time, instead of jumping.
        kv_bytes: of keys and values per token, for transfers.
        swap_bandwidth: bytes per second to and from the host.
        context_length: most tokens of a sequence, 0 for no limit.
        gaps: where gaps between tokens are logged.
        marks: whether the cost extrapolates, so that such steps are counted.
    """

    kind = "llm"

    def __init__(
        self,
        index: int,
        name: str,
        hub: Hub,
        *,
        model: str,
        cost: StepCost,
        limits: Limits,
        role: Role = "both",
        stepwise: bool = False,
        place: Place | None = None,
        idle_watts: float = 0.0,
        dollars_per_hour: float = 0.0,
        kv_bytes: float = 0.0,
        swap_bandwidth: float = math.inf,
        context_length: int = 0,
        gaps: Rows | None = None,
        marks: bool = False,
    ) -> None:
        super().__init__(
            index, name, hub, place=place or Place(), idle_watts=idle_watts,
            dollars_per_hour=dollars_per_hour,
        )  # fmt: skip
        self.model = model
        self.cost = cost
        self.limits = limits
        self.role = role
        self.kv_bytes = kv_bytes
        self.swap_bandwidth = swap_bandwidth
        self.context_length = context_length
        self.marks = marks
        kind = ListedDecodes if stepwise else JumpingDecodes
        self.decodes = kind(limits.block_size, gaps)
        self.scheduler = Scheduler(limits, self.decodes)
        self._gaps = gaps
        self._in_step = False
        self._woken = False
        self._start = 0.0
        self._steps = 0
        self._first = self._slope = 0.0
        self._joules = self._joule_slope = 0.0
        self._outgoing: dict[Request, tuple[int, tuple[int, ...]]] = {}

    # -- taking requests

    def accepts(self, stage: Stage, request: Request) -> bool:
        if (stage.model or request.model) != self.model:
            return False
        if stage.kind in DECODE_KINDS:
            return self.role != "prefill"
        return stage.kind == PREFILL and self.role != "decode"

    def expect(self, request: Request) -> None:
        self.assigned += 1
        if request.handed_over:
            request.todo = 0
            request.live = sum(output > request.emitted for output in request.outputs())
        else:
            request.emitted = 0
            request.live = len(request.outputs()) if request.decodes_next() else 1
            request.loaded = min(request.loaded, request.prompt - 1)
            request.todo = request.prompt - request.loaded
            self.scheduler.pending_prompt += request.todo
        self.scheduler.owed += self._owed(request)

    def _owed(self, request: Request) -> int:
        if self.role == "prefill" or not (request.handed_over or request.decodes_next()):
            return 0
        return owed_by(request)

    def problem(self, request: Request) -> str:
        """Why a request can never run here, or ``""``."""
        tokens = request.prompt
        if request.handed_over or (self.role != "prefill" and request.decodes_next()):
            tokens += max(request.outputs())
            blocks = self._most_blocks(request)
        else:
            blocks = blocks_for(tokens, self.limits.block_size)
        if self.context_length and tokens > self.context_length:
            return (f"its {tokens} tokens are more than the context length of "
                    f"{self.context_length} of client {self.name!r}")  # fmt: skip
        if blocks > self.limits.blocks:
            return (f"it needs {blocks} KV blocks, client {self.name!r} has "
                    f"{self.limits.blocks}")  # fmt: skip
        if len(request.outputs()) > self.limits.max_sequences:
            return (f"its {len(request.outputs())} branches are more than the "
                    f"{self.limits.max_sequences} sequences of client {self.name!r}")  # fmt: skip
        if self.scheduler.whole and request.todo > self.limits.max_batched_tokens:
            return (f"its prompt of {request.todo} tokens exceeds the "
                    f"{self.limits.max_batched_tokens} tokens of a step of client "
                    f"{self.name!r}, which does not cut prompts")  # fmt: skip
        return ""

    def _most_blocks(self, request: Request) -> int:
        size, outputs = self.limits.block_size, request.branch_outputs
        if not outputs:
            return blocks_for(request.prompt + request.output, size)
        return blocks_for(request.prompt, size) + sum(blocks_for(o, size) for o in outputs)

    def submit(self, request: Request, now: float) -> None:
        problem = self.problem(request)
        if problem:
            self._forget(request)
            self.hub.reject(request, problem, now)
            return
        request.state = WAITING
        scheduler, limits = self.scheduler, self.limits
        was_empty = scheduler.queue.head() is None
        scheduler.queue.push(request)
        if not self._in_step:
            self._wake(now)
        elif (
            self._steps > 1
            and (was_empty or limits.order != "fcfs")
            and limits.strategy != "static"
            and scheduler.queries < limits.max_sequences
        ):
            self._cut(now)

    def _forget(self, request: Request) -> None:
        self.assigned -= 1
        self.scheduler.pending_prompt -= request.todo
        self.scheduler.owed -= self._owed(request)

    def withdraw(self, request: Request, now: float) -> bool:
        if not self.scheduler.queue.remove(request):
            return False
        self._forget(request)
        if not self._in_step:
            self.resume(now)
        elif self._steps > 1:
            self._cut(now)
        return True

    def _wake(self, now: float) -> None:
        if not self._woken:
            self._woken = True
            self.hub.schedule(self, now)

    def release(self, request: Request) -> None:
        blocks, shared = self._outgoing.pop(request)
        pool = self.scheduler.pool
        pool.give(blocks - pool.unshare(shared))

    def resume(self, now: float) -> None:
        """Blocks came free: look at the queue if idle."""
        if not self._in_step and self.scheduler.queue.head() is not None:
            self._wake(now)

    # -- running steps

    def on_step(self, now: float) -> None:
        self._woken = False
        if self._in_step:
            self._complete(now)
        self._begin(now)

    def _begin(self, now: float) -> None:
        scheduler = self.scheduler
        scheduler.plan()
        if scheduler.chunks:
            self._price_mixed()
        elif scheduler.with_decodes:
            self._price_jump()
        else:
            return
        if scheduler.swapped_tokens:
            self._first += scheduler.swapped_tokens * self.kv_bytes / self.swap_bandwidth
            scheduler.swapped_tokens = 0
            self._steps = 1
        self._in_step = True
        self._start = now
        self.hub.schedule(self, now + self._duration(self._steps))
        for request, _, _ in scheduler.chunks:
            if request.started < 0:
                self._mark_start(request, now)
        if scheduler.joined:
            for request in scheduler.joined:
                if request.started < 0:
                    self._mark_start(request, now)
            scheduler.joined.clear()

    def _mark_start(self, request: Request, now: float) -> None:
        request.started = now
        request.queue_time += now - request.arrived
        if request.todo:
            request.prefill_started = now

    def _price_mixed(self) -> None:
        scheduler, decodes = self.scheduler, self.decodes
        prompts = [(new, before) for _, new, before in scheduler.chunks]
        if scheduler.with_decodes:
            price = self.cost.price(prompts, decodes.count, decodes.context)
        else:
            price = self.cost.price(prompts)
        self._steps = 1
        self._first, self._slope = price.seconds, 0.0
        self._joules, self._joule_slope = price.joules or 0.0, 0.0
        self.marked_steps += price.extrapolated

    def _price_jump(self) -> None:
        decodes = self.decodes
        count, context = decodes.count, decodes.context
        line = self.cost.decode_line(count, context)
        fit = (line.last - context) // count + 1 if line.last < NO_LIMIT else NO_LIMIT
        self._steps = decodes.jump(self.scheduler.pool.free, max(fit, 1))
        self._first, self._slope = line.seconds, line.seconds_per_key * count
        self._joules, self._joule_slope = line.joules, line.joules_per_key * count

    def _duration(self, steps: int) -> float:
        if steps == 1:
            return self._first
        return steps * self._first + self._slope * (steps * (steps - 1) // 2)

    def steps_by(self, now: float) -> int:
        """Steps of the present jump that have ended strictly before ``now``."""
        elapsed, slope = now - self._start, self._slope
        guess = elapsed / self._first if self._first > 0.0 else self._steps
        if slope > 0.0:
            half = self._first - 0.5 * slope
            guess = (math.sqrt(half * half + 2.0 * slope * elapsed) - half) / slope
        steps = min(max(int(guess), 0), self._steps)
        while steps and self._start + self._duration(steps) >= now:
            steps -= 1
        while steps < self._steps and self._start + self._duration(steps + 1) < now:
            steps += 1
        return steps

    def _cut(self, now: float) -> None:
        """End the present jump with the step that runs at ``now``."""
        steps = self.steps_by(now) + 1
        if steps < self._steps:
            self._steps = steps
            self.hub.schedule(self, self._start + self._duration(steps))

    def _complete(self, now: float) -> None:
        scheduler, decodes, steps = self.scheduler, self.decodes, self._steps
        self._in_step = False
        self._account(now, steps)
        if scheduler.with_decodes:
            scheduler.pool.take(decodes.allocate(steps))
            decodes.advance(steps, self._start, self._first, self._slope, now)
            for request, blocks in decodes.ended(now):
                scheduler.branch_ended(request, blocks)
                if request.live == 0:
                    self._finish_decode(request, now)
        if scheduler.chunks:
            chunks, scheduler.chunks = scheduler.chunks, []
            for request, new, _ in chunks:
                request.computed += new
                request.todo -= new
                scheduler.pending_prompt -= new
                if request.todo == 0:
                    self._finish_prompt(request, now)

    def _account(self, now: float, steps: int) -> None:
        joules = steps * self._joules + self._joule_slope * (steps * (steps - 1) // 2)
        self.busy_seconds += now - self._start
        self.step_joules += joules
        if not self.hub.steps.wanted:
            return
        scheduler, decodes = self.scheduler, self.decodes
        chunks = scheduler.chunks
        tokens = sum([new for _, new, _ in chunks]) if chunks else 0
        count, context = (decodes.count, decodes.context) if scheduler.with_decodes else (0, 0)
        self.hub.steps.append(
            (
                self.index, self._start, now, steps, self._first, self._slope, len(chunks),
                tokens, count, context, len(scheduler.queue), scheduler.pool.used, joules,
                decodes.clock,
            )
        )  # fmt: skip

    # -- ends of stages

    def _finish_prompt(self, request: Request, now: float) -> None:
        scheduler = self.scheduler
        scheduler.prompt_ended(request)
        if not request.emitted and not request.decodes_next():
            scheduler.leave(request)
            self._done(request, now)
            return
        self._emit(request, now)
        if self.role == "prefill" and request.emitted < max(request.outputs()):
            self._hand_over(request, now)
            return
        if request.chain[request.position].kind == PREFILL:
            self._enter_decode(request, now)
        if request.emitted < max(request.outputs()):
            scheduler.join(request)
            return
        scheduler.leave(request)
        self._finish_decode(request, now)

    def _emit(self, request: Request, now: float) -> None:
        """The end of a prompt emits a token of each branch."""
        request.emitted += 1
        if self.role != "prefill":
            self.scheduler.owed -= request.live
        if request.emitted == 1:
            request.stage_first = now
            if request.first_token < 0:
                request.first_token = now
        else:
            gap = now - request.last_token
            request.max_gap = max(request.max_gap, gap)
            if self._gaps is not None:
                self._gaps.append((gap, 0.0, 1, request.live))
        request.last_token = now

    def _enter_decode(self, request: Request, now: float) -> None:
        """The prefill stage is over and the decode stage begins on the same client."""
        self.hub.log_stage(request, request.started, now)
        request.position += 1
        request.assigned = request.arrived = request.started = now

    def _hand_over(self, request: Request, now: float) -> None:
        self._outgoing[request] = (request.held, request.shared)
        request.shared = ()
        self.scheduler.leave(request, keep_blocks=True)
        request.handed_over = True
        self._done(request, now)

    def _finish_decode(self, request: Request, now: float) -> None:
        outputs = request.outputs()
        longest = max(outputs)
        request.decode_span += now - request.stage_first
        request.decode_gaps += longest - 1
        request.total_emitted += sum(outputs)
        request.prompt += longest
        request.emitted = 0
        self._done(request, now)

    def _done(self, request: Request, now: float) -> None:
        self.assigned -= 1
        self.served += 1
        self.hub.finish_stage(request, now)

    def stop(self, now: float) -> None:
        """Apply the steps that ended by now; a step that is under way does not count."""
        if self._in_step:
            steps = self.steps_by(now)
            if steps and self._steps > 1:
                self._steps = steps
                self._complete(self._start + self._duration(steps))
        for request in self.scheduler.running:
            if not request.todo:
                self.decodes.sync(request)

    # -- what routers ask

    def load(self, measure: str, now: float) -> float:
        scheduler = self.scheduler
        if measure == "requests":
            return self.assigned
        if measure == "prompt_tokens":
            return scheduler.pending_prompt
        if measure == "tokens":
            return scheduler.pending_prompt + self.assigned
        if measure == "kv_tokens":
            held = scheduler.pool.used * self.limits.block_size
            return held + self._progress(now) * self.decodes.count + scheduler.pending_prompt
        if measure == "output_tokens":
            return self._remaining_output(now)
        return self._busy_for(now)

    def _progress(self, now: float) -> int:
        """Decode steps of the present jump that are done but not applied yet."""
        if not (self._in_step and self.scheduler.with_decodes):
            return 0
        return self.steps_by(now)

    def _remaining_output(self, now: float) -> float:
        done = self._progress(now) * self.decodes.count
        return self.scheduler.owed + self.decodes.pending_output() - done

    def _busy_for(self, now: float) -> float:
        """Predicted seconds until all that was assigned is done, at the present batch's pace."""
        scheduler, budget = self.scheduler, self.limits.max_batched_tokens
        seconds = 0.0
        if scheduler.pending_prompt:
            chunk = min(scheduler.pending_prompt, budget)
            seconds += scheduler.pending_prompt / chunk * self.cost.price([(chunk, 0)]).seconds
        output = self._remaining_output(now)
        if output > 0:
            count = max(self.decodes.count, min(self.assigned, self.limits.max_sequences), 1)
            context = self.decodes.context or count
            step = self.cost.price((), count, max(context, count)).seconds
            seconds += output / count * step
        return seconds

    def waiting_for(self) -> str:
        head = self.scheduler.queue.head()
        if head is None:
            return ""
        pool = self.scheduler.pool
        return (f"request {head.index} heads a queue of {len(self.scheduler.queue)}; "
                f"{pool.free} of {pool.capacity} blocks free, {len(self._outgoing)} prompts "
                "not handed over yet")  # fmt: skip
