"""What becomes of a weight: values put in its place, and low-rank factors that are added, block by block."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_moe.ops.low_rank import LowRank


class Piece(NamedTuple):
    """A low-rank update of some matrices of a weight, from some row on.

    Attributes:
        matrix: the first one.
        row: the first one.
        factors: a (E, r, columns) and b (E, rows, r) of E matrices.
    """

    matrix: int
    row: int
    factors: LowRank


@dataclass
class Update:
    """What becomes of a weight that is seen as matrices (E, rows, columns); see `as_matrices`.

    Attributes:
        whole: what is put in its place, (E, rows, columns); None where the weight stays.
        pieces: what is added then.
    """

    whole: Tensor | None = None
    pieces: list[Piece] = field(default_factory=list)

    def apply(self, weight: Tensor, matrix: int, row: int) -> Tensor:
        """The new values of some rows of one matrix: W + scaling · (B A), in float32.

        Args:
            weight: these rows of the base, (rows, columns), float32.
            matrix: which.
            row: the first of them.
        """
        stop = row + len(weight)
        new = (weight if self.whole is None else self.whole[matrix, row:stop].float()).clone()
        for piece in self.pieces:
            a, b = piece.factors.a, piece.factors.b
            first, last = max(row, piece.row), min(stop, piece.row + b.shape[1])
            own = matrix - piece.matrix
            if 0 <= own < len(b) and first < last:
                product = b[own, first - piece.row : last - piece.row].float() @ a[own].float()
                new[first - row : last - row] += product * piece.factors.scaling
        return new

    def restrict(self, matrices: range, rows: range) -> "Update":
        """The update of a part of the weight; views of the same tensors."""
        part = Update()
        if self.whole is not None:
            part.whole = self.whole[matrices.start : matrices.stop, rows.start : rows.stop]
        for piece in self.pieces:
            a, b, scaling = piece.factors.a, piece.factors.b, piece.factors.scaling
            matrix, row = max(matrices.start, piece.matrix), max(rows.start, piece.row)
            own = slice(matrix - piece.matrix, max(min(matrices.stop - piece.matrix, len(b)), 0))
            b = b[own, row - piece.row : max(rows.stop - piece.row, 0)]
            if b.numel():
                part.pieces.append(Piece(matrix - matrices.start, row - rows.start, LowRank(a[own], b, scaling)))
        return part

    def transpose(self, rows: int) -> "Update":
        """The update of the weight's transposed matrices.

        Args:
            rows: of the weight, all of which each piece has.

        Raises:
            ValueError: if a piece has only some of them.
        """
        if any(piece.factors.b.shape[1] != rows for piece in self.pieces):
            raise ValueError("an update of some rows cannot be transposed")
        pieces = [piece._replace(factors=transpose(piece.factors)) for piece in self.pieces]
        return Update(None if self.whole is None else self.whole.mT, pieces)


def transpose(factors: LowRank) -> LowRank:
    """The factors of (B A)ᵀ."""
    return LowRank(factors.b.mT, factors.a.mT, factors.scaling)


def as_matrices(shape: Iterable[int]) -> tuple[int, int, int]:
    """The shape of a weight that is seen as matrices: experts, or one; rows; columns."""
    shape = tuple(shape)
    if len(shape) == 3:
        return shape
    rows = shape[0] if len(shape) > 1 else 1
    return 1, rows, torch.Size(shape).numel() // max(rows, 1)
