"""Every pair of passes, in both orders, composes or is refused with a reason.

A new pass adds its row to ``ROWS``; without one the first test fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import fxgraft
from fxgraft import registry
from fxgraft.backend import find_backend
from fxgraft.check import relative_error
from fxgraft.collectives import share_of
from fxgraft.errors import InputError, LoweringError, PassError
from fxgraft.generation import Vocabulary
from fxgraft.passes.dsla import Dsla
from fxgraft.passes.optimize import Optimize
from fxgraft.passes.prune_heads import PruneHeads
from fxgraft.passes.seal import Seal, SteeringVector
from fxgraft.passes.shard import Shard
from fxgraft.passes.spin import Spin
from fxgraft.pipeline import Pipeline
from fxgraft.transform import apply
from tests import model_folder
from tests.core.test_state import run_steps
from tests.passes import _flow, _spin
from tests.passes._ranks import run_share_steps, run_shares, with_others

TOLERANCE = 2e-5
HEAD_DIM = 16
SPAN = (2, 5)
"""Positions that stand for an image."""

Reference = Callable[[nn.Module, Path], contextlib.AbstractContextManager[None]]
"""Makes the original model do what a pass does, by hooks; gets the folder of the test's files."""


@dataclass(frozen=True)
class Row:
    """What the matrix needs to know about one pass.

    Attributes:
        configure: the pass at a setting that does something, given the folder of the test's files.
        reference: the same done to the original model.
        refuses: passes after which it cannot run in these settings, with words of the reason.
    """

    configure: Callable[[Path], fxgraft.Pass]
    reference: Reference
    refuses: dict[str, str]


@contextlib.contextmanager
def as_it_is(model: nn.Module, folder: Path) -> Generator[None]:
    """The reference of exact passes."""
    yield


