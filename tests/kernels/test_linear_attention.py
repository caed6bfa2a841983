"""``fxgraft::linear_attention``: laws of the layer, and the op's bad inputs."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from fxgraft.errors import InputError
from fxgraft.kernels.linear_attention import SPEC, chunkwise, reference
from tests.kernels._helpers import check_export, op_of
from tests.kernels._linear_attention import Call, error, oracle, wide

linear_attention: Any = op_of(SPEC)
LENGTHS = [1, 2, 63, 64, 65, 257]
CALLS = {
    "DSLA": Call(batch=3, head_dim=32),
    "grouped queries": Call(group=4, kv_heads=1, head_dim=64, with_state=True),
    "write scale and norm": Call(
        batch=2, head_dim=32, value_dim=16, with_norm=True, options={"write_scale": "sqrt"}
    ),
    "states per query head": Call(group=2, state_heads=4, gate_dim=1, with_state=True),
    "one gate for all heads": Call(kv_heads=3, state_heads=1),
    "GLA": Call(states=1, head_dim=128, options={"temperature": 16.0, "floor": None}),
    "four states": Call(states=4, options={"floor": -0.5}),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def _reference(tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return reference.linear_attention(**cast(Any, wide(tensors)), **options)


@every_call
def test_reference_is_the_formula(call: Call) -> None:
    tensors = call.longer(9).tensors()
    expected = oracle(**cast(Any, wide(tensors)), **call.keywords)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        given = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        found = reference.linear_attention(**cast(Any, given), **call.keywords)
        assert all(error(f, e) < limit for f, e in zip(found, expected, strict=True))


@every_call
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_the_recurrence(call: Call, length: int) -> None:
    tensors = call.longer(length).tensors()
    found = linear_attention(**tensors, **call.keywords)
    expected = _reference(tensors, **call.keywords)
    assert all(error(f, e) < 1e-5 for f, e in zip(found, expected, strict=True))


def test_bfloat16_inputs() -> None:
    call = Call(length=1024, head_dim=64, group=4, kv_heads=1)
    tensors = call.tensors(torch.bfloat16)
    output, memory = linear_attention(**tensors, **call.keywords)
    expected, last = _reference(tensors, **call.keywords)
    assert output.dtype == torch.bfloat16
    assert memory.dtype == torch.float32
    assert error(output, expected) < 1e-2
    assert error(memory, last) < 1e-5


def test_two_states_are_one_of_twice_the_key_width() -> None:
    """The identity of the specification, section 2: the scale stays that of one state."""
    call = Call(batch=2, length=70, head_dim=32)
    tensors = call.tensors(torch.float64)
    expected, memory = linear_attention(**tensors, **call.keywords)
    first, second = tensors["mixing"]
    query, key = tensors["query"], tensors["key"]
    one = {
        "query": torch.cat([first * query, second * query], -1),
        "key": torch.cat([key, key], -1),
        "value": tensors["value"],
        "gate": tensors["gate"].flatten(3).unsqueeze(3),
        "mixing": torch.ones(1, dtype=torch.float64),
    }
    found, wide_memory = linear_attention(**one, **call.keywords)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(wide_memory.view_as(memory), memory)


@pytest.mark.parametrize("chunk", [16, 32, 128])
@pytest.mark.parametrize("floor", [-0.5, None])
def test_chunk_length_does_not_matter(chunk: int, floor: float | None) -> None:
    call = Call(length=257, options={"floor": floor})
    given: Any = call.tensors()
    expected = chunkwise.linear_attention(**given, **call.keywords)
    found = chunkwise.linear_attention(**given, **call.keywords, chunk=chunk)
    assert all(error(f, e) < 1e-5 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("pieces", [(1, 256), (64, 193), (100, 100, 57), (256, 1)])
def test_pieces_equal_the_whole(pieces: tuple[int, ...]) -> None:
    call = Call(length=257, group=2)
    tensors = call.tensors()
    expected, last = linear_attention(**tensors, **call.keywords)
    outputs, state, start = list[Tensor](), None, 0
    for size in pieces:
        part = {n: t[:, start : start + size] if t.dim() > 3 else t for n, t in tensors.items()}
        output, state = linear_attention(**part, state=state, **call.keywords)
        outputs.append(output)
        start += size
    assert state is not None
    assert error(torch.cat(outputs, 1), expected) < 1e-5
    assert error(state, last) < 1e-5


def test_prefill_then_decode_equals_prefill() -> None:
    call = Call(length=12, group=2, with_norm=True)
    tensors = call.tensors()
    expected, _ = linear_attention(**tensors, **call.keywords)
    for past in range(1, 12):
        head, tail = _split(tensors, past)
        outputs = [linear_attention(**head, **call.keywords)]
        for t in range(12 - past):
            step = {n: v[:, t : t + 1] if v.dim() > 3 else v for n, v in tail.items()}
            outputs.append(linear_attention(**step, state=outputs[-1][1], **call.keywords))
        assert error(torch.cat([o for o, _ in outputs], 1), expected) < 1e-5


def _split(tensors: dict[str, Tensor], at: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return (
        {n: t[:, :at] if t.dim() > 3 else t for n, t in tensors.items()},
        {n: t[:, at:] if t.dim() > 3 else t for n, t in tensors.items()},
    )


def test_mixing_chooses_states() -> None:
    call = Call(length=70)
    tensors = call.tensors(torch.float64)
    for chosen in range(2):
        mixing = torch.eye(2, dtype=torch.float64)[chosen]
        output, _ = linear_attention(**{**tensors, "mixing": mixing}, **call.keywords)
        only = {**tensors, "gate": tensors["gate"][:, :, :, chosen : chosen + 1]}
        only["mixing"] = torch.ones(1, dtype=torch.float64)
        torch.testing.assert_close(output, linear_attention(**only, **call.keywords)[0])
    equal = {**tensors, "gate": tensors["gate"][:, :, :, :1].expand(-1, -1, -1, 2, -1)}
    outputs = [
        linear_attention(**{**equal, "mixing": torch.tensor(m).double()}, **call.keywords)[0]
        for m in ((0.3, 0.7), (0.9, 0.1))
    ]
    torch.testing.assert_close(*outputs)


def test_no_decay_is_plain_linear_attention() -> None:
    tensors = Call(length=70).tensors(torch.float64)
    tensors["gate"] = torch.zeros_like(tensors["gate"])
    output, _ = linear_attention(**tensors, scale=1.0)
    scores = torch.einsum("bthd,bshd->bhts", tensors["query"], tensors["key"]).tril()
    torch.testing.assert_close(output, torch.einsum("bhts,bshd->bthd", scores, tensors["value"]))


def test_full_decay_leaves_the_token_itself() -> None:
    call = Call(length=70, options={"floor": None, "temperature": 1.0})
    tensors = call.tensors(torch.float64)
    tensors["gate"] = torch.full_like(tensors["gate"], -800.0)
    output, _ = linear_attention(**tensors, **call.keywords)
    own = (tensors["query"] * tensors["key"]).sum(-1, keepdim=True) * tensors["value"]
    torch.testing.assert_close(output, call.keywords["scale"] * own)


@pytest.mark.parametrize("changed", [0, 10, 63, 64, 90])
def test_causality_to_the_bit(changed: int) -> None:
    call = Call(length=100)
    tensors = call.tensors()
    before, _ = linear_attention(**tensors, **call.keywords)
    for name in ("query", "key", "value", "gate"):
        tensors[name] = tensors[name].clone()
        tensors[name][:, changed] += 1
    after, _ = linear_attention(**tensors, **call.keywords)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("floor", [-1.0, None])
def test_padding(left: bool, floor: float | None) -> None:
    """What a pad token holds is never seen, not even NaN."""
    call = Call(batch=3, length=70, group=2, options={"floor": floor, "write_scale": "sqrt"})
    tensors, lengths = call.tensors(), (70, 41, 1)
    mask = torch.zeros(3, 70, dtype=torch.bool)
    for row, size in enumerate(lengths):
        mask[row, 70 - size if left else 0 : 70 if left else size] = True
    for name in ("key", "value"):
        tensors[name] = tensors[name].masked_fill(~mask[:, :, None, None], torch.nan)
    output, last = linear_attention(**tensors, key_mask=mask, **call.keywords)
    for row in range(3):
        kept = mask[row]
        alone = {n: t[row : row + 1, kept] if t.dim() > 3 else t for n, t in tensors.items()}
        expected, memory = linear_attention(**alone, **call.keywords)
        assert error(output[row : row + 1, kept], expected) < 1e-5
        assert error(last[row : row + 1], memory) < 1e-5


def test_packed_sequences_equal_separate_ones() -> None:
    call = Call(length=140, group=2, with_norm=True)
    tensors = call.tensors()
    bounds, state = [0, 3, 3, 90, 140], 0.1 * torch.ones(4, 2, 2, 32, 32)
    output, last = linear_attention(
        **tensors, cu_seqlens=torch.tensor(bounds), state=state, **call.keywords
    )
    assert torch.equal(last[1], state[1])
    for row, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        part = {n: t[:, start:stop] if t.dim() > 3 else t for n, t in tensors.items()}
        expected, memory = linear_attention(**part, state=state[row : row + 1], **call.keywords)
        torch.testing.assert_close(output[:, start:stop], expected)
        torch.testing.assert_close(last[row : row + 1], memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("floor", [-1.0, None])
@pytest.mark.parametrize("write_scale", ["none", "sqrt"])
def test_extreme_gates_stay_finite(
    dtype: torch.dtype, floor: float | None, write_scale: str
) -> None:
    call = Call(
        length=4096, kv_heads=1, head_dim=4,
        options={"floor": floor, "temperature": 1.0, "write_scale": write_scale},
    )  # fmt: skip
    tensors = call.tensors(dtype)
    signs = torch.where(tensors["gate"] > 0, 60.0, -60.0).to(dtype)
    signs[:, :500], signs[:, 500:1000] = 60.0, -60.0
    tensors["gate"] = signs
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    output, last = linear_attention(**leaves, **call.keywords)
    assert output.isfinite().all()
    assert last.isfinite().all()
    (output.float().sum() + last.sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all(), name


@pytest.mark.parametrize("floor", [-1.0, None])
def test_gradients_equal_those_of_the_formula(floor: float | None) -> None:
    call = Call(
        length=20, group=2, head_dim=8, with_state=True, with_norm=True, options={"floor": floor}
    )
    tensors = call.tensors()
    found = _gradients(linear_attention, tensors, call)
    expected = _gradients(oracle, wide(tensors), call)
    for name, gradient in found.items():
        assert error(gradient, expected[name]) < 1e-4, name


def _gradients(function: Any, tensors: dict[str, Tensor], call: Call) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output, last = function(**leaves, **call.keywords)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
    (output * weights).sum().add(last.square().sum()).backward()
    return {name: cast(Tensor, leaf.grad) for name, leaf in leaves.items()}


def test_grouped_queries_equal_expanded_keys() -> None:
    call = Call(length=70, group=4, kv_heads=2)
    tensors = call.tensors()
    output, memory = linear_attention(**tensors, **call.keywords)
    expanded = {
        name: tensor.repeat_interleave(4, 2) if name in ("key", "value", "gate") else tensor
        for name, tensor in tensors.items()
    }
    expected, expanded_memory = linear_attention(**expanded, **call.keywords)
    assert error(output, expected) < 1e-6
    assert memory.nbytes == 2 * 2 * 32 * 32 * 4
    assert expanded_memory.nbytes == 4 * memory.nbytes


def test_state_has_one_size_at_any_length() -> None:
    call = Call(head_dim=8, kv_heads=1)
    shapes = {linear_attention(**call.longer(n).tensors(), **call.keywords)[1].shape
              for n in (1, 10, 10_000)}  # fmt: skip
    assert shapes == {torch.Size([1, 1, 2, 8, 8])}


def _drift(dtype: torch.dtype | None, half_life: float = 4096.0) -> float:
    """Error of the last output after 8192 single steps, with a state of a dtype."""
    length = 8192
    call = Call(length=length, kv_heads=1, states=1, head_dim=4)
    tensors = {n: t for n, t in call.tensors().items() if n != "gate"}
    tensors["gate"] = torch.full((1, length, 1, 1, 1), -0.6931471805599453 / half_life)
    keywords = {"scale": 0.5, "dtype": dtype}
    state = None
    for t in range(length):
        step = {n: v[:, t : t + 1] if v.dim() > 3 else v for n, v in tensors.items()}
        output, state = reference.linear_attention(
            **cast(Any, step), state=state, **cast(Any, keywords)
        )
    exact, _ = _reference(tensors, scale=0.5)
    return error(output, exact[:, -1:])  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.slow
def test_drift_of_the_history_state() -> None:
    assert _drift(None) < 1e-5
    assert _drift(torch.bfloat16) > 1e-2


def test_16_bit_states_are_refused_unless_forced() -> None:
    call = Call(length=3)
    tensors = call.tensors(torch.bfloat16)
    state = torch.zeros(1, 2, 2, 32, 32, dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"rounded at every step.*\n.*float32.*dtype="):
        linear_attention(**tensors, state=state, **call.keywords)
    _, last = linear_attention(**tensors, state=state, dtype=torch.bfloat16, **call.keywords)
    assert last.dtype == torch.bfloat16


_MASK = torch.ones(1, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.ones(1, 5, 3, 32)}, "4 query heads for 3 key heads"),
        ({"value": torch.ones(1, 4, 2, 32)}, r"value is \[1, 4, 2, 32\]\n.*pass \[1, 5, 2, 32\]"),
        ({"gate": torch.ones(1, 5, 3, 2, 32)}, r"gate is .*\n.*pass \[1, 5, 1\|2\|4, 2, 1\|32\]"),
        ({"gate": torch.ones(1, 5, 2, 32)}, "gate is"),
        ({"mixing": torch.ones(3)}, r"mixing is \[3\]\n.*pass \[2\]"),
        ({"norm_weight": torch.ones(3, 32)}, r"norm_weight is \[3, 32\]\n.*pass \[4, 32\]"),
        ({"key_mask": torch.ones(1, 5)}, "key_mask is .* of torch.float32"),
        ({"key_mask": _MASK[:, :3]}, r"key_mask is \[1, 3\]"),
        ({"key_mask": _MASK, "cu_seqlens": torch.tensor([0, 5])}, "with a key_mask"),
        ({"state": torch.ones(1, 2, 2, 32, 31)}, r"state is .*\n.*pass \[1, 2, 2, 32, 32\]"),
        ({"write_scale": "root"}, "write_scale is 'root'\n.*none, sqrt"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    call = Call(group=2)
    with pytest.raises(InputError, match=message):
        linear_attention(**{**call.tensors(), **call.keywords, **changes})


def test_packed_rows_of_a_batch_are_refused() -> None:
    call = Call(batch=2)
    with pytest.raises(InputError, match="for a batch of 2"):
        linear_attention(**call.tensors(), cu_seqlens=torch.tensor([0, 5]), **call.keywords)


def test_export_with_symbolic_length() -> None:
    call = Call(batch=2, group=2, with_state=True)
    names = ("query", "key", "value", "gate", "mixing", "state")

    def run(*tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return linear_attention(**dict(zip(names, tensors, strict=True)), **options)

    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = (sizes, sizes, sizes, sizes, None, {0: Dim.DYNAMIC})
    args, others = (
        tuple(c.tensors()[name] for name in names) for c in (call, replace(call, batch=3, length=9))
    )
    check_export((run,), args, others, shapes, **call.keywords)


def test_flops_of_llama_2() -> None:
    """5 · d² per state and head and token: 5.2 MFLOP per layer (specification, section 6)."""
    from tests.kernels._helpers import call_node

    call = Call(length=1, kv_heads=32, head_dim=128)
    tensors = call.tensors()
    node = call_node(SPEC, *(tensors[n] for n in ("query", "key", "value", "gate", "mixing")),
                     **call.keywords)  # fmt: skip
    cells = 32 * 10 * 128**2
    assert cells < int(SPEC.flops(node)) < 1.02 * cells
