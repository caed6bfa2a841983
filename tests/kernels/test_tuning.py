"""Tables of tuned configurations: what is found again, what is refused, what is left alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from fxgraft.errors import SerializationError
from fxgraft.kernels.fused_linear import config as fused_linear
from fxgraft.kernels.tuning import Key, TunedTable, cache_folder


@dataclass(frozen=True)
class Blocks:
    """A configuration."""

    kernel: str
    block: int = 16


KEY = Key("A GPU", "torch.bfloat16", (4096, 1024, 8))
OTHER = Key("A GPU", "torch.bfloat16", (4096, 1024, 16))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FXGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _write(path: Path, entries: dict[Key, Blocks]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {key.text(): asdict(blocks) for key, blocks in entries.items()}
    path.write_text(json.dumps({"version": 1, "entries": texts}))


def test_what_was_put_is_found_by_another_process(folder: Path) -> None:
    TunedTable("product", Blocks).put({KEY: Blocks("fast", 64)})
    TunedTable("product", Blocks).put({OTHER: Blocks("slow")})
    table = TunedTable("product", Blocks)
    assert table.get(KEY) == Blocks("fast", 64)
    assert table.get(OTHER) == Blocks("slow")
    assert table.get(Key("A GPU", "torch.float16", KEY.sizes)) is None
    assert table.get(Key("B GPU", KEY.dtype, KEY.sizes)) is None
    assert table.path == folder / "product.json"


def test_putting_replaces_what_this_process_has_read() -> None:
    table = TunedTable("product", Blocks)
    assert table.get(KEY) is None
    table.put({KEY: Blocks("a")})
    assert table.get(KEY) == Blocks("a")
    table.put({KEY: Blocks("b")})
    assert table.get(KEY) == Blocks("b")


def test_the_users_entries_count_before_those_of_the_package(tmp_path: Path) -> None:
    shipped = tmp_path / "package" / "tuned.json"
    _write(shipped, {KEY: Blocks("shipped"), OTHER: Blocks("shipped")})
    before = shipped.read_bytes()
    table = TunedTable("product", Blocks, shipped)
    assert table.get(KEY) == Blocks("shipped")
    table.put({KEY: Blocks("own")})
    assert table.get(KEY) == Blocks("own")
    assert table.get(OTHER) == Blocks("shipped")
    assert shipped.read_bytes() == before
    assert OTHER.text() not in table.path.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"version": 1}',
        '{"version": 2, "entries": {}}',
        '{"version": 1, "entries": []}',
        '{"version": 1, "entries": {"k": {"kernel": "a"}}}',
        '{"version": 1, "entries": {"k": {"kernel": "a", "block": 1, "other": 2}}}',
        '{"version": 1, "entries": {"k": 7}}',
        "\xff",
    ],
)
def test_a_file_that_is_no_table(text: str) -> None:
    table = TunedTable("product", Blocks)
    table.path.parent.mkdir(parents=True)
    table.path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SerializationError, match=r"product\.json cannot be read.*\n.*delete"):
        table.get(KEY)
    with pytest.raises(SerializationError):
        table.put({KEY: Blocks("a")})
    assert table.path.read_bytes() == text.encode("latin-1")


def test_a_table_is_never_half_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = TunedTable("product", Blocks)
    table.put({KEY: Blocks("a")})

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="no space"):
        table.put({KEY: Blocks("b")})
    assert TunedTable("product", Blocks).get(KEY) == Blocks("a")
    assert [path.name for path in folder.iterdir()] == ["product.json"]


def test_where_tables_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FXGRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fxgraft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "fxgraft"


def test_the_shipped_table_of_linear_layers() -> None:
    """It can be read, and a shape that was measured on an H100 comes from it."""
    assert fused_linear.TABLE.shipped is not None
    assert fused_linear.TABLE.shipped.is_file()
    key = Key("NVIDIA H100 80GB HBM3", str(torch.bfloat16), (4096, 4096, 1))
    assert TunedTable("none", fused_linear.Config, fused_linear.TABLE.shipped).get(key) is not None


def test_a_rule_where_nothing_was_measured() -> None:
    cpu = torch.device("cpu")
    chosen = fused_linear.config_for(cpu, torch.bfloat16, 48, 80, 3)
    assert chosen == fused_linear.rule(torch.bfloat16, 48, 80, 3)
