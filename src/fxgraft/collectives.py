"""Programs that are one process's share of a model: their collectives, and the group they run in.

The collectives are torch's functional ones (``_c10d_functional``), which ``torch.export``,
Inductor and CUDA graphs know. A node names its process group; torch looks the name up when the
node runs.
"""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass
from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.cost_traffic import Sizes
from fxgraft.errors import LoweringError, SerializationError
from fxgraft.kernels.spec import Expr, dims
from fxgraft.program import Program

aten = torch.ops.aten
ops = torch.ops._c10d_functional
WORLD = "0"
"""What torch calls the group of all processes, the first one that a process makes."""
_KEY = "shard"


@dataclass(frozen=True)
class Share:
    """Which part of a model one process holds.

    Attributes:
        size: number of processes.
        rank: of this process, from 0.
        group: name of their process group.
    """

    size: int
    rank: int
    group: str = WORLD


def mark(program: Program, share: Share) -> None:
    """Note in a Program which part of the model it is."""
    program.origin[_KEY] = asdict(share)


def share_of(program: Program) -> Share | None:
    """Which part of a model a Program is; None for a whole one.

    Raises:
        SerializationError: what a saved Program says about it makes no sense.
    """
    noted = program.origin.get(_KEY)
    if noted is None:
        return None
    try:
        share = Share(**noted)
        if 0 <= share.rank < share.size and isinstance(share.group, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            return share
    except TypeError:
        pass
    raise SerializationError(
        f"the Program says that it is the share {noted!r} of a model", "shard the model again"
    )


def is_collective(node: Node) -> bool:
    """Whether a node waits for other processes."""
    return getattr(node.target, "namespace", "") == "_c10d_functional"


def process_group(name: str) -> dist.ProcessGroup | None:
    """The process group of that name, None where there is none (yet)."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    try:
        return cast(Any, distributed_c10d)._resolve_process_group(name)
    except (RuntimeError, ValueError):
        return None


def share_in(name: str) -> Share | None:
    """This process's place in a process group; None if there is no such group."""
    group = process_group(name)
    return None if group is None else Share(dist.get_world_size(group), dist.get_rank(group), name)


def reaches(share: Share, device: torch.device) -> bool:
    """Whether this process can run a share's collectives on tensors of a device."""
    group = process_group(share.group)
    if group is None or share_in(share.group) != share:
        return False
    kinds = dist.get_backend_config(group).split(",")
    return device.type in {kind.partition(":")[0] for kind in kinds}


def require_group(program: Program) -> None:
    """Check that this process is the one that a Program was made for.

    Raises:
        LoweringError: there is no such process group, this is another of its processes, or the
            group cannot send from the Program's device.
    """
    share = share_of(program)
    if share is None:
        return
    found = share_in(share.group)
    problem = f"the Program is the share of rank {share.rank} of {share.size} processes"
    if found is None:
        raise LoweringError(
            f"{problem}, and there is no process group {share.group!r}",
            "start the processes with torchrun and call torch.distributed.init_process_group",
        )
    if found != share:
        raise LoweringError(
            f"{problem}; this process is rank {found.rank} of {found.size}",
            "load or make the share of this rank",
        )
    if not reaches(share, program.device):
        raise LoweringError(
            f"{problem} and lies on {program.device}, which process group {share.group!r} cannot "
            "send from",
            "make the group with a backend for that device: gloo for a CPU, nccl for GPUs",
        )


def require_whole(program: Program, purpose: str) -> None:
    """Refuse a share where the whole model is needed.

    Raises:
        LoweringError: names the share.
    """
    share = share_of(program)
    if share is not None:
        raise LoweringError(
            f"{purpose}: the Program is the share of rank {share.rank} of {share.size} processes",
            "use the Program before pass 'shard'",
        )


def random_seed(program: Program) -> int:
    """A random seed; the processes of a share get the same one if all ask for it."""
    seed = torch.randint(2**62, (1,))
    share = share_of(program)
    if share is not None:
        seed = seed.to(program.device)
        dist.broadcast(seed, group=process_group(share.group), group_src=0)
    return int(seed)


def smallest(program: Program, value: int) -> int:
    """The smallest value of all processes of a share, which all must ask; else the value."""
    share = share_of(program)
    if share is None:
        return value
    common = torch.tensor(value, device=program.device)
    group = process_group(share.group)
    cast(Any, dist).all_reduce(common, dist.ReduceOp.MIN, group=group)
    return int(common)


def sent_bytes(program: Program) -> Expr:
    """Bytes that each process sends to others in one run, over the Program's dimensions.

    Of n bytes and p processes: a sum sends 2 n (p - 1) / p in a ring, joining sends n (p - 1)
    (Thakur et al., Optimization of Collective Communication Operations in MPICH, 2005).
    """
    share = share_of(program)
    if share is None:
        return sympy.Integer(0)
    sizes, total = Sizes(program, {}), sympy.Integer(0)
    rounds = share.size - 1
    for node in program.graph.nodes:
        value = node.all_input_nodes[0].meta["val"] if is_collective(node) else None
        if value is None or node.target is ops.wait_tensor.default:
            continue
        factor = rounds * sympy.Rational(2, share.size)
        if node.target is ops.all_gather_into_tensor.default:
            factor = sympy.Integer(rounds)
        total += factor * math.prod(sizes(value)) * value.element_size()
    return total


def add_up(value: Node, share: Share) -> Node:
    """Insert, behind ``value``, its sum over all processes."""
    started = graphs.insert(value, ops.all_reduce.default, (value, "sum", share.group), after=True)
    return graphs.insert(started, ops.wait_tensor.default, (started,), after=True)


def join_last(value: Node, share: Share) -> Node:
    """Insert, behind ``value`` [B, ..., n], all processes' values side by side [B, ..., n·size]."""
    args = (value, share.size, share.group)
    started = graphs.insert(value, ops.all_gather_into_tensor.default, args, after=True)
    stacked = graphs.insert(started, ops.wait_tensor.default, (started,), after=True)
    batch = graphs.insert(stacked, aten.sym_size.int, (value, 0), after=True)
    sizes = [batch] * share.size
    split = graphs.insert(batch, aten.split_with_sizes.default, (stacked, sizes, 0), after=True)
    parts: list[Node] = []
    for index in range(share.size):
        anchor = parts[-1] if parts else split
        parts.append(graphs.insert(anchor, operator.getitem, (split, index), after=True))
    return graphs.insert(parts[-1], aten.cat.default, (parts, -1), after=True)


def joined(node: Node) -> Node | None:
    """The value that ``join_last`` joined to make this node, or None."""
    if node.target is not aten.cat.default or node.args[1] not in (-1, len(dims(node)) - 1):
        return None
    sources = {source for part in node.all_input_nodes for source in part.all_input_nodes[:1]}
    split = sources.pop()
    if sources or split.target is not aten.split_with_sizes.default:
        return None
    started = split.all_input_nodes[0].all_input_nodes[:1]
    if not started or started[0].target is not ops.all_gather_into_tensor.default:
        return None
    return started[0].all_input_nodes[0]
