"""``Pass``: a typed, configurable rewrite of a Program; ``apply`` runs and checks one."""

from __future__ import annotations

import inspect
import re
import time
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Any, ClassVar, cast

from fxgraft import check as checks
from fxgraft import contracts, facts, interpreter, structure
from fxgraft import graph as graphs
from fxgraft.errors import ContractError, Error, NothingMatchedError, PassError
from fxgraft.history import Record
from fxgraft.offline import OfflineStage
from fxgraft.program import Program
from fxgraft.settings import Settings
from fxgraft.validation import located


class Effect(StrEnum):
    """What a pass may do to the outputs, and so how it is checked.

    * ``EXACT``: nothing; outputs stay equal up to rounding.
    * ``APPROXIMATE``: the error stays within the pass's ``tolerance``.
    * ``BEHAVIOUR``: it changes them on purpose; at its neutral setting it is the identity.
    """

    EXACT = "exact"
    APPROXIMATE = "approximate"
    BEHAVIOUR = "behaviour"


class Pass(Settings, ABC):
    """A rewrite of a Program. Its fields are its configuration in Python, YAML and on disk.

    A subclass declares its effect, gives its fields types and defaults, and writes ``run``.
    An approximate pass has a field ``tolerance: float``, the relative error it may cause.

    Attributes:
        name: name in pipelines; by default the class name in snake case.
        effect: what it may do to the outputs.
        requires: facts (``fxgraft.facts``) that must hold of the Program before it runs.
        ensures: facts that hold after it ran.
        removes: facts that may hold no longer after it ran.
        after: passes that, where they are used too, come earlier.
        before: passes that, where they are used too, come later.
        excludes: passes that cannot be used on the same Program.
        looks_for: what it rewrites, for the message when nothing matches.
        may_match_nothing: finding nothing to do is reported in the history, not an error.
        no_neutral: why ``neutral()`` is None, for the few behaviour passes that have none.
        offline: what makes the pass's artifact from data, for ``fxgraft calibrate``; None if
            nothing does.
    """

    role: ClassVar[str] = "pass"
    effect: ClassVar[Effect]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[frozenset[str]] = frozenset()
    before: ClassVar[frozenset[str]] = frozenset()
    excludes: ClassVar[frozenset[str]] = frozenset()
    looks_for: ClassVar[str] = "something to rewrite"
    may_match_nothing: ClassVar[bool] = False
    no_neutral: ClassVar[str] = ""
    offline: ClassVar[type[OfflineStage] | None] = None

    @abstractmethod
    def run(self, program: Program) -> list[str] | None:
        """Rewrite ``program`` in place; it is a copy that shares weights with the caller's.

        Insert nodes with ``fxgraft.graph.insert``, add weights with ``program.add_weight`` and
        replace them with ``program.set_weight``; never change a weight tensor in place.

        Returns:
            What was changed, one line each, or None.
        """

    def neutral(self) -> Pass | None:
        """This pass at the setting that changes nothing, or None if there is no such setting."""
        return None

    def precheck(self, program: Program) -> None:
        """Refuse what cannot work on this Program, before any pass of a pipeline has run.

        Raises:
            InputError: names the field and the remedy.
        """

    def runner(self, before: Program, after: Program) -> tuple[checks.Run, str]:
        """How the numeric check runs the result, and words on that for the history.

        Args:
            before: the Program that the pass was applied to.
            after: the result.
        """
        return interpreter.run, ""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Complete and check a pass class when it is defined.

        Raises:
            PassError: the effect is missing, or an approximate pass has no tolerance.
        """
        super().__pydantic_init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = snake_case(cls.__name__)
        if inspect.isabstract(cls):
            return
        if not isinstance(getattr(cls, "effect", None), Effect):
            raise PassError(
                f"pass class {cls.__name__} declares no effect",
                "add `effect: ClassVar = Effect.EXACT`, APPROXIMATE or BEHAVIOUR",
            )
        if cls.effect is Effect.APPROXIMATE and "tolerance" not in cls.model_fields:
            raise PassError(
                f"pass class {cls.__name__} is approximate and has no field 'tolerance'",
                "add `tolerance: float = ...`, the largest relative error it may cause",
            )


def snake_case(name: str) -> str:
    """``PruneHeads`` → ``prune_heads``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def apply(program: Program, step: Pass, *, check: bool = True) -> Program:
    """Apply one pass to a copy of a Program, check the result, and record what was done.

    Args:
        program: is not changed, whatever happens.
        step: the pass.
        check: run the numeric check. Programs without weight values are never checked.

    Raises:
        ContractError: the pass cannot be applied here, or broke a promise.
        NothingMatchedError: it found nothing to rewrite.
        NumericError: it changed the outputs by more than its effect allows.
        GraphError: the graph that it left breaks a rule.
        PassError: it failed in some other way.
    """
    with graphs.no_collection():
        return _apply(program, step, check)


