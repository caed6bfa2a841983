"""All shares of a model, made and run together in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxgraft import registry
from fxgraft.collectives import share_of
from fxgraft.passes.shard import Shard
from fxgraft.passes.shard.simulate import StandIns, run_ranks, together
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.transform import apply


def shares_of(
    program: Program, size: int, *, check: bool = False, **settings: str
) -> list[Program]:
    """Every rank's share of a Program."""
    steps = [Shard(size=size, rank=rank, **settings) for rank in range(size)]  # pyright: ignore[reportArgumentType]
    return [apply(program, step, check=check) for step in steps]


def with_others(share: Program, origin: Program) -> list[Program]:
    """A share among those of the other ranks, made as its history says from the captured model."""
    place = share_of(share)
    assert place is not None
    *earlier, last = share.history
    for record in earlier:
        origin = apply(origin, registry.find(record.name).from_config(record.config), check=False)
    shares = shares_of(origin, place.size, vocabulary=last.config["vocabulary"])
    shares[place.rank] = share
    return shares


def run_shares(shares: Sequence[Program], values: Mapping[str, Tensor]) -> list[Tensor]:
    """Each rank's logits."""
    return [outputs["logits"] for outputs in run_ranks(shares, [values] * len(shares), verify=True)]


def run_share_steps(
    shares: Sequence[Program], values: Mapping[str, Tensor], cuts: Sequence[int]
) -> list[Tensor]:
    """Rank 0's logits at the end of each step of the step graphs, run by all ranks together."""
    steps = [insert_state(share) for share in shares]

    def run(rank: int, stand_ins: StandIns) -> list[Tensor]:
        step, state = steps[rank], steps[rank].empty_state(values["input_ids"].shape[0])
        runner = _Runner(step.program.graph_module, stand_ins)
        logits: list[Tensor] = []
        for start, end in zip([0, *cuts], cuts, strict=False):
            new = {name: value[:, start:end] for name, value in values.items()}
            new["attention_mask"] = values["attention_mask"][:, :end]
            with torch.no_grad():
                first, *state = runner.run(*[new[spec.name] for spec in step.own_inputs], *state)
            logits.append(first[:, -1])
        return logits

    return together(len(steps), run)[0]


class _Runner(torch.fx.Interpreter):
    """Calls other functions instead of some operators."""

    def __init__(self, module: torch.fx.GraphModule, stand_ins: StandIns) -> None:
        super().__init__(module)
        self._stand_ins = stand_ins

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(self._stand_ins.get(target, target), args, kwargs)
