"""Generation with a prefill and a decode graph in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fxgraft.backends.onnx.session import OrtValue, Session, to_ort, to_torch
from fxgraft.state import StepProgram
from fxgraft.stepping import ProgramFacts, arranged


class OnnxStepModel(ProgramFacts):
    """A ``StepModel`` whose state stays in onnxruntime's memory between steps.

    Args:
        step: the step graph that both sessions were made from.
        prefill: takes any number of new tokens.
        decode: takes one new token per row.
    """

    def __init__(self, step: StepProgram, prefill: Session, decode: Session) -> None:
        super().__init__(step.program)
        self.step_program, self._prefill, self._decode = step, prefill, decode
        self._own_inputs = step.own_inputs
        self._batch_dims = [state.shape.index("batch") for state in step.states]

    def empty_state(self, batch: int) -> list[OrtValue]:
        """State before the first token."""
        return [to_ort(tensor) for tensor in self.step_program.empty_state(batch)]

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        state: Sequence[OrtValue],
        inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, list[OrtValue]]:
        """Take new tokens in; see ``StepModel.step``."""
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **(inputs or {}),
        }
        own = map(to_ort, arranged(self._own_inputs, given))
        session = self._decode if input_ids.shape[1] == 1 else self._prefill
        logits, *after = session.run([*own, *state])
        return to_torch(logits)[:, -1], after

    def select(self, state: Sequence[OrtValue], rows: Tensor) -> list[OrtValue]:
        """State of only these rows."""
        return [
            to_ort(to_torch(value).index_select(dim, rows))
            for value, dim in zip(state, self._batch_dims, strict=True)
        ]
