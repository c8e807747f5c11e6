"""Routing: the (token, slot) pairs of a mixture of experts, sorted by expert.

A *row* is one (token, slot) pair. Sorting the S = T x K rows by expert turns the experts' products into one
grouped matrix product; `Routing` says where each row came from and where it went. No host synchronisation.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert.

    Attributes:
        permutation: (S,) int64, the flat pair index `token * top_k + slot` of each sorted row.
        inverse: (S,) int64, the sorted row of each flat pair index.
        offsets: (E,) int32, the end of each expert's rows.
        top_k: number of slots per token.
    """

    permutation: Tensor
    inverse: Tensor
    offsets: Tensor
    top_k: int

    @property
    def num_rows(self) -> int:
        """S, the number of (token, slot) pairs."""
        return self.permutation.shape[0]

    def chunks(self, chunk_rows: int) -> Iterator["RowChunk"]:
        """Contiguous ranges of at most `chunk_rows` sorted rows; one empty chunk when there are no rows.

        Because rows are sorted first and cut afterwards, a chunk holds few experts with all their rows: cutting
        does not make the grouped products inefficient, as cutting the tokens would.
        """
        for start in range(0, max(self.num_rows, 1), max(chunk_rows, 1)):
            pairs = self.permutation[start : start + chunk_rows]
            offsets = (self.offsets - start).clamp(0, pairs.shape[0]).to(torch.int32)
            yield RowChunk(start, pairs, pairs // self.top_k, offsets)


@dataclass(frozen=True)
class RowChunk:
    """A contiguous range of R sorted rows.

    Attributes:
        start: the first sorted row.
        pairs: (R,) int64, the flat pair index of each row.
        tokens: (R,) int64, the token of each row.
        offsets: (E,) int32, the end of each expert's rows within the chunk.
    """

    start: int
    pairs: Tensor
    tokens: Tensor
    offsets: Tensor

    def expert_of_row(self) -> Tensor:
        """The expert of each row, (R,) int64."""
        rows = torch.arange(self.pairs.shape[0], dtype=self.offsets.dtype, device=self.offsets.device)
        return torch.searchsorted(self.offsets, rows, right=True)


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> Routing:
    """Sorts the (token, slot) pairs by expert, keeping the order of tokens within an expert.

    Args:
        top_k_index: (T, K) integer, the experts of each token, each in [0, num_experts).
        num_experts: E.
    """
    experts, permutation = torch.sort(top_k_index.reshape(-1), stable=True)
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(permutation.shape[0], device=permutation.device)
    every_expert = torch.arange(num_experts, dtype=experts.dtype, device=experts.device)
    offsets = torch.searchsorted(experts, every_expert, right=True, out_int32=True)
    return Routing(permutation, inverse, offsets, top_k_index.shape[1])
