"""Levels: a cost table that carries them, and DSLA-Serve's policy in the simulator."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import fxgraft
from fxgraft.cost_table import Growing, LevelPricer, Memory, Part, StepCostTable
from fxgraft.devices import device
from fxgraft.errors import InputError, SerializationError
from fxgraft.passes.dsla import Dsla
from fxgraft.passes.dsla.levels import at_level
from fxgraft.roofline import roofline_table
from fxgraft.runtime.dsla_serve import Rules, decide
from fxgraft.runtime.dsla_serve.live import pressure
from fxgraft.runtime.engine import EngineView, RequestView
from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.coordinator import Coordinator
from fxgraft.runtime.hermes.llm import levels as module
from fxgraft.runtime.hermes.llm.blocks import blocks_for
from fxgraft.runtime.hermes.llm.client import LlmClient
from fxgraft.runtime.hermes.llm.levels import LevelRules
from fxgraft.runtime.hermes.llm.scheduler import Limits, Scheduler
from fxgraft.step_costs import StepGraph
from fxgraft.step_tables import Ranges
from tests import model_folder
from tests.runtime.hermes._systems import by_request, draw_requests, request, run
from tests.runtime.hermes._tables import table
from tests.runtime.hermes.test_fast_forward import STRATEGIES, all_gaps, assert_same

LAYERS = 4
SIZES = [(1, 512, 0), (1, 200, 900), (8, 1, 1000), (3, 1, 17)]
"""Batch, new and past tokens of each."""


@cache
def live() -> fxgraft.Program:
    """A Llama without values whose layers can all be linear."""
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=768, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("meta"):
        program = fxgraft.capture(LlamaForCausalLM(config))
    passes = fxgraft.Pipeline.parse(["optimize", Dsla(fraction=1.0, live=True)])
    return passes.run(program, check=False)


@cache
def priced(level: int, launch: float = 2e-6) -> StepCostTable:
    """A roofline of the Program at a level."""
    on = device("h100-sxm").model_copy(update={"launch": launch})
    ranges = Ranges(tokens=2048, sequences=16, new_tokens=2048, context=2048)
    return roofline_table(at_level(live(), level), on, "bfloat16", ranges=ranges)


@cache
def leveled(launch: float = 2e-6) -> StepCostTable:
    """The tables of both ends as one."""
    ends = priced(0, launch), priced(LAYERS, launch)
    return ends[0].with_levels(ends[1], layers=LAYERS, offered=LAYERS)


# -- what levels cost


def test_costs_of_programs_are_linear_in_the_level() -> None:
    """The highest level lacks what all attending layers share: rotary angles."""
    costs = [at_level(live(), level).cost().evaluate(batch=3, sequence=257) for level in range(5)]
    for values in zip(*costs, strict=True):
        first, step = values[0], values[1] - values[0]
        assert list(values[:LAYERS]) == [first + level * step for level in range(LAYERS)]
        assert values[LAYERS] == pytest.approx(first + LAYERS * step, rel=2e-2)


@cache
def graph(level: int) -> StepGraph:
    """Steps of the Program at a level."""
    return StepGraph(at_level(live(), level))


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_work_of_steps_lies_between_the_ends(level: int, size: tuple[int, int, int]) -> None:
    def work(at: int) -> list[float]:
        nodes = graph(at).nodes
        places = [place for place, node in enumerate(nodes) if node.kind != "other"]
        chosen = graph(at).work(*size).of(places)
        return [float(chosen.flops.sum()), float(chosen.bytes.sum())]

    share = level / LAYERS
    for low, high, found in zip(work(0), work(LAYERS), work(level), strict=True):
        assert found == pytest.approx((1 - share) * low + share * high, rel=1e-12)


@pytest.mark.parametrize("level", range(LAYERS + 1))
def test_a_table_at_a_level_is_the_table_of_the_program_at_that_level(level: int) -> None:
    found, wanted = leveled().at_level(level), priced(level)
    assert found.memory.growing == wanted.memory.growing
    assert found.memory.fixed_state == wanted.memory.fixed_state
    for batch, new, past in SIZES:
        phase = "prefill" if new > 1 else "decode"
        sizes = {"batch": batch, "new_tokens": new, "context": past + (new == 1)}
        one, other = found.lookup(phase, **sizes), wanted.lookup(phase, **sizes)
        np.testing.assert_allclose(one.seconds, other.seconds, rtol=2e-3)
        assert one.joules is not None
        assert other.joules is not None
        np.testing.assert_allclose(one.joules, other.joules, rtol=5e-3)


@pytest.mark.parametrize("level", range(LAYERS + 1))
def test_sequences_of_one_level_cost_what_that_table_says(level: int) -> None:
    own, pricer = leveled().at_level(level), LevelPricer(leveled())
    for prefills, decodes, keys in (
        ([(100, 0)], 0, 0), ([], 5, 5 * 321), ([(64, 128), (9, 0)], 3, 1700)
    ):  # fmt: skip
        mixed = pricer.mixed([level] * len(prefills), level * decodes, level * keys)
        found, wanted = mixed.price(prefills, decodes, keys), own.price(prefills, decodes, keys)
        assert found.seconds == pytest.approx(wanted.seconds, rel=1e-12)
        assert found.joules == pytest.approx(wanted.joules, rel=1e-12)


def test_a_mixed_batch_is_the_sum_over_layers() -> None:
    """In each layer some decodes attend and the others update states."""
    rows = [(0, 900), (1, 300), (3, 1500), (3, 40), (4, 700)]
    pricer = LevelPricer(leveled(launch=0.0))
    soft, linear = pricer.each
    wanted = 0.0
    for layer in range(1, LAYERS + 1):
        attend = [keys for level, keys in rows if level < layer]
        update = [keys for level, keys in rows if level >= layer]
        wanted += soft.price((), len(attend), sum(attend)).seconds / LAYERS
        wanted += linear.price((), len(update), sum(update)).seconds / LAYERS
    keys = sum(keys for _, keys in rows)
    mixed = pricer.mixed((), sum(level for level, _ in rows), sum(n * keys for n, keys in rows))
    once = [one.price((), len(rows), keys).seconds for one in pricer.once]
    share = sum(level for level, _ in rows) / (LAYERS * len(rows))
    wanted += (1 - share) * once[0] + share * once[1]
    assert mixed.price((), len(rows), keys).seconds == pytest.approx(wanted, rel=2e-3)


def test_prefills_of_other_levels_cost_what_they_cost_alone() -> None:
    pricer = LevelPricer(leveled())
    rows = [((300, 0), 0), ((200, 500), 4), ((100, 90), 1)]
    each = [
        part * one.price([row]).seconds
        for row, level in rows
        for one, part in zip(pricer.each, (1 - level / LAYERS, level / LAYERS), strict=True)
    ]
    share = sum(new * level for (new, _), level in rows) / (600 * LAYERS)
    prefills = [row for row, _ in rows]
    once = [one.price(prefills).seconds for one in pricer.once]
    found = pricer.mixed([level for _, level in rows]).price(prefills).seconds
    assert found == pytest.approx(sum(each) + (1 - share) * once[0] + share * once[1], rel=1e-12)


def test_lines_of_mixed_decodes_are_their_prices() -> None:
    rows = [(0, 300), (2, 700), (4, 50)]
    pricer = LevelPricer(leveled())
    keys = sum(keys for _, keys in rows)
    levels = sum(level for level, _ in rows)
    here = sum(level * keys for level, keys in rows)
    line = pricer.mixed((), levels, here).decode_line(3, keys)
    steps = (line.last - keys) // 3
    assert steps > 3
    for step in (0, 1, steps):
        price = pricer.mixed((), levels, here + step * levels).price((), 3, keys + 3 * step)
        at = line.seconds + line.seconds_per_key * 3 * step
        assert at == pytest.approx(price.seconds, rel=1e-12)
        assert line.joules + line.joules_per_key * 3 * step == pytest.approx(price.joules)


def test_a_table_keeps_its_levels_in_its_file(tmp_path: Path) -> None:
    path = leveled().save(tmp_path / "levels.json")
    assert StepCostTable.load(path) == leveled()
    assert "levels" not in priced(0).to_json()
    path.write_text(path.read_text().replace('"offered": 4', '"offered": 5'))
    with pytest.raises(SerializationError, match="5 of 4 layers"):
        StepCostTable.load(path)


def test_tables_that_do_not_belong_together() -> None:
    with pytest.raises(InputError, match="validity"):
        table().with_levels(table(tokens=64), layers=2, offered=2)
    with pytest.raises(InputError, match="energy"):
        table().with_levels(table(watts=3.0), layers=2, offered=2)
    with pytest.raises(InputError, match="no level 5"):
        leveled().at_level(5)
    with pytest.raises(InputError, match="no level 1"):
        table().at_level(1)
    with pytest.raises(InputError, match="no levels"):
        LevelPricer(table())


# -- the policy on a client


def small(**changes: Any) -> StepCostTable:
    """Four layers; level 0 pays 8 microseconds per key, level 4 half a millisecond per decode."""
    decode: dict[str, Any] = {"per": "decode", "axes": {"batch": (1, 64), "context": (1, 53, 8192)}}
    steps = Part(name="linear", per="step", axes={"tokens": (1, 4096)}, seconds=(1e-2, 0.11))
    grid = [(n, keys) for n in (1, 64) for keys in (1, 53, 8192)]
    softmax = Part(name="attention", **decode, seconds=tuple(8e-6 * n * keys for n, keys in grid))
    linear = Part(name="states", **decode, seconds=tuple(5e-4 * n for n, _ in grid))
    converted = table(
        parts=(steps, linear), memory=Memory(weights=1200, fixed_state=50, capacity=100_000)
    )
    memory = Memory(weights=1000, growing=(Growing(bytes_per_token=10),), capacity=100_000)
    low = table(parts=(steps, softmax), memory=memory, **changes)
    return low.with_levels(converted, layers=LAYERS, offered=LAYERS)


RULES = Rules(
    high=0.7, low=0.5, calm=0.4, calm_seconds=0.7, longest_wait=1.5,
    ceilings=((0, 0.25), (100, 0.5), (250, 1.0)), hard_ceiling=0.75, fold_seconds=2e-4,
)  # fmt: skip


def client(rules: Rules = RULES, *, stepwise: bool = False, **limits: Any) -> LlmClient:
    """A server with the policy."""
    costs = small()
    assert costs.levels is not None
    found = LevelRules(rules, costs.levels, LevelPricer(costs), fold_seconds=1e-6)
    return LlmClient(
        "llm", model="m", cost=costs.pricer(), limits=small_limits(**limits), stepwise=stepwise,
        levels=found,
    )  # fmt: skip


def small_limits(**changes: Any) -> Limits:
    """Memory for a few requests."""
    given: dict[str, Any] = {"blocks": 60, "max_batched_tokens": 512, "max_sequences": 12}
    return Limits(**(given | changes))


def served(
    seed: int, rules: Rules = RULES, *, branches: bool = False, rate: float = 6.0, **options: Any
) -> Coordinator:
    """Thirty random requests."""
    random = np.random.default_rng(seed)
    requests = draw_requests(random, 30, rate=rate, branches=branches)
    for one in requests:
        one.deadline = one.arrival + options.get("timeout", math.inf)
    options.pop("timeout", None)
    return run(requests, [client(rules, **options)])


def policy_of(coordinator: Coordinator) -> module.LevelPolicy:
    [only] = coordinator.clients
    assert isinstance(only, LlmClient)
    assert only.levels is not None
    return only.levels


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"blocks": 40}, {"rate": 1.5}, {"branches": True}, {"timeout": 1.0, "rate": 30.0}],
    ids=str,
)
def test_jumps_equal_steps(strategy: str, options: dict[str, Any]) -> None:
    conversions = jumped = 0
    for seed in range(4):
        fast = served(seed, strategy=strategy, **options)
        slow = served(seed, strategy=strategy, stepwise=True, **options)
        assert_same(fast, slow)
        np.testing.assert_allclose(all_gaps(fast), all_gaps(slow), rtol=1e-9, atol=1e-12)
        assert policy_of(fast).memory.level == policy_of(slow).memory.level
        assert policy_of(fast).conversions == policy_of(slow).conversions
        conversions += policy_of(fast).conversions
        jumped += len(slow.steps.table()["start"]) - len(fast.steps.table()["start"])
    assert conversions > 0
    assert jumped > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_of_converted_layers_are_free_at_once_and_none_is_lost(strategy: str) -> None:
    def check(coordinator: Coordinator) -> None:
        [only] = coordinator.clients
        assert isinstance(only, LlmClient)
        scheduler = only.scheduler
        pool, size = scheduler.pool, scheduler.limits.block_size
        assert 0 <= pool.used <= pool.capacity == LAYERS * scheduler.limits.blocks
        for one in scheduler.running:
            assert one.kv_layers == LAYERS - one.level
            most = RULES.ceilings[RULES.bucket(one.prompt)][1]
            assert one.level <= LAYERS * min(most, RULES.hard_ceiling)
            if not one.todo:
                tokens = one.prompt + scheduler.decodes.emitted_by(one) - 1
                held = scheduler.decodes.held_by(one)
                assert held == blocks_for(tokens, size) * (LAYERS - one.level)

    for stepwise in (False, True):
        requests = draw_requests(np.random.default_rng(1), 30, rate=6.0)
        found = run(requests, [client(strategy=strategy, stepwise=stepwise)], observer=check)
        assert found.ended["completed"] == 30
        assert policy_of(found).conversions > 0
        [only] = found.clients
        assert isinstance(only, LlmClient)
        assert only.scheduler.pool.used == 0
        assert max(by_request(found)["level"]) > 0


def test_a_policy_that_never_acts_changes_nothing() -> None:
    never = RULES.model_copy(update={"hard_ceiling": 0.0})
    for seed in range(3):
        with_it = served(seed, never, blocks=40)
        costs = small()
        plain = LlmClient("llm", model="m", cost=costs.pricer(), limits=small_limits(blocks=40))
        without = run(draw_requests(np.random.default_rng(seed), 30, rate=6.0), [plain])
        assert policy_of(with_it).conversions == 0
        assert_same(with_it, without)
        assert by_request(with_it)["preemptions"].sum() > 0


def test_converting_prevents_preemptions() -> None:
    never = RULES.model_copy(update={"hard_ceiling": 0.0})
    preempted = [
        sum(by_request(served(seed, rules, blocks=40))["preemptions"].sum() for seed in range(4))
        for rules in (never, RULES)
    ]
    assert preempted[1] < preempted[0]


def test_decisions_are_those_of_the_server_and_so_is_the_pressure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the policy sees here is what it sees of an engine with the same requests."""
    seen: list[float] = []
    snapshot = module.LevelPolicy.snapshot

    def compared(self: module.LevelPolicy) -> Any:
        found = snapshot(self)
        view = view_of(self._scheduler)  # pyright: ignore[reportPrivateUsage]
        assert found.pressure == pytest.approx(pressure(view))
        seen.append(found.pressure)
        return found

    monkeypatch.setattr(module.LevelPolicy, "snapshot", compared)
    assert module.decide is decide
    served(0, strategy="alternating", stepwise=True)
    assert len(set(seen)) > 20


