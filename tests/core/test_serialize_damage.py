"""Loading hostile and damaged folders: nothing is executed, each mistake is one clear error."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxgraft import weight_files
from fxgraft.errors import SerializationError
from fxgraft.program import Program
from fxgraft.serialize import load, save
from tests.core.saved_programs import edit, pooled, refused, tied

FUZZ = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
    return tied()


@pytest.fixture
def saved(program: Program, tmp_path: Path) -> Path:
    return save(program, tmp_path / "saved")


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


DAMAGE: list[tuple[Callable[[dict[str, Any]], object], str]] = [
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
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
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
    lambda d, code: d["nodes"][3]["args"].append({"device": "cuda:99999999999"}),
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
    keys: list[Any] = list(value.keys() if hasattr(value, "keys") else range(len(value)))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


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
        with contextlib.suppress(SerializationError):
            assert load(folder).graph
    finally:
        (folder / "program.json").write_text(original)


def test_deep_nesting_is_refused(saved: Path) -> None:
    (saved / "program.json").write_text('{"format":' + "[" * 500 + "]" * 500 + "}")
    assert "nested" in str(refused(saved))
    (saved / "program.json").write_text("[" * 10**6)
    refused(saved)
