"""Replicas of a served model behind Ray Serve, which starts them and spreads the requests.

    pip install 'fxgraft[serve,ray]'
    python examples/ray_serve.py --replicas 2
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "smollm2-135m", "messages": [{"role": "user", "content": "Hello"}]}'

Every replica is a process with an engine of its own; on a machine with GPUs it has one to itself.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from fastapi import FastAPI

import fxgraft
from fxgraft import sources
from fxgraft.pipeline import Pipeline
from fxgraft.runtime.serve.options import ServeOptions
from fxgraft.runtime.serve.startup import app_of, serving_backend


def build_app(model: str, passes: Pipeline, options: ServeOptions | None = None) -> FastAPI:
    """What runs in a replica: OpenAI's interface over an engine."""
    compiled = fxgraft.compile(model, passes=passes, backend=serving_backend("auto"))
    return app_of(compiled, sources.tokenizer(model), name=model, options=options)


def application(
    model: str, passes: Pipeline, replicas: int, options: ServeOptions | None = None
) -> Any:
    """The Ray Serve application.

    Args:
        model: alias, hub id or folder.
        passes: applied in each replica when it starts.
        replicas: how many.
        options: limits and timeouts of each replica's server, and options of its engine.
    """
    from ray import serve

    chosen = options or ServeOptions()

    def build() -> FastAPI:
        return build_app(model, passes, chosen)

    deployment = serve.deployment(
        name="fxgraft",
        num_replicas=replicas,
        # The engine queues what does not fit; Ray gives further requests to other replicas.
        max_ongoing_requests=2 * chosen.engine.max_batch,
        health_check_timeout_s=60,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(torch.cuda.is_available())},
    )
    return deployment(serve.ingress(build)()).bind()


def main() -> None:
    """Serve until interrupted."""
    from ray import serve

    parser = argparse.ArgumentParser(description="Replicas of a served model behind Ray Serve")
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--passes", help="pipeline file; default the pass optimize")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    passes = Pipeline.parse(arguments.passes or ["optimize"])
    serve.start(http_options={"port": arguments.port})
    serve.run(application(arguments.model, passes, arguments.replicas), blocking=True)


if __name__ == "__main__":
    main()
