"""One model over several processes: each holds a share of every layer.

    torchrun --nproc-per-node 3 examples/tensor_parallel.py "What is the capital of France?"

Processes on a machine with GPUs take one each; else they share the CPU. The number of processes
must divide the model's heads: SmolLM2 has 9 in 3 groups, so 3 or 9 processes.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

import fxgraft
from fxgraft import sources
from fxgraft.generation import SamplingOptions
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.shard import Shard
from fxgraft.runtime.engine import Engine, EngineOptions


def answer(model: str, prompts: list[str], new_tokens: int) -> list[str]:
    """Answers of a chat model that all processes run together; every process gets them."""
    passes = [Optimize(), Shard(size=dist.get_world_size(), vocabulary="split")]
    backend = "triton" if torch.cuda.is_available() else "torch"
    # Shares are cut on the CPU, so that no GPU ever holds the whole model.
    compiled = fxgraft.compile(model, passes=passes, backend=backend)
    tokenizer = sources.tokenizer(model)
    engine = Engine(compiled, EngineOptions(max_batch=8), tokenizer=tokenizer)
    # Every process makes the same calls in the same order; that is all the coordination there is.
    requests = [
        engine.submit(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            ),
            SamplingOptions(max_new_tokens=new_tokens),
        )
        for prompt in prompts
    ]
    while engine.step():
        pass
    engine.close()
    return [tokenizer.decode(request.tokens, skip_special_tokens=True) for request in requests]


def main() -> None:
    """Read the prompts in the first process, answer them in all, print them in the first."""
    parser = argparse.ArgumentParser(description="One model over several processes")
    parser.add_argument("prompts", nargs="*", default=["What is the capital of France?"])
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The CPU's part serves the numeric check of the passes.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        asked = [arguments.prompts]
        dist.broadcast_object_list(asked, src=0)
        answers = answer(arguments.model, asked[0], arguments.new_tokens)
        if dist.get_rank() == 0:
            for prompt, text in zip(asked[0], answers, strict=True):
                print(f"{prompt}\n  {text}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
