"""Running the steps that a scheduler plans: prices, jumps, and what a step changes."""

from __future__ import annotations

import math
from abc import abstractmethod

from fxgraft.runtime.hermes.client import Client, Hub, Place
from fxgraft.runtime.hermes.costs import NO_LIMIT, StepCost
from fxgraft.runtime.hermes.llm.decodes import Decodes, JumpingDecodes
from fxgraft.runtime.hermes.llm.levels import LevelPolicy, LevelRules
from fxgraft.runtime.hermes.llm.reference import ListedDecodes
from fxgraft.runtime.hermes.llm.scheduler import Limits, Scheduler
from fxgraft.runtime.hermes.request import Request

TIE = 1e-12
"""Times that differ by less than this share of themselves are one: they were computed by sums in
another order."""


class StepRunner(Client):
    """The half of an LLM client that runs steps; a subclass takes requests and ends their stages.

    Args:
        name, place, idle_watts, dollars_per_hour: see ``Client``.
        cost: price of its steps.
        limits: what a step may contain.
        stepwise: use the reference, one step at a time, instead of jumping.
        swap_bandwidth: bytes per second to and from the host.
        marks: whether the cost may extrapolate, so that such steps must be counted.
        levels: how requests change levels; None where no layer can be converted.
    """

    __slots__ = (
        "_first", "_in_step", "_joule_slope", "_joules", "_log_step", "_marks", "_runs_ahead",
        "_slope", "_start", "_steps", "_tokens", "_woken", "cost", "decodes", "levels", "limits",
        "marks", "scheduler", "swap_bandwidth",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        *,
        cost: StepCost,
        limits: Limits,
        stepwise: bool,
        swap_bandwidth: float,
        marks: bool,
        levels: LevelRules | None,
        place: Place | None,
        idle_watts: float,
        dollars_per_hour: float,
    ) -> None:
        super().__init__(
            name, place=place, idle_watts=idle_watts, dollars_per_hour=dollars_per_hour
        )
        self.cost = cost
        self.limits = limits
        self.swap_bandwidth = swap_bandwidth
        self.marks = marks
        kind = ListedDecodes if stepwise else JumpingDecodes
        self.decodes: Decodes = kind(limits.block_size)
        units = 1 if levels is None else levels.levels.layers
        self.scheduler = Scheduler(limits, self.decodes, units)
        self.levels = None if levels is None else LevelPolicy(levels, self.scheduler)
        self.scheduler.levels = self.levels
        by_step = limits.strategy == "alternating" or levels is not None
        self._runs_ahead = not (stepwise or by_step or self.scheduler.by_chunk)
        self._in_step = False
        self._woken = False
        # The step or jump that is under way; prices are of its first step.
        self._start = 0.0
        self._steps = 0
        self._tokens = 0
        self._first = self._slope = 0.0
        self._joules = self._joule_slope = 0.0
        self._marks = False

    def attach(self, index: int, hub: Hub) -> None:
        """Join a system and its logs."""
        super().attach(index, hub)
        self.decodes.log_gaps(hub.gaps, index)
        self._log_step = hub.steps.append

    @abstractmethod
    def finish_prompt(self, request: Request, now: float) -> None:
        """The last token of a prompt is computed."""

    @abstractmethod
    def finish_decode(self, request: Request, now: float) -> None:
        """The last branch of a request has emitted its last token."""

    def wake(self, now: float) -> None:
        """Look at the queue if idle."""
        if not self._in_step and not self._woken and self.scheduler.queue.size:
            self._woken = True
            self.hub.schedule(self, now)

    # -- one step, or a jump over several

    def on_step(self, now: float, until: float) -> float | None:
        """A step or jump ends; plan and start the next one."""
        self._woken = False
        if self._in_step:
            self._complete(now)
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
            seconds = scheduler.swapped_tokens * self.kv_bytes / self.swap_bandwidth
            self._first += seconds
            self._joules += seconds * self.idle_watts
            scheduler.swapped_tokens = 0
            self._steps = 1
        self._in_step = True
        self._start = now
        if self.levels is not None:
            self._heed(self.levels)
        steps = self._steps
        if steps > 1:
            return now + (steps * self._first + self._slope * (steps * (steps - 1) // 2))
        end = now + self._first
        if not chunks:
            return end
        if end < until and self._runs_ahead and len(chunks) == 1 == len(scheduler.prefilling):
            return self._run_prompt(end, until)
        return end

    def _heed(self, levels: LevelPolicy) -> None:
        """Fold before the step, and end a jump where the policy may decide otherwise."""
        seconds, then = levels.take_folding(), levels.next_change
        if seconds:
            self._first += seconds
            self._joules += seconds * self.idle_watts
            self._steps = 1
        elif then is not None and self._steps > 1:
            self._steps = min(self._steps, self.steps_by(then) + 1)

    def _price_mixed(self) -> None:
        scheduler, decodes = self.scheduler, self.decodes
        cost = self.cost if self.levels is None else self.levels.cost()
        chunks = scheduler.chunks
        if len(chunks) == 1:
            _, tokens, before = chunks[0]
            prompts = [(tokens, before)]
        else:
            prompts = [(new, before) for _, new, before in chunks]
            tokens = sum([new for new, _ in prompts])
        if scheduler.with_decodes:
            price = cost.price(prompts, decodes.count, decodes.context)
        else:
            price = cost.price(prompts)
        self._first, joules, self._marks = price
        self._joules = joules or 0.0
        self._tokens = tokens
        self._slope = self._joule_slope = 0.0
        self._steps = 1

    def _price_jump(self) -> None:
        decodes = self.decodes
        count, context = decodes.count, decodes.context
        scheduler = self.scheduler
        cost = self.cost if self.levels is None else self.levels.cost()
        _, last, self._first, slope, self._joules, joule_slope = cost.decode_line(count, context)
        fit = (last - context) // count + 1 if last < NO_LIMIT else NO_LIMIT
        if fit < 1 or scheduler.preempted or scheduler.one_step:
            fit = 1
        pool = scheduler.pool
        self._steps = decodes.jump(pool.capacity - pool.used, fit)
        self._slope, self._joule_slope = slope * count, joule_slope * count
        self._tokens = 0
        if self.marks:
            self._marks = cost.price((), count, context).extrapolated

    def _run_prompt(self, end: float, until: float) -> float:
        """Run the steps of one prompt as long as only it and the decodes' contexts change.

        The same as ``on_step`` again and again, without what cannot happen here.

        Args:
            end: of the step that has begun, with a chunk of the prompt.
            until: nothing else happens before.

        Returns:
            The end of the last step that has begun.
        """
        scheduler, decodes, pool = self.scheduler, self.decodes, self.scheduler.pool
        request, new, before = scheduler.chunks[0]
        todo, before, done = request.todo - new, before + new, 0
        count, queued = decodes.count, scheduler.queue.size
        budget = self.limits.max_batched_tokens - count
        least = budget if queued else 1  # with less, there would be room for the queue
        room = pool.capacity - 2 * count  # blocks of two steps, at most
        index, start, first, joules = self.index, self._start, self._first, self._joules
        steps = decodes.next_end - decodes.clock - 1  # until the last before a branch ends
        price, log, context, gap, older = self.cost.price, self._log_step, 0, 0.0, 0
        while end < until and todo >= least and steps > 0:
            used = pool.used
            if count:
                if used > room:
                    break
                context, blocks = decodes.context, decodes.due
                if blocks:
                    pool.take(blocks)
                gap, older = decodes.advance(1, start, first, 0.0, end)
                steps -= 1
            log(
                (
                    index, start, end, 1, first, 0.0, 1, new, count, context, queued, used, joules,
                    gap, older,
                )
            )  # fmt: skip
            if self._marks:
                self.marked_steps += 1
            done += new
            new = todo if todo < budget else budget
            first, energy, self._marks = price(((new, before),), count, decodes.context)
            joules = energy or 0.0
            todo -= new
            before += new
            start = end
            end += first
        self._start, self._first, self._joules, self._tokens = start, first, joules, new
        request.todo -= done
        request.computed += done
        scheduler.pending_prompt -= done
        scheduler.now = start
        scheduler.chunks[0] = request, new, before - new
        return end

    def _duration(self, steps: int) -> float:
        if steps == 1:
            return self._first
        return steps * self._first + self._slope * (steps * (steps - 1) // 2)

    def steps_by(self, now: float) -> int:
        """Steps of the present jump that have ended strictly before ``now``."""
        now -= TIE * now
        elapsed, slope = now - self._start, self._slope
        guess = elapsed / self._first if self._first > 0.0 else self._steps
        if slope > 0.0:
            half = self._first - 0.5 * slope
            guess = (math.sqrt(half * half + 2.0 * slope * max(elapsed, 0.0)) - half) / slope
        steps, most = int(guess), self._steps
        if steps >= most:
            steps = most
        elif steps < 0:
            steps = 0
        while steps and self._start + self._duration(steps) >= now:
            steps -= 1
        while steps < most and self._start + self._duration(steps + 1) < now:
            steps += 1
        return steps

    def cut(self, now: float) -> None:
        """End a jump that is under way with the step that runs at ``now``."""
        if self._steps <= 1 or not self._in_step:
            return
        steps = self.steps_by(now) + 1
        if steps < self._steps:
            self._steps = steps
            self.hub.schedule(self, max(self._start + self._duration(steps), now))

    def _complete(self, now: float) -> None:
        """Apply the step or jump that ends now."""
        scheduler, decodes, steps = self.scheduler, self.decodes, self._steps
        chunks, pool = scheduler.chunks, scheduler.pool
        self._in_step = False
        start, first, slope, joules = self._start, self._first, self._slope, self._joules
        used, count, context, gap, older = pool.used, 0, 0, 0.0, 0
        if scheduler.with_decodes:
            count, context, blocks = decodes.count, decodes.context, decodes.due
            if steps > 1:
                joules = steps * joules + self._joule_slope * (steps * (steps - 1) // 2)
                blocks = decodes.allocate(steps)
            if blocks:
                pool.take(blocks)
            gap, older = decodes.advance(steps, start, first, slope, now)
        if self._marks:
            self.marked_steps += steps
        self._log_step(
            (
                self.index, start, now, steps, first, slope, len(chunks), self._tokens, count,
                context, scheduler.queue.size, used, joules, gap, older,
            )
        )  # fmt: skip
        if count and decodes.next_end <= decodes.clock:
            for request, blocks, is_last in decodes.ended(now):
                scheduler.branch_ended(request, blocks, is_last=is_last)
                if is_last:
                    self.finish_decode(request, now)
        if chunks:
            scheduler.chunks = []
            scheduler.pending_prompt -= self._tokens
            for request, new, _ in chunks:
                request.computed += new
                request.todo -= new
                if request.todo == 0:
                    self.finish_prompt(request, now)

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
        scheduler = self.scheduler
        row = (self.index, start, now, 0, step_seconds, 0, 0, 0, 0, 0)
        self._log_step((*row, scheduler.queue.size, scheduler.pool.used, joules, 0, 0))
        for request in scheduler.running:
            if not request.todo:
                self.decodes.sync(request)

    def steps_done(self, now: float) -> int:
        """Decode steps of the present jump that are done but not applied yet."""
        if not (self._in_step and self.scheduler.with_decodes and self._steps > 1):
            return 0
        return self.steps_by(now)
