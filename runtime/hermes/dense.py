"""A dense transformer's step by operators: work over peak rates (GenZ, spec section 9.2).

Each operator takes the longer of its arithmetic and its memory traffic, at a share of the device's
peak that an ``Efficiency`` states; operators and layers add up. It needs no model and no
measurement: for first estimates, and for fitting to other people's measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fxgraft.cost_table import Price
from fxgraft.cost_table_prices import DecodeLine
from fxgraft.devices import Device
from fxgraft.element_types import BITS
from fxgraft.errors import InputError
from fxgraft.runtime.hermes.communication import all_reduce
from fxgraft.runtime.hermes.costs import NO_LIMIT

STATIC, COMPUTE, MEMORY, NETWORK = 0.30, 0.40, 0.20, 0.10
"""Shares of a device's power: always, and by how busy arithmetic, memory and links are."""


@dataclass(frozen=True, slots=True)
class DenseModel:
    """Sizes of a decoder with grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Of the linear layers of one block."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Of all linear layers and the embedding."""
        return self.layers * self.layer_parameters + 2 * self.hidden * self.vocabulary

    def kv_bytes(self, dtype: str) -> float:
        """Keys and values of one token, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_of(dtype)


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Share of the peak that is reached, by class of operator, and fixed times.

    Attributes:
        linear_compute, linear_memory: linear layers.
        prefill_attention: arithmetic of attention over a prompt.
        decode_attention: memory traffic of attention of single queries.
        elementwise: memory traffic of norms, activations and residual additions.
        communication: bandwidth of links.
        layer_seconds: of each layer in every step.
        step_seconds: of every step.
        token_seconds, sequence_seconds: of every step for each new token and each sequence.
    """

    linear_compute: float = 0.75
    linear_memory: float = 0.75
    prefill_attention: float = 0.75
    decode_attention: float = 0.75
    elementwise: float = 0.75
    communication: float = 0.75
    layer_seconds: float = 0.0
    step_seconds: float = 0.0
    token_seconds: float = 0.0
    sequence_seconds: float = 0.0


MODELS = {
    "llama-2-7b": DenseModel(32, 4096, 32, 32, 128, 11008, 32000),
    "llama-3.1-8b": DenseModel(32, 4096, 32, 8, 128, 14336, 128256),
    "llama-3.1-70b": DenseModel(80, 8192, 64, 8, 128, 28672, 128256),
    "qwen3-32b": DenseModel(64, 5120, 64, 8, 128, 25600, 151936),
}
"""From the models' configuration files."""


def bytes_of(dtype: str) -> float:
    """Bytes of one element.

    Raises:
        InputError: the data type is unknown.
    """
    if dtype not in BITS:
        raise InputError(f"{dtype!r} is no data type", f"give one of: {', '.join(BITS)}")
    return BITS[dtype] / 8


@dataclass(slots=True)
class _Work:
    """Ideal times of a step that has been added up, per device, and the real one."""

    seconds: float = 0.0
    compute: float = 0.0
    memory: float = 0.0
    network: float = 0.0

    def add(self, compute: float, memory: float, share_c: float, share_m: float) -> None:
        """An operator: seconds of arithmetic and of traffic at peak, and the shares reached."""
        self.seconds += max(compute / share_c, memory / share_m)
        self.compute += compute
        self.memory += memory


