"""``capture``: one graph per model, whatever it comes from, and the model as it was."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import fxgraft
from fxgraft import graph as graphs
from fxgraft.check import relative_error
from fxgraft.errors import CaptureError
from fxgraft.frontends import sources, transformers_hooks
from fxgraft.kernels.spec import argument, dims
from fxgraft.sources import embedded_model
from tests import models

ATTENTION = torch.ops.fxgraft.attention.default
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Captured:
    """A model, a copy of it made before the capture, and the Program."""

    model: nn.Module
    before: nn.Module
    program: fxgraft.Program


@pytest.fixture(scope="module")
def llama() -> Captured:
    model = models.llama(tie_word_embeddings=True).train()
    cast(Any, model).model.layers[1].eval()
    before = copy.deepcopy(model)
    return Captured(model, before, fxgraft.capture(model))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = models.llama(tie_word_embeddings=True)
    path = tmp_path_factory.mktemp("llama")
    cast(Any, model).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def from_folder(folder: Path) -> fxgraft.Program:
    return fxgraft.capture(folder)


def logits(model: nn.Module, **values: Tensor) -> Tensor:
    """The original's, in evaluation mode."""
    with torch.no_grad():
        return cast(Any, copy.deepcopy(model).eval())(**values, use_cache=False).logits


def token_ids(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, models.VOCABULARY, (batch, length), generator=generator)


def attentions(program: fxgraft.Program) -> list[torch.fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=ATTENTION))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 20), (4, 7)])
def test_any_batch_and_length_gives_the_models_logits(
    llama: Captured, batch: int, length: int
) -> None:
    ids = token_ids(batch, length)
    assert relative_error(llama.program(ids)[0], logits(llama.model, input_ids=ids)) < TOLERANCE


def test_padding_and_positions_are_respected(llama: Captured) -> None:
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    values = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    got = llama.program(ids, **values)[0]
    seen = mask.bool()
    assert relative_error(got[seen], logits(llama.model, input_ids=ids, **values)[seen]) < TOLERANCE
    assert not torch.allclose(got[seen], llama.program(ids)[0][seen])


def test_inputs_outputs_and_dimensions_are_described(llama: Captured) -> None:
    program = llama.program
    assert [spec.name for spec in program.inputs] == ["input_ids", "attention_mask", "position_ids"]
    assert [spec.default for spec in program.inputs] == ["required", "ones", "positions"]
    assert {spec.shape for spec in program.inputs} == {("batch", "sequence")}
    assert program.input("input_ids").high == models.VOCABULARY
    assert program.outputs == ("logits",)
    assert program.dimensions == {"batch": fxgraft.Range(), "sequence": fxgraft.Range()}
    shape = dims(program.output_nodes["logits"])
    assert shape[:2] == (program.symbols["batch"], program.symbols["sequence"])
    assert program.origin["class"] == "LlamaForCausalLM"
    assert program.origin["model_type"] == "llama"
    assert program.origin["context_length"] == 128
    assert program.origin["generation"]["eos_token_id"] == 2
    assert json.loads(json.dumps(program.origin)) == program.origin


def test_weights_keep_their_names_and_are_shared(llama: Captured) -> None:
    parameters = dict(llama.model.named_parameters(remove_duplicate=False))
    buffers = dict(llama.model.named_buffers())
    weights = dict(llama.program.weights())
    assert parameters.keys() <= weights.keys()
    assert weights.keys() <= parameters.keys() | buffers.keys()
    assert all(weights[name] is parameter for name, parameter in parameters.items())


def test_tied_weights_stay_tied(llama: Captured) -> None:
    program = llama.program
    assert program.weight("lm_head.weight") is program.weight("model.embed_tokens.weight")
    assert program.count_parameters() == sum(
        weight.numel() for weight in [*llama.model.parameters(), *llama.model.buffers()]
        if any(weight is used for _, used in program.weights())
    )  # fmt: skip


def test_the_graph_holds_operators_only(llama: Captured) -> None:
    for node in llama.program.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        if node.op == "call_function":
            assert graphs.short_target(node).startswith(("aten.", "fxgraft.")), node
    assert len(attentions(llama.program)) == 3
    for node in attentions(llama.program):
        assert argument(node, "is_causal") is True
        assert argument(node, "bias") is None
        assert isinstance(argument(node, "key_mask"), torch.fx.Node)


