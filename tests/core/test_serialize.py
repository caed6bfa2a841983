"""Saving and loading Programs: round trips, hostile and damaged folders, interrupted saves."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fxgraft import atomic, weight_files
from fxgraft.argument_json import decode_argument, encode_argument
from fxgraft.errors import SerializationError
from fxgraft.frontends.exporting import export
from fxgraft.history import Record, Size
from fxgraft.kernels.spec import dims
from fxgraft.program import Input, Program
from fxgraft.serialize import load, save
from fxgraft.state import insert_state

FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Tied(nn.Module):
    """Tied embedding and head, a buffer, and dtypes, devices and infinities as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.embed(ids)) * self.scale.to(torch.float32)
        length = ids.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        scores = (hidden @ hidden.transpose(1, 2)).masked_fill(future, -math.inf)
        return {"logits": self.head(scores.softmax(-1) @ hidden), "hidden": hidden[:, -1]}


class Pooled(nn.Module):
    """Fails on small images, so its dynamic height and width need sizes that work."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return F.max_pool2d(self.conv(image), 7).to(memory_format=torch.channels_last)


class Paired(nn.Module):
    """Two inputs of which the second is twice as long as the first."""

    def forward(self, short: Tensor, long: Tensor) -> Tensor:
        return torch.cat([short, short], 1) + long


class Attending(nn.Module):
    """One causal attention layer over token embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.project = nn.Linear(8, 24)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        parts = self.project(self.embed(input_ids)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
        mixed = torch.ops.fxgraft.attention(query, key, value, scale=0.5)
        return {"logits": mixed.transpose(1, 2).flatten(2) @ self.embed.weight.T}


def tied() -> Program:
    ids = Input("ids", torch.int64, ("batch", "sequence"), high=11)
    return export(Tied(), (ids,), {"ids": torch.ones(3, 7, dtype=torch.int64)})


def pooled() -> Program:
    image = Input("image", torch.float32, ("batch", 3, "height", "width"))
    return export(Pooled(), (image,), {"image": torch.randn(2, 3, 40, 44)})


def paired() -> Program:
    short = Input("short", torch.float32, ("batch", "length"))
    long = Input("long", torch.float32, ("batch", "double"))
    return export(Paired(), (short, long), {"short": torch.randn(2, 5), "long": torch.randn(2, 10)})


def attending() -> Program:
    ids = Input("input_ids", torch.int64, ("batch", "sequence"), high=11)
    return export(Attending(), (ids,), {"input_ids": torch.ones(3, 7, dtype=torch.int64)})


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return tied()


@pytest.fixture
def saved(program: Program, tmp_path: Path) -> Path:
    return save(program, tmp_path / "saved")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the JSON of a saved Program."""
    file = folder / "program.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return folder


def refused(folder: Path) -> SerializationError:
    with pytest.raises(SerializationError) as caught:
        load(folder)
    return caught.value


# Round trips


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (tied, {"batch": 4, "sequence": 9}),
        (pooled, {"batch": 1, "height": 31, "width": 52}),
        (attending, {"batch": 1, "sequence": 4}),
    ],
)
def test_a_loaded_program_computes_the_same_bits(
    build: Callable[[], Program], sizes: dict[str, int], tmp_path: Path
) -> None:
    program = build()
    loaded = load(save(program, tmp_path / "p"))
    for inputs in (program.example(1, **sizes), program.example(2, height=40, width=40)
                   if build is pooled else program.example(2)):  # fmt: skip
        assert same(program(**inputs), loaded(**inputs))


def test_a_step_graph_comes_back_with_its_state_inputs(tmp_path: Path) -> None:
    step = insert_state(attending())
    loaded = load(save(step.program, tmp_path / "p"))
    inputs = (torch.tensor([[3, 4, 5]]), *step.empty_state(1))
    assert same(step.program.graph_module(*inputs), loaded.graph_module(*inputs))
    key = loaded.placeholders[1]
    assert dims(key)[2] == loaded.symbols["past"]
    assert loaded.dimensions["past"].minimum == 0


def test_shapes_are_symbolic_again(program: Program, saved: Path) -> None:
    loaded = load(saved)
    batch, sequence = loaded.symbols["batch"], loaded.symbols["sequence"]
    assert batch != sequence
    assert dims(loaded.output_nodes["logits"]) == (batch, sequence, 11)
    for before, after in zip(program.graph.nodes, loaded.graph.nodes, strict=True):
        if isinstance(before.meta.get("val"), Tensor):
            assert len(dims(before)) == len(dims(after)), before
            assert before.meta["val"].dtype == after.meta["val"].dtype, before


def test_a_dimension_that_follows_from_another_stays_so(tmp_path: Path) -> None:
    program = paired()
    loaded = load(save(program, tmp_path / "p"))
    short, long = loaded.placeholders
    assert dims(long)[1] == 2 * dims(short)[1]
    inputs = {"short": torch.randn(3, 4), "long": torch.randn(3, 8)}
    assert same(program(**inputs), loaded(**inputs))


def test_two_names_of_one_size_stay_equal(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    specs = (Input("x", torch.float32, ("rows",)), Input("y", torch.float32, ("lines",)))
    program = export(Sum(), specs, {"x": torch.randn(4), "y": torch.randn(4)})
    first, second = load(save(program, tmp_path / "p")).placeholders
    assert dims(first) == dims(second)


def test_graph_text_metadata_and_history_are_kept(tmp_path: Path) -> None:
    program = tied()
    program.origin.update(source="here", context_length=None, bound=math.inf, eos=[1, 2])
    program.history.append(
        Record(
            "seal", {"layer": 3}, "behaviour", 0.1, 0.2, Size(1, 2, 3, 4), Size(5, 6, 7, 8),
            math.nan, "outputs", ["one line"], {"added": []},
        )
    )  # fmt: skip
    program.history.append(
        Record("fold", {}, "exact", 1, 0.0, Size(1, 1, 1, 1), Size(1, 1, 1, 1), None, "none")
    )
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    first.meta["made_by"] = "seal"
    loaded = load(save(program, tmp_path / "p"))
    assert str(loaded.graph) == str(program.graph)
    for before, after in zip(program.graph.nodes, loaded.graph.nodes, strict=True):
        assert before.name == after.name
        for key in ("module", "source", "made_by"):
            assert before.meta.get(key) == after.meta.get(key)
    assert repr(loaded.history) == repr(program.history)
    assert loaded.origin == program.origin
    assert loaded.inputs == program.inputs
    assert loaded.outputs == program.outputs
    assert loaded.dimensions == program.dimensions


def test_tied_weights_stay_tied_and_are_stored_once(program: Program, saved: Path) -> None:
    loaded = load(saved)
    assert loaded.weight("head.weight") is loaded.weight("embed.weight")
    assert loaded.count_bytes() == program.count_bytes()
    assert (saved / "weights.safetensors").stat().st_size < 2 * 4 * 11 * 8 + 1000
    names = [name for name, _ in loaded.weights()]
    assert sorted(names) == sorted(name for name, _ in program.weights())


def test_parameters_and_buffers_keep_their_kind(program: Program, tmp_path: Path) -> None:
    frozen = program.copy()
    weight = nn.Parameter(program.weight("norm.weight").detach(), requires_grad=False)
    frozen.set_weight("norm.weight", weight)
    loaded = load(save(frozen, tmp_path / "p"))
    kinds = {name: (type(w), w.requires_grad) for name, w in loaded.weights()}
    assert kinds == {name: (type(w), w.requires_grad) for name, w in frozen.weights()}
    assert kinds["norm.weight"] == (nn.Parameter, False)
    assert kinds["norm.bias"] == (nn.Parameter, True)
    assert kinds["scale"][0] is Tensor


def test_weights_are_memory_mapped_and_not_written_through(saved: Path, program: Program) -> None:
    loaded = load(saved)
    storage = loaded.weight("embed.weight").untyped_storage()
    assert storage.filename is not None
    with torch.no_grad():
        loaded.weight("embed.weight").zero_()
    assert not program.weight("embed.weight").eq(0).any()
    assert same(load(saved)(ids=torch.ones(1, 2, dtype=torch.int64)),
                program(ids=torch.ones(1, 2, dtype=torch.int64)))  # fmt: skip


def test_memory_order_of_weights_is_kept(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    changed.set_weight("norm.weight", torch.arange(16.0)[::2])
    changed.set_weight("head.weight", nn.Parameter(torch.randn(8, 11).T))
    loaded = load(save(changed, tmp_path / "p"))
    assert loaded.weight("head.weight").stride() == (1, 11)
    assert torch.equal(loaded.weight("head.weight"), changed.weight("head.weight"))
    assert torch.equal(loaded.weight("norm.weight"), torch.arange(16.0)[::2])


def test_overlapping_weights_are_stored_apart(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    base = torch.randn(20)
    changed.set_weight("norm.weight", base[:8])
    changed.set_weight("norm.bias", base[4:12])
    loaded = load(save(changed, tmp_path / "p"))
    assert torch.equal(loaded.weight("norm.weight"), base[:8])
    assert torch.equal(loaded.weight("norm.bias"), base[4:12])


def test_large_weights_are_sharded(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 50)
    folder = save(program, tmp_path / "p")
    files = sorted(path.name for path in folder.iterdir())
    assert files[1:-1] == [f"weights-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert files[-1] == "weights.safetensors.index.json"
    inputs = program.example()
    assert same(program(**inputs), load(folder)(**inputs))
    monkeypatch.undo()
    save(program, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["program.json", "weights.safetensors"]


def test_a_program_can_be_saved_over_the_folder_it_was_loaded_from(saved: Path) -> None:
    loaded = load(saved)
    inputs = loaded.example()
    before = loaded(**inputs)
    for _ in range(2):
        save(loaded, saved)
    assert same(before, loaded(**inputs))
    assert same(before, load(saved)(**inputs))


def test_saved_files_are_readable_by_everyone_the_umask_allows(saved: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in saved.iterdir()}
    (saved.parent / "other").write_text("")
    assert modes == {(saved.parent / "other").stat().st_mode & 0o777}


def test_arguments_of_every_kind_survive(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    node = next(n for n in changed.graph.nodes if n.op == "call_function")
    values: list[Any] = [
        None, True, 7, -1.5, math.inf, -math.inf, "text", 2 + 3j, torch.bfloat16, torch.strided,
        torch.channels_last, torch.device("cuda:1"), slice(None, 3, None), [1, [2]], (1, (2, node)),
    ]  # fmt: skip
    for value in values:
        record = json.loads(json.dumps(encode_argument(value, torch.device("cpu"), "here")))
        assert decode_argument(record, {node.name: node}, "here") == value
    nan = decode_argument(encode_argument(math.nan, torch.device("cpu"), "here"), {}, "here")
    assert math.isnan(nan)


def test_the_programs_own_device_becomes_the_cpu() -> None:
    record = encode_argument(torch.device("cuda:0"), torch.device("cuda", 0), "here")
    assert decode_argument(record, {}, "here") == torch.device("cpu")


# What cannot be saved


def test_weights_without_data_are_refused(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    changed.set_weight("norm.bias", torch.empty(8, device="meta"))
    with pytest.raises(SerializationError, match="'norm.bias' has no data"):
        save(changed, tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_node_that_calls_python_is_refused_by_name(program: Program, tmp_path: Path) -> None:
    changed = program.copy()
    node = next(n for n in changed.graph.nodes if n.op == "call_function")
    node.target = print
    with pytest.raises(SerializationError, match=f"{node.name!r} calls .*print"):
        save(changed, tmp_path / "p")


@pytest.mark.parametrize("value", [{1, 2}, torch.dtype, {3: "three"}])
def test_origin_must_be_json(program: Program, tmp_path: Path, value: object) -> None:
    changed = program.copy()
    changed.origin = {"odd": value}
    with pytest.raises(SerializationError, match=r"origin\.odd"):
        save(changed, tmp_path / "p")


def test_a_folder_that_holds_something_else_is_not_replaced(
    program: Program, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SerializationError, match=r"holds no program\.json"):
        save(program, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(SerializationError, match="is a file"):
        save(program, tmp_path / "thesis.tex")


def test_other_files_in_the_folder_are_kept(program: Program, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "tokenizer" / "deep").mkdir(parents=True)
    (saved / "tokenizer" / "deep" / "vocabulary.txt").write_text("a b")
    save(program, saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "tokenizer" / "deep" / "vocabulary.txt").read_text() == "a b"
    load(saved)


def test_parents_are_created_and_links_are_followed(program: Program, tmp_path: Path) -> None:
    save(program, tmp_path / "a" / "b")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    save(program, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    load(tmp_path / "link")


# What cannot be loaded


def test_a_folder_that_is_no_program(tmp_path: Path) -> None:
    assert "is no saved Program" in str(refused(tmp_path))
    assert "is no saved Program" in str(refused(tmp_path / "absent"))
    (tmp_path / "program.json").write_text('{"format": "something else"}')
    assert "something else" in str(refused(tmp_path))
    (tmp_path / "program.json").write_text("[]")
    refused(tmp_path)


def test_a_newer_version_says_to_upgrade(saved: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document.update(version=2, added_in_version_2=True)

    assert "upgrade fxgraft" in str(refused(edit(saved, change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "unknown field 'extra'"),
        (lambda d: d["nodes"][3].update(extra=1), "node 3 has an unknown field 'extra'"),
        (lambda d: d["inputs"][0].update(extra=1), "input 0 has an unknown field"),
        (lambda d: d["nodes"][3]["meta"].update(extra="1"), "unknown field 'extra'"),
        (lambda d: d.pop("nodes"), "no field 'nodes'"),
        (lambda d: d.update(version="1"), "'version'"),
        (lambda d: d.update(version=True), "'version'"),
        (lambda d: d["inputs"][0].update(dtype="float33"), "float33"),
        (lambda d: d["inputs"].clear(), "other inputs"),
        (lambda d: d["inputs"][0].update(default="never"), "never"),
        (lambda d: d["outputs"].pop(), "outputs"),
        (lambda d: d["weights"].pop("norm.bias"), "norm.bias"),
        (lambda d: d["weights"]["norm.bias"].update(tensor="absent"), "absent|norm.bias"),
        (lambda d: d["weights"]["norm.bias"].update(order=[1, 0]), "order"),
        (lambda d: d["nodes"].append(d["nodes"][3]), "occurs twice"),
        (lambda d: d["nodes"].insert(0, d["nodes"].pop()), "node"),
        (lambda d: d["nodes"].pop(), "."),
        (lambda d: d["dimensions"].clear(), "."),
    ],
)
def test_damaged_json_is_one_clear_error(
    saved: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    error = refused(edit(saved, change))
    assert error.remedy
    with pytest.raises(SerializationError, match=message):
        raise error


def test_missing_and_foreign_weights(program: Program, saved: Path, tmp_path: Path) -> None:
    weights = saved / "weights.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    assert "weights.safetensors is missing" in str(refused(saved))
    other = save(pooled(), tmp_path / "other")
    shutil.copy(other / "weights.safetensors", weights)
    assert "is missing from" in str(refused(saved))
    weights.write_bytes(content)
    load(saved)


HOSTILE_TARGETS = [
    "os.system",
    "builtins.eval",
    "__import__",
    "operator.attrgetter",
    "operator.methodcaller",
    "operator.call",
    "torch.load",
    "torch.sym_max.__globals__",
    "math.ceil.__call__",
    "aten.save.default",
    "aten.from_file.default",
    "aten.manual_seed.default",
    "aten.__class__.default",
    "aten.linear.__call__",
    "aten.linear.op",
    "aten.linear.py_impl",
    "aten.__init__.default",
    "aten.load_library.default",
    "prims.__dict__.clear",
    "fxgraft.nonsense.default",
    "quantized.linear.default",
    "higher_order.cond",
    "transformers.anything.default",
    "aten..default",
    "aten.linear.",
    ".linear.default",
    "",
    "__import__('os').system('touch MARK')",
]


@pytest.mark.parametrize("target", HOSTILE_TARGETS)
def test_only_operators_can_be_called(saved: Path, target: str) -> None:
    mark = saved / "mark"
    target = target.replace("MARK", str(mark))

    def change(document: dict[str, Any]) -> None:
        node = next(n for n in document["nodes"] if n["op"] == "call_function")
        node.update(target=target, args=[f"touch {mark}"], kwargs={})

    assert repr(target) in str(refused(edit(saved, change)))
    assert not mark.exists()


CODE = "__import__('pathlib').Path('MARK').touch()"
INJECTIONS: list[Callable[[dict[str, Any], str], object]] = [
    lambda d, code: d["nodes"][0].update(name=code),
    lambda d, code: d["nodes"][0].update(name=f"x=1;{code}"),
    lambda d, code: d["nodes"][0].update(target=code),
    lambda d, code: d["nodes"][-1].update(target=code),
    lambda d, code: d["nodes"][3].update(op="call_method"),
    lambda d, code: d["nodes"][3].update(op="call_module"),
    lambda d, code: d["nodes"][3]["kwargs"].update({code: 1}),
    lambda d, code: d["nodes"][3]["args"].append({"sympy": code}),
    lambda d, code: d["nodes"][3]["args"].append({"node": code}),
    lambda d, code: d["nodes"][3]["args"].append({"dtype": code}),
    lambda d, code: d["nodes"][3]["args"].append({"device": code}),
    lambda d, code: d["nodes"][3]["args"].append({"float": code}),
    lambda d, code: d["nodes"][3]["args"].append({"complex": [code, "0"]}),
    lambda d, code: d["inputs"][0].update(dtype=code),
    lambda d, code: d["inputs"][0].update(shape=[code, 7]),
    lambda d, code: d["inputs"][0].update(name=code),
    lambda d, code: d["dimensions"]["batch"].update(derived={code: [1]}),
    lambda d, code: d["dimensions"]["batch"].update(maximum=code),
    lambda d, code: d["weights"].update({f'a"); {code}; ("': d["weights"]["scale"]}),
    lambda d, code: d["weights"].update({"../../escape": d["weights"]["scale"]}),
    lambda d, code: d["weights"].update({"forward": d["weights"]["scale"]}),
    lambda d, code: d["weights"].update({"_modules.x": d["weights"]["scale"]}),
    lambda d, code: d["weights"]["scale"].update(tensor="../../../etc/passwd"),
]


@pytest.mark.parametrize("change", INJECTIONS)
def test_nothing_in_the_file_is_evaluated(
    saved: Path, change: Callable[[dict[str, Any], str], object]
) -> None:
    mark = saved / "mark"
    refused(edit(saved, lambda document: change(document, CODE.replace("MARK", str(mark)))))
    assert not mark.exists()


def test_a_derived_dimension_holds_numbers_and_names_only(saved: Path) -> None:
    mark = saved / "mark"
    code = CODE.replace("MARK", str(mark))

    def change(document: dict[str, Any]) -> None:
        document["dimensions"]["batch"]["derived"] = {"add": [code, 1]}

    program = load(edit(saved, change))
    assert not mark.exists()
    assert program.graph


@pytest.mark.parametrize("file", ["../weights.safetensors", "/etc/passwd", "program.json", 3])
def test_the_index_cannot_point_outside(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: object
) -> None:
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 50)
    folder = save(program, tmp_path / "p")
    index = folder / "weights.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["scale"] = file
    index.write_text(json.dumps(document))
    assert "index.json" in str(refused(folder))


@FUZZ
@given(data=st.data())
def test_a_truncated_file_is_always_refused(
    data: st.DataObject, program: Program, tmp_path: Path
) -> None:
    folder = tmp_path / "p"
    if not folder.exists():
        save(program, folder)
    name = data.draw(st.sampled_from(["program.json", "weights.safetensors"]))
    content = (folder / name).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    (folder / name).write_bytes(content[:length])
    try:
        refused(folder)
    finally:
        (folder / name).write_bytes(content)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON document."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, item in pairs:
        yield value, key
        if isinstance(item, (dict, list)):
            yield from places(item)


@FUZZ
@given(data=st.data())
def test_changed_json_loads_or_is_refused(
    data: st.DataObject, program: Program, tmp_path: Path
) -> None:
    folder = tmp_path / "p"
    if not folder.exists():
        save(program, folder)
    original = (folder / "program.json").read_text()
    document = json.loads(original)
    container, key = data.draw(st.sampled_from(list(places(document))))
    scalars = st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3)
    container[key] = data.draw(
        scalars | st.floats(allow_nan=False, allow_infinity=False) | st.lists(scalars, max_size=2)
        | st.dictionaries(st.sampled_from(["node", "tuple", "slice", "dtype", "float"]), scalars)
    )  # fmt: skip
    (folder / "program.json").write_text(json.dumps(document))
    try:
        load(folder)
    except SerializationError as error:
        assert error.remedy
    finally:
        (folder / "program.json").write_text(original)


def test_deep_nesting_is_refused(saved: Path) -> None:
    (saved / "program.json").write_text('{"format":' + "[" * 500 + "]" * 500 + "}")
    assert "nested" in str(refused(saved))
    (saved / "program.json").write_text("[" * 10**6)
    refused(saved)


# Interrupted saves


@pytest.fixture(params=["exchange", "two renames"])
def swapping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with and without a file system that can swap folders in one step."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    return request.param


def run_in_child(work: Callable[[], object]) -> int:
    """Run in a forked process; its exit code, or minus the signal that killed it."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except SerializationError:
            code = 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(event: int, work: Callable[[], object]) -> Callable[[], object]:
    """Do the work in a process that dies at its n-th file operation."""

    def run() -> None:
        count = 0

        def hook(name: str, args: object) -> None:
            nonlocal count
            if name == "os.kill":
                return
            if name == "open" or name.startswith(("os.", "shutil.", "ctypes.")):
                count += 1
                if count > event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        work()

    return run


def shifted(program: Program) -> Program:
    """The Program with another weight, so that old and new can be told apart."""
    changed = program.copy()
    changed.set_weight("norm.bias", nn.Parameter(torch.ones(8)))
    return changed


@pytest.mark.usefixtures("swapping")
def test_a_killed_save_leaves_the_old_or_the_new_program(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "p"
    new = shifted(program)
    found: list[str] = []
    for event in range(200):
        save(program, folder)
        code = run_in_child(kill_at(event, lambda: save(new, folder)))
        bias = load(folder).weight("norm.bias")
        is_new = torch.equal(bias, torch.ones(8))
        assert is_new or torch.equal(bias, program.weight("norm.bias"))
        found.append("new" if is_new else "old")
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert found == sorted(found, reverse=True)
    assert len(found) > 10
    assert found[0] == "old"
    assert found.count("new") >= 2
    save(program, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.usefixtures("swapping")
def test_a_full_disk_leaves_the_old_program(
    program: Program, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    for calls in range(6):
        left = calls

        def full(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        try:
            save(shifted(program), saved)
        except SerializationError as error:
            assert "disk is full" in str(error)
            assert "free some space" in str(error)
        else:
            break
        finally:
            monkeypatch.undo()
        assert [path.name for path in saved.parent.iterdir()] == ["saved"]
        load(saved)
    assert calls >= 4


def test_a_file_size_limit_is_reported(program: Program, saved: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        save(shifted(program), saved)

    assert run_in_child(limited) == 3
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]
    assert torch.equal(load(saved).weight("norm.bias"), program.weight("norm.bias"))


def test_a_folder_that_cannot_be_written(program: Program, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SerializationError, match="cannot be written"):
        save(program, tmp_path / "file" / "p")


def test_leftovers_of_running_processes_are_not_touched(program: Program, tmp_path: Path) -> None:
    running = tmp_path / f"{atomic._prefix(tmp_path / 'p')}{os.getpid()}-0"  # pyright: ignore[reportPrivateUsage]
    running.mkdir()
    save(program, tmp_path / "p")
    assert running.is_dir()
