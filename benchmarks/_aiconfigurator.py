"""AIConfigurator's native estimator on random steps: prices per second of CPU time, as JSON.

Run by a Python that has the package ``aiconfigurator-core``; see ``hermes_speed.py``.
"""

from __future__ import annotations

import json
import sys
import time

from aiconfigurator_core.sdk import EngineHandle  # pyright: ignore


def main() -> None:
    """Price the steps of a file: lists of decodes and of their mean context."""
    with open(sys.argv[1]) as file:  # noqa: PTH123
        sizes = json.load(file)
    engine = EngineHandle.compile("Qwen/Qwen3-32B", "h100_sxm", "trtllm", tp_size=2)
    engine.mixed_step_latency(512, 8, 1000, 2)
    begun = time.process_time()
    for decodes, context in sizes:
        engine.mixed_step_latency(512, decodes, context, 2)
    mixed = time.process_time() - begun
    begun = time.process_time()
    for decodes, context in sizes:
        engine.decode_step_latency(decodes, context, 2)
    decode = time.process_time() - begun
    print(json.dumps({"mixed": len(sizes) / mixed, "decode": len(sizes) / decode}))


if __name__ == "__main__":
    main()
