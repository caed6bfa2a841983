"""Prices: rooflines of dense models, closed forms, tables behind clients, and what they allow."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgraft.cost_table import StepCostTable
from fxgraft.devices import device
from fxgraft.errors import InputError
from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.communication import all_reduce
from fxgraft.runtime.hermes.config.costs import DenseSection
from fxgraft.runtime.hermes.costs import AffineCost, StepCost, WithWatts
from fxgraft.runtime.hermes.dense import MODELS, DenseCost, Efficiency
from fxgraft.runtime.hermes.dense_table import dense_table
from fxgraft.runtime.hermes.llm.client import LlmClient
from tests.runtime.hermes._tables import table

H100 = device("h100-sxm")
LLAMA = DenseCost(MODELS["llama-3.1-8b"], H100, "bfloat16")
COSTS: dict[str, StepCost] = {
    "dense": LLAMA,
    "shared": DenseCost(MODELS["llama-3.1-70b"], H100, "bfloat16", devices=8),
    "affine": AffineCost(0.01, 1e-5, 1e-4, 1e-7, 1e-8, 1e-9, 300.0),
    "table": table(watts=300.0).pricer(),
    "watts": WithWatts(table().pricer(), 300.0),
}
every_cost = pytest.mark.parametrize("name", COSTS)
prefills = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500)), max_size=4)


@every_cost
def test_empty_work_costs_nothing(name: str) -> None:
    price = COSTS[name].price()
    assert price.seconds == 0.0
    assert not price.joules


@every_cost
@given(prompts=prefills, decodes=st.integers(0, 20), context=st.integers(1, 200))
@settings(max_examples=40)
def test_more_work_never_costs_less(
    name: str, prompts: list[tuple[int, int]], decodes: int, context: int
) -> None:
    cost = COSTS[name]
    here = cost.price(prompts, decodes, decodes * context)
    longer = cost.price([(new + 7, cached) for new, cached in prompts], decodes, decodes * context)
    further = cost.price([(new, cached + 9) for new, cached in prompts], decodes,
                         decodes * (context + 5))  # fmt: skip
    fuller = cost.price([*prompts, (3, 0)], decodes, decodes * context)
    for more in (longer, further, fuller):
        assert more.seconds >= here.seconds * (1 - 1e-12) >= 0
        assert (more.joules or 0) >= (here.joules or 0) * (1 - 1e-12)


@every_cost
@given(decodes=st.integers(1, 30), context=st.integers(1, 400), far=st.integers(0, 100))
@settings(max_examples=40)
def test_decode_lines_are_prices(name: str, decodes: int, context: int, far: int) -> None:
    cost = COSTS[name]
    line = cost.decode_line(decodes, decodes * context)
    there = min(decodes * context + far, line.last)
    price = cost.price((), decodes, there)
    steps = there - line.first
    assert line.seconds + line.seconds_per_key * steps == pytest.approx(price.seconds, rel=1e-9)
    joules = line.joules + line.joules_per_key * steps
    assert joules == pytest.approx(price.joules or 0.0, rel=1e-9)


def test_prices_do_not_depend_on_what_was_asked_before() -> None:
    steps = [((n, c), d, d * (k + 1)) for n, c, d, k in
             itertools.product((1, 300), (0, 77), (0, 5), (9, 400))]  # fmt: skip
    pairs: list[tuple[StepCost, StepCost]] = [
        (table().pricer(), table().pricer()),
        (DenseCost(LLAMA.model, H100, "float8"), DenseCost(LLAMA.model, H100, "float8")),
    ]
    for one, other in pairs:
        forwards = [one.price([p], d, k) for p, d, k in steps]
        backwards = [other.price([p], d, k) for p, d, k in reversed(steps)]
        assert forwards == backwards[::-1]


# -- the roofline


def test_a_decode_step_takes_no_less_than_reading_the_weights() -> None:
    model, ideal = LLAMA.model, DenseCost(LLAMA.model, H100, "bfloat16", efficiency=Efficiency(
        *[1.0] * 6))  # fmt: skip
    read = 2 * (model.parameters - model.hidden * model.vocabulary)  # the head, not the embedding
    assert ideal.price((), 1, 1).seconds >= read / H100.bandwidth
    keys = 100_000
    more = ideal.price((), 1, keys).seconds - ideal.price((), 1, 1).seconds
    assert more >= (keys - 1) * model.kv_bytes("bfloat16") / H100.bandwidth * (1 - 1e-12)


def test_a_prefill_takes_no_less_than_its_arithmetic() -> None:
    model, tokens = LLAMA.model, 8192
    operations = 2 * tokens * model.layers * model.layer_parameters
    attention = 4 * model.layers * model.heads * model.head_dim * tokens * tokens / 2
    least = (operations + attention) / H100.peak("bfloat16")
    assert least <= LLAMA.price([(tokens, 0)]).seconds <= 2 * least


def test_more_bandwidth_is_never_slower() -> None:
    faster = DenseCost(LLAMA.model, H100.model_copy(
        update={"bandwidth": 2 * H100.bandwidth}), "bfloat16")  # fmt: skip
    for step in (((8192, 0),), (), ((1, 4000),)):
        decodes = 0 if step else 64
        assert faster.price(step, decodes, decodes * 500).seconds <= LLAMA.price(
            step, decodes, decodes * 500).seconds  # fmt: skip


def test_one_device_has_no_communication_and_eight_pay_for_it() -> None:
    model, share = MODELS["llama-3.1-70b"], Efficiency()
    for devices in (1, 8):
        cost = DenseCost(model, H100, "bfloat16", devices=devices)
        assert H100.link is not None
        link = H100.link.model_copy(update={"bandwidth": 1e30, "latency": 0.0})
        instant = H100.model_copy(update={"link": link})
        silent = DenseCost(model, instant, "bfloat16", devices=devices)
        extra = cost.price([(100, 0)]).seconds - silent.price([(100, 0)]).seconds
        each = all_reduce(devices, 100 * 8192 * 2, H100.link.bandwidth * share.communication,
                          H100.link.latency)  # fmt: skip
        start = 5e-6 if devices > 1 else 0.0
        assert extra == pytest.approx(2 * model.layers * (each - start), rel=1e-9, abs=1e-15)


def test_the_data_type_of_weights_matters() -> None:
    """A decode of one sequence reads half as much, at nearly half the time."""
    narrow = DenseCost(LLAMA.model, H100, "float8")
    ratio = narrow.price((), 1, 10).seconds / LLAMA.price((), 1, 10).seconds
    assert 0.5 < ratio < 0.65


def test_keys_and_values_of_known_models() -> None:
    assert MODELS["llama-3.1-70b"].kv_bytes("bfloat16") == 327_680
    assert MODELS["llama-3.1-8b"].kv_bytes("bfloat16") == 131_072


def test_a_dense_cost_as_a_table(tmp_path: Path) -> None:
    made = dense_table(LLAMA, "llama-3.1-8b", tokens=2048, sequences=64, context=4096)
    file = made.save(tmp_path / "table.json")
    loaded = StepCostTable.load(file)
    assert loaded == made
    assert loaded.save(tmp_path / "again.json").read_bytes() == file.read_bytes()
    pricer = loaded.pricer()
    for prompts, decodes, context in (([(700, 33)], 0, 0), ([], 17, 17 * 900), ([(90, 0)], 9, 999)):
        exact = LLAMA.price(prompts, decodes, context)
        read = pricer.price(prompts, decodes, context)
        assert read.seconds == pytest.approx(exact.seconds, rel=0.02)
        assert read.joules == pytest.approx(exact.joules, rel=0.05)


# -- a table behind a client


def client_of(file: Path, **fields: Any) -> LlmClient:
    system = System.parse({
        "clients": [{"name": "gpu", "cost": {"kind": "table", "file": str(file)},
                     "max_batched_tokens": 512, "max_sequences": 32, **fields}],
        "workloads": [{"requests": 1, "arrivals": {"rate": 1}, "prompt": 1, "output": 1,
                       "model": "m"}],
    })  # fmt: skip
    (client,) = system.build_clients()
    assert isinstance(client, LlmClient)
    return client


def test_blocks_are_what_the_memory_leaves(tmp_path: Path) -> None:
    file = table().save(tmp_path / "table.json")
    # 100,000 bytes, 1,000 of weights, 10 per token, blocks of 16.
    assert client_of(file).limits.blocks == (90_000 - 1000) // 160
    assert client_of(file, memory_share=0.5, memory_reserve=9000.0).limits.blocks == 40_000 // 160
    assert client_of(file, blocks=7).limits.blocks == 7
    assert client_of(file).kv_bytes == 10.0


@pytest.fixture
def narrow(tmp_path: Path) -> dict[str, Any]:
    """A table for at most 256 new tokens behind a client that may run 512."""
    file = table(tokens=256).save(tmp_path / "narrow.json")
    return {
        "clients": [{"name": "gpu", "cost": {"kind": "table", "file": str(file)},
                     "max_batched_tokens": 512, "max_sequences": 32}],
        "workloads": [{"requests": 9, "arrivals": {"kind": "regular", "rate": 1}, "prompt": 300,
                       "output": 3, "model": "m"}],
    }  # fmt: skip


def test_work_outside_a_table_is_an_error(narrow: dict[str, Any]) -> None:
    message = r"client gpu, at .* s: new_tokens 300 is outside the step-cost table.*1 to 256"
    with pytest.raises(InputError, match=message):
        System.parse(narrow).simulate()


def test_or_a_marked_extrapolation(narrow: dict[str, Any]) -> None:
    narrow["clients"][0]["cost"]["outside"] = "mark"
    for stepwise in (False, True):
        result = System.parse(narrow).simulate(stepwise=stepwise)
        assert result.clients[0]["marked_steps"] == 9  # the prompts, not the decodes
        assert "9 steps lay outside the validity of their cost table" in str(result)
        prompt = 0.01 + 50e-6 * 300
        first = result.requests["first_token"] - result.requests["arrival"]
        assert first.min() == pytest.approx(prompt, rel=1e-6)


def test_a_dense_model_by_its_sizes() -> None:
    """The same prices, memory and transfers as under its name; the name is the user's."""
    sizes = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128,
             "intermediate": 14336, "vocabulary": 128256}  # fmt: skip
    common: dict[str, Any] = {"device": "h100-sxm", "weights": "bfloat16"}
    named = DenseSection(model="llama-3.1-8b", **common).serve(512, 8)
    sized = DenseSection.model_validate({"model": {"name": "mine", **sizes}, **common}).serve(
        512, 8
    )
    assert sized.model == "mine"
    assert sized.kv_bytes == named.kv_bytes
    assert sized.state_memory == named.state_memory
    work = [(256, 1024)]
    assert sized.cost.price(work) == named.cost.price(work)
