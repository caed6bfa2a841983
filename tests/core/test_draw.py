"""Listings and drawings of a Program by layers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from fxgraft import graph as graphs
from fxgraft.draw import draw
from fxgraft.errors import InputError
from fxgraft.history import Record, Size
from fxgraft.listing import as_text
from fxgraft.outline import outline, passes_of
from fxgraft.program import Program
from tests.core._browser import probe
from tests.core._edits import find, insert_behind, llama, merged, net, program_of, pruned, steered

aten = torch.ops.aten
Golden = Callable[[str, str], None]
SVG = "{http://www.w3.org/2000/svg}"


def recorded(program: Program) -> Program:
    size = Size(1, 1, 1, 1)
    record = Record("seal", {"layer": 1}, "behaviour", 0.1, 0.2, size, size, 1e-3, "logits")
    program.history = [record]
    return program


def test_listing(golden: Golden) -> None:
    program = recorded(steered(net(2), 1))
    # Lines of torch's own files move between its versions.
    golden("listing", re.sub(r"(\w+\.py):\d+", r"\1", as_text(program)))
    assert str(program) == as_text(program)


def test_listing_says_every_op_once() -> None:
    lines = as_text(llama()).splitlines()
    calls = [node for node in llama().graph.nodes if node.op == "call_function"]
    assert len([line for line in lines if re.match(r"    \w+ = ", line)]) == len(calls)


@pytest.mark.parametrize(
    ("program", "titles"),
    [
        (net(), ["model.embed", "model.layers.{0..3}", "lm_head"]),
        (merged(net()), ["model.embed", "model.layers.{0..3}", "lm_head"]),
        (
            steered(net(), 1),
            ["model.embed", "model.layers.0", "model.layers.1", "model.layers.{2, 3}", "lm_head"],
        ),
        (
            pruned(net(), 2),
            ["model.embed", "model.layers.{0, 1}", "model.layers.2", "model.layers.3", "lm_head"],
        ),
    ],
    ids=["captured", "merged", "steered", "pruned"],
)
def test_layers_that_differ_are_shown(program: Program, titles: list[str]) -> None:
    rows = outline(program)
    assert [row.title for row in rows] == titles
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert sum(row.num_ops * len(row.members) for row in rows) == len(calls)


def test_rows_of_a_llama() -> None:
    rows = {row.title: row for row in outline(llama())}
    layers = rows["model.layers.{0..3}"]
    assert layers.is_layer
    assert layers.mixer == "attention [batch, 4, sequence, 16]"
    assert layers.mlp == "3 linear, 96 wide"
    assert layers.stream == "float32[batch, sequence, 64]"
    assert not rows["model.rotary_emb"].on_stream
    assert all(rows[title].on_stream for title in ("model.embed_tokens", "model.norm", "lm_head"))


def test_passes() -> None:
    rows = outline(steered(merged(net()), 1))
    assert passes_of(rows) == ["optimize", "seal"]
    assert rows[2].made_by == {"optimize": 4, "seal": 1}


def test_model_without_layers() -> None:
    program = program_of(nn.Linear(3, 4), {"input": torch.ones(2, 3)}, {"input": ("batch", 3)})
    (row,) = outline(program)
    assert row.title == "(top level)"
    assert row.on_stream
    assert not row.is_layer


def texts(file: Path) -> list[str]:
    return [element.text or "" for element in ElementTree.parse(file).iter(f"{SVG}text")]


def test_svg(tmp_path: Path) -> None:
    file = draw(recorded(steered(net(), 1)), tmp_path / "new" / "net.svg")
    words = texts(file)
    assert words[0] == "Net"
    assert words[1].endswith("passes: seal")
    assert {"made by seal", "seal 1", "model.layers.{2, 3}", "×2"} <= set(words)
    root = ElementTree.parse(file).getroot()
    assert len(root.findall(f"{SVG}circle")) == 5


def test_svg_boxes_stay_apart(tmp_path: Path) -> None:
    program = steered(merged(net()), *range(4))
    with graphs.made_by("a_pass_with_quite_a_long_name"):
        insert_behind(find(program, "model.layers.1", "add"), aten.relu.default)
    root = ElementTree.parse(draw(program, tmp_path / "net.svg")).getroot()
    chips = [
        (float(r.attrib["y"]), float(r.attrib["x"]), float(r.attrib["width"]))
        for r in root.iter(f"{SVG}rect")
        if r.attrib.get("class", "").startswith(("tone", "mixer", "mlp"))
    ]
    chips.sort()
    for (y, x, width), (next_y, next_x, _) in itertools.pairwise(chips):
        assert y != next_y or x + width < next_x
    assert max(x + width for _, x, width in chips) < float(root.attrib["width"])


def test_words_are_escaped(tmp_path: Path) -> None:
    program = net().copy()
    program.origin = {"class": "<b>&", "source": ""}
    assert texts(draw(program, tmp_path / "net.svg"))[0] == "<b>&"
    page = draw(program, tmp_path / "net.html").read_text(encoding="utf-8")
    assert "<h1>&lt;b&gt;&amp;</h1>" in page


def test_html_in_a_browser(tmp_path: Path) -> None:
    file = draw(steered(net(), 1), tmp_path / "net.html")
    assert not re.search(r"https?://|@import|url\(", file.read_text(encoding="utf-8"))
    found = probe(
        file,
        """
        const rows = [...document.querySelectorAll("details.layer")];
        const items = [...document.querySelectorAll("li")];
        const visible = () => items.filter((item) => item.checkVisibility()).length;
        const before = visible();
        rows[1].querySelector("summary").click();
        await new Promise((done) => setTimeout(done, 100));
        const made = rows[1].querySelector("li[class^=tone]");
        return { layers: rows.length, before, after: visible(), made: made.textContent,
                 color: getComputedStyle(made).borderLeftColor };
        """,
    )
    assert found["layers"] == 3
    assert found["before"] == 0
    assert found["after"] == outline(steered(net(), 1))[2].num_ops
    assert found["made"].endswith("made by seal")
    assert found["color"] == "rgb(122, 63, 196)"


@pytest.mark.parametrize("name", ["net.png", "net", "net.svg.txt"])
def test_unknown_format(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\.svg or \.html"):
        draw(net(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "net.svg").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        draw(net(), tmp_path / "net.svg")