def test_nodes_tell_module_and_source_line(llama: Captured) -> None:
    modules = dict(cast(Any, llama.model).named_modules())
    nodes = [n for n in llama.program.graph.nodes if n.op == "call_function"]
    for node in nodes:
        assert node.meta.keys() <= {"val", "module", "source"}
        assert "val" in node.meta
        assert node.meta.get("module", "") in modules
    sourced = [n for n in nodes if "source" in n.meta]
    assert len(sourced) > 0.9 * len(nodes)
    assert all(re.match(r"[\w<>]+(\.py)?:\d+: ", n.meta["source"]) for n in sourced)
    paths = [node.meta["module"] for node in attentions(llama.program)]
    assert paths == [f"model.layers.{index}.self_attn" for index in range(3)]
    (head,) = [n for n in nodes if n.meta.get("module") == "lm_head"]
    assert head.target is torch.ops.aten.linear.default


def assert_unchanged(model: nn.Module, before: nn.Module) -> None:
    """Mode, configuration, attributes and weights are those of the copy."""
    pairs = list(zip(model.modules(), before.modules(), strict=True))
    assert [a.training for a, _ in pairs] == [b.training for _, b in pairs]
    for a, b in pairs:
        assert a.__dict__.keys() == b.__dict__.keys()
        assert a.forward.__func__ is b.forward.__func__  # pyright: ignore[reportFunctionMemberAccess]
    config, old = cast(Any, model).config, cast(Any, before).config
    assert config.to_dict() == old.to_dict()
    assert config._attn_implementation == old._attn_implementation == "sdpa"
    assert config.use_cache is old.use_cache is True
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in before.named_parameters(remove_duplicate=False):
        assert torch.equal(weights[name], weight)
        assert weights[name].requires_grad == weight.requires_grad


def test_the_model_is_unchanged_afterwards(llama: Captured) -> None:
    assert_unchanged(llama.model, llama.before)


class Stubborn(nn.Module):
    """A feed-forward part that branches on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_the_model_is_unchanged_after_a_failure() -> None:
    model = models.llama().train()
    inner = cast(Any, model).model
    inner.layers[2].mlp = Stubborn().eval()
    before = copy.deepcopy(model)
    with pytest.raises(CaptureError, match=r"model\.layers\.2\.mlp"):
        fxgraft.capture(model)
    assert_unchanged(model, before)
    inner.layers[2].mlp = nn.Identity()
    assert len(attentions(fxgraft.capture(model))) == 3


def test_an_attention_keyword_that_the_op_lacks_is_an_error() -> None:
    attend = cast(Any, transformers_hooks)._attention
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    attend(nn.Identity(), query, key, value, None, dropout=0.0, unheard_of=None)
    with pytest.raises(CaptureError, match="Identity passes unheard_of") as caught:
        attend(nn.Identity(), query, key, value, None, unheard_of=3)
    assert caught.value.remedy


def test_a_model_with_such_a_keyword_is_captured_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The keyword changes the result, so the hooks must not drop it."""
    interface = cast(Any, transformers.AttentionInterface)
    original = interface()["sdpa"]

    def louder(*args: Any, loudness: float = 1.0, **kwargs: Any) -> Any:
        output, weights = original(*args, **kwargs)
        return output * loudness, weights

    model = models.llama(num_hidden_layers=1)
    attention = cast(Any, model).model.layers[0].self_attn
    forward = attention.forward

    def loud_forward(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs, loudness=3.0)

    monkeypatch.setattr(attention, "forward", loud_forward)
    interface.register("louder", louder)
    cast(Any, model).config._attn_implementation_internal = "louder"
    ids = token_ids(2, 7)
    with torch.no_grad():
        expected = cast(Any, model)(ids, use_cache=False).logits
    assert relative_error(fxgraft.capture(model)(ids)[0], expected) < TOLERANCE


