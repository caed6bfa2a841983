"""``flow``'s parts: patterns, masks, budgets, outliers, the update (specification, section 13)."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from torch import Tensor

from fxgraft.errors import InputError
from fxgraft.passes.flow import criteria, hessian, outliers
from fxgraft.passes.flow.budget import Options, select
from fxgraft.passes.flow.patterns import Pattern, candidates
from fxgraft.passes.flow.scores import Statistics, group_mask, row_mask

EIGHTS = tuple(candidates([8], None))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_patterns_of_other_codes_count_the_pruned() -> None:
    assert Pattern.from_pruned(5, 8) == Pattern(3, 8)
    assert Pattern.from_pruned(2, 4) == Pattern(2, 4)


def test_candidates() -> None:
    assert [str(p) for p in candidates([4, 8], (2, 4, 8))] == ["2:8", "4:8", "8:8", "2:4", "4:4"]
    assert len(candidates([4, 8], None)) == 12


@pytest.mark.parametrize(("m", "n"), [((6,), None), ((), None), ((4,), (5,)), ((4,), (0,))])
def test_impossible_candidates(m: tuple[int, ...], n: tuple[int, ...] | None) -> None:
    with pytest.raises(InputError):
        candidates(m, n)


@pytest.mark.parametrize("pattern", [Pattern(1, 2), Pattern(2, 4), Pattern(3, 8), Pattern(8, 16)])
def test_every_group_keeps_the_n_largest(pattern: Pattern) -> None:
    scores = random(5, 64).abs()
    kept = group_mask(scores, pattern).view(5, -1, pattern.m)
    assert bool((kept.sum(-1) == pattern.n).all())
    groups = scores.view(5, -1, pattern.m)
    least = torch.where(kept, groups, math.inf).amin(-1)
    most = torch.where(kept, -math.inf, groups).amax(-1)
    assert bool((least >= most).all())


def test_ties_go_to_the_lower_index() -> None:
    kept = group_mask(torch.tensor([[1.0, 1, 1, 1, 0, 0, 2, 0]]), Pattern(2, 4))
    assert kept.int().tolist() == [[1, 1, 0, 0, 1, 0, 1, 0]]
    assert row_mask(torch.tensor([[1.0, 1, 1, 2]]), 2).int().tolist() == [[1, 0, 0, 1]]


def test_a_short_last_group_prunes_its_missing_columns_first() -> None:
    kept = group_mask(random(3, 10).abs(), Pattern(2, 4))
    assert kept.shape == (3, 10)
    assert bool((kept[:, 8:].sum(-1) == 2).all())


@limits(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=7),
    st.integers(0, 95),
    st.integers(0, 1000),
)
def test_a_budget_is_met_or_the_nearest_above_is(sizes: list[int], percent: int, seed: int) -> None:
    budget = percent / 100
    costs = random(len(sizes), len(EIGHTS), seed=seed).abs()
    options = [option(size * 8, EIGHTS, row) for size, row in zip(sizes, costs, strict=True)]
    highest = sum(max(o.pruned) for o in options) / sum(o.parameters for o in options)
    if Fraction(str(budget)) > Fraction(highest).limit_denominator(10**6):
        with pytest.raises(InputError, match="sparsity goes from"):
            select(options, budget)
        return
    got = select(options, budget)
    wanted = Fraction(str(budget)) * got.parameters
    # Every number of groups' worth can be pruned, one weight per group at a time.
    sums = {0}
    for each in options:
        sums = {total + pruned for total in sums for pruned in each.pruned}
    assert got.pruned == min(total for total in sums if total >= wanted)
    assert got.is_exact == (got.pruned == wanted)
    assert ("as asked" in got.describe()) == got.is_exact


def option(size: int, patterns: tuple[Pattern, ...], costs: Tensor) -> Options:
    pruned = tuple(int(size * p.sparsity) for p in patterns)
    return Options(size, patterns, tuple(float(c) for c in costs), pruned)


@limits(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 70), st.integers(0, 1000)
)
def test_the_choice_is_the_optimum(sizes: list[int], percent: int, seed: int) -> None:
    patterns = (Pattern(1, 4), Pattern(2, 4), Pattern(3, 4), Pattern(4, 4))
    costs = random(len(sizes), 4, seed=seed)
    options = [option(s * 4, patterns, row) for s, row in zip(sizes, costs, strict=True)]
    got = select(options, percent / 100)
    totals = [
        (sum(o.pruned[i] for o, i in zip(options, picks, strict=True)),
         sum(o.costs[i] for o, i in zip(options, picks, strict=True)))
        for picks in itertools.product(range(4), repeat=len(options))
    ]  # fmt: skip
    best = min(cost for pruned, cost in totals if pruned == got.pruned)
    assert got.cost == pytest.approx(best, abs=1e-9)


def test_unequal_layers_meet_an_exact_budget() -> None:
    """SmolLM2's layer sizes: half of the parameters, not half of the layers."""
    sizes = [576 * 576, 192 * 576, 192 * 576, 576 * 576, *[1536 * 576] * 3] * 4
    options = [option(s, EIGHTS, random(8, seed=i).abs()) for i, s in enumerate(sizes)]
    assert select(options, 0.5).is_exact
    assert select(options, 0.625).sparsity == 0.625


