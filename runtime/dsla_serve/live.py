"""The policy in the engine: views become snapshots, and caches are folded into states."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from fxgraft.errors import InputError
from fxgraft.passes.dsla.fold import LayerFold, choices_of
from fxgraft.program import Program
from fxgraft.runtime.dsla_serve.policy import (
    Memory,
    Rules,
    Running,
    Snapshot,
    decide,
    start_level,
)
from fxgraft.runtime.dsla_serve.replay import line_of
from fxgraft.runtime.engine.policy import Change, EngineView, RequestView, States

_GPU_SECONDS_PER_TOKEN = 2e-8
_SMOOTHING = 0.2


class DslaServe:
    """A ``LayerPolicy`` for a model that was compiled with pass ``dsla`` and ``live``.

    Layers are converted in the order of the pass. Where gates read nothing but keys, the states
    are what linear attention over all tokens so far would have left; otherwise a request that is
    converted is computed again.

    Args:
        program: of the compiled model.
        rules: of the policy.
        positions: most tokens of a request.
        log: is given each decision that changes something, as a line for ``replay``.

    Raises:
        InputError: the model has no layer that can be converted.
    """

    def __init__(
        self,
        program: Program,
        rules: Rules,
        positions: int,
        log: Callable[[str], object] | None = None,
    ) -> None:
        self.rules, self.memory = rules, Memory()
        self._order = list(choices_of(program))
        if not self._order:
            raise InputError(
                "the model has no layer whose attention can be chosen",
                "add pass dsla with live: true to the pipeline",
            )
        self._layers = sum("attention" in layer.kind.split("+") for layer in program.layers)
        self._folds = {name: LayerFold(program, name, positions) for name in self._order}
        self._log = log
        self._on_gpu = program.device.type == "cuda"
        self._seconds_per_token = _GPU_SECONDS_PER_TOKEN
        self._options: Mapping[str, tuple[tuple[int, ...], ...]] = {}
        self._pressure = 0.0
        self._running_levels = self._conversions = self._recomputed = 0

    def start(self, view: EngineView, request: RequestView) -> Mapping[str, int]:
        """The first layers of the order, as many as the prompt's length and the load say."""
        level = start_level(self.rules, self.memory, request.prompt, self._layers, len(self._order))
        return {name: int(place < level) for place, name in enumerate(self._order)}

    def decide(self, view: EngineView) -> Sequence[Change]:
        """One more layer for some requests; see ``fxgraft.runtime.dsla_serve.policy``."""
        self._options = view.options
        snapshot = self._snapshot(view)
        before = self.memory
        decision = decide(self.rules, snapshot, before)
        self.memory = decision.memory
        changed = (before.level, before.rising) != (self.memory.level, self.memory.rising)
        if self._log is not None and (decision.raised or changed):
            self._log(line_of(self.rules, snapshot, before, decision))
        self._pressure = snapshot.pressure
        self._running_levels = sum(r.level for r in snapshot.running) + len(decision.raised)
        return [Change(request, self._order[level - 1], 1) for request, level in decision.raised]

    def convert(self, change: Change, states: States) -> States | None:
        """Fold the cache of one layer into its states."""
        layer = self._folds[change.choice]
        if not layer.exact:
            self._recomputed += 1
            return None
        [cache] = states.values()
        started = time.perf_counter()
        memory = layer(cache["key"], cache["value"])
        self._conversions += 1
        if not self._on_gpu:
            each = (time.perf_counter() - started) / cache["key"].shape[2]
            self._seconds_per_token += _SMOOTHING * (each - self._seconds_per_token)
        [new] = self._options[change.choice][change.option]
        return {new: {"memory": memory}}

    def gauges(self) -> Mapping[str, float]:
        """Numbers for the status page and for metrics."""
        return {
            "dsla_pressure": self._pressure,
            "dsla_start_level": self.memory.level,
            "dsla_running_levels": self._running_levels,
            "dsla_offered_layers": len(self._order),
            "dsla_conversions": self._conversions,
            "dsla_recomputed": self._recomputed,
        }

    def _snapshot(self, view: EngineView) -> Snapshot:
        return Snapshot(
            time=view.time,
            pressure=pressure(view),
            predicted_wait=view.queued * view.finish_interval,
            running=tuple(
                Running(r.id, r.prompt, r.tokens, sum(r.choices[name] for name in self._order))
                for r in view.running
            ),
            layers=self._layers,
            offered=len(self._order),
            fold_seconds_per_token=self._seconds_per_token,
        )


def pressure(view: EngineView) -> float:
    """Share of the blocks' bytes that is in use, or promised to requests that were let in.

    Slots of states are set aside before the first request, so they do not compete for memory.
    """
    parts = zip(view.blocks_free, view.blocks_total, view.block_bytes, strict=True)
    sizes = [((total - free) * each, total * each) for free, total, each in parts]
    promised = sum(r.promised_bytes for r in (*view.running, *view.prefilling))
    whole = sum(total for _, total in sizes)
    return (sum(used for used, _ in sizes) + promised) / whole if whole else 0.0
