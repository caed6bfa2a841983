"""Every fxgraft op in ONNX against its reference: at dynamic sizes and for one token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxgraft.backends.onnx.options import LAST_OPSET
from fxgraft.errors import LoweringError
from fxgraft.kernels.attention_mass.op import SPEC as ATTENTION_MASS
from fxgraft.kernels.causal_mask.op import SPEC as CAUSAL_MASK
from fxgraft.kernels.gated_activation.op import SPEC as GATED_ACTIVATION
from fxgraft.kernels.gated_activation.reference import ACTIVATIONS
from fxgraft.kernels.head_gate.op import SPEC as HEAD_GATE
from fxgraft.kernels.logit_sum.op import SPEC as LOGIT_SUM
from fxgraft.kernels.rms_norm.op import SPEC as RMS_NORM
from fxgraft.kernels.rotary.op import SPEC as ROTARY
from fxgraft.kernels.spec import OpSpec, specs
from fxgraft.kernels.steer.op import SPEC as STEER
from fxgraft.kernels.token_automaton.op import SPEC as TOKEN_AUTOMATON
from tests.backends._onnx import Runner, program_of
from tests.kernels import _attention_oracle as attention
from tests.kernels import _recurrences as recurrences
from tests.kernels._helpers import randn

OPSETS = (18, 20, 23, LAST_OPSET)
_ATTENTION_SHAPES = {
    "query": ("batch", None, "sequence", None),
    "key": ("batch", None, "total", None),
    "value": ("batch", None, "total", None),
    "key_mask": ("batch", "total"),
    "bias": ("batch", None, "sequence", "total"),
    "sinks": (None,),
}


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    if not expected.is_floating_point():
        return torch.equal(found, expected)
    return torch.allclose(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


def shapes_of(
    values: Mapping[str, Tensor], names: Mapping[str, tuple[str | None, ...]], fixed: set[str]
) -> dict[str, list[int | str]]:
    """Shapes with the named sizes, except those that are 1 (broadcast) or in ``fixed``."""
    return {
        name: [
            size if label is None or size == 1 or label in fixed else label
            for label, size in zip(names[name], value.shape, strict=True)
        ]
        for name, value in values.items()
    }


def tensors_of(case: attention.Case) -> dict[str, Tensor]:
    given = zip(_ATTENTION_SHAPES, case.to(torch.float32).tensors, strict=True)
    return {name: tensor for name, tensor in given if tensor is not None}


def last_query(case: attention.Case) -> attention.Case:
    bias = case.bias
    if bias is not None and bias.shape[2] > 1:
        bias = bias[:, :, -1:]
    return replace(case, query=case.query[:, :, -1:], bias=bias)


@pytest.mark.parametrize("name", attention.CASES)
def test_attention(name: str, tmp_path: Path) -> None:
    case = attention.CASES[name]
    values = tensors_of(case)
    program = program_of(
        torch.ops.fxgraft.attention.default,
        values,
        shapes_of(values, _ATTENTION_SHAPES, set()),
        case.options,
    )
    (found,) = Runner(program, tmp_path)(values)
    assert near(found, attention.attend(case))


@pytest.mark.parametrize("name", attention.CASES)
def test_attention_of_one_query(name: str, tmp_path: Path) -> None:
    case = last_query(attention.CASES[name])
    values = tensors_of(case)
    shapes = shapes_of(values, _ATTENTION_SHAPES, {"sequence"})
    program = program_of(torch.ops.fxgraft.attention.default, values, shapes, case.options)
    runner = Runner(program, tmp_path, is_decode=True)
    assert near(runner(values)[0], attention.attend(case))
    if case.chunk is None and case.window is None:
        assert "LessOrEqual" not in runner.operators, "no causal mask is needed"


def test_attention_at_other_sizes_than_it_was_built_with(tmp_path: Path) -> None:
    small = attention.make_case(key_mask=attention.padding("..xxx", "xxxxx"))
    values = tensors_of(small)
    shapes = shapes_of(values, _ATTENTION_SHAPES, set())
    program = program_of(torch.ops.fxgraft.attention.default, values, shapes, small.options)
    runner = Runner(program, tmp_path)
    for batch, queries, total in ((1, 1, 1), (3, 4, 11)):
        mask = torch.ones(batch, total, dtype=torch.bool)
        mask[0, : total // 3] = False
        case = attention.make_case(batch=batch, queries=queries, total=total, key_mask=mask)
        assert near(runner(tensors_of(case))[0], attention.attend(case))


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"chunk": 2}, {"is_causal": False}], ids=str
)
def test_causal_mask(options: dict[str, Any], length: int, tmp_path: Path) -> None:
    values = {"key_mask": attention.padding("..xxxx", "xxxxxx")}
    arguments = {"query_length": length, **options}
    program = program_of(CAUSAL_MASK.overload, values, {"key_mask": ("batch", "total")}, arguments)
    expected = CAUSAL_MASK.reference(values["key_mask"], length, **options)
    assert isinstance(expected, Tensor)
    assert torch.equal(Runner(program, tmp_path)(values)[0], expected)


def _arguments(case: recurrences.Case, length: int, stateful: bool) -> recurrences.Arguments:
    """Arguments for ``length`` tokens; if stateful, with the state that other tokens left."""
    before = case.next_state(case.reference(case.arguments(3))) if stateful else {}
    return {**case.cut(case.arguments(6), 0, length), **before}


def _recurrent(
    case: recurrences.Case, values: recurrences.Arguments, length: int | str, folder: Path
) -> Runner:
    shapes: dict[str, list[int | str]] = {}
    for name, value in values.items():
        labels = case.shapes.get(name, tuple(value.shape))
        sizes = [length if size == "S" else int(size) for size in labels]
        is_batched = name not in case.shapes or "S" in labels
        shapes[name] = ["batch", *sizes[1:]] if is_batched else sizes
    return Runner(program_of(case.spec.overload, values, shapes, case.options), folder)


@pytest.mark.parametrize("stateful", [False, True], ids=["from zero", "with state"])
@pytest.mark.parametrize("name", recurrences.CASES)
def test_recurrence(name: str, stateful: bool, tmp_path: Path) -> None:
    case = recurrences.CASES[name]
    runner = _recurrent(case, _arguments(case, 6, stateful), "sequence", tmp_path)
    for length in (6, 1):
        arguments = _arguments(case, length, stateful)
        for found, expected in zip(runner(arguments), case.reference(arguments), strict=True):
            assert near(found, expected)


@pytest.mark.parametrize("name", recurrences.CASES)
def test_one_token_of_a_recurrence_is_no_scan(name: str, tmp_path: Path) -> None:
    case = recurrences.CASES[name]
    values = _arguments(case, 1, stateful=True)
    runner = _recurrent(case, values, 1, tmp_path)
    assert "Scan" not in runner.operators
    for found, expected in zip(runner(values), case.reference(values), strict=True):
        assert near(found, expected)


def _one_op(
    spec: OpSpec, values: dict[str, Tensor], shapes: Any, options: dict[str, Any], **how: Any
) -> list[Tensor]:
    return Runner(program_of(spec.overload, values, shapes, options), **how)(values)


def _expected(spec: OpSpec, values: dict[str, Tensor], options: dict[str, Any]) -> Tensor:
    result = spec.reference(**values, **options)
    assert result is not None
    return result if isinstance(result, Tensor) else result[0]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"offset": 1.0}], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(
    weighted: bool, options: dict[str, Any], dtype: torch.dtype, opset: int, tmp_path: Path
) -> None:
    values = {"x": randn(2, 5, 8, dtype=dtype)}
    values |= {"weight": randn(8, dtype=dtype)} if weighted else {}
    options = {"eps": 1e-5, **options}
    shapes = {"x": ("batch", "sequence", 8), "weight": (8,)}
    (found,) = _one_op(RMS_NORM, values, shapes, options, folder=tmp_path, opset=opset)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert near(found, _expected(RMS_NORM, values, options), tolerance)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("shared", [False, True])
def test_rotary(shared: bool, width: int, interleaved: bool, opset: int, tmp_path: Path) -> None:
    angles = randn(1 if shared else 2, 1, 5, width // 2, dtype=torch.float32)
    both = (
        torch.stack((angles, angles), -1).flatten(-2) if interleaved else angles.repeat(1, 1, 1, 2)
    )
    values = {"x": randn(2, 3, 5, 8, dtype=torch.float32), "cos": both.cos(), "sin": both.sin()}
    table = [1 if shared else "batch", 1, "sequence", width]
    shapes = {"x": ("batch", 3, "sequence", 8), "cos": table, "sin": table}
    options = {"interleaved": interleaved}
    (found,) = _one_op(ROTARY, values, shapes, options, folder=tmp_path, opset=opset)
    assert near(found, _expected(ROTARY, values, options))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation(activation: str, opset: int, tmp_path: Path) -> None:
    values = {"gate": randn(2, 6, dtype=torch.float32), "up": randn(2, 6, seed=1).float()}
    shapes = dict.fromkeys(values, ("batch", 6))
    options = {"activation": activation}
    (found,) = _one_op(GATED_ACTIVATION, values, shapes, options, folder=tmp_path, opset=opset)
    assert near(found, _expected(GATED_ACTIVATION, values, options))


@pytest.mark.parametrize("per_row", [False, True])
def test_steer(per_row: bool, tmp_path: Path) -> None:
    values = {
        "x": randn(2, 5, 4, dtype=torch.float32),
        "fire": randn(2, 5) > 0,
        "vector": randn(2, 4, dtype=torch.float32) if per_row else randn(4).float(),
        "coefficient": torch.tensor([0.0, 2.0]) if per_row else torch.tensor(1.5),
    }
    rows = ["batch"] if per_row else []
    shapes = {
        "x": ("batch", "sequence", 4),
        "fire": ("batch", "sequence"),
        "vector": (*rows, 4),
        "coefficient": rows,
    }
    (found,) = _one_op(STEER, values, shapes, {}, folder=tmp_path)
    assert torch.equal(found, _expected(STEER, values, {}))


@pytest.mark.parametrize("stateful", [False, True])
def test_logit_sum(stateful: bool, tmp_path: Path) -> None:
    values = {
        "query": randn(2, 4, 5, 3).float(),
        "key": randn(2, 2, 5, 3, seed=1).float(),
        "chosen": randn(2, 5, seed=2) > 0,
    }
    values |= {"key_sum": randn(2, 2, 3, seed=3).float()} if stateful else {}
    shapes = {
        "query": ("batch", 4, "sequence", 3),
        "key": ("batch", 2, "sequence", 3),
        "chosen": ("batch", "sequence"),
        "key_sum": ("batch", 2, 3),
    }
    found = _one_op(LOGIT_SUM, values, shapes, {"scale": 0.5}, folder=tmp_path)
    expected = LOGIT_SUM.reference(**values, scale=0.5)
    assert isinstance(expected, tuple)
    assert all(map(near, found, expected))


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"softcap": 2.0}, {"window": 3}])
def test_attention_mass(options: dict[str, Any], tmp_path: Path) -> None:
    values = {
        "query": randn(2, 4, 3, 3).float(),
        "key": randn(2, 2, 5, 3, seed=1).float(),
        "chosen": randn(2, 5, seed=2) > 0,
    }
    shapes = {
        "query": ("batch", 4, "sequence", 3),
        "key": ("batch", 2, "total", 3),
        "chosen": ("batch", "total"),
    }
    options = {"scale": 0.5, **options}
    (found,) = _one_op(ATTENTION_MASS, values, shapes, options, folder=tmp_path)
    assert near(found, _expected(ATTENTION_MASS, values, options))


@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_head_gate(factor: float, tmp_path: Path) -> None:
    """Ties go to the lower head."""
    score = randn(2, 4, 5, seed=1).float()
    score[:, 2] = score[:, 1]
    score[0, 3] = torch.nan
    values = {"x": randn(2, 4, 5, 3).float(), "score": score, "rows": randn(2, 5, seed=2) > 0}
    shapes = {
        "x": ("batch", 4, "sequence", 3),
        "score": ("batch", 4, "sequence"),
        "rows": ("batch", "sequence"),
    }
    options = {"keep": 2, "factor": factor}
    (found,) = _one_op(HEAD_GATE, values, shapes, options, folder=tmp_path)
    assert torch.equal(found, _expected(HEAD_GATE, values, options))


@pytest.mark.parametrize("length", ["sequence", 1])
@pytest.mark.parametrize("stateful", [False, True])
def test_token_automaton(stateful: bool, length: int | str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    count = 1 if length == 1 else 7
    values = {
        "input_ids": torch.randint(0, 6, (2, count), generator=generator),
        "next_state": torch.randint(0, 3, (3, 6), generator=generator),
        "fire": randn(3, 6) > 0,
    }
    values |= {"state": torch.tensor([2, 1])} if stateful else {}
    shapes = {"input_ids": ("batch", length), "next_state": (3, 6), "fire": (3, 6)}
    shapes |= {"state": ("batch",)}
    options = {"initial": 1}
    found = _one_op(TOKEN_AUTOMATON, values, shapes, options, folder=tmp_path)
    expected = TOKEN_AUTOMATON.reference(**values, **options)
    assert isinstance(expected, tuple)
    assert all(map(torch.equal, found, expected))


def test_every_op_is_tested_here() -> None:
    named = {case.spec.name for case in recurrences.CASES.values()}
    named |= {"attention_mass", "head_gate", "logit_sum"}
    named |= {"attention", "causal_mask", "gated_activation", "rms_norm", "rotary", "steer"}
    # Graphs of the engine are never exported.
    paged = {
        "append_pages", "read_slots", "write_slots", "choose_rows", "paged_attention",
        "paged_attention_mass",
    }  # fmt: skip
    paged |= {"linear_attention_slots", "token_automaton_slots", "fused_linear", "greedy_step"}
    # Need a whole model, and have one in test_nm_linear.py and test_seal_onnx.py.
    elsewhere = {"nm_linear", "token_automaton"}
    assert named | paged | elsewhere == set(specs())


def test_an_operator_without_a_form_is_named(tmp_path: Path) -> None:
    values = {"self": torch.ones(2, 3)}
    program = program_of(
        torch.ops.aten.bernoulli.default, values, {"self": ("batch", 3)}, {"generator": None}
    )
    node = program.output_nodes["out_0"]
    node.meta |= {"module": "model.layers.7.gate", "source": "gates.py:12: x.bernoulli()"}
    with pytest.raises(LoweringError, match=r"bernoulli.*ONNX has no form") as caught:
        Runner(program, tmp_path)
    assert "'model.layers.7.gate' at gates.py:12" in str(caught.value)


def test_sizes_that_no_input_gives_are_refused(tmp_path: Path) -> None:
    values = {"self": torch.tensor([0.0, 2.0, 1.0])}
    program = program_of(torch.ops.aten.bincount.default, {"self": values["self"].long()},
                         {"self": ("count",)}, {})  # fmt: skip
    with pytest.raises(LoweringError, match="depends on the data"):
        Runner(program, tmp_path)
