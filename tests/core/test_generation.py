"""Generation against transformers' own, and by law where transformers' draws are luck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fxgraft.errors import Error, InputError
from fxgraft.generation import (
    GenerationOutput,
    History,
    SamplingKeywords,
    SamplingOptions,
    StopStringMatcher,
    TextStream,
    Vocabulary,
    generate,
    prepare_prompt,
    process_logits,
    sample,
)
from fxgraft.generation.sampling import draw
from tests.core._generation import (
    CONTEXT_LENGTH,
    LlamaSteps,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    tiny_llama,
)

PROMPTS = [[5, 17, 93, 20, 41, 7, 77], [30], [12, 99, 12, 12]]
PAD = 1
quick = settings(max_examples=60, deadline=None)


def padded(prompts: Sequence[Sequence[int]] = PROMPTS) -> dict[str, Any]:
    width = max(len(prompt) for prompt in prompts)
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(p)) + list(p) for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def steps(**fields: Any) -> LlamaSteps:
    return LlamaSteps(tiny_llama(), **fields)


def run(model: LlamaSteps, *prompt: Any, **options: Any) -> Tensor:
    """``generate`` with options from a dictionary."""
    return generate(model, *prompt, return_dict=False, **options)


def reference(**arguments: Any) -> Tensor:
    """What transformers generates."""
    return cast(Any, tiny_llama()).generate(**arguments)


def new_tokens(prompt: Sequence[int], count: int) -> list[int]:
    """Greedy continuation without any end."""
    ids = generate(steps(), [prompt], max_new_tokens=count)
    return cast(Any, ids[0, len(prompt) :]).tolist()


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


# Text and stop strings

TOKENIZERS = pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])


@TOKENIZERS
def test_bytes_of_tokens_join_to_the_decoded_text(make: Callable[[], Any]) -> None:
    tokenizer = make()
    vocabulary = Vocabulary(tokenizer)
    ids = tokenizer("stopper a é 日本語 🙂 \n<<stop")["input_ids"]
    text = b"".join(vocabulary.bytes_of(token) for token in ids).decode()
    assert text.removeprefix(" ") == tokenizer.decode(ids)
    assert vocabulary.bytes_of(len(tokenizer) + 3) == b""


def test_added_tokens_stand_for_their_own_text() -> None:
    tokenizer = byte_level_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    # All letters of the second one also stand for bytes, but in an added token they are letters.
    for text in ("  é  ", "naïf"):
        assert vocabulary.bytes_of(tokenizer.convert_tokens_to_ids(text)).decode() == text
    assert vocabulary.bytes_of(tokenizer.eos_token_id) == b"<|end|>"


@quick
@given(st.text(max_size=20))
def test_text_comes_in_whole_characters(text: str) -> None:
    tokenizer = byte_level_tokenizer()
    stream = TextStream(Vocabulary(tokenizer))
    ids: list[int] = tokenizer(text)["input_ids"]
    parts = [stream.push(token) for token in ids]
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
    assert "".join(parts) + stream.finish() == tokenizer.decode(ids)


def test_text_stream_leaves_out_special_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    assert TextStream(vocabulary).push(tokenizer.eos_token_id) == ""
    verbose = TextStream(vocabulary, skip_special_tokens=False)
    assert verbose.push(tokenizer.eos_token_id) == "<|end|>"


def test_text_stream_shows_a_broken_end_at_last() -> None:
    tokenizer = byte_fallback_tokenizer()
    stream = TextStream(Vocabulary(tokenizer))
    assert stream.push(tokenizer.convert_tokens_to_ids("<0xE6>")) == ""
    assert stream.finish() == "\ufffd"


@TOKENIZERS
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_stop_strings_match_where_transformers_matches(
    make: Callable[[], Any], data: st.DataObject
) -> None:
    tokenizer = make()
    # Few stop strings, because transformers' criteria sort the vocabulary for each set anew.
    stops = data.draw(
        st.sampled_from([("stop",), ("é",), ("日", "pe"), ("a st", "\n\n"), ("s",), ("🙂",)])
    )
    ids = data.draw(st.lists(st.sampled_from(ids_of_interest(tokenizer)), min_size=1, max_size=12))
    prompt_length = data.draw(st.integers(0, len(ids) - 1))
    criteria = cast(Any, StopStringCriteria)(tokenizer, list(stops))
    matcher = StopStringMatcher(stops, Vocabulary(tokenizer), ids[:prompt_length])
    for end in range(prompt_length, len(ids)):
        expected = bool(criteria(torch.tensor([ids[: end + 1]]), None)[0])
        assert matcher.push(ids[end]) == expected, (tokenizer.convert_ids_to_tokens(ids), stops)


def ids_of_interest(tokenizer: Any) -> list[int]:
    """Words of the stop strings, and the bytes of their characters."""
    names = tokenizer.get_vocab()
    spellings = {*"stopera\n", "Ċ", "Ġ", "▁", "st", "op", "stop", "Ġst", "▁st", "er", "<unk>"}
    raw = "é日🙂\n".encode()
    level = {tokenizer.convert_ids_to_tokens(i) for i in tokenizer("é日🙂")["input_ids"]}
    spellings |= level | {f"<0x{byte:02X}>" for byte in raw}
    return sorted(names[spelling] for spelling in spellings if spelling in names)


def test_stop_string_inside_token_bytes() -> None:
    """The last byte of ``é`` completes it; the first does not, nor does a lookalike."""
    tokenizer = byte_fallback_tokenizer()
    matcher = StopStringMatcher(["é"], Vocabulary(tokenizer))
    first, last, other = (tokenizer.convert_tokens_to_ids(f"<0x{b}>") for b in ("C3", "A9", "A8"))
    assert [matcher.push(t) for t in (first, other, last, first, last)] == [False] * 4 + [True]


def test_stop_string_may_start_in_the_prompt_but_not_lie_in_it() -> None:
    tokenizer = byte_level_tokenizer()
    vocabulary = Vocabulary(tokenizer)
    s, t, o, p = (tokenizer.convert_tokens_to_ids(char) for char in "stop")
    assert StopStringMatcher(["stop"], vocabulary, [o, s, t, o]).push(p)
    assert not StopStringMatcher(["stop"], vocabulary, [s, t, o, p]).push(o)
    assert not StopStringMatcher(["stop"], vocabulary).push(p)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_output_ends_with_the_token_that_completes_a_stop_string(length: int) -> None:
    tokenizer = byte_level_tokenizer()
    free = new_tokens(PROMPTS[0], 10)
    # The stop string starts and ends inside tokens where these are long enough.
    stop = tokenizer.decode(free[3 : 3 + length])
    stop = stop[1:-1] if len(stop) > 3 else stop
    assert "\ufffd" not in stop
    arguments: dict[str, Any] = {
        "max_new_tokens": 10, "stop_strings": [stop, "unheard of"], "tokenizer": tokenizer,
    }  # fmt: skip
    expected = reference(input_ids=torch.tensor([PROMPTS[0]]), **arguments)
    actual = generate(steps(), PROMPTS[0], return_dict=True, **arguments)
    assert torch.equal(actual.sequences, expected)
    assert actual.finish_reasons == ("stop_string",)
    text = tokenizer.decode(actual.new_tokens[0])
    assert stop in text
    assert stop not in tokenizer.decode(actual.new_tokens[0][:-1])


def test_stop_strings_end_rows_one_by_one() -> None:
    tokenizer = byte_level_tokenizer()
    stop = tokenizer.decode(new_tokens(PROMPTS[2], 10)[3:5])
    arguments: dict[str, Any] = {
        "max_new_tokens": 10, "stop_strings": stop, "tokenizer": tokenizer,
        "eos_token_id": [PAD], "pad_token_id": PAD,
    }  # fmt: skip
    expected = reference(**padded(), **arguments)
    assert (expected[:, -1] == PAD).any(), "no row was stopped"
    assert torch.equal(run(steps(), **padded(), **arguments), expected)


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
