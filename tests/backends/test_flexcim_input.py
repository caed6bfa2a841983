"""Bad input to the flexcim backend: each is refused, and says what and where."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.backends.flexcim import Hardware, hardware, patterns
from fxgraft.backends.flexcim.backend import BACKEND
from fxgraft.backends.flexcim.baselines import Layer, compare
from fxgraft.backends.flexcim.macro import Gemm
from fxgraft.backends.flexcim.mapper import map_gemm
from fxgraft.backends.flexcim.patterns import Pattern
from fxgraft.cost_table import StepCostTable
from fxgraft.errors import Error, InputError, LoweringError
from fxgraft.frontends.capture import capture
from fxgraft.program import Program
from fxgraft.sparsity import DeclaredPattern, declare
from fxgraft.step_tables import Ranges


class Two(nn.Module):
    """Two linear layers, of 12 and 32 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@cache
def program() -> Program:
    torch.manual_seed(0)
    return capture(Two(), (torch.randn(3, 12),))


def lower(**options: Any) -> Any:
    return fxgraft.compile(program(), backend="flexcim", options=options)


@pytest.mark.parametrize(
    ("text", "cell", "message"),
    [
        ("5:4", "gather", r"node 'linear': pattern 5:4 keeps 5 of 4\n.*N must be 1 to 4"),
        ("0:4", "gather", "keeps 0 of 4"),
        ("2:6", "gather", "M is no power of two"),
        ("2:64", "pair", "selects among at most 32"),
        ("2:512", "gather", "selects among at most 256"),
        ("two", "gather", "pattern 'two' is none"),
        ("2:", "gather", "is none"),
    ],
)
def test_impossible_patterns_name_the_node(text: str, cell: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        patterns.check(patterns.parse(text, "linear"), Hardware(cell=cell), "linear")  # pyright: ignore[reportArgumentType]


def test_impossible_patterns_in_options() -> None:
    with pytest.raises(InputError, match="node 'linear': pattern 9:8 keeps 9 of 8"):
        lower(patterns={"first.weight": "9:8"})


def test_m_must_divide_k_unless_it_was_padded() -> None:
    with pytest.raises(InputError, match=r"node 'linear': K = 12 is no multiple of M = 8"):
        lower(patterns={"first.weight": "8:8"})
    padded = lower(patterns={"first.weight": "8:8"}, padded=["first.*"])
    plain = lower()
    cells = [c.costs(batch=5).nodes[0] for c in (padded, plain)]
    assert (cells[0].pattern, cells[1].pattern) == ("8:8", "dense")
    # 16 rows are stored and paid for.
    assert cells[0].utilisation == pytest.approx(16 / 12 * cells[1].utilisation)
    assert cells[0].energy["multiply"] == pytest.approx(16 / 12 * cells[1].energy["multiply"])
    declaring = program().copy()
    declare(declaring, "first.weight", DeclaredPattern(8, 8, is_padded=True))
    found = fxgraft.compile(declaring, backend="flexcim")
    assert found.costs(batch=5).nodes[0].pattern == "8:8"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_mask_that_is_denser_than_declared_names_row_and_group() -> None:
    dense = program().copy()
    weight = dense.weight("second.weight").detach().clone()
    weight[:, 2::4] = weight[:, 3::4] = 0
    weight[5, 14] = 1.0
    dense.set_weight("second.weight", weight)
    declare(dense, "second.weight", DeclaredPattern(2, 4))
    message = r"node 'linear_1': row 5, group 3 keeps 3 weights, more than pattern 2:4"
    with pytest.raises(LoweringError, match=message):
        fxgraft.compile(dense, backend="flexcim")


@pytest.mark.parametrize("glob", ["third.*", "FIRST.weight", "first.bias"])
@pytest.mark.parametrize("option", ["patterns", "padded"])
def test_globs_that_match_nothing(option: str, glob: str) -> None:
    value = {glob: "2:4"} if option == "patterns" else [glob]
    with pytest.raises(InputError, match="matches the weight of no linear layer"):
        lower(**{option: value})


def test_a_declaration_for_no_weight() -> None:
    with pytest.raises(InputError, match=r"no weight 'third\.weight'"):
        declare(program().copy(), "third.weight", DeclaredPattern(2, 4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"macros": 0}, "macros"),
        ({"macros": -3}, "macros"),
        ({"macros": 2.5}, "macros"),
        ({"clock": 0}, "clock"),
        ({"clock": float("nan")}, "clock"),
        ({"clock": float("inf")}, "clock"),
        ({"rows": 24}, "rows.*power of two"),
        ({"sub_macros": 3}, "sub_macros.*power of two"),
        ({"bits_per_cycle": 9}, "bits_per_cycle is larger"),
        ({"weight_memory": 0}, "weight_memory"),
        ({"cell": "analog"}, "cell"),
        ({"vector_bytes": 0}, "vector_bytes"),
        ({"energies": {"full_adder": -1.0}}, "full_adder"),
        ({"energies": {"activity": 1.5}}, "activity"),
        ({"energies": {"leakage": float("nan")}}, "leakage"),
        ({"transistors": {"per_mm2": 0}}, "per_mm2"),
        ({"colums": 32}, "no key 'colums'; did you mean 'columns'"),
        ({"energies": {"memory_bits": 1}}, "did you mean 'memory_bit'"),
    ],
)
def test_impossible_hardware_names_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hardware.parse(fields)
    with pytest.raises(InputError, match=message):
        BACKEND.check_options({"hardware": fields})


