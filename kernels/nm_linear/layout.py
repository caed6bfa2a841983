"""How an N:M sparse weight lies in memory: sizes and bit widths, without tensors.

Groups of M columns of one row hold N values each. G groups of a row are cut into G / V chunks of V
groups, V the largest power of 2 up to 8 that divides G. The packed weight is two tensors:

* values [G / V, N, rows, V]: the kept weights. The n-th kept weights of a chunk's V groups lie side
  by side (16 bytes where V = 8 and a value has 2), then come the same of the next row: a warp whose
  lanes are neighbouring rows reads one contiguous stretch.
* indices [G / V, W, rows]: a code for each group, V codes in W integers: which columns are kept.

A code is a bit mask of its group (bit j is column j) or, where that is shorter, N positions, the
first in the lowest bits. Positions take a power of 2 bits, so that no code crosses an integer. N:M
in bits per original weight: 2:4, 4:8, 8:16 1 (2 per kept value), 1:4 and 1:8 0.5, 1:16 0.25.
Rows can be cut or joined along ``rows``, columns along the first axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fxgraft.errors import InputError

WIDEST = 32
_LANE = 8
_WORD = 32
_INTEGERS = {8: torch.uint8, 16: torch.int16, 32: torch.int32}


def _power_of_2(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True)
class Layout:
    """The packed form of weights with N kept of every M columns and a number of groups in a row.

    Attributes:
        n: kept weights of a group.
        m: columns of a group.
        groups: groups of a row, G.
    """

    n: int
    m: int
    groups: int

    @property
    def columns(self) -> int:
        """Columns of the dense weight, K = G · M."""
        return self.groups * self.m

    @property
    def lane(self) -> int:
        """Groups of a chunk, V."""
        return math.gcd(self.groups, _LANE)

    @property
    def chunks(self) -> int:
        """Chunks of a row, G / V."""
        return self.groups // self.lane

    @property
    def position_bits(self) -> int:
        """Bits of one position, a power of 2."""
        return _power_of_2(max(1, (self.m - 1).bit_length()))

    @property
    def is_mask(self) -> bool:
        """Whether a code is a bit mask, and not positions."""
        return _power_of_2(self.n * self.position_bits) >= _power_of_2(self.m)

    @property
    def code_bits(self) -> int:
        """Bits of one code, a power of 2 up to 32."""
        return _power_of_2(self.m if self.is_mask else self.n * self.position_bits)

    @property
    def codes_per_word(self) -> int:
        """Codes in one integer of ``indices``."""
        return min(self.lane, _WORD // self.code_bits)

    @property
    def words(self) -> int:
        """Integers that hold the codes of a chunk, W."""
        return self.lane // self.codes_per_word

    @property
    def word_dtype(self) -> torch.dtype:
        """The dtype of ``indices``."""
        return _INTEGERS[max(8, self.codes_per_word * self.code_bits)]

    def values_shape(self, rows: int) -> tuple[int, int, int, int]:
        """Shape of ``values`` for a weight of so many rows."""
        return self.chunks, self.n, rows, self.lane

    def indices_shape(self, rows: int) -> tuple[int, int, int]:
        """Shape of ``indices`` for a weight of so many rows."""
        return self.chunks, self.words, rows


def check_pattern(n: int, m: int) -> None:
    """Check N and M.

    Raises:
        InputError: not 1 <= N <= M <= 32.
    """
    if not 1 <= n <= m <= WIDEST:
        raise InputError(
            f"the N:M pattern is {n}:{m}",
            f"keep n of every m inputs, with 1 <= n <= m <= {WIDEST}",
        )


def layout_of_columns(columns: int, n: int, m: int) -> Layout:
    """The layout of a weight with so many columns.

    Raises:
        InputError: the pattern is impossible, or M does not divide the columns.
    """
    check_pattern(n, m)
    if columns % m or columns == 0:
        fitting = [width for width in (2, 4, 8, 16, 32) if columns and columns % width == 0]
        raise InputError(
            f"a weight of {columns} columns has no whole groups of m = {m}",
            f"use an m that divides it: {', '.join(map(str, fitting)) or 'none of 2 to 32 does'}",
        )
    return Layout(n, m, columns // m)


def layout_of(values: torch.Tensor, indices: torch.Tensor, n: int, m: int) -> Layout:
    """The layout of a packed weight, whose shapes and dtype of indices are checked.

    Args:
        values: [G / V, N, rows, V].
        indices: [G / V, W, rows].
        n: kept weights of a group.
        m: columns of a group.

    Raises:
        InputError: they do not belong together.
    """
    check_pattern(n, m)
    remedy = "pass what fxgraft.kernels.nm_linear.packing.pack returns for this n and m"
    if values.dim() != 4 or values.shape[1] != n:
        raise InputError(
            f"nm_linear's values are {list(values.shape)} for the pattern {n}:{m}", remedy
        )
    layout = Layout(n, m, int(values.shape[0]) * int(values.shape[3]))
    rows = values.shape[2]
    if layout.groups == 0 or tuple(values.shape) != layout.values_shape(rows):
        raise InputError(
            f"nm_linear's values are {list(values.shape)} for the pattern {n}:{m}", remedy
        )
    if tuple(indices.shape) != layout.indices_shape(rows) or indices.dtype != layout.word_dtype:
        raise InputError(
            f"nm_linear's indices are {indices.dtype} {list(indices.shape)} for values "
            f"{list(values.shape)} and the pattern {n}:{m}; "
            f"{layout.word_dtype} {list(layout.indices_shape(rows))} belong to them",
            remedy,
        )
    return layout
