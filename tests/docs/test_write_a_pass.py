"""The page ``docs/write_a_pass.md`` runs as it stands, and prints what it says."""

from __future__ import annotations

import tomllib

import yaml

from fxgraft.pipeline import Pipeline
from fxgraft.transform import Pass
from tests.docs._pages import ROOT, blocks_of, run_page

PAGE = ROOT / "docs" / "write_a_pass.md"


def blocks(language: str) -> list[str]:
    return [block.body for block in blocks_of(PAGE, language)]


def test_the_page_runs_and_prints_what_it_says() -> None:
    assert len(blocks("text")) == 5
    namespace = run_page(PAGE)
    assert issubclass(namespace["BanTokens"], Pass)
    (entry,) = [yaml.safe_load(block)["passes"] for block in blocks("yaml")]
    ((name, settings),) = entry[0].items()
    made = namespace[name.title().replace("_", "")].from_config(settings)
    assert isinstance(Pipeline.parse([made]).passes[0], Pass)
    (toml,) = blocks("toml")
    assert tomllib.loads(toml)["project"]["entry-points"]["fxgraft.passes"].keys() == {name}


def test_the_pass_is_thirty_lines() -> None:
    source = blocks("python")[0]
    lines = [line for line in source[source.index("class ") :].splitlines() if line.strip()]
    assert len(lines) <= 30
