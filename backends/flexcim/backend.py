"""The flexcim backend: options, and the compiled object with its costs."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from fxgraft import graph as graphs
from fxgraft.atomic import write_file
from fxgraft.backend import Backend, Compiled
from fxgraft.backends.flexcim import hardware as configurations
from fxgraft.backends.flexcim import plots
from fxgraft.backends.flexcim.baselines import NAMES, Result, compare
from fxgraft.backends.flexcim.costs import Costs
from fxgraft.backends.flexcim.hardware import Hardware
from fxgraft.backends.flexcim.mapper import Objective
from fxgraft.backends.flexcim.model import CostModel
from fxgraft.backends.flexcim.sweep import Design, Step, sweep
from fxgraft.cost_table import StepCostTable
from fxgraft.generation import StepModel
from fxgraft.program import Program
from fxgraft.report import Report, ReportLine
from fxgraft.state import StepProgram
from fxgraft.step_tables import Ranges
from fxgraft.stepping import StateModel
from fxgraft.validation import nowhere, readable

_STEPS: tuple[tuple[str, Step], ...] = (("prefill", (1, 512, 0)), ("decode", (1, 1, 512)))


class FlexcimOptions(BaseModel):
    """Options of the flexcim backend.

    Attributes:
        hardware: fields of the hardware configuration that are not to have their default, or the
            path of a YAML file with them.
        objective: ``"latency"``, ``"energy"`` or ``"edp"`` (their product).
        patterns: N:M by glob over weight names, ``{"model.layers.*.mlp.*": "2:4"}``; other weights
            have the pattern that was declared for them, or that their zeros obey.
        padded: globs of weights whose input dimension was padded to whole groups.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    hardware: dict[str, Any] | str = {}
    objective: Objective = "latency"
    patterns: dict[str, str] = {}
    padded: list[str] = []


class FlexcimBackend(Backend):
    """Costs Programs on digital compute-in-memory with N:M sparsity."""

    name: ClassVar[str] = "flexcim"

    def available(self) -> str | None:
        """Formulas need nothing."""
        return None

    def lower(self, program: Program, **options: Any) -> FlexcimCompiled:
        """See ``Backend.lower``; options are the fields of ``FlexcimOptions``.

        Raises:
            LoweringError: a weight is denser than declared, or an operator has no cost.
            InputError: an option is wrong, a pattern cannot run, or resident weights do not fit.
        """
        chosen = self.check_options(options)
        return FlexcimCompiled(program, chosen, configurations.parse(chosen.hardware))

    def check_options(self, options: Mapping[str, Any]) -> FlexcimOptions:
        """The options as an object; see ``Backend.check_options``."""
        given = dict(options)
        if isinstance(given.get("hardware"), (Hardware, Path)):
            hardware = given["hardware"]
            is_path = isinstance(hardware, Path)
            given["hardware"] = str(hardware) if is_path else hardware.model_dump()
        try:
            chosen = FlexcimOptions(**given)
        except ValidationError as error:
            raise readable(error, FlexcimOptions, "backend 'flexcim'", nowhere) from error
        configurations.parse(chosen.hardware)
        return chosen

    def export(self, program: Program, folder: Path, **options: Any) -> Path:
        """Write costs, the step-cost table, the comparison and plots to a folder."""
        return self.lower(program, **options).export(folder)


BACKEND = FlexcimBackend()


