"""``fxgraft::linear_attention_slots``, and decoding of a whole model in place; costs."""

from __future__ import annotations

from typing import Any, cast

import pytest
import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.backends.triton import TritonCompiled, TritonOptions
from fxgraft.errors import InputError
from fxgraft.kernels.linear_attention import deferred
from fxgraft.kernels.linear_attention.cost import break_even, state_traffic
from fxgraft.kernels.linear_attention_slots import reference
from fxgraft.kernels.linear_attention_slots.op import SPEC
from fxgraft.paging import page_state
from fxgraft.state import insert_state
from tests.kernels._helpers import op_of, opcheck, randn
from tests.kernels._linear_attention import Call, check_deferred, check_dropped, error, wide

linear_attention_slots: Any = op_of(SPEC)
CALL = Call(batch=3, group=2, head_dim=8, value_dim=4, with_norm=True)
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    ],
)


def _place(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "memory_cache": randn(6, 2, 2, 8, 4, dtype=dtype),
        "slots": torch.tensor([4, 0, 2]),
        "past": torch.tensor([3, -1, 0], dtype=torch.int32),
    }


@pytest.mark.parametrize("length", [1, 5, 70])
def test_equals_the_reference(length: int) -> None:
    tensors, place = CALL.longer(length).tensors(), _place()
    before = place["memory_cache"].clone()
    exact = wide(place)
    expected = reference.linear_attention_slots(
        **cast(Any, wide(tensors)), **exact, **CALL.keywords
    )
    output = linear_attention_slots(**tensors, **place, **CALL.keywords)
    assert error(output, expected) < 1e-5
    assert error(place["memory_cache"], exact["memory_cache"]) < 1e-5
    assert not output[1].any()
    untouched = [0, 1, 3, 5]
    assert torch.equal(place["memory_cache"][untouched], before[untouched])


def test_opcheck() -> None:
    tensors, place = CALL.tensors(), _place()
    norm_weight = tensors.pop("norm_weight")
    opcheck(SPEC, *tensors.values(), *place.values(), norm_weight, **CALL.keywords)


def test_restored_slot_continues_to_the_bit() -> None:
    """A state copied to another slot, as kept prefixes are, goes on alike."""
    place = _place()
    pool, past = place["memory_cache"], torch.full((1,), 7, dtype=torch.int32)
    pool[5] = pool[2]
    outputs = [
        linear_attention_slots(
            **Call(head_dim=8, value_dim=4, length=3).tensors(),
            memory_cache=pool, slots=torch.tensor([slot]), past=past, **CALL.keywords,
        )
        for slot in (2, 5)
    ]  # fmt: skip
    assert torch.equal(*outputs)
    assert torch.equal(pool[5], pool[2])


def test_bad_input() -> None:
    tensors, place = CALL.tensors(), _place()
    half = place | {"memory_cache": place["memory_cache"].bfloat16()}
    with pytest.raises(InputError, match="rounded at every step"):
        linear_attention_slots(**tensors, **half, **CALL.keywords)
    linear_attention_slots(**tensors, **half, dtype=torch.bfloat16, **CALL.keywords)
    with pytest.raises(InputError, match=r"slots is \[2\] for a batch of 3"):
        linear_attention_slots(**tensors, **place | {"slots": torch.zeros(2).long()},
                               **CALL.keywords)  # fmt: skip


@pytest.mark.parametrize("size", [1, 4, 16])
def test_deferred_write_equals_immediate_write(size: int) -> None:
    check_deferred(deferred.deferred_step, size)


@pytest.mark.parametrize("dropped", [1, 3])
def test_dropped_tokens_were_never_seen(dropped: int) -> None:
    check_dropped(deferred.deferred_step, dropped)


def test_deferred_bad_input() -> None:
    with pytest.raises(InputError, match="holds 0 tokens"):
        deferred.Ring.empty(_place()["memory_cache"], 0)
    place = _place()
    ring = deferred.Ring.empty(place["memory_cache"], 4)
    tensors = CALL.tensors()
    tensors.pop("norm_weight")
    with pytest.raises(InputError, match="got 5 tokens per row"):
        deferred.deferred_step(**tensors, **cast(Any, place), ring=ring, **CALL.keywords)


