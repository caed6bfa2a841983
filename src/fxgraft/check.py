"""Numeric checks: is a rewritten Program still as close to the original as its pass promised?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.fx import Node

from fxgraft import images, interpreter
from fxgraft.errors import GraphError, NumericError
from fxgraft.program import Program

# Largest relative error that rounding alone is allowed to cause, by the coarsest dtype in use.
_ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
_SIZES = ({"batch": 2, "sequence": 13}, {"batch": 3, "sequence": 7})
_OTHER_SIZES = (5, 6)


@dataclass(frozen=True)
class Trial:
    """One set of random inputs.

    Attributes:
        sizes: size of each dynamic dimension.
        inputs: by name.
    """

    sizes: dict[str, int]
    inputs: dict[str, torch.Tensor]

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items()) or "fixed sizes"


@dataclass(frozen=True)
class Comparison:
    """How far apart two Programs are.

    Attributes:
        error: largest relative error over outputs and trials, ``max|a - b| / max|b|``.
        output: name of the output with that error.
        trials: what was tried.
        worst: the trial with that error.
    """

    error: float
    output: str
    trials: tuple[Trial, ...]
    worst: Trial

    def __str__(self) -> str:
        tried = "; ".join(str(trial) for trial in self.trials)
        return f"{len(self.trials)} random inputs ({tried})"


def check_sizes(program: Program, index: int = 0) -> dict[str, int]:
    """Sizes of the dynamic dimensions in the check's first or second trial."""
    sizes: dict[str, int] = {}
    for name, allowed in program.dimensions.items():
        size = max(_SIZES[index].get(name, _OTHER_SIZES[index]), allowed.minimum)
        sizes[name] = min(size, allowed.maximum) if allowed.maximum else size
    if "batch" in sizes and "sequence" in sizes:
        sizes["sequence"] += -(-images.feature_count(program) // sizes["batch"])
    return sizes


def rounding_limit(program: Program) -> float:
    """Largest relative error that counts as rounding, given the dtypes of a Program."""
    values = [node.meta["val"] for node in program.output_nodes.values()]
    values += [weight for _, weight in program.weights()]
    return max((_ROUNDING.get(value.dtype, 0.0) for value in values), default=0.0)


def is_meta(program: Program) -> bool:
    """Whether a Program has weights without values."""
    return any(weight.is_meta for _, weight in program.weights())


@dataclass(frozen=True)
class Reference:
    """A Program's outputs on random inputs of two different sizes, to compare rewrites with.

    Attributes:
        program: the original.
        outputs: by trial, outputs by name.
    """

    program: Program
    outputs: list[tuple[Trial, dict[str, torch.Tensor]]]

    @staticmethod
    def of(program: Program, after: Program) -> Reference:
        """Run a Program. A size at which it does not run is left out.

        Args:
            program: the original.
            after: a rewritten Program, for inputs that only it has.

        Raises:
            GraphError: the Program runs at no size; names the node.
        """
        done: list[tuple[Trial, dict[str, torch.Tensor]]] = []
        failures: list[GraphError] = []
        for index in range(len(_SIZES)):
            trial = _draw(program, after, index)
            try:
                done.append((trial, interpreter.run(program, _inputs_of(program, trial))))
            except GraphError as error:
                failures.append(error)
        if not done:
            raise failures[0]
        return Reference(program, done)


class Run(Protocol):
    """Runs a rewritten Program, as ``fxgraft.interpreter.run`` does."""

    def __call__(
        self,
        program: Program,
        inputs: Mapping[str, torch.Tensor],
        *,
        verify: bool = False,
        kept: dict[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]: ...


def compare(reference: Reference, after: Program, run: Run = interpreter.run) -> Comparison:
    """Compare the outputs of a rewritten Program with those of the original.

    Outputs that only ``after`` has are not compared.

    Raises:
        GraphError: ``after`` does not run, or its metadata is untrue.
    """
    found: list[tuple[float, str, Trial]] = []
    for trial, expected in reference.outputs:
        actual = run(after, _inputs_of(after, trial), verify=True)
        found += [(relative_error(actual[n], expected[n]), n, trial) for n in expected]
    error, output, worst = max(found, key=lambda item: item[0])
    return Comparison(error, output, tuple(trial for trial, _ in reference.outputs), worst)


def _draw(before: Program, after: Program, index: int) -> Trial:
    """Random inputs for both Programs; the second trial has padding."""
    sizes = check_sizes(before, index)
    inputs = after.example(seed=index + 1, **check_sizes(after, index))
    inputs |= before.example(seed=index + 1, **sizes)
    if index > 0:
        for spec in before.inputs:
            if spec.default == "ones" and inputs[spec.name].shape[-1] > 3:
                inputs[spec.name][-1, ..., -2:] = 0
    return Trial(sizes, inputs)


def _inputs_of(program: Program, trial: Trial) -> dict[str, torch.Tensor]:
    named = trial.inputs
    return {spec.name: named[spec.name] for spec in program.inputs if spec.name in named}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``max|actual - expected| / max|expected|``.

    Infinite if shapes or dtypes differ, or where only one of them is finite. For integers and
    booleans the fraction of elements that differ.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return math.inf
    if not expected.numel():
        return 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        return float((actual != expected).double().mean())
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = actual.detach().to(wide), expected.detach().to(wide)
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, (a - b).abs())
    finite = b.abs()[b.isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    error = float(difference.max()) / (scale or 1.0)
    return math.inf if math.isnan(error) else error


def require(
    reference: Reference,
    after: Program,
    limit: float,
    claim: str,
    remedy: str,
    run: Run = interpreter.run,
) -> Comparison:
    """Compare two Programs and fail if they are further apart than ``limit``.

    Args:
        reference: the original.
        after: the rewritten one.
        limit: largest relative error allowed.
        claim: what was promised, the start of the message: ``"pass 'fold' is exact"``.
        remedy: what to do if the promise is broken.
        run: how the rewritten one is run.

    Raises:
        NumericError: names the output, the sizes and the first node that differs.
    """
    comparison = compare(reference, after, run)
    if comparison.error <= limit:
        return comparison
    raise NumericError(
        f"{claim}, but output {comparison.output!r} has a relative error of "
        f"{comparison.error:.3g} (allowed: {limit:.3g}) with {comparison.worst}\n"
        f"  {first_difference(reference.program, after, comparison.worst, limit, run)}",
        remedy,
    )


def require_no_nan(reference: Reference, after: Program, owner: str) -> None:
    """Run a Program and check that its floating-point outputs hold no NaN.

    Args:
        reference: the original, whose NaN, if any, are not held against the rewrite.
        after: the rewritten Program.
        owner: the pass, for messages.

    Raises:
        NumericError: names the output.
        GraphError: the Program does not run, or its metadata is untrue.
    """
    for trial, expected in reference.outputs:
        outputs = interpreter.run(after, _inputs_of(after, trial), verify=True)
        for name, value in outputs.items():
            known = name in expected and bool(expected[name].isnan().any())
            if bool(value.isnan().any()) and not known:
                raise NumericError(
                    f"after pass {owner!r} output {name!r} holds NaN with {trial}",
                    "check the values that the pass was given",
                )


def first_difference(
    before: Program, after: Program, trial: Trial, limit: float, run: Run = interpreter.run
) -> str:
    """Which of the nodes that both Programs have is the first to differ, in words."""
    expected: dict[str, Any] = {}
    actual: dict[str, Any] = {}
    interpreter.run(before, _inputs_of(before, trial), kept=expected)
    run(after, _inputs_of(after, trial), kept=actual)
    for node in after.graph.nodes:
        if node.op != "call_function" or node.name not in expected:
            continue
        if _error(actual[node.name], expected[node.name]) > limit:
            causes = [n for n in node.all_input_nodes if _is_cause(n, expected, actual)]
            fed = ", ".join(f"{cause.name!r}" for cause in causes)
            behind = f"; it reads {fed}, which the pass inserted or changed" if fed else ""
            return f"the first node that differs is {interpreter.describe_node(node)}{behind}"
    return "no node that was there before differs: the fault is in what the pass inserted"


def _is_cause(node: Node, expected: dict[str, Any], actual: dict[str, Any]) -> bool:
    if node.name not in expected:
        return True
    return node.op == "get_attr" and _error(actual[node.name], expected[node.name]) > 0


def _error(actual: Any, expected: Any) -> float:
    if isinstance(expected, torch.Tensor):
        return relative_error(actual, expected) if isinstance(actual, torch.Tensor) else math.inf
    if isinstance(expected, (tuple, list)):
        pairs = zip(cast("tuple[Any, ...]", actual), cast("tuple[Any, ...]", expected), strict=True)
        return max((_error(a, b) for a, b in pairs), default=0.0)
    return 0.0 if actual == expected else math.inf
