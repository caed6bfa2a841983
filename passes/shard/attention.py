"""Attention: every process keeps some heads.

Query heads are divided in order; a key/value head goes to the processes that have query heads of
its group, so with more processes than key/value heads it is on several. What is left of a layer
is what remains when all other heads are removed, so the rewrite is that of ``prune_heads``, with
the output projection added up over the processes.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.collectives import Share
from fxgraft.errors import GraphError, InputError, PassError
from fxgraft.kernels.spec import argument, dims
from fxgraft.passes.prune_heads import structure
from fxgraft.passes.prune_heads.heads import Heads, heads_of
from fxgraft.passes.shard.linears import finish_row_parallel, linear_of
from fxgraft.program import Program

aten = torch.ops.aten


def check_divisible(program: Program, size: int) -> None:
    """Check that the heads can be divided among ``size`` processes.

    Raises:
        InputError: they cannot; names the layer and the sizes that work.
    """
    for mixer in _attentions(program):
        queries, keys = (int(dims(argument(mixer, name))[1]) for name in ("query", "key"))  # pyright: ignore[reportArgumentType]
        if _divides(size, queries, keys):
            continue
        if isinstance(_understand(program, mixer), Heads):
            good = [str(n) for n in range(1, queries + 1) if _divides(n, queries, keys)]
            raise InputError(
                f"pass 'shard': field 'size' is {size}, which cannot divide the {queries} query "
                f"and {keys} key/value heads of {mixer.meta.get('module', '?')!r}",
                f"use one of the sizes {', '.join(good)}",
            )


def _divides(size: int, queries: int, keys: int) -> bool:
    return queries % size == 0 and (keys % size == 0 or size % keys == 0)


def shard_attentions(program: Program, share: Share) -> tuple[set[str], dict[str, str]]:
    """Keep this process's heads in every attention whose heads can be told apart.

    Returns:
        Names of the output projections' weights, and module → why its attention stays whole.
    """
    refused: dict[int, str] = {}
    while True:
        attempt = program.copy()
        outputs, failed = _attempt(attempt, share, refused)
        if failed is None:
            break
        refused |= failed
    program.graph_module = attempt.graph_module
    graphs.finish(program.graph_module)
    for node in program.graph.find_nodes(op="call_function", target=aten.linear.default):
        linear = linear_of(node)
        if linear is not None and linear.weight in outputs:
            finish_row_parallel(node, share)
    mixers = _attentions(program)
    whole = [mixer for index, mixer in enumerate(mixers) if index in refused]
    reasons = [refused[index] for index in sorted(refused)]
    modules = [str(mixer.meta.get("module", "?")) for mixer in whole]
    return outputs, dict(zip(modules, reasons, strict=True))


def _attentions(program: Program) -> list[Node]:
    attention = torch.ops.fxgraft.attention.default
    return list(program.graph.find_nodes(op="call_function", target=attention))


def _attempt(
    program: Program, share: Share, refused: dict[int, str]
) -> tuple[set[str], dict[int, str] | None]:
    """Cut all attentions but the refused ones; one that fails on the way spoils the graph."""
    outputs: set[str] = set()
    found = [(i, _understand(program, m)) for i, m in enumerate(_attentions(program))]
    unknown = {i: heads for i, heads in found if isinstance(heads, str) and i not in refused}
    if unknown:
        return outputs, unknown
    for index, heads in found:
        if index in refused or isinstance(heads, str):
            continue
        per_rank = heads.query_heads // share.size
        kept = range(share.rank * per_rank, (share.rank + 1) * per_rank)
        try:
            structure.remove(program, heads, set(range(heads.query_heads)) - set(kept))
        except PassError as error:
            return outputs, {index: _reason(error)}
        except GraphError as error:
            what = error.problem.splitlines()[0]
            return outputs, {index: f"something in it needs all heads ({what})"}
        outputs.add(heads.output.weight)
    return outputs, None


def _understand(program: Program, mixer: Node) -> Heads | str:
    """An attention's heads, or why they cannot be told apart."""
    try:
        heads = heads_of(mixer)
    except PassError as error:
        return _reason(error)
    readers = Counter(str(node.target) for node in program.graph.find_nodes(op="get_attr"))
    names = {p.weight for p in (heads.query, heads.key, heads.value, heads.output)}
    if any(readers[name] > 1 for name in names):
        return "its weights are read in several places"
    return heads


def _reason(error: PassError) -> str:
    return error.problem.splitlines()[0].rpartition("cannot be pruned: ")[2]
