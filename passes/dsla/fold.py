"""Turning a layer's cached keys and values into the states of its linear attention.

``S = Σ_t (exp(b_T - b_t) ⊙ f_t ⊙ k_t)ᵀ v_t`` with b the running sum of log decays: what the
recurrence would have left, had the layer been linear from the first token on, on the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.kernels.linear_attention.arguments import log_decay, write_factor
from fxgraft.kernels.spec import argument, dims
from fxgraft.passes.dsla.rewrite import CHOICE
from fxgraft.passes.dsla.sites import content_nodes, plain, size
from fxgraft.program import Program

fx = torch.ops.fxgraft
_PIECE = 2048
# A channel that has forgotten all but this share of a token has forgotten it.
_FORGOTTEN = -30 * math.log(2)
_PROBED = 8
_TOLERANCE = 0.05


def fold(
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    temperature: float | None,
    floor: float | None,
    write_scale: str,
) -> Tensor:
    """The states after all tokens, from the last token backwards.

    Args:
        key: [B, T, Hkv, D], as linear attention takes it.
        value: [B, T, Hkv, Dv].
        gate: [B, T, H, N, D].
        temperature, floor, write_scale: of the op.

    Returns:
        [B, H, N, D, Dv], float32 (float64 for float64 keys).
    """  # fmt: skip
    dtype = torch.promote_types(key.dtype, torch.float32)
    batch, length, heads, states, width = gate.shape
    group = heads // key.shape[2]
    memory = key.new_zeros(batch, heads, states * width, value.shape[3], dtype=dtype)
    behind = key.new_zeros(batch, 1, heads, states, width, dtype=dtype)
    for end in range(length, 0, -_PIECE):
        piece = slice(max(end - _PIECE, 0), end)
        decay = log_decay(gate[:, piece].to(dtype), temperature, floor)
        until = behind + decay.flip(1).cumsum(1).flip(1)
        # A token's own gate does not touch its own write.
        weight = torch.cat([until[:, 1:], behind], 1).exp()
        if write_scale == "sqrt":
            weight = weight * write_factor(decay)
        keys = key[:, piece].to(dtype).repeat_interleave(group, 2).unsqueeze(3) * weight
        values = value[:, piece].to(dtype).repeat_interleave(group, 2)
        memory += keys.flatten(3).permute(0, 2, 3, 1) @ values.transpose(1, 2)
        behind = until[:, :1]
        if behind.device.type == "cpu" and float(behind.max()) < _FORGOTTEN:
            break
    return memory.view(batch, heads, states, width, value.shape[3])


@dataclass(frozen=True)
class Rotation:
    """What a model does to keys at each position: channel pairs turn by an angle.

    Attributes:
        partner: int64 [D], the channel that each is paired with; itself where nothing turns.
        cosine, sine: [T, D]: rotated[c] = cosine[c] x[c] + sine[c] x[partner[c]].
    """

    partner: Tensor
    cosine: Tensor
    sine: Tensor

    def undo(self, key: Tensor, start: int = 0) -> Tensor:
        """Keys before rotation.

        Args:
            key: [..., T, D] at positions from ``start`` on.
            start: position of the first.
        """
        rows = slice(start, start + key.shape[-2])
        cosine, sine = self.cosine[rows], self.sine[rows]
        wide = key.to(cosine.dtype)
        scale = cosine.square() + sine.square()
        return ((cosine * wide - sine * wide[..., self.partner]) / scale).to(key.dtype)


class LayerFold:
    """Folds the cache of one layer whose rows can choose to be linear.

    It reads what it needs from the graph: how keys are rotated is measured, and gates are computed
    by the graph's own nodes.

    Args:
        program: with the choice.
        choice: the input that chooses.
        positions: most tokens of a request.

    Attributes:
        exact: whether cached keys and values are enough, because gates read nothing else; if not,
            the layer cannot be folded.

    Raises:
        InputError: the Program has no such choice between softmax and linear attention.
    """

    def __init__(self, program: Program, choice: str, positions: int) -> None:
        softmax, linear = _pair(program, choice)
        content = content_nodes(program)
        key = cast(Node, argument(softmax, "key"))
        read = [cast(Node, argument(linear, name)) for name in ("key", "gate")]
        start = plain(program, key, content, also=read)
        self.exact = start is not None
        self._options: dict[str, Any] = {
            name: argument(linear, name) for name in ("temperature", "floor", "write_scale")
        }
        if start is None:
            return
        self._gates = _Slice(program, start, read)
        shape = (size(key, 1), size(key, 3))
        self.rotation = _measure(_Slice(program, start, [key]), shape, positions, program)

    def __call__(self, key: Tensor, value: Tensor) -> Tensor:
        """States [1, H, N, D, Dv] from cached keys [1, Hkv, T, D] and values [1, Hkv, T, Dv]."""
        keys, gate = self._gates(self.rotation.undo(key))
        return fold(keys, value.transpose(1, 2), gate, **self._options)


def choices_of(program: Program) -> dict[str, int]:
    """Inputs that choose whether a layer is linear, with the layer's index."""
    return {
        spec.name: int(spec.name.removeprefix(CHOICE))
        for spec in program.inputs
        if spec.name.startswith(CHOICE) and spec.name.removeprefix(CHOICE).isdigit()
    }


