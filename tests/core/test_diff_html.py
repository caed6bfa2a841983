"""The page of a graph diff: its data, its size, and its behaviour in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxgraft import graph as graphs
from fxgraft.diff import GraphDiff, NodeChange, NodeView, diff
from fxgraft.diff_html import page_data
from fxgraft.errors import InputError
from tests.core._browser import probe
from tests.core._edits import find, insert_behind, merged, net, steered

aten = torch.ops.aten


def names(data: dict[str, Any]) -> list[str]:
    return [group["name"] for group in data["groups"]]


def test_alike_layers_are_one_group() -> None:
    data = page_data(diff(net(), steered(net(), 2)))
    assert names(data) == [
        "model.embed", "model.layers.{0, 1}", "model.layers.2", "model.layers.3", "lm_head",
    ]  # fmt: skip
    assert names(page_data(diff(net(), merged(net())))) == [
        "model.embed", "model.layers.{0..3}", "lm_head",
    ]  # fmt: skip


def test_counts_are_of_all_layers() -> None:
    found = diff(net(), merged(net()))
    data = page_data(found)
    assert data["counts"] == {"added": 12, "removed": 8, "rewired": 16, "changed": 4}
    layer = data["groups"][1]
    total = {kind: 4 * count for kind, count in layer["counts"].items()}
    unchanged = [c for c in found.context if not c.kinds and c.module.startswith("model.layers")]
    assert total.pop("same") == len(unchanged)
    assert total == data["counts"]
    assert data["named"][0]["counts"] == {"removed": 12, "added": 4}


def test_a_diff_from_json_shows_the_changes() -> None:
    found = GraphDiff.from_json(diff(net(), steered(net(), 2)).to_json())
    rows = [
        row
        for group in page_data(found)["groups"]
        for module in group["modules"]
        for row in module["rows"]
    ]
    assert [row["kinds"] for row in rows] == [("added",), ("rewired",), ("rewired",)]


def test_page_is_self_contained_and_escapes(tmp_path: Path) -> None:
    after = net().copy()
    with graphs.made_by("</script><b>"):
        insert_behind(find(after, "model.layers.0", "add"), aten.relu.default)
    page = diff(net(), after).to_html(tmp_path / "new" / "diff.html", "A <b> & B").read_text()
    assert page.count("</script>") == 2
    assert "<h1>A &lt;b&gt; &amp; B</h1>" in page
    assert not re.search(r"""(src|href)=["'](?!data:|#)|https?://|@import|url\(""", page)
    data = re.search(r'id="data">(.*?)</script>', page)
    assert data is not None
    assert "'</script><b>'" in str(json.loads(data[1]))


def test_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        GraphDiff().to_html(tmp_path / "file" / "diff.html")


def large(num_layers: int = 40, per_layer: int = 50) -> GraphDiff:
    """A diff of 2,000 nodes in which no two layers are alike and every third layer changed."""
    rows: list[NodeChange] = []
    for layer in range(num_layers):
        for place in range(per_layer):
            module = f"model.layers.{layer}.part_{place % 5}"
            view = NodeView(
                "aten.some_operator.Tensor",
                f"some_operator#{place}",
                (
                    ("input", ("", f"{module}:other", "")),
                    ("size", (f"[batch, sequence, {layer}]",)),
                ),
                f"float32[batch, sequence, {layer + 1}, {place}]",
                "modeling_something.py:100: x = self.some_projection(hidden_states) * other",
            )
            changed = layer % 3 == 0 and place < 10
            rows.append(NodeChange(module, None if changed else view, view))
    return GraphDiff(nodes=tuple(row for row in rows if row.kinds), context=tuple(rows))


def test_large_page_is_small(tmp_path: Path) -> None:
    page = large().to_html(tmp_path / "diff.html")
    assert page.stat().st_size < 1_500_000


def test_large_page_in_a_browser(tmp_path: Path) -> None:
    found = probe(
        large().to_html(tmp_path / "diff.html"),
        """
        const rows = () => document.querySelectorAll(".row").length;
        const start = { rows: rows(), ready: document.documentElement.dataset.ready };
        const from = performance.now();
        document.getElementById("expand").click();
        return { ...start, all: rows(), took: performance.now() - from };
        """,
    )
    assert found["ready"] == "yes"
    assert found["rows"] < 1_000
    assert found["all"] > 1_500
    assert found["took"] < 3_000


def test_page_in_a_browser(tmp_path: Path) -> None:
    page = diff(net(), steered(net(), 2)).to_html(tmp_path / "diff.html")
    found = probe(
        page,
        """
        const all = (selector) => [...document.querySelectorAll(selector)];
        const click = (selector) => document.querySelector(selector).click();
        const wait = (ms) => new Promise((done) => setTimeout(done, ms));
        const heads = (open) => all(`.group > div > .head[aria-expanded="${open}"]`);
        const open = () => heads(true).length;
        const found = { ready: document.documentElement.dataset.ready };
        found.groups = all(".group").length;
        found.open = open();
        found.rows = all(".row").length;
        found.added = all(".row.added").length;
        found.closed = heads(false).map((head) => head.querySelector(".name").textContent);
        heads(false)[0].click();
        found.afterClick = { open: open(), rows: all(".row").length };
        click("#collapse"); found.collapsed = open();
        click("#expand"); found.expanded = open();
        const size = () => parseFloat(getComputedStyle(document.getElementById("main")).fontSize);
        const before = size();
        click("#zoom-in"); found.zoomed = size() / before; click("#zoom-reset");
        click('#legend [data-kind="same"]'); found.unchangedShown = all(".row.same").length;
        click('#legend [data-kind="same"]');
        const search = document.getElementById("search");
        search.value = "lm_head"; search.dispatchEvent(new Event("input")); await wait(400);
        found.searched = all(".group").map((g) => g.querySelector(".name").textContent);
        search.value = "layers.1.self"; search.dispatchEvent(new Event("input")); await wait(400);
        found.inFold = all(".group").map((g) => g.querySelector(".name").textContent);
        search.value = "no such thing"; search.dispatchEvent(new Event("input")); await wait(400);
        found.nothing = !document.getElementById("nothing").hidden;
        search.value = ""; search.dispatchEvent(new Event("input")); await wait(400);
        const cell = document.querySelector(".row.added .cell[data-tip]");
        cell.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
        found.tip = document.getElementById("tip").textContent;
        return found;
        """,
    )
    assert found["ready"] == "yes"
    assert found["groups"] == 5
    assert found["open"] == 2
    assert found["added"] == 1
    assert found["closed"] == ["model.embed", "model.layers.{0, 1}", "lm_head"]
    assert found["afterClick"]["open"] == 3
    assert found["afterClick"]["rows"] > found["rows"]
    assert found["collapsed"] == 0
    assert found["expanded"] == 5
    assert found["zoomed"] == pytest.approx(1.15, abs=0.02)
    assert found["unchangedShown"] == 0
    assert found["searched"] == ["lm_head"]
    assert found["inFold"] == ["model.layers.{0, 1}"]
    assert found["nothing"]
    assert found["tip"].endswith("made by seal")
