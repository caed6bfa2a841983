"""The conformance scenario of the specification, to the microsecond, in every batching mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fxgraft.runtime.hermes.client import Client
from fxgraft.runtime.hermes.network import Level, Network
from tests.runtime.hermes._systems import by_request, llm, request, run

# Milliseconds: first token and end of A, B, C, and A's largest gap between tokens.
GOLDEN = {
    "static": ((15, 46.806), (68.806, 90.750), (68.806, 80.048), 10.603),
    "continuous": ((15, 70.750), (37.000, 60.147), (37.000, 48.843), 33.843),
    "mixed": ((15, 60.750), (37.601, 60.750), (37.601, 49.445), 22.601),
    "chunked": ((15, 60.048), (48.203, 70.750), (48.203, 60.048), 16.951),
    "running_first": ((15, 60.048), (48.203, 70.750), (48.203, 60.048), 16.951),
    "disaggregated": ((15, 49.806), (37.000, 71.750), (37.000, 61.048), 13.601),
}
TOKEN_BYTES = 100


def requests() -> list[Any]:
    return [request(0, 0, 100, 4), request(1, 15e-3, 200, 3), request(2, 15e-3, 40, 2)]


def clients(mode: str, *, stepwise: bool) -> list[Client]:
    if mode != "disaggregated":
        budget = 128 if mode in ("chunked", "running_first") else 2048
        return [llm(strategy=mode, max_batched_tokens=budget, max_sequences=64, stepwise=stepwise)]
    return [
        llm(role, role=role, strategy="continuous", stepwise=stepwise,
            options={"kv_bytes": TOKEN_BYTES})
        for role in ("prefill", "decode")
    ]  # fmt: skip


@pytest.mark.parametrize("stepwise", [False, True], ids=["jumping", "stepwise"])
@pytest.mark.parametrize("mode", GOLDEN)
def test_golden_scenario(mode: str, stepwise: bool) -> None:
    # 2 ms and 0.01 ms per prompt token.
    network = Network(Level(TOKEN_BYTES / 10e-6, 2e-3)) if mode == "disaggregated" else None
    found = by_request(run(requests(), clients(mode, stepwise=stepwise), network=network))
    *times, gap = GOLDEN[mode]
    expected = np.array(times) / 1e3
    np.testing.assert_allclose(found["first_token"], expected[:, 0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(found["end"], expected[:, 1], rtol=0, atol=1e-9)
    assert found["max_gap"][0] == pytest.approx(gap / 1e3, abs=1e-9)


def test_contents_of_chunked_steps() -> None:
    coordinator = run(requests(), clients("chunked", stepwise=True))
    steps = coordinator.steps.table()
    contents = zip(steps["prefill_tokens"], steps["decodes"], strict=True)
    # [A 100], [A decode, B 127], [A decode, B 73 and C 40], [A, B, C decode], [B decode]
    assert list(contents) == [(100, 0), (127, 1), (113, 1), (0, 3), (0, 1)]
    assert list(steps["prefill_requests"]) == [1, 1, 2, 0, 0]