class _Model(nn.Module):
    """A causal language model of one linear attention layer with residual."""

    def __init__(self, head_dim: int = 8) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.embedding = nn.Embedding(32, 16)
        self.projection = nn.Linear(16, (4 + 2 + 2 + 4) * head_dim)
        self.back = nn.Linear(4 * head_dim, 16)
        self.logits = nn.Linear(16, 32)
        self.register_buffer("mixing", torch.tensor([0.4, 0.6]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        parts = self.projection(hidden).unflatten(-1, (12, self.head_dim)).split((4, 2, 2, 4), 2)
        output, _ = torch.ops.fxgraft.linear_attention(
            *parts[:3], parts[3].unflatten(2, (2, 2)), self.mixing,
            key_mask=attention_mask.bool(), scale=self.head_dim**-0.5, temperature=4.0, floor=-1.0,
        )  # fmt: skip
        return {"logits": self.logits(hidden + self.back(output.flatten(2)))}


def _program(head_dim: int = 8) -> fxgraft.Program:
    torch.manual_seed(0)
    ids = torch.randint(0, 32, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return fxgraft.capture(_Model(head_dim), inputs)


def test_step_graph_keeps_its_state_in_a_slot() -> None:
    paged = page_state(insert_state(_program()))
    (pool,) = paged.slot_pools
    assert (pool.shape, pool.dtype) == ((2, 2, 8, 8), torch.float32)
    assert not paged.needs_mask
    targets = [node.target for node in paged.program.graph.nodes]
    assert targets.count(SPEC.overload) == 1
    assert not {torch.ops.fxgraft.read_slots.default, torch.ops.fxgraft.write_slots.default} & {
        *targets
    }


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_generation_in_place(device: str) -> None:
    program = _program()
    expected = fxgraft.compile(program, backend="torch").generate(
        [[1, 2, 3], [4]], max_new_tokens=8, eos_token_id=[], pad_token_id=0
    )
    if device == "cuda":
        compiled: Any = fxgraft.compile(program, backend="triton")
    else:
        compiled = TritonCompiled(program, TritonOptions(device="cpu", cuda_graphs=False))
    found = compiled.generate([[1, 2, 3], [4]], max_new_tokens=8, eos_token_id=[], pad_token_id=0)
    assert compiled.state_problem is None
    assert torch.equal(found.cpu(), expected)
    assert "linear_attention_slots" in str(compiled.report())


@pytest.mark.parametrize(("head_dim", "reason"), [(8, ""), (512, "heads of 512 channels")])
def test_report_says_when_a_head_is_too_large(head_dim: int, reason: str) -> None:
    compiled = TritonCompiled(_program(head_dim), TritonOptions(device="cpu", cuda_graphs=False))
    compiled.lower_step(insert_state(compiled.program))
    (line,) = [x for x in compiled.report().lines if x.op == "fxgraft.linear_attention_slots"]
    assert line.reason == "" if not reason else reason in line.reason
    assert line.runs_on == ("PyTorch" if reason else "Triton")


@pytest.mark.parametrize(
    ("batch", "full", "key"), [(1, 4608, 640), (4, 1536, 544), (16, 768, 520), (64, 576, 514)]
)
def test_break_evens(batch: int, full: int, key: int) -> None:
    """Table of the DSLA specification, section 8.2: Llama-2-7B, float32 states, 16-bit weights."""
    heads, dim, width = 32, 128, 4096
    traffic = state_traffic(2, heads, dim, dim, 4)
    gates = {"full": 2 * width * heads * dim * 2, "key": 2 * heads * dim * dim * 2}
    found = {name: break_even(traffic, size, batch, heads, dim, 2) for name, size in gates.items()}
    assert found == {"full": full, "key": key}


def test_break_even_of_the_states_alone() -> None:
    """4d tokens for float32 states, 2d for 16 bits, for any number of heads."""
    heads, dim, batch = sympy.symbols("heads dim batch", positive=True)  # pyright: ignore[reportUnknownMemberType]
    for item, factor in ((4, 4), (2, 2)):
        traffic = state_traffic(2, heads, dim, dim, item)
        alone: Any = break_even(traffic, 0, batch, heads, dim, 2)
        assert sympy.simplify(alone - factor * dim) == 0  # pyright: ignore[reportUnknownMemberType]


def test_cost_model_counts_the_states() -> None:
    table = insert_state(_program()).program.cost()
    (row,) = [row for row in table.rows if "linear_attention" in row.op]
    state = cast(Any, row.cost.state_bytes)
    (batch,) = state.free_symbols
    assert 2 * state == batch * state_traffic(2, 2, 8, 8, 4)
    moved = cast(Any, row.cost.bytes_read + row.cost.bytes_written)
    without_tokens = moved.subs(dict.fromkeys(moved.free_symbols - {batch}, 0))
    assert without_tokens.coeff(batch, 1) == state_traffic(2, 2, 8, 8, 4)
