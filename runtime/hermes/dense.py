"""A dense transformer's step by operators: work over peak rates (GenZ, spec section 9.2).

Each operator takes the longer of its arithmetic and its memory traffic, at a share of the device's
peak that an ``Efficiency`` states; operators and layers add up. It needs no model and no
measurement: for first estimates, and for fitting to other people's measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fxgraft.cost_table import Price
from fxgraft.cost_table_prices import DecodeLine, new_line, new_price
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
        latency: of links; a factor on their latency, which may be above or below 1.
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
    latency: float = 1.0
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
    _by_tokens: dict[int, tuple[float, float]] = field(
        default_factory=dict[int, tuple[float, float]], compare=False, repr=False
    )
    _by_sequences: dict[int, tuple[float, float]] = field(
        default_factory=dict[int, tuple[float, float]], compare=False, repr=False
    )
    _rates: tuple[float, ...] = field(default=(), init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        for dtype in (self.weights, self.state, self.activations):
            bytes_of(dtype)
        self.device.peak(self._arithmetic)
        if self.devices > 1 and self.device.link is None:
            raise InputError(f"device {self.device.name!r} has no links, so {self.devices} cannot "
                             "share a model", "use one device")  # fmt: skip
        object.__setattr__(self, "_rates", self._attention_rates())

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
        tokens, sequences = decodes, len(prefills) + decodes
        if not sequences:
            return Price(0.0, 0.0)
        each, moved, static, by_pair, by_key, key_seconds, key_joules = self._rates
        seconds, joules = key_seconds * decode_context, key_joules * decode_context
        for new, cached in prefills:
            tokens += new
            pairs, keys = new * (cached + 0.5 * new), new + cached
            more, moving = pairs * each, keys * moved
            if moving > more:
                more = moving
            seconds += more
            joules += static * more + by_pair * pairs + by_key * keys
        by_tokens = self._by_tokens.get(tokens) or self._of_tokens(tokens)
        by_sequences = self._by_sequences.get(sequences) or self._of_sequences(sequences)
        seconds += by_tokens[0] + by_sequences[0]
        return new_price(Price, (seconds, joules + by_tokens[1] + by_sequences[1], False))

    def decode_line(self, decodes: int, decode_context: int) -> DecodeLine:
        """Attention of decodes is proportional to their context: one line without end."""
        *_, slope, energy_slope = self._rates
        seconds, joules = self.without_attention(decodes, decodes)
        seconds += slope * decode_context
        joules += energy_slope * decode_context
        found = decode_context, NO_LIMIT, seconds, slope, joules, energy_slope
        return new_line(DecodeLine, found)

    def _joules(self, work: _Work) -> float:
        busy = COMPUTE * work.compute + MEMORY * work.memory + NETWORK * work.network
        return self.device.watts * self.devices * (STATIC * work.seconds + busy)

    def without_attention(self, tokens: int, sequences: int) -> tuple[float, float]:
        """Seconds and joules of a step but for its attention."""
        by_tokens = self._by_tokens.get(tokens) or self._of_tokens(tokens)
        by_sequences = self._by_sequences.get(sequences) or self._of_sequences(sequences)
        return by_tokens[0] + by_sequences[0], by_tokens[1] + by_sequences[1]

    def _of_tokens(self, tokens: int) -> tuple[float, float]:
        """The blocks without their attention, and what every step takes."""
        work, share = _Work(), self.efficiency
        self._linears(work, tokens)
        self._elementwise(work, tokens)
        self._all_reduces(work, tokens)
        work.seconds += share.step_seconds + self.model.layers * share.layer_seconds
        work.seconds += share.token_seconds * tokens
        self._by_tokens[tokens] = found = work.seconds, self._joules(work)
        return found

    def _of_sequences(self, sequences: int) -> tuple[float, float]:
        """The logits."""
        work = _Work()
        self._head(work, sequences)
        work.seconds += self.efficiency.sequence_seconds * sequences
        self._by_sequences[sequences] = found = work.seconds, self._joules(work)
        return found

    def _linears(self, work: _Work, tokens: int) -> None:
        """The linear layers of all blocks, each divided over the devices."""
        share, layers, devices = self.efficiency, self.model.layers, self.devices
        operation = 2 / devices / self.device.peak(self._arithmetic)
        weight = bytes_of(self.weights) / devices / self.device.bandwidth
        value = bytes_of(self.activations) / self.device.bandwidth
        for inputs, outputs in self._shapes:
            moving = inputs * outputs * weight + tokens * (inputs + outputs / devices) * value
            work.add(
                layers * tokens * inputs * outputs * operation,
                layers * moving,
                share.linear_compute,
                share.linear_memory,
            )

    @cached_property
    def _shapes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a block's linear layers; those with the same input are merged."""
        model = self.model
        width = model.heads * model.head_dim
        return (
            (model.hidden, width + 2 * model.kv_heads * model.head_dim),
            (width, model.hidden),
            (model.hidden, 2 * model.intermediate),
            (model.intermediate, model.hidden),
        )

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
        one = all_reduce(self.devices, size, rate, link.latency * self.efficiency.latency)
        work.seconds += 2 * self.model.layers * one
        work.network += 2 * self.model.layers * one

    def prefill_attention(self, new: int, cached: int) -> tuple[float, float]:
        """Seconds and joules of attention over a prompt's new and cached tokens."""
        return self._attention(new * (cached + 0.5 * new), new + cached)

    def decode_attention(self, context: int) -> tuple[float, float]:
        """Seconds and joules of attention of single queries over so many keys in all."""
        return self._attention(context, context)

    def _attention(self, pairs: float, keys: float) -> tuple[float, float]:
        each, moved, static, by_pair, by_key = self._rates[:5]
        seconds = max(pairs * each, keys * moved)
        return seconds, static * seconds + by_pair * pairs + by_key * keys

    def _attention_rates(self) -> tuple[float, float, float, float, float, float, float]:
        """Of attention: seconds per pair of a query and a key, and per key that is read; watts that
        are always drawn; joules per pair and per key; seconds and joules of one query per key."""
        model, device, share = self.model, self.device, self.efficiency
        operations = 4 * model.layers * model.heads * model.head_dim / self.devices
        pair = operations / device.peak(self.activations)
        key = model.kv_bytes(self.state) / self.devices / device.bandwidth
        each, moved = pair / share.prefill_attention, key / share.decode_attention
        watts = device.watts * self.devices
        static, by_pair, by_key = watts * STATIC, watts * COMPUTE * pair, watts * MEMORY * key
        slowest = max(each, moved)
        return (
            each, moved, static, by_pair, by_key, slowest, static * slowest + by_pair + by_key
        )  # fmt: skip
