"""The flexcim backend on Programs: mapping, costs per node, tables, files, plots."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fxgraft
from fxgraft.backend import find_backend
from fxgraft.backends.flexcim import FlexcimCompiled, plots
from fxgraft.backends.flexcim.expressions import cycles
from fxgraft.backends.flexcim.linears import linears
from fxgraft.backends.flexcim.macro import Gemm, Layout
from fxgraft.backends.flexcim.mapper import map_gemm
from fxgraft.backends.flexcim.patterns import DENSE, Pattern
from fxgraft.backends.flexcim.sensitivity import sensitivity
from fxgraft.backends.flexcim.sweep import Design, pareto
from fxgraft.cost_table import StepCostTable
from fxgraft.errors import InputError
from fxgraft.frontends.capture import capture
from fxgraft.passes.optimize import Optimize
from fxgraft.pipeline import PipelineFile
from fxgraft.program import Program
from fxgraft.sparsity import DeclaredPattern, declare, declared
from fxgraft.step_tables import Ranges
from fxgraft.transform import apply
from tests import models

SMALL = Ranges(tokens=64, sequences=8, new_tokens=64, context=128)


def lower(model: nn.Module | Program, **options: Any) -> FlexcimCompiled:
    return cast(FlexcimCompiled, fxgraft.compile(model, backend="flexcim", options=options))


@cache
def plain() -> Program:
    """Two layers, all weights dense."""
    return capture(models.llama(num_hidden_layers=2))


def prune(program: Program, part: str, keep: Sequence[int], m: int) -> Program:
    """A copy that keeps these of each m inputs of the linear layers whose name holds ``part``."""
    pruned = program.copy()
    for name, weight in program.weights():
        if part in name and weight.dim() == 2:
            groups = weight.detach().clone().view(weight.shape[0], -1, m)
            groups[:, :, [place for place in range(m) if place not in keep]] = 0
            pruned.set_weight(name, groups.flatten(1))
    return pruned


@cache
def sparse() -> Program:
    """The same with a quarter of the weights of its perceptrons."""
    return prune(plain(), "mlp", [0, 1], 8)


@cache
def llama() -> FlexcimCompiled:
    return lower(sparse(), hardware={"macros": 4, "name": "small"})


def test_every_linear_layer_is_mapped() -> None:
    costs = llama().costs(2, 3, 5)
    mapped = [node for node in costs.nodes if node.unit == "macros"]
    layers, tokens = 2, 6
    assert len(mapped) == layers * 7 + 1
    for node in mapped:
        wanted = Pattern(2, 8) if ".mlp." in node.module else DENSE
        assert node.wanted == str(wanted)
        rows = 2 if node.module == "lm_head" else tokens
        inner = 96 if "down_proj" in node.module else 64
        outputs = node.flops / (2 * rows * inner)
        expected = map_gemm(llama().hardware, Gemm(inner, int(outputs), wanted), rows)
        assert node.cycles == expected.cycles[0]
        assert node.joules == pytest.approx(expected.joules[0], rel=1e-12)
        assert node.seconds == node.cycles / 500e6
        assert 0 < node.utilisation <= 1
        assert 0 < node.occupancy <= 1


@pytest.mark.parametrize("size", [(1, 1, 0), (3, 1, 40), (2, 17, 9)])
def test_cycles_as_expressions_are_those_of_numbers(size: tuple[int, int, int]) -> None:
    found = cycles(llama().model)
    values: dict[str, int] = dict(zip(("batch", "sequence", "past"), size, strict=True))
    for node in llama().costs(*size).nodes:
        at = {symbol: values[str(symbol)] for symbol in found[node.name].free_symbols}
        assert int(found[node.name].subs(at)) == node.cycles, node.name
    names = {str(symbol) for value in found.values() for symbol in value.free_symbols}
    assert names == {"batch", "sequence", "past"}


def test_cycles_of_fused_layers_as_expressions() -> None:
    fused = lower(apply(sparse(), Optimize(), check=False))
    found = cycles(fused.model)
    values = {"batch": 2, "sequence": 3, "past": 4}
    for node in fused.costs(2, 3, 4).nodes:
        at = {symbol: values[str(symbol)] for symbol in found[node.name].free_symbols}
        assert int(found[node.name].subs(at)) == node.cycles, node.name
    with pytest.raises(InputError, match="objective is 'edp'"):
        cycles(lower(plain(), objective="edp").model)


def test_everything_else_runs_in_digital_logic() -> None:
    hardware = llama().hardware
    costs = llama().costs(2, 3, 5)
    attention = [node for node in costs.nodes if node.op == "fxgraft.attention"]
    assert len(attention) == 2
    keys, heads, head_dim = 8, 4, 16
    # Of 3 new queries behind 5 keys the middle one sees 7 of the 8 keys.
    flops = 2 * 2 * heads * 3 * (5 + 2) * 2 * head_dim
    states = 2 * 2 * 2 * keys * head_dim
    for node in attention:
        assert (node.unit, node.flops) == ("vector", flops)
        queries = 2 * heads * 3 * head_dim
        mask = 2 * keys  # one byte each
        assert node.bytes == states + 2 * queries + mask
        cycles = max(math.ceil(flops / 1024), math.ceil(node.bytes / 256))
        assert node.cycles == cycles
        energy = flops * 500e-15 + node.bytes * 8 * 150e-15
        assert node.joules == pytest.approx(energy, rel=1e-12)
    assert hardware.energies.vector_operation == 500


def test_parts_and_blocks_add_up() -> None:
    costs = llama().costs(1, 4, 0)
    assert sum(costs.energy.values()) == pytest.approx(costs.joules, rel=1e-12)
    blocks = costs.by_block()
    assert sum(joules for _, joules in blocks.values()) == pytest.approx(costs.joules, rel=1e-12)
    assert sum(seconds for seconds, _ in costs.by_op().values()) == pytest.approx(costs.seconds)
    assert blocks["model.layers.0"] == pytest.approx(blocks["model.layers.1"])
    assert 0 < costs.vector_share < 1
    assert "digital logic" in str(costs)
    assert "2:8" in str(costs)


def test_the_same_program_gives_the_same_numbers() -> None:
    program = llama().program
    options = {"macros": 4, "name": "small"}
    again = lower(program, hardware=options)
    assert again.costs(3, 5, 7).to_json() == llama().costs(3, 5, 7).to_json()
    assert again.table(SMALL) == llama().table(SMALL)


def test_it_computes_what_torch_computes() -> None:
    ids = torch.arange(1, 9)[None]
    compiled = llama()
    reference = fxgraft.compile(compiled.program, backend="torch")
    torch.testing.assert_close(compiled(ids).logits, reference(ids).logits)
    tokens = [c.generate(ids, max_new_tokens=5).tolist() for c in (compiled, reference)]
    assert tokens[0] == tokens[1]


class Written(nn.Module):
    """Products with a weight, written in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.stored = nn.Parameter(torch.randn(8, 12))
        self.left = nn.Parameter(torch.randn(16, 12))
        self.experts = nn.Parameter(torch.randn(2, 12, 20))
        self.line = nn.Linear(16, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        hidden = torch.addmm(torch.ones(12), flat, self.stored) + x.flatten(0, 1) @ self.stored
        both = torch.bmm(hidden.expand(2, -1, -1), self.experts)
        turned = (self.left @ hidden.t()).t()
        scores = turned @ turned.t()
        return self.line(turned).sum() + both.sum() + scores.sum()


def test_products_with_weights_are_found_however_they_are_written() -> None:
    program = capture(Written(), (torch.randn(3, 5, 8),))
    found = {linear.weight: linear for linear in linears(program, llama().hardware).values()}
    sizes = {
        weight: (linear.gemm.reduction, linear.gemm.outputs, linear.copies)
        for weight, linear in found.items()
    }
    assert sizes == {
        "stored": (8, 12, 1), "experts": (12, 20, 2), "left": (12, 16, 1),
        "line.weight": (16, 24, 1),
    }  # fmt: skip
    compiled = lower(program)
    nodes = {node.name: node for node in compiled.costs(batch=4).nodes}
    rows = {n.name: n.flops / 2 / (linear.gemm.reduction * linear.gemm.outputs)
            for n, linear in ((nodes[x.name], x) for x in found.values())}  # fmt: skip
    assert set(rows.values()) == {20, 40}
    matrices = {p.weights[0]: p.matrices(program) for p in products(program)}
    module = program.graph_module
    torch.testing.assert_close(matrices["stored"][0], cast(Any, module).stored.t())
    torch.testing.assert_close(matrices["left"][0], cast(Any, module).left)
    torch.testing.assert_close(matrices["experts"], cast(Any, module).experts.transpose(1, 2))


def products(program: Program) -> Sequence[Any]:
    from fxgraft.weight_products import weight_products

    return list(weight_products(program).values())


def test_experts_share_the_rows() -> None:
    compiled = lower(models.jamba(), hardware={"macros": 4})
    few, many = compiled.costs(1, 1, 0), compiled.costs(1, 64, 0)
    name = next(node.name for node in few.nodes if "grouped_mm" in node.op)
    one, all_ = (next(n for n in costs.nodes if n.name == name) for costs in (few, many))
    # A token goes to 2 of 4 experts; 64 tokens meet all of them, 32 each.
    hardware = compiled.hardware
    outputs = int(one.flops / 2 / 2 / 64)
    assert one.tiles == 2 * Layout(hardware, Gemm(64, outputs), DENSE, one.merge).tiles
    expected = map_gemm(hardware, Gemm(64, outputs, copies=4), 32)
    assert all_.cycles == expected.cycles[0]
    assert any("experts" in note for note in few.notes)


@pytest.mark.parametrize("build", [plain, models.mamba, models.gpt2])
def test_fusions_and_other_models(build: Callable[[], nn.Module | Program]) -> None:
    program = capture(build())
    fused = apply(program, Optimize(), check=False)
    costs = [lower(one).costs(1, 7, 0) for one in (program, fused)]
    flops = [sum(n.flops for n in c.nodes if n.unit == "macros") for c in costs]
    assert flops[0] == flops[1]
    assert costs[1].seconds <= costs[0].seconds


def test_patterns_come_from_options_declarations_and_zeros() -> None:
    program = llama().program.copy()
    name = "model.layers.1.mlp.up_proj.weight"
    declare(program, name, DeclaredPattern(4, 8))
    assert declared(program.copy()) == {name: DeclaredPattern(4, 8)}
    compiled = lower(program, patterns={"*.down_proj.weight": "4:8", "*.0.*down*": "2:8"})
    found = {
        linear.weight: (str(linear.gemm.pattern), linear.source)
        for linear in compiled.model.linears.values()
    }
    assert found[name] == ("4:8", "declared")
    assert found["model.layers.0.mlp.down_proj.weight"] == ("2:8", "option")
    assert found["model.layers.1.mlp.down_proj.weight"] == ("4:8", "option")
    assert found["model.layers.0.mlp.up_proj.weight"] == ("2:8", "weight")
    assert found["model.layers.0.self_attn.q_proj.weight"] == ("dense", "weight")


def test_a_declaration_is_saved(tmp_path: Path) -> None:
    program = llama().program.copy()
    declare(program, "lm_head.weight", DeclaredPattern(1, 1, is_padded=True))
    program.save(tmp_path / "program")
    assert declared(Program.load(tmp_path / "program")) == declared(program)


def test_models_without_values_take_patterns_from_options() -> None:
    with torch.device("meta"):
        model = models.llama(num_hidden_layers=1)
    compiled = lower(model, patterns={"*.mlp.*": "2:8"}, hardware={"cell": "pair"})
    nodes = compiled.costs().nodes
    assert {node.wanted for node in nodes if ".mlp." in node.module} == {"", "2:8"}
    # Without values each pair of a group may be needed.
    gemms = [linear.gemm for linear in compiled.model.linears.values()]
    assert {gemm.replays for gemm in gemms if gemm.pattern.is_sparse} == {4}
    assert any("without values" in note for note in compiled.costs().notes)


def test_the_pair_cell_replays_what_the_masks_need() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    program = prune(plain(), name, [0, 1], 4)

    def gemm() -> Gemm:
        found = linears(program, llama().hardware.changed(cell="pair")).values()
        return next(linear.gemm for linear in found if linear.weight == name)

    # All columns need the same pair, until one needs the other.
    assert gemm() == Gemm(64, 96, Pattern(2, 4), 1)
    weight = program.weight(name).clone()
    weight[1] = weight[1].view(-1, 4).flip(-1).flatten()
    program.set_weight(name, weight)
    assert gemm() == Gemm(64, 96, Pattern(2, 4), 2)
    costs = lower(program, hardware={"cell": "pair"}, objective="energy").costs(1, 8, 0)
    assert {(node.pattern, node.replays) for node in costs.nodes} == {
        ("", 0), ("dense", 1), ("2:4", 2)
    }  # fmt: skip


def test_resident_weights_need_a_macro_for_each_tile() -> None:
    needed = lower(llama().program).model.macros_needed
    fits = lower(llama().program, hardware={"macros": needed, "resident": True})
    assert all(node.waves <= 1 for node in fits.costs().nodes)
    streaming = lower(llama().program, hardware={"macros": needed})
    assert fits.costs(1, 1, 0).cycles < streaming.costs(1, 1, 0).cycles


def test_weights_that_do_not_fit_are_streamed() -> None:
    compiled = lower(llama().program, hardware={"weight_memory": 10_000})
    assert compiled.model.streamed
    costs = compiled.costs(1, 1, 0)
    linear = [node for node in costs.nodes if node.unit == "macros"]
    assert all(node.off_chip_bytes > 0 for node in linear)
    bits = sum(8 * node.energy["dram"] for node in linear) / 3700e-15 / 8
    assert bits == pytest.approx(8 * sum(node.off_chip_bytes for node in linear))
    assert not lower(llama().program, hardware={"weight_memory": 10**9}).model.streamed


def test_weight_bytes_count_indices_and_shared_weights_once() -> None:
    tied = plain().copy()
    tied.set_weight("lm_head.weight", tied.weight("model.embed_tokens.weight"))
    compiled = lower(prune(tied, "mlp", [0, 1], 8))
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32)
    mlp = 2 * 3 * 64 * 96 * 2 // 8
    norms, table = 5 * 64, 128 * 64
    positions = 8
    others = attention + norms + table + positions
    assert compiled.model.weight_bits == 8 * others + (8 + 3) * mlp


