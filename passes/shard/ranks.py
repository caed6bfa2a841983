"""Which share of a model this process gets."""

from __future__ import annotations

import os

from fxgraft.collectives import WORLD, Share, share_in
from fxgraft.errors import InputError


def find_share(size: int, rank: int | None, group: str | None) -> Share:
    """The share to make.

    Args:
        size: number of processes.
        rank: of this process; default its rank in the process group, else the variable ``RANK``
            that torchrun sets.
        group: name of the process group; default the group of all processes.

    Raises:
        InputError: the rank is out of range or cannot be known, or the processes are not ``size``.
    """
    name = group or WORLD
    if rank is not None:
        if not 0 <= rank < size:
            raise InputError(
                f"pass 'shard': field 'rank' is {rank}, with 'size' {size}",
                f"give a rank from 0 to {size - 1}",
            )
        return Share(size, rank, name)
    found = share_in(name) or _from_environment(name, group)
    if found.size != size:
        raise InputError(
            f"pass 'shard': field 'size' is {size}, but process group {name!r} has {found.size} "
            "processes",
            f"start {size} processes, or set 'size' to {found.size}",
        )
    return found


def _from_environment(name: str, group: str | None) -> Share:
    """This process's place among those that torchrun started."""
    rank, size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if group is None and rank.isdigit() and size.isdigit():
        return Share(int(size), int(rank), name)
    missing = "there is no such process group"
    if group is None:
        missing = "torch.distributed is not initialised and RANK and WORLD_SIZE are not set"
    raise InputError(
        f"pass 'shard': field 'rank' is not given and cannot be known: {missing}",
        "start the processes with torchrun, call torch.distributed.init_process_group, or set "
        "'rank'",
    )
