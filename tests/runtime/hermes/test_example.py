"""The examples of system files: they run, and the fast way gives what single steps give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fxgraft.cost_table import StepCostTable
from fxgraft.errors import InputError
from fxgraft.runtime.hermes.config.system import System
from tests.runtime.hermes._systems import by_request

FOLDER = Path(__file__).parents[3] / "examples" / "systems"
EXAMPLE = FOLDER / "conversation.yaml"


def test_the_example_equals_its_single_steps() -> None:
    system = System.read(EXAMPLE, {"workloads.0.requests": 60})
    fast, slow = system.coordinator(), system.coordinator(stepwise=True)
    fast.run()
    slow.run()
    ours, theirs = by_request(fast), by_request(slow)
    for column in ("arrival", "first_token", "end"):
        assert len(ours[column]) == 60
        np.testing.assert_allclose(ours[column], theirs[column], rtol=0, atol=1e-9)


def test_a_wrong_key_is_named_with_its_line() -> None:
    with pytest.raises(InputError, match=r"conversation.yaml.*workloads.0.arrivals.*pace"):
        System.read(EXAMPLE, {"workloads.0.arrivals": {"kind": "poisson", "pace": 3.0}})


@pytest.mark.slow
def test_a_gpu_and_a_chip_serve_together(tmp_path: Path) -> None:
    """From the model and its passes to joules by one file; tables are kept for the second time."""
    changes = {
        "workloads.0.requests": 40,
        "clients.0.cost.keep": str(tmp_path / "gpu.json"),
        "clients.1.cost.keep": str(tmp_path / "chip.json"),
    }
    result = System.read(FOLDER / "flexcim_decode.yaml", changes).simulate()
    assert result.summary["total"]["completed"] == 40
    gpu, chip = result.clients
    assert gpu["served"] == 40
    assert 0 < chip["step_joules"] < gpu["joules"]
    tables = [StepCostTable.load(tmp_path / name) for name in ("gpu.json", "chip.json")]
    assert [table.identity.backend for table in tables] == ["roofline", "flexcim"]
    assert [len(table.identity.passes) for table in tables] == [0, 1]


def test_every_example_has_a_test() -> None:
    assert {file.name for file in FOLDER.iterdir()} == {"conversation.yaml", "flexcim_decode.yaml"}
