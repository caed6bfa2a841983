"""Prompts with images: the step model of one call of ``generate``, given features of its images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fxgraft import images
from fxgraft.errors import InputError
from fxgraft.generation import StepModel
from fxgraft.program import Program


class InputStepModel(StepModel, Protocol):
    """A step model that takes values of the model's other inputs too."""

    def step(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        state: Any,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """Take new tokens in; see ``StepModel.step``."""
        ...


class ImageStepModel:
    """Writes image features over the image tokens of the prompts, row by row and in order.

    Args:
        model: of the language model behind the images.
        features: [N, D], of all images of the call.
        tokens: ids of image tokens.
    """

    def __init__(self, model: InputStepModel, features: Tensor, tokens: tuple[int, ...]) -> None:
        self._model, self._tokens = model, tokens
        self._features: Tensor | None = features
        self.context_length, self.vocab_size = model.context_length, model.vocab_size
        self.eos_token_ids, self.pad_token_id = model.eos_token_ids, model.pad_token_id
        self.takes_positions = model.takes_positions

    def empty_state(self, batch: int) -> Any:
        """State before the first token."""
        return self._model.empty_state(batch)

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, state: Any
    ) -> tuple[Tensor, Any]:
        """Take new tokens in; the first call takes in the prompts."""
        if self._features is None:
            return self._model.step(input_ids, attention_mask, position_ids, state)
        embeds = images.place(self._features, input_ids, self._tokens)
        self._features = None
        given = {images.EMBEDS: embeds}
        return self._model.step(input_ids, attention_mask, position_ids, state, given)

    def select(self, state: Any, rows: Tensor) -> Any:
        """State of only these rows."""
        return self._model.select(state, rows)


def with_images(
    program: Program,
    encoder: Callable[[], Program],
    model: InputStepModel,
    values: Mapping[str, Tensor] | None,
) -> StepModel:
    """The step model for one call of ``generate``.

    Args:
        program: the whole model.
        encoder: gives its image encoder, once there are images.
        model: of its language model.
        values: image inputs by name, or None for prompts without images.

    Raises:
        InputError: the model takes no images, or an image input is wrong.
    """
    merge = images.find_merge(program)
    if merge is None:
        raise InputError(
            "argument 'images' is given, but the model writes no images over its tokens",
            "generate with a vision-language model, or leave the argument out",
        )
    if values is None:
        _note_no_image(program)
        dtype = merge.features.meta["val"].dtype
        features = torch.zeros(0, merge.width, dtype=dtype, device=program.device)
    else:
        features = images.encode(encoder(), {n: v.to(program.device) for n, v in values.items()})
    return ImageStepModel(model, features, merge.tokens)


def _note_no_image(program: Program) -> None:
    gate = torch.ops.fxgraft.head_gate.default
    gates = program.graph.find_nodes(op="call_function", target=gate)
    makers = sorted({node.meta.get("made_by", "") for node in gates} - {""})
    if makers:
        warnings.warn(
            f"the prompts come without images: the pass {makers[0]!r} changes nothing in them",
            stacklevel=4,
        )