def test_other_widths_scale() -> None:
    costs = {bits: lower(llama().program, hardware={"activation_bits": bits}).costs(1, 8, 0)
             for bits in (4, 8)}  # fmt: skip
    linear = {
        bits: sum(n.cycles for n in c.nodes if n.unit == "macros") for bits, c in costs.items()
    }
    assert linear[4] < linear[8]
    assert (
        lower(llama().program, hardware={"weight_bits": 4}).table(SMALL).identity.weights == "int4"
    )


def test_the_table_prices_what_the_costs_say() -> None:
    table = llama().table(SMALL)
    assert table.identity.backend == "flexcim"
    assert (table.identity.configuration, table.identity.activations) == ("small", "int8")
    assert table.memory.bytes_per_token == 2 * 2 * 2 * 16
    assert table.origin.held_out is not None
    assert table.origin.held_out.maximum < 0.01
    assert any("full_adder = 3.4 fJ [Z]" in note for note in table.origin.notes)
    for batch, new, context in ((1, 1, 0), (1, 64, 0), (1, 16, 32), (4, 1, 63)):
        costs = llama().costs(batch, new, context)
        if new == 1 and context:
            price = table.price((), batch, batch * (context + 1))
        else:
            price = table.price([(new, context)] * batch)
        assert price.seconds == pytest.approx(costs.seconds, rel=2e-3)
        assert price.joules == pytest.approx(costs.joules, rel=2e-3)


