"""Floating-point operations and memory traffic of ``aten`` operators, from their shapes.

Conventions:

* A multiply-add counts as two operations. Adding a bias inside a matrix product or convolution is
  left out, as in ``torch.utils.flop_counter``.
* An elementwise op costs 1 per output element, whatever the function (an exponential counts as
  one operation, as in the costs of ``fxgraft`` ops).
* A reduction costs 1 per input element; the normalisations cost the passes they make over their
  input (``PER_INPUT_ELEMENT``).
* Moving data costs no operations, and making a view costs nothing at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import sympy  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch.fx import Node

from fxgraft.kernels.spec import Expr, argument
from fxgraft.operators import aliases_input, operator_of, qualified_name

Size = int | Expr
Sizes = tuple[Size, ...]
Shape = Callable[[Any], Sizes]
Rule = Callable[[Node, Shape], Size]

PER_INPUT_ELEMENT: dict[str, int] = {
    # Maximum, difference, exponential, sum, division; one logarithm more.
    "softmax": 5, "_softmax": 5, "_safe_softmax": 5, "log_softmax": 6, "_log_softmax": 6,
    "logsumexp": 4,
    # Sum; difference, square, sum; scale; weight; bias.
    "layer_norm": 7, "native_layer_norm": 7, "group_norm": 7, "native_group_norm": 7,
    "instance_norm": 7,
    # Square, sum, scale, weight.
    "rms_norm": 4, "_fused_rms_norm": 4,
    # Difference, scale, weight, bias, with the statistics of training.
    "batch_norm": 4, "native_batch_norm": 4, "_native_batch_norm_legit_no_training": 4,
    "var": 4, "std": 5, "var_mean": 4, "std_mean": 5, "norm": 2, "linalg_vector_norm": 2,
    "cumsum": 1, "cumprod": 1, "logcumsumexp": 3, "cummax": 1, "cummin": 1, "median": 1,
    "adaptive_avg_pool1d": 1, "adaptive_avg_pool2d": 1, "adaptive_avg_pool3d": 1,
    "adaptive_max_pool1d": 1, "adaptive_max_pool2d": 1, "adaptive_max_pool3d": 1,
    "histc": 1, "bincount": 1, "topk": 1, "trace": 1, "renorm": 3, "_is_all_true": 1,
    "_is_any_true": 1,
    # One of p processes adds (p - 1) / p times per element, whatever the algorithm.
    "all_reduce": 1,
}  # fmt: skip

PER_OUTPUT_ELEMENT: dict[str, int] = {
    "addcmul": 2, "addcdiv": 2, "lerp": 3, "glu": 2, "hardswish": 1, "prelu": 1, "absolute": 1,
    "floor_divide": 1, "divide": 1, "multiply": 1, "subtract": 1, "negative": 1, "fix": 1,
    "true_divide": 1, "greater": 1, "greater_equal": 1, "less": 1, "less_equal": 1,
    "not_equal": 1, "special_expit": 1, "special_erf": 1, "isclose": 4, "outer": 1, "kron": 1,
    "log_sigmoid": 1, "where": 1, "masked_fill": 1, "dropout": 2, "native_dropout": 2,
    "bernoulli": 1, "diff": 1, "cross": 3, "polar": 3,
    # Four or eight neighbours, a multiply-add each.
    "upsample_bilinear2d": 8, "upsample_linear1d": 4, "upsample_trilinear3d": 16,
    "upsample_bicubic2d": 32, "grid_sampler": 8, "grid_sampler_2d": 8, "grid_sampler_3d": 16,
}  # fmt: skip

FACTORIES = frozenset({
    "arange", "zeros", "ones", "full", "eye", "linspace", "scalar_tensor", "rand", "randn",
    "randint", "randperm", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
    "new_zeros", "new_ones", "new_full", "fill", "zero", "tril_indices", "triu_indices",
    "hann_window", "hamming_window", "lift_fresh_copy", "uniform", "normal", "random",
})  # fmt: skip
ALLOCATIONS = frozenset({
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted",
})  # fmt: skip
MOVES = frozenset({
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "repeat", "repeat_interleave",
    "tile", "roll", "flip", "rot90", "pad", "constant_pad_nd", "reflection_pad1d", "tril", "triu",
    "reflection_pad2d", "replication_pad1d", "replication_pad2d", "pixel_shuffle", "copy",
    "pixel_unshuffle", "channel_shuffle", "clone", "im2col", "col2im", "one_hot", "meshgrid",
    "unfold_copy", "slice_scatter", "select_scatter", "diagonal_scatter", "as_strided_scatter",
    "index_put", "_index_put_impl", "index_copy", "index_fill", "scatter", "masked_scatter",
    "broadcast_tensors", "cartesian_prod", "block_diag", "diag_embed", "_to_copy", "type_as",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_unsafe_view", "nonzero",
    "masked_select", "split_copy", "unbind_copy", "view_copy", "permute_copy", "expand_copy",
    "nonzero_numpy", "atleast_1d", "bucketize", "searchsorted", "unique_consecutive", "isin",
    "split_with_sizes_copy", "transpose_copy", "t_copy", "slice_copy", "select_copy",
    "_unsafe_index_put", "sort", "argsort", "msort", "all_gather_into_tensor",
})  # fmt: skip
# Ops that read only the rows they gather, and the indices.
GATHERS = frozenset({
    "embedding", "index", "_unsafe_index", "index_select", "gather", "take", "take_along_dim",
})  # fmt: skip
# Ops that return their input where nothing needs to change.
MAYBE_VIEWS = frozenset({
    "reshape", "reshape_as", "contiguous", "flatten", "ravel", "to", "type_as", "_to_copy",
    "pin_memory", "resolve_conj", "resolve_neg",
})  # fmt: skip
_WITHOUT_ARITHMETIC = (MOVES, GATHERS, FACTORIES, ALLOCATIONS, MAYBE_VIEWS)


def product(sizes: Sequence[Size]) -> Size:
    """Number of elements of a shape."""
    return math.prod(sizes)


def base_name(node: Node) -> str:
    """The operator's name without namespace, overload and in-place underscore."""
    name = qualified_name(node).split("::")[1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def operations(node: Node, shape: Shape) -> Size | None:
    """Floating-point operations of an ``aten`` node, or None for an operator without a rule.

    Args:
        node: a call of an operator.
        shape: gives the sizes of a node or fake tensor.
    """
    name = base_name(node)
    if name in _RULES:
        return _RULES[name](node, shape)
    if any(name in group for group in _WITHOUT_ARITHMETIC):
        return 0
    if name in PER_INPUT_ELEMENT:
        return PER_INPUT_ELEMENT[name] * product(shape(node.all_input_nodes[0]))
    if name in PER_OUTPUT_ELEMENT:
        return PER_OUTPUT_ELEMENT[name] * product(shape(node))
    tags = operator_of(node).tags
    if torch.Tag.reduction in tags:
        return product(shape(node.all_input_nodes[0]))
    if torch.Tag.pointwise in tags or name.startswith("__"):
        return product(shape(node))
    return None


def _linear(node: Node, shape: Shape) -> Size:
    return 2 * product(shape(node)) * shape(argument(node, "weight"))[-1]


def _product_of(first: str) -> Rule:
    """A matrix product whose left operand is the argument ``first``."""

    def rule(node: Node, shape: Shape) -> Size:
        return 2 * product(shape(node)) * shape(argument(node, first))[-1]

    return rule


def _batch_sum(node: Node, shape: Shape) -> Size:
    batch, rows, inner = shape(argument(node, "batch1"))
    return 2 * batch * rows * inner * shape(argument(node, "batch2"))[2]


def _grouped(node: Node, shape: Shape) -> Size:
    """Rows of one matrix multiplied by one of several, or batches: every row once."""
    return 2 * product(shape(node)) * shape(node.all_input_nodes[0])[-1]


def _convolution(node: Node, shape: Shape) -> Size:
    weight = shape(argument(node, "weight"))
    return 2 * product(shape(node)) * product(weight[1:])


def _transposed_convolution(node: Node, shape: Shape) -> Size:
    weight = shape(argument(node, "weight"))
    return 2 * product(shape(argument(node, "input"))) * product(weight[1:])


def _any_convolution(node: Node, shape: Shape) -> Size:
    rule = _transposed_convolution if argument(node, "transposed") else _convolution
    return rule(node, shape)


def _attention(node: Node, shape: Shape) -> Size:
    *_, total, value_dim = shape(argument(node, "value"))
    query = shape(argument(node, "query"))
    return 2 * product(query[:-1]) * total * (query[-1] + value_dim)


def _pooling(node: Node, shape: Shape) -> Size:
    kernel = cast("list[int]", argument(node, "kernel_size"))
    dimensions = int(base_name(node).split("pool")[1][0])
    window = math.prod(kernel) if len(kernel) > 1 else kernel[0] ** dimensions
    return window * product(shape(node))


def _accumulate(node: Node, shape: Shape) -> Size:
    """One addition per added element."""
    name = "src" if base_name(node).startswith("scatter") else "source"
    source = argument(node, name)
    return product(shape(source)) if isinstance(source, Node) else 0


def _index_put(node: Node, shape: Shape) -> Size:
    values = argument(node, "values")
    return product(shape(values)) if argument(node, "accumulate") else 0


def _einsum(node: Node, shape: Shape) -> Size:
    """Pairwise from left to right, as torch contracts without an optimiser."""
    equation = str(argument(node, "equation")).replace(" ", "")
    operands = cast("list[Node]", argument(node, "tensors"))
    inputs, _, output = equation.partition("->")
    terms = _name_ellipsis(inputs.split(","), [len(shape(operand)) for operand in operands])
    sizes = {
        letter: size
        for term, operand in zip(terms, operands, strict=True)
        for letter, size in zip(term, shape(operand), strict=True)
    }
    kept = _name_output(output, inputs, terms)
    total: Size = 0
    left = terms[0]
    for place, right in enumerate(terms[1:], start=1):
        later = set(kept).union(*terms[place + 1 :])
        letters = dict.fromkeys(left + right)
        summed = [letter for letter in letters if letter not in later]
        total += (2 if summed else 1) * product([sizes[letter] for letter in letters])
        left = "".join(letter for letter in letters if letter in later)
    return total if len(terms) > 1 else product([sizes[letter] for letter in dict.fromkeys(left)])


def _name_ellipsis(terms: Sequence[str], ranks: Sequence[int]) -> list[str]:
    """Replace ``...`` by capital-free private letters, aligned at the last one."""
    letters = [chr(0x3B1 + place) for place in range(24)]
    named: list[str] = []
    for term, rank in zip(terms, ranks, strict=True):
        hidden = rank - len(term.replace("...", ""))
        named.append(term.replace("...", "".join(letters[-hidden:] if hidden else [])))
    return named


def _name_output(output: str, inputs: str, terms: Sequence[str]) -> str:
    hidden = max((term for term in terms), key=len) if "..." in inputs else ""
    hidden = "".join(letter for letter in hidden if ord(letter) > 0x3B0)
    if output:
        return output.replace("...", hidden)
    letters = "".join(terms)
    return "".join(letter for letter in letters if letters.count(letter) == 1)


_RULES: dict[str, Rule] = {
    "linear": _linear,
    "mm": _product_of("self"),
    "matmul": _product_of("self"),
    "bmm": _product_of("self"),
    "mv": lambda node, shape: 2 * product(shape(argument(node, "self"))),
    "dot": lambda node, shape: 2 * product(shape(argument(node, "self"))),
    "addmm": _product_of("mat1"),
    "baddbmm": _product_of("batch1"),
    "addbmm": _batch_sum,
    "addmv": lambda node, shape: 2 * product(shape(argument(node, "mat"))),
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
    "_scaled_mm": _product_of("self"),
    "_weight_int8pack_mm": _product_of("self"),
    "einsum": _einsum,
    "bilinear": lambda node, shape: (
        2 * product(shape(node)) * product(shape(argument(node, "weight"))[1:])
    ),
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "_convolution_mode": _convolution,
    "conv_transpose1d": _transposed_convolution,
    "conv_transpose2d": _transposed_convolution,
    "conv_transpose3d": _transposed_convolution,
    "convolution": _any_convolution,
    "_convolution": _any_convolution,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(
        (
            "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
            "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
        ),
        _pooling,
    ),
    **dict.fromkeys(
        ("index_add", "scatter_add", "scatter_reduce", "index_reduce"), _accumulate
    ),
    "index_put": _index_put,
    "_index_put_impl": _index_put,
    "_unsafe_index_put": _index_put,
    "cdist": lambda node, shape: 3 * product(shape(node)) * shape(argument(node, "x1"))[-1],
}  # fmt: skip


def is_product(node: Node) -> bool:
    """Whether an ``aten`` node multiplies matrices or convolves."""
    return base_name(node) in _PRODUCTS


_PRODUCTS = frozenset(_RULES) - {
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d",
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "index_add", "scatter_add", "scatter_reduce", "index_reduce", "index_put",
    "_index_put_impl", "_unsafe_index_put", "cdist",
}  # fmt: skip


def is_view(node: Node, sizes_of: Shape) -> bool:
    """Whether a node only gives another shape or name to memory that is there."""
    name = base_name(node)
    if name == "dropout":
        return not argument(node, "train")
    if name == "wait_tensor":
        return True
    if name in MAYBE_VIEWS:
        return not _copies(node, name, sizes_of)
    return aliases_input(node)


def _copies(node: Node, name: str, sizes_of: Shape) -> bool:
    source = node.all_input_nodes[0]
    before, after = source.meta["val"], node.meta["val"]
    if name in ("to", "type_as", "_to_copy"):
        return before.dtype != after.dtype or before.device != after.device or name == "_to_copy"
    # A view of memory that is not in order is not in order either, so this is exact.
    return not is_contiguous(before, sizes_of) and is_contiguous(after, sizes_of)


def is_contiguous(value: torch.Tensor, sizes_of: Shape) -> bool:
    """Whether a tensor lies in memory row by row; decided without adding guards."""
    expected: Size = 1
    strides = sizes_of(value.stride())
    for size, stride in zip(reversed(sizes_of(value)), reversed(strides), strict=True):
        if size == 1:
            continue
        if sympy.sympify(stride - expected) != 0:
            return False
        expected = expected * size
    return True
