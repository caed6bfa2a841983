"""Generation against transformers' own: greedy tokens, streaming, bad input."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fxgraft.errors import Error, InputError
from fxgraft.generation import (
    GenerationOutput,
    SamplingKeywords,
    SamplingOptions,
    generate,
    prepare_prompt,
)
from tests.core._generation import (
    CONTEXT_LENGTH,
    PAD,
    PROMPTS,
    new_tokens,
    padded,
    reference,
    run,
    steps,
)

# Greedy decoding


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.6},
        {"min_new_tokens": 4, "eos_token_id": list(range(200))},
        {"repetition_penalty": 1.2, "min_new_tokens": 2, "eos_token_id": [3, 4, 5]},
    ],
)
def test_batch_of_unequal_prompts_equals_transformers(options: dict[str, Any]) -> None:
    expected = reference(**padded(), max_new_tokens=12, pad_token_id=PAD, **options)
    actual = run(steps(pad_token_id=PAD), **padded(), max_new_tokens=12, **options)
    assert torch.equal(actual, expected)


def test_rows_end_at_different_steps_and_are_padded() -> None:
    free = run(steps(), **padded(), max_new_tokens=12)
    ends = [int(free[0, 7 + 2]), int(free[1, 7 + 6])]
    expected = reference(**padded(), max_new_tokens=12, eos_token_id=ends, pad_token_id=PAD)
    assert (expected == PAD).sum() > (padded()["input_ids"] == PAD).sum(), "no row ended early"
    given_ends = run(steps(), **padded(), max_new_tokens=12, eos_token_id=ends, pad_token_id=PAD)
    own_ends = run(
        steps(eos_token_ids=tuple(ends), pad_token_id=PAD), **padded(), max_new_tokens=12
    )
    assert torch.equal(given_ends, expected)
    assert torch.equal(own_ends, expected)


def test_padding_defaults_to_the_first_end_token() -> None:
    ends = [new_tokens(PROMPTS[0], 3)[2], 3]
    expected = reference(**padded(), max_new_tokens=8, eos_token_id=ends)
    assert torch.equal(run(steps(), **padded(), max_new_tokens=8, eos_token_id=ends), expected)


def test_padding_is_not_penalized_as_repetition() -> None:
    favourite = new_tokens(PROMPTS[1], 1)[0]
    arguments: dict[str, Any] = {
        **padded(), "max_new_tokens": 4, "repetition_penalty": 5.0, "pad_token_id": favourite,
    }  # fmt: skip
    arguments["input_ids"] = torch.where(
        arguments["attention_mask"] == 0, favourite, arguments["input_ids"]
    )
    actual = run(steps(), **arguments)
    assert int(actual[1, 7]) == favourite
    assert torch.equal(actual, reference(**arguments))


def test_generation_stops_when_all_rows_have_ended() -> None:
    end = new_tokens(PROMPTS[0], 3)[2]
    model = steps(eos_token_ids=(end,))
    ids = generate(model, [PROMPTS[0]], max_new_tokens=30)
    assert ids.shape[1] == len(PROMPTS[0]) + new_tokens(PROMPTS[0], 3).index(end) + 1
    assert len(model.batches) == ids.shape[1] - len(PROMPTS[0])


@pytest.mark.parametrize("as_tensors", [True, False])
def test_list_of_prompts_is_padded_on_the_left(as_tensors: bool) -> None:
    prompts: Any = [torch.tensor(p) for p in PROMPTS] if as_tensors else PROMPTS
    actual = generate(steps(pad_token_id=PAD), prompts, max_new_tokens=5)
    assert torch.equal(actual, run(steps(), **padded(), max_new_tokens=5))


def test_one_prompt_may_come_without_batch_dimension() -> None:
    expected = generate(steps(), [PROMPTS[0]], max_new_tokens=4)
    assert torch.equal(generate(steps(), PROMPTS[0], max_new_tokens=4), expected)
    assert torch.equal(generate(steps(), torch.tensor(PROMPTS[0]), max_new_tokens=4), expected)


def test_padding_is_inferred_as_transformers_does() -> None:
    ids = padded()["input_ids"]
    expected = reference(input_ids=ids, max_new_tokens=5, pad_token_id=PAD)
    assert torch.equal(generate(steps(pad_token_id=PAD), ids, max_new_tokens=5), expected)
    # A padding token that also ends texts cannot be told from text.
    expected = reference(input_ids=ids, max_new_tokens=5, pad_token_id=PAD, eos_token_id=PAD)
    actual = generate(steps(pad_token_id=PAD, eos_token_ids=(PAD,)), ids, max_new_tokens=5)
    assert torch.equal(actual, expected)


def test_ended_rows_leave_the_model() -> None:
    prompts = [PROMPTS[0], *PROMPTS]
    ends = (int(generate(steps(), PROMPTS[0], max_new_tokens=2)[0, -1]),)
    model = steps(eos_token_ids=ends, pad_token_id=PAD)
    actual = generate(model, prompts, max_new_tokens=10)
    expected = reference(
        **padded(prompts), max_new_tokens=10, eos_token_id=list(ends), pad_token_id=PAD
    )
    assert torch.equal(actual, expected)
    assert model.batches[0] == 4
    assert model.batches[-1] <= 2, model.batches


def test_output_object_tells_lengths_and_reasons() -> None:
    end = new_tokens(PROMPTS[0], 3)[2]
    output = generate(
        steps(eos_token_ids=(end,), pad_token_id=PAD), PROMPTS, max_new_tokens=6, return_dict=True
    )
    assert isinstance(output, GenerationOutput)
    assert output.finish_reasons[0] == "eos"
    assert "length" in output.finish_reasons
    for row, prompt in enumerate(PROMPTS):
        tokens = cast(Any, output.new_tokens[row]).tolist()
        assert len(tokens) == output.lengths[row] <= 6
        assert tokens == new_tokens(prompt, 6)[: len(tokens)]


def test_context_may_be_used_up_to_its_last_token() -> None:
    ids = generate(steps(), PROMPTS[0], max_new_tokens=CONTEXT_LENGTH - len(PROMPTS[0]))
    assert ids.shape == (1, CONTEXT_LENGTH)


# Streaming


def test_callback_sees_each_step() -> None:
    end = new_tokens(PROMPTS[0], 3)[2]
    seen: list[tuple[Tensor, Tensor]] = []

    def watch(tokens: Tensor, ended: Tensor) -> None:
        seen.append((tokens, ended))

    model = steps(eos_token_ids=(end,), pad_token_id=PAD)
    output = generate(model, PROMPTS, max_new_tokens=6, on_token=watch, return_dict=True)
    assert torch.equal(torch.stack([tokens for tokens, _ in seen], 1), output.sequences[:, 7:])
    ended_at = torch.stack([ended for _, ended in seen], 1).long().argmax(1) + 1
    assert tuple(cast(Any, ended_at).tolist()) == output.lengths


@pytest.mark.parametrize("answer", [True, [True] * 3, torch.ones(3, dtype=torch.bool)])
def test_callback_can_end_generation(answer: Any) -> None:
    answers = iter([None, False, answer])
    output = generate(
        steps(), PROMPTS, max_new_tokens=20, return_dict=True,
        on_token=lambda tokens, ended: next(answers),
    )  # fmt: skip
    assert output.lengths == (3, 3, 3)
    assert output.finish_reasons == ("callback",) * 3


def test_callback_can_end_single_rows() -> None:
    model = steps(pad_token_id=PAD)
    output = generate(
        model, PROMPTS, max_new_tokens=5, return_dict=True,
        on_token=lambda tokens, ended: [True, False, False],
    )  # fmt: skip
    assert output.lengths == (1, 5, 5)
    assert cast(Any, output.sequences[0, 8:]).tolist() == [PAD] * 4
    assert torch.equal(output.sequences[1:], generate(model, PROMPTS, max_new_tokens=5)[1:])


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 2.5}, "max_new_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens=9 is over max_new_tokens=3"),
        ({"temperature": 0.0}, "do_sample=False"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"seed": -3}, "seed"),
        ({"stop_strings": [""], "tokenizer": object()}, "stop_strings"),
        ({"stop_strings": ["a"], "max_new_tokens": 3}, "tokenizer"),
        ({"pad_token_id": 10**6}, "pad_token_id"),
        ({"tempreature": 1.0}, "no generation option 'tempreature'"),
        ({"max_new_tokens": CONTEXT_LENGTH}, f"at most {CONTEXT_LENGTH - 7}"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(steps(), PROMPTS, **options)


@pytest.mark.parametrize(
    ("prompts", "mask", "message"),
    [
        ([], None, "no prompt"),
        ([[1], []], None, "prompt 1 is empty"),
        (torch.zeros(0, 3, dtype=torch.int64), None, "no prompt"),
        (torch.zeros(2, 0, dtype=torch.int64), None, "prompt 0 is empty"),
        (torch.ones(2, 2, dtype=torch.int64), torch.tensor([[1, 1], [0, 0]]), "prompt 1 is empty"),
        (torch.ones(2, 2, dtype=torch.int64), torch.tensor([[1, 1], [1, 0]]), "pad on the left"),
        (torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 3), "attention_mask has shape"),
        (torch.ones(2, 2), None, "integer tensor"),
        (torch.ones(1, 2, 3, dtype=torch.int64), None, "integer tensor"),
        ([[1.5]], None, "integer token ids"),
        ([[1], [2]], torch.ones(2, 1), "list of prompts"),
        ([[3, 10**6]], None, "token id 1000000 is outside"),
        ([[3, -4]], None, "token id -4 is outside"),
        ([[3] * 70], None, "has 70 tokens, the model's context holds 64"),
        ([[3], [3] * 64], None, "prompt 1 has 64 tokens.*shorten the prompt by at least 1 tokens"),
    ],
)
def test_bad_prompts_are_refused(prompts: Any, mask: Tensor | None, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        generate(steps(), prompts, mask)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_step(poison: float) -> None:
    def change(logits: Tensor, step: int) -> None:
        if step == 2:
            logits[1, 4] = poison

    with pytest.raises(Error, match="row 1 are not finite at generation step 2"):
        generate(steps(change=change), PROMPTS, max_new_tokens=5)


def test_barred_tokens_are_no_poison() -> None:
    def change(logits: Tensor, step: int) -> None:
        logits[:, 10:] = -torch.inf

    ids = generate(steps(change=change), PROMPTS, max_new_tokens=3, do_sample=True, seed=0)
    assert int(ids[:, 7:].max()) < 10


def test_options_are_one_frozen_record() -> None:
    options = SamplingOptions(stop_strings=("a",), eos_token_id=(3,))
    assert set(SamplingKeywords.__annotations__) == set(SamplingOptions.model_fields)
    assert SamplingOptions.model_validate_json(options.model_dump_json()) == options
    assert SamplingOptions.checked(eos_token_id=3, stop_strings="a") == options
    with pytest.raises(ValidationError):
        cast(Any, options).top_k = 3
    with pytest.raises(ValidationError):
        cast(Any, SamplingOptions)(beams=3)


@pytest.mark.parametrize("prompt", ["text", 3, None, [["a"]]])
def test_prompts_that_are_no_token_ids(prompt: Any) -> None:
    with pytest.raises(InputError, match="input_ids"):
        prepare_prompt(prompt, None, pad_token_id=0, vocab_size=10)
