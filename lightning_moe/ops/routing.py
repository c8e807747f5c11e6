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
        is_expert_parallel: whether rows of other ranks' experts may stand at the end, past the last offset.
    """

    permutation: Tensor
    inverse: Tensor
    tokens: Tensor
    offsets: Tensor
    top_k: int
    is_expert_parallel: bool = False

    @property
    def num_rows(self) -> int:
        """S, the number of (token, slot) pairs."""
        return self.permutation.shape[0]

    def expert_of_row(self) -> Tensor:
        """The expert of each sorted row, (S,) int64; the last one for rows of other ranks' experts."""
        expert = torch.searchsorted(self.offsets, self._rows(), right=True)
        return expert.clamp_(max=self.offsets.shape[0] - 1) if self.is_expert_parallel else expert

    def absent(self) -> Tensor | None:
        """Which sorted rows are other ranks' experts', (S,) bool; None where there can be none."""
        return self._rows() >= self.offsets[-1] if self.is_expert_parallel else None

    def _rows(self) -> Tensor:
        return torch.arange(self.num_rows, dtype=self.offsets.dtype, device=self.offsets.device)


def sort_by_expert(top_k_index: Tensor, num_experts: int, *, is_expert_parallel: bool = False) -> Routing:
    """Sorts the (token, slot) pairs by expert, keeping the order of tokens within an expert.

    Args:
        top_k_index: (T, K) integer, the experts of each token, each in [0, num_experts).
        num_experts: E.
        is_expert_parallel: allows ids of `num_experts` and above; they come last.
    """
    keys = top_k_index.reshape(-1)
    if is_expert_parallel:
        keys = keys.clamp(max=num_experts)
    # Narrow keys make a radix sort short.
    keys = keys.to(torch.uint8 if num_experts + is_expert_parallel <= 256 else torch.int32)
    experts, permutation = torch.sort(keys, stable=True)
    rows = torch.arange(permutation.shape[0], device=permutation.device)
    inverse = torch.empty_like(permutation).scatter_(0, permutation, rows)
    every_expert = torch.arange(num_experts, dtype=experts.dtype, device=experts.device)
    offsets = torch.searchsorted(experts, every_expert, right=True, out_int32=True)
    top_k = top_k_index.shape[1]
    return Routing(permutation, inverse, permutation // top_k, offsets, top_k, is_expert_parallel)