def _pair(program: Program, choice: str) -> tuple[Node, Node]:
    """The softmax and the linear attention that a choice is between."""
    node = next((n for n in program.placeholders if n.name == choice), None)
    users = [] if node is None else [u for u in node.users if u.target is fx.choose_rows.default]
    if len(users) == 1:
        first, second = cast("Sequence[Node]", users[0].args[1])
        pair = _behind(first, fx.attention.default), _behind(second, fx.linear_attention.default)
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    raise InputError(
        f"the model has no choice {choice!r} between softmax and linear attention",
        "compile it with pass dsla and live: true",
    )


def _behind(node: Node, target: object) -> Node | None:
    """The nearest call of an op that a value comes from."""
    pending, seen = [node], set[Node]()
    while pending:
        one = pending.pop(0)
        if one.target is target:
            return one
        if one not in seen:
            seen.add(one)
            pending.extend(one.all_input_nodes)
    return None


class _Slice:
    """Part of a Program as a function of one node's value.

    Args:
        program: it is not changed.
        start: the node whose value is given.
        goals: nodes to compute.
    """

    def __init__(self, program: Program, start: Node, goals: Sequence[Node]) -> None:
        self._program = program
        self._axis = _sequence_dim(program, start)
        copy = program.copy()
        nodes = {node.name: node for node in copy.graph.nodes}
        with copy.graph.inserting_after(copy.placeholders[-1]):
            given = copy.graph.placeholder("given")
        given.meta["val"] = nodes[start.name].meta["val"]
        nodes[start.name].replace_all_uses_with(given)
        chosen = tuple(given if goal is start else nodes[goal.name] for goal in goals)
        copy.graph.output_node().args = (chosen,)
        graphs.finish(copy.graph_module)
        self._module = copy.graph_module

    @torch.no_grad()
    def __call__(self, given: Tensor) -> tuple[Tensor, ...]:
        """The goals, from keys [B, Hkv, T, D] at positions from 0 on."""
        batch, _, length, _ = given.shape
        value = given if self._axis == 2 else given.transpose(1, 2)
        ids = torch.zeros(batch, length, dtype=torch.int64, device=given.device)
        return self._module(*self._program.bind(ids), value)


def _sequence_dim(program: Program, node: Node) -> int:
    sequence = program.symbols["sequence"]
    return next(axis for axis, one in enumerate(dims(node)) if sequence in one.free_symbols)


def _measure(rotate: _Slice, shape: tuple[int, int], positions: int, program: Program) -> Rotation:
    """How keys turn at each position, by rotating unit vectors and sums of them.

    Raises:
        InputError: the model does something else to its keys.
    """
    heads, width = shape
    options: Any = {"dtype": _dtype_of(program), "device": program.device}
    channels = torch.arange(width, device=program.device)
    units = torch.eye(width, **options)[:, None, None].expand(
        -1, heads, min(positions, _PROBED), -1
    )
    moved = rotate(units)[0][:, 0].float().abs().sum(1).fill_diagonal_(0)
    partner = torch.where(moved.amax(1) > 0, moved.argmax(1), channels)
    first = channels <= partner
    halves = torch.stack([first, ~first]).to(options["dtype"])[:, None, None]
    left, right = rotate(halves.expand(-1, heads, positions, -1))[0][:, 0].float()
    sine = torch.where(partner == channels, 0.0, torch.where(first, right, left))
    found = Rotation(partner, torch.where(first, left, right), sine)
    keys = torch.linspace(-1, 1, heads * positions * width, **options)
    keys = keys.view(1, heads, positions, width)
    turned = rotate(keys)[0].contiguous()
    wrong = (found.undo(turned) - keys).float().square().sum() / keys.float().square().sum()
    error = math.sqrt(float(wrong))
    if not error < _TOLERANCE:
        raise InputError(
            f"the keys of this model are not rotated in pairs of channels (error {error:.1e})",
            "convert at the start of requests only, or use another model",
        )
    return found


def _dtype_of(program: Program) -> torch.dtype:
    attention = fx.attention.default
    node = next(iter(program.graph.find_nodes(op="call_function", target=attention)))
    return cast(Tensor, node.meta["val"]).dtype
