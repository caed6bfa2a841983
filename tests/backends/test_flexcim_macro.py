"""The FlexCiM formulas: golden numbers, bounds, monotony, conservation, symbols, areas."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import sympy as untyped_sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxgraft.backends.flexcim import Hardware, patterns
from fxgraft.backends.flexcim.area import macro_area
from fxgraft.backends.flexcim.baselines import (
    Layer,
    compare,
    headline_layers,
    headlines,
    obeys,
)
from fxgraft.backends.flexcim.macro import PARTS, Gemm, Layout, total
from fxgraft.backends.flexcim.mapper import layouts, map_gemm
from fxgraft.backends.flexcim.patterns import DENSE, Pattern
from fxgraft.backends.flexcim.sensitivity import sensitivity

sympy: Any = untyped_sympy
DEFAULT = Hardware()
# T, K, O, pattern; a, tiles, waves, cycles, utilisation, microjoules (specification, section 8).
GOLDEN = [
    (1, 576, 1536, "dense", 1, 216, 4, 166, 1.0, 1.2524),
    (1, 576, 1536, "4:8", 1, 108, 2, 86, 1.0, 0.8539),
    (1, 576, 1536, "2:8", 1, 60, 1, 46, 0.9, 0.4348),
    (128, 576, 1536, "dense", 1, 216, 4, 4230, 1.0, 20.88),
    (128, 576, 1536, "8:8", 1, 216, 4, 4230, 1.0, 20.93),
    (128, 576, 1536, "4:8", 1, 108, 2, 2118, 1.0, 13.45),
    (128, 576, 1536, "2:4", 1, 108, 2, 2118, 1.0, 12.36),
    (128, 576, 1536, "8:16", 1, 108, 2, 2118, 1.0, 15.57),
    (128, 576, 1536, "2:8", 1, 60, 1, 1062, 0.9, 7.73),
    (128, 576, 1536, "1:4", 1, 60, 1, 1062, 0.9, 7.18),
    (128, 1536, 576, "4:8", 1, 120, 2, 2118, 0.9, 13.00),
    (512, 4096, 4096, "dense", 1, 4096, 64, 264198, 1.0, 1462.1),
    (512, 4096, 4096, "4:8", 1, 2048, 32, 132102, 1.0, 917.8),
    (512, 4096, 4096, "2:4", 1, 2048, 32, 132102, 1.0, 838.9),
    (512, 4096, 4096, "2:8", 1, 1024, 16, 66054, 1.0, 504.0),
    (512, 4096, 4096, "1:4", 1, 1024, 16, 66054, 1.0, 464.6),
]
BREAKDOWN = {
    "multiply": 507.3, "select": 1791.6, "trees": 6593.8, "accumulate": 1516.1, "merge": 0.0,
    "partial_sums": 256.7, "distribution": 24.1, "activations": 1061.7, "outputs": 943.7,
    "load": 754.7, "dram": 0.0, "leakage": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: " ".join(map(str, case[:4])))
def test_golden_numbers(case: tuple[Any, ...]) -> None:
    tokens, inner, outputs, pattern, merge, tiles, waves, cycles, utilisation, energy = case
    mapped = map_gemm(DEFAULT, Gemm(inner, outputs, patterns.parse(pattern)), tokens)
    layout = mapped.layouts[0]
    assert (layout.merge, layout.tiles, layout.waves) == (merge, tiles, waves)
    assert mapped.cycles[0] == cycles
    assert layout.utilisation == pytest.approx(utilisation, abs=1e-12)
    # Half a unit of the last printed digit, or 0.5 % where that is less.
    assert mapped.joules[0] * 1e6 == pytest.approx(energy, rel=0.001)


def test_golden_breakdown() -> None:
    mapped = map_gemm(DEFAULT, Gemm(576, 1536, Pattern(4, 8)), 128)
    found = {part: joules[0] * 1e9 for part, joules in mapped.energy.items()}
    assert list(found) == list(PARTS)
    assert found == pytest.approx(BREAKDOWN, abs=0.051)
    assert mapped.joules[0] == pytest.approx(sum(found.values()) * 1e-9, rel=1e-12)


@pytest.mark.parametrize(
    ("pattern", "microjoules"), [("7:8", 22.1), ("12:16", 22.4), ("6:8", 19.2)]
)
def test_patterns_that_are_not_worth_their_selectors(pattern: str, microjoules: float) -> None:
    gemm = Gemm(576, 1536, patterns.parse(pattern))
    sparse = map_gemm(DEFAULT, gemm, 128)
    assert sparse.joules[0] * 1e6 == pytest.approx(microjoules, abs=0.05)
    by_energy = map_gemm(DEFAULT, gemm, 128, "energy")
    dense = map_gemm(DEFAULT, replace(gemm, pattern=DENSE), 128, "energy")
    assert by_energy.layouts[0].runs_as_dense == (microjoules > 20.88)
    assert by_energy.joules[0] == min(dense.joules[0], sparse.joules[0])


def test_headlines() -> None:
    latency, energy = headlines(DEFAULT)
    assert latency == pytest.approx(1.75, rel=0.02)
    assert energy == pytest.approx(1.52, rel=0.02)
    assert (latency, energy) == pytest.approx((1.750, 1.520), abs=5e-4)


def test_energy_per_operation_lies_between_published_chips() -> None:
    mapped = map_gemm(DEFAULT, Gemm(4096, 4096), 4096)
    per_product = mapped.joules[0] / (4096**3)
    assert 2e-12 / per_product == pytest.approx(13, rel=0.1)


def test_with_a_macro_for_every_tile_sparsity_saves_macros_and_no_time() -> None:
    hardware = DEFAULT.changed(resident=True, macros=4096)
    found = {
        n: map_gemm(hardware, Gemm(1024, 1024, Pattern(n, 8)), 100).layouts[0]
        for n in (2, 4, 8)
    }  # fmt: skip
    assert {layout.cycles(100) for layout in found.values()} == {100 * 8 + 6}
    assert [found[n].tiles for n in (2, 4, 8)] == [64, 128, 256]


def test_with_few_macros_time_follows_density() -> None:
    for tokens in (1, 4096):
        cycles = [
            map_gemm(DEFAULT, Gemm(4096, 4096, pattern), tokens).cycles[0]
            for pattern in (Pattern(1, 4), Pattern(2, 4), DENSE)
        ]
        assert cycles[1] / cycles[0] == pytest.approx(2, rel=0.01)
        assert cycles[2] / cycles[0] == pytest.approx(4, rel=0.01)
    # One token: four fifths of the time is loading weights.
    assert 64 * 32 / map_gemm(DEFAULT, Gemm(4096, 4096), 1).cycles[0] == pytest.approx(
        0.8, abs=0.01
    )


# What must be true (section 11).


@st.composite
def gemms(draw: st.DrawFn) -> tuple[Gemm, int, int]:
    """A product with K a multiple of M, tokens and macros."""
    m = draw(st.sampled_from([4, 8, 16]))
    n = draw(st.integers(1, m))
    inner = m * draw(st.integers(1, 200))
    gemm = Gemm(inner, draw(st.integers(1, 4000)), Pattern(n, m))
    return gemm, draw(st.integers(1, 600)), draw(st.integers(1, 300))


@settings(max_examples=200, deadline=None)
@given(gemms(), st.sampled_from(["latency", "energy", "edp"]))
def test_all_kept_equals_dense(
    case: tuple[Gemm, int, int], objective: Literal["latency", "energy", "edp"]
) -> None:
    gemm, tokens, macros = case
    hardware = DEFAULT.changed(macros=macros)
    m = gemm.pattern.m
    full = map_gemm(hardware, replace(gemm, pattern=Pattern(m, m)), tokens, objective)
    dense = map_gemm(hardware, replace(gemm, pattern=DENSE), tokens, objective)
    for one, other in zip(full.layouts, dense.layouts, strict=True):
        if one.merge == other.merge:
            assert full.cycles[0] == dense.cycles[0]
            assert (one.tiles, one.utilisation) == (other.tiles, other.utilisation)
            extra = full.energy["distribution"][0]
            assert full.joules[0] - extra == pytest.approx(dense.joules[0], rel=1e-12)
            if tokens >= 128 and gemm.outputs >= 128:
                assert extra < 0.01 * full.joules[0]


def least_cycles(hardware: Hardware, gemm: Gemm, tokens: int) -> int:
    return min(layout.cycles(tokens) for layout in layouts(hardware, gemm))


def check_monotony(rng: random.Random) -> None:
    m = rng.choice([4, 8, 16])
    n = rng.randint(2, m)
    inner, outputs = m * rng.randint(1, 300), rng.randint(1, 5000)
    tokens, macros = rng.randint(1, 600), rng.randint(1, 300)
    hardware = DEFAULT.changed(macros=macros)
    gemm = Gemm(inner, outputs, Pattern(n, m))
    here = least_cycles(hardware, gemm, tokens)
    assert least_cycles(hardware, replace(gemm, pattern=Pattern(n - 1, m)), tokens) <= here
    assert least_cycles(hardware, gemm, tokens + rng.randint(1, 50)) >= here
    assert least_cycles(hardware, replace(gemm, reduction=inner + m), tokens) >= here
    assert (
        least_cycles(hardware, replace(gemm, outputs=outputs + rng.randint(1, 99)), tokens) >= here
    )
    more = DEFAULT.changed(macros=macros + rng.randint(1, 50))
    assert least_cycles(more, gemm, tokens) <= here
    assert here <= least_cycles(hardware, replace(gemm, pattern=DENSE), tokens)


def test_cycles_are_monotone() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        check_monotony(rng)


@pytest.mark.slow
def test_cycles_are_monotone_in_many_cases() -> None:
    rng = random.Random(1)
    for _ in range(20_000):
        check_monotony(rng)


@settings(max_examples=200, deadline=None)
@given(gemms())
def test_energy_is_monotone_under_its_objective(case: tuple[Gemm, int, int]) -> None:
    gemm, tokens, macros = case
    hardware = DEFAULT.changed(macros=macros)

    def joules(**changes: Any) -> float:
        count = changes.pop("tokens", tokens)
        return float(map_gemm(hardware, replace(gemm, **changes), count, "energy").joules[0])

    n, m = gemm.pattern.n, gemm.pattern.m
    slack = 1 + 1e-12
    if 1 < n < m:
        assert joules(pattern=Pattern(n - 1, m)) <= joules() * slack
    assert joules() <= joules(tokens=tokens + 3) * slack
    assert joules() <= joules(reduction=gemm.reduction + m) * slack
    assert joules() <= joules(outputs=gemm.outputs + 7) * slack


@settings(max_examples=200, deadline=None)
@given(gemms(), st.sampled_from([1, 2, 4]))
def test_energy_is_monotone_at_a_fixed_merge_factor(
    case: tuple[Gemm, int, int], merge: int
) -> None:
    gemm, tokens, macros = case
    hardware = DEFAULT.changed(macros=macros)

    def joules(gemm: Gemm, tokens: int) -> float:
        patterns_ = (gemm.pattern, DENSE) if gemm.pattern.is_sparse else (gemm.pattern,)
        return min(total(Layout(hardware, gemm, p, merge).energy(tokens)) for p in patterns_)

    n, m = gemm.pattern.n, gemm.pattern.m
    here, slack = joules(gemm, tokens), 1 + 1e-12
    if 1 < n < m:
        assert joules(replace(gemm, pattern=Pattern(n - 1, m)), tokens) <= here * slack
    assert here <= joules(gemm, tokens + 5) * slack
    assert here <= joules(replace(gemm, reduction=gemm.reduction + m), tokens) * slack
    assert here <= joules(replace(gemm, outputs=gemm.outputs + 9), tokens) * slack


def test_at_equal_density_a_wider_group_costs_energy_and_no_time() -> None:
    for inner, outputs, tokens in ((576, 1536, 128), (4096, 512, 1), (64, 64, 7)):
        found = [
            map_gemm(DEFAULT, Gemm(inner, outputs, Pattern(m // 2, m)), tokens)
            for m in (2, 4, 8, 16, 32)
        ]
        assert len({mapped.cycles[0] for mapped in found}) == 1
        sparse = [mapped.joules[0] for mapped in found if not mapped.layouts[0].runs_as_dense]
        assert sparse == sorted(sparse)
        assert len(set(sparse)) == len(sparse) > 2


@settings(max_examples=200, deadline=None)
@given(gemms(), st.integers(1, 4))
def test_bounds(case: tuple[Gemm, int, int], replays: int) -> None:
    gemm, tokens, macros = case
    hardware = DEFAULT.changed(macros=macros)
    results = {r.name: r for r in compare([Layer("one", gemm, tokens)], hardware)}
    gather = results["flexcim"].cycles
    pair_gemm = replace(gemm, replays=replays)
    pair = map_gemm(hardware.changed(cell="pair"), pair_gemm, tokens).cycles[0]
    assert results["ideal"].cycles <= gather <= pair <= replays * gather
    assert gather <= results["dense"].cycles
    assert results["ideal"].joules <= results["flexcim"].joules
    layout = map_gemm(hardware, gemm, tokens).layouts[0]
    assert 0 < layout.utilisation <= 1
    assert 0 < layout.occupancy <= 1
    # Beyond M/N only by what the dense product loses to rounding up tiles and waves.
    dense = map_gemm(hardware, replace(gemm, pattern=DENSE), tokens).layouts[0]
    rounding = dense.waves * 4096 * macros / (gemm.reduction * gemm.outputs)
    gain = (results["dense"].cycles - dense.fill) / gather
    assert gain <= gemm.pattern.m / gemm.pattern.n * rounding * (1 + 1e-12)


def test_the_speed_up_tends_to_the_density() -> None:
    pattern = Pattern(2, 8)
    gains = [
        map_gemm(DEFAULT, Gemm(size, size), tokens).cycles[0]
        / map_gemm(DEFAULT, Gemm(size, size, pattern), tokens).cycles[0]
        for size, tokens in ((512, 4), (4096, 64), (16384, 4096))
    ]
    assert abs(gains[-1] - 4) < 1e-4
    assert all(gain <= 4.0001 for gain in gains)


@settings(max_examples=200, deadline=None)
@given(gemms())
def test_conservation(case: tuple[Gemm, int, int]) -> None:
    gemm, tokens, macros = case
    for layout in layouts(DEFAULT.changed(macros=macros), gemm):
        tall, wide = 32 * layout.merge, 128 // layout.merge
        mapped = sum(
            min(tall, layout.compressed - row * tall) * min(wide, gemm.outputs - column * wide)
            for row in range(layout.row_tiles)
            for column in range(layout.column_tiles)
        )
        assert mapped == layout.compressed * gemm.outputs
        assert layout.utilisation == pytest.approx(mapped / (layout.tiles * 4096), rel=1e-12)
        energy = layout.energy(tokens)
        multiply = tokens * 8 * mapped * 8 * 0.28e-15 * 0.5
        assert energy["multiply"] == pytest.approx(multiply, rel=1e-12)
        assert total(energy) == pytest.approx(sum(energy.values()), rel=1e-12)


@pytest.mark.parametrize("changes", [{}, {"double_buffered": True}, {"dram_overlaps": False}])
@pytest.mark.parametrize("streamed", [False, True])
def test_symbols_give_the_numbers(changes: dict[str, Any], streamed: bool) -> None:
    hardware = DEFAULT.changed(**changes)
    symbol = sympy.Symbol("T", integer=True, positive=True)
    numbers = np.asarray([1.0, 2.0, 3.0, 17.0, 100.0])
    for layout in layouts(hardware, Gemm(200, 333, Pattern(2, 8)), streamed=streamed):
        cycles, energy = layout.cycles(symbol), layout.energy(symbol)
        array = layout.cycles(numbers)
        for place, number in enumerate(numbers):
            at = {symbol: int(number)}
            assert float(cycles.subs(at)) == layout.cycles(int(number)) == array[place]
            for part, value in layout.energy(int(number)).items():
                assert float(sympy.sympify(energy[part]).subs(at)) == pytest.approx(
                    value, rel=1e-12
                )


def test_the_clock_changes_seconds_only_and_unit_energies_energy_only() -> None:
    gemm = Gemm(576, 1536, Pattern(4, 8))
    base = map_gemm(DEFAULT, gemm, 128)
    fast = map_gemm(DEFAULT.changed(clock=2e9), gemm, 128)
    assert (fast.cycles[0], fast.joules[0]) == (base.cycles[0], base.joules[0])
    units = (
        "full_adder", "bit_multiply", "register_bit", "multiplexer_2", "multiplexer_4",
        "memory_bit", "cell_write",
    )  # fmt: skip
    twice = {name: 2 * getattr(DEFAULT.energies, name) for name in units}
    double = map_gemm(DEFAULT.changed(**twice), gemm, 128)
    assert double.cycles[0] == base.cycles[0]
    assert double.joules[0] == pytest.approx(2 * base.joules[0], rel=1e-12)
    for name in units:
        one = map_gemm(DEFAULT.changed(**{name: twice[name]}), gemm, 128)
        assert one.cycles[0] == base.cycles[0]
        half = map_gemm(DEFAULT.changed(**{name: 1.5 * getattr(DEFAULT.energies, name)}), gemm, 128)
        middle = (base.joules[0] + one.joules[0]) / 2
        assert half.joules[0] == pytest.approx(middle, rel=1e-12)


def test_leakage_and_off_chip_traffic() -> None:
    hardware = DEFAULT.changed(leakage=1e-3)
    gemm = Gemm(576, 1536, Pattern(4, 8))
    mapped = map_gemm(hardware, gemm, 128)
    assert mapped.energy["leakage"][0] == pytest.approx(1e-3 * 64 * 2118 / 500e6)
    streamed = map_gemm(DEFAULT, gemm, 1, streamed=True)
    # Weights with three index bits each once, activations in and out once.
    moved = 1536 * 288 * (8 + 3) / 8 + 576 + 1536
    assert streamed.off_chip_bytes[0] == moved
    assert streamed.cycles[0] == -(-moved // 51.2)
    assert streamed.energy["dram"][0] == pytest.approx(moved * 8 * 3700e-15)
    apart = map_gemm(DEFAULT.changed(dram_overlaps=False), gemm, 1, streamed=True)
    assert apart.cycles[0] == streamed.cycles[0] + 86


def test_bits_in_parallel_cost_adders_and_no_accumulation() -> None:
    one = map_gemm(DEFAULT, Gemm(512, 512), 64)
    eight = map_gemm(DEFAULT.changed(bits_per_cycle=8), Gemm(512, 512), 64)
    assert eight.energy["accumulate"][0] == 0
    assert eight.cycles[0] < one.cycles[0]
    # All 64 bit products are still made, and added up in each cell.
    adders = 64 * 512 * 512 * 7 * 8 * 3.40e-15 * 0.5
    assert eight.energy["multiply"][0] == pytest.approx(one.energy["multiply"][0] + adders)


def random_mask(n: int, m: int, outputs: int, groups: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    places = torch.rand(outputs, groups, m, generator=rng).argsort(-1)
    return (places < n).flatten(1)


def test_replays_of_the_pair_cell() -> None:
    # One weight kept per pair: 1:2, seen as 4:8.
    one = torch.zeros(64, 64, 2, dtype=torch.bool)
    one.scatter_(2, torch.randint(0, 2, (64, 64, 1)), True)
    one = one.flatten(1)
    assert patterns.pair_factor(patterns.slots(one, Pattern(4, 8)), 32) == 1
    # In arbitrary order some row of 32 columns needs all four pairs, almost surely.
    mask = random_mask(4, 8, 32, 16)
    kept = mask.view(32, 16, 8).float()
    order = torch.rand(32, 16, 8, generator=torch.Generator().manual_seed(1)) * kept
    shuffled = order.argsort(-1, descending=True)[..., :4].flatten(1)
    assert patterns.pair_factor(shuffled, 32) == 4
    # In increasing order the first of four is never in the last pair.
    assert patterns.pair_factor(patterns.slots(mask, Pattern(4, 8)), 32) == 3
    assert patterns.pair_factor(patterns.slots(random_mask(2, 4, 32, 16), Pattern(2, 4)), 32) == 2
    # Columns that agree need no replay, whatever they keep.
    same = random_mask(4, 8, 1, 16).expand(32, -1)
    assert patterns.pair_factor(patterns.slots(same, Pattern(4, 8)), 32) == 1


def test_slots_are_the_places_of_what_is_kept() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 0, 0]]).bool()
    assert patterns.slots(mask, Pattern(2, 4)).tolist() == [[0, 3, 2, -1], [-1, -1, 0, 1]]


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8), (4, 8), (5, 16), (1, 32)])
def test_patterns_are_found_in_masks(n: int, m: int) -> None:
    found = patterns.sparsest(patterns.most_kept(random_mask(n, m, 64, 96 // m * 4)))
    assert found == Pattern(n, m)


def test_masks_without_a_pattern_are_dense() -> None:
    assert patterns.sparsest(patterns.most_kept(torch.ones(4, 64).bool())) == DENSE
    assert patterns.sparsest(patterns.most_kept(random_mask(1, 4, 4, 3)[:, :9])) == DENSE


def test_which_masks_fixed_hardware_runs() -> None:
    def layer(pattern: str, most: dict[int, int] | None = None) -> Layer:
        return Layer("one", Gemm(64, 64, patterns.parse(pattern)), 1, most)

    assert obeys(layer("2:8"), Pattern(2, 4))
    assert obeys(layer("1:2"), Pattern(2, 4))
    assert not obeys(layer("4:8"), Pattern(2, 4))
    assert not obeys(layer("4:16"), Pattern(2, 4))
    assert obeys(layer("4:16", {2: 2, 4: 2, 8: 4}), Pattern(2, 4))
    assert not obeys(layer("2:8", {2: 2, 4: 2, 8: 2}), Pattern(1, 4))
    assert not obeys(layer("dense"), Pattern(2, 4))


def test_baselines() -> None:
    layers = [
        Layer("a", Gemm(512, 512, Pattern(1, 4)), 64),
        Layer("b", Gemm(512, 512, Pattern(4, 8)), 64),
        Layer("c", Gemm(512, 512, Pattern(2, 8)), 64),
    ]
    names = ["dense", "fixed:2:4", "fixed:4:8", "vegeta-like", "sdp-like", "ideal"]
    results = {r.name: r for r in compare(layers, DEFAULT, names)}
    assert results["flexcim"].patterns == ("1:4", "4:8", "2:8")
    assert results["dense"].patterns == ("dense",) * 3
    assert results["fixed:2:4"].patterns == ("2:4", "dense", "2:4")
    assert results["fixed:4:8"].patterns == ("4:8", "4:8", "4:8")
    assert results["vegeta-like"].patterns == ("1:4", "dense", "2:4")
    assert results["sdp-like"].joules == results["fixed:2:4"].joules
    weights = 512 * 512 * (0.25 + 0.5 + 0.25)
    assert results["ideal"].cycles == pytest.approx(64 * 8 * weights / (4096 * 64))


def test_what_the_headlines_hang_on() -> None:
    effects = {effect.constant: effect for effect in sensitivity(DEFAULT)}
    mixture = effects["2:8 layers of 7"]
    assert mixture.latency == pytest.approx((1.0, 14 / 11, 1.75, 2.0), rel=1e-3)
    # The gain in latency hangs on the mixture alone.
    others = [e.latency_span for name, e in effects.items() if name != "2:8 layers of 7"]
    assert max(others) < 0.01
    assert effects["full_adder"].energy_span > effects["cell_write"].energy_span
    assert "clock" not in effects
    assert all(len(effect.values) == len(effect.energy) > 1 for effect in effects.values())


def test_areas() -> None:
    dense = macro_area(DEFAULT.changed(cell="dense"))
    assert dense.cells == 4096 * 144
    assert dense.trees / 128 == pytest.approx(11028)
    assert dense.accumulators / 128 == pytest.approx(1762)
    pair = macro_area(DEFAULT.changed(cell="pair"), 2)
    assert (pair.cells + pair.select) / 4096 == 182
    assert pair.merging / 32 == pytest.approx(4860)
    assert pair.distribution / 32 == 444
    assert pair.total / dense.total - 1 == pytest.approx(0.146, abs=5e-4)
    for part, share in (("merging", 0.070), ("select", 0.070), ("distribution", 0.006)):
        assert getattr(pair, part) / dense.total == pytest.approx(share, abs=5e-4)
    for widest, cell, share in ((4, 202, 0.1067), (8, 250, 0.195)):
        gather = macro_area(DEFAULT, widest, merging=False)
        assert (gather.cells + gather.select) / 4096 == cell
        assert gather.select / dense.total == pytest.approx(share, abs=5e-4)
    parallel = macro_area(DEFAULT.changed(cell="pair", bits_per_cycle=8), 2)
    assert parallel.distribution / parallel.total == pytest.approx(0.008, abs=1e-3)
    assert parallel.merging / parallel.total == pytest.approx(0.010, abs=1.5e-3)
    assert parallel.total == pytest.approx(15.4e6, rel=0.1)


def test_an_area_in_square_millimetres_needs_a_density() -> None:
    assert macro_area(DEFAULT).mm2 is None
    area = macro_area(DEFAULT.changed(per_mm2=30e6))
    assert area.mm2 == pytest.approx(area.total / 30e6)


def test_the_headline_workload_is_the_one_of_the_specification() -> None:
    layers = headline_layers()
    assert [str(layer.gemm.pattern) for layer in layers] == ["2:8"] * 6 + ["2:4"]
    assert {(layer.tokens, layer.gemm.reduction, layer.gemm.outputs) for layer in layers} == {
        (512, 4096, 4096)
    }
    density = sum(layer.gemm.pattern.density for layer in layers) / 7
    assert density == pytest.approx(0.286, abs=5e-4)


def test_weights_made_of_activations_are_loaded_each_time_without_indices() -> None:
    hardware = DEFAULT.changed(resident=True, macros=10_000)
    fresh = Layout(hardware, Gemm(64, 64, fresh=True), DENSE, 1)
    kept = Layout(hardware, Gemm(64, 64), DENSE, 1)
    assert fresh.cycles(5) == kept.cycles(5) + 32
    assert fresh.energy(5)["load"] > 0 == kept.energy(5)["load"]
