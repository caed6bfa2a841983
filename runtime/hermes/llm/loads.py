"""What routers ask of an LLM client: measures of what it has to do (spec section 5.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxgraft.runtime.hermes.llm.client import LlmClient


def load_of(client: LlmClient, measure: str, now: float) -> float:
    """Load under a measure of ``routing.Measure``; queued and announced requests included."""
    scheduler = client.scheduler
    if measure == "prompt_tokens":
        return scheduler.pending_prompt
    if measure == "decodes":
        return client.decodes.count + sum(request.handed_over for request in scheduler.queue)
    if measure == "tokens":
        return scheduler.pending_prompt + client.assigned
    if measure == "kv_tokens":
        held = scheduler.pool.used * client.limits.block_size
        return held + client.progress(now) * client.decodes.count + scheduler.pending_prompt
    if measure == "output_tokens":
        return _remaining_output(client, now)
    if measure == "busy_seconds":
        return _busy_for(client, now)
    return client.assigned


def _remaining_output(client: LlmClient, now: float) -> float:
    """An oracle: tokens still to be emitted by all requests given to the client."""
    done = client.progress(now) * client.decodes.count
    return client.scheduler.owed + client.decodes.pending_output() - done


def _busy_for(client: LlmClient, now: float) -> float:
    """Predicted seconds until all that was assigned is done, at the present batch's pace."""
    scheduler, limits = client.scheduler, client.limits
    seconds = 0.0
    if scheduler.pending_prompt:
        chunk = min(scheduler.pending_prompt, limits.max_batched_tokens)
        seconds += scheduler.pending_prompt / chunk * client.cost.price([(chunk, 0)]).seconds
    output = _remaining_output(client, now)
    if output > 0:
        count = max(client.decodes.count, min(client.assigned, limits.max_sequences), 1)
        context = max(client.decodes.context, count)
        seconds += output / count * client.cost.price((), count, context).seconds
    return seconds
