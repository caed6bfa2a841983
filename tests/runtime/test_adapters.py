"""Compiled models in transformers' pipeline and in the lm-evaluation-harness."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer, pipeline

from fxgraft.errors import InputError
from fxgraft.generation import generate
from fxgraft.runtime.adapters.transformers_pipeline import CompiledCausalLM, as_transformers
from tests.core._generation import CONTEXT_LENGTH, LlamaSteps, byte_level_tokenizer, tiny_llama

PROMPTS = ["the quick brown fox", "stop", "日本語 over the lazy dog"]
END = 0
PAD = 1


@dataclass
class ProgramDouble:
    """What the adapters ask of a Program."""

    origin: dict[str, Any] = field(
        default_factory=lambda: {
            "class": "LlamaForCausalLM",
            "model_type": "llama",
            "context_length": CONTEXT_LENGTH,
            "generation": {"eos_token_id": END, "pad_token_id": PAD, "bos_token_id": END},
        }
    )
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from tiny_llama().named_parameters()

    def count_parameters(self) -> int:
        return sum(weight.numel() for _, weight in self.weights())


@dataclass
class CompiledDouble:
    """A compiled model: the tiny Llama, called and generating as one.

    Attributes:
        calls: number of rows of each forward pass.
    """

    program: Any = field(default_factory=ProgramDouble)
    calls: list[int] = field(default_factory=list[int])

    def __call__(self, input_ids: Tensor, *, attention_mask: Tensor | None = None) -> Any:
        self.calls.append(len(input_ids))
        logits = tiny_llama()(input_ids=input_ids, attention_mask=attention_mask).logits
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        model = LlamaSteps(tiny_llama(), eos_token_ids=(END,), pad_token_id=PAD)
        return cast(Any, generate)(model, input_ids, attention_mask, **options)


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model itself, with the generation configuration of its compiled twin."""
    model: Any = tiny_llama()
    own = GenerationConfig(eos_token_id=END, pad_token_id=PAD, bos_token_id=END)
    monkeypatch.setattr(model, "generation_config", own)
    return model


def make_pipeline(model: Any, **options: Any) -> Any:
    make = cast(Any, pipeline)
    return make(
        "text-generation", model=model, tokenizer=byte_level_tokenizer(), device="cpu", **options
    )


# transformers.pipeline


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 8},
        {"max_new_tokens": 8, "batch_size": 3},
        {"max_new_tokens": 8, "batch_size": 2, "repetition_penalty": 1.3},
        {"max_length": 30},
        {"max_new_tokens": 12, "stop_sequence": ["e"]},
        {"max_new_tokens": 6, "return_full_text": False},
        {"max_new_tokens": 6, "return_tensors": True},
        {"max_new_tokens": 5, "min_new_tokens": 3, "eos_token_id": list(range(3, 300))},
        {"max_new_tokens": 5, "do_sample": False, "temperature": 0.0},
        {"max_new_tokens": 5, "num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {},
    ],
)
def test_pipeline_answers_like_the_original_model(original: Any, options: dict[str, Any]) -> None:
    arguments = {"do_sample": False, **options}
    if not options:
        arguments["generation_config"] = GenerationConfig(max_new_tokens=7)
    expected = make_pipeline(original)(PROMPTS, **arguments)
    actual = make_pipeline(as_transformers(CompiledDouble()))(PROMPTS, **arguments)
    assert actual == expected


