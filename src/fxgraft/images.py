"""Vision-language models: where image features enter the sequence, and the two halves around it.

A captured vision-language model computes features from images and writes them over the embeddings
of its image tokens (``masked_scatter``). Cut there, it is an image encoder and a language model
that takes one more input: ``image_embeds``, a row per token.

A model that counts images along several axes writes a second table over its image tokens: what
they add to positions. Both are rows of the same tokens, so ``image_embeds`` holds them side by
side, and whoever carries it from one to the other need not know.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft import prompt_parts
from fxgraft.errors import InputError
from fxgraft.kernels.spec import dims
from fxgraft.operators import aliases_input, writes
from fxgraft.program import Input, Program

aten = torch.ops.aten
EMBEDS = "image_embeds"


@dataclass(frozen=True)
class Merge:
    """Where a Program writes image features over token embeddings.

    Attributes:
        node: the embeddings of all tokens, [B, S, D].
        text: the embeddings before.
        mask: bool [B, S, 1], where image tokens are.
        features: [N, D], one row per image token of the batch.
        tokens: ids of the image tokens.
        positions: the node that writes what image tokens add to positions, [B, S, P]; None in
            models that count them as text.
    """

    node: Node
    text: Node
    mask: Node
    features: Node
    tokens: tuple[int, ...]
    positions: Node | None = None

    @property
    def width(self) -> int:
        """Size of a row of ``image_embeds``."""
        beside = 0 if self.positions is None else int(dims(self.positions)[-1])  # pyright: ignore[reportArgumentType]
        return int(dims(self.node)[-1]) + beside  # pyright: ignore[reportArgumentType]


def find_merge(program: Program) -> Merge | None:
    """Where image features enter; None if the Program takes no images or takes them elsewhere."""
    ids = next((node for node in program.placeholders if node.name == "input_ids"), None)
    if ids is None:
        return None
    positions: Node | None = None
    for node in program.graph.find_nodes(op="call_function", target=aten.masked_scatter.default):
        text, mask, features = node.all_input_nodes
        tokens = _compared_with(mask, ids)
        if not tokens or not len(dims(node)) == len(dims(mask)) == 3:
            continue
        if features.op != "get_attr":
            return Merge(node, text, mask, features, tokens, positions)
        # It is known before the images are.
        positions = node
    return None


def _compared_with(node: Node, ids: Node) -> tuple[int, ...]:
    """The token ids that a mask is made of."""
    found: list[int] = []
    pending, seen = [node], set[Node]()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.target is aten.eq.Scalar and current.args[0] is ids:
            token = current.args[1]
            found += [token] if isinstance(token, int) else []
        pending.extend(current.all_input_nodes)
    return tuple(sorted(found))


def language_model(program: Program) -> Program:
    """The part behind the images: ``image_embeds`` [batch, sequence, D] in, ``logits`` out.

    A row of zeros leaves a token its own embedding, as an image token has that the model writes
    itself. Where prompts are read otherwise than answers, ``prompt_length`` tells them apart. A
    Program that writes no images over its tokens comes back as it is.
    """
    if find_merge(program) is None:
        return program
    copy = program.copy()
    merge = find_merge(copy)
    assert merge is not None
    value = merge.text.meta["val"]
    last = copy.placeholders[-1]
    with copy.graph.inserting_after(last):
        given = copy.graph.placeholder(EMBEDS)
    given.meta["val"] = value.new_empty((*value.shape[:2], merge.width))
    embeds = given
    if merge.positions is not None:
        embeds = _read_positions(merge.positions, given, int(value.shape[-1]))
    is_given = graphs.insert(merge.node, aten.ne.Scalar, (embeds, 0))
    is_given = graphs.insert(merge.node, aten.any.dim, (is_given, -1, True))
    chosen = graphs.insert(merge.node, aten.where.self, (is_given, embeds, merge.text))
    merge.node.replace_all_uses_with(chosen)
    copy.graph.output_node().args = ((copy.output_nodes["logits"],),)
    _drop_others(copy)
    spec = Input(EMBEDS, value.dtype, ("batch", "sequence", merge.width), "zeros")
    copy.inputs = (*copy.inputs, spec)
    prompt_parts.tell_types_by_length(copy)
    return _with_inputs(copy, ("logits",))


def _read_positions(positions: Node, given: Node, width: int) -> Node:
    """Take what images add to positions from behind the features; the features alone."""
    beside = graphs.insert(positions, aten.slice.Tensor, (given, 2, width, sys.maxsize))
    dtype = positions.meta["val"].dtype
    positions.replace_all_uses_with(graphs.insert(positions, aten.to.dtype, (beside, dtype)))
    return graphs.insert(positions, aten.slice.Tensor, (given, 2, 0, width))


def image_encoder(program: Program) -> Program:
    """The part before the tokens: images in, ``features`` [N, D] out, a row per image token."""
    copy = program.copy()
    merge = find_merge(copy)
    assert merge is not None
    features, output = merge.features, copy.graph.output_node()
    if len(dims(features)) > 2:
        features = graphs.insert(output, aten.flatten.using_ints, (features, 0, -2))
    if merge.positions is not None:
        table = merge.positions.all_input_nodes[-1]
        dtype = features.meta["val"].dtype
        table = graphs.insert(output, aten.to.dtype, (table, dtype))
        features = graphs.insert(output, aten.cat.default, ([features, table], 1))
    output.args = ((features,),)
    _drop_others(copy)
    sizes = tuple(spec.name for spec in copy.inputs if spec.fixed)
    return _with_inputs(copy, ("features",), sizes)


def _drop_others(program: Program) -> None:
    """Remove all that does not lead to the outputs: the other half, checks that join the two.

    What writes into a tensor in place is read by all that read the tensor.
    """
    writers: dict[Node, list[Node]] = {}
    for node in program.graph.nodes:
        if writes(node):
            writers.setdefault(_written(node), []).append(node)
    live: set[Node] = set()
    pending = [program.graph.output_node()]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending += [*node.all_input_nodes, *writers.get(node, [])]
    for node in reversed(list(program.graph.nodes)):
        if node not in live and node.op != "placeholder":
            program.graph.erase_node(node)
    graphs.finish(program.graph_module)


def _written(node: Node) -> Node:
    """The tensor that a node writes into: behind the views of it."""
    while writes(node) or aliases_input(node):
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _with_inputs(program: Program, outputs: tuple[str, ...], also: tuple[str, ...] = ()) -> Program:
    """Drop the inputs that nothing reads, but for those named in ``also``."""
    kept: list[Input] = []
    for spec, node in zip(program.inputs, program.placeholders, strict=True):
        if node.users or spec.name in also:
            kept.append(spec)
        else:
            program.graph.erase_node(node)
    used = {size for spec in kept for size in spec.shape if isinstance(size, str)}
    graphs.finish(program.graph_module)
    dimensions = {name: size for name, size in program.dimensions.items() if name in used}
    return replace(program, inputs=tuple(kept), outputs=outputs, dimensions=dimensions)


def image_inputs(program: Program) -> tuple[Input, ...]:
    """The inputs that only images give; none for a language model."""
    return image_encoder(program).inputs if find_merge(program) is not None else ()


def encode(encoder: Program, values: Mapping[str, Tensor]) -> Tensor:
    """Features [N, D] of images.

    The number of images is fixed at capture; any number is taken in groups of that size, the last
    one filled up with copies. Where their sizes are fixed too, they must all be alike for that.

    Args:
        encoder: as ``image_encoder`` cuts it out of the model.
        values: image inputs by name, images along the first dimension. Fixed sizes may be left
            out.

    Raises:
        InputError: an input is missing, unknown or of the wrong shape, or images have other sizes
            than those of the capture.
    """
    fixed = {spec.name: spec.fixed_value() for spec in encoder.inputs if spec.fixed}
    values = {**fixed, **values}
    missing = [spec.name for spec in encoder.inputs if spec.name not in values]
    if missing:
        raise InputError(
            f"image input {missing[0]!r} is missing",
            f"give: {', '.join(spec.name for spec in encoder.inputs)}",
        )
    size, rows = _images_and_rows(encoder)
    count = values[next(iter(fixed), encoder.inputs[0].name)].shape[0]
    if not size or count == size or values.keys() != rows.keys():
        return encoder(**values)[0]
    return _in_groups(encoder, values, rows, size, count)


def _images_and_rows(encoder: Program) -> tuple[int, dict[str, int]]:
    """Images of one call, and rows of each input for one image; 0 if they cannot be told apart."""
    firsts = {spec.name: spec.shape[0] for spec in encoder.inputs}
    sized = [spec for spec in encoder.inputs if spec.fixed]
    size = (sized or encoder.inputs)[0].shape[0]
    alike = all(bool((spec.fixed_value() == spec.fixed_value()[0]).all()) for spec in sized)
    rows: dict[str, int] = {}
    for name, first in firsts.items():
        if not isinstance(size, int) or not isinstance(first, int) or first % size or not alike:
            return 0, {}
        rows[name] = first // size
    return (size if isinstance(size, int) else 0), rows


def _in_groups(
    encoder: Program, values: Mapping[str, Tensor], rows: Mapping[str, int], size: int, count: int
) -> Tensor:
    images: dict[str, Tensor] = {}
    for name, value in values.items():
        if value.shape[0] != count * rows[name]:
            raise InputError(
                f"image input {name!r} has {value.shape[0]} rows for {count} images",
                f"give {rows[name]} for each image",
            )
        images[name] = value.unflatten(0, (count, rows[name]))
    parts: list[Tensor] = []
    for start in range(0, count, size):
        index = torch.arange(start, start + size).clamp(max=count - 1)
        group = {name: value[index].flatten(0, 1) for name, value in images.items()}
        features = encoder(**group)[0]
        used = min(size, count - start)
        parts.append(features[: features.shape[0] // size * used])
    return torch.cat(parts)


def feature_count(program: Program) -> int:
    """Image tokens that the images of one call stand for; 0 if the Program takes none."""
    merge = find_merge(program)
    if merge is None:
        return 0
    sizes = dims(merge.features)[:-1]
    if all(size.is_Integer for size in sizes):
        return math.prod(int(size) for size in sizes)  # pyright: ignore[reportArgumentType]
    encoder = image_encoder(program)
    return int(encoder(**encoder.example())[0].shape[0])


def write_tokens(program: Program, input_ids: Tensor) -> None:
    """Write as many image tokens into random ids [B, S] as the images need, evenly over the rows.

    Ids in which they do not fit stay as they are.
    """
    merge = find_merge(program)
    if merge is None:
        return
    batch, length = input_ids.shape
    count = feature_count(program)
    shares = [len(range(row, count, batch)) for row in range(batch)]
    if max(shares) > length - 2:
        return
    others = [token for token in range(len(merge.tokens) + 1) if token not in merge.tokens]
    input_ids[torch.isin(input_ids, torch.tensor(merge.tokens))] = others[0]
    for row, share in enumerate(shares):
        input_ids[row, 1 : 1 + share] = merge.tokens[0]


def place(features: Tensor, input_ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """``image_embeds`` [B, S, D]: features [N, D] at the image tokens of ids [B, S], else zeros.

    Raises:
        InputError: there are more or fewer image tokens than features.
    """
    mask = torch.isin(input_ids, torch.tensor(tokens, device=input_ids.device))
    count = int(mask.sum())
    if count != features.shape[0]:
        raise InputError(
            f"the prompts have {count} image tokens, the images {features.shape[0]} features",
            f"write {features.shape[0]} times the token {tokens[0]} where the images belong, as "
            "the model's processor does",
        )
    embeds = features.new_zeros((*input_ids.shape, features.shape[-1]))
    return embeds.masked_scatter(mask[..., None], features)
