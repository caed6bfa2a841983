"""Check every tiny model of ``families`` against transformers itself and tabulate its quirks.

    python benchmarks/_families_check.py [--json FILE] [NAME ...]

Each family runs in a forked process of its own with a time limit, so that a crash or a hang costs
one row. The columns are the fields of ``Row``; an empty cell means that the check was not reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from _families import FIRST_MEDIA_TOKEN, FIRST_TEXT_TOKEN, Unsupported, family_names, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils, modeling_utils

# transformers leaves parts of these signatures without types.
attention_registry = cast(Any, modeling_utils.ALL_ATTENTION_FUNCTIONS)
mask_registry = cast(Any, masking_utils.ALL_MASK_ATTENTION_FUNCTIONS)

NEW_TOKENS = 16
LEFT_PADDING = 3
PAD_TOKEN = 0
PROBE = "fxgraft_probe"
TOLERANCE = 1e-4


@dataclasses.dataclass
class Row:
    """What one family does; ``None`` where a check was not reached."""

    name: str
    model: str = ""
    parameters: int = 0
    build: bool = False
    forward: bool = False
    generate: bool = False
    distinct_tokens: int | None = None
    accepts_position_ids: bool | None = None
    causal: bool | None = None
    """A later token leaves the logits of earlier positions alone."""
    prefix_stable: bool | None = None
    """The logits of a prefix do not depend on how long the whole text is."""
    deterministic: bool | None = None
    ignores_padding_mask: bool | None = None
    """Tokens at masked positions change the logits of real positions."""
    padding_invariant: bool | None = None
    """``generate`` continues a left-padded prompt as it continues the prompt alone."""
    cache_matches: bool | None = None
    """``use_cache=True`` and ``use_cache=False`` give the same greedy tokens, without padding."""
    cache_matches_padded: bool | None = None
    attention: str = ""
    registry_modules: int | None = None
    """Attention modules that look up ``config._attn_implementation`` in the registry."""
    bypassing: list[str] = dataclasses.field(default_factory=list[str])
    """Classes of attention modules that run without looking there."""
    seconds: float = 0.0
    error: str = ""


def check(name: str) -> Row:
    """Run every check on the family ``name``; the first that fails ends up in ``Row.error``."""
    row = Row(name)
    started = time.monotonic()
    try:
        with torch.no_grad():
            _fill(row)
    except Unsupported as error:
        row.error = f"unsupported: {error.reason}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        row.error = f"{type(error).__name__} at {place}: {str(error).strip()[:300]}"
    row.seconds = round(time.monotonic() - started, 2)
    return row


def _fill(row: Row) -> None:
    model = tiny_model(row.name)
    row.build, row.model = True, type(model).__name__
    row.parameters = sum(parameter.numel() for parameter in model.parameters())
    row.attention = str(getattr(model.config, "_attn_implementation"))  # noqa: B009 - protected
    row.accepts_position_ids = "position_ids" in inspect.signature(model.forward).parameters
    row.forward = all(_is_finite(model, *shape) for shape in ((2, 12), (3, 21)))
    row.causal, row.prefix_stable = _is_causal(model), _is_prefix_stable(model)
    row.deterministic = _is_deterministic(model)
    row.ignores_padding_mask = _ignores_padding_mask(model)
    _generation(row, model)
    _registry(row, model)


def _generation(row: Row, model: PreTrainedModel) -> None:
    tokens, mask = _padded_prompts()
    padded = _continue(model, tokens, mask, use_cache=True)
    row.generate, row.distinct_tokens = True, len({int(token) for token in padded.flatten()})
    row.cache_matches_padded = torch.equal(padded, _continue(model, tokens, mask, use_cache=False))
    prompts = _prompts(2, 12)
    plain = _continue(model, prompts, torch.ones_like(prompts), use_cache=True)
    row.cache_matches = torch.equal(
        plain, _continue(model, prompts, torch.ones_like(prompts), use_cache=False)
    )
    alone = tokens[:1, LEFT_PADDING:]
    row.padding_invariant = torch.equal(
        padded[:1], _continue(model, alone, torch.ones_like(alone), use_cache=True)
    )


def _prompts(batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(FIRST_TEXT_TOKEN, FIRST_MEDIA_TOKEN, (batch, length), generator=generator)


def _padded_prompts() -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [2, 12]; the first prompt has ``LEFT_PADDING`` pads in front."""
    tokens = _prompts(2, 12)
    mask = torch.ones_like(tokens)
    tokens[0, :LEFT_PADDING] = PAD_TOKEN
    mask[0, :LEFT_PADDING] = 0
    return tokens, mask


def _logits(model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits


def _continue(model: PreTrainedModel, tokens: Tensor, mask: Tensor, use_cache: bool) -> Tensor:
    """The ``NEW_TOKENS`` greedy tokens [batch, NEW_TOKENS] that ``generate`` appends."""
    generate: Callable[..., Tensor] = getattr(model, "generate")  # noqa: B009 - untyped mixin
    sequences = generate(
        input_ids=tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        use_cache=use_cache,
    )
    return sequences.reshape(len(tokens), -1)[:, -NEW_TOKENS:]


def _is_finite(model: PreTrainedModel, batch: int, length: int) -> bool:
    logits = _logits(model, _prompts(batch, length))
    if tuple(logits.shape[:2]) != (batch, length):
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} for token ids of shape {(batch, length)}"
        )
    if not torch.isfinite(logits).all():
        raise ValueError("logits are not finite")
    return True


