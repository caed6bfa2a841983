"""Wrong system files: each error names file, line and key, and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fxgraft.errors import InputError
from fxgraft.runtime.hermes import System
from tests.runtime.hermes._tables import table

GOOD: dict[str, Any] = {
    "clients": [
        {"name": "gpu", "cost": {"base": 0.01}, "max_batched_tokens": 64, "max_sequences": 8},
        {"name": "host", "kind": "host", "tasks": {"default": {"seconds": 0.1}}},
        {"name": "store", "kind": "storage", "kv_bytes": 10.0,
         "levels": [{"bandwidth": 1e9, "hit": 0.5}]},
        {"name": "rag", "kind": "rag", "embed": {"base": 0.1},
         "index": {"dimension": 8, "centroids": 10, "probes": 2, "vectors_per_list": 5,
                   "subquantizers": 2, "flops": 1e9, "bandwidth": 1e9}},
    ],
    "network": {"inside_node": {"bandwidth": 1e9}},
    "workloads": [
        {"requests": 5, "arrivals": {"rate": 2.0}, "prompt": 10, "output": 3, "context": 4,
         "chain": ["preprocess", "rag", "kv_retrieval", "prefill", "decode", "postprocess"]},
    ],
}  # fmt: skip


def write(folder: Path, content: dict[str, Any]) -> Path:
    file = folder / "system.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def changed(path: str, value: Any) -> dict[str, Any]:
    """``GOOD`` with one value at a path."""
    content = json.loads(json.dumps(GOOD))
    place: Any = content
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    for key in keys:
        place = place[key]
    place[last] = value
    return content


def error_of(folder: Path, path: str, value: Any) -> str:
    with pytest.raises(InputError) as caught:
        System.read(write(folder, changed(path, value)))
    assert caught.value.remedy
    return str(caught.value)


def test_the_good_system_runs(tmp_path: Path) -> None:
    assert System.read(write(tmp_path, GOOD)).simulate().summary["total"]["completed"] == 5


NAN, INF = float("nan"), float("inf")
WRONG_VALUES = [
    # rates, bandwidths, probabilities, capacities
    ("workloads.0.arrivals.rate", 0), ("workloads.0.arrivals.rate", -1.0),
    ("workloads.0.arrivals.rate", NAN), ("workloads.0.arrivals.rate", INF),
    ("workloads.0.arrivals.rate", "fast"), ("workloads.0.arrivals.rate", True),
    ("network.inside_node.bandwidth", 0), ("network.inside_node.bandwidth", -5e9),
    ("network.inside_node.latency", -1e-3), ("network.inside_node.efficiency", 1.5),
    ("clients.2.levels.0.bandwidth", 0), ("clients.2.levels.0.bandwidth", -1.0),
    ("clients.2.levels.0.hit", 1.01), ("clients.2.levels.0.hit", -0.1),
    ("clients.2.levels.0.hit", NAN), ("clients.2.levels.0.capacity", 0),
    ("clients.2.kv_bytes", 0), ("clients.3.index.flops", 0), ("clients.3.index.bandwidth", -1),
    ("clients.3.index.probes", 0), ("clients.0.swap_bandwidth", 0),
    # times
    ("clients.0.cost.base", -0.01), ("clients.0.cost.base", NAN), ("clients.0.watts", -1),
    ("clients.1.tasks.default.seconds", -1.0), ("clients.1.tasks.default.seconds", NAN),
    ("workloads.0.timeout", 0), ("horizon", 0), ("horizon", -1), ("horizon", NAN),
    # counts
    ("workloads.0.prompt", 0), ("workloads.0.output", 0), ("workloads.0.prompt", -3),
    ("workloads.0.prompt", 1.5), ("workloads.0.requests", 0), ("workloads.0.context", 0),
    ("clients.0.max_batched_tokens", 0), ("clients.0.max_sequences", 0),
    ("clients.0.block_size", 0), ("clients.0.count", 0), ("clients.1.cores", 0),
    ("clients.0.blocks", -1), ("clients.0.memory_share", 0), ("clients.0.memory_share", 1.5),
    # objectives and choices
    ("slo", {"ttft": 0}), ("slo", {"tpot": -0.1}), ("slo", {"e2e": NAN}),
    ("clients.0.batching", "chunky"), ("clients.0.order", "lifo"), ("clients.0.role", "spare"),
    ("clients.2.mode", "guess"), ("routing", {"default": "nearest"}), ("logs", ["stages", "x"]),
    ("network.preset", "b200"), ("clients.0.preemption", "kill"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG_VALUES, ids=lambda value: str(value))
def test_a_wrong_value_is_named_with_file_line_and_key(
    tmp_path: Path, path: str, value: Any
) -> None:
    text = error_of(tmp_path, path, value)
    file = tmp_path / "system.yaml"
    first = text.splitlines()[0]
    assert first.startswith(f"{file}, line ")
    line = int(first.removeprefix(f"{file}, line ").split(":")[0])
    key = next(key for key in reversed(path.split(".")) if not key.isdigit())
    assert key in file.read_text().splitlines()[line - 1] or key in first
    assert path.split(".")[-1] in text


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("sed", "seed"), ("clients.0.blokcs", "blocks"), ("clients.0.cost.bass", "base"),
        ("clients.1.corse", "cores"), ("clients.2.levels.0.bandwith", "bandwidth"),
        ("clients.3.index.probe", "probes"), ("network.latency", ""),
        ("workloads.0.request", "requests"), ("workloads.0.arrivals.rates", "rate"),
    ],
)  # fmt: skip
def test_unknown_keys_list_the_valid_ones(tmp_path: Path, path: str, known: str) -> None:
    text = error_of(tmp_path, path, 1)
    assert f"has no key {path.split('.')[-1]!r}" in text
    assert f"{tmp_path / 'system.yaml'}, line " in text
    assert "the valid keys of" in text
    if known:
        assert f"did you mean {known!r}" in text


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("clients", [], "clients"),
        ("clients", {"name": "gpu"}, "clients"),
        ("workloads", [], "workloads"),
        ("clients.0", {"name": "gpu"}, "clients.0 needs the key 'cost'"),
        ("clients.0.kind", "tpu", "'tpu'"),
        ("clients.0.cost.kind", "magic", "'magic'"),
        ("clients.1.name", "gpu", "has two clients named 'gpu'"),
        ("clients.0.max_sequences", 65, "max_batched_tokens 64 below max_sequences 65"),
        ("clients.3.index.probes", 11, "probes 11 lists of 10"),
        ("workloads.0.prompt", {"kind": "uniform", "low": 5, "high": 4}, "low 5 above high 4"),
        ("workloads.0.prompt", {"kind": "fixed", "tokens": 3, "minimum": 9, "maximum": 8},
         "minimum of 9 above its maximum 8"),
        ("workloads.0.prompt", [], "prompt"),
        ("workloads.0.keys", {"law": "zipf"}, "no count"),
        ("workloads.0.output", None, "needs prompt and output"),
        ("workloads.0.requests", None, "needs the number of its requests"),
        ("workloads.0.context", None, "does not say how much: give context"),
        ("logs", ["steps"], "without the log of requests"),
        ("slo", {}, "sets no limit"),
        ("network.links", [{"between": ["gpu", "gpu"], "bandwidth": 1}], "to itself"),
        ("network.links", [{"between": ["gpu", "moon"], "bandwidth": 1}],
         "leads to 'moon', which is no client"),
        ("workloads.0.preferred", ["moon"], "prefers 'moon', which is no client"),
        ("clients.2.mode", "expectation", "needs recompute"),
        ("clients.0.cost", {"kind": "dense", "model": "llama-9", "device": "h100-sxm",
                            "weights": "bfloat16"}, "no model 'llama-9'"),
        ("clients.0.cost", {"kind": "dense", "model": "llama-3.1-8b", "device": "h1000",
                            "weights": "bfloat16"}, "h1000"),
        ("clients.0.cost", {"kind": "dense", "model": "llama-3.1-8b", "device": "h100-sxm",
                            "weights": "float7"}, "'float7' is no data type"),
        ("clients.0.cost", {"kind": "dense", "model": "llama-3.1-8b", "device": "h100-sxm"},
         "needs the key 'weights'"),
        ("clients.0.cost", {"kind": "dense", "model": "llama-3.1-70b", "device": "h100-sxm",
                            "weights": "bfloat16"}, "does not fit"),
    ],
)  # fmt: skip
def test_impossible_systems(tmp_path: Path, path: str, value: Any, message: str) -> None:
    text = error_of(tmp_path, path, value)
    assert message in text
    assert f"{tmp_path / 'system.yaml'}, line " in text


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        ([], "no stages"),
        (["decode"], "has no prefill before it"),
        (["decode", "prefill"], "has no prefill before it"),
        (["prefill", "preprocess", "decode"], "does not follow a prefill directly"),
        (["prefill", "decode", "reasoning"], "does not follow a prefill directly"),
        ([{"kind": "prefill", "model": "a"}, "decode"], "has another model than its prefill"),
        (["prefill", "tool"], "'tool'"),
        (["prefill", {"kind": "decode", "branches": 0}], "branches"),
        (["prefill", {"kind": "decode", "scale": 0}], "scale"),
        (["prefill", {"kind": "decode", "banches": 2}], "did you mean 'branches'"),
        (["rerank"], "no client can run stage 1 (rerank)"),
        ([{"kind": "preprocess", "task": "translate"}], "no client can run stage 1 (preprocess)"),
        ([{"kind": "prefill", "model": "guard"}], "stage 1 (prefill) for model 'guard'"),
    ],
)  # fmt: skip
def test_chains_that_can_never_run(tmp_path: Path, chain: list[Any], message: str) -> None:
    text = error_of(tmp_path, "workloads.0.chain", chain)
    assert message in text
    assert "line " in text.splitlines()[0]


def test_a_model_that_no_client_serves(tmp_path: Path) -> None:
    content = changed("clients.0.model", "llama")
    content["workloads"][0]["model"] = "mistral"
    with pytest.raises(InputError, match=r"line \d+: workload.*no client can run.*'mistral'"):
        System.read(write(tmp_path, content))


def test_clients_without_a_link_between_them(tmp_path: Path) -> None:
    content = changed("clients.1.node", 3)
    with pytest.raises(InputError, match="no link leads from client 'host' to client 'rag'"):
        System.read(write(tmp_path, content))


# -- cost tables


def with_table(folder: Path, text: str | None = None, **client: Any) -> System:
    file = folder / "table.json"
    if text is None:
        table().save(file)
    else:
        file.write_text(text)
    content = {
        "clients": [{"name": "gpu", "cost": "table.json", "max_batched_tokens": 64,
                     "max_sequences": 8, **client}],
        "workloads": [{"requests": 5, "arrivals": {"rate": 1}, "prompt": 9, "output": 3}],
    }  # fmt: skip
    return System.read(write(folder, content))


def test_a_table_file_is_relative_to_the_system(tmp_path: Path) -> None:
    assert with_table(tmp_path).simulate().summary["total"]["completed"] == 5


@pytest.mark.parametrize("value", ["NaN", "-0.01", "Infinity", "null", '"1"'])
def test_impossible_prices_in_a_table(tmp_path: Path, value: str) -> None:
    table().save(tmp_path / "t.json")
    text = (tmp_path / "t.json").read_text().replace('"seconds": [0.01005', f'"seconds": [{value}')
    assert value in text
    with pytest.raises(InputError) as caught:
        with_table(tmp_path, text)
    assert "system.yaml, line " in str(caught.value)
    assert "table.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "other"}'])
def test_files_that_are_no_tables(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"system\.yaml, line \d+: .*table\.json"):
        with_table(tmp_path, text)


def test_a_table_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"system\.yaml, line \d+: .*none\.json cannot be read"):
        with_table(tmp_path, cost="none.json")


@pytest.mark.parametrize(("key", "value"), [("model", "other"), ("dtype", "float8")])
def test_a_table_for_something_else(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(InputError, match=f"client 'gpu' has {key} '{value}', its cost is for"):
        with_table(tmp_path, **{key: value})


@pytest.mark.parametrize(
    "client", [{"memory_reserve": 1e6}, {"memory_share": 0.005}, {"block_size": 100_000},
               {"blocks": 0}],
)  # fmt: skip
def test_no_memory_for_a_single_block(tmp_path: Path, client: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"no memory for a single block.*'m' does not fit"):
        with_table(tmp_path, **client)


# -- traces


def with_trace(folder: Path, text: str, **workload: Any) -> System:
    (folder / "trace.csv").write_text(text)
    content = {
        "clients": [{"name": "gpu", "cost": {"base": 0.01}},
                    {"name": "store", "kind": "storage", "kv_bytes": 1.0}],
        "workloads": [{"arrivals": "trace.csv", **workload}],
    }  # fmt: skip
    return System.read(write(folder, content))


HEADER = "arrival,prompt,output"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEADER}\n0,1,1\n1,0,1\n", "row 3: prompt is '0', it must be 1 or more"),
        (f"{HEADER}\n0,1,1\n1,5,-2\n", "row 3: output is '-2', it must be 1 or more"),
        (f"{HEADER}\n0,1,1\n1,5,x\n", "row 3: output is 'x', it is no number"),
        (f"{HEADER}\n0,1,1\n1,5\n", "row 3: output is 'empty', it is no number"),
        (f"{HEADER}\n0,1,1\n\nnan,5,1\n", "row 4: arrival is 'nan'"),
        (f"{HEADER}\n-1,5,1\n", "row 2: arrival is '-1', it must be 0 or more"),
        (f"{HEADER}\n0,1.5,1\n", "row 2: prompt is '1.5', it is no number"),
        (f"{HEADER}\n0,1,1\n\n2,1,1\n1,1,1\n", "row 5: its arrival is before"),
        (f"{AZURE}\n2023-11-16 18:17:03,5,5\nnoon,5,5\n", "row 3: arrival is 'noon'"),
        (f"{AZURE}\n2023-11-16 18:17:03,5,5\n,5,5\n", "row 3: arrival is 'empty'"),
        (f"{AZURE}\n2023-11-16 18:17:03,0,5\n", "row 2: prompt is '0'"),
        ("arrival,prompt\n0,1\n", "no column output; its columns are arrival, prompt"),
        (f"{HEADER}\n", "has no requests"),
        ("", "is empty"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_by_number(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        with_trace(tmp_path, text)
    assert message in str(caught.value)
    assert "trace.csv" in str(caught.value)
    assert "system.yaml, line " in str(caught.value)


def test_traces_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").mkdir()
    content = {"clients": GOOD["clients"][:1], "workloads": [{"arrivals": "trace.csv"}]}
    with pytest.raises(InputError, match=r"trace\.csv cannot be read"):
        System.read(write(tmp_path, content))


def test_a_trace_without_the_context_that_its_chain_retrieves(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its trace has no column context"):
        with_trace(tmp_path, f"{HEADER}\n0,1,1\n", chain=["kv_retrieval", "prefill", "decode"])


def test_lengths_and_a_trace_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has only one of prompt and output"):
        with_trace(tmp_path, f"{HEADER}\n0,1,1\n", prompt=5)


# -- files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a system is a mapping of keys"), ("- a\n", "a system is a mapping of keys"),
        ("clients: [\n", "is no YAML"), ("a: 1\na: 2\n", "line 2: the key 'a' is given twice"),
    ],
)  # fmt: skip
def test_files_that_are_no_systems(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "system.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        System.read(file)
    assert message in str(caught.value)
    assert "system.yaml" in str(caught.value)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml cannot be read"):
        System.read(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", ["clients.7.count", "clients.x.count", "client.0", "seed.x"])
def test_changes_that_lead_nowhere(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError):
        System.read(write(tmp_path, GOOD), {path: 1})


def test_all_wrong_keys_are_reported_at_once(tmp_path: Path) -> None:
    content = changed("workloads.0.prompt", 0)
    content["clients"][0]["count"] = -1
    content["sead"] = 1
    with pytest.raises(InputError) as caught:
        System.read(write(tmp_path, content))
    lines = str(caught.value).splitlines()
    assert sum("system.yaml, line " in line for line in lines) == 3
