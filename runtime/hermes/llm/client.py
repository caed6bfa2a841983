"""An LLM client: runs the steps that its scheduler plans, at the price of its cost table."""

from __future__ import annotations

import math
from typing import Literal

from fxgraft.runtime.hermes.client import Client, Hub, Place
from fxgraft.runtime.hermes.costs import NO_LIMIT, StepCost
from fxgraft.runtime.hermes.llm.blocks import blocks_for
from fxgraft.runtime.hermes.llm.decodes import JumpingDecodes
from fxgraft.runtime.hermes.llm.loads import Loads
from fxgraft.runtime.hermes.llm.reference import ListedDecodes
from fxgraft.runtime.hermes.llm.scheduler import WHOLE, Limits, Scheduler, owed_by
from fxgraft.runtime.hermes.request import WAITING, Request
from fxgraft.runtime.hermes.stages import DECODE_KINDS, PREFILL, Stage

Role = Literal["both", "prefill", "decode"]
TIE = 1e-12
"""Times that differ by less than this share of themselves are one: they were computed by sums in
another order."""


class LlmClient(Client):
    """One server of one model.

    Args:
        name, place, idle_watts, dollars_per_hour: see ``Client``.
        model: the model it serves.
        cost: price of its steps.
        limits: what a step may contain.
        role: ``"prefill"`` hands requests over after their first token; ``"decode"`` takes them
            (and computes a preempted request's prompt again by itself).
        stepwise: use the reference, one step at a time, instead of jumping.
        kv_bytes: of keys and values per token, for transfers.
        swap_bandwidth: bytes per second to and from the host.
        context_length: most tokens of a sequence, 0 for no limit.
        marks: whether the cost may extrapolate, so that such steps must be counted.
    """

    kind = "llm"
    __slots__ = (
        "_first",
        "_in_step",
        "_joule_slope",
        "_joules",
        "_log_step",
        "_marks",
        "_outgoing",
        "_slope",
        "_start",
        "_steps",
        "_surely_fits",
        "_tokens",
        "_woken",
        "context_length",
        "cost",
        "decodes",
        "limits",
        "marks",
        "model",
        "role",
        "scheduler",
        "swap_bandwidth",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
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
        marks: bool = False,
    ) -> None:
        super().__init__(
            name, place=place, idle_watts=idle_watts, dollars_per_hour=dollars_per_hour
        )
        self.model = model
        self.cost = cost
        self.limits = limits
        self.role = role
        self.kv_bytes = kv_bytes
        self.swap_bandwidth = swap_bandwidth
        self.context_length = context_length or NO_LIMIT
        self.marks = marks
        # Requests of one branch with so many tokens in all need no closer look.
        self._surely_fits = min(self.context_length, limits.blocks * limits.block_size)
        if limits.strategy in WHOLE:
            self._surely_fits = min(self._surely_fits, limits.max_batched_tokens)
        kind = ListedDecodes if stepwise else JumpingDecodes
        self.decodes = kind(limits.block_size)
        self.scheduler = Scheduler(limits, self.decodes)
        self._runs_ahead = not (stepwise or self.scheduler.by_chunk)
        self.scheduler.resumed = self._log_break
        self.scheduler.hands_over = role == "prefill"
        self._in_step = False
        self._woken = False
        self._start = 0.0
        self._steps = 0
        self._tokens = 0
        self._first = self._slope = 0.0
        self._joules = self._joule_slope = 0.0
        self._marks = 0
        self._outgoing: dict[Request, tuple[int, tuple[int, ...]]] = {}

    def attach(self, index: int, hub: Hub) -> None:
        """Join a system and its log of gaps."""
        super().attach(index, hub)
        self.decodes.log_gaps(hub.gaps, index)
        self._log_step = hub.steps.append

    # -- taking requests

    def accepts(self, stage: Stage, model: str) -> bool:
        """It serves the model, and its role includes the stage."""
        if (stage.model or model) != self.model:
            return False
        if stage.kind in DECODE_KINDS:
            return self.role != "prefill"
        return stage.kind == PREFILL and self.role != "decode"

    def expect(self, request: Request) -> None:
        """Set what is to be computed and emitted here, and count it as load."""
        self.assigned += 1
        if request.handed_over:
            request.todo = 0
            request.live = sum([output > request.emitted for output in request.outputs()])
            self.scheduler.owed += owed_by(request)
            return
        request.emitted = 0
        request.live = len(request.branch_outputs) or 1 if request.decodes else 1
        if request.loaded:
            request.loaded = min(request.loaded, request.prompt - 1)
        request.todo = request.prompt - request.loaded
        self.scheduler.pending_prompt += request.todo
        if request.decodes and self.role != "prefill":
            self.scheduler.owed += owed_by(request)

    def forget(self, request: Request) -> None:
        """Its tokens are no longer to be done here."""
        self.assigned -= 1
        self.scheduler.pending_prompt -= request.todo
        if request.handed_over or (self.role != "prefill" and request.decodes):
            self.scheduler.owed -= owed_by(request)

    def problem(self, request: Request) -> str:
        """Why a request can never run here, or ``""``."""
        limits, tokens = self.limits, request.prompt
        if request.handed_over or (self.role != "prefill" and request.decodes):
            blocks = self._most_blocks(request)
            tokens += request.output
        else:
            blocks = blocks_for(tokens, limits.block_size)
        if tokens > self.context_length:
            return (f"its {tokens} tokens are more than the context length of "
                    f"{self.context_length} of client {self.name!r}")  # fmt: skip
        if blocks > limits.blocks:
            return f"it needs {blocks} KV blocks, client {self.name!r} has {limits.blocks}"
        if len(request.branch_outputs) > limits.max_sequences:
            return (f"its {len(request.branch_outputs)} branches are more than the "
                    f"{limits.max_sequences} sequences of client {self.name!r}")  # fmt: skip
        if self.scheduler.whole and request.todo > limits.max_batched_tokens:
            return (f"its prompt of {request.todo} tokens exceeds the "
                    f"{limits.max_batched_tokens} tokens of a step of client "
                    f"{self.name!r}, which does not cut prompts")  # fmt: skip
        return ""

    def _most_blocks(self, request: Request) -> int:
        size, outputs = self.limits.block_size, request.branch_outputs
        if not outputs:
            return blocks_for(request.prompt + request.output, size)
        return blocks_for(request.prompt, size) + sum(blocks_for(o, size) for o in outputs)

    def submit(self, request: Request, now: float) -> None:
        """A request joins the queue, or is rejected because it can never run."""
        if request.prompt + request.output > self._surely_fits or request.branch_outputs:
            problem = self.problem(request)
            if problem:
                self.forget(request)
                self.hub.reject(request, problem, now)
                return
        request.state = WAITING
        scheduler, limits = self.scheduler, self.limits
        is_seen = scheduler.queue.size == 0 or limits.order != "fcfs"
        scheduler.queue.push(request)
        if not self._in_step:
            self._wake(now)
        elif (
            self._steps > 1
            and is_seen
            and limits.strategy != "static"
            and scheduler.queries < limits.max_sequences
        ):
            self._cut(now)

    def withdraw(self, request: Request, now: float) -> bool:
        """Take a request out of the queue."""
        if not self.scheduler.queue.remove(request):
            return False
        self.forget(request)
        if not self._in_step:
            self._wake(now)
        elif self._steps > 1:
            self._cut(now)
        return True

    def _wake(self, now: float) -> None:
        """Look at the queue if idle."""
        if not self._woken and self.scheduler.queue.size:
            self._woken = True
            self.hub.schedule(self, now)

    def release(self, request: Request, now: float) -> None:
        """The KV of a prompt that was handed over has left: its blocks are free."""
        blocks, shared = self._outgoing.pop(request)
        pool = self.scheduler.pool
        pool.give(blocks - pool.unshare(shared))
        if not self._in_step:
            self._wake(now)
        elif self._steps > 1 and self.scheduler.queue.size:
            self._cut(now)

    # -- running steps

    def on_step(self, now: float, until: float) -> float | None:
        """A step or jump ends; plan and start the next one."""
        self._woken = False
        if self._in_step:
            self._complete(now)
        end = self._begin(now)
        if end is not None and end < until and self._runs_ahead:
            scheduler = self.scheduler
            if len(scheduler.chunks) == 1 == len(scheduler.prefilling):
                return self._run_prompt(end, until)
        return end

    def _run_prompt(self, end: float, until: float) -> float:
        """Run the steps of one prompt as long as only it and the decodes' contexts change.

        The same as ``_complete`` and ``_begin`` by turns, without what cannot happen here.

        Args:
            end: of the step that has begun, with a chunk of the prompt.
            until: nothing else happens before.

        Returns:
            The end of the last step that has begun.
        """
        scheduler, decodes, pool = self.scheduler, self.decodes, self.scheduler.pool
        request, new, before = scheduler.chunks[0]
        count, queued = decodes.count, scheduler.queue.size
        budget = self.limits.max_batched_tokens - count
        while end < until and (request.todo - new >= budget or not queued and request.todo > new):
            if count and (
                decodes.next_end <= decodes.clock + 1
                or decodes.allocate(2) > pool.capacity - pool.used
            ):
                break
            start, first, joules, used = self._start, self._first, self._joules, pool.used
            context, gap, older = decodes.context, 0.0, 0
            if count:
                pool.take(decodes.allocate(1))
                gap, older = decodes.advance(1, start, first, 0.0, end)
            self.steps_run += 1
            self.busy_seconds += end - start
            self.step_joules += joules
            self.marked_steps += self._marks
            self._log_step(
                (
                    self.index, start, end, 1, first, 0.0, 1, new, count, context, queued, used,
                    joules, gap, older,
                )
            )  # fmt: skip
            scheduler.pending_prompt -= new
            request.todo -= new
            before = request.computed = before + new
            new = request.todo if request.todo < budget else budget
            self._first, energy, self._marks = self.cost.price(
                [(new, before)], count, decodes.context
            )
            self._joules = energy or 0.0
            self._start = end
            end += self._first
        self._tokens = new
        scheduler.now = self._start
        scheduler.chunks[0] = request, new, before
        return end

    def _begin(self, now: float) -> float | None:
        """Start what the scheduler plans; returns its end."""
        scheduler = self.scheduler
        scheduler.now = now
        scheduler.plan()
        chunks = scheduler.chunks
        if chunks:
            self._price_mixed()
        elif scheduler.with_decodes:
            self._price_jump()
        else:
            return None
        if scheduler.swapped_tokens:
            self._first += scheduler.swapped_tokens * self.kv_bytes / self.swap_bandwidth
            scheduler.swapped_tokens = 0
            self._steps = 1
        self._in_step = True
        self._start = now
        for request, _, _ in chunks:
            if request.started < 0:
                request.prefill_started = now
                self._mark_start(request, now)
        if scheduler.joined:
            for request in scheduler.joined:
                if request.started < 0:
                    self._mark_start(request, now)
            scheduler.joined.clear()
        return now + (self._first if self._steps == 1 else self._duration(self._steps))

    def _mark_start(self, request: Request, now: float) -> None:
        request.started = now
        request.queue_time += now - request.arrived

    def _price_mixed(self) -> None:
        scheduler, decodes = self.scheduler, self.decodes
        if len(scheduler.chunks) == 1:
            _, tokens, before = scheduler.chunks[0]
            prompts = [(tokens, before)]
        else:
            prompts = [(new, before) for _, new, before in scheduler.chunks]
            tokens = sum([new for new, _ in prompts])
        self._tokens = tokens
        if scheduler.with_decodes:
            price = self.cost.price(prompts, decodes.count, decodes.context)
        else:
            price = self.cost.price(prompts)
        self._steps = 1
        self._first, joules, marked = price
        self._slope = 0.0
        self._joules, self._joule_slope = joules or 0.0, 0.0
        self._marks = marked

    def _price_jump(self) -> None:
        decodes = self.decodes
        count, context = decodes.count, decodes.context
        _, last, self._first, slope, self._joules, joule_slope = self.cost.decode_line(
            count, context
        )
        self._tokens = 0
        fit = (last - context) // count + 1 if last < NO_LIMIT else NO_LIMIT
        if fit < 1 or self.scheduler.preempted:
            fit = 1
        pool = self.scheduler.pool
        self._steps = decodes.jump(pool.capacity - pool.used, fit)
        self._slope, self._joule_slope = slope * count, joule_slope * count
        if self.marks:
            self._marks = self.cost.price((), count, context).extrapolated

    def _duration(self, steps: int) -> float:
        return steps * self._first + self._slope * (steps * (steps - 1) // 2)

    def steps_by(self, now: float) -> int:
        """Steps of the present jump that have ended strictly before ``now``."""
        now -= TIE * now
        elapsed, slope = now - self._start, self._slope
        guess = elapsed / self._first if self._first > 0.0 else self._steps
        if slope > 0.0:
            half = self._first - 0.5 * slope
            guess = (math.sqrt(half * half + 2.0 * slope * max(elapsed, 0.0)) - half) / slope
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
            self.hub.schedule(self, max(self._start + self._duration(steps), now))

    def _complete(self, now: float) -> None:
        scheduler, decodes, steps = self.scheduler, self.decodes, self._steps
        chunks = scheduler.chunks
        self._in_step = False
        joules = self._joules
        if steps > 1:
            joules = steps * joules + self._joule_slope * (steps * (steps - 1) // 2)
        self.steps_run += steps
        self.busy_seconds += now - self._start
        self.step_joules += joules
        if self._marks:
            self.marked_steps += steps
        pool = scheduler.pool
        used, count, context, gap, older = pool.used, 0, 0, 0.0, 0
        if scheduler.with_decodes:
            count, context = decodes.count, decodes.context
            blocks = decodes.allocate(steps)
            if blocks:
                pool.take(blocks)
            gap, older = decodes.advance(steps, self._start, self._first, self._slope, now)
        self._log_step(
            (
                self.index, self._start, now, steps, self._first, self._slope, len(chunks),
                self._tokens, count, context, scheduler.queue.size, used, joules, gap, older,
            )
        )  # fmt: skip
        if count and decodes.next_end <= decodes.clock:
            self._end_branches(now)
        if chunks:
            scheduler.chunks = []
            scheduler.pending_prompt -= self._tokens
            for request, new, _ in chunks:
                request.computed += new
                request.todo -= new
                if request.todo == 0:
                    self._finish_prompt(request, now)

    def _end_branches(self, now: float) -> None:
        for request, blocks, is_last in self.decodes.ended(now):
            self.scheduler.branch_ended(request, blocks, is_last=is_last)
            if is_last:
                self._finish_decode(request, now)

    # -- ends of stages

    def _finish_prompt(self, request: Request, now: float) -> None:
        scheduler = self.scheduler
        scheduler.prompt_ended(request)
        if not request.decodes:
            scheduler.leave(request)
            request.loaded = 0
            self._done(request, now)
            return
        self._emit(request, now)
        if self.role == "prefill" and request.emitted < request.output:
            self._hand_over(request, now)
            return
        if request.chain[request.position].kind == PREFILL:
            self._enter_decode(request, now)
        if request.emitted < request.output:
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
            self.hub.gaps.append((self.index, gap, request.live))
            self._log_break(request, now)
        request.last_token = now

    def _log_break(self, request: Request, resumed: float = -1.0) -> None:
        """A preempted decode goes on: with a token at ``resumed``, or where it stopped."""
        now = self.scheduler.now if resumed < 0 else resumed
        self.hub.breaks.append(
            (request.index, self.index, request.stopped, now, float(resumed >= 0))
        )
        request.stopped = -1.0

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
        output = request.output
        request.decode_span += now - request.stage_first
        request.decode_gaps += output - 1
        request.total_emitted += sum(request.branch_outputs) if request.branch_outputs else output
        request.prompt += output
        request.emitted = request.loaded = 0
        request.round += 1
        self._done(request, now)

    def _done(self, request: Request, now: float) -> None:
        self.assigned -= 1
        self.served += 1
        self.hub.finish_stage(request, now)

    def stop(self, now: float) -> None:
        """Apply the steps that ended by now; the one under way is logged as 0 steps."""
        if not self._in_step:
            return
        steps = min(self.steps_by(now), self._steps - 1)
        step_seconds = self._first + self._slope * steps
        joules = self._joules + self._joule_slope * steps
        start = self._start
        if steps:
            self._steps = steps
            start += self._duration(steps)
            self._complete(start)
        self._in_step = False
        if step_seconds > 0.0:
            joules *= (now - start) / step_seconds
        self.busy_seconds += now - start
        self.step_joules += joules
        scheduler = self.scheduler
        row = (self.index, start, now, 0, step_seconds, 0, 0, 0, 0, 0)
        self.hub.steps.append((*row, scheduler.queue.size, scheduler.pool.used, joules, 0, 0))
        for request in scheduler.running:
            if not request.todo:
                self.decodes.sync(request)

    # -- what routers ask

    def load(self, measure: str, now: float) -> float:
        """See ``loads``."""
        if measure == "requests":
            return self.assigned
        return Loads(self.scheduler, self.cost, self.assigned, self._progress(now)).under(measure)

    def _progress(self, now: float) -> int:
        """Decode steps of the present jump that are done but not applied yet."""
        if not (self._in_step and self.scheduler.with_decodes and self._steps > 1):
            return 0
        return self.steps_by(now)

    def waiting_for(self) -> str:
        """The head of the queue, and what memory is free."""
        head = self.scheduler.queue.head()
        if head is None:
            return ""
        pool = self.scheduler.pool
        return (f"request {head.index} heads a queue of {self.scheduler.queue.size}; "
                f"{pool.free} of {pool.capacity} blocks free, {len(self._outgoing)} prompts "
                "not handed over yet")  # fmt: skip
