"""Generation of tokens: prompts, sampling, stopping, and the loop around a step model.

``generate`` is the loop; it drives anything that has the interface of ``StepModel``. Each part
works row by row, so that continuous batching can use the same parts with other options per row.
This package imports torch, pydantic and ``fxgraft.errors`` only.
"""

from fxgraft.generation.loop import Callback, FinishReason, GenerationOutput, generate
from fxgraft.generation.options import SamplingKeywords, SamplingOptions
from fxgraft.generation.processors import History, process_logits
from fxgraft.generation.prompts import Prompt, TokenIds, prepare_prompt
from fxgraft.generation.sampling import row_generators, sample
from fxgraft.generation.step import StepModel
from fxgraft.generation.stopping import StopStringMatcher
from fxgraft.generation.text import TextStream, Vocabulary

__all__ = [
    "Callback",
    "FinishReason",
    "GenerationOutput",
    "History",
    "Prompt",
    "SamplingKeywords",
    "SamplingOptions",
    "StepModel",
    "StopStringMatcher",
    "TextStream",
    "TokenIds",
    "Vocabulary",
    "generate",
    "prepare_prompt",
    "process_logits",
    "row_generators",
    "sample",
]