@dataclass(frozen=True)
class DenseCost:
    """Prices steps of a dense model; see ``costs.StepCost``.

    Args:
        model: its sizes.
        device: of each of the devices.
        weights: data type of weights and arithmetic.
        state: data type of keys and values.
        activations: data type of activations.
        devices: over which every layer is divided (tensor parallel).
        efficiency: shares of the peaks.
    """

    model: DenseModel
    device: Device
    weights: str
    state: str = "bfloat16"
    activations: str = "bfloat16"
    devices: int = 1
    efficiency: Efficiency = Efficiency()
    _by_tokens: dict[tuple[int, int], tuple[float, float]] = field(
        default_factory=dict[tuple[int, int], tuple[float, float]], compare=False, repr=False
    )

    def __post_init__(self) -> None:
        for dtype in (self.weights, self.state, self.activations):
            bytes_of(dtype)
        self.device.peak(self._arithmetic)
        if self.devices > 1 and self.device.link is None:
            raise InputError(f"device {self.device.name!r} has no links, so {self.devices} cannot "
                             "share a model", "use one device")  # fmt: skip

    @property
    def _arithmetic(self) -> str:
        """Weights of less than eight bits are widened before they are multiplied, where the
        device does not compute in their type."""
        known = self.weights in self.device.operations or BITS[self.weights] > 8
        return self.weights if known else self.activations

    @property
    def idle_watts(self) -> float:
        """Drawn by all devices between steps."""
        return STATIC * self.device.watts * self.devices

    @property
    def memory_for_state(self) -> float:
        """Bytes of all devices that weights leave."""
        used = self.model.parameters * bytes_of(self.weights)
        return self.devices * self.device.memory - used

    def price(
        self,
        prefills: Sequence[tuple[int, int]] = (),
        decodes: int = 0,
        decode_context: int = 0,
    ) -> Price:
        """Price of a step."""
        sequences = len(prefills) + decodes
        if not sequences:
            return Price(0.0, 0.0)
        tokens = decodes + sum([new for new, _ in prefills])
        seconds, joules = self.without_attention(tokens, sequences)
        for new, cached in prefills:
            more, energy = self.prefill_attention(new, cached)
            seconds, joules = seconds + more, joules + energy
        if decodes:
            more, energy = self.decode_attention(decode_context)
            seconds, joules = seconds + more, joules + energy
        return Price(seconds, joules)

    def decode_line(self, decodes: int, decode_context: int) -> DecodeLine:
        """Attention of decodes is proportional to their context: one line without end."""
        here = self.price((), decodes, decode_context)
        seconds, joules = self.decode_attention(1)
        return DecodeLine(
            decode_context, NO_LIMIT, here.seconds, seconds, here.joules or 0.0, joules
        )

    def _joules(self, work: _Work) -> float:
        busy = COMPUTE * work.compute + MEMORY * work.memory + NETWORK * work.network
        return self.device.watts * self.devices * (STATIC * work.seconds + busy)

    def without_attention(self, tokens: int, sequences: int) -> tuple[float, float]:
        """Seconds and joules of a step but for its attention."""
        found = self._by_tokens.get((tokens, sequences))
        if found is None:
            work = _Work()
            self._linears(work, tokens)
            self._head(work, sequences)
            self._elementwise(work, tokens)
            self._all_reduces(work, tokens)
            share = self.efficiency
            work.seconds += share.step_seconds + self.model.layers * share.layer_seconds
            work.seconds += share.token_seconds * tokens + share.sequence_seconds * sequences
            found = work.seconds, self._joules(work)
            self._by_tokens[tokens, sequences] = found
        return found

    def _linear(self, work: _Work, tokens: int, inputs: int, outputs: int, times: int) -> None:
        """``times`` alike linear layers, divided over the devices."""
        peak = self.device.peak(self._arithmetic)
        moved = inputs * outputs * bytes_of(self.weights) / self.devices
        moved += tokens * (inputs + outputs / self.devices) * bytes_of(self.activations)
        share = self.efficiency
        work.add(
            times * 2 * tokens * inputs * outputs / self.devices / peak,
            times * moved / self.device.bandwidth,
            share.linear_compute,
            share.linear_memory,
        )

    def _linears(self, work: _Work, tokens: int) -> None:
        model = self.model
        width = model.heads * model.head_dim
        merged = width + 2 * model.kv_heads * model.head_dim
        self._linear(work, tokens, model.hidden, merged, model.layers)
        self._linear(work, tokens, width, model.hidden, model.layers)
        self._linear(work, tokens, model.hidden, 2 * model.intermediate, model.layers)
        self._linear(work, tokens, model.intermediate, model.hidden, model.layers)

    def _head(self, work: _Work, sequences: int) -> None:
        """Logits of the last token of each sequence; the head stays in the activations' type."""
        model, size = self.model, bytes_of(self.activations)
        moved = model.hidden * model.vocabulary * size / self.devices
        work.add(
            2
            * sequences
            * model.hidden
            * model.vocabulary
            / self.devices
            / self.device.peak(self.activations),
            moved / self.device.bandwidth,
            self.efficiency.linear_compute,
            self.efficiency.linear_memory,
        )

    def _elementwise(self, work: _Work, tokens: int) -> None:
        """Two norms with residual additions read and write four rows each, the MLP's gate three."""
        model = self.model
        values = 8 * model.hidden + 3 * model.intermediate / self.devices
        moved = model.layers * tokens * values * bytes_of(self.activations)
        work.add(0.0, moved / self.device.bandwidth, 1.0, self.efficiency.elementwise)

    def _all_reduces(self, work: _Work, tokens: int) -> None:
        """Two per layer; none on one device."""
        size = tokens * self.model.hidden * bytes_of(self.activations)
        link = self.device.link
        if link is None:
            return
        rate = link.bandwidth * self.efficiency.communication
        one = all_reduce(self.devices, size, rate, link.latency)
        work.seconds += 2 * self.model.layers * one
        work.network += 2 * self.model.layers * one

    def prefill_attention(self, new: int, cached: int) -> tuple[float, float]:
        """Seconds and joules of attention over a prompt's new and cached tokens."""
        model = self.model
        operations = 4 * model.layers * model.heads * model.head_dim * new * (cached + new / 2)
        return self._attention(operations, model.kv_bytes(self.state) * (new + cached))

    def decode_attention(self, context: int) -> tuple[float, float]:
        """Seconds and joules of attention of single queries over so many keys in all."""
        model = self.model
        operations = 4 * model.layers * model.heads * model.head_dim * context
        return self._attention(operations, model.kv_bytes(self.state) * context)

    def _attention(self, operations: float, moved: float) -> tuple[float, float]:
        work = _Work()
        work.add(
            operations / self.devices / self.device.peak(self.activations),
            moved / self.devices / self.device.bandwidth,
            self.efficiency.prefill_attention,
            self.efficiency.decode_attention,
        )
        return work.seconds, self._joules(work)
