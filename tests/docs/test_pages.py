"""The pages say what is so: their code runs, their commands, links and names exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from fxgraft import registry, sources
from fxgraft.backend import backend_names
from fxgraft.backends.torch import backend as torch_backend
from fxgraft.cli.main import app
from fxgraft.kernels.spec import specs
from fxgraft.pipeline import PipelineFile
from fxgraft.runtime.hermes import System
from tests import model_folder
from tests.docs._pages import ROOT, blocks_of, run_page

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_OWN_TEST = {"write_a_pass.md", "onnx.md"}
RUNNABLE = [
    page
    for page in PAGES
    if page.name not in _OWN_TEST and any(block.is_run for block in blocks_of(page, "python"))
]
ROOMS = ("frontends", "passes", "backends", "runtime", "kernels")
OTHER_FOLDERS = ("src/fxgraft", "tests", "benchmarks", "examples", "docs", ".ci")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(rf"(?:{'|'.join((*ROOMS, *OTHER_FOLDERS))})(?:/[\w.-]+)+/?")

named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture
def small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model's alias gives a tiny one, in an empty folder, without a C++ compiler."""
    folder = tmp_path / "model"
    # 48 heads, of which the README's sparsity removes one.
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    model_folder.write(folder, model_folder.llama(**heads))
    monkeypatch.setattr(sources, "embedded_model", lambda: folder)
    monkeypatch.setattr(torch_backend, "inductor_problem", lambda: "tests do not compile")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_the_page_says(page: Path) -> None:
    run_page(page)


def test_every_concept_page_is_run() -> None:
    concepts = {"op.md", "program.md", "pass.md", "pipeline.md", "backend.md", "runtime.md"}
    assert concepts | {"README.md", "capture.md", "benchmarks.md"} <= {p.name for p in RUNNABLE}


@named
def test_links_lead_somewhere(page: Path) -> None:
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    targets = [link.partition("#")[0] for link in _LINK.findall(text)]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


@named
def test_named_paths_exist(page: Path) -> None:
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    paths = [found[0] for code in _INLINE.findall(text) if (found := _PATH.fullmatch(code))]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@named
def test_shown_commands_exist_with_their_options(page: Path) -> None:
    commands = cast(Any, typer.main.get_command(app)).commands
    for words in _shown_commands(page, "fxgraft"):
        name, *arguments = words
        assert name in commands, f"fxgraft {name}"
        # Parses like a call from the shell, and raises for what a shell would refuse.
        commands[name].make_context(name, list(arguments))
    for code in _inline_commands(page):
        name, *arguments = code
        assert name in commands, f"fxgraft {name}"
        options = {flag for option in commands[name].params for flag in _flags(option)}
        assert {word for word in arguments if word.startswith("--")} <= options | {"--help"}


@named
def test_shown_commands_name_files_and_targets_that_exist(page: Path) -> None:
    for words in [*_shown_commands(page, "fxgraft"), *_shown_commands(page, "python")]:
        files = [word for word in words if word.startswith(("examples/", "benchmarks/"))]
        assert [file for file in files if not (ROOT / file).is_file()] == []
    for words in _shown_commands(page, "fxgraft"):
        if words[0] == "bench" and len(words) > 1 and not words[1].startswith("-"):
            assert (ROOT / "benchmarks" / f"{words[1]}.py").is_file()
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {words[0] for words in _shown_commands(page, "make")} <= targets


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name != "write_a_pass.md"], ids=lambda page: page.name
)
def test_yaml_blocks_are_pipelines_or_systems(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks_of(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block.body)
        if re.search("^clients:", block.body, re.MULTILINE):
            assert System.read(file).clients
        else:
            assert PipelineFile.read(file).pipeline.passes


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda f: f.name)
def test_examples_are_pipelines(file: Path) -> None:
    assert PipelineFile.read(file).pipeline.passes


