"""Service level objectives, per request and for percentiles of a run (spec section 11)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import model_validator

from fxgraft.runtime.hermes.log import Array
from fxgraft.runtime.hermes.percentiles import nearest_rank
from fxgraft.runtime.hermes.section import Rate, Section


class Slo(Section):
    """What a request must meet, in seconds; None for no limit.

    Attributes:
        ttft: time to first token. Published: 0.25, with retrieval 1.
        tpot: time per output token after the first. Published: 0.025.
        e2e: from arrival to end.
        itl: longest gap between two tokens.
    """

    ttft: Rate | None = None
    tpot: Rate | None = None
    e2e: Rate | None = None
    itl: Rate | None = None

    multiples: ClassVar = {
        "ttft": {50: 2.0, 90: 3.0, 99: 6.0},
        "tpot": {50: 1.25, 90: 1.5, 99: 5.0},
    }
    """How far percentiles of a run may lie above ``ttft`` and ``tpot``, as published."""

    @model_validator(mode="after")
    def _some(self) -> Slo:
        if all(value is None for value in (self.ttft, self.tpot, self.e2e, self.itl)):
            raise ValueError("sets no limit: give ttft, tpot, e2e or itl")
        return self

    def met(self, *, ttft: Array, tpot: Array, e2e: Array, itl: Array) -> Array:
        """Which completed requests meet every limit, bool [N].

        Args:
            ttft, e2e, itl: seconds [N].
            tpot: seconds [N]; NaN for requests of one token, which have none.
        """
        good = np.ones(len(ttft), bool)
        values = {"ttft": ttft, "tpot": np.nan_to_num(tpot), "e2e": e2e, "itl": itl}
        for name, seconds in values.items():
            limit = getattr(self, name)
            if limit is not None:
                good &= seconds <= limit
        return good

    def percentiles(self, ttft: Array, tpot: Array) -> list[tuple[str, int, float, float]]:
        """Name, percentile, value and limit of each published condition that applies."""
        rows: list[tuple[str, int, float, float]] = []
        for name, values in (("ttft", ttft), ("tpot", tpot[~np.isnan(tpot)])):
            base = getattr(self, name)
            if base is not None:
                rows += [
                    (name, percent, nearest_rank(values, percent), base * multiple)
                    for percent, multiple in self.multiples[name].items()
                ]
        return rows
