"""One of several processes that run shares of models; started by torchrun.

For every family, writes what the share gives beside what the whole model gives.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

import fxgraft
from fxgraft.backend import Compiled
from fxgraft.generation import SamplingOptions
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.shard import Shard
from fxgraft.runtime.engine import Engine, EngineOptions
from tests import models

NEW_TOKENS = 12


def serve(compiled: Compiled, prompts: Sequence[Sequence[int]], **sampled: Any) -> list[list[int]]:
    """Answers of the engine to requests that arrive while others run."""
    options = EngineOptions(max_batch=2, chunk_tokens=5, block_size=4, memory_bytes=2**20)
    engine = Engine(compiled, options)
    sampling = SamplingOptions(max_new_tokens=NEW_TOKENS, eos_token_id=(), **sampled)
    requests = [engine.submit(prompt, sampling) for prompt in prompts[:2]]
    for _ in range(3):
        engine.step()
    requests += [engine.submit(prompt, sampling) for prompt in prompts[2:]]
    while engine.step():
        pass
    return [list(request.tokens) for request in requests]


def compare(
    family: str, device: torch.device, lowering: str, vocabulary: Any, folder: Path
) -> dict[str, Any]:
    """Logits, greedy and sampled tokens, and the engine's answers of a share and of the model."""
    model = getattr(models, family)().to(device)
    program = fxgraft.capture(model)
    whole = fxgraft.compile(program, backend=lowering)
    passes = [Optimize(), Shard(size=dist.get_world_size(), vocabulary=vocabulary)]
    share = fxgraft.compile(program, passes=passes, backend=lowering)
    ids = torch.randint(3, models.VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    ids = ids.to(device)
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits
    loaded = cast(Compiled, fxgraft.load(share.save(folder / f"{family}-{dist.get_rank()}")))
    prompts = [cast("list[int]", row.tolist())[: 11 - 2 * i] for i, row in enumerate(ids)]
    answers = {name: share.generate(ids, max_new_tokens=NEW_TOKENS, **options)
               for name, options in _WAYS.items()}  # fmt: skip
    expected = whole.generate(ids, max_new_tokens=NEW_TOKENS, **_WAYS["greedy"])
    return {
        "family": family,
        "error": float((share(input_ids=ids).logits - wanted).abs().max()),
        "loaded_error": float((loaded(input_ids=ids).logits - wanted).abs().max()),
        "scale": float(wanted.abs().max()),
        "tokens": _list(answers["greedy"]),
        "expected": _list(expected),
        "sampled": _list(answers["sampled"]),
        "served": serve(share, prompts),
        "served_expected": serve(whole, prompts),
        "served_sampled": serve(share, prompts, do_sample=True),
        "state_problem": share.state_problem,
        "parameters": [share.program.count_parameters(), program.count_parameters()],
        "summary": share.program.history[-1].summary,
        "check": share.program.history[-1].check,
    }


_WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"eos_token_id": []},
    "sampled": {"eos_token_id": [], "do_sample": True},
}


def _list(ids: Tensor) -> list[list[int]]:
    return cast("list[list[int]]", ids.tolist())


def main() -> None:
    """Arguments: folder for the results, the group's backend, ours, vocabulary, families."""
    folder, backend, lowering, vocabulary, *families = sys.argv[1:]
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    try:
        results = [
            compare(family, device, lowering, vocabulary, Path(folder)) for family in families
        ]
    finally:
        dist.destroy_process_group()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