def test_the_readme_shows_the_example_as_it_is() -> None:
    (shown,) = blocks_of(ROOT / "README.md", "yaml")
    assert shown.body == (ROOT / "examples" / "prune_heads.yaml").read_text()


def test_the_code_map_is_complete() -> None:
    core = ROOT / "src" / "fxgraft"
    expected = {f"{folder}/" for folder in (*ROOMS, *OTHER_FOLDERS)}
    for room in ROOMS:
        expected |= {f"{room}/{folder}/" for folder in _folders(ROOT / room)}
    expected |= {f"src/fxgraft/{file.name}" for file in core.glob("*.py")}
    expected |= {f"src/fxgraft/{folder}/" for folder in _folders(core) if folder not in ROOMS}
    assert set(_code_map()) == expected


def test_every_entry_of_the_code_map_is_explained() -> None:
    entries = _code_map()
    assert [path for path, meaning in entries.items() if not meaning] == []
    assert len(set(entries.values())) > len(entries) * 0.9


def test_ops_passes_and_backends_are_named() -> None:
    assert _missing("op.md", specs()) == []
    assert _missing("pass.md", _built_in_passes()) == []
    assert _missing("backend.md", backend_names()) == []
    readme = (ROOT / "README.md").read_text()
    assert [name for name in _built_in_passes() if f"`{name}`" not in readme] == []


def test_every_command_has_a_section_with_all_its_options() -> None:
    commands = cast(Any, typer.main.get_command(app)).commands
    text = (ROOT / "docs/cli.md").read_text()
    sections = re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert [name for name, _ in sections] == list(commands)
    for name, section in sections:
        options = [
            _flags(option) for option in commands[name].params if _flags(option)[0][0] == "-"
        ]
        undescribed = [flags for flags in options if not any(flag in section for flag in flags)]
        assert undescribed in ([], [["--json"]])
        shown = set(re.findall(r"--[a-z][a-z-]*", section))
        assert shown <= {flag for flags in options for flag in flags}


def _missing(page: str, names: Any) -> list[str]:
    text = (ROOT / "docs" / page).read_text()
    return [name for name in names if f"`{name}`" not in text]


def _built_in_passes() -> list[str]:
    kinds = {name: registry.find(name) for name in registry.names()}
    return [name for name, kind in kinds.items() if kind.__module__.startswith(registry.GROUP)]


def _folders(parent: Path) -> list[str]:
    """Names of the folders that hold source files."""
    return [
        folder.name
        for folder in parent.iterdir()
        if folder.is_dir() and any(file.suffix in (".py", ".html") for file in folder.iterdir())
    ]


def _code_map() -> dict[str, str]:
    """Path of each entry and what is said about it; entries are indented below their folder."""
    text = (ROOT / "README.md").read_text().split("## Code map")[1]
    entries: dict[str, str] = {}
    folder = ""
    for line in cast("re.Match[str]", re.search(r"```text\n(.*?)```", text, re.DOTALL))[1].split(
        "\n"
    ):
        name, _, meaning = line.strip().partition(" ")
        if not name:
            continue
        if not line.startswith(" "):
            folder = ""
        assert folder + name not in entries, name
        entries[folder + name] = meaning.strip()
        if not line.startswith(" "):
            folder = name
    return entries


def _shown_commands(page: Path, program: str) -> Iterator[list[str]]:
    """The words after ``program`` in each line of the page's ``bash`` blocks."""
    for block in blocks_of(page, "bash"):
        for line in block.body.splitlines():
            words = shlex.split(line, comments=True)
            if ">" in words:
                words = words[: words.index(">")]
            if words and words[0] == program:
                yield words[1:]


def _inline_commands(page: Path) -> Iterator[list[str]]:
    """The words after ``fxgraft`` in code inside of sentences."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    for code in _INLINE.findall(text):
        words = code.split()
        if words[0] == "fxgraft" and len(words) > 1 and words[1].islower():
            yield words[1:]


def _flags(option: Any) -> list[str]:
    return [*option.opts, *option.secondary_opts]
