"""An LLM client: takes requests, hands them on, and runs steps in between."""

from __future__ import annotations

import math
from typing import Literal

from fxgraft.runtime.hermes.client import Place
from fxgraft.runtime.hermes.costs import NO_LIMIT, StepCost
from fxgraft.runtime.hermes.llm.blocks import blocks_for
from fxgraft.runtime.hermes.llm.levels import LevelRules
from fxgraft.runtime.hermes.llm.loads import Loads
from fxgraft.runtime.hermes.llm.scheduler import WHOLE, Limits, final_blocks, owed_by
from fxgraft.runtime.hermes.llm.steps import StepRunner
from fxgraft.runtime.hermes.request import WAITING, Request
from fxgraft.runtime.hermes.stages import DECODE_KINDS, PREFILL, Stage

Role = Literal["both", "prefill", "decode"]


class LlmClient(StepRunner):
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
        levels: how requests change levels; None where no layer can be converted.
    """

    kind = "llm"
    __slots__ = ("_outgoing", "_surely_fits", "context_length", "model", "role")

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
        levels: LevelRules | None = None,
    ) -> None:
        super().__init__(
            name, cost=cost, limits=limits, stepwise=stepwise, swap_bandwidth=swap_bandwidth,
            marks=marks, levels=levels, place=place, idle_watts=idle_watts,
            dollars_per_hour=dollars_per_hour,
        )  # fmt: skip
        self.model = model
        self.role = role
        self.kv_bytes = kv_bytes
        self.context_length = context_length or NO_LIMIT
        self.scheduler.resumed = self._log_break
        self.scheduler.hands_over = role == "prefill"
        self._outgoing: dict[Request, tuple[int, tuple[int, ...]]] = {}
        # Requests of one branch with so many tokens in all need no closer look.
        self._surely_fits = min(self.context_length, limits.blocks * limits.block_size)
        if limits.strategy in WHOLE:
            self._surely_fits = min(self._surely_fits, limits.max_batched_tokens)

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
        scheduler = self.scheduler
        if request.handed_over:
            request.todo = 0
            request.live = sum([output > request.emitted for output in request.outputs()])
            scheduler.owed += owed_by(request)
            return
        request.emitted = 0
        request.live = len(request.branch_outputs) or 1 if request.decodes else 1
        if request.loaded:
            request.loaded = min(request.loaded, request.prompt - 1)
        request.todo = request.prompt - request.loaded
        scheduler.pending_prompt += request.todo
        if request.decodes and self.role != "prefill":
            scheduler.owed += owed_by(request)

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
            blocks = final_blocks(request, limits.block_size)
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
        is_first = scheduler.queue.size == 0 or limits.order != "fcfs"
        scheduler.queue.push(request)
        if not self._in_step:
            self.wake(now)
        elif self.levels is not None or (
            is_first
            and scheduler.queries < limits.max_sequences
            and limits.strategy != "static"
        ):  # fmt: skip
            self.cut(now)

    def withdraw(self, request: Request, now: float) -> bool:
        """Take a request out of the queue."""
        if not self.scheduler.queue.remove(request):
            return False
        self.forget(request)
        if self.levels is not None:
            self.levels.ended(request, now)
        self.wake(now)
        self.cut(now)
        return True

    def release(self, request: Request, now: float) -> None:
        """The KV of a prompt that was handed over has left: its blocks are free."""
        blocks, shared = self._outgoing.pop(request)
        pool = self.scheduler.pool
        pool.give(blocks - pool.unshare(shared))
        self.wake(now)
        if self.scheduler.queue.size:
            self.cut(now)

    # -- ends of stages

    def finish_prompt(self, request: Request, now: float) -> None:
        """Emit a token, and decode here, hand over, or be done."""
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
        self.finish_decode(request, now)

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

    def finish_decode(self, request: Request, now: float) -> None:
        """The decode stage ends; what was emitted belongs to the prompt of a later round."""
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
        if self.levels is not None:
            self.levels.ended(request, now)
        self.hub.finish_stage(request, now)

    # -- what routers and reports ask

    def load(self, measure: str, now: float) -> float:
        """See ``loads``."""
        if measure == "requests":
            return self.assigned
        done = self.steps_done(now)
        return Loads(self.scheduler, self.cost, self.assigned, done).under(measure)

    def waiting_for(self) -> str:
        """The head of the queue, and what memory is free."""
        head = self.scheduler.queue.head()
        if head is None:
            return ""
        pool = self.scheduler.pool
        return (f"request {head.index} heads a queue of {self.scheduler.queue.size}; "
                f"{pool.free} of {pool.capacity} blocks free, {len(self._outgoing)} prompts "
                "not handed over yet")  # fmt: skip