class Scaled(nn.Module):
    """A parameter, a buffer, two inputs and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("offset", torch.tensor(2.0))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x) + self.offset, y.sum(1)


def test_a_plain_module_has_a_dynamic_batch_by_default() -> None:
    model = Scaled()
    program = fxgraft.capture(model, (torch.randn(3, 4), torch.randn(3, 7)))
    assert [(spec.name, spec.shape) for spec in program.inputs] == [
        ("x", ("batch", 4)),
        ("y", ("batch", 7)),
    ]
    assert program.origin["output"] == "tuple"
    x, y = torch.randn(5, 4), torch.randn(5, 7)
    for got, expected in zip(program(x, y), model(x, y), strict=True):
        assert torch.equal(got, expected)
    assert dict(program.weights()).keys() == {"linear.weight", "linear.bias", "offset"}


def test_dynamic_dimensions_are_those_that_are_named() -> None:
    model = Scaled()
    example = {"x": torch.randn(3, 4), "y": torch.randn(5, 7)}
    program = fxgraft.capture(model, example, dynamic={"y": {0: "rows", 1: "columns"}})
    assert program.input("x").shape == (3, 4)
    assert program.input("y").shape == ("rows", "columns")
    assert program.dimensions.keys() == {"rows", "columns"}
    x, y = torch.randn(3, 4), torch.randn(2, 9)
    assert torch.equal(program(x, y)[1], model(x, y)[1])
    assert fxgraft.capture(model, example, dynamic={}).dimensions == {}


class Positions(nn.Module):
    """Looks positions up in a table, so a sequence may be as long as the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]


def test_the_range_of_a_dimension_is_the_models() -> None:
    example = (torch.randn(3, 6, 4),)
    program = fxgraft.capture(Positions(), example, dynamic={"x": {0: "batch", 1: "sequence"}})
    assert program.dimensions["sequence"] == fxgraft.Range(1, 20)


@dataclass(frozen=True)
class SdpaCase:
    """Options of ``scaled_dot_product_attention`` and what they become."""

    options: dict[str, Any]
    is_causal: bool
    scale: float
    masked: bool = False


class Attending(nn.Module):
    """Self-attention with plain torch."""

    def __init__(self, case: SdpaCase) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.case = case

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(x).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        mask = x.sum(-1)[:, None, None, :] > 0 if self.case.masked else None
        mixed = F.scaled_dot_product_attention(query, key, value, mask, **self.case.options)
        return mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "case",
    [
        SdpaCase({}, False, 0.5),
        SdpaCase({"is_causal": True}, True, 0.5),
        SdpaCase({"scale": 0.3}, False, 0.3, masked=True),
    ],
    ids=["full", "causal", "masked"],
)
def test_plain_attention_is_raised_to_the_op(case: SdpaCase) -> None:
    model = Attending(case)
    example = (torch.randn(3, 5, 8),)
    program = fxgraft.capture(model, example, dynamic={"x": {0: "batch", 1: "sequence"}})
    (node,) = attentions(program)
    assert argument(node, "is_causal") is case.is_causal
    assert argument(node, "scale") == pytest.approx(case.scale)
    assert (argument(node, "bias") is not None) is case.masked
    x = torch.randn(2, 9, 8)
    with torch.no_grad():
        assert relative_error(program(x)[0], model(x)) < TOLERANCE


def test_a_program_stays_itself(llama: Captured) -> None:
    assert fxgraft.capture(llama.program) is llama.program


def test_a_saved_program_is_read(llama: Captured, tmp_path: Path) -> None:
    ids = token_ids(2, 6)
    loaded = fxgraft.capture(llama.program.save(tmp_path / "saved"))
    assert torch.equal(loaded(ids)[0], llama.program(ids)[0])
    compiled = fxgraft.compile(llama.program, backend="torch")
    again = fxgraft.capture(compiled.save(tmp_path / "compiled"))
    assert "backend" not in again.origin


def test_a_folder_gives_the_models_logits(folder: Path, from_folder: fxgraft.Program) -> None:
    ids = token_ids(3, 8)
    expected = logits(models.llama(tie_word_embeddings=True), input_ids=ids)
    assert relative_error(from_folder(ids)[0], expected) < TOLERANCE
    assert from_folder.origin["source"] == str(folder)
    assert not from_folder.diff(fxgraft.capture(models.llama(tie_word_embeddings=True)))