def _apply(program: Program, step: Pass, check: bool) -> Program:
    known = facts.facts(program)
    _require(program, step, known)
    start = time.perf_counter()
    result, summary = _rewrite(program, step)
    changes = result.diff(program)
    if not changes:
        summary = _accept_no_change(step)
    if not _is_neutral(step):
        contracts.check_kept(type(step), known, facts.facts(result))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    error, text = _check(program, result, step, check)
    check_seconds = time.perf_counter() - start
    record = Record(
        name=step.name,
        config=step.config(),
        effect=str(step.effect),
        seconds=seconds,
        check_seconds=check_seconds,
        before=structure.measure(program, checks.check_sizes(program)),
        after=structure.measure(result, checks.check_sizes(result)),
        error=error,
        check=text,
        summary=summary,
        diff=changes.to_json(),
    )
    result.history.append(record)
    return result


def check_definition(step: Pass) -> None:
    """Check that a pass keeps the rules for passes.

    Raises:
        ContractError: it names an unknown fact, or a behaviour pass has no neutral setting.
    """
    contracts.check_declared(type(step))
    neutral = step.neutral()
    if step.effect is Effect.BEHAVIOUR and neutral is None and not step.no_neutral:
        raise ContractError(
            f"pass {step.name!r} changes behaviour and has no neutral setting to check it by",
            "write its `neutral` method, or say in `no_neutral` why there is none",
        )
    if neutral is not None and type(neutral) is not type(step):
        raise ContractError(
            f"the neutral setting of pass {step.name!r} is a {type(neutral).__name__}",
            f"return a {type(step).__name__} from `neutral`",
        )


def _require(program: Program, step: Pass, known: frozenset[str]) -> None:
    check_definition(step)
    ran = [contracts.Place(record.name, None, done=True) for record in program.history]
    contracts.check_order([*ran, contracts.Place(step.name, type(step))])
    contracts.check_required(type(step), known, {})
    step.precheck(program)


def _rewrite(program: Program, step: Pass) -> tuple[Program, list[str]]:
    """A copy of the Program after the pass, and the pass's summary."""
    result = program.copy()
    guard = structure.WeightGuard.watch(program)
    try:
        with graphs.made_by(step.name):
            summary = step.run(result)
        graphs.finish(result.graph_module)
    except Error:
        raise
    except Exception as error:
        raise PassError(
            f"pass {step.name!r} failed: {type(error).__name__}: {error}",
            "this is a fault in the pass; the error above shows where",
        ) from error
    guard.verify(step.name)
    with located(f"pass {step.name!r} left a broken graph: "):
        structure.verify(result)
        structure.verify_outputs_kept(program, result)
    return result, list(summary or [])


def _accept_no_change(step: Pass) -> list[str]:
    if step.may_match_nothing or _is_neutral(step):
        return [f"nothing changed: looked for {step.looks_for}"]
    raise NothingMatchedError(
        f"pass {step.name!r} changed nothing: it looked for {step.looks_for}",
        "leave it out of the pipeline, or check its settings and the kind of model",
    )


def _is_neutral(step: Pass) -> bool:
    return step.neutral() == step


def _check(before: Program, after: Program, step: Pass, wanted: bool) -> tuple[float | None, str]:
    """The error found and what was compared, in words."""
    if not wanted:
        return None, "skipped on request"
    if checks.is_meta(before) or checks.is_meta(after):
        return None, "skipped: the weights have no values (meta device)"
    reference = checks.Reference.of(before, after)
    if step.effect is Effect.BEHAVIOUR:
        return _check_behaviour(reference, after, step)
    limit = checks.rounding_limit(before)
    claim, remedy = f"pass {step.name!r} is exact", "correct the rewrite before that node"
    if step.effect is Effect.APPROXIMATE:
        limit = float(cast(Any, step).tolerance)
        claim = f"pass {step.name!r} is approximate"
        remedy = "set it to approximate less, or raise its `tolerance`"
    run, how = step.runner(before, after)
    found = checks.require(reference, after, limit, claim, remedy, run)
    return found.error, f"outputs compared on {found}{how}, allowed error {limit:.3g}"


def _check_behaviour(
    reference: checks.Reference, after: Program, step: Pass
) -> tuple[float | None, str]:
    neutral = step.neutral()
    checks.require_no_nan(reference, after, step.name)
    if neutral is None:
        return None, f"runs; not compared: {step.no_neutral}"
    unchanged = after if neutral == step else _rewrite(reference.program, neutral)[0]
    limit = checks.rounding_limit(reference.program) / 10
    found = checks.require(
        reference,
        unchanged,
        limit,
        f"pass {step.name!r} at its neutral setting ({neutral!r}) is the identity",
        "correct the rewrite before that node",
    )
    return found.error, f"neutral setting compared on {found}, allowed error {limit:.3g}"
