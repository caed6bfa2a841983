"""Passes: definition, configuration, contracts, and every promise that ``apply`` holds them to."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from pydantic import ValidationError

from fxgraft import check, facts
from fxgraft import graph as graphs
from fxgraft.errors import (
    ContractError,
    Error,
    GraphError,
    InputError,
    NothingMatchedError,
    NumericError,
    PassError,
)
from fxgraft.program import Program
from fxgraft.transform import Effect, Pass, apply, snake_case
from tests.core.small_passes import HalvePrecision, Shift, SwapAddends, aten, calls, tiny_program


@pytest.fixture(scope="module")
def captured() -> Program:
    return tiny_program()


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.copy()


def exact(rewrite: Callable[[Program], list[str] | None], **rules: object) -> Pass:
    """An exact pass ``faulty`` made of one function."""

    class Faulty(Pass):
        effect: ClassVar = Effect.EXACT

        def run(self, program: Program) -> list[str] | None:
            return rewrite(program)

    for name, value in rules.items():
        setattr(Faulty, name, value)
    return Faulty()


def snapshot(program: Program) -> tuple[str, dict[str, bytes], int]:
    weights = {name: w.detach().numpy().tobytes() for name, w in program.weights()}
    return program.graph_module.code, weights, len(program.history)


# Definition and configuration


@pytest.mark.parametrize(
    ("name", "expected"),
    [("PruneHeads", "prune_heads"), ("DSLA", "dsla"), ("HTTPPass2", "http_pass2")],
)
def test_names_are_snake_case(name: str, expected: str) -> None:
    assert snake_case(name) == expected


def test_a_pass_is_named_after_its_class() -> None:
    assert SwapAddends.name == "swap_addends"


def test_a_pass_without_effect_cannot_be_defined() -> None:
    with pytest.raises(PassError, match="NoEffect declares no effect"):

        class NoEffect(Pass):  # pyright: ignore[reportUnusedClass]
            def run(self, program: Program) -> None: ...


def test_an_approximate_pass_needs_a_tolerance() -> None:
    with pytest.raises(PassError, match="no field 'tolerance'"):

        class Vague(Pass):  # pyright: ignore[reportUnusedClass]
            effect: ClassVar = Effect.APPROXIMATE

            def run(self, program: Program) -> None: ...


def test_an_abstract_pass_needs_no_effect() -> None:
    class Family(Pass):
        def run(self, program: Program) -> None:
            self.part(program)

        @abstractmethod
        def part(self, program: Program) -> None: ...

    class Member(Family):
        effect: ClassVar = Effect.EXACT

        def part(self, program: Program) -> None: ...

    assert Member().name == "member"


def test_wrong_settings_name_the_pass_the_key_and_the_valid_keys() -> None:
    with pytest.raises(InputError) as caught:
        Shift(layer="x", coeficient=2)  # pyright: ignore[reportArgumentType,reportCallIssue]
    assert "key 'layer' of pass 'shift' is 'x'" in caught.value.problem
    assert "no key 'coeficient'; did you mean 'coefficient'?" in caught.value.problem
    assert "layer (int), coefficient (float), vector (Path | None)" in caught.value.remedy


def test_settings_are_finite() -> None:
    with pytest.raises(
        InputError, match="'coefficient' of pass 'shift' is nan: it should be a fin"
    ):
        Shift(coefficient=math.nan)


def test_a_pass_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Shift().coefficient = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_strict_settings_take_no_text_for_numbers_yet_text_for_paths(tmp_path: Path) -> None:
    assert Shift.from_config({"coefficient": "2"}) == Shift(coefficient=2.0)
    with pytest.raises(InputError, match="valid number"):
        Shift.from_config({"coefficient": "2"}, strict=True)
    made = Shift.from_config({"coefficient": 2, "vector": "v.pt"}, folder=tmp_path, strict=True)
    assert made == Shift(coefficient=2.0, vector=tmp_path / "v.pt")


def test_the_configuration_is_json_and_gives_the_pass_back() -> None:
    step = Shift(layer=1, vector=Path("v.pt"))
    assert Shift.from_config(json.loads(json.dumps(step.config())), strict=True) == step


# Applying


def test_an_exact_pass_is_recorded_and_the_original_stays(program: Program) -> None:
    before = snapshot(program)
    result = apply(program, SwapAddends())
    assert snapshot(program) == before
    (record,) = result.history
    assert (record.name, record.effect, record.config) == ("swap_addends", "exact", {})
    assert record.summary == ["2 additions"]
    assert record.error == 0
    assert "batch=2 sequence=13; batch=3 sequence=7" in record.check
    assert len(record.diff["nodes"]) == 2
    assert record.before.nodes == record.after.nodes == len(program.graph.nodes)
    assert record.before.parameters == program.count_parameters()
    assert record.before.flops == record.after.flops > 2 * 26 * record.before.parameters * 0.5
    assert record.seconds > 0
    assert record.check_seconds > 0
    json.dumps(record.diff)


def test_inserted_nodes_name_their_pass(program: Program) -> None:
    result = apply(program, Shift())
    made = [node.name for node in result.graph.nodes if node.meta.get("made_by") == "shift"]
    assert len(made) == 2
    assert result.history[0].error == 0
    assert "neutral setting compared" in result.history[0].check
    assert result.history[0].after.parameters == program.count_parameters() + 8


def test_the_neutral_setting_itself_is_applied(program: Program) -> None:
    result = apply(program, Shift(coefficient=0.0))
    values = program.example(seed=5)
    torch.testing.assert_close(result(**values), program(**values))


def test_a_wrong_rewrite_is_located(program: Program) -> None:
    def run(program: Program) -> None:
        node = calls(program, aten.relu.default)[1]
        swapped = graphs.insert(node, aten.sigmoid.default, node.args)
        node.replace_all_uses_with(swapped)

    before = snapshot(program)
    with pytest.raises(NumericError) as caught:
        apply(program, exact(run))
    assert snapshot(program) == before
    text = str(caught.value)
    assert "pass 'faulty' is exact, but output 'logits' has a relative error of" in text
    assert "the first node that differs is node 'linear_3' (aten.linear) in module 'down.1'" in text
    assert "it reads 'sigmoid_default', which the pass inserted or changed" in text


def test_a_changed_weight_is_located(program: Program) -> None:
    def run(program: Program) -> None:
        program.set_weight("up.0.weight", program.weight("up.0.weight").detach() * 1.001)

    with pytest.raises(NumericError, match=r"'linear' .*'up.0'.*reads 'up_0_weight'"):
        apply(program, exact(run))


def test_a_dropped_padding_mask_is_noticed(program: Program) -> None:
    def run(program: Program) -> None:
        (node,) = calls(program, aten.mul.Tensor)
        node.replace_all_uses_with(node.all_input_nodes[0])

    with pytest.raises(NumericError, match="with batch=3 sequence=7"):
        apply(program, exact(run))


def test_rounding_is_no_error_for_an_exact_pass(program: Program) -> None:
    def run(program: Program) -> None:
        node = calls(program, aten.relu.default)[0]
        up = graphs.insert(node, aten.mul.Tensor, (node, 3.0), after=True)
        down = graphs.insert(up, aten.div.Tensor, (up, 3.0), after=True)
        node.replace_all_uses_with(down)
        up.replace_input_with(down, node)

    assert 0 < (apply(program, exact(run)).history[0].error or 0) < 1e-6


def test_an_approximate_pass_reports_its_error_and_fails_above_its_tolerance(
    program: Program,
) -> None:
    error = apply(program, HalvePrecision()).history[0].error
    assert error is not None
    assert 1e-5 < error < 0.05
    with pytest.raises(NumericError, match=r"allowed: 1e-05") as caught:
        apply(program, HalvePrecision(tolerance=1e-5))
    assert "raise its `tolerance`" in caught.value.remedy


class LeakyShift(Shift):
    """Not the identity where it should be."""

    def neutral(self) -> LeakyShift:
        return LeakyShift(coefficient=0.01)


class Unchecked(Shift):
    """Has no neutral setting and does not say why."""

    def neutral(self) -> Shift | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


class Excused(Unchecked):
    """Has no neutral setting and says why."""

    no_neutral: ClassVar = "a shift by nothing has no file"


class Confused(Shift):
    """Gives another pass as its neutral setting."""

    def neutral(self) -> Shift:
        return Shift(coefficient=0.0)


def test_a_neutral_setting_that_changes_something_is_refused(program: Program) -> None:
    with pytest.raises(NumericError, match=r"neutral setting .*0\.01.* is the identity, but"):
        apply(program, LeakyShift())


def test_a_behaviour_pass_has_a_neutral_setting_or_says_why_not(program: Program) -> None:
    with pytest.raises(ContractError, match="no neutral setting"):
        apply(program, Unchecked())
    with pytest.raises(ContractError, match="neutral setting of pass 'confused' is a Shift"):
        apply(program, Confused())
    record = apply(program, Excused()).history[0]
    assert record.error is None
    assert "a shift by nothing has no file" in record.check


def test_nan_from_a_behaviour_pass_is_refused(program: Program) -> None:
    with pytest.raises(NumericError, match="output 'logits' holds NaN"):
        apply(program, Shift.model_construct(coefficient=math.nan))


def test_matching_nothing_is_an_error(program: Program) -> None:
    with pytest.raises(NothingMatchedError, match="changed nothing: it looked for convolutions"):
        apply(program, exact(lambda program: ["done"], looks_for="convolutions"))


def test_matching_nothing_may_be_allowed(program: Program) -> None:
    step = exact(lambda program: None, looks_for="convolutions", may_match_nothing=True)
    assert apply(program, step).history[0].summary == ["nothing changed: looked for convolutions"]


def test_the_check_can_be_left_out(program: Program) -> None:
    def run(program: Program) -> None:
        program.set_weight("head.bias", torch.zeros(11))

    record = apply(program, exact(run), check=False).history[0]
    assert (record.error, record.check) == (None, "skipped on request")


def test_programs_without_weight_values_are_not_checked(program: Program) -> None:
    for name, weight in list(program.weights()):
        program.set_weight(name, torch.nn.Parameter(weight.detach().to("meta")))
    record = apply(program, SwapAddends()).history[0]
    assert record.error is None
    assert "meta device" in record.check
    assert record.after.flops > 0


# Faulty passes


def test_a_weight_changed_in_place_is_noticed(program: Program) -> None:
    def run(program: Program) -> None:
        with torch.no_grad():
            program.weight("head.bias").add_(0.0)

    with pytest.raises(PassError, match=r"'faulty' changed the weight 'head\.bias' in place"):
        apply(program, exact(run))


def _insert_bare(program: Program) -> None:
    node = calls(program, aten.relu.default)[0]
    with program.graph.inserting_after(node):
        bare = program.graph.call_function(aten.relu.default, (node,))
    node.replace_all_uses_with(bare)
    bare.args = (node,)


def _lie_about_a_shape(program: Program) -> None:
    node = calls(program, aten.relu.default)[0]
    node.meta["val"] = node.meta["val"].new_empty((3, 8))


def _call_a_module(program: Program) -> None:
    node = calls(program, aten.relu.default)[0]
    program.graph_module.add_module("relu", torch.nn.ReLU())
    with program.graph.inserting_before(node):
        call = program.graph.call_module("relu", node.args)
    node.replace_all_uses_with(call)


def _forget_an_output(program: Program) -> None:
    program.outputs = ()


def _forget_an_input(program: Program) -> None:
    program.inputs = program.inputs[:1]


def _freeze(program: Program) -> None:
    placeholder = program.placeholders[0]
    placeholder.meta["val"] = placeholder.meta["val"].new_empty((2, 13))


def _wrong_shape(program: Program) -> None:
    node = calls(program, aten.linear.default)[0]
    graphs.insert(node, aten.mm.default, (node.args[0], node.args[1]))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (_insert_bare, r"node 'relu_default' has no shape"),
        (_lie_about_a_shape, r"node 'relu' .*gives float32 \[2, 13, 8\], its metadata says"),
        (_call_a_module, "is a call_module, which a Program may not hold"),
        (_forget_an_output, "the graph has 1 outputs, the Program names 0"),
        (_forget_an_input, "the graph has 2 inputs, the Program names 1"),
        (_freeze, "dimension 'batch' of input 'input_ids' was frozen to 2"),
        (_wrong_shape, "cannot take its inputs"),
    ],
)
def test_broken_graphs_are_refused(
    program: Program, run: Callable[[Program], None], message: str
) -> None:
    before = snapshot(program)
    with pytest.raises(GraphError, match=message):
        apply(program, exact(run))
    assert snapshot(program) == before


def test_a_failing_pass_is_named_and_its_error_chained(program: Program) -> None:
    def run(program: Program) -> None:
        raise KeyError("layer 7")

    with pytest.raises(PassError, match="pass 'faulty' failed: KeyError: 'layer 7'") as caught:
        apply(program, exact(run))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_pass_may_add_outputs_and_not_remove_them(program: Program) -> None:
    def add(program: Program) -> None:
        output, hidden = program.graph.output_node(), calls(program, aten.add.Tensor)[-1]
        output.args = ((*output.args[0], hidden),)  # pyright: ignore
        program.outputs = (*program.outputs, "hidden")

    def rename(program: Program) -> None:
        program.outputs = ("scores",)

    result = apply(program, exact(add))
    assert [value.shape[-1] for value in result(**result.example())] == [11, 8]
    with pytest.raises(GraphError, match="the output 'logits' is gone"):
        apply(program, exact(rename))


def test_a_pass_may_change_the_names_of_dimensions_of_its_copy_only(program: Program) -> None:
    def run(program: Program) -> None:
        program.origin["note"] = "x"
        program.dimensions.clear()
        raise InputError("stop")

    with pytest.raises(InputError):
        apply(program, exact(run))
    assert set(program.dimensions) == {"batch", "sequence"}
    assert "note" not in program.origin


# Contracts


def test_facts_are_read_off_the_graph(program: Program) -> None:
    assert facts.facts(program) >= {"stateless", "dense_weights", "causal_lm"}
    assert not facts.facts(program) & {"has_attention", "has_recurrence", "has_images"}


def test_an_unmet_fact_names_the_pass_and_the_remedy(program: Program) -> None:
    step = exact(lambda program: None, requires=frozenset({"has_attention"}))
    with pytest.raises(ContractError, match="'faulty' requires the fact 'has_attention'") as caught:
        apply(program, step)
    assert "use a model with attention" in caught.value.remedy


def test_an_unknown_fact_is_refused(program: Program) -> None:
    step = exact(lambda program: None, ensures=frozenset({"statless"}))
    with pytest.raises(ContractError, match="unknown fact 'statless'; did you mean 'stateless'"):
        apply(program, step)


def test_promises_are_checked_after_the_run(program: Program) -> None:
    def rename(program: Program) -> None:
        program.inputs = (replace(program.inputs[0], name="tokens"), *program.inputs[1:])

    with pytest.raises(ContractError, match="removed the fact 'causal_lm' without declaring it"):
        apply(program, exact(rename), check=False)
    broken = exact(lambda p: SwapAddends().run(p), ensures=frozenset({"has_attention"}))
    with pytest.raises(ContractError, match="promised the fact 'has_attention'"):
        apply(program, broken)


def test_a_third_party_adds_a_fact(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_FACTS", facts.known_facts())  # other tests keep their own

    @facts.fact("use a model whose head has a bias")
    def has_head_bias(program: Program) -> bool:  # pyright: ignore[reportUnusedFunction]
        return "head.bias" in dict(program.weights())

    assert "has_head_bias" in facts.facts(program)
    with pytest.raises(Error, match="registered twice"):

        @facts.fact("")
        def stateless(program: Program) -> bool:  # pyright: ignore[reportUnusedFunction]
            return True


def test_order_is_checked_against_the_history(program: Program) -> None:
    ran = apply(program, SwapAddends(), check=False)
    with pytest.raises(ContractError, match="must come before pass 'swap_addends'") as caught:
        apply(ran, exact(lambda program: None, before=frozenset({"swap_addends"})))
    assert "'swap_addends' ran already" in caught.value.remedy
    with pytest.raises(ContractError, match="cannot be combined with pass 'swap_addends'"):
        apply(ran, exact(lambda program: None, excludes=frozenset({"swap_addends"})))


# Errors as numbers


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([math.nan, 2.0], [math.nan, 2.0], 0.0),
        ([math.nan, 2.0], [1.0, 2.0], math.inf),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([0.5, 0.0], [0.0, 0.0], 0.5),
        ([1.0], [1.0, 2.0], math.inf),
        ([1, 2, 3, 4], [1, 2, 3, 5], 0.25),
        ([True, False], [True, False], 0.0),
        ([1.0], [1], math.inf),
        ([], [], 0.0),
    ],
)
def test_relative_error(actual: list[float], expected: list[float], error: float) -> None:
    found = check.relative_error(torch.tensor(actual), torch.tensor(expected))
    assert found == pytest.approx(error, rel=1e-6)


def test_the_rounding_limit_follows_the_coarsest_dtype(program: Program) -> None:
    assert check.rounding_limit(program) == 1e-5
    program.set_weight("shift", torch.zeros(2, dtype=torch.bfloat16))
    assert check.rounding_limit(program) == 3e-2
