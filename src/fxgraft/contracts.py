"""Contracts between passes: the facts they require and promise, and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxgraft.errors import ContractError
from fxgraft.facts import known_facts
from fxgraft.validation import suggestion

if TYPE_CHECKING:
    from fxgraft.transform import Pass


@dataclass(frozen=True)
class Place:
    """One pass in the order in which passes are applied to a Program.

    Attributes:
        name: of the pass.
        rules: its class, or None for an earlier pass whose class is not installed.
        where: start of a message about it, ``"file.yaml, line 4: "`` or ``""``.
        done: whether it ran already.
    """

    name: str
    rules: type[Pass] | None
    where: str = ""
    done: bool = False


def check_declared(kind: type[Pass], where: str = "") -> None:
    """Check that a pass class names facts that exist.

    Raises:
        ContractError: names the unknown fact.
    """
    known = known_facts()
    for name in sorted(kind.requires | kind.ensures | kind.removes):
        if name not in known:
            raise ContractError(
                f"{where}pass {kind.name!r} names the unknown fact {name!r}"
                f"{suggestion(name, known)}",
                f"the facts are: {', '.join(sorted(known))}; add one with fxgraft.facts.fact",
            )


def check_required(
    kind: type[Pass], holding: frozenset[str], removed_by: Mapping[str, str], where: str = ""
) -> None:
    """Check that the facts a pass requires hold.

    Args:
        kind: the pass's class.
        holding: the facts that hold where it would run.
        removed_by: facts that earlier passes of the pipeline remove → the pass.
        where: start of the message.

    Raises:
        ContractError: names the pass, the fact and the remedy.
    """
    if "sharded" in holding:
        raise ContractError(
            f"{where}pass {kind.name!r} cannot rewrite one process's share of a model, which pass "
            "'shard' leaves",
            f"move {kind.name!r} before 'shard', and start from the whole model",
        )
    for name in sorted(kind.requires - holding):
        if name in removed_by:
            raise ContractError(
                f"{where}pass {kind.name!r} requires the fact {name!r}, which pass "
                f"{removed_by[name]!r} before it removes",
                f"move {kind.name!r} before {removed_by[name]!r}",
            )
        raise ContractError(
            f"{where}pass {kind.name!r} requires the fact {name!r}, which does not hold of this "
            "Program",
            known_facts()[name].remedy,
        )


def check_kept(kind: type[Pass], before: frozenset[str], after: frozenset[str]) -> None:
    """Check that a pass that ran kept its promises.

    Raises:
        ContractError: a fact it ensures does not hold, or one it does not remove was lost.
    """
    for name in sorted(kind.ensures - after):
        raise ContractError(
            f"pass {kind.name!r} promised the fact {name!r}, which does not hold after it",
            "correct the pass, or its `ensures`",
        )
    for name in sorted(before - after - kind.removes):
        raise ContractError(
            f"pass {kind.name!r} removed the fact {name!r} without declaring it",
            "correct the pass, or add the fact to its `removes`",
        )


def check_order(places: Sequence[Place]) -> None:
    """Check the ordering rules of passes, those that ran already included.

    Raises:
        ContractError: names both passes and how to order them.
    """
    for index, place in enumerate(places):
        for other_index, other in enumerate(places):
            if place.rules is None or index == other_index or (place.done and other.done):
                continue
            _check_pair(place, place.rules, other, is_later=other_index > index)


def _check_pair(place: Place, rules: type[Pass], other: Place, *, is_later: bool) -> None:
    where = place.where or other.where
    if other.name in rules.excludes:
        raise ContractError(
            f"{where}pass {place.name!r} cannot be combined with pass {other.name!r}",
            f"leave one of them out{_ran(place, other)}",
        )
    if is_later and other.name in rules.after:
        raise ContractError(
            f"{where}pass {place.name!r} must come after pass {other.name!r}",
            f"move {other.name!r} before {place.name!r}{_ran(place, other)}",
        )
    if not is_later and other.name in rules.before:
        raise ContractError(
            f"{where}pass {place.name!r} must come before pass {other.name!r}",
            f"move {place.name!r} before {other.name!r}{_ran(place, other)}",
        )


def _ran(place: Place, other: Place) -> str:
    done = [each.name for each in (place, other) if each.done]
    return f"; {done[0]!r} ran already, so start from the Program before it" if done else ""
