"""Texts of tokens, and stop strings, against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    StopStringCriteria,
)

from fxgraft.generation import (
    StopStringMatcher,
    TextStream,
    Vocabulary,
    generate,
)
from tests.core._generation import (
    PAD,
    PROMPTS,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    new_tokens,
    padded,
    quick,
    reference,
    run,
    steps,
)

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
