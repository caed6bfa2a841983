"""Small Programs to save, and ways to damage what was saved."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxgraft.errors import SerializationError
from fxgraft.frontends.exporting import export
from fxgraft.program import Input, Program
from fxgraft.serialize import load


class Tied(nn.Module):
    """Tied embedding and head, a buffer, and dtypes, devices and infinities as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.embed(ids)) * self.scale.to(torch.float32)
        length = ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        scores = (hidden @ hidden.transpose(1, 2)).masked_fill(future, -math.inf)
        return {"logits": self.head(scores.softmax(-1) @ hidden), "hidden": hidden[:, -1]}


class Pooled(nn.Module):
    """Fails on small images, so its dynamic height and width need sizes that work."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return F.max_pool2d(self.conv(image), 7).to(memory_format=torch.channels_last)


class Paired(nn.Module):
    """Two inputs of which the second is twice as long as the first."""

    def forward(self, short: Tensor, long: Tensor) -> Tensor:
        return torch.cat([short, short], 1) + long


class Attending(nn.Module):
    """One causal attention layer over token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.project = nn.Linear(8, 24)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        parts = self.project(self.embed(input_ids)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        mixed = torch.ops.fxgraft.attention(query, key, value, scale=0.5)
        return {"logits": mixed.transpose(1, 2).flatten(2) @ self.embed.weight.T}


def tied() -> Program:
    ids = Input("ids", torch.int64, ("batch", "sequence"), high=11)
    return export(Tied(), (ids,), {"ids": torch.ones(3, 7, dtype=torch.int64)})


def pooled() -> Program:
    image = Input("image", torch.float32, ("batch", 3, "height", "width"))
    return export(Pooled(), (image,), {"image": torch.randn(2, 3, 40, 44)})


def paired() -> Program:
    short = Input("short", torch.float32, ("batch", "length"))
    long = Input("long", torch.float32, ("batch", "double"))
    return export(Paired(), (short, long), {"short": torch.randn(2, 5), "long": torch.randn(2, 10)})


def attending() -> Program:
    ids = Input("input_ids", torch.int64, ("batch", "sequence"), high=11)
    return export(Attending(), (ids,), {"input_ids": torch.ones(3, 7, dtype=torch.int64)})


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the JSON of a saved Program."""
    file = folder / "program.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return folder


def refused(folder: Path) -> SerializationError:
    with pytest.raises(SerializationError) as caught:
        load(folder)
    return caught.value


def run_in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; its exit code, or minus the signal that killed it."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except SerializationError:
            code = 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(event: int, work: Callable[[], object]) -> Callable[[], object]:
    """Do the work in a process that dies at its n-th file operation."""

    def run() -> None:
        count = 0

        def hook(name: str, args: object) -> None:
            nonlocal count
            if name == "os.kill":
                return
            if name == "open" or name.startswith(("os.", "shutil.", "ctypes.")):
                count += 1
                if count > event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    return run
