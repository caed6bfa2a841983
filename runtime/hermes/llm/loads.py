"""What routers ask of an LLM client: measures of what it has to do (spec section 5.1)."""

from __future__ import annotations

from dataclasses import dataclass

from fxgraft.runtime.hermes.costs import StepCost
from fxgraft.runtime.hermes.llm.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Loads:
    """A client at one moment; what is queued or announced counts.

    Attributes:
        scheduler: of the client.
        cost: of its steps.
        assigned: requests that were routed to it.
        done: decode steps of the present jump that have ended but are not accounted for.
    """

    scheduler: Scheduler
    cost: StepCost
    assigned: int
    done: int

    def under(self, measure: str) -> float:
        """Load under a measure of ``routing.Measure``."""
        scheduler = self.scheduler
        if measure == "prompt_tokens":
            return scheduler.pending_prompt
        if measure == "decodes":
            handed = sum(request.handed_over for request in scheduler.queue)
            return scheduler.decodes.count + handed
        if measure == "tokens":
            return scheduler.pending_prompt + self.assigned
        if measure == "kv_tokens":
            held = scheduler.pool.used // scheduler.units * scheduler.limits.block_size
            return held + self.done * scheduler.decodes.count + scheduler.pending_prompt
        if measure == "output_tokens":
            return self._output()
        return self._seconds() if measure == "busy_seconds" else self.assigned

    def _output(self) -> float:
        """An oracle: tokens still to be emitted by all requests given to the client."""
        decodes = self.scheduler.decodes
        return self.scheduler.owed + decodes.pending_output() - self.done * decodes.count

    def _seconds(self) -> float:
        """Predicted time until all that was assigned is done, at the present batch's pace."""
        scheduler, limits = self.scheduler, self.scheduler.limits
        seconds, pending = 0.0, scheduler.pending_prompt
        if pending:
            chunk = min(pending, limits.max_batched_tokens)
            seconds += pending / chunk * self.cost.price([(chunk, 0)]).seconds
        output = self._output()
        if output > 0:
            decodes = scheduler.decodes
            count = max(decodes.count, min(self.assigned, limits.max_sequences), 1)
            context = max(decodes.context, count)
            seconds += output / count * self.cost.price((), count, context).seconds
        return seconds
