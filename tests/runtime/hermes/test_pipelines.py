"""Systems whose cost tables are made from pipelines: one file from a model to its latencies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import fxgraft
from fxgraft.backends.flexcim import FlexcimCompiled
from fxgraft.cost_table import Price, StepCostTable
from fxgraft.errors import InputError
from fxgraft.roofline import roofline_table
from fxgraft.runtime.hermes import System, sweep
from fxgraft.runtime.hermes.config import pipelines
from fxgraft.runtime.hermes.llm.client import LlmClient
from tests import model_folder

Made = list[str]
PROGRAMS: dict[str, fxgraft.Program] = {}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return model_folder.write(folder, model_folder.llama(num_attention_heads=16,
                                                         num_key_value_heads=4))  # fmt: skip


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another process."""
    monkeypatch.setattr(pipelines, "_tables", {})
    monkeypatch.setattr(pipelines, "_programs", {})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Models that were captured, with nothing remembered from other tests."""
    captured: Made = []
    capture = pipelines.capture

    def watched(source: str) -> fxgraft.Program:
        captured.append(source)
        place = str(Path(source).resolve())  # other tests' captures do as well
        if place not in PROGRAMS:
            PROGRAMS[place] = capture(source)
        return PROGRAMS[place]

    monkeypatch.setattr(pipelines, "capture", watched)
    forget(monkeypatch)
    return captured


def system(folder: Path, **clients: Any) -> Path:
    """Clients by name, with their costs, and some requests."""
    content = {
        "clients": [
            {"name": name, "max_batched_tokens": 256, "max_sequences": 16, "kv_bytes": 1000.0,
             **(fields if "cost" in fields else {"cost": fields})}
            for name, fields in clients.items()
        ],
        "workloads": [{"requests": 20, "arrivals": {"rate": 5}, "prompt": 60, "output": 8}],
    }  # fmt: skip
    file = folder / "system.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def price(file: Path, *step: Any) -> Price:
    """What a step of the only client costs."""
    (client,) = System.read(file).build_clients()
    assert isinstance(client, LlmClient)
    return client.cost.price(*step)


def flexcim(model: Path, **more: Any) -> dict[str, Any]:
    keys = {"model": str(model), "backend": "flexcim", "options": {"hardware": {"macros": 4}}}
    return {"kind": "pipeline", "pipeline": keys | more}


def test_the_backend_s_own_table(tmp_path: Path, model: Path, made: Made) -> None:
    file = system(tmp_path, chip=flexcim(model))
    compiled = fxgraft.compile(model, backend="flexcim", options={"hardware": {"macros": 4}})
    assert isinstance(compiled, FlexcimCompiled)
    expected = compiled.table()
    assert price(file, [(60, 0)], 3, 300) == expected.price([(60, 0)], 3, 300)


def test_peak_rates_of_a_device_for_the_same_model(tmp_path: Path, model: Path, made: Made) -> None:
    cost = {"kind": "pipeline", "pipeline": {"model": str(model)}, "device": "h100-sxm",
            "dtype": "bfloat16"}  # fmt: skip
    expected = roofline_table(fxgraft.capture(model), "h100-sxm", "bfloat16")
    assert price(system(tmp_path, gpu=cost), [(60, 0)]) == expected.price([(60, 0)])


def test_a_mixed_system_from_one_file(tmp_path: Path, model: Path, made: Made) -> None:
    """Prefill on a GPU by peak rates, decode in memory by the backend; no model is named twice."""
    gpu = {"kind": "pipeline", "pipeline": {"model": str(model)}, "device": "h100-sxm",
           "dtype": "bfloat16"}  # fmt: skip
    file = system(tmp_path, prefill={"role": "prefill", "cost": gpu},
                  decode={"role": "decode", "cost": flexcim(model)})  # fmt: skip
    result = System.read(file).simulate()
    assert result.summary["total"]["completed"] == 20
    first, second = result.clients
    assert first["steps"] > 0
    assert second["steps"] > 0
    assert second["step_joules"] > 0
    assert len(made) == 1  # for both, although the system is checked and then simulated


def test_passes_change_the_prices(tmp_path: Path, model: Path, made: Made) -> None:
    pruned = flexcim(model, passes=[{"prune_heads": {"sparsity": 0.5}}])
    dense = price(system(tmp_path, chip=flexcim(model)), [(90, 0)])
    assert price(system(tmp_path, chip=pruned), [(90, 0)]).seconds < dense.seconds


def test_a_sweep_over_a_pass_s_setting(tmp_path: Path, model: Path, made: Made) -> None:
    file = system(tmp_path, chip=flexcim(model, passes=[{"prune_heads": {"sparsity": 0.1}}]))
    key = "clients.0.cost.pipeline.passes.0.prune_heads.sparsity"
    points = sweep(file, {key: [0.1, 0.5]})
    means = [point.summary["total"]["e2e"]["mean"] for point in points]
    assert means[1] < means[0]
    assert len(made) == 1


def test_a_pipeline_file_is_the_same_as_its_content(
    tmp_path: Path, model: Path, made: Made
) -> None:
    (tmp_path / "pipes").mkdir()
    content = flexcim(model)["pipeline"]
    (tmp_path / "pipes" / "chip.yaml").write_text(yaml.safe_dump(content))
    cost = {"kind": "pipeline", "pipeline": "pipes/chip.yaml"}
    from_file = price(system(tmp_path, chip=cost), [(9, 0)])
    assert from_file == price(system(tmp_path, chip=flexcim(model)), [(9, 0)])


def test_models_are_relative_to_the_file(tmp_path: Path, model: Path, made: Made) -> None:
    (tmp_path / "here").symlink_to(model)
    System.read(system(tmp_path, chip=flexcim(Path("here"))))
    assert made == [str(tmp_path / "here")]


# -- kept tables


def test_a_kept_table_is_read_again(
    tmp_path: Path, model: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = system(tmp_path, chip={**flexcim(model), "keep": "tables/chip.json"})
    first = System.read(file).simulate()
    kept = tmp_path / "tables" / "chip.json"
    table = StepCostTable.load(kept)
    assert table.identity.backend == "flexcim"
    forget(monkeypatch)
    second = System.read(file).simulate()
    assert len(made) == 1
    assert repr(first.summary) == repr(second.summary)


def test_a_kept_table_is_made_again_if_the_pipeline_changed_or_it_is_damaged(
    tmp_path: Path, model: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "chip.json"
    System.read(system(tmp_path, chip={**flexcim(model), "keep": "chip.json"}))
    before = kept.read_bytes()
    other = flexcim(model, options={"hardware": {"macros": 2}})
    forget(monkeypatch)
    System.read(system(tmp_path, chip={**other, "keep": "chip.json"}))
    assert len(made) == 2
    changed = kept.read_bytes()
    assert changed != before
    kept.write_text("{")
    forget(monkeypatch)
    System.read(system(tmp_path, chip={**other, "keep": "chip.json"}))
    assert len(made) == 3
    assert kept.read_bytes() == changed


def test_a_table_is_made_again_if_a_file_of_the_model_changed(tmp_path: Path, made: Made) -> None:
    folder = model_folder.write(tmp_path / "own")
    file = system(tmp_path, chip=flexcim(folder))
    System.read(file)
    System.read(file)
    assert len(made) == 1
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    System.read(file)
    assert len(made) == 2


# -- bad input


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ({"pipeline": 5}, "should be a pipeline"),
        ({"pipeline": "none.yaml"}, "none.yaml cannot be read"),
        ({"pipeline": {"backend": "flexcim"}}, "the pipeline names no model"),
        ({"pipeline": {"model": "MODEL", "passes": ["prune_haeds"]}}, "prune_heads"),
        ({"pipeline": {"model": "MODEL", "passes": [{"prune_heads": {"sparcity": 0.1}}]}},
         "sparcity"),
        ({"pipeline": {"modle": "MODEL"}}, "modle"),
        ({"pipeline": {"model": "MODEL", "backend": "torch"}},
         "backend 'torch' does not say what steps cost"),
        ({"pipeline": {"model": "MODEL", "backend": "tpu"}}, "tpu"),
        ({"pipeline": {"model": "MODEL", "backend": "flexcim", "options": {"macros": 4}}},
         "macros"),
        ({"pipeline": {"model": "MODEL"}, "device": "h100-sxm"}, "needs device and dtype"),
        ({"pipeline": {"model": "MODEL"}, "dtype": "bfloat16"}, "needs device and dtype"),
        ({"pipeline": {"model": "MODEL"}, "device": "h1", "dtype": "bfloat16"}, "h1"),
        ({"pipeline": {"model": "MODEL"}, "device": "h100-sxm", "dtype": "float7"}, "float7"),
        ({"pipeline": {"model": "no/such/model", "backend": "flexcim"}}, "no/such/model"),
    ],
)  # fmt: skip
def test_wrong_pipelines_name_file_line_and_key(
    tmp_path: Path, model: Path, made: Made, cost: dict[str, Any], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chosen = json.loads(json.dumps({"kind": "pipeline", **cost}).replace("MODEL", str(model)))
    with pytest.raises(InputError) as caught:
        System.read(system(tmp_path, chip=chosen))
    assert message in str(caught.value)
    if "none.yaml" not in message:
        assert "system.yaml, line " in str(caught.value)


def test_errors_in_a_pipeline_file_name_its_line_too(
    tmp_path: Path, model: Path, made: Made
) -> None:
    text = f"model: {model}\npasses:\n  - prune_heads: {{sparcity: 0.1}}\n"
    (tmp_path / "pipe.yaml").write_text(text)
    cost = {"kind": "pipeline", "pipeline": "pipe.yaml"}
    with pytest.raises(InputError, match=r"system\.yaml, line \d+: .*pipe\.yaml, line 3: "):
        System.read(system(tmp_path, chip=cost))