def test_a_sparser_model_has_a_cheaper_table() -> None:
    tables = [lower(p, hardware={"macros": 1}).table(SMALL) for p in (sparse(), plain())]
    for prefills, decodes in (([(60, 0)], 0), ([], 8)):
        few, many = (table.price(prefills, decodes, 100 * decodes) for table in tables)
        assert few.seconds < many.seconds
        assert cast(float, few.joules) < cast(float, many.joules)
    assert tables[0].memory.weights < tables[1].memory.weights


def test_an_encoder_has_prefills_only() -> None:
    from tests.core.test_cost import bert

    compiled = lower(bert()[1])
    table = compiled.table(SMALL)
    assert table.validity.context == (0, 0)
    price = table.price([(32, 0)])
    assert price.seconds == pytest.approx(compiled.costs(1, 32, 0).seconds, rel=2e-3)
    with pytest.raises(InputError, match="context"):
        table.price((), 1, 10)
    with pytest.raises(InputError, match="context"):
        compiled.costs(1, 1, 5)


def test_a_model_without_linear_layers_warns() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() * x

    program = capture(Plain(), (torch.randn(3, 5),))
    with pytest.warns(UserWarning, match="no linear layer"):
        compiled = lower(program)
    costs = compiled.costs(batch=4)
    assert {node.unit for node in costs.nodes} == {"vector"}
    assert costs.cycles == 2
    assert costs.joules > 0
    assert costs.utilisation == 0


