"""The engine's loop: let requests in, take prompts in by chunks, generate, hand tokens out."""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxgraft.backend import Compiled
from fxgraft.collectives import random_seed
from fxgraft.errors import Error, InputError
from fxgraft.generation.options import SamplingOptions
from fxgraft.generation.stopping import StopStringMatcher
from fxgraft.generation.text import Vocabulary
from fxgraft.paged_model import PagedModel
from fxgraft.runtime.engine.batch import Batch
from fxgraft.runtime.engine.conversion import Conversion, active_ops
from fxgraft.runtime.engine.failures import as_error, not_finite
from fxgraft.runtime.engine.full_chunk import FullChunk
from fxgraft.runtime.engine.image_encoder import ImageEncoder
from fxgraft.runtime.engine.memory import Holding, StateMemory
from fxgraft.runtime.engine.options import EngineOptions
from fxgraft.runtime.engine.pending import Pending, override_sampled
from fxgraft.runtime.engine.policy import LayerPolicy
from fxgraft.runtime.engine.prefill import Prefill
from fxgraft.runtime.engine.prefix import seed_key
from fxgraft.runtime.engine.request import OnTokens, Request
from fxgraft.runtime.engine.setup import Limits, build_model
from fxgraft.runtime.engine.stats import Counters, EngineStats
from fxgraft.state import PROMPT_LENGTH
from fxgraft.stepping import ProgramFacts


