"""``dsla``: layers become linear attention and softmax again (specification §16, 18 to 24)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxgraft import interpreter
from fxgraft.errors import InputError
from fxgraft.frontends.capture import capture
from fxgraft.kernels.linear_attention.arguments import log_decay
from fxgraft.passes.dsla import Dsla, Form
from fxgraft.passes.dsla.fold import LayerFold, choices_of, fold
from fxgraft.passes.dsla.form import half_life_of
from fxgraft.passes.dsla.levels import at_level, costs, state_bytes
from fxgraft.passes.dsla.sites import find_sites
from fxgraft.passes.optimize import Optimize
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.transform import apply
from tests import models
from tests.core.test_state import inputs_of, run_steps

LINEAR = torch.ops.fxgraft.linear_attention.default
SOFTMAX = torch.ops.fxgraft.attention.default


def counts(program: Program) -> tuple[int, int]:
    """Softmax and linear attentions of a Program."""
    found = [node.target for node in program.graph.nodes]
    return found.count(SOFTMAX), found.count(LINEAR)


@pytest.fixture(scope="module")
def llama() -> Program:
    return capture(models.llama())


@pytest.mark.parametrize("count", [0, 1, 3])
def test_exactly_so_many_layers_change(llama: Program, count: int) -> None:
    after = apply(llama, Dsla(count=count, form=Form())) if count else apply(llama, Dsla(layers=()))
    assert counts(after) == (3 - count, count)
    if count == 0:
        assert not after.diff(llama)
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(after(ids)[0], llama(ids)[0])


def test_fractions_are_rounded_down_and_the_last_layers_come_first(llama: Program) -> None:
    after = apply(llama, Dsla(fraction=0.67))
    linear = [layer.index for layer in after.layers if "linear" in layer.kind]
    assert linear == [1, 2]
    assert counts(apply(llama, Dsla(fraction=0.5, order=(0, 1, 2)))) == (2, 1)


def test_weights_of_the_teacher_are_shared_and_rotation_goes_with_its_last_user(
    llama: Program,
) -> None:
    after = apply(llama, Dsla(count=3))
    old = dict(llama.weights())
    kept = {name: value for name, value in after.weights() if ".dsla." not in name}
    assert all(value is old[name] for name, value in kept.items())
    gone = set(old) - set(kept)
    assert gone == {"model.rotary_emb.inv_freq"}
    assert "model.rotary_emb.inv_freq" in dict(apply(llama, Dsla(count=2)).weights())


def test_a_layer_equals_the_op_over_the_layers_own_queries_keys_and_values() -> None:
    model = models.llama(num_hidden_layers=1, num_attention_heads=4)
    program = capture(model)
    form = Form(write_scale="none", out_norm="none")
    after = apply(program, Dsla(layers=(0,), form=form))
    ids = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(0))
    block: Any = model.get_submodule("model.layers.0")
    seen: dict[str, Tensor] = {}
    hook = block.self_attn.register_forward_hook(
        lambda _, args, kwargs, out: seen.update(x=kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, use_cache=False)
        hook.remove()
        x, attention = seen["x"], block.self_attn
        q, k, v = (
            p(x).view(2, 11, -1, 16) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = {n.rpartition(".")[2]: w for n, w in after.weights() if ".dsla." in n}
        z = torch.einsum("bshd,hdnc->bshnc", k, weights["gate_weight"].view(2, 16, 2, 16))
        decay = log_decay(z + weights["gate_bias"], 16.0, -1.0).exp()
        k, v = (t.repeat_interleave(2, 2) for t in (k, v))
        decay = decay.repeat_interleave(2, 2)
        state, rows = torch.zeros(2, 4, 2, 16, 16), list[Tensor]()
        for t in range(11):
            state = decay[:, t, ..., None] * state + (
                k[:, t, :, None, :, None] * v[:, t, :, None, None]
            )
            rows.append(torch.einsum("bhd,bhndv->bhv", q[:, t], state) * 0.5 * 16**-0.5)
        wanted = attention.o_proj(torch.stack(rows, 1).flatten(2))
        layer = after.layers[0]
        node = layer.projections["output"]
        kept: dict[str, Any] = {}
        interpreter.run(
            after,
            dict(zip([s.name for s in after.inputs], after.bind(ids), strict=True)),
            kept=kept,
        )
    torch.testing.assert_close(kept[node.name], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("build", "form"),
    [
        (models.llama, {}),
        (models.llama, {"rope": "keep", "state_heads": "query"}),
        (models.llama, {"gate": "full", "states": 1}),
        (models.qwen2, {"gate": "lowrank", "rank": 4, "write_scale": "none"}),
        (models.phi, {"out_norm": "none"}),
        (models.gpt2, {"adapt": "heads"}),
        (models.gpt_neox, {"rope": "keep", "states": 4}),
        (lambda: models.mistral(sliding_window=None), {}),
    ],
)
def test_steps_equal_whole_sequences(build: Callable[[], nn.Module], form: dict[str, Any]) -> None:
    program = apply(capture(build()), Dsla(count=1, form=Form(**form)))
    values = inputs_of(program, batch=2)
    whole = program(**values)[0]
    step = insert_state(program)
    fixed = [state for state in step.states if state.grows is None]
    assert [s.name.rpartition(".")[2] for s in fixed] == ["memory"]
    assert all(isinstance(size, int) for state in fixed for size in state.shape[1:])
    cuts = [5, 6, 7, 19]
    for end, logits in zip(cuts, run_steps(step, values, cuts), strict=True):
        seen = values["attention_mask"][:, end - 1].bool()
        torch.testing.assert_close(logits[seen], whole[seen, end - 1], atol=2e-4, rtol=1e-3)


def test_live_layers_are_the_old_model_until_a_row_chooses(llama: Program) -> None:
    live = apply(llama, Dsla(count=2, live=True))
    ids = torch.tensor([[5, 6, 7, 9], [8, 9, 10, 3]])
    assert torch.equal(live(ids)[0], llama(ids)[0])
    static = apply(llama, Dsla(count=1))
    chosen = live(ids, dsla_layer_2=torch.tensor([1, 0]))[0]
    torch.testing.assert_close(chosen[0], static(ids)[0][0])
    assert torch.equal(chosen[1], llama(ids)[0][1])


@pytest.mark.parametrize("optimized", [False, True])
def test_levels_go_back_to_the_old_model_bit_for_bit(llama: Program, optimized: bool) -> None:
    base = apply(llama, Optimize()) if optimized else llama
    live = apply(base, Dsla(count=3, live=True))
    back = at_level(live, 0)
    assert not back.diff(base)
    old = dict(base.weights())
    assert dict(back.weights()).keys() == old.keys()
    assert all(weight is old[name] for name, weight in back.weights())
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(back(ids)[0], base(ids)[0])
    assert not at_level(live, 2).diff(apply(base, Dsla(count=2)))
    with pytest.raises(InputError, match="0 to 3"):
        at_level(live, 4)


def test_costs_per_level(llama: Program) -> None:
    live = apply(llama, Dsla(count=3, live=True))
    tables = costs(live)
    work = {
        level: table.evaluate(batch=1, sequence=100_000).flops for level, table in tables.items()
    }
    assert work[0] > work[1] > work[2] > work[3]
    # 2 states of 16 x 16 for each of 2 key/value heads, in float32.
    assert [state_bytes(at_level(live, level)) for level in range(4)] == [
        level * 2 * 2 * 16 * 16 * 4 for level in range(4)
    ]


def test_saves_loads_and_exports(llama: Program, tmp_path: Path) -> None:
    after = apply(llama, Dsla(count=2))
    after.save(tmp_path / "saved")
    again = Program.load(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(after(ids)[0], again(ids)[0])
    assert again.history[-1].config["count"] == 2


def test_initial_half_lives_are_those_of_the_form(llama: Program) -> None:
    form = Form()
    decay = log_decay(form.initial_bias(64), form.temperature, form.floor)
    found = half_life_of(decay)
    for row, (low, high) in zip(found, form.ranges, strict=True):
        wanted = torch.logspace(math.log10(low), math.log10(high), 64)
        torch.testing.assert_close(row, wanted, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (models.mistral, "sliding window"),
        (models.mamba, "selective_scan"),
    ],
)
def test_models_that_cannot_be_converted(build: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(InputError, match=text):
        apply(capture(build()), Dsla(count=1))


def test_every_reason_is_given() -> None:
    _, reasons = find_sites(capture(models.gpt_oss()))
    assert reasons[1] == "it has attention sinks"
    _, reasons = find_sites(capture(models.gemma2()))
    assert reasons[1] == "it caps its scores"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "none of layers, count, fraction and artifact"),
        ({"layers": (1,), "count": 1}, "has layers and count"),
        ({"layers": (7,)}, "layer 7 cannot be converted: there is no such layer"),
        ({"layers": (1, 1)}, "names a layer twice"),
        ({"count": 4}, "asks for 4 layers"),
        ({"count": 1, "form": {"gaet": "key"}}, "did you mean 'gate'"),
        ({"count": 1, "form": {"half_lives": [[1, 2]]}}, "for 2 states"),
        ({"artifact": Path("nowhere"), "form": {}}, "leave the form out"),
        ({"artifact": Path("nowhere")}, "fxgraft calibrate dsla"),
    ],
)
def test_wrong_settings(llama: Program, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        apply(llama, Dsla.from_config(settings))


@pytest.mark.parametrize("build", [models.llama, models.phi, models.gpt_neox])
@pytest.mark.parametrize("form", [Form(), Form(rope="keep", state_heads="query")])
def test_folding_a_cache_equals_linear_attention_over_the_whole_prompt(
    build: Callable[[], nn.Module], form: Form
) -> None:
    program = apply(capture(build()), Dsla(count=1, live=True, form=form))
    check_fold(program)
    check_fold(apply(program, Optimize()))


def check_fold(program: Program) -> None:
    """The states that folding gives are those that the step graph computes."""
    [choice] = choices_of(program)
    ids = torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(1))
    step = insert_state(program)
    linear = [state for state in step.states if state.name.endswith("memory")]
    softmax = {s.name: n for n, s in enumerate(step.states)}
    number = int(linear[0].name.split(".")[0])
    values = {spec.name: None for spec in step.own_inputs}
    given = dict(zip([s.name for s in program.inputs], program.bind(ids), strict=True))
    inputs = [given[name] for name in values] + step.empty_state(1)
    with torch.no_grad():
        outputs = step.program.graph_module(*inputs)[1:]
    key, value = (outputs[softmax[f"{number + 1}.{name}"]] for name in ("key", "value"))
    wanted = outputs[softmax[linear[0].name]]
    found = LayerFold(program, choice, 64)(key, value)
    error = (found - wanted).square().sum().sqrt() / wanted.square().sum().sqrt()
    assert float(error) < 1e-5
    # bfloat16 caches are as good as their rounding.
    rounded = LayerFold(program, choice, 64)(key.bfloat16().float(), value.bfloat16().float())
    error = (rounded - wanted).square().sum().sqrt() / wanted.square().sum().sqrt()
    assert float(error) < 2e-2


@pytest.mark.parametrize("write_scale", ["none", "sqrt"])
def test_fold_in_pieces_stops_where_everything_is_forgotten(write_scale: str) -> None:
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(1, 5000, 2, 8, generator=generator) for _ in range(2))
    gate = torch.randn(1, 5000, 2, 2, 8, generator=generator)
    options: dict[str, Any] = {"temperature": 16.0, "floor": -1.0, "write_scale": write_scale}
    found = fold(key, value, gate, **options)
    query, mixing = torch.zeros(1, 5000, 2, 8), torch.tensor([0.5, 0.5])
    _, wanted = LINEAR(query, key, value, gate, mixing, scale=1.0, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    # Tokens that lie further back than the last piece do not matter at these gates.
    key[:, :2000] = torch.nan
    torch.testing.assert_close(fold(key, value, gate, **options), found)


def test_long_positions_are_rotated_back(llama: Program) -> None:
    program = apply(llama, Dsla(count=1, live=True))
    [choice] = choices_of(program)
    fold_layer = LayerFold(program, choice, 128)
    angles = torch.outer(
        torch.arange(32_768, dtype=torch.float32), llama.weight("model.rotary_emb.inv_freq")
    )
    wide = torch.cat([angles, angles], 1)
    rotation = fold_layer.rotation
    torch.testing.assert_close(rotation.cosine, wide[:128].cos(), atol=1e-5, rtol=0)
    sign = torch.cat([-torch.ones(8), torch.ones(8)])
    torch.testing.assert_close(rotation.sine, wide[:128].sin() * sign, atol=1e-5, rtol=0)


@pytest.mark.parametrize("gate", ["lowrank", "full"])
def test_gates_that_read_the_input_cannot_be_folded(llama: Program, gate: Any) -> None:
    program = apply(llama, Dsla(count=1, live=True, form=Form(gate=gate, rank=4)))
    [choice] = choices_of(program)
    assert not LayerFold(program, choice, 64).exact
