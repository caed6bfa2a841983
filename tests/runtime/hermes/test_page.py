"""docs/hermes.md names every key that a system file may have, and every choice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from fxgraft.runtime.hermes import System
from fxgraft.runtime.hermes.config import clients, costs, links
from fxgraft.runtime.hermes.dense import MODELS
from fxgraft.runtime.hermes.llm.scheduler import Strategy
from fxgraft.runtime.hermes.routing import Measure, Policy
from fxgraft.runtime.hermes.section import Section
from fxgraft.runtime.hermes.stages import KINDS
from fxgraft.runtime.hermes.workload import arrivals, lengths, workload

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "hermes.md").read_text(encoding="utf-8")
NAMED = {word for code in re.findall(r"`([^`\n]+)`", PAGE) for word in re.findall(r"\w+", code)}
MODULES = (clients, costs, links, arrivals, lengths, workload)


def sections() -> list[type[Section]]:
    found: dict[type[Section], None] = {System: None}
    for module in MODULES:
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Section):
                found[value] = None
    return list(found)


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_is_named(section: type[Section]) -> None:
    shown = NAMED | set(re.findall(r"^\s*-? ?(\w+):", PAGE, re.MULTILINE))
    assert [key for key in section.model_fields if key not in shown] == []


def test_all_sections_are_looked_at() -> None:
    names = {section.__name__ for section in sections()}
    assert {"LlmSection", "StorageLevelSection", "PipelineCost", "NetworkSection", "RouterSection",
            "Bursty", "Keys", "SharedPrefix", "StageSection", "Workload"} <= names  # fmt: skip


@pytest.mark.parametrize("choices", [Strategy, Policy, Measure], ids=str)
def test_every_choice_is_named(choices: Any) -> None:
    assert [name for name in get_args(choices) if name not in NAMED] == []


def test_every_stage_kind_and_model_is_named() -> None:
    assert [kind for kind in KINDS if kind not in NAMED] == []
    assert [model for model in MODELS if f"`{model}`" not in PAGE] == []
