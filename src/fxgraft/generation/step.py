"""What a model must offer so that tokens can be generated with it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from fxgraft.generation.unread import UnreadTokens


class StepModel(Protocol):
    """A causal language model with explicit state.

    Axes: B batch, S new tokens (the prompt's length at prefill, 1 at decode), P tokens before
    them, V vocabulary. The state's type is the model's own affair.
    """

    @property
    def context_length(self) -> int | None:
        """Most tokens of prompt and answer together; None: unbounded."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model embeds."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ...

    @property
    def pad_token_id(self) -> int | None:
        """Token that fills up rows."""
        ...

    @property
    def takes_positions(self) -> bool:
        """Whether ``position_ids`` make a difference."""
        ...

    def empty_state(self, batch: int) -> Any:
        """The state before the first token of ``batch`` rows."""
        ...

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, state: Any
    ) -> tuple[Tensor, Any]:
        """Take new tokens in.

        Args:
            input_ids: int64 [B, S].
            attention_mask: int64 [B, P + S], 0 at padding.
            position_ids: int64 [B, S].
            state: from ``empty_state``, ``step`` or ``select``; not used again afterwards.

        Returns:
            Floating-point logits of the last position [B, V], and the new state.
        """
        ...

    def select(self, state: Any, rows: Tensor) -> Any:
        """The state of only these rows (int64 [R]), in this order."""
        ...


@runtime_checkable
class GreedyStepModel(StepModel, Protocol):
    """One that chooses the likeliest tokens itself, so that steps follow each other at once."""

    def step_greedy(self, tokens: Tensor | None, state: Any) -> tuple[UnreadTokens, Any]:
        """Take in one token per row, and choose the likeliest next one.

        Args:
            tokens: int64 [B]; None takes those that the step before chose, read or not.
            state: as in ``step``.

        Returns:
            The next tokens, -1 where logits are not finite, and the new state.
        """
        ...