def test_unknown_keys_list_the_valid_ones() -> None:
    with pytest.raises(InputError, match=r"the valid keys are: .*macros \(int\).*clock \(float\)"):
        hardware.parse({"speed": 1})


def test_hardware_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.yaml"):
        hardware.parse(tmp_path / "absent.yaml")
    path = tmp_path / "hardware.yaml"
    for text in ("- 1\n", "macros: [\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"hardware\.yaml"):
            hardware.parse(path)
    path.write_text("name: mine\nenergies:\n  memory_bits: 1\n")
    with pytest.raises(InputError, match=r"hardware\.yaml, line 3: .*did you mean 'memory_bit'"):
        hardware.parse(str(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "area"}, "objective"),
        ({"speed": 1}, "no key 'speed'"),
        ({"hardware": 7}, "hardware"),
        ({"patterns": {"first.weight": 4}}, "patterns"),
        ({"padded": "first"}, "padded"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BACKEND.check_options(options)


@pytest.mark.parametrize(
    ("fields", "tokens", "message"),
    [
        ({"reduction": 0}, 1, "'reduction' is 0"),
        ({"outputs": -4}, 1, "'outputs' is -4"),
        ({"copies": 0}, 1, "'copies' is 0"),
        ({"replays": 0}, 1, "'replays' is 0"),
        ({}, 0, "'tokens' is 0"),
        ({}, float("nan"), "'tokens' is nan"),
    ],
)
def test_impossible_products_name_the_field(
    fields: dict[str, Any], tokens: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        map_gemm(Hardware(), Gemm(**{"reduction": 8, "outputs": 8, **fields}), tokens)  # pyright: ignore[reportArgumentType]


def test_an_unknown_objective() -> None:
    with pytest.raises(InputError, match="objective 'area' is unknown"):
        map_gemm(Hardware(), Gemm(8, 8), 1, "area")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "'batch' is 0"),
        ({"new_tokens": -1}, "'new_tokens' is -1"),
        ({"context": -1}, "'context' is -1"),
        ({"batch": 1.5}, "'batch' is 1.5"),
        ({"batch": float("nan")}, "'batch' is nan"),
        ({"context": 3}, "'context' is 3: the Program is no language model"),
    ],
)
def test_impossible_steps(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lower().costs(**sizes)


def test_resident_weights_that_do_not_fit_say_how_many_macros_would() -> None:
    # Two layers of 12 x 32 and 32 x 8 take a macro each.
    message = r"need 8,192 bytes in macros, 4,096 are there\n.*macros to at least 2"
    with pytest.raises(InputError, match=message):
        lower(hardware={"macros": 1, "resident": True})
    assert lower(hardware={"macros": 2, "resident": True}).costs().cycles > 0


def test_an_operator_without_a_cost_names_node_and_line() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.inverse(x)

    message = r"node 'inverse' \(aten\.inverse\) in module .* at test_flexcim_input\.py:\d+"
    with pytest.raises(LoweringError, match=message):
        fxgraft.compile(Inverse(), backend="flexcim", example=(torch.eye(4).repeat(3, 1, 1),))


def test_a_model_without_tokens_has_no_step_table() -> None:
    with pytest.raises(InputError, match="takes no tokens"):
        lower().table()


@pytest.mark.parametrize("field", ["tokens", "sequences", "new_tokens", "context"])
def test_impossible_ranges(field: str) -> None:
    with pytest.raises(InputError, match=f"largest {field} is 0"):
        Ranges(**{field: 0})


def test_outside_of_a_table_is_refused_or_marked() -> None:
    from tests.backends.test_flexcim import SMALL, llama

    table: StepCostTable = llama().table(SMALL)
    with pytest.raises(InputError, match="new_tokens 65 is outside"):
        table.price([(65, 0)])
    found = table.pricer("mark").price([(65, 0)])
    assert found.extrapolated
    assert found.seconds > table.price([(64, 0)]).seconds


def test_unknown_baselines() -> None:
    layers = [Layer("a", Gemm(8, 8, Pattern(2, 4)), 1)]
    for name in ("vegeta", "fixed:", "fixed:2", "Dense"):
        with pytest.raises(InputError):
            compare(layers, Hardware(), [name])


@pytest.mark.parametrize("axes", [{"colums": [1]}, {"macros": []}, {"name": ["a"], "speed": [1]}])
def test_sweeps_over_unknown_fields(axes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="cannot be swept"):
        lower().sweep(axes, [(1, 1, 0)])


def test_a_sweep_without_steps() -> None:
    with pytest.raises(InputError, match="'steps' is empty"):
        lower().sweep({"macros": [1]}, [])


def test_every_error_says_what_to_do() -> None:
    for call in (
        lambda: lower(patterns={"nothing": "2:4"}),
        lambda: hardware.parse({"macros": 0}),
        lambda: map_gemm(Hardware(), Gemm(8, 8), 0),
        lambda: patterns.parse("x"),
    ):
        with pytest.raises(Error) as caught:
            call()
        assert caught.value.remedy