def test_pipeline_takes_the_model_without_complaint(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("transformers.pipelines.base", "transformers.generation.utils"):
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        pipe = make_pipeline(as_transformers(CompiledDouble()))
        pipe("the fox", max_new_tokens=2, do_sample=False)
    finally:
        for name in ("transformers.pipelines.base", "transformers.generation.utils"):
            logging.getLogger(name).removeHandler(caplog.handler)
    assert caplog.messages == []
    assert "LlamaForCausalLM" in repr(pipe)


def test_pipeline_samples_reproducibly_from_the_global_seed() -> None:
    pipe = make_pipeline(as_transformers(CompiledDouble()))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}

    def draw(seed: int) -> list[str]:
        cast(Any, torch).manual_seed(seed)
        return [answer["generated_text"] for answer in pipe("the", **options)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert len(set(draw(3))) == 3


def test_pipeline_takes_conversations(original: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{{ m['content'] }}. {% endfor %}"
    monkeypatch.setattr(byte_level_tokenizer(), "chat_template", template)
    chat = [{"role": "user", "content": "the dog"}]
    answers = [
        make_pipeline(model)(chat, max_new_tokens=4, do_sample=False)
        for model in (original, as_transformers(CompiledDouble()))
    ]
    assert answers[0] == answers[1]
    assert answers[1][0]["generated_text"][-1]["role"] == "assistant"


def test_default_number_of_tokens_is_transformers(original: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    expected = original.generate(ids, do_sample=False)
    assert torch.equal(cast(Tensor, as_transformers(CompiledDouble()).generate(ids)), expected)


def test_default_candidates_are_transformers() -> None:
    """transformers samples from the 50 likeliest tokens unless told otherwise."""
    compiled = CompiledDouble()
    ids = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True, "temperature": 3.0}
    drawn: list[Tensor] = []
    for top_k in (None, 50, 0):
        cast(Any, torch).manual_seed(0)
        drawn.append(cast(Any, as_transformers(compiled)).generate(ids, top_k=top_k, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_empty_prompt_starts_from_the_first_token() -> None:
    model = as_transformers(CompiledDouble())
    expected = cast(Tensor, model.generate(torch.tensor([[END]]), max_new_tokens=3))
    assert torch.equal(cast(Tensor, model.generate(max_new_tokens=3)), expected)


def test_streamer_and_stopping_criteria_are_served(
    original: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer(PROMPTS[:2], padding=True, return_tensors="pt")

    def third_token(sequences: Tensor, scores: Any) -> Tensor:
        return torch.tensor([sequences.shape[1] >= ids["input_ids"].shape[1] + 3, False])

    printed: list[str] = []
    answers: list[Tensor] = []
    models: list[Any] = [original, as_transformers(CompiledDouble())]
    for model in models:
        answers.append(model.generate(**ids, max_new_tokens=6, stopping_criteria=[third_token]))
        one = {name: value[:1] for name, value in ids.items()}
        model.generate(**one, max_new_tokens=6, streamer=TextStreamer(tokenizer))
        printed.append(capsys.readouterr().out)
    assert torch.equal(answers[0], answers[1])
    assert printed[0] == printed[1] != ""


def test_model_is_described_like_the_original(original: Any) -> None:
    model = as_transformers(CompiledDouble(), byte_level_tokenizer())
    assert isinstance(model, CompiledCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.can_generate()
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.config.model_type == "llama"
    assert model.num_parameters() == original.num_parameters()
    assert model.to("cpu") is model
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, original(ids).logits)
    output: Any = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert output.sequences.shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
        ({"typical_p": 0.5}, "typical_p=0.5"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"logits_processor": [min]}, "logits_processor"),
        ({"output_scores": True}, "output_scores"),
        ({"temperature": 0.0, "do_sample": True}, "temperature"),
        ({"stop_strings": ["a"]}, "tokenizer"),
        ({"max_length": 2}, "max_new_tokens"),
    ],
)
def test_options_without_counterpart_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_transformers(CompiledDouble()).generate(torch.tensor([[3, 4]]), **options)


def test_moving_and_saving_are_refused(tmp_path: Any) -> None:
    model = as_transformers(CompiledDouble())
    with pytest.raises(InputError, match="compiled for cpu"):
        model.to("meta")
    with pytest.raises(InputError, match="compiled for cpu"):
        model.to(torch.float16)
    with pytest.raises(InputError, match=r"compiled\.save"):
        model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="embeddings"):
        model.num_parameters(exclude_embeddings=True)


# The lm-evaluation-harness


@pytest.fixture(scope="module")
def harness() -> Any:
    """The harness's model class and request class."""
    pytest.importorskip("lm_eval")
    from fxgraft.runtime.adapters import lm_eval as adapter

    return adapter


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    instances: Any = pytest.importorskip("lm_eval.api.instance")
    return [instances.Instance(kind, {}, values, index) for index, values in enumerate(arguments)]


@pytest.fixture
def peers(harness: Any, original: Any) -> tuple[Any, Any]:
    """The harness's own model class on the original model, and ours on the compiled one."""
    huggingface: Any = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = byte_level_tokenizer()
    theirs = huggingface.HFLM(
        pretrained=original, tokenizer=tokenizer, batch_size=3, max_length=CONTEXT_LENGTH
    )
    return theirs, harness.CompiledLM(CompiledDouble(), tokenizer, batch_size=3)


def assert_same_scores(actual: list[Any], expected: list[Any]) -> None:
    values, wanted = torch.tensor(actual).double(), torch.tensor(expected).double()
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-4)


def test_loglikelihood_equals_the_harness(peers: tuple[Any, Any]) -> None:
    asked = requests(
        "loglikelihood",
        ("the quick brown", " fox"),
        ("the quick brown ", "dog"),
        ("", "stop"),
        ("日本語", " over the lazy dog, then it stops."),
        ("x" * 100, " stop"),
        ("the", " a"),
        ("the", " b"),
    )
    theirs, ours = (peer.loglikelihood(asked, disable_tqdm=True) for peer in peers)
    assert_same_scores(ours, theirs)
    assert all(score < 0 for score, _ in ours)