def test_weights_of_a_folder_are_memory_mapped_and_tied(
    folder: Path, from_folder: fxgraft.Program
) -> None:
    tied = from_folder.weight("lm_head.weight")
    assert tied is from_folder.weight("model.embed_tokens.weight")
    mapped = list(_mappings(folder / "model.safetensors"))
    assert mapped
    for name, weight in from_folder.weights():
        inside = any(start <= weight.data_ptr() < end for start, end in mapped)
        assert inside is ("inv_freq" not in name), name


def _mappings(file: Path) -> Iterator[tuple[int, int]]:
    """Address ranges of this process that are mapped from a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, end = line.split()[0].split("-")
            yield int(start, 16), int(end, 16)


def test_buffers_that_are_not_stored_are_computed(from_folder: fxgraft.Program) -> None:
    buffers = {n: w for n, w in from_folder.weights() if not isinstance(w, nn.Parameter)}
    original = dict(models.llama().named_buffers())
    assert buffers
    for name, buffer in buffers.items():
        assert buffer.device.type == "cpu"
        assert torch.equal(buffer, original[name])


def test_a_folder_of_shards(folder: Path, from_folder: fxgraft.Program, tmp_path: Path) -> None:
    model = models.llama(tie_word_embeddings=True)
    cast(Any, model).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = token_ids(2, 6)
    sharded = fxgraft.capture(tmp_path)
    assert torch.equal(sharded(ids)[0], from_folder(ids)[0])


def test_a_folder_of_another_dtype(tmp_path: Path) -> None:
    model = models.llama(num_hidden_layers=1).to(torch.bfloat16)
    cast(Any, model).save_pretrained(tmp_path)
    program = fxgraft.capture(tmp_path)
    assert program.weight("lm_head.weight").dtype == torch.bfloat16
    ids = token_ids(2, 6)
    assert relative_error(program(ids)[0], logits(model, input_ids=ids)) < 3e-2


def test_the_class_of_a_folder_can_be_chosen(folder: Path) -> None:
    program = fxgraft.capture(folder, model_class="AutoModel")
    assert program.origin["class"] == "LlamaModel"
    assert program.outputs == ("last_hidden_state",)
    expected = cast(Any, models.llama(tie_word_embeddings=True)).model
    ids = token_ids(2, 6)
    with torch.no_grad():
        hidden = expected(ids, use_cache=False).last_hidden_state
    assert relative_error(program(ids)[0], hidden) < TOLERANCE


def test_weights_spelled_otherwise_are_converted(tmp_path: Path) -> None:
    """A checkpoint of the bare model lacks the prefix that the whole model's weights have."""
    model = models.llama(tie_word_embeddings=True)
    cast(Any, model).model.save_pretrained(tmp_path)
    program = fxgraft.capture(tmp_path, model_class="AutoModelForCausalLM")
    ids = token_ids(2, 6)
    assert relative_error(program(ids)[0], logits(model, input_ids=ids)) < TOLERANCE


@pytest.mark.slow
def test_a_large_model_is_captured_on_the_meta_device() -> None:
    """A Llama of 7B shapes (4 layers of them), in a process of its own to see its peak."""
    script = """
import resource, torch, transformers
import fxgraft
config = transformers.LlamaConfig(num_hidden_layers=4, hidden_size=4096, intermediate_size=11008)
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config)
program = fxgraft.capture(model)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(program.count_bytes(), (peak - start) * 1024, program.device.type)
"""
    words = [sys.executable, "-c", script]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    size, grown, device = result.stdout.split()
    assert int(size) > 4e9
    assert int(grown) < 3e8
    assert device == "meta"


def test_weight_files_are_those_of_the_index(tmp_path: Path) -> None:
    cast(Any, models.llama(num_hidden_layers=1)).save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "stray.safetensors").write_bytes(b"")
    names = [file.name for file in sources.weight_files(tmp_path)]
    assert "stray.safetensors" not in names
    assert len(names) > 1


@pytest.mark.slow
def test_the_embedded_gguf_file_answers() -> None:
    program = fxgraft.capture(embedded_model())
    compiled = fxgraft.compile(program, backend="torch")
    tokenizer = fxgraft_tokenizer()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    answer = compiled.generate(ids, max_new_tokens=3)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert len(attentions(program)) == 30


def fxgraft_tokenizer() -> Any:
    from fxgraft.sources import tokenizer

    return tokenizer("smollm2-135m")
