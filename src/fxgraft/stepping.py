"""Step models over Programs: with explicit state, or by recomputing the whole sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fxgraft.errors import InputError, StateError
from fxgraft.kernels.spec import dims
from fxgraft.program import Input, Program
from fxgraft.state import PROMPT_LENGTH, StepProgram, is_token_input

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}


class ProgramFacts:
    """What generation needs to know about a Program (see ``fxgraft.generation.StepModel``)."""

    def __init__(self, program: Program) -> None:
        generation = cast("dict[str, Any]", program.origin.get("generation") or {})
        eos = cast("int | list[int] | None", generation.get("eos_token_id"))
        length = cast("int | None", program.origin.get("context_length"))
        self.context_length = length if length and length > 0 else None
        self.eos_token_ids = (
            tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else ()
        )
        self.pad_token_id: int | None = generation.get("pad_token_id")
        width = dims(program.output_nodes["logits"])[-1]
        self.vocab_size = program.input("input_ids").high or int(width)  # pyright: ignore[reportArgumentType]
        self.takes_positions = any(spec.name == "position_ids" for spec in program.inputs)


class StateModel(ProgramFacts):
    """A step graph and something that runs it.

    Args:
        step: the step graph.
        run: takes the graph's inputs in order and returns its outputs in order.
    """

    def __init__(self, step: StepProgram, run: Run) -> None:
        super().__init__(step.program)
        self.step_program = step
        self.run = run
        self._own_inputs = step.own_inputs
        self._batch_dims = [state.shape.index("batch") for state in step.states]

    def empty_state(self, batch: int) -> list[Tensor]:
        """State before the first token."""
        return self.step_program.empty_state(batch)

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        state: list[Tensor],
        inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Take new tokens in; see ``StepModel.step``."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **(inputs or {}),
        }
        own = arranged(self._own_inputs, given)
        results = self.run([*own, *state])
        return results[0][:, -1], list(results[1:])

    def select(self, state: list[Tensor], rows: Tensor) -> list[Tensor]:
        """State of only these rows."""
        return [
            tensor.index_select(dim, rows)
            for tensor, dim in zip(state, self._batch_dims, strict=True)
        ]


def arranged(specs: Sequence[Input], given: Mapping[str, Tensor]) -> list[Tensor]:
    """Values of a step graph's own inputs in order; neutral ones where nothing is given.

    Args:
        specs: the inputs.
        given: by name, ``input_ids`` among them.
    """
    ids = given["input_ids"]
    batch, new = ids.shape
    return [
        given[spec.name] if spec.name in given else neutral(spec, batch, ids.device, new)
        for spec in specs
    ]


def neutral(spec: Input, batch: int, device: torch.device, new: int = 1) -> Tensor:
    """The value of an input with a value per row, or per new token, where nobody sets one."""
    shape = (batch, *(new if size == "sequence" else int(size) for size in spec.shape[1:]))
    fill = torch.ones if spec.default == "ones" else torch.zeros
    return fill(shape, dtype=spec.dtype, device=device)


@dataclass(frozen=True)
class Seen:
    """What a model that keeps no state has seen.

    Attributes:
        tokens, positions: int64 [B, P].
        prompt_lengths: int64 [B], real tokens of the first call.
        inputs: values per token [B, P, ...] of the model's other inputs.
    """

    tokens: Tensor
    positions: Tensor
    prompt_lengths: Tensor
    inputs: dict[str, Tensor]


class RecomputeModel(ProgramFacts):
    """Runs the whole sequence again for every token: slow, and right for any causal model."""

    def __init__(self, program: Program, run: Run) -> None:
        known = {"input_ids", "attention_mask", "position_ids", PROMPT_LENGTH}
        self._per_token = [spec for spec in program.inputs if is_token_input(spec)]
        known |= {spec.name for spec in self._per_token}
        others = [spec.name for spec in program.inputs if spec.name not in known]
        if others or "logits" not in program.outputs:
            raise InputError(
                f"this model cannot generate text from input_ids alone: its inputs are "
                f"{', '.join(spec.name for spec in program.inputs)}, its outputs "
                f"{', '.join(program.outputs)}",
                "generate with a causal language model",
            )
        super().__init__(program)
        self._run = run
        self._names = [spec.name for spec in program.inputs]

    def empty_state(self, batch: int) -> Seen:
        """No tokens and no positions yet."""
        empty = torch.empty(batch, 0, dtype=torch.int64)
        return Seen(empty, empty, torch.zeros(batch, dtype=torch.int64), {})

    @torch.no_grad()
    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        state: Seen,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Seen]:
        """Take new tokens in; see ``StepModel.step``."""
        after = self._with_new(input_ids, attention_mask, position_ids, state, inputs or {})
        given = {
            "input_ids": after.tokens,
            "attention_mask": attention_mask,
            "position_ids": after.positions,
            PROMPT_LENGTH: after.prompt_lengths,
            **after.inputs,
        }
        logits = self._run([given[name] for name in self._names])[0]
        return logits[:, -1], after

    def _with_new(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        state: Seen,
        inputs: Mapping[str, Tensor],
    ) -> Seen:
        device = input_ids.device
        batch, new = input_ids.shape
        lengths = state.prompt_lengths.to(device)
        if state.tokens.shape[1] == 0:
            lengths = attention_mask.sum(1)
        values: dict[str, Tensor] = {}
        for spec in self._per_token:
            value = inputs.get(spec.name)
            value = neutral(spec, batch, device, new) if value is None else value
            before = state.inputs.get(spec.name)
            values[spec.name] = value if before is None else torch.cat([before, value], 1)
        return Seen(
            torch.cat([state.tokens.to(device), input_ids], 1),
            torch.cat([state.positions.to(device), position_ids], 1),
            lengths,
            values,
        )

    def select(self, state: Seen, rows: Tensor) -> Seen:
        """State of only these rows."""
        values = {name: value[rows] for name, value in state.inputs.items()}
        return Seen(state.tokens[rows], state.positions[rows], state.prompt_lengths[rows], values)


def check_steps(program: Program, step: StepProgram) -> None:
    """Compare prefill, a chunk and single steps with the whole sequence, left padding included.

    Programs without weight values are not checked.

    Raises:
        StateError: some step's logits differ; says which and by how much.
    """
    if program.device.type == "meta":
        return
    length, cuts = 12, (6, 9, 10, 11, 12)
    values = program.example(seed=7, batch=2, sequence=length)
    mask = torch.ones(2, length, dtype=torch.int64, device=program.device)
    if "attention_mask" in values:
        mask[0, :2] = 0
        values["attention_mask"] = mask
    if "position_ids" in values:
        values["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if PROMPT_LENGTH in values:
        values[PROMPT_LENGTH] = torch.full_like(values[PROMPT_LENGTH], cuts[0])
    with torch.no_grad():
        whole = program.graph_module(*[values[spec.name] for spec in program.inputs])
    logits = whole[program.outputs.index("logits")]
    model = StateModel(step, lambda inputs: step.program.graph_module(*inputs))
    state, start = model.empty_state(2), 0
    for end in cuts:
        positions = values.get("position_ids", mask)[:, start:end]
        tokens, inputs = values["input_ids"][:, start:end], other_inputs(step, values, start, end)
        got, state = model.step(tokens, mask[:, :end], positions, state, inputs)
        _compare(got, logits[:, end - 1], tolerance(program), start, end)
        start = end


def other_inputs(
    step: StepProgram, values: Mapping[str, Tensor], start: int, end: int
) -> dict[str, Tensor]:
    """Values for tokens ``start`` to ``end`` of the inputs that not every language model takes."""
    own = {"input_ids", "attention_mask", "position_ids"}
    return {
        spec.name: values[spec.name][:, start:end] if is_token_input(spec) else values[spec.name]
        for spec in step.own_inputs
        if spec.name not in own
    }


def tolerance(program: Program) -> float:
    """Largest relative error of logits, by the coarsest type that the Program computes in."""
    kinds = {weight.dtype for _, weight in program.weights() if weight.is_floating_point()}
    return max((_TOLERANCE.get(kind, 1e-4) for kind in kinds), default=1e-4)


def _compare(got: Tensor, wanted: Tensor, limit: float, start: int, end: int) -> None:
    scale = wanted.double().abs().max().clamp(min=1e-6)
    error = float((got.double() - wanted.double()).abs().max() / scale)
    if not error <= limit:
        raise StateError(
            f"with explicit state, the step over tokens {start} to {end - 1} gives logits that "
            f"differ from the whole sequence by {error:.1e} (relative)",
            "the model mixes tokens in a way that no state carries over; generation recomputes "
            "the whole sequence instead",
        )
