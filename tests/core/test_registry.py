"""Finding passes: built-in ones, a real installed plug-in, and broken ones."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxgraft.passes
from fxgraft import registry
from fxgraft.errors import InputError, PassError
from fxgraft.pipeline import Pipeline, json_schema
from tests.core.small_passes import tiny_program

_MADE_UP = {"demo_module", "broken_module", "twin_module", "demo_family", "demo_twin"}
PLUGIN = Path(__file__).parents[1] / "plugin"
_PASS_SOURCE = """
from typing import ClassVar
from fxgraft.transform import Effect, Pass

class {name}(Pass):
    effect: ClassVar = Effect.EXACT

    def run(self, program):
        pass
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the plug-in of ``tests/plugin``."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options,
         "--target", str(folder / "site"), str(folder / "source")],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    return folder / "site"


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    registry.refresh()
    yield
    registry.refresh()
    for name in [name for name in sys.modules if name.split(".")[-1] in _MADE_UP]:
        del sys.modules[name]


def add_plugin(folder: Path, entry_points: str, **modules: str) -> None:
    """Lay out a distribution ``demo-plugin 0.5`` as pip would have installed it."""
    info = folder / "demo_plugin-0.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: demo-plugin\nVersion: 0.5\n")
    (info / "entry_points.txt").write_text(f"[fxgraft.passes]\n{entry_points}\n")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)


def test_an_installed_plug_in_works_by_name(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(installed), *sys.path])
    assert "scale_logits" in registry.names()
    assert registry.find("scale_logits").__module__ == "fxgraft_scale_logits"
    program = tiny_program()
    result = Pipeline.parse([{"scale_logits": {"factor": 0.5}}]).run(program)
    values = program.example()
    assert result(**values)[0].equal(program(**values)[0] * 0.5)
    assert result.history[0].config == {"factor": 0.5}
    settings = json_schema()["$defs"]["ScaleLogits"]["properties"]["factor"]
    assert settings["description"] == "What the logits are multiplied by."


def test_an_unknown_pass_is_refused_with_a_suggestion(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(installed), *sys.path])
    with pytest.raises(InputError, match="did you mean 'scale_logits'") as caught:
        registry.find("scale_logit")
    assert "scale_logits" in caught.value.remedy


def test_a_broken_plug_in_does_not_harm_the_others(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_plugin(tmp_path, "broken = broken_module:Broken", broken_module="import not_there")
    monkeypatch.setattr(sys, "path", [str(installed), *sys.path])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert registry.find("scale_logits")
    with pytest.warns(UserWarning, match="pass 'broken'"):
        assert "broken" not in registry.passes()
    with pytest.raises(PassError) as caught:
        registry.find("broken")
    assert "'broken' of the distribution demo-plugin 0.5 cannot be imported" in str(caught.value)
    assert "No module named 'not_there'" in str(caught.value)


@pytest.mark.parametrize("entry", ["demo = demo_module:VALUE", "other = demo_module:Demo"])
def test_an_entry_point_must_give_the_pass_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    source = _PASS_SOURCE.format(name="Demo") + "VALUE = 3\n"
    add_plugin(tmp_path, entry, demo_module=source)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(PassError, match="which is no pass of that name"):
        registry.find(entry.split()[0])


def test_a_subpackage_of_passes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "demo_family"
    package.mkdir()
    (package / "first.py").write_text(_PASS_SOURCE.format(name="FirstOne"))
    source = (
        "from fxgraft.passes.demo_family.first import FirstOne\nfrom fxgraft.transform import Pass"
    )
    (package / "__init__.py").write_text(source)
    monkeypatch.setattr(fxgraft.passes, "__path__", [*fxgraft.passes.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    found = registry.find("first_one")
    assert found.__module__ == "fxgraft.passes.demo_family.first"
    assert "pass" not in registry.names()


def test_two_passes_of_one_name_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "demo_twin"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(_PASS_SOURCE.format(name="Twin"))
    monkeypatch.setattr(
        fxgraft.passes, "__path__", [*fxgraft.passes.__path__, str(tmp_path / "packages")]
    )
    add_plugin(tmp_path, "twin = twin_module:Twin", twin_module=_PASS_SOURCE.format(name="Twin"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(PassError, match=r"'twin' is defined twice: by fxgraft\.passes\.demo_twin"):
        registry.names()
