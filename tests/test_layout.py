"""The repository's own laws: links, names, files of an op, docstrings, generated pages."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxgraft.passes
from fxgraft import registry, results
from fxgraft.errors import Error
from fxgraft.kernels.spec import register, specs
from fxgraft.transform import Pass

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "fxgraft"
PACKAGES = sorted(path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests")
OPS = sorted(path.parent.name for path in ROOT.glob("kernels/*/__init__.py"))
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def test_the_root_packages_are_those_of_the_design() -> None:
    names = {"passes", "runtime", "kernels", "frontends", "backends"}
    assert {path.name for path in PACKAGES} == names


def test_every_root_package_has_a_link_and_every_link_resolves() -> None:
    """A checkout without symbolic links (Windows) has text files here."""
    links = {path.name: path for path in SOURCE.iterdir() if path.is_symlink()}
    assert links.keys() == {path.name for path in PACKAGES}
    for package in PACKAGES:
        link = links[package.name]
        assert not link.readlink().is_absolute()
        assert link.resolve(strict=True) == package


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_root_packages_are_imported_under_fxgraft(package: Path) -> None:
    module = importlib.import_module(f"fxgraft.{package.name}")
    assert module.__doc__
    assert Path(module.__file__ or "").resolve().parent == package


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_its_files_and_its_folders_name(name: str) -> None:
    folder = ROOT / "kernels" / name
    assert {"__init__.py", "op.py", "reference.py", "cost.py"} <= {
        path.name for path in folder.iterdir()
    }
    spec = specs()[name]
    assert spec.name == name
    assert spec.overload.name() == f"fxgraft::{name}"  # pyright: ignore[reportUnknownMemberType]
    assert spec.reference.__module__ == f"fxgraft.kernels.{name}.reference"
    assert importlib.import_module(f"fxgraft.kernels.{name}.op").__doc__


def test_every_op_is_registered_once() -> None:
    assert sorted(name for name in specs() if (ROOT / "kernels" / name).is_dir()) == OPS
    with pytest.raises(Error, match="'attention' is registered twice"):
        register(specs()["attention"])


def test_no_two_passes_share_a_name() -> None:
    classes: set[type[Pass]] = set()
    for info in pkgutil.walk_packages(fxgraft.passes.__path__, "fxgraft.passes."):
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, type) and issubclass(value, Pass) and value is not Pass:
                classes.add(value)
    counts = Counter(kind.name for kind in classes)
    assert counts
    assert not [name for name, count in counts.items() if count > 1]
    assert counts.keys() <= set(registry.names())


def test_every_pass_is_in_a_folder_of_its_name() -> None:
    for name, kind in registry.passes().items():
        if kind.__module__.startswith("fxgraft."):
            assert kind.__module__.split(".")[2] == name


def public_definitions(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """The module, its public functions and classes, and their public methods."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    yield str(file.relative_to(ROOT)), module
    pending: list[tuple[str, ast.stmt]] = [("", node) for node in module.body]
    while pending:
        prefix, node = pending.pop()
        if not isinstance(node, DEFINITIONS) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            pending += [(f"{prefix}{node.name}.", child) for child in node.body]
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if "overload" not in decorators:
            yield f"{file.relative_to(ROOT)}: {prefix}{node.name}", node


def test_every_public_name_has_a_docstring() -> None:
    folders = [SOURCE, *PACKAGES]
    files = sorted({file.resolve() for folder in folders for file in folder.rglob("*.py")})
    assert len(files) > 100
    missing = [
        place
        for file in files
        for place, node in public_definitions(file)
        if isinstance(node, (ast.Module, *DEFINITIONS)) and not ast.get_docstring(node)
    ]
    assert not missing


def test_the_page_of_results_is_up_to_date() -> None:
    page, folder = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results"
    found = results.read_all(folder)
    if not found and not page.exists():
        pytest.skip("no benchmark has run yet")
    expected = results.page(found, folder, page)
    advice = "run: fxgraft bench --page docs/results.md"
    assert page.is_file(), advice
    assert page.read_text(encoding="utf-8") == expected, advice
