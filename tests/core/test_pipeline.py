"""Pipelines from Python and YAML: parsing, validation before anything runs, and running."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgraft import registry
from fxgraft.errors import ContractError, InputError, NumericError
from fxgraft.pipeline import Pipeline, PipelineFile, json_schema
from fxgraft.program import Program
from fxgraft.transform import Pass
from fxgraft.yaml_source import YamlSource
from tests.core.small_passes import HalvePrecision, Shift, SwapAddends, tiny_program

_ENTRY_POINTS = """[fxgraft.passes]
shift = tests.core.small_passes:Shift
swap_addends = tests.core.small_passes:SwapAddends
halve_precision = tests.core.small_passes:HalvePrecision
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny_program()


@pytest.fixture(scope="module", autouse=True)
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The small passes as a plug-in, so that they have names."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "small_passes-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: small-passes\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(folder), *sys.path])
        registry.refresh()
        yield
    registry.refresh()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_file(text: str) -> Path:
        path = tmp_path / "pipeline.yaml"
        path.write_text(text)
        return path

    return write_file


# From Python


def test_passes_are_given_as_instances_names_and_mappings() -> None:
    pipeline = Pipeline.parse(
        [SwapAddends(), "shift", {"shift": {"layer": 1}}, {"halve_precision": None}]
    )
    assert pipeline.passes == (SwapAddends(), Shift(), Shift(layer=1), HalvePrecision())
    assert Pipeline.parse(pipeline) is pipeline


@pytest.mark.parametrize(
    ("spec", "message"),
    cast(
        list[tuple[Any, str]],
        [
            (["shfit"], r"passes\[0\]: there is no pass 'shfit'; did you mean 'shift'"),
            (
                ["shift", {"shift": {"layr": 1}}],
                r"passes\[1\]: .* no key 'layr'; did you mean 'layer'",
            ),
            (
                [{"shift": {"layer": "first"}}],
                r"passes\[0\]: key 'layer' of pass 'shift' is 'first'",
            ),
            ([{"shift": {"coefficient": 1000}}], "is 1000: it should be at most 100 in size"),
            ([{"shift": 3}], "the settings of pass 'shift' are 3"),
            ([{"shift": {}, "swap_addends": {}}], "this is no pass"),
            ([Shift], "this is no pass"),
            ([7], r"passes\[0\]: this is no pass: 7"),
            ("shift", r"'shift', which is no \.yaml file"),
            (Shift(), "argument 'passes' is a Shift"),
            ("missing.yaml", r"missing\.yaml cannot be read: No such file"),
        ],
    ),
)
def test_wrong_passes_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pipeline.parse(spec)


def test_passes_run_in_order_and_leave_the_original(program: Program) -> None:
    code = program.graph_module.code
    seen: list[tuple[str, int, int]] = []

    def progress(name: str, index: int, total: int) -> None:
        seen.append((name, index, total))

    pipeline = Pipeline.parse(["swap_addends", {"shift": {"layer": 1}}])
    result = pipeline.run(program, progress=progress)
    assert seen == [("swap_addends", 0, 2), ("shift", 1, 2)]
    assert [record.name for record in result.history] == ["swap_addends", "shift"]
    assert result.history[1].before == result.history[0].after
    assert (program.graph_module.code, program.history) == (code, [])


def test_an_empty_pipeline_changes_nothing(program: Program) -> None:
    assert Pipeline(()).run(program) is program


# Validation


class First(SwapAddends):
    """Comes before ``last``."""

    before: ClassVar = frozenset({"last"})


class Last(SwapAddends):
    """Comes after ``swap_addends``, and never with ``loner``."""

    after: ClassVar = frozenset({"swap_addends"})


class Loner(SwapAddends):
    """Cannot be combined."""

    excludes: ClassVar = frozenset({"last", "shift"})


@pytest.mark.parametrize(
    ("passes", "message", "remedy"),
    [
        ([Last(), First()], "'first' must come before pass 'last'", "move 'first' before 'last'"),
        (
            [Last(), SwapAddends()],
            "'last' must come after pass 'swap_addends'",
            "move 'swap_addends' before 'last'",
        ),
        ([Loner(), Last()], "'loner' cannot be combined with pass 'last'", "leave one of them out"),
        ([Last(), Loner()], "'loner' cannot be combined with pass 'last'", "leave one of them out"),
        (
            [HalvePrecision(), Shift()],
            "'shift' requires the fact 'dense_weights', which pass 'halve_precision' before it",
            "move 'shift' before 'halve_precision'",
        ),
    ],
)
def test_an_order_that_cannot_work_is_refused(
    program: Program, passes: list[Pass], message: str, remedy: str
) -> None:
    with pytest.raises(ContractError, match=message) as caught:
        Pipeline.parse(passes).validate(program)
    assert remedy in caught.value.remedy


