"""Programs with N:M sparse weights on every backend: numbers, sizes, and the pattern per layer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.fx import Node

import fxgraft
from fxgraft import graph as graphs
from fxgraft.backends.flexcim import FlexcimCompiled
from fxgraft.backends.onnx.options import LAST_OPSET
from fxgraft.backends.triton import TritonCompiled, TritonOptions
from fxgraft.backends.triton.fuse import fused
from fxgraft.errors import InputError, LoweringError
from fxgraft.frontends.capture import capture
from fxgraft.kernels.nm_linear.op import SPEC
from fxgraft.kernels.nm_linear.packing import pack
from fxgraft.kernels.spec import argument
from fxgraft.paging import page_state
from fxgraft.passes.optimize import Optimize
from fxgraft.program import Program
from fxgraft.state import insert_state
from fxgraft.transform import apply
from fxgraft.weight_products import weight_products
from tests import models
from tests.backends._onnx import Runner, program_of
from tests.kernels._helpers import randn
from tests.kernels._nm import mask_of, packed, prune

# Widths of 64 and 96; the same for what "optimize" merges.
PATTERNS = {
    "q_proj": (1, 4), "k_proj": (1, 4), "v_proj": (1, 4), "o_proj": (4, 8),
    "gate_proj": (3, 16), "up_proj": (3, 16), "down_proj": (2, 32),
}  # fmt: skip


@cache
def sparse() -> tuple[Program, Program]:
    """A Llama of two layers: dense tensors with zeros, and the same packed."""
    pruned = prune(capture(models.llama(num_hidden_layers=2)), PATTERNS)
    return pruned, packed(pruned, PATTERNS)


def ids(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, models.VOCABULARY, (batch, length), generator=generator)


def generated(program: Program, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    compiled = fxgraft.compile(program, backend=backend, options=options, check=False)
    tokens = compiled.generate(ids(2, 5), max_new_tokens=8, eos_token_id=[])
    return compiled(ids(3, 7)).logits, tokens


def test_torch() -> None:
    dense, small = (generated(program, "torch") for program in sparse())
    torch.testing.assert_close(small[0], dense[0])
    assert torch.equal(small[1], dense[1])


@pytest.mark.slow
def test_inductor() -> None:
    dense, small = sparse()
    found = generated(small, "torch", mode="inductor")
    expected = generated(dense, "torch")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("optimization", ["none", "all"])
def test_onnx(optimization: str) -> None:
    dense, small = sparse()
    expected = generated(dense, "torch")
    found = generated(small, "onnx", optimization=optimization)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("opset", [18, LAST_OPSET])
@pytest.mark.parametrize("pattern", [(2, 4), (1, 8), (5, 16), (3, 32), (9, 32), (2, 5)], ids=str)
def test_onnx_op(pattern: tuple[int, int], opset: int, tmp_path: Path) -> None:
    n, m = pattern
    weight = randn(7, 6 * m, dtype=torch.float32, seed=1)
    values, indices = pack(weight, mask_of(7, 6 * m, n, m), n, m)
    given = {
        "x": randn(2, 3, 6 * m, dtype=torch.float32), "values": values, "indices": indices,
        "bias": randn(7, dtype=torch.float32),
    }  # fmt: skip
    shapes = {name: list(tensor.shape) for name, tensor in given.items()}
    program = program_of(SPEC.overload, given, {**shapes, "x": ["b", "t", 6 * m]}, {"n": n, "m": m})
    [found] = Runner(program, tmp_path, opset)(given)
    expected = cast(Any, SPEC.overload)(*given.values(), n=n, m=m)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def stored(file: Path) -> dict[str, Any]:
    model = onnx.load(str(file))
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_onnx_files_hold_packed_weights_unless_asked(tmp_path: Path) -> None:
    dense, small = sparse()
    fxgraft.export_onnx(small, tmp_path / "small")
    fxgraft.export_onnx(small, tmp_path / "dense", dense_weights=True)
    files = {name: stored(tmp_path / name / "decode.onnx") for name in ("small", "dense")}
    name = "model.layers.0.mlp.down_proj"
    assert files["small"][f"{name}.values"].shape == tuple(small.weight(f"{name}.values").shape)
    assert not any(array.size == 64 * 96 for array in files["small"].values())
    shapes = [array.shape for array in files["dense"].values() if array.size == 64 * 96]
    assert len(shapes) == 6
    weight = dense.weight(f"{name}.weight").detach().numpy()
    whole = [a for a in files["dense"].values() if a.size == weight.size]
    assert any(np.array_equal(a, weight) or np.array_equal(a, weight.T) for a in whole)


def test_onnx_refuses_what_only_lowering_adds(tmp_path: Path) -> None:
    values, indices = pack(randn(8, 8), mask_of(8, 8, 2, 4), 2, 4)
    given = {"x": randn(3, 8), "values": values, "indices": indices}
    program = program_of(
        SPEC.overload, given, {name: list(t.shape) for name, t in given.items()},
        {"n": 2, "m": 4, "activation": "silu"},
    )  # fmt: skip
    with pytest.raises(LoweringError, match="activation and residual"):
        Runner(program, tmp_path)


def test_triton_fuses_gate_and_residual() -> None:
    dense, small = (apply(program, Optimize(), check=False) for program in sparse())
    paged = page_state(insert_state(small), block_size=4)
    nodes = [n for n in fused(paged, fresh=False).graph.nodes if n.target is SPEC.overload]
    # Per layer: query/key/value, output, gate/up, down.
    assert len(nodes) == 8
    assert [argument(node, "activation") for node in nodes] == [None, None, "silu", None] * 2
    has_residual = [argument(node, "residual") is not None for node in nodes]
    assert has_residual == [False, True, False, True] * 2
    tokens = [
        TritonCompiled(program, TritonOptions(device="cpu", cuda_graphs=False)).generate(
            ids(2, 5), max_new_tokens=8, eos_token_id=[]
        )
        for program in (dense, small)
    ]
    assert torch.equal(*tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_triton_on_a_gpu() -> None:
    dense, small = (apply(program, Optimize(), check=False) for program in sparse())
    expected, found = generated(dense, "torch"), generated(small, "triton")
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(found[1].cpu(), expected[1])


def flexcim(program: Program, **options: Any) -> FlexcimCompiled:
    compiled = fxgraft.compile(program, backend="flexcim", options=options, check=False)
    return cast(FlexcimCompiled, compiled)


@pytest.mark.parametrize("is_merged", [False, True])
def test_flexcim_sees_the_pattern_of_each_layer(is_merged: bool) -> None:
    dense, small = sparse()
    if is_merged:
        dense, small = (apply(program, Optimize(), check=False) for program in (dense, small))
    hardware = {"cell": "gather"}
    for linear in flexcim(small, hardware=hardware).model.linears.values():
        if "layers" in linear.weight:
            layer = linear.weight.split(".")[4].split("+")[0]
            assert str(linear.gemm.pattern) == "{}:{}".format(*PATTERNS[layer])
            assert linear.source == "packed"
        else:
            assert (str(linear.gemm.pattern), linear.source) == ("dense", "weight")
    found, expected = (flexcim(p, hardware=hardware).costs(1, 1, 0) for p in (small, dense))
    # The zeros of the dense tensors tell the same patterns.
    assert found.cycles == expected.cycles


def test_flexcim_takes_patterns_without_values() -> None:
    with torch.device("meta"):
        model = models.llama(num_hidden_layers=1)
    program = packed(capture(model), {"up_proj": (2, 8)})
    linears = flexcim(program).model.linears.values()
    assert {str(linear.gemm.pattern) for linear in linears if "up_proj" in linear.weight} == {"2:8"}


def test_flexcim_names_the_layer_that_it_cannot_run() -> None:
    pattern = {"down_proj": (5, 12)}
    program = packed(prune(capture(models.llama(num_hidden_layers=1)), pattern), pattern)
    name = next(node.name for node in program.graph.nodes if node.target is SPEC.overload)
    with pytest.raises(InputError, match=rf"'{name}': pattern 5:12: M is no power of two"):
        flexcim(program)


def test_products_are_those_of_the_dense_program() -> None:
    dense, small = (list(weight_products(program).values()) for program in sparse())
    assert len(small) == len(dense)
    for one, other in zip(small, dense, strict=True):
        assert (one.outputs, one.reduction, one.copies) == (
            other.outputs, other.reduction, other.copies
        )  # fmt: skip
        assert str(one.rows) == str(other.rows)
        program, original = sparse()[1], sparse()[0]
        assert torch.equal(one.matrices(program), other.matrices(original))


def stored_in(node: Node) -> list[Node]:
    """Where a node's packed weight is read."""
    return cast("list[Node]", list(node.args[1:3]))


def test_cost_counts_what_is_stored() -> None:
    """Operations and bytes of each layer are the dense ones' times N / M, and the indices."""
    small = sparse()[1]
    rows = {row.name: row.cost for row in small.cost(batch=2, sequence=3).rows}
    for node in small.graph.find_nodes(op="call_function", target=SPEC.overload):
        n, m = (cast(int, argument(node, name)) for name in "nm")
        product = weight_products(small)[node]
        dense = product.outputs * product.reduction
        parts = [small.weight(str(part.target)) for part in stored_in(node)]
        assert parts[0].nbytes == dense * 4 * n // m
        cost = rows[node.name]
        assert cost.flops == 2 * 6 * dense * n // m
        read = 6 * product.reduction * 4 + sum(part.nbytes for part in parts)
        assert (cost.bytes_read, cost.bytes_written) == (read, 6 * product.outputs * 4)


def test_the_op_is_in_the_report() -> None:
    compiled = fxgraft.compile(sparse()[1], backend="torch", check=False)
    assert any(line.op == "fxgraft.nm_linear" for line in compiled.report().lines)
    assert graphs.short_target(next(iter(weight_products(sparse()[1])))) == "fxgraft.nm_linear"
