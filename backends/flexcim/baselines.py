"""Other accelerators that a comparison holds against this one (specification, section 7).

They are our models of kinds of hardware, not their authors' figures, hence ``-like``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fxgraft.backends.flexcim import patterns
from fxgraft.backends.flexcim.hardware import Hardware
from fxgraft.backends.flexcim.macro import Gemm, Layout, total
from fxgraft.backends.flexcim.mapper import Objective, map_gemm
from fxgraft.backends.flexcim.patterns import DENSE, Pattern
from fxgraft.errors import InputError

NAMES = ("dense", "fixed:2:4", "vegeta-like", "sdp-like", "ideal")
_VEGETA = (Pattern(1, 4), Pattern(2, 4))


@dataclass(frozen=True)
class Layer:
    """One linear layer of a workload.

    Attributes:
        name: for messages and tables.
        gemm: sizes and pattern.
        tokens: T.
        most: what its real mask keeps, see ``patterns.most_kept``; None if unknown.
    """

    name: str
    gemm: Gemm
    tokens: int
    most: Mapping[int, int] | None = None


@dataclass(frozen=True)
class Result:
    """A workload on one kind of hardware.

    Attributes:
        name: of the hardware.
        cycles: of all layers.
        joules: of all layers.
        patterns: how each layer runs.
    """

    name: str
    cycles: float
    joules: float
    patterns: tuple[str, ...]


Choose = Callable[[Layer], Pattern]


def compare(
    layers: Sequence[Layer],
    hardware: Hardware,
    names: Sequence[str] = NAMES,
    objective: Objective = "latency",
) -> list[Result]:
    """A workload on this hardware and on others with the same macros.

    Args:
        layers: the workload.
        hardware: the first result, called ``"flexcim"``, is its own.
        names: of baselines: ``"dense"``, ``"fixed:N:M"``, ``"vegeta-like"``, ``"sdp-like"``,
            ``"ideal"``.
        objective: of the mapper, for all.

    Raises:
        InputError: a baseline is unknown.
    """
    results = [_run("flexcim", layers, hardware, lambda layer: layer.gemm.pattern, objective)]
    for name in names:
        if name == "ideal":
            results.append(_ideal(layers, hardware))
            continue
        chosen = _chooser(name)
        cell = "dense" if name == "dense" else "gather"
        # Sparsity in hardware that only knows fixed patterns needs no wider selector than theirs.
        results.append(_run(name, layers, hardware.changed(cell=cell), chosen, objective))
    return results


def _chooser(name: str) -> Choose:
    if name == "dense":
        return lambda layer: DENSE
    if name == "vegeta-like":
        return partial(_first_fit, _VEGETA)
    if name == "sdp-like":
        return partial(_first_fit, (Pattern(2, 4),))
    if name.startswith("fixed:"):
        return partial(_first_fit, (patterns.parse(name.removeprefix("fixed:")),))
    raise InputError(
        f"baseline {name!r} is unknown", f"the baselines are: {', '.join(NAMES)}, fixed:N:M"
    )


def _first_fit(supported: Sequence[Pattern], layer: Layer) -> Pattern:
    """The first supported pattern that the layer's weights obey, else dense."""
    return next((pattern for pattern in supported if obeys(layer, pattern)), DENSE)


def obeys(layer: Layer, pattern: Pattern) -> bool:
    """Whether a layer's weights obey a pattern: by its own pattern, or by its mask.

    N:M weights obey N0:M0 for certain if N <= N0 and M0 divides M, or if each group of M0 is whole
    groups of M that together keep at most N0.
    """
    own = layer.gemm.pattern
    if layer.most is not None and pattern.m in layer.most:
        return layer.most[pattern.m] <= pattern.n
    if own.m % pattern.m == 0:
        return own.is_sparse and own.n <= pattern.n
    return pattern.m % own.m == 0 and pattern.m // own.m * own.n <= pattern.n


def _run(
    name: str, layers: Sequence[Layer], hardware: Hardware, choose: Choose, objective: Objective
) -> Result:
    cycles = joules = 0.0
    used: list[str] = []
    for layer in layers:
        gemm = replace(layer.gemm, pattern=choose(layer))
        mapped = map_gemm(hardware, gemm, layer.tokens, objective)
        cycles += float(mapped.cycles[0])
        joules += float(mapped.joules[0])
        used.append(str(mapped.layouts[0].pattern))
    return Result(name, cycles, joules, tuple(used))


def _ideal(layers: Sequence[Layer], hardware: Hardware) -> Result:
    """No rounding, loading, filling, selecting or routing: what nothing can beat."""
    cycles = joules = 0.0
    dense = hardware.changed(cell="dense")
    for layer in layers:
        gemm, density = layer.gemm, layer.gemm.pattern.density
        weights = gemm.reduction * gemm.outputs * gemm.copies * density
        cycles += layer.tokens * hardware.token_cycles * weights / hardware.cells / hardware.macros
        best = min(
            float(total(Layout(dense, replace(gemm, pattern=DENSE), DENSE, a).energy(layer.tokens)))
            for a in hardware.merge_factors
        )
        joules += best * density
    return Result("ideal", cycles, joules, tuple(str(layer.gemm.pattern) for layer in layers))


MIXTURE, TOKENS = 6, 512
"""Of seven 4096 x 4096 layers, those that are 2:8, the others being 2:4; and tokens."""


def headline_layers(sparse: int = MIXTURE, tokens: int = TOKENS) -> list[Layer]:
    """Our reading of the paper's workload (section 7).

    Args:
        sparse: layers that are 2:8; 7 less these are 2:4.
        tokens: T.
    """
    mixture = [Pattern(2, 8)] * sparse + [Pattern(2, 4)] * (7 - sparse)
    return [
        Layer(f"layer {number}", Gemm(4096, 4096, pattern), tokens)
        for number, pattern in enumerate(mixture)
    ]


def headlines(
    hardware: Hardware, layers: Sequence[Layer] | None = None, objective: Objective = "latency"
) -> tuple[float, float]:
    """Gains in latency and energy over ``fixed:2:4``.

    Args:
        hardware: the configuration.
        layers: the workload; default ``headline_layers()``.
        objective: of the mapper.
    """
    layers = headline_layers() if layers is None else layers
    own, fixed = compare(layers, hardware, ["fixed:2:4"], objective)
    return fixed.cycles / own.cycles, fixed.joules / own.joules