def test_statistics_do_not_depend_on_batches_or_order() -> None:
    x = random(6, 5, 16)
    found: list[Tensor] = []
    for order, size in ((range(6), 6), (range(6), 1), (reversed(range(6)), 2)):
        statistics = Statistics.empty(1, 16, torch.device("cpu"), True)
        for batch in x[list(order)].split(size):
            statistics.add(batch, None, len(batch), "layer")
        assert statistics.products is not None
        found.append(statistics.squares[0])
        torch.testing.assert_close(statistics.products[0].diagonal(), statistics.squares[0])
    expected = x.double().square().sum(1).mean(0).float()
    for squares in found:
        torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0)


def test_statistics_of_experts_follow_their_rows() -> None:
    x = random(7, 8)
    statistics = Statistics.empty(3, 8, torch.device("cpu"), False)
    statistics.add(x, torch.tensor([2, 2, 7]), 1, "experts")
    torch.testing.assert_close(statistics.squares[0], x[:2].square().sum(0))
    torch.testing.assert_close(statistics.squares[2], x[2:].square().sum(0))
    assert statistics.unseen == [1]


def test_clustering_of_random_outliers_is_1() -> None:
    marks = torch.rand(1000, 1000, generator=torch.Generator().manual_seed(0)) < 0.05
    rate = float(marks.float().mean())
    assert outliers.clustering([marks], rate, 8) == pytest.approx(1, abs=0.05)


def test_clustering_of_runs_and_of_spread_outliers() -> None:
    runs = torch.rand(1000, 250, generator=torch.Generator().manual_seed(0)) < 0.1
    runs = runs.repeat_interleave(4, 1)
    assert outliers.clustering([runs], float(runs.float().mean()), 8) > 2
    spread = torch.zeros(100, 80, dtype=torch.bool)
    spread[:, ::8] = True
    assert outliers.clustering([spread], 0.125, 8) == 0
    assert outliers.clustering([torch.zeros(4, 8, dtype=torch.bool)], 0.0, 8) == 1


def test_outliers_do_not_depend_on_scale_or_order() -> None:
    scores = [random(1, 20, 32, seed=i).abs().exp() for i in range(3)]
    found = outliers.measure(scores, 3.0, 8)
    assert 0 < found.presence < 50
    scaled = outliers.measure([each * 4 for each in scores], 3.0, 8)
    turned = outliers.measure(scores[::-1], 3.0, 8)
    assert scaled == found
    assert (turned.presence, turned.clustering) == (found.presence, found.clustering)
    # The published measure looks at positions from the first layer on.
    assert turned.published != found.published


def test_published_distance_is_the_mean_over_all_pairs() -> None:
    mark = torch.zeros(2, 10, dtype=torch.bool)
    mark.view(-1)[[1, 4, 13]] = True
    assert outliers.published_distance([mark]) == pytest.approx(3 / (3 + 9 + 12))
    assert outliers.published_distance([torch.zeros(2, 2, dtype=torch.bool)]) == 0


def test_the_figure_is_reproduced() -> None:
    patterns = (Pattern(1, 4), Pattern(2, 4), Pattern(4, 8))
    costs = criteria.figure_costs([patterns] * 3, [0.0, 1.0, 1.0], [0.0, 0.0, 1.0])
    options = [
        Options(8, patterns, tuple(costs(i, p) for p in patterns),
                tuple(int(8 * p.sparsity) for p in patterns))
        for i in range(3)
    ]  # fmt: skip
    got = select(options, 14 / 24)
    assert [str(pattern) for pattern in got.patterns] == ["1:4", "2:4", "4:8"]


def correlated(rows: int, width: int) -> Tensor:
    return random(rows, width) @ random(width, width, seed=1) / width**0.5


def test_with_uncorrelated_inputs_the_update_is_the_magnitude_mask() -> None:
    weights = random(6, 32)
    new, kept = hessian.prune(weights, torch.eye(32), hessian.by_group(Pattern(4, 8)), 8)
    assert torch.equal(kept, group_mask(weights.abs(), Pattern(4, 8)))
    assert torch.equal(new, torch.where(kept, weights, 0))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 8), Pattern(8, 32)])
def test_the_update_is_the_least_squares_solution_column_by_column(pattern: Pattern) -> None:
    """Against the same elimination done with inverses of shrinking Hessians, in float64."""
    weights, x = random(3, 64).double(), correlated(200, 64).double()
    products = x.T @ x
    new, kept = hessian.prune(weights, products, hessian.by_group(pattern), pattern.m, 0.01)
    damped = products + 0.01 * products.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    expected = weights.clone()
    for column in range(64):
        inverse = torch.linalg.inv(damped[column:, column:])
        gone = torch.where(kept[:, column], 0.0, expected[:, column])
        expected[:, column:] -= gone[:, None] * inverse[0] / inverse[0, 0]
        expected[:, column][~kept[:, column]] = 0
    torch.testing.assert_close(new, expected, rtol=1e-9, atol=1e-9)
    assert bool((kept.view(3, -1, pattern.m).sum(-1) == pattern.n).all())
    assert bool((new[~kept] == 0).all())


def test_dead_inputs_get_no_weight() -> None:
    x = correlated(100, 16)
    x[:, 3] = 0
    new, _ = hessian.prune(random(4, 16), x.T @ x, hessian.by_group(Pattern(4, 8)), 8)
    assert bool((new[:, 3] == 0).all())
    assert bool(torch.isfinite(new).all())


def test_unstructured_pruning_prunes_its_share() -> None:
    x = correlated(300, 256)
    _, kept = hessian.prune(random(8, 256), x.T @ x, hessian.by_share(0.625), 128)
    assert float((~kept).float().mean()) == 0.625
