"""``linear_attention`` in ONNX: the operator of opset 27, and standard operators before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from fxgraft.errors import LoweringError
from fxgraft.kernels.linear_attention import SPEC, reference
from tests.backends._onnx import Runner, program_of
from tests.kernels._linear_attention import Call, error

CALLS = {
    "DSLA": Call(batch=2, head_dim=8, with_state=True),
    "grouped, scaled, normed": Call(
        batch=2, group=2, head_dim=8, value_dim=4, with_norm=True, with_state=True,
        options={"write_scale": "sqrt"},
    ),
    "states per query head": Call(
        batch=2, group=2, state_heads=4, gate_dim=1, states=3, head_dim=8, with_state=True,
        options={"floor": None},
    ),
}  # fmt: skip
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def _runner(call: Call, folder: Path, opset: int, length: int | str, *, masked: bool) -> Runner:
    values = _values(call.longer(5), masked=masked)
    shapes: dict[str, list[int | str]] = {}
    for name, value in values.items():
        rows = [] if name in ("mixing", "norm_weight") else ["batch"]
        rows += [] if name in ("mixing", "norm_weight", "state") else [length]
        shapes[name] = [*rows, *value.shape[len(rows) :]]
    program = program_of(SPEC.overload, values, shapes, call.keywords)
    return Runner(program, folder, opset, is_decode=length == 1)


def _values(call: Call, *, masked: bool) -> dict[str, Tensor]:
    values = call.tensors()
    if masked:
        mask = torch.ones(call.batch, call.length, dtype=torch.bool)
        mask[0, : call.length // 2] = False
        values["key_mask"] = mask
    return values


def _expected(values: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
    return reference.linear_attention(**cast(Any, values), **call.keywords)


@every_call
@pytest.mark.parametrize("opset", [18, 27])
def test_state_is_carried(call: Call, opset: int, tmp_path: Path) -> None:
    """A prompt, then single tokens, each on the state that the model gave before."""
    masked = call.with_norm
    runner = _runner(call, tmp_path, opset, "sequence", masked=masked)
    assert ("LinearAttention" in runner.operators) == (opset == 27)
    assert ("Scan" in runner.operators) == (opset == 18)
    state = None
    for length in (7, 1, 1, 3):
        values = _values(call.longer(length), masked=masked)
        values |= {} if state is None else {"state": state}
        output, state = runner(values)
        expected, last = _expected(values, call)
        assert error(output, expected) < 1e-5
        assert error(state, last) < 1e-5


@every_call
def test_decode_graph_has_no_loop(call: Call, tmp_path: Path) -> None:
    runner = _runner(call, tmp_path, 18, 1, masked=False)
    assert not {"Scan", "Loop"} & set(runner.operators)
    values = _values(call.longer(1), masked=False)
    for found, expected in zip(runner(values), _expected(values, call), strict=True):
        assert error(found, expected) < 1e-5


def test_reference_evaluator_agrees(tmp_path: Path) -> None:
    call = CALLS["grouped, scaled, normed"]
    _runner(call, tmp_path, 27, "sequence", masked=True)
    values = _values(call.longer(6), masked=True)
    model = onnx.load(str(tmp_path / "model.onnx"))
    onnx.checker.check_model(model)
    given = {name: value.numpy() for name, value in values.items()}
    found = cast(Any, ReferenceEvaluator(model)).run(None, given)
    for result, expected in zip(found, _expected(values, call), strict=True):
        assert error(torch.from_numpy(result), expected) < 1e-4


def test_packed_sequences_are_refused(tmp_path: Path) -> None:
    call = Call(head_dim=8)
    values = call.tensors() | {"cu_seqlens": torch.tensor([0, 2, 5])}
    shapes = {name: list(value.shape) for name, value in values.items()}
    program = program_of(SPEC.overload, values, shapes, call.keywords)
    with pytest.raises(LoweringError, match="packed sequences have no ONNX form"):
        Runner(program, tmp_path)