class Engine:
    """Serves many requests over one compiled model; call it from one thread.

    Args:
        compiled: a causal language model, lowered by a backend that runs paged graphs.
        options: see ``EngineOptions``.
        tokenizer: of transformers; needed for requests with stop strings.
        policy: changes ops of running requests.

    Raises:
        LoweringError: the backend cannot run paged graphs.
        StateError: the model cannot generate with explicit state.
        InputError: the memory is too little for one request.

    Example:
        >>> engine = Engine(fxgraft.compile("smollm2-135m", ["optimize"], backend="torch"))
        >>> request = engine.submit(prompt, SamplingOptions(max_new_tokens=64))
        >>> while engine.step():
        ...     pass
        >>> request.tokens
    """

    def __init__(
        self,
        compiled: Compiled,
        options: EngineOptions | None = None,
        *,
        tokenizer: Any = None,
        policy: LayerPolicy | None = None,
    ) -> None:
        self.options = options or EngineOptions()
        self.facts = ProgramFacts(compiled.program)
        built = build_model(compiled, self.options, self.facts.context_length)
        self.model: PagedModel = built.model
        self.max_context = built.max_context
        self.memory: StateMemory = built.memory
        pages, capture = self.memory.pages_for(built.max_context) + 1, compiled.capture_step
        self.batch = Batch(self.model, self.options.max_batch, pages, compiled.row_bucket, capture)
        self.counters = Counters()
        self.waiting: deque[Request] = deque()
        self.image_encoder = ImageEncoder(compiled)
        self._full_chunk = FullChunk(self.model, self.options.chunk_tokens, pages, capture)
        self.prefill = Prefill(self.model, self.memory, self.options, self._full_chunk)
        on_gpu = self.model.device.type == "cuda"
        self._ahead = self.options.lookahead if self.options.lookahead is not None else on_gpu
        self._pending: deque[Pending] = deque()
        self._vocabulary = None if tokenizer is None else Vocabulary(tokenizer)
        self._numbers = itertools.count()
        self._limits = Limits(self.facts.vocab_size, self.max_context, self.model.paged)
        self._conversion = None if policy is None else Conversion(policy, self.batch, self.memory)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions,
        *,
        inputs: Mapping[str, float | str] | None = None,
        images: Mapping[str, Tensor] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Request:
        """Add a request; it waits until there is room. Its images are encoded at once.

        Args:
            prompt: token ids, at least one.
            sampling: how to continue it; ``eos_token_id`` None takes the model's.
            inputs: values of model inputs with one value per row, or their names.
            images: of a vision-language model, what its processor makes of the prompt's images in
                order, by name (``pixel_values``); the prompt has a token per feature.
            on_tokens: called in the engine's thread with the request and its new tokens, and with
                no tokens when it ends otherwise.

        Raises:
            InputError: the prompt is empty, too long or has unknown tokens, an input does not
                exist or does not take the value, or the images do not fit model and prompt.
            Error: encoding the images failed.
        """
        number = next(self._numbers)
        if sampling.eos_token_id is None:
            sampling = sampling.model_copy(update={"eos_token_id": self.facts.eos_token_ids})
        self._limits.check(prompt, sampling)
        given = self._limits.values(inputs or {})
        if any(spec.name == PROMPT_LENGTH for spec in self.model.paged.request_inputs):
            given.setdefault(PROMPT_LENGTH, len(prompt))
        request = Request(
            f"request-{number}", tuple(prompt), sampling, given, on_tokens, order=number
        )
        request.choices = dict.fromkeys(self.model.paged.choices, 0)
        if sampling.do_sample:
            seed = sampling.seed
            if seed is None:
                seed = random_seed(self.model.paged.program)
            request.generator = torch.Generator().manual_seed(seed)
        if sampling.stop_strings:
            if self._vocabulary is None:
                raise InputError("stop_strings need a tokenizer", "give the engine a tokenizer")
            request.matcher = StopStringMatcher(sampling.stop_strings, self._vocabulary)
        request.images = self.image_encoder.of_prompt(prompt, images)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request; what it holds is free at once. Nothing happens if it has ended."""
        if not request.is_finished:
            self._end(request, "cancelled")
            request.report([])

    def step(self) -> bool:
        """Let requests in, take in a chunk of prompts, generate one token per running request.

        Returns:
            Whether there was anything to do.
        """
        if not (self.waiting or self.prefill.requests or self.batch.count or self._pending):
            return False
        started = time.monotonic()
        self._admit()
        self._change_ops()
        self._take_in()
        if not self._ahead:
            self._collect(keep=0)  # the first token need not wait for the others' next ones
        launched = self._generate()
        self._collect(keep=1 if self._ahead and launched else 0)
        self.counters.steps += 1
        self.counters.step_seconds = time.monotonic() - started
        return True

    def stats(self) -> EngineStats:
        """Counts and gauges."""
        groups = self.memory.groups
        counts = vars(self.counters)
        total = sum(group.total for group in groups)
        idle = sum(group.idle for group in groups)
        return EngineStats(
            queued=len(self.waiting),
            prefilling=len(self.prefill.requests),
            running=self.batch.count,
            blocks_total=total,
            blocks_used=total - idle - sum(group.free for group in groups),
            blocks_cached=idle,
            slots_total=self.memory.slots_total,
            slots_used=self.memory.slots_used,
            layer_ops=self._layer_ops(),
            policy={} if self._conversion is None else self._conversion.gauges(),
            **counts,
        )

    def close(self) -> None:
        """Cancel every request and give up the model."""
        for request in [*self.waiting, *self.prefill.requests, *self.batch.requests]:
            self.cancel(request)
        self._pending.clear()

    def warm_up(self) -> None:
        """Prepare full chunks and steps over every number of rows, so that no request waits."""
        if self.model.paged.needs_mask:
            return
        self._full_chunk.prepare()
        rows = {self.batch.bucket(count) for count in range(1, self.options.max_batch + 1)}
        for count in sorted(rows):
            self.batch.prepare(count)

    def _admit(self) -> None:
        """First come, first served; requests that lost their state come before all others."""
        while self.waiting and self._room():
            request = self.waiting[0]
            self._choose_start(request)
            active = active_ops(self.model.paged, request.choices)
            if not self.memory.can_open(len(request.known), active):
                return
            self.waiting.popleft()
            self._open(request)

    def _room(self) -> bool:
        return self.batch.count + len(self.prefill.requests) < self.options.max_batch

    def _open(self, request: Request) -> None:
        if request.started is None:
            request.started = time.monotonic()
        seed = seed_key(request.inputs, request.choices)
        active = active_ops(self.model.paged, request.choices)
        request.holding = self.memory.open(seed, active)
        reused = self.prefill.add(request)
        if not request.tokens:
            request.reused_tokens = reused
            self.counters.prompt_tokens += len(request.prompt)
            self.counters.reused_tokens += reused
        request.status = "prefilling"

    def _choose_start(self, request: Request) -> None:
        """Ask the policy how a request begins; one that comes back goes on as it was."""
        if self._conversion is not None and not request.preemptions:
            prefilling = self.prefill.requests
            request.choices |= self._conversion.start(request, len(self.waiting), prefilling)

    def _change_ops(self) -> None:
        if self._conversion is None or not self.batch.count:
            return
        for request in self._conversion.apply(len(self.waiting), self.prefill.requests):
            self._collect(keep=0)
            if request.row is not None:
                self._preempt(request)

    def _take_in(self) -> None:
        """Take in a chunk of prompts; requests whose prompt is complete begin to generate."""
        for request, problem in self.prefill.run():
            if problem is not None:
                self._fail(request, problem)
        for request, logits in self.prefill.completed():
            pending = Pending.of_prefill(request, logits)
            request.launched = len(request.tokens) + 1
            request.status = "running"
            self._pending.append(pending)
            if not request.all_launched:
                assert request.holding is not None
                self.batch.join(request, pending.device_tokens.clamp(min=0), request.holding)

    def _generate(self) -> bool:
        """Launch one step over the running requests."""
        if any(request.sampling.repetition_penalty != 1 for request in self.batch.requests):
            # The choice depends on which tokens came before.
            self._collect(keep=0)
        self._make_room()
        if not self.batch.count:
            return False
        try:
            logits, chosen = self.batch.launch()
            override_sampled(self.batch, logits)
        except Exception as error:
            self._recover(error)
            return False
        requests = list(self.batch.requests)
        self._pending.append(Pending.of_step(requests, chosen))
        for request in requests:
            request.past += 1
            request.launched += 1
            if request.all_launched:
                self.batch.leave(request)
        return True

    def _make_room(self) -> None:
        """Give every row the page for its next token; whoever came last loses its state first."""
        for request in sorted(self.batch.requests, key=lambda r: r.order):
            if request.row is None:
                continue
            assert request.holding is not None
            self.memory.trim(request.holding, request.past)
            if self._free_for(request, request.holding, request.past + 1):
                added = self.memory.grow(request.holding, request.past + 1)
                if added:
                    self.batch.grew(request, added)

    def _free_for(self, request: Request, holding: Holding, tokens: int) -> bool:
        """Free memory until a running request can have this many tokens.

        Returns:
            False if it has ended, or lost its own state.
        """
        while request.holding is holding and not self.memory.can_grow(holding, tokens):
            if self._pending:
                # Requests may turn out to have ended.
                self._collect(keep=0)
            else:
                self._preempt(max(self.batch.requests, key=lambda r: r.order))
        return request.row is not None

    def _preempt(self, request: Request) -> None:
        """Take a request's state; it waits in front of all others and is computed again."""
        self._release(request)
        request.status = "preempted"
        request.preemptions += 1
        self.counters.preemptions += 1
        request.past = request.launched = 0
        self.waiting.appendleft(request)

    def _recover(self, error: Exception) -> None:
        """After a step that failed half-way: the last request fails, the others begin again."""
        self._collect(keep=0)
        running = sorted(self.batch.requests, key=lambda r: r.order)
        if not running:
            return
        self._fail(running[-1], as_error(error, f"generating for {len(running)} requests"))
        for request in reversed(running[:-1]):
            if request.row is not None:
                self._preempt(request)

    def _collect(self, keep: int) -> None:
        """Read tokens of earlier launches and hand them out."""
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            now_tokens = pending.read()
            now = time.monotonic()
            for request, token in zip(pending.requests, now_tokens, strict=True):
                if request.is_finished:
                    continue
                if token < 0:
                    self._fail(request, not_finite(request))
                    continue
                request.take(token, now)
                self.counters.generated_tokens += 1
                if request.is_finished:
                    self._count_end(request)
                request.report([token])

    def _fail(self, request: Request, error: Error) -> None:
        self._end(request, "error", error)
        request.report([])

    def _end(self, request: Request, reason: Any, error: Error | None = None) -> None:
        request.end(reason, time.monotonic(), error)
        self._count_end(request)

    def _count_end(self, request: Request) -> None:
        self._release(request)
        request.images = None
        if request in self.waiting:
            self.waiting.remove(request)
        if self._conversion is not None:
            self._conversion.ended(time.monotonic())
        self.counters.finished += 1
        self.counters.cancelled += request.finish_reason == "cancelled"
        self.counters.failed += request.finish_reason == "error"

    def _release(self, request: Request) -> None:
        """Take a request out of wherever it is, and give back what it holds."""
        if request.row is not None:
            self.batch.leave(request)
        self.prefill.remove(request)
        if request.holding is not None:
            if request.finish_reason != "error":
                self.prefill.keep_prefix(request)
            self.memory.close(request.holding)
            request.holding = None

    def _layer_ops(self) -> dict[int, dict[str, int]]:
        paged, running = self.model.paged, self.batch.requests
        ops = {number: {name: len(running)} for number, name in enumerate(paged.op_names)}
        for name, options in paged.choices.items():
            chosen = Counter(request.choices[name] for request in running)
            for option, numbers in enumerate(options):
                for number in numbers:
                    ops[number] = {paged.op_names[number]: chosen[option]}
        return ops