def view_of(scheduler: Scheduler) -> EngineView:
    """An engine's view of the same requests, with a group of blocks of 100 bytes per layer."""
    size = scheduler.limits.block_size
    views: dict[bool, list[RequestView]] = {False: [], True: []}
    for one in scheduler.running:
        held = one.held if one.todo else scheduler.decodes.held_by(one)
        most = blocks_for(one.prompt + one.output, size) * (LAYERS - one.level)
        views[one.todo > 0].append(
            RequestView(f"request-{one.index}", 0, {}, 0.0, one.prompt, 100 * held,
                        100 * max(most - held, 0))
        )  # fmt: skip
    pool = scheduler.pool
    return EngineView(
        running=views[False], prefilling=views[True], queued=scheduler.queue.size,
        blocks_free=[pool.free], blocks_total=[pool.capacity], options={}, block_bytes=[100],
    )  # fmt: skip


def test_one_conversion_by_hand() -> None:
    """Two requests fill more than 0.7 of 20 blocks; the longer one gives up a layer per step."""
    rules = RULES.model_copy(update={"low": 0.7, "high": 0.7, "ceilings": ((0, 0.5),)})
    requests = [request(0, 0.0, 160, 12), request(1, 0.0, 64, 12)]
    found = run(requests, [client(rules, strategy="mixed", blocks=20, stepwise=True)])
    steps = found.steps.table()
    costs, mixed = small(), LevelPricer(small()).mixed
    # 11 and 5 blocks are promised in 4 layers: 64 of 80. One layer of the first request frees 11
    # of them, which is below 0.7 of 80.
    assert (64 / 80, 53 / 80) == (0.8, 0.6625)
    wanted = [
        costs.price([(160, 0), (64, 0)]).seconds,
        mixed((), 1, 161).price((), 2, 161 + 65).seconds + 160 * 1e-6,
        mixed((), 1, 162).price((), 2, 162 + 66).seconds,
    ]
    assert (steps["end"] - steps["start"])[:3].tolist() == pytest.approx(wanted, rel=1e-12)
    # Blocks at the start of each step; those of the next token are taken in it.
    assert steps["blocks"][:3].tolist() == [(10 + 4) * 4, 10 * 3 + 4 * 4, 11 * 3 + 5 * 4]
    assert by_request(found)["level"].tolist() == [1, 0]
    # The next one starts at the level that was reached.
    assert policy_of(found).memory.level == 1


