"""The pass ``shard``: which share is made, what stays whole, and how it is checked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch.fx import Node

from fxgraft import check as checks
from fxgraft import collectives, interpreter
from fxgraft.collectives import Share
from fxgraft.layers import is_linear
from fxgraft.packed_weights import pack_weights, unpack_weights
from fxgraft.passes.shard.attention import check_divisible, shard_attentions
from fxgraft.passes.shard.linears import merge_parts, whole_name
from fxgraft.passes.shard.mlp import shard_mlps
from fxgraft.passes.shard.ranks import find_share
from fxgraft.passes.shard.simulate import run_ranks
from fxgraft.passes.shard.vocabulary import find_vocabulary, shard_vocabulary
from fxgraft.program import Program
from fxgraft.transform import Effect, Pass


class Shard(Pass):
    """Keep one process's share of a model for tensor parallelism (arXiv 1909.08053).

    Attention is divided by heads and MLPs by channels; the results of their last layers are added
    up over the processes. Layers of any other kind stay whole on every process, and the history
    names them.
    """

    effect: ClassVar[Effect] = Effect.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"stateless"})
    ensures: ClassVar[frozenset[str]] = frozenset({"sharded"})
    looks_for: ClassVar[str] = "attention heads and MLP channels to divide among processes"

    size: int = Field(ge=1)
    """Number of processes that run the model together; with 1 nothing changes."""
    rank: int | None = None
    """Which of them this is; default its rank in the process group, else torchrun's `RANK`."""
    group: str | None = None
    """Name of the process group (`group.group_name`); default the group of all processes."""
    vocabulary: Literal["replicate", "split"] = "replicate"
    """Keep embedding and logits whole on every process, or divide them by tokens."""

    def neutral(self) -> Shard:
        """One process."""
        return self if self.size == 1 else Shard(size=1)

    def precheck(self, program: Program) -> None:
        """Refuse a rank that cannot be known; passes before this one may change the model."""
        if self.size > 1:
            find_share(self.size, self.rank, self.group)

    def run(self, program: Program) -> list[str]:
        """Keep this process's share.

        Raises:
            InputError: the heads, or the tokens where they are to be split, cannot be divided.
        """
        if self.size == 1:
            return ["one process: nothing to divide"]
        patterns = unpack_weights(program)
        check_divisible(program, self.size)
        if self.vocabulary == "split":
            find_vocabulary(program, self.size)
        lines = self._cut(program, find_share(self.size, self.rank, self.group))
        return lines + _pack_again(program, patterns)

    def _cut(self, program: Program, share: Share) -> list[str]:
        # Held, so that no new weight gets the identity of an old one.
        old = [weight for _, weight in program.weights()]
        before = set(map(id, old))
        mlps, uneven = shard_mlps(program, share)
        outputs, refused = shard_attentions(program, share)
        if self.vocabulary == "split":
            shard_vocabulary(program, share)
        merge_parts(program)
        if mlps or outputs or self.vocabulary == "split":
            collectives.mark(program, share)
        cut = {name for name, weight in program.weights() if id(weight) not in before}
        tokens = "whole on every process" if self.vocabulary == "replicate" else "divided"
        lines = [
            f"rank {share.rank} of {share.size}: {len(outputs)} attentions and {mlps} MLPs divided",
            f"vocabulary {tokens}",
            f"each process sends {collectives.sent_bytes(program)} bytes per run",
        ]
        lines += _alike(refused)
        if uneven:
            lines.append(f"{uneven} MLPs are whole: {share.size} does not divide their width")
        whole = _whole(program, cut)
        return [*lines, f"whole on every process: {', '.join(whole)}"] if whole else lines

    def runner(self, before: Program, after: Program) -> tuple[checks.Run, str]:
        """Run with the other processes if they can be reached, else make and run all shares."""
        share = collectives.share_of(after)
        if share is None:
            return interpreter.run, ""
        if collectives.reaches(share, before.device):
            return interpreter.run, f", by all {share.size} processes together"
        shares = [self._other(before, share, rank) for rank in range(share.size)]
        shares[share.rank] = after

        def run(
            program: Program,
            inputs: Mapping[str, torch.Tensor],
            *,
            verify: bool = False,
            kept: dict[str, Any] | None = None,
        ) -> dict[str, torch.Tensor]:
            stores = [kept if rank == share.rank else None for rank in range(share.size)]
            results = run_ranks(shares, [inputs] * share.size, verify=verify, kept=stores)
            return results[share.rank]

        return run, f", all {share.size} shares run in this process"

    def _other(self, before: Program, share: Share, rank: int) -> Program:
        program = before.copy()
        if rank != share.rank:
            patterns = unpack_weights(program)
            self._cut(program, Share(share.size, rank, share.group))
            _pack_again(program, patterns)
        return program


def _pack_again(program: Program, patterns: Mapping[str, tuple[int, int]]) -> list[str]:
    """Pack the N:M sparse weights of which a share still is."""
    if not patterns:
        return []
    names = {name: whole_name(name) or name for name, _ in program.weights()}
    kept = {name: patterns[whole] for name, whole in names.items() if whole in patterns}
    left = sorted(set(map(_pattern, pack_weights(program, kept))))
    why = "what a process keeps of their rows are no whole groups of M"
    return [f"dense on every process: {', '.join(left)}: {why}"] if left else []


def _alike(reasons: Mapping[str, str]) -> list[str]:
    """One line for all modules that differ in numbers only and have the same reason."""
    counts = Counter((_pattern(name), why) for name, why in reasons.items())
    return [
        f"attention of {name} is whole ({count}): {why}" for (name, why), count in counts.items()
    ]


def _pattern(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _whole(program: Program, cut: set[str]) -> list[str]:
    """Weights of the layers' matrix products that every process holds in full."""
    nodes = [node for layer in program.layers for node in layer.nodes if is_linear(node)]
    names = {name for node in nodes for name in _weights(node) if name not in cut}
    counts = Counter(_pattern(name) for name in names)
    return [f"{name} ({count})" for name, count in sorted(counts.items())]


def _weights(node: Node) -> list[str]:
    """Names of a matrix product's weights of two dimensions or more."""
    names: list[str] = []
    for source in node.all_input_nodes:
        while source.op == "call_function" and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        if source.op == "get_attr" and source.meta["val"].dim() > 1:
            names.append(str(source.target))
    return names
