"""Routing: the (token, slot) pairs of a mixture of experts, sorted by expert.

A *row* is one (token, slot) pair. Sorting the S = T x K rows by expert turns the experts' products into one
grouped matrix product; `Routing` says where each row came from and where it went. No host synchronisation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Rows sorted by expert.

    Attributes:
        permutation: (S,) int64, the flat pair index `token * top_k + slot` of each sorted row.
        inverse: (S,) int64, the sorted row of each flat pair index.
        tokens: (S,) int64, the token of each sorted row.
        offsets: (E,) int32, the end of each expert's rows.
        top_k: number of slots per token.
    """

    permutation: Tensor
    inverse: Tensor
    tokens: Tensor
    offsets: Tensor
    top_k: int

    @property
    def num_rows(self) -> int:
        """S, the number of (token, slot) pairs."""
        return self.permutation.shape[0]

    def expert_of_row(self) -> Tensor:
        """The expert of each sorted row, (S,) int64."""
        rows = torch.arange(self.num_rows, dtype=self.offsets.dtype, device=self.offsets.device)
        return torch.searchsorted(self.offsets, rows, right=True)


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> Routing:
    """Sorts the (token, slot) pairs by expert, keeping the order of tokens within an expert.

    Args:
        top_k_index: (T, K) integer, the experts of each token, each in [0, num_experts).
        num_experts: E.
    """
    # Narrow keys make a radix sort short.
    keys = top_k_index.reshape(-1).to(torch.uint8 if num_experts <= 256 else torch.int32)
    experts, permutation = torch.sort(keys, stable=True)
    rows = torch.arange(permutation.shape[0], device=permutation.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, rows)
    every_expert = torch.arange(num_experts, dtype=experts.dtype, device=experts.device)
    offsets = torch.searchsorted(experts, every_expert, right=True, out_int32=True)
    return Routing(permutation, inverse, permutation // top_k_index.shape[1], offsets, top_k_index.shape[1])