class FlexcimCompiled(Compiled):
    """A Program with its costs; called, it computes what torch computes.

    Attributes:
        hardware: the configuration.
        model: the cost model.
    """

    def __init__(self, program: Program, options: FlexcimOptions, hardware: Hardware) -> None:
        super().__init__(program, "flexcim", options.model_dump())
        self.hardware = hardware
        self.model = CostModel(
            program, hardware, options.objective, options.patterns, options.padded
        )

    @torch.no_grad()
    def run(self, values: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Run the whole-sequence graph op by op."""
        return self.program.graph_module(*values)

    def lower_step(self, step: StepProgram) -> StepModel:
        """Prefill and decode op by op."""
        module = step.program.graph_module
        return StateModel(step, lambda values: module(*values))

    def costs(self, batch: int = 1, new_tokens: int = 1, context: int = 0) -> Costs:
        """Costs of one step, node by node; see ``CostModel.costs``."""
        return self.model.costs(batch, new_tokens, context)

    def table(self, ranges: Ranges | None = None) -> StepCostTable:
        """The step-cost table for the serving simulator; see ``CostModel.table``."""
        return self.model.table(ranges)

    def compare(
        self,
        names: Sequence[str] = NAMES,
        *,
        batch: int = 1,
        new_tokens: int = 1,
        context: int = 0,
    ) -> list[Result]:
        """The linear layers of a step here and on other hardware; see ``baselines.compare``."""
        layers = self.model.layers(batch, new_tokens, context)
        return compare(layers, self.hardware, names, self.model.objective)

    def sweep(
        self, axes: Mapping[str, Sequence[Any]], steps: Sequence[Step] = ((1, 1, 512), (1, 512, 0))
    ) -> list[Design]:
        """Costs on every combination of some fields of the hardware; see ``sweep.sweep``."""
        return sweep(self.model, axes, steps)

    def describe(self) -> Report:
        """Which unit runs each kind of node, and which linear layers run as dense."""
        on_macros = {node.node.name for node in self.model.graph.nodes if node.product is not None}
        places = {node.row.name: place for place, node in enumerate(self.model.graph.nodes)}
        counts: dict[tuple[str, str], list[str]] = {}
        for node in self.model.graph.nodes:
            unit = "macros" if node.node.name in on_macros else "digital logic"
            counts.setdefault((graphs.short_target(node.node), unit), []).append(node.row.name)
        lines: list[ReportLine] = []
        for (op, unit), names in sorted(counts.items(), key=lambda item: -len(item[1])):
            runs_on, reason = unit, ""
            if unit == "macros":
                kinds = Counter(str(self.model.linears[places[n]].gemm.pattern) for n in names)
                runs_on = "macros: " + ", ".join(f"{p} ({count})" for p, count in kinds.items())
            elif op.startswith(("aten.conv", "aten.einsum")):
                reason = "only products with a weight matrix are mapped"
            lines.append(ReportLine(op, len(names), runs_on, reason))
        return Report("flexcim", lines, list(self.model.notes))

    def export(self, folder: str | Path) -> Path:
        """Write everything that is known to a folder.

        ``table.json`` is the step-cost table; ``prefill.*`` and ``decode.*`` hold costs per node
        (whole sequences: ``call.*``); ``comparison.json``, ``constants.json`` and, where
        matplotlib is installed, plots.

        Returns:
            The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.model.graph.has_tokens:
            self.table().save(folder / "table.json")
        _write_json(folder / "constants.json", [
            dict(zip(("name", "value", "unit", "source", "meaning"), row, strict=True))
            for row in self.hardware.constants()
        ])  # fmt: skip
        for name, step in self._steps():
            costs = self.costs(*step)
            _write_json(folder / f"{name}.json", costs.to_json())
            write_file(folder / f"{name}.csv", _csv(costs))
            results = self.compare(batch=step[0], new_tokens=step[1], context=step[2])
            _write_json(folder / f"{name}_comparison.json", [vars(result) for result in results])
            if plots.missing() is None:
                plots.breakdown(costs, folder / f"{name}_breakdown.png")
                plots.roofline(costs, self.hardware, folder / f"{name}_roofline.png")
                plots.comparison(results, folder / f"{name}_comparison.png")
        return folder

    def _steps(self) -> Sequence[tuple[str, Step]]:
        if self.model.graph.states:
            return _STEPS
        return [("call", (1, 512 if self.model.graph.has_tokens else 1, 0))]


def _write_json(path: Path, value: Any) -> None:
    write_file(path, json.dumps(value, indent=1, allow_nan=False))


def _csv(costs: Costs) -> str:
    """One line per node; energy parts as columns."""
    text = io.StringIO()
    rows: list[dict[str, Any]] = costs.to_json()["nodes"]
    plain = [name for name in rows[0] if name != "energy"] if rows else []
    parts = list(costs.energy)
    writer = csv.writer(text)
    writer.writerow([*plain, *(f"{part}_joules" for part in parts)])
    for row in rows:
        energy = [row["energy"].get(part, 0.0) for part in parts]
        writer.writerow([*(row[name] for name in plain), *energy])
    return text.getvalue()
