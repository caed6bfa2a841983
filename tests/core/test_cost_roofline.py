"""Devices and roofline tables: physical bounds, hand calculations, and what is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fxgraft.cost_table import StepCostTable
from fxgraft.devices import Device, device, devices
from fxgraft.element_types import ElementTypes
from fxgraft.errors import InputError, LoweringError
from fxgraft.frontends.capture import capture
from fxgraft.passes.shard import Shard
from fxgraft.program import Program
from fxgraft.roofline import Efficiency, Roofline, roofline_table
from fxgraft.step_costs import KINDS, StepGraph
from fxgraft.step_tables import Ranges
from fxgraft.transform import apply
from tests import models

SMALL = Ranges(tokens=256, sequences=16, new_tokens=256, context=512)
SIMPLE: dict[str, Any] = {
    "name": "simple", "operations": {"float32": 1e9, "bfloat16": 4e9}, "vector": 1e8,
    "memory": 1e6, "bandwidth": 1e8, "watts": 10,
}  # fmt: skip
FULL = Efficiency(1.0, 1.0, 1.0)
ALIKE = dict.fromkeys(KINDS, Efficiency())


@cache
def llama() -> Program:
    return capture(models.llama(num_hidden_layers=1))


def table(on: Any = "h100-sxm", types: str = "bfloat16", **options: Any) -> StepCostTable:
    return roofline_table(llama(), on, types, ranges=SMALL, **options)


def test_devices_have_sources() -> None:
    assert {"h100-sxm", "h200-sxm", "a100-sxm-80gb", "xeon-8480"} <= set(devices())
    assert any("jetson" in name for name in devices())
    for name, found in devices().items():
        assert found.name == name
        assert found.sources.keys() >= {"operations", "memory"}
        assert found.peak("float32") <= found.peak("int8")
        assert all(rate > found.vector / 100 for rate in found.operations.values())
    assert device("h200-sxm").bandwidth > device("h100-sxm").bandwidth
    assert device("h200-sxm").operations == device("h100-sxm").operations


def test_a_device_is_a_name_a_mapping_or_itself() -> None:
    made = device(SIMPLE)
    assert device(made) is made
    assert made.launch == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bandwidth": 0}, "bandwidth"),
        ({"bandwidth": -1e9}, "bandwidth"),
        ({"memory": float("nan")}, "memory"),
        ({"vector": float("inf")}, "vector"),
        ({"watts": "much"}, "watts"),
        ({"launch": -1e-6}, "launch"),
        ({"operations": {}}, "no data type"),
        ({"operations": {"float32": -1.0}}, "operations.float32"),
        ({"operations": {"float12": 1.0}}, "float12"),
        ({"link": {"bandwidth": 0, "latency": 0}}, "link.bandwidth"),
        ({"bandwith": 1.0}, "did you mean 'bandwidth'"),
        ({"vector": None}, "vector"),
    ],
)
def test_impossible_devices_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        device({**SIMPLE, **changes})


def test_an_unknown_device_suggests_one() -> None:
    with pytest.raises(InputError, match="no device 'h100-sx'; did you mean 'h100-sxm'"):
        table("h100-sx")


@pytest.mark.parametrize("values", [{"compute": 0.0}, {"memory": 1.5}, {"links": float("nan")}])
def test_impossible_efficiencies(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        Efficiency(**values)


def test_other_bad_input() -> None:
    with pytest.raises(InputError, match="no peak rate for float8"):
        table("a100-sxm-80gb", "float8")
    with pytest.raises(InputError, match="data type of weights is 'fp16'"):
        table(types="fp16")
    with pytest.raises(InputError, match="no kind of node 'matmul'"):
        table(efficiency={"matmul": FULL})

    class Picture(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    with pytest.raises(InputError, match="takes no tokens"):
        roofline_table(capture(Picture(), (torch.randn(2, 3),)), "h100-sxm", "float32")

    class Inverse(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.inverse(x)

    with pytest.raises(LoweringError, match=r"aten\.inverse"):
        roofline_table(capture(Inverse(), (torch.eye(3).repeat(2, 1, 1),)), "h100-sxm", "float32")


@pytest.mark.parametrize("step", [(1, 1, 0), (1, 200, 0), (1, 100, 300), (16, 1, 400)])
def test_no_step_is_faster_than_the_hardware(step: tuple[int, int, int]) -> None:
    made = Device(**SIMPLE)
    work = StepGraph(llama()).work(*step)
    seconds = table(SIMPLE, "float32", efficiency=FULL).lookup(
        "decode" if step[0] > 1 else "prefill",
        batch=step[0], new_tokens=step[1], context=step[2] + (step[0] > 1),
    ).seconds  # fmt: skip
    matrix = [p for p, n in enumerate(work.nodes) if n.kind in ("linear", "attention")]
    assert seconds >= work.flops[matrix].sum() / made.peak("float32")
    assert seconds >= work.bytes[matrix].sum() / made.bandwidth
    bounds = np.maximum(
        work.flops[matrix] / made.peak("float32"), work.bytes[matrix] / made.bandwidth
    )
    others = [p for p in range(len(work.nodes)) if p not in matrix]
    gathered = sum(work.bytes[p, 0] for p in others if "embedding" in work.nodes[p].row.op)
    rest = work.flops[others].sum() / made.vector + gathered / made.bandwidth
    assert seconds == pytest.approx(bounds.sum() + rest, rel=2e-3)


def test_faster_hardware_is_never_slower() -> None:
    def seconds(types: str = "float32", **changes: Any) -> Any:
        parsed = ElementTypes.parse(types)
        work = StepGraph(llama(), parsed).work([1, 1, 4, 16], [1, 256, 9, 1], [0, 0, 500, 400])
        return Roofline(device({**SIMPLE, **changes}), parsed, ALIKE, 1).price(work)[0]

    base = seconds()
    changed: list[dict[str, Any]] = [
        {"bandwidth": 2e8}, {"operations": {"float32": 3e9}}, {"vector": 1e9}
    ]  # fmt: skip
    for changes in changed:
        better = seconds(**changes)
        assert (better <= base).all()
        assert (better.sum(0) < base.sum(0)).any()
    assert (seconds("bfloat16").sum(0) < base.sum(0)).all()


def test_a_decode_of_a_large_model_takes_the_time_to_read_its_weights() -> None:
    with torch.device("meta"):
        model = models.llama(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, vocab_size=32000,
            num_attention_heads=16, num_key_value_heads=4,
        )  # fmt: skip
    program = capture(model)
    made = device("h100-sxm").model_copy(update={"launch": 0.0, "step": 0.0})
    priced = roofline_table(program, made, "bfloat16", efficiency=FULL, ranges=SMALL)
    embedding = 32000 * 2048 * 2
    floor = (priced.memory.weights - embedding) / made.bandwidth
    assert floor < priced.price((), 1, 100).seconds < 1.05 * floor
    assert priced.memory.weights == program.count_parameters() * 2
    assert priced.memory.capacity == 80_000_000_000


def test_energy_lies_between_the_idle_and_the_full_power() -> None:
    found = table()
    assert found.energy.idle_watts == pytest.approx(0.3 * 700)
    for step in ([(200, 0)], 0, 0), ([], 8, 2000), ([(30, 100)], 3, 90):
        price = found.price(*step)
        assert price.joules is not None
        assert 0.29 * 700 < (price.joules + 210 * 50e-6) / price.seconds < 0.9 * 700 + 1


def test_products_without_weights_run_at_the_matrix_rate() -> None:
    class Scores(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ x.transpose(1, 2)).cumsum(-1)

    dynamic = {"x": {0: "batch", 1: "sequence"}}
    program = capture(Scores(), (torch.randn(2, 5, 64),), dynamic=dynamic)
    parsed = ElementTypes.parse("float32")
    work = StepGraph(program, parsed).work(1, 1000, 0)
    made = device({**SIMPLE, "bandwidth": 1e15})
    seconds = Roofline(made, parsed, dict.fromkeys(KINDS, FULL), 1).price(work)[0][:, 0]
    assert seconds.tolist() == pytest.approx([2 * 1000**2 * 64 / 1e9, 1000**2 / 1e8])
    # Sums are fused, so they move nothing; the product moves its operand twice and its result.
    slow = Roofline(device({**SIMPLE, "bandwidth": 1.0}), parsed, dict.fromkeys(KINDS, FULL), 1)
    moved = slow.price(work)[0][:, 0]
    assert moved.tolist() == pytest.approx([4 * (2 * 64000 + 1000**2), 1000**2 / 1e8])


def test_launches_and_steps_add_their_time() -> None:
    none = table(SIMPLE, "float32")
    some = table({**SIMPLE, "launch": 1e-3, "step": 0.5}, "float32")
    graph = StepGraph(llama())
    kernels = sum(n.kind in ("linear", "attention") for n in graph.nodes)
    kernels += sum(n.row.op == "aten.embedding" for n in graph.nodes)
    extra = some.price((), 1, 9).seconds - none.price((), 1, 9).seconds
    assert extra == pytest.approx(0.5 + kernels * 1e-3, rel=1e-6)
    assert some.origin.launch_seconds == 0.5


def test_efficiency_by_kind() -> None:
    base = table(SIMPLE, "float32", efficiency=FULL)
    halved = table(
        SIMPLE, "float32",
        efficiency={"linear": Efficiency(0.5, 0.5), "attention": FULL, "other": FULL},
    )  # fmt: skip
    for slow, fast in zip(halved.parts, base.parts, strict=True):
        factor = 2 if slow.name.startswith("linear") else 1
        assert slow.name == fast.name
        pairs = zip(slow.seconds, fast.seconds, strict=False)
        if slow.axes == fast.axes:
            assert all(a == pytest.approx(factor * b) for a, b in pairs)


def test_collectives_follow_the_formulas() -> None:
    link = {"bandwidth": 1e6, "latency": 1e-4}
    share = apply(llama(), Shard(size=2, rank=0), check=False)
    shared = roofline_table(share, {**SIMPLE, "link": link}, "float32", efficiency=FULL,
                            ranges=SMALL)  # fmt: skip
    assert shared.identity.tensor_parallel == 2
    found = next(part for part in shared.parts if part.name.startswith("collective"))
    # Two sums in the layer; of 64 float32 per token.
    tokens = np.asarray(found.axes["tokens"], np.float64)
    one = 5e-6 + 2 * 1e-4 + 2 * 1 / 2 * (tokens * 64 * 4) / 1e6
    assert found.seconds == pytest.approx((2 * one).tolist(), rel=1e-12)
    with pytest.raises(InputError, match="has no link"):
        roofline_table(share, SIMPLE, "float32", ranges=SMALL)
    whole = roofline_table(llama(), {**SIMPLE, "link": link}, "float32", ranges=SMALL)
    assert not any("collective" in part.name for part in whole.parts)


def test_the_table_is_what_the_formulas_say() -> None:
    found = table(SIMPLE, "float32")
    error = found.origin.held_out
    assert error is not None
    assert (found.origin.method, error.steps) == ("roofline", 512)
    assert error.maximum < 5e-3
    graph = StepGraph(llama())
    price = Roofline(device(SIMPLE), ElementTypes.parse("float32"), ALIKE, 1).price
    direct = price(graph.work(3, 1, 99))[0].sum()
    assert found.price((), 3, 300).seconds == pytest.approx(direct, rel=2e-3)
    mixed = found.price([(7, 0), (5, 20)], 3, 300).seconds
    alone = [found.price([(7, 0)]), found.price([(5, 20)]), found.price((), 3, 300)]
    # Weights are read once, not three times.
    assert mixed < sum(price.seconds for price in alone)


@pytest.mark.parametrize("build", [models.mistral, models.jamba, models.mamba, models.gpt2])
def test_other_models(build: Any) -> None:
    found = roofline_table(capture(build()), "jetson-agx-orin-64gb", "float16", ranges=SMALL)
    assert found.price([(100, 0)], 3, 60).seconds > found.price((), 3, 60).seconds > 0
    growing = {state.limit for state in found.memory.growing}
    assert growing == {
        "mistral": {6}, "jamba": {None}, "mamba": set(), "gpt2": {None}
    }[build.__name__]  # fmt: skip
    longer = found.price((), 3, 1500).seconds
    assert longer >= found.price((), 3, 60).seconds
