"""Capture of recurrences: the graph holds the ops, and computes what the model computes."""

from __future__ import annotations

import contextlib
import inspect
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import nn
from torch.export import Dim, ExportedProgram
from transformers.models.mamba import modeling_mamba as _modeling_mamba

from fxgraft.errors import CaptureError
from fxgraft.frontends.recurrent import emit_recurrent_ops
from fxgraft.kernels.spec import dims, spec_of
from tests.frontends._recurrent_models import FAMILIES, VOCABULARY, Family, build

modeling_mamba = cast(Any, _modeling_mamba)
BY_NAME = {family.name: family for family in FAMILIES}
every_family = pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f.fast else pytest.mark.slow, id=f.name) for f in FAMILIES],
)
# What the capture never calls: single-token decoding, and training-only fusions of the others.
NOT_HOOKED = {
    "causal_conv1d_update", "selective_state_update", "fused_recurrent_gated_delta_rule",
    "fused_recurrent_kda", "mamba_inner_fn", "mamba_split_conv1d_scan_combined",
}  # fmt: skip
HOOKED = {
    "causal_conv1d_fn", "selective_scan_fn", "mamba_chunk_scan_combined",
    "chunk_gated_delta_rule", "chunk_kda",
}  # fmt: skip


def _inputs(model: nn.Module, batch: int, length: int, padding: int) -> dict[str, Any]:
    """Tokens, and where the model takes it a mask with ``padding`` tokens left out at the left."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, VOCABULARY - 4, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    cast(Any, model).config.use_cache = False
    accepted = inspect.signature(model.forward).parameters
    candidates = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    return {name: value for name, value in candidates.items() if name in accepted}


def _export(model: nn.Module) -> ExportedProgram:
    inputs = _inputs(model, 2, 11, 2)
    dynamic = {
        name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if isinstance(value, torch.Tensor) else None
        for name, value in inputs.items()
    }
    with torch.no_grad(), emit_recurrent_ops(model):
        return torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=False)


def _assert_same(exported: ExportedProgram, model: nn.Module) -> None:
    for batch, length, padding in ((3, 23, 5), (1, 70, 0), (2, 5, 1)):
        inputs = _inputs(model, batch, length, padding)
        with torch.no_grad():
            expected = model(**inputs).logits
            actual = cast(Any, exported.module())(**inputs).logits
        seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(actual[seen], expected[seen], rtol=1e-4, atol=1e-4)


@every_family
def test_exported_graph_holds_the_ops_and_equals_the_model(family: Family) -> None:
    model = build(family)
    exported = _export(model)
    found = Counter(spec.name for node in exported.graph.nodes if (spec := spec_of(node)))
    assert found == family.ops
    ids = next(node for node in exported.graph.nodes if node.name == "input_ids")
    assert all(size.free_symbols for size in dims(ids))
    _assert_same(exported, model)


def test_rwkv_program_survives_the_rescaling_of_the_model() -> None:
    model = build(BY_NAME["Rwkv"])
    inputs = _inputs(model, 2, 9, 0)
    first = _export(model)
    with torch.no_grad():
        expected = model(**inputs).logits  # divides weights in place
    assert cast(Any, model).rwkv.layers_are_rescaled
    second = _export(model)
    for exported in (first, second):
        with torch.no_grad():
            actual = cast(Any, exported.module())(**inputs).logits
        # halved hidden states give the epsilon of the last norm more weight
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        model.train()(**inputs)  # multiplies them again
    _assert_same(second, model.eval())


def test_recurrent_gemma_forgets_where_positions_restart() -> None:
    model = build(BY_NAME["RecurrentGemma"])
    inputs = {**_inputs(model, 1, 8, 0), "position_ids": torch.arange(8)[None] % 4}
    with torch.no_grad():
        expected = model(**inputs).logits
        with emit_recurrent_ops(model):
            actual = model(**inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_activation_without_op_stays_a_node() -> None:
    model = build(Family("Mamba", {"hidden_act": "gelu"}, {}))
    exported = _export(model)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert "aten.gelu.default" in targets
    _assert_same(exported, model)


def test_everything_is_restored_after_an_error() -> None:
    model = build(BY_NAME["RecurrentGemma"])
    block = cast(Any, model).model.layers[0].temporal_block
    before: dict[str, object] = dict(vars(_modeling_mamba))
    with contextlib.suppress(RuntimeError), emit_recurrent_ops(model):
        assert "forward" in vars(block.conv_1d)
        raise RuntimeError
    assert "forward" not in vars(block.conv_1d)
    with emit_recurrent_ops(build(BY_NAME["Mamba"])):
        changed = {
            name for name, value in vars(_modeling_mamba).items() if value is not before[name]
        }
        assert changed == {"causal_conv1d_fn", "mamba_selective_scan"}
    assert all(vars(_modeling_mamba)[name] is value for name, value in before.items())


def test_models_of_other_families_are_left_alone() -> None:
    with emit_recurrent_ops(build(BY_NAME["Mamba2"])):
        assert modeling_mamba.causal_conv1d_fn.__module__ == modeling_mamba.__name__
        mamba = build(BY_NAME["Mamba"])
        exported = torch.export.export(mamba, (), _inputs(mamba, 2, 4, 0), strict=False)
    assert not any(spec_of(node) for node in exported.graph.nodes)


def test_other_threads_call_the_original() -> None:
    x, weight = torch.zeros(1, 2, 3), torch.zeros(2, 4)
    packed = torch.zeros(1, 3, dtype=torch.int32)
    errors: list[Exception] = []

    def call() -> None:
        try:
            modeling_mamba.causal_conv1d_fn(x, weight, seq_idx=packed)
        except Exception as error:
            errors.append(error)

    with emit_recurrent_ops(build(BY_NAME["Mamba"])):
        call()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    # both refuse packed sequences; the class tells who did
    assert [type(error) for error in errors] == [CaptureError, ValueError]


def test_function_that_the_kernels_package_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped:
        """The package puts a callable object in place of the function."""

        kernel_layer_name = "causal_conv1d_fn"

    wrapped = Wrapped()
    monkeypatch.setattr(modeling_mamba, "causal_conv1d_fn", wrapped)
    with emit_recurrent_ops(build(BY_NAME["Mamba"])):
        output = modeling_mamba.causal_conv1d_fn(torch.ones(1, 2, 3), torch.ones(2, 4))
        assert output.tolist() == [[[1, 2, 3], [1, 2, 3]]]
    assert modeling_mamba.causal_conv1d_fn is wrapped


def test_every_kernel_function_of_transformers_is_known() -> None:
    # a new kind of recurrence in transformers should be seen here first
    found: set[str] = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = file.read_text(encoding="utf-8")
        found |= set(re.findall(r'@use_kernel_func_from_hub_with_fallback\(\s*"(\w+)"', source))
    assert found == HOOKED | NOT_HOOKED
