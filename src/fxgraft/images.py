"""Vision-language models: where image features enter the sequence, and the two halves around it.

A captured vision-language model computes features from images and writes them over the embeddings
of its image tokens (``masked_scatter``). Cut there, it is an image encoder and a language model
that takes one more input: ``image_embeds``, a row per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from fxgraft import graph as graphs
from fxgraft.errors import InputError
from fxgraft.kernels.spec import dims
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
    """

    node: Node
    text: Node
    mask: Node
    features: Node
    tokens: tuple[int, ...]


def find_merge(program: Program) -> Merge | None:
    """Where image features enter; None if the Program takes no images or takes them elsewhere."""
    ids = next((node for node in program.placeholders if node.name == "input_ids"), None)
    if ids is None:
        return None
    for node in program.graph.find_nodes(op="call_function", target=aten.masked_scatter.default):
        text, mask, features = node.all_input_nodes
        tokens = _compared_with(mask, ids)
        if tokens and len(dims(node)) == len(dims(mask)) == 3:
            return Merge(node, text, mask, features, tokens)
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
    itself. A Program that writes no images over its tokens comes back as it is.
    """
    if find_merge(program) is None:
        return program
    copy = program.copy()
    merge = find_merge(copy)
    assert merge is not None
    value = merge.text.meta["val"]
    last = copy.placeholders[-1]
    with copy.graph.inserting_after(last):
        embeds = copy.graph.placeholder(EMBEDS)
    embeds.meta["val"] = value
    is_given = graphs.insert(merge.node, aten.ne.Scalar, (embeds, 0))
    is_given = graphs.insert(merge.node, aten.any.dim, (is_given, -1, True))
    chosen = graphs.insert(merge.node, aten.where.self, (is_given, embeds, merge.text))
    merge.node.replace_all_uses_with(chosen)
    copy.graph.output_node().args = ((copy.output_nodes["logits"],),)
    _drop_checks(copy)
    shape = ("batch", "sequence", int(value.shape[-1]))
    given = Input(EMBEDS, value.dtype, shape, "zeros")
    return _with_inputs(copy, (*copy.inputs, given), ("logits",))


def image_encoder(program: Program) -> Program:
    """The part before the tokens: images in, ``features`` [N, D] out."""
    copy = program.copy()
    merge = find_merge(copy)
    assert merge is not None
    copy.graph.output_node().args = ((merge.features,),)
    _drop_checks(copy)
    return _with_inputs(copy, copy.inputs, ("features",))


def _drop_checks(program: Program) -> None:
    """Remove comparisons of the number of tokens with that of features."""
    for node in list(program.graph.nodes):
        if node.target is aten._assert_scalar.default:
            program.graph.erase_node(node)
    graphs.finish(program.graph_module)


def _with_inputs(program: Program, inputs: tuple[Input, ...], outputs: tuple[str, ...]) -> Program:
    """Drop the inputs that nothing reads, but for those that carry the shape of the tokens."""
    kept: list[Input] = []
    for spec, node in zip(inputs, program.placeholders, strict=True):
        if node.users:
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
    one filled up with copies.

    Args:
        encoder: as ``image_encoder`` cuts it out of the model.
        values: image inputs by name, images along the first dimension.

    Raises:
        InputError: an input is missing, unknown or of the wrong shape.
    """
    fixed = [spec for spec in encoder.inputs if isinstance(spec.shape[0], int)]
    if not fixed:
        return encoder(**values)[0]
    missing = [spec.name for spec in encoder.inputs if spec.name not in values]
    if missing:
        raise InputError(
            f"image input {missing[0]!r} is missing",
            f"give: {', '.join(spec.name for spec in encoder.inputs)}",
        )
    size = int(fixed[0].shape[0])
    count = values[fixed[0].name].shape[0]
    if any(spec.shape[0] != size for spec in fixed) or count == size:
        return encoder(**values)[0]
    return _in_groups(encoder, {spec.name: values[spec.name] for spec in encoder.inputs}, size)


def feature_count(program: Program) -> int:
    """Image tokens that the images of one call stand for; 0 if the Program takes none."""
    merge = find_merge(program)
    if merge is None:
        return 0
    size = dims(merge.features)[0]
    if size.is_Integer:
        return int(size)  # pyright: ignore[reportArgumentType]
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


def _in_groups(encoder: Program, values: Mapping[str, Tensor], size: int) -> Tensor:
    count = next(iter(values.values())).shape[0]
    parts: list[Tensor] = []
    for start in range(0, count, size):
        index = torch.arange(start, start + size).clamp(max=count - 1)
        features = encoder(**{name: value[index] for name, value in values.items()})[0]
        used = min(size, count - start)
        parts.append(features[: features.shape[0] // size * used])
    return torch.cat(parts)


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