def test_greedy_continuation_is_recognised(peers: tuple[Any, Any]) -> None:
    ours = peers[1]
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("the fox", return_tensors="pt")["input_ids"]
    token = int(tiny_llama()(ids).logits[0, -1].argmax())
    context = ids[0].tolist()
    found = ours._loglikelihood_tokens(
        [(None, context, [token]), (None, context, [token - 1])], disable_tqdm=True
    )
    assert [greedy for _, greedy in found] == [True, False]


def test_choices_that_share_a_context_cost_one_pass(harness: Any) -> None:
    compiled = CompiledDouble()
    ours = harness.CompiledLM(compiled, byte_level_tokenizer(), batch_size=4)
    asked = requests("loglikelihood", *(("the answer is ", letter) for letter in "ABCD"))
    scores = ours.loglikelihood(asked, disable_tqdm=True)
    assert compiled.calls == [1]
    assert len({score for score, _ in scores}) == 4


def test_rolling_loglikelihood_equals_the_harness(peers: tuple[Any, Any]) -> None:
    long = "stop, stopper, topper! naïve café " * 8
    asked = requests("loglikelihood_rolling", ("the lazy dog",), (long,), ("a",))
    theirs, ours = (peer.loglikelihood_rolling(asked, disable_tqdm=True) for peer in peers)
    assert_same_scores(ours, theirs)
    assert ours[1] < ours[0]


def test_generation_equals_the_harness(peers: tuple[Any, Any]) -> None:
    until: dict[str, Any] = {"until": ["e", "\n\n"], "max_gen_toks": 12}
    free: dict[str, Any] = {"until": [], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0}
    asked = requests(
        "generate_until",
        ("the quick brown fox", until),
        ("stop", until),
        ("日本語 over the lazy dog", until),
        ("x" * 100, until),
        ("the", free),
        ("a naïve café", free),
    )
    theirs, ours = (peer.generate_until(asked, disable_tqdm=True) for peer in peers)
    assert ours == theirs
    assert any(ours)


def test_stop_strings_count_in_the_answer_only(harness: Any, original: Any) -> None:
    """A stop string that starts in the prompt does not end the harness's answers."""
    tokenizer = byte_level_tokenizer()
    answer = tokenizer.decode(
        original.generate(**tokenizer("the fox", return_tensors="pt"), max_new_tokens=4)[0, -4:]
    )
    ours = harness.CompiledLM(CompiledDouble(), tokenizer)
    stop = "fox" + answer[0]
    asked = requests("generate_until", ("the fox", {"until": [stop], "max_gen_toks": 4}))
    assert ours.generate_until(asked, disable_tqdm=True) == [answer]


def test_answers_go_to_the_harness_cache(harness: Any) -> None:
    ours = harness.CompiledLM(CompiledDouble(), byte_level_tokenizer())
    stored: list[str] = []

    def store(kind: str, request: Any, answer: Any) -> None:
        stored.append(kind)

    ours.set_cache_hook(SimpleNamespace(add_partial=store))
    ours.loglikelihood(requests("loglikelihood", ("a", "b")), disable_tqdm=True)
    ours.loglikelihood_rolling(requests("loglikelihood_rolling", ("a",)), disable_tqdm=True)
    ours.generate_until(
        requests("generate_until", ("a", {"until": ["b"], "max_gen_toks": 2})), disable_tqdm=True
    )
    assert stored == ["loglikelihood", "loglikelihood_rolling", "generate_until"]


def test_harness_limits_are_told(harness: Any) -> None:
    tokenizer = byte_level_tokenizer()
    with pytest.raises(InputError, match="batch_size"):
        harness.CompiledLM(CompiledDouble(), tokenizer, batch_size=0)
    short = harness.CompiledLM(CompiledDouble(), tokenizer, max_length=4)
    with pytest.raises(InputError, match="max_length is 4"):
        short.loglikelihood(requests("loglikelihood", ("a", "x" * 9)), disable_tqdm=True)
    asked = requests("generate_until", ("a", {"until": [], "max_gen_toks": 4}))
    with pytest.raises(InputError, match="leaves no room"):
        short.generate_until(asked, disable_tqdm=True)


def test_compiled_model_also_passes_for_the_harness_own_class(peers: tuple[Any, Any]) -> None:
    huggingface: Any = pytest.importorskip("lm_eval.models.huggingface")
    wrapped = huggingface.HFLM(
        pretrained=as_transformers(CompiledDouble()),
        tokenizer=byte_level_tokenizer(),
        batch_size=2,
        max_length=CONTEXT_LENGTH,
    )
    scored = requests("loglikelihood", ("the quick brown", " fox"), ("stop", "per"))
    answered = requests("generate_until", ("the fox", {"until": ["e"], "max_gen_toks": 8}))
    assert_same_scores(
        wrapped.loglikelihood(scored, disable_tqdm=True),
        peers[0].loglikelihood(scored, disable_tqdm=True),
    )
    assert wrapped.generate_until(answered, disable_tqdm=True) == peers[0].generate_until(
        answered, disable_tqdm=True
    )