# -- in a system file


def system(folder: Path, policy: Any, **changes: Any) -> Path:
    small().save(folder / "levels.json")
    table().save(folder / "plain.json")
    content = {
        "clients": [{"name": "gpu", "cost": "levels.json", "blocks": 60, "max_sequences": 12,
                     "max_batched_tokens": 512, "policy": policy, **changes}],
        "workloads": [{"requests": 40, "arrivals": {"rate": 8.0}, "output": 40,
                       "prompt": {"kind": "uniform", "low": 20, "high": 400}}],
    }  # fmt: skip
    file = folder / "system.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


GOOD = {"kind": "dsla", "high": 0.7, "low": 0.5, "calm": 0.4,
        "ceilings": [[0, 0.25], [200, 0.75]]}  # fmt: skip


def test_a_system_file_with_a_policy(tmp_path: Path) -> None:
    result = System.read(system(tmp_path, GOOD)).simulate()
    [gpu] = result.summary["clients"]
    assert gpu["conversions"] > 0
    assert gpu["blocks"] == 60 * LAYERS
    assert result.requests["level"].max() > 0
    plain = System.read(system(tmp_path, None)).simulate()
    assert "conversions" not in plain.summary["clients"][0]


def test_states_are_set_aside_in_memory(tmp_path: Path) -> None:
    def blocks(policy: Any) -> int:
        file = system(tmp_path, policy, blocks=None, memory_share=1.0)
        [gpu] = System.read(file).build_clients()
        assert isinstance(gpu, LlmClient)
        return gpu.limits.blocks

    assert blocks(None) == (100_000 - 1000) // 160
    assert blocks(GOOD) == (100_000 - 1200 - 12 * 50) // 160