def heads_zeroed(removed: dict[int, list[int]]) -> Reference:
    """The reference of ``prune_heads``: these heads, by layer, contribute nothing."""

    @contextlib.contextmanager
    def reference(model: nn.Module, folder: Path) -> Generator[None]:
        handles = [
            layer(model, index).self_attn.o_proj.register_forward_pre_hook(_zero(heads))
            for index, heads in removed.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return reference


def _zero(heads: list[int]) -> Callable[..., tuple[Tensor]]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = args[0].clone()
        for head in heads:
            x[..., head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
        return (x,)

    return hook


@contextlib.contextmanager
def steered(model: nn.Module, folder: Path) -> Generator[None]:
    """Adds the vector to the input of block 1 where a paragraph breaks in a thinking section."""
    vector = SteeringVector.load(folder / "vector.safetensors").direction
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        fired = breaks(folder, seen[-1])[..., None]
        return (torch.where(fired, args[0] + vector, args[0]), *args[1:])

    handles = [
        cast(Any, model).model.embed_tokens.register_forward_pre_hook(note),
        layer(model, 1).register_forward_pre_hook(add),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def spun(model: nn.Module, folder: Path) -> Generator[None]:
    """Two of the heads stay in text behind the span, as if that were an image."""
    reference = _spin.Reference(2, 0.0, torch.empty(0), torch.empty(0))

    def note(_: nn.Module, args: tuple[Any, ...], values: dict[str, Tensor]) -> None:
        mask = values["attention_mask"]
        position = mask.cumsum(-1) - 1
        reference.image = (position >= SPAN[0]) & (position < SPAN[1]) & mask.bool()
        reference.gated = (position >= SPAN[1]) & mask.bool()

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with _spin.active(model, reference):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def second_linear(model: nn.Module, folder: Path) -> Generator[None]:
    """The reference of ``dsla``: linear attention over the second layer's own projections."""

    def attend(module: Any, _: Any, values: dict[str, Any], output: Any) -> Any:
        x = values["hidden_states"]
        query, key, value = (
            projection(x).unflatten(-1, (-1, HEAD_DIM))
            for projection in (module.q_proj, module.k_proj, module.v_proj)
        )
        weights = dsla_weights()
        gate = torch.matmul(key.transpose(1, 2), weights["gate_weight"]).transpose(1, 2)
        gate = gate.unflatten(-1, (-1, HEAD_DIM)) + weights["gate_bias"]
        mixed, _ = torch.ops.fxgraft.linear_attention(
            query, key, value, gate, weights["mixing"], weights["norm_weight"], masks[-1],
            scale=HEAD_DIM**-0.5, temperature=16.0, floor=-1.0, write_scale="sqrt",
        )  # fmt: skip
        return (module.o_proj(mixed.flatten(2)), *output[1:])

    masks: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], values: dict[str, Tensor]) -> None:
        masks.append(values["attention_mask"].bool())

    handles = [
        model.register_forward_pre_hook(note, with_kwargs=True),
        layer(model, 1).self_attn.register_forward_hook(attend, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@cache
def dsla_weights() -> dict[str, Tensor]:
    """What ``dsla`` adds to the second layer."""
    after = apply(fxgraft.capture(model_folder.llama()), Dsla(layers=(1,)), check=False)
    added = {name: weight for name, weight in after.weights() if ".dsla." in name}
    return {name.rpartition(".")[2]: weight.detach() for name, weight in added.items()}


def layer(model: nn.Module, index: int) -> Any:
    return cast(Any, model).model.layers[index]


@cache
def vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary(cast(Any, PreTrainedTokenizerFast).from_pretrained(folder))


def breaks(folder: Path, ids: Tensor) -> Tensor:
    """Where the second newline of a run is completed after ``<think>`` and before ``</think>``.

    Args:
        folder: of the tokenizer.
        ids: int64 [B, S].

    Returns:
        bool [B, S].
    """
    fired = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(cast("list[list[int]]", cast(Any, ids).tolist())):
        pieces = [vocabulary(folder).bytes_of(token) for token in tokens]
        for column in range(len(pieces)):
            before, after = b"".join(pieces[:column]), b"".join(pieces[: column + 1])
            thinking = after.rfind(b"<think>") > after.rfind(b"</think>")
            fired[row, column] = thinking and after.endswith(b"\n\n") and _is_new(before, after)
    return fired


def _is_new(before: bytes, after: bytes) -> bool:
    """Whether a run of newlines got its second one just now."""
    runs = [len(text) - len(text.rstrip(b"\n")) for text in (before, after)]
    return runs[0] < 2 <= runs[1]


ROWS: dict[str, Row] = {
    "dsla": Row(
        lambda _: Dsla(layers=(1,)),
        second_linear,
        {
            "dsla": "mixes tokens by linear_attention",
            "prune_heads": r"mixes tokens by attention\+attention",
            "spin": "spin",
        },
    ),
    # A second time there is no dense layer left; nor can heads be cut out of packed weights.
    "flow": Row(_flow.sparse_inputs, _flow.inputs_pruned, {"flow": "dense_weights"}),
    "optimize": Row(lambda _: Optimize(), as_it_is, {}),
    "prune_heads": Row(
        lambda _: PruneHeads(heads={0: [1], 1: [0]}),
        heads_zeroed({0: [1], 1: [0]}),
        # The groups that it left are of unequal size, so each is an attention of its own.
        {
            "dsla": "requires the fact .has_attention.",
            "flow": "dense_weights",
            "prune_heads": r"heads of 'model\.layers\.0\.self_attn' cannot be pruned",
            "spin": r"fxgraft\.head_gate comes before the output projection",
        },
    ),
    "seal": Row(
        lambda folder: Seal(vector=folder / "vector.safetensors", tokenizer=str(folder)),
        steered,
        {},
    ),
    "shard": Row(lambda _: Shard(size=2, rank=1, vocabulary="split"), as_it_is, {}),
    "spin": Row(
        lambda _: Spin(span=SPAN, heads=2, rows="all_text"),
        spun,
        {"dsla": "dsla", "prune_heads": "divided among several attentions"},
    ),
}
PAIRS = [(first, second) for first in ROWS for second in ROWS]


def refusal(first: str, second: str) -> str | None:
    """Words of the reason why ``second`` cannot run after ``first``; None if it can."""
    if first == "shard":
        return "cannot rewrite one process's share"
    return ROWS[second].refuses.get(first)


COMPOSING = [pair for pair in PAIRS if refusal(*pair) is None]


@dataclass(frozen=True, eq=False)
class Setting:
    """What all pairs share.

    Attributes:
        folder: of the tokenizer and the vector.
        model: the original.
        program: as captured.
        values: two texts of unequal length, padded on the left.
    """

    folder: Path
    model: nn.Module
    program: fxgraft.Program
    values: dict[str, Tensor]

    def step(self, name: str) -> fxgraft.Pass:
        """The pass as its row configures it."""
        return ROWS[name].configure(self.folder)

    def run(self, program: fxgraft.Program) -> Tensor:
        """Logits of a Program on the texts; of a share together with the other ones."""
        share = share_of(program)
        if share is None:
            return program(**self.values)[0]
        return run_shares(with_others(program, self.program), self.values)[share.rank]

    def run_steps(self, program: fxgraft.Program, cuts: list[int]) -> list[Tensor]:
        """Logits of a Program's step graph at the end of each step."""
        if share_of(program) is None:
            return run_steps(fxgraft.insert_state(program), self.values, cuts)
        return run_share_steps(with_others(program, self.program), self.values, cuts)

    def original(self, references: Sequence[Reference] = ()) -> Tensor:
        """Logits of the original on the texts, with hooks."""
        with contextlib.ExitStack() as stack, torch.no_grad():
            for reference in references:
                stack.enter_context(reference(self.model, self.folder))
            return cast(Any, self.model)(**self.values, use_cache=False).logits

    @cache  # noqa: B019  (lives as long as the module's tests)
    def after(self, *names: str) -> fxgraft.Program:
        """The Program after passes in this order, with all checks."""
        if not names:
            return self.program
        return apply(self.after(*names[:-1]), self.step(names[-1]))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = model_folder.write_tokenizer(tmp_path_factory.mktemp("files"))
    model_folder.write_vector(folder / "vector.safetensors")
    model = model_folder.llama()
    long = model_folder.tokens_of(folder, model_folder.TEXT)
    short = model_folder.tokens_of(folder, "<think>x\n\ny\n\nz")
    pad = len(long) - len(short)
    ids = torch.tensor([long, [0] * pad + short])
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    values = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
    }
    assert torch.equal(breaks(folder, ids).sum(1), torch.tensor([2, 2]))
    return Setting(folder, model, fxgraft.capture(model), values)


def close(actual: Tensor, expected: Tensor) -> bool:
    return relative_error(actual, expected) < TOLERANCE


def test_every_pass_has_a_row() -> None:
    ours = {
        name for name, kind in registry.passes().items() if kind.__module__.startswith("fxgraft.")
    }
    assert ours == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_changes_the_program(setting: Setting, name: str) -> None:
    """A setting that did nothing would make the whole matrix empty."""
    after = setting.after(name)
    assert after.diff(setting.program)
    if after.history[-1].effect == "behaviour":
        assert not close(setting.run(after), setting.run(setting.program))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_pair_is_refused_exactly_if_its_rows_say_so(
    setting: Setting, first: str, second: str
) -> None:
    pipeline = Pipeline.parse([setting.step(first), setting.step(second)])
    reason = refusal(first, second)
    if reason is None:
        pipeline.validate(setting.program)
        return
    with pytest.raises((PassError, InputError), match=reason) as caught:
        pipeline.run(setting.program)
    assert caught.value.remedy


@pytest.mark.parametrize(("first", "second"), COMPOSING)
def test_a_pair_equals_the_original_with_hooks(setting: Setting, first: str, second: str) -> None:
    both = setting.after(first, second)
    references = [ROWS[name].reference for name in (first, second)]
    assert close(setting.run(both), setting.original(references))


def test_heads_are_pruned_twice_where_groups_stay_equal(setting: Setting) -> None:
    """The second time counts the heads that are left."""
    once = apply(setting.program, PruneHeads(heads={0: [1, 2], 1: [0, 1]}))
    twice = apply(once, PruneHeads(heads={0: [0], 1: [1]}))
    reference = heads_zeroed({0: [0, 1, 2], 1: [0, 1, 3]})
    assert close(setting.run(twice), setting.original([reference]))
    assert twice.count_parameters() < once.count_parameters()


@pytest.mark.parametrize(("first", "second"), COMPOSING)
def test_a_pair_at_neutral_settings_is_the_identity(
    setting: Setting, first: str, second: str
) -> None:
    """Neutral before, after and around the other pass."""
    before, after = setting.step(first).neutral(), setting.step(second).neutral()
    assert before is not None
    assert after is not None
    neutral = apply(setting.program, before, check=False)
    unchanged = apply(neutral, after, check=False)
    assert close(setting.run(unchanged), setting.run(setting.program))
    later = apply(setting.after(first), after, check=False)
    assert close(setting.run(later), setting.run(setting.after(first)))
    earlier = apply(neutral, setting.step(second), check=False)
    assert close(setting.run(earlier), setting.run(setting.after(second)))


@pytest.mark.parametrize(("first", "second"), COMPOSING)
def test_the_steps_of_a_pair_equal_the_whole(setting: Setting, first: str, second: str) -> None:
    both = setting.after(first, second)
    whole = setting.run(both)
    length = whole.shape[1]
    cuts = [length - 12, length - 6, *range(length - 5, length + 1)]
    outputs = setting.run_steps(both, cuts)
    for end, logits in zip(cuts, outputs, strict=True):
        assert close(logits, whole[:, end - 1])


@pytest.mark.parametrize(("first", "second"), COMPOSING)
def test_a_pair_survives_saving(setting: Setting, tmp_path: Path, first: str, second: str) -> None:
    both = setting.after(first, second)
    loaded = fxgraft.load(both.save(tmp_path / "saved"))
    assert isinstance(loaded, fxgraft.Program)
    assert torch.equal(setting.run(loaded), setting.run(both))
    assert [record.name for record in loaded.history] == [first, second]
    assert loaded.history == both.history
    assert not loaded.diff(both)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), COMPOSING)
def test_a_pair_is_exported(setting: Setting, tmp_path: Path, first: str, second: str) -> None:
    """``export_onnx`` itself compares prefill and decode with the Program in onnxruntime."""
    problem = find_backend("onnx").available()
    if problem is not None:
        pytest.skip(problem)
    both = setting.after(first, second)
    if share_of(both) is not None:
        with pytest.raises(LoweringError, match="ONNX files hold whole models"):
            fxgraft.export_onnx(both, tmp_path / "onnx")
        return
    folder = fxgraft.export_onnx(both, tmp_path / "onnx")
    assert {"prefill.onnx", "decode.onnx"} <= {path.name for path in folder.iterdir()}


def test_the_callers_model_and_program_are_unchanged(setting: Setting) -> None:
    assert close(setting.run(setting.program), setting.original())
    assert not setting.program.history
    assert not setting.program.diff(fxgraft.capture(setting.model))