def test_orders_that_work_pass(program: Program) -> None:
    Pipeline.parse([First(), SwapAddends(), Last(), Shift(), HalvePrecision()]).validate(program)


def test_rules_of_passes_that_ran_count(program: Program) -> None:
    ran = Pipeline((Shift(),)).run(program, check=False)
    with pytest.raises(ContractError, match="cannot be combined with pass 'shift'"):
        Pipeline((Loner(),)).validate(ran)


def test_nothing_runs_if_a_later_pass_cannot(program: Program) -> None:
    seen: list[str] = []
    pipeline = Pipeline.parse([SwapAddends(), Shift(layer=5)])
    with pytest.raises(InputError, match="key 'layer' of pass 'shift' is 5"):
        pipeline.run(program, progress=lambda name, index, total: seen.append(name))
    assert seen == []


# From YAML


def test_a_file_gives_model_passes_backend_and_options(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    read = PipelineFile.read(
        write("""
model: model
passes:
  - swap_addends
  - shift: {layer: 1, coefficient: 1e-1, vector: vectors/a.pt}
  - halve_precision:
backend: onnx
options: {opset: 18, verbose: false}
prompt: "Grüße"
""")
    )
    vector = tmp_path / "vectors" / "a.pt"
    shift = Shift(layer=1, coefficient=0.1, vector=vector)
    assert read.pipeline.passes == (SwapAddends(), shift, HalvePrecision())
    assert read.model == str(tmp_path / "model")
    assert (read.backend, read.options) == ("onnx", {"opset": 18, "verbose": False})
    assert read.prompt == "Grüße"
    assert read.pipeline.places[1] == f"{read.path}, line 5: "


def test_a_model_that_is_no_local_path_stays(write: Callable[[str], Path]) -> None:
    assert PipelineFile.read(write("model: org/name\n")).model == "org/name"


TOP = "model \\(str \\| None\\), passes"
SHIFT = "layer \\(int\\), coefficient \\(float\\), vector"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("passes: []\nbackends: onnx\n", 2, f"no key 'backends'; did you mean 'backend'.*{TOP}"),
        ("backend: 3\n", 1, f"key 'backend' of the pipeline file is 3.*{TOP}"),
        ("model: a\npasses: shift\n", 2, f"key 'passes'.*is 'shift'.*valid list.*{TOP}"),
        ("passes:\n  - shift\n  - shfit\n", 3, "no pass 'shfit'; did you mean 'shift'"),
        ("passes:\n  - shfit:\n      layer: 1\n", 2, "no pass 'shfit'"),
        ("passes:\n  - shift: {layr: 1}\n", 2, f"no key 'layr'; did you mean 'layer'.*{SHIFT}"),
        (
            "passes:\n  - swap_addends\n  - shift:\n      coefficient: 1\n      layer: two\n",
            5,
            f"key 'layer' of pass 'shift' is 'two'.*valid integer.*{SHIFT}",
        ),
        ("passes:\n  - shift: {coefficient: yes}\n", 2, f"is 'yes'.*valid number.*{SHIFT}"),
        ("passes:\n  - shift: {coefficient: '1'}\n", 2, f"is '1'.*valid number.*{SHIFT}"),
        ("passes:\n  - shift:\n      layer: 1.5\n", 3, f"is 1.5.*valid integer.*{SHIFT}"),
        ("passes:\n  - shift:\n      coefficient: 101\n", 3, f"at most 100.*{SHIFT}"),
        ("passes:\n  - shift: [1]\n", 2, "the settings of pass 'shift' are \\[1\\]"),
        ("passes:\n  - {shift: , swap_addends: }\n", 2, "this is no pass.*the passes are: .*shift"),
        ("passes:\n- shift:\n  layer: 1\n", 2, "this is no pass"),
        ("passes:\n  - 5\n", 2, "this is no pass: 5"),
        ("model: a\nprompt: b\nmodel: c\n", 3, "key 'model' is given twice, first in line 1"),
        ("passes:\n  - shift: {layer: 1, layer: 2}\n", 2, "key 'layer' is given twice"),
        ("options: &a {x: 1}\npasses: [*a]\n", 2, "anchors and aliases"),
        ("options: &a [*a]\n", 1, "anchors and aliases"),
        ("model: !!python/object/apply:os.system ['true']\n", 1, "tag '!!python/object"),
        ("model: !!python/name:os.system x\n", 1, "tag '!!python/name"),
        ("options: !!set {a, b}\n", 1, "tag '!!set'"),
        ("options: {1: a}\n", 1, "the key '1' is no text"),
        ("passes:\n  - shift: {layer: 1\nmodel: x\n", 3, "this is no YAML"),
        ("passes:\n\t- shift\n", 2, "this is no YAML"),
        (
            "model: a\n---\nmodel: b\n",
            2,
            "this is no YAML: expected a single document in the stream: but found another document",
        ),
        ("- shift\n", 1, f"the pipeline file is \\['shift'\\].*{TOP}"),
        ("shift\n", 1, "the pipeline file is 'shift'"),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_keys(
    write: Callable[[str], Path], text: str, line: int, message: str
) -> None:
    path = write(text)
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        Pipeline.parse(path)
    assert caught.value.problem.startswith(f"{path}, line {line}")


@pytest.mark.parametrize("text", ["", "# nothing\n", "model: \x07\n", "[" * 900])
def test_a_file_without_a_pipeline_is_refused(write: Callable[[str], Path], text: str) -> None:
    path = write(text)
    with pytest.raises(InputError, match=r"pipeline\.yaml"):
        Pipeline.parse(path)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"model: \xff\xfe")
    with pytest.raises(InputError, match="it is no UTF-8 text"):
        Pipeline.parse(binary)
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        Pipeline.parse(folder)