@pytest.mark.parametrize(
    ("policy", "changes", "words"),
    [
        ({"kind": "dsla", "hihg": 0.9}, {}, ["clients.0", "policy", "hihg"]),
        ({"kind": "spin"}, {}, ["clients.0", "policy", "kind"]),
        ({"high": 1}, {"cost": "plain.json"}, ["'gpu'", "policy", "no levels"]),
        ({"high": 1}, {"cost": {"base": 0.01}}, ["'gpu'", "policy", "no levels"]),
        ({"low": 0.95}, {}, ["clients.0.policy", "calm <= low <= high"]),
        ({"ceilings": [[5, 0.1]]}, {}, ["clients.0.policy", "ceilings"]),
        ({"fold_seconds_per_token": -1.0}, {}, ["policy", "fold_seconds_per_token"]),
        (GOOD, {"role": "prefill"}, ["clients.0", "policy", "role"]),
        (GOOD, {"prefix_cache": True}, ["clients.0", "policy", "prefix_cache"]),
        (GOOD, {"preemption": "swap"}, ["clients.0", "policy", "preemption"]),
    ],
)
def test_wrong_policies(
    tmp_path: Path, policy: Any, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        System.read(system(tmp_path, policy, **changes))
    assert "system.yaml, line" in caught.value.problem
    for word in words:
        assert word in caught.value.problem


def test_a_pipeline_with_live_layers_has_levels(tmp_path: Path) -> None:
    model = model_folder.write(tmp_path / "tiny", model_folder.llama())
    cost = {
        "pipeline": {"model": str(model), "passes": [{"dsla": {"fraction": 1.0, "live": True}}]},
        "kind": "pipeline", "device": "h100-sxm", "dtype": "bfloat16",
    }  # fmt: skip
    file = system(tmp_path, GOOD, cost=cost)
    [gpu] = System.read(file).simulate().summary["clients"]
    assert gpu["blocks"] == 60 * model_folder.LAYERS
