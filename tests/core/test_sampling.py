"""Sampling: scores are those of transformers; draws follow the distribution by law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fxgraft.generation import (
    History,
    SamplingOptions,
    generate,
    process_logits,
    sample,
)
from fxgraft.generation.sampling import draw
from tests.core._generation import (
    PAD,
    PROMPTS,
    quick,
    run,
    steps,
)

# Scores


def hf_scores(logits: Tensor, option: SamplingOptions, history: History) -> Tensor:
    """One row's scores by transformers' processors, in transformers' order."""
    made: list[Any] = []
    if option.repetition_penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(option.repetition_penalty))
    if option.min_new_tokens and option.eos_token_id:
        made.append(
            MinNewTokensLengthLogitsProcessor(
                history.prompt_length, option.min_new_tokens, list(option.eos_token_id)
            )
        )
    if option.do_sample:
        made.append(TemperatureLogitsWarper(option.temperature))
        made += [TopKLogitsWarper(option.top_k)] if option.top_k else []
        made += [TopPLogitsWarper(option.top_p)] if option.top_p < 1 else []
        made += [MinPLogitsWarper(option.min_p)] if option.min_p else []
    tokens = cast(Any, history.tokens[None])
    return cast(Any, LogitsProcessorList(made))(tokens, logits[None].clone())[0]


option_sets = st.builds(
    SamplingOptions,
    do_sample=st.booleans(),
    temperature=st.floats(0.1, 3.0),
    top_k=st.sampled_from([0, 1, 2, 7, 1000]),
    top_p=st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.5]),
    min_new_tokens=st.sampled_from([0, 3]),
    eos_token_id=st.sampled_from([(), (0,), (1, 5)]),
)


@quick
@given(st.lists(option_sets, min_size=1, max_size=5), st.integers(0, 1000), st.integers(0, 4))
def test_scores_equal_transformers_row_by_row(
    options: list[SamplingOptions], seed: int, generated: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(len(options), 40, generator=generator)
    untouched = logits.clone()
    tokens = torch.randint(0, 45, (len(options), 6), generator=generator)
    histories = [History(row, 6 - generated) for row in tokens]
    scores = process_logits(logits, options, histories)
    for row, option in enumerate(options):
        expected = hf_scores(logits[row], option, histories[row])
        torch.testing.assert_close(scores[row], expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, untouched)


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 12.0])
@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.99, 0.9999])
def test_nucleus_of_a_large_vocabulary_equals_transformers(spread: float, top_p: float) -> None:
    """With the nucleus inside the likeliest 256, inside 4096, and beyond."""
    generator = torch.Generator().manual_seed(1)
    # A slope keeps all probabilities distinct where the random part is zero.
    logits = spread * torch.randn(2, 9000, generator=generator) - torch.arange(9000) / 9000
    options = [SamplingOptions(do_sample=True, top_p=top_p)] * 2
    history = History(torch.tensor([0]), 1)
    scores = process_logits(logits, options, [history, history])
    for row in range(2):
        expected = hf_scores(logits[row], options[row], history)
        differing = torch.isinf(scores[row]) != torch.isinf(expected)
        # Both sum thousands of float32 probabilities, so the edge may differ by their error.
        assert logits[row].softmax(-1)[differing].sum() < 2e-6
        assert torch.equal(scores[row][~differing], expected[~differing])


def test_greedy_rows_never_pay_for_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_rows: list[int] = []

    def count(original: Callable[..., Any]) -> Callable[..., Any]:
        def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            sorted_rows.append(len(tensor))
            return original(tensor, *args, **kwargs)

        return counting

    for name in ("sort", "topk", "softmax"):
        monkeypatch.setattr(Tensor, name, count(getattr(Tensor, name)))
    greedy = SamplingOptions(repetition_penalty=1.2, temperature=0.5, top_k=3, top_p=0.5, min_p=0.1)
    sampled = SamplingOptions(do_sample=True, top_p=0.5)
    history = History(torch.tensor([1, 2]), 2)
    process_logits(torch.randn(4, 50), [greedy] * 4, [history] * 4)
    assert sorted_rows == []
    process_logits(torch.randn(4, 50), [greedy, sampled, greedy, greedy], [history] * 4)
    assert set(sorted_rows) == {1}


# Drawing


@quick
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(0, 3))
def test_quantiles_follow_the_distribution(seed: int, vocabulary: int, removed: int) -> None:
    """Evenly spaced quantiles hit each token as often as its probability says, to one."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(1, vocabulary, generator=generator)
    scores[0, :removed][: vocabulary - 1] = -torch.inf
    count = 1000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = draw(scores.expand(count, -1), uniform)
    hits = tokens.bincount(minlength=vocabulary)
    expected = count * scores[0].double().softmax(-1)
    assert (hits - expected).abs().max() <= 1 + 1e-3
    assert hits[torch.isinf(scores[0])].sum() == 0


def test_extreme_quantiles_hit_possible_tokens_only() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens = draw(scores.expand(2, -1), uniform)
    assert cast(Any, tokens).tolist() == [1, 3]


def test_batch_mixes_greedy_and_sampled_rows() -> None:
    logits = torch.randn(3, 20)
    history = History(torch.tensor([1]), 1)
    options = [SamplingOptions(), SamplingOptions(do_sample=True), SamplingOptions()]
    generators = [None, torch.Generator().manual_seed(3), None]
    mixed = sample(logits, options, [history] * 3, generators)
    alone = sample(logits[1:2], options[1:2], [history], [torch.Generator().manual_seed(3)])
    assert mixed[1] == alone[0]
    assert torch.equal(mixed[[0, 2]], logits[[0, 2]].argmax(-1))


def draw_tokens(prompts: Any, seed: int | None, **options: Any) -> Tensor:
    options.update(max_new_tokens=8, do_sample=True, seed=seed)
    return run(steps(pad_token_id=PAD), prompts, **options)


def seed_globally(seed: int) -> None:
    cast(Any, torch).manual_seed(seed)


def test_seed_decides_and_rows_are_independent() -> None:
    batch = draw_tokens(PROMPTS, 7)
    assert torch.equal(batch, draw_tokens(PROMPTS, 7))
    assert not torch.equal(batch, draw_tokens(PROMPTS, 8))
    for row, prompt in enumerate(PROMPTS):
        alone = draw_tokens([prompt], 7)
        assert torch.equal(batch[row, 7:], alone[0, len(prompt) :])


def test_copies_of_a_prompt_draw_differently() -> None:
    copies = draw_tokens([PROMPTS[0], PROMPTS[1], PROMPTS[0]], 7)
    assert not torch.equal(copies[0], copies[2])
    assert torch.equal(copies[0], draw_tokens([PROMPTS[0]], 7)[0])


def test_without_seed_the_global_state_decides() -> None:
    seed_globally(5)
    first, second = draw_tokens(PROMPTS, None), draw_tokens(PROMPTS, None)
    assert not torch.equal(first, second)
    seed_globally(5)
    assert torch.equal(first, draw_tokens(PROMPTS, None))


def test_greedy_decoding_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    generate(steps(), PROMPTS, max_new_tokens=3)
    draw_tokens(PROMPTS, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_one_candidate_is_greedy() -> None:
    greedy = generate(steps(), PROMPTS, max_new_tokens=8)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        assert torch.equal(draw_tokens(PROMPTS, 1, **options)[:, 7:], greedy[:, 7:]), options