def test_every_wrong_key_is_reported(write: Callable[[str], Path]) -> None:
    path = write("passes:\n  - shift:\n      layer: x\n      bias: 1\n")
    with pytest.raises(InputError) as caught:
        Pipeline.parse(path)
    first, second = caught.value.problem.splitlines()
    assert first.startswith(f"{path}, line 3: key 'layer'")
    assert second.startswith(f"{path}, line 4: pass 'shift' has no key 'bias'")


def test_errors_on_validating_and_running_name_the_line(
    write: Callable[[str], Path], program: Program
) -> None:
    pipeline = Pipeline.parse(write("passes:\n  - swap_addends\n  - shift: {layer: 5}\n"))
    with pytest.raises(InputError, match=r"pipeline\.yaml, line 3: key 'layer' of pass 'shift'"):
        pipeline.run(program)
    pipeline = Pipeline.parse(write("passes:\n  - halve_precision\n  - shift\n"))
    with pytest.raises(ContractError, match=r"pipeline\.yaml, line 3: pass 'shift' requires"):
        pipeline.run(program)
    pipeline = Pipeline.parse(write("passes:\n  - halve_precision: {tolerance: 1e-9}\n"))
    with pytest.raises(NumericError, match=r"pipeline\.yaml, line 2: pass 'halve_precision'"):
        pipeline.run(program)


def test_scalars_follow_the_core_schema(write: Callable[[str], Path]) -> None:
    text = "a: [1e-3, .5, -2, 010, 1_0, yes, true, ~, null, '', 2024-01-01, .inf, 0x1f, 1:30]\n"
    value = cast("dict[str, Any]", YamlSource.read(write(text)).value)
    assert value["a"] == [
        *(1e-3, 0.5, -2, 10, "1_0", "yes", True, None, None, ""),
        *("2024-01-01", float("inf"), "0x1f", "1:30"),
    ]


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abc: #-1", min_size=1, max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(value=_JSON)
def test_json_is_read_as_json_reads_it(
    value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "value.yaml"
    path.write_text(json.dumps(value))
    assert YamlSource.read(path).value == value


# The schema


def test_the_schema_accepts_what_the_parser_accepts() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    json.dumps(schema)
    good = "passes: [shift, {shift: {layer: 1, vector: a.pt}}, {shift: }]\nbackend: auto\n"
    jsonschema.validate(yaml.safe_load(good), schema)
    for bad in (
        "passes: [shfit]",
        "passes: [{shift: {layr: 1}}]",
        "passes: [{shift: {layer: one}}]",
        "passes: [{shift: {}, swap_addends: {}}]",
        "passes: shift",
        "model: 3",
        "pass: []",
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(bad), schema)


def test_the_schema_describes_passes_and_keys() -> None:
    schema = json_schema()
    shift = schema["$defs"]["Shift"]
    assert shift["description"].startswith("Behaviour: add a constant")
    assert shift["properties"]["layer"]["description"] == "The block."
    assert schema["properties"]["prompt"]["description"] == "Text to try the result on."


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")))
def test_examples_match_the_schema(file: Path) -> None:
    jsonschema.validate(yaml.safe_load(file.read_text()), json_schema())
    assert PipelineFile.read(file).pipeline.passes
