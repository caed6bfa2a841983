"""Facts: what holds of a Program, read off its graph whenever it is asked for.

A pass names the facts it requires, ensures and removes. Facts are never stored, so they cannot
go stale; a third party adds one with the ``fact`` decorator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxgraft.collectives import is_collective
from fxgraft.errors import Error
from fxgraft.kernels.spec import OpSpec, State, argument, spec_of
from fxgraft.program import Program

Test = Callable[[Program], bool]


@dataclass(frozen=True)
class Fact:
    """One thing that may hold of a Program.

    Attributes:
        name: its name in contracts.
        holds: whether it holds of a Program.
        remedy: what to do where it is required and does not hold.
    """

    name: str
    holds: Test
    remedy: str


_FACTS: dict[str, Fact] = {}


def fact(remedy: str) -> Callable[[Test], Test]:
    """Register a function of a Program as the fact of its name.

    Args:
        remedy: what to do where the fact is required and does not hold.

    Raises:
        Error: a fact of that name exists.
    """

    def register(test: Test) -> Test:
        if test.__name__ in _FACTS:
            raise Error(f"fact {test.__name__!r} is registered twice", "give it another name")
        _FACTS[test.__name__] = Fact(test.__name__, test, remedy)
        return test

    return register


def facts(program: Program) -> frozenset[str]:
    """Names of the facts that hold of a Program."""
    return frozenset(known.name for known in _FACTS.values() if known.holds(program))


def known_facts() -> dict[str, Fact]:
    """All facts by name."""
    return dict(_FACTS)


@fact("apply the pass before the state is inserted")
def stateless(program: Program) -> bool:
    """No op takes its past from an input."""
    return not any(_takes_past(node, state) for node, _, state in _states(program))


@fact("apply the pass before those that pack, prune or quantise weights")
def dense_weights(program: Program) -> bool:
    """Every linear layer is a plain one."""
    return not any(spec.kind == "linear" for _, spec in _ops(program))


@fact("use a model with attention, captured with fxgraft.capture")
def has_attention(program: Program) -> bool:
    """Some op mixes tokens by looking at all the past ones."""
    return any(
        spec.kind == "mixer" and state.kind == "grows" for _, spec, state in _states(program)
    )


@fact("use a recurrent model, such as one of the Mamba family")
def has_recurrence(program: Program) -> bool:
    """Some op mixes tokens through a state of fixed size."""
    return any(
        spec.kind == "mixer" and state.kind == "fixed" for _, spec, state in _states(program)
    )


@fact("use a vision model")
def has_images(program: Program) -> bool:
    """Some input is a batch of images."""
    return any(
        "pixel" in spec.name
        or (spec.dtype.is_floating_point and len(spec.shape) == 4 and spec.shape[1] in (1, 3))
        for spec in program.inputs
    )


@fact("use a causal language model: inputs with input_ids, outputs with logits")
def causal_lm(program: Program) -> bool:
    """Takes input_ids and gives logits, with no separate decoder input."""
    names = {spec.name for spec in program.inputs}
    return "input_ids" in names and "decoder_input_ids" not in names and "logits" in program.outputs


@fact("apply the pass 'shard'")
def sharded(program: Program) -> bool:
    """It is one process's share of a model, and waits for the others."""
    return any(is_collective(node) for node in program.graph.nodes)


def _ops(program: Program) -> Iterator[tuple[Node, OpSpec]]:
    for node in program.graph.nodes:
        spec = spec_of(node)
        if spec is not None:
            yield node, spec


def _states(program: Program) -> Iterator[tuple[Node, OpSpec, State]]:
    for node, spec in _ops(program):
        for state in spec.states:
            yield node, spec, state


def _takes_past(node: Node, state: State) -> bool:
    source = argument(node, state.argument)
    if not isinstance(source, Node):
        return False
    if state.kind == "fixed":
        return source.op == "placeholder"
    joined = source.target is torch.ops.aten.cat.default
    return joined and any(past.op == "placeholder" for past in source.all_input_nodes)
