"""Backend and Compiled: what a Program is lowered to, and how it is called."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Unpack, cast

import torch

from fxgraft import generation, image_prompts
from fxgraft import images as image_features
from fxgraft.collectives import random_seed
from fxgraft.errors import InputError, LoweringError, StateError
from fxgraft.generation import SamplingKeywords, StepModel
from fxgraft.image_prompts import InputStepModel
from fxgraft.paged_model import RunPages
from fxgraft.paging import PagedProgram
from fxgraft.program import Program
from fxgraft.report import Report
from fxgraft.state import StepProgram, insert_state
from fxgraft.stepping import RecomputeModel, check_steps


def _eager(program: Program) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    return lambda values: program.graph_module(*values)


class Outputs(OrderedDict[str, torch.Tensor]):
    """Named outputs, readable by key, by attribute and by position."""

    def __getattr__(self, name: str) -> torch.Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output {name!r}; there are: {', '.join(self)}") from None

    def to_tuple(self) -> tuple[torch.Tensor, ...]:
        """The outputs in order."""
        return tuple(self.values())


class Backend(ABC):
    """Lowers Programs. A backend is the object ``BACKEND`` of ``fxgraft.backends.<name>``."""

    name: ClassVar[str]

    @abstractmethod
    def lower(self, program: Program, **options: Any) -> Compiled:
        """Make a Program runnable.

        Args:
            program: what to run; it is not changed.
            options: of this backend.

        Raises:
            LoweringError: the Program holds something this backend cannot run.
            InputError: an option is unknown or wrong.
        """

    @abstractmethod
    def available(self) -> str | None:
        """None if the backend works on this machine, else what is missing."""

    def check_options(self, options: Mapping[str, Any]) -> object:
        """Refuse wrong options before any work is done.

        Raises:
            InputError: an option is unknown or wrong.
            LoweringError: it cannot be used on this machine.
        """
        return options

    def export(self, program: Program, folder: Path, **options: Any) -> Path:
        """Write a Program as files for other tools.

        Raises:
            LoweringError: the Program cannot be exported, or this backend writes no files.
        """
        raise LoweringError(
            f"backend {self.name!r} writes no files", "export with the backend 'onnx'"
        )


class Compiled(ABC):
    """A lowered Program: called like the original model, and able to generate.

    Attributes:
        program: what was lowered.
        backend: name of the backend.
        options: its options, as JSON values.
        state_problem: why generation keeps no state, None if it does or was not asked yet.
        trials: what ``backend="auto"`` tried before it chose this one.
    """

    def __init__(self, program: Program, backend: str, options: Mapping[str, Any]) -> None:
        self.program = program
        self.backend = backend
        self.options = dict(options)
        self.state_problem: str | None = None
        self.trials: list[Any] = []

    @abstractmethod
    def run(self, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Run the whole-sequence graph on inputs in placeholder order."""

    @abstractmethod
    def lower_step(self, step: StepProgram) -> StepModel:
        """Lower a step graph for generation."""

    @abstractmethod
    def describe(self) -> Report:
        """Which kernel or library runs each kind of node, and why."""

    def lower_pages(self, paged: PagedProgram) -> RunPages:
        """Lower a paged graph for the engine.

        Raises:
            LoweringError: this backend cannot run paged graphs.
        """
        raise LoweringError(
            f"backend {self.backend!r} runs no paged graphs, which the engine needs",
            "compile with backend 'torch' or 'triton'",
        )

    def row_bucket(self, rows: int) -> int:
        """The number of rows that a step over ``rows`` requests computes."""
        return rows

    def capture_step(self, step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Prepare a function that always uses the same tensors for being called many times.

        It may be called while preparing. What it returns may be overwritten by the next call.
        """
        return step

    def __call__(self, *args: torch.Tensor, **kwargs: torch.Tensor | None) -> Any:
        """Run the model on whole sequences.

        Takes the original model's inputs, by position or name. Returns what the original
        returned: named outputs, a tuple, or one tensor.
        """
        results = self.run(self.program.bind(*args, **kwargs))
        kind = self.program.origin.get("output", "mapping")
        if kind == "tensor":
            return results[0]
        if kind == "tuple":
            return tuple(results)
        return Outputs(zip(self.program.outputs, results, strict=True))

    @cached_property
    def step_model(self) -> StepModel:
        """The model step by step: with explicit state, or recomputing where that cannot be."""
        program = self.language_model
        run = self.run if program is self.program else _eager(program)
        try:
            step = insert_state(program)
            check_steps(program, step)
        except StateError as error:
            self.state_problem = error.problem
            return RecomputeModel(program, run)
        return self.lower_step(step)

    @cached_property
    def language_model(self) -> Program:
        """What generates: the whole model, or what stands behind its images."""
        return image_features.language_model(self.program)

    @cached_property
    def image_encoder(self) -> Program:
        """What stands before the tokens of a model that takes images."""
        return image_features.image_encoder(self.program)

    def generate(
        self,
        input_ids: generation.TokenIds,
        attention_mask: torch.Tensor | None = None,
        *,
        images: Mapping[str, torch.Tensor] | None = None,
        pad_token_id: int | None = None,
        tokenizer: Any = None,
        on_token: generation.Callback | None = None,
        return_dict: bool = False,
        **options: Unpack[SamplingKeywords],
    ) -> Any:
        """Generate tokens; see :func:`fxgraft.generation.generate` for every argument.

        Args:
            input_ids: prompts, int64 [B, S] (left padded), or a list of token lists.
            attention_mask: 0 at padding, [B, S].
            images: of a vision-language model, what its processor makes of the images of all
                prompts in order, by name (``pixel_values``).
            pad_token_id: fills up ended rows.
            tokenizer: needed for ``stop_strings``.
            on_token: called with each step's new tokens, for streaming.
            return_dict: return a ``GenerationOutput`` with lengths and finish reasons.
            options: ``max_new_tokens``, ``do_sample``, ``temperature``, ``seed`` and the like.

        Returns:
            Prompts and answers, int64 [B, S + new].

        Raises:
            InputError: an empty or too long prompt, or options that make no sense.
        """
        model = self.step_model
        if images is not None or image_features.find_merge(self.program) is not None:
            model = image_prompts.with_images(
                self.program, lambda: self.image_encoder, cast(InputStepModel, model), images
            )
        if options.get("do_sample") and options.get("seed") is None:
            options["seed"] = random_seed(self.program)
        with self.while_generating():
            return generation.generate(  # pyright: ignore[reportCallIssue]
                model,
                input_ids,
                attention_mask,
                pad_token_id=pad_token_id,
                tokenizer=tokenizer,
                on_token=on_token,
                return_dict=return_dict,  # pyright: ignore[reportArgumentType]
                **options,
            )

    def while_generating(self) -> AbstractContextManager[None]:
        """Settings that hold during ``generate``; backends may override it."""
        return nullcontext()

    def report(self) -> Report:
        """Which kernel or library runs each kind of node, and why."""
        return self.describe()

    def save(self, folder: str | Path) -> Path:
        """Write the Program and the backend's name and options to a folder."""
        from fxgraft.serialize import save

        program = self.program.copy()
        program.origin = {
            **program.origin,
            "backend": {"name": self.backend, "options": self.options},
        }
        return save(program, Path(folder))


def backend_names() -> list[str]:
    """Names of all backends."""
    package = importlib.import_module("fxgraft.backends")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.ispkg)


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        InputError: there is none; lists them.
    """
    if name not in backend_names():
        raise InputError(
            f"argument 'backend': there is no backend {name!r}",
            f"the backends are: auto, {', '.join(backend_names())}",
        )
    return importlib.import_module(f"fxgraft.backends.{name}").BACKEND
