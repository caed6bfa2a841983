"""Laws that every recurrent op obeys, each checked on each op.

The reference in float64 is the oracle here; each op's own file checks the op against a form that
has no recurrence in it.
"""

from __future__ import annotations

import pytest
import torch

from fxgraft.kernels import causal_conv1d, causal_pad
from tests.kernels._helpers import call_node, gradcheck, opcheck
from tests.kernels._recurrences import BATCH, CASES, Case

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
_KEEP_INPUTS = (causal_conv1d.SPEC, causal_pad.SPEC)


@every_case
@pytest.mark.parametrize("length", [1, 5])
def test_opcheck(case: Case, length: int) -> None:
    opcheck(case.spec, *case.positional(case.arguments(length)), **case.options)


@every_case
def test_opcheck_with_gradients(case: Case) -> None:
    arguments = {name: value.requires_grad_() for name, value in case.arguments(1).items()}
    opcheck(case.spec, *case.positional(arguments), **case.options)


@every_case
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 131])
def test_equals_reference_in_float64(case: Case, length: int) -> None:
    arguments = case.arguments(length)
    expected = case.reference({name: value.double() for name, value in arguments.items()})
    for output, oracle in zip(case.run(arguments), expected, strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), oracle, rtol=2e-5, atol=2e-5)


@every_case
@pytest.mark.parametrize("cut", [1, 2, 63, 64, 69])
def test_prefix_then_suffix_equals_whole(case: Case, cut: int) -> None:
    length = 70
    arguments = case.arguments(length, torch.float64)
    whole = case.run(arguments)
    head = case.run(case.cut(arguments, 0, cut))
    tail = case.run({**case.cut(arguments, cut, length), **case.next_state(head)})
    second = tail[0]
    if case.spec is causal_pad.SPEC:  # its output starts with the past, which the head had too
        second = second.narrow(case.time, case.options["size"], length - cut)
    joined = torch.cat([head[0], second], case.time)
    torch.testing.assert_close(joined, whole[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tail[1:], whole[1:], rtol=1e-9, atol=1e-9)


@every_case
@pytest.mark.parametrize("length", [1, 6])
def test_zero_state_is_no_state(case: Case, length: int) -> None:
    arguments = case.arguments(length)
    expected = case.run(arguments)
    zeros = {name: torch.zeros_like(state) for name, state in case.next_state(expected).items()}
    for actual, oracle in zip(case.run({**arguments, **zeros}), expected, strict=True):
        assert torch.equal(actual, oracle)


@every_case
def test_inputs_are_left_alone_and_not_shared(case: Case) -> None:
    arguments = case.arguments(3)
    arguments |= {name: state + 0.1 for name, state in case.next_state(case.run(arguments)).items()}
    before = {name: value.clone() for name, value in arguments.items()}
    for output in case.run(arguments):
        output.zero_()
    for name, value in arguments.items():
        assert torch.equal(value, before[name]), name


@every_case
def test_gradients_reach_every_argument(case: Case) -> None:
    arguments = case.arguments(3, torch.float64)
    arguments |= {name: state + 0.1 for name, state in case.next_state(case.run(arguments)).items()}
    names = list(arguments)

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return case.run(dict(zip(names, values, strict=True)))

    gradcheck(function, *arguments.values())


@every_case
def test_bfloat16_computes_in_float32(case: Case) -> None:
    arguments = case.arguments(9, torch.bfloat16)
    output, *states = case.run(arguments)
    wide, *_ = case.run({name: value.float() for name, value in arguments.items()})
    assert output.dtype == torch.bfloat16
    expected = torch.bfloat16 if case.spec in _KEEP_INPUTS else torch.float32
    assert {state.dtype for state in states} == {expected}
    # one rounding of the result; a convolution in bfloat16 may round each product
    tolerance = 2e-2 if case.spec is causal_conv1d.SPEC else 4e-3
    torch.testing.assert_close(output.float(), wide, rtol=tolerance, atol=tolerance)


@every_case
def test_flops_grow_with_the_number_of_tokens(case: Case) -> None:
    def flops(length: int) -> int:
        node = call_node(case.spec, *case.positional(case.arguments(length)), **case.options)
        return int(case.spec.flops(node))

    per_token, remainder = divmod(flops(7), BATCH * 7)
    assert remainder == 0
    assert flops(5) == BATCH * 5 * per_token
    assert (per_token == 0) == (case.spec is causal_pad.SPEC)