def _is_causal(model: PreTrainedModel) -> bool:
    tokens = _prompts(2, 21)
    changed = tokens.clone()
    changed[:, -1] = FIRST_TEXT_TOKEN + (tokens[:, -1] + 1) % (FIRST_MEDIA_TOKEN - FIRST_TEXT_TOKEN)
    return _close(_logits(model, tokens)[:, :-1], _logits(model, changed)[:, :-1])


def _is_prefix_stable(model: PreTrainedModel) -> bool:
    tokens = _prompts(2, 21)
    whole = _logits(model, tokens)
    return all(_close(_logits(model, tokens[:, :n]), whole[:, :n]) for n in (5, 12, 20))


def _is_deterministic(model: PreTrainedModel) -> bool:
    tokens = _prompts(2, 21)
    return torch.equal(_logits(model, tokens), _logits(model, tokens))


def _ignores_padding_mask(model: PreTrainedModel) -> bool:
    tokens, mask = _padded_prompts()
    first, second = tokens.clone(), tokens.clone()
    first[0, :LEFT_PADDING], second[0, :LEFT_PADDING] = FIRST_TEXT_TOKEN, FIRST_TEXT_TOKEN + 50
    real = slice(LEFT_PADDING, None)
    return not _close(_logits(model, first, mask)[:, real], _logits(model, second, mask)[:, real])


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def _registry(row: Row, model: PreTrainedModel) -> None:
    """Put a counting attention into the registry and see which attention modules reach it."""
    asked: set[nn.Module] = set()
    reached: set[nn.Module] = set()
    real_attention = attention_registry["sdpa"]
    with _running_attention(model) as (running, ran):

        def probe(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None = None,
            scaling: float | None = None,
            **_: Any,
        ) -> tuple[Tensor, None]:
            asked.add(module)
            reached.update(running)
            return real_attention(module, query, key, value, attention_mask, scaling=scaling)

        attention_registry.register(PROBE, probe)
        mask_registry.register(PROBE, mask_registry["sdpa"])
        cast(Any, model).set_attn_implementation(PROBE)
        _logits(model, _prompts(2, 12))
    row.registry_modules = len(asked)
    row.bypassing = sorted({type(module).__name__ for module in ran - reached})


@contextmanager
def _running_attention(model: PreTrainedModel) -> Generator[tuple[list[nn.Module], set[nn.Module]]]:
    """The attention modules whose forward is on the stack now, and all that ran."""
    running: list[nn.Module] = []
    ran: set[nn.Module] = set()

    def enter(module: nn.Module, _: object) -> None:
        running.append(module)
        ran.add(module)

    def leave(module: nn.Module, _: object, __: object) -> None:
        running.remove(module)

    modules = [module for module in model.modules() if _is_attention(module)]
    hooks = [module.register_forward_pre_hook(enter) for module in modules]
    hooks += [module.register_forward_hook(leave) for module in modules]
    try:
        yield running, ran
    finally:
        for hook in hooks:
            hook.remove()


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return (
        ("Attention" in name or name.endswith("MLA"))
        and not name.endswith("Norm")
        and any(True for _ in module.parameters())
    )


def _in_child(name: str, limit: float) -> Row:
    """``check(name)`` in a forked process that is killed after ``limit`` seconds."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_row, args=(name, sender), daemon=True)
    child.start()
    sender.close()
    row = _receive(receiver, name, limit)
    child.kill()
    child.join()
    return row


def _send_row(name: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        row = check(name)
    sender.send(row)


def _receive(receiver: Connection, name: str, limit: float) -> Row:
    if not receiver.poll(limit):
        return Row(name, seconds=limit, error=f"no answer within {limit:.0f} s")
    try:
        return receiver.recv()
    except EOFError:
        return Row(name, error="the process died")


COLUMNS = {
    "build": "build",
    "forward": "fwd",
    "generate": "gen",
    "distinct_tokens": "distinct",
    "accepts_position_ids": "pos_ids",
    "causal": "causal",
    "prefix_stable": "prefix",
    "ignores_padding_mask": "ign_mask",
    "padding_invariant": "pad_inv",
    "cache_matches": "cache",
    "cache_matches_padded": "cache_pad",
    "registry_modules": "registry",
    "seconds": "seconds",
}


def _line(row: Row) -> str:
    cells = [_cell(getattr(row, field)).rjust(len(title)) for field, title in COLUMNS.items()]
    note = row.error or (f"bypass: {', '.join(row.bypassing)}" if row.bypassing else "")
    return "  ".join([row.name.ljust(24), row.model.ljust(34), *cells, note])


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return "" if value is None else str(value)


def main() -> None:
    """Print the table, row by row, and write it as JSON."""
    parser = argparse.ArgumentParser(description="check the tiny models of benchmarks/_families.py")
    parser.add_argument("names", nargs="*", help="families (default: all)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds allowed per family")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    print("  ".join(["name".ljust(24), "model".ljust(34), *COLUMNS.values(), "note"]))
    rows: list[Row] = []
    for name in options.names or family_names():
        rows.append(_in_child(name, options.limit))
        print(_line(rows[-1]), flush=True)
    counts = {
        field: sum(bool(getattr(row, field)) for row in rows)
        for field in ("build", "forward", "generate")
    }
    print(f"{len(rows)} families: {counts}")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