def test_the_report_names_units_and_patterns() -> None:
    report = llama().report()
    linear = next(line for line in report.lines if line.op == "aten.linear")
    assert (linear.count, linear.runs_on) == (15, "macros: dense (9), 2:8 (6)")
    assert any(line.runs_on == "digital logic" for line in report.lines)
    assert any("quantised to int8" in note for note in report.notes)


def test_comparison_of_a_program() -> None:
    results = {r.name: r for r in llama().compare(new_tokens=64)}
    assert results["ideal"].cycles <= results["flexcim"].cycles <= results["dense"].cycles
    assert results["flexcim"].joules < results["dense"].joules
    assert results["fixed:2:4"].patterns.count("2:4") == 6


def test_files(tmp_path: Path) -> None:
    folder = llama().export(tmp_path / "out")
    table = StepCostTable.load(folder / "table.json")
    assert table.identity.configuration == "small"
    costs = json.loads((folder / "decode.json").read_text())
    assert costs["joules"] == pytest.approx(llama().costs(1, 1, 512).joules)
    with (folder / "prefill.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(llama().costs(1, 512, 0).nodes)
    joules = sum(float(row["joules"]) for row in rows)
    assert joules == pytest.approx(llama().costs(1, 512, 0).joules)
    constants = json.loads((folder / "constants.json").read_text())
    assert {row["source"] for row in constants} == {"P", "R", "G", "Z", "A"}
    assert all(row["meaning"] for row in constants)
    names = {file.name for file in folder.iterdir()}
    assert {"prefill_comparison.json", "decode_comparison.json"} <= names
    if plots.missing() is None:
        assert {f"decode_{kind}.png" for kind in ("breakdown", "roofline", "comparison")} <= names


def test_backend_export_and_yaml(tmp_path: Path) -> None:
    folder = find_backend("flexcim").export(llama().program, tmp_path / "out", objective="energy")
    assert (folder / "table.json").is_file()
    (tmp_path / "pipeline.yaml").write_text(
        "passes: [optimize]\nbackend: flexcim\n"
        "options: {objective: edp, hardware: {macros: 2, energies: {leakage: 1.0e-3}}}\n"
    )
    file = PipelineFile.read(tmp_path / "pipeline.yaml")
    compiled = fxgraft.compile(
        plain(), file.pipeline, backend=file.backend, options=file.options, check=False
    )
    costs = cast(FlexcimCompiled, compiled).costs()
    assert costs.energy["leakage"] > 0


def test_hardware_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "hardware.yaml"
    path.write_text("name: mine\nmacros: 8\nclock: 1e9\nenergies:\n  memory_bit: 100\n")
    compiled = lower(llama().program, hardware=str(path))
    assert (compiled.hardware.name, compiled.hardware.clock) == ("mine", 1e9)
    assert compiled.hardware.energies.memory_bit == 100


def test_saved_and_loaded(tmp_path: Path) -> None:
    llama().save(tmp_path / "saved")
    loaded = cast(FlexcimCompiled, fxgraft.load(tmp_path / "saved"))
    pairs = zip(loaded.costs(1, 3, 4).nodes, llama().costs(1, 3, 4).nodes, strict=True)
    assert all(replace(one, name="") == replace(other, name="") for one, other in pairs)


def test_sweep_and_pareto() -> None:
    designs = llama().sweep(
        {"sub_macros": [2, 4], "rows": [16, 32], "macros": [2, 8], "weight_bits": [4, 8]},
        [(1, 16, 0)],
    )
    assert len(designs) == 16
    assert not any(design.problem for design in designs)
    one = next(d for d in designs if list(d.values.values()) == [4, 32, 8, 8])
    direct = lower(llama().program, hardware={"macros": 8}).costs(1, 16, 0)
    assert (one.seconds, one.joules) == (direct.seconds, direct.joules)
    best = pareto(designs)
    assert 0 < len(best) < 16
    for design in designs:
        beaten = any(
            b.seconds <= design.seconds and b.joules <= design.joules
            and b.transistors <= design.transistors
            for b in best
        )  # fmt: skip
        assert beaten


def test_a_design_that_cannot_be_is_named() -> None:
    designs = llama().sweep({"bits_per_cycle": [8], "activation_bits": [4, 8]}, [(1, 1, 0)])
    assert [bool(design.problem) for design in designs] == [True, False]
    assert pareto(designs) == [designs[1]]
    assert pareto([]) == []


@pytest.mark.skipif(plots.missing() is not None, reason="matplotlib is not installed")
def test_plots(tmp_path: Path) -> None:
    costs = llama().costs(1, 16, 0)
    designs = llama().sweep({"macros": [2, 4, 8]}, [(1, 16, 0)])
    drawn = [
        plots.breakdown(costs, tmp_path / "a" / "breakdown.png"),
        plots.roofline(costs, llama().hardware, tmp_path / "roofline.svg"),
        plots.comparison(llama().compare(), tmp_path / "comparison.png"),
        plots.tornado(sensitivity(llama().hardware), tmp_path / "tornado.png"),
        plots.designs(designs, tmp_path / "designs.png"),
        plots.designs([Design({"rows": 3}, problem="no")], tmp_path / "none.png"),
    ]
    assert all(path.stat().st_size > 1000 for path in drawn)
