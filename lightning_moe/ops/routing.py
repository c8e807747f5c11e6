"""Routing: the (token, slot) pairs of a mixture of experts, sorted by expert.

A *row* is one (token, slot) pair. Sorting the S = T x K rows by expert turns the experts' products into one
grouped matrix product; `Routing` says where each row came from and where it went. No host synchronisation.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_moe.ops.grouped import NO_KERNEL, has_grouped_linear, launch


@dataclass
class Routing:
    """Rows sorted by expert.

    Attributes:
        permutation: (S,) int64, the flat pair index `token * top_k + slot` of each sorted row.
        inverse: (S,) int64, the sorted row of each flat pair index.
        offsets: (E,) int32, the end of each expert's rows.
        tiles: where the tiles of the grouped products' kernel lie; None where none runs.
        top_k: number of slots per token.
        is_expert_parallel: whether rows of other ranks' experts may stand at the end, past the last offset.
        chosen: (T, K) ids of the experts in few bytes, `E` for every other rank's; None where they are not kept.
    """

    permutation: Tensor
    inverse: Tensor
    offsets: Tensor
    tiles: Tensor | None
    top_k: int
    is_expert_parallel: bool = False
    chosen: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """S, the number of (token, slot) pairs."""
        return self.permutation.shape[0]

    @cached_property
    def tokens(self) -> Tensor:
        """The token of each sorted row, (S,) int64."""
        return self.permutation // self.top_k

    def expert_of_row(self) -> Tensor:
        """The expert of each sorted row, (S,) int64; the last one for rows of other ranks' experts."""
        expert = torch.searchsorted(self.offsets, self._rows(), right=True)
        return expert.clamp_(max=self.offsets.shape[0] - 1) if self.is_expert_parallel else expert

    def absent(self) -> Tensor | None:
        """Which sorted rows are other ranks' experts', (S,) bool; None where there can be none."""
        return self._rows() >= self.offsets[-1] if self.is_expert_parallel else None

    def _rows(self) -> Tensor:
        return torch.arange(self.num_rows, dtype=self.offsets.dtype, device=self.offsets.device)


def sort_by_expert(
    top_k_index: Tensor,
    num_experts: int,
    *,
    is_expert_parallel: bool = False,
    dtype: torch.dtype | None = None,
    keeps_choice: bool = False,
) -> Routing:
    """Sorts the (token, slot) pairs by expert, keeping the order of pairs within an expert.

    Args:
        top_k_index: (T, K) integer, the experts of each token, each in [0, num_experts).
        num_experts: E.
        is_expert_parallel: ids of `num_experts` and above may be among them; they come last.
        dtype: of the rows that are to be multiplied, for which tiles are made; None for no tiles.
        keeps_choice: whether the ids are kept in few bytes.
    """
    ids = top_k_index.contiguous()
    compact_dtype = torch.uint8 if num_experts + is_expert_parallel <= 256 else torch.int32
    options = {
        "is_expert_parallel": is_expert_parallel,
        "needs_tiles": dtype is not None and has_grouped_linear(dtype, ids.device),
        "compact_dtype": compact_dtype if keeps_choice else None,
    }
    routed = launch("route", ids, ids, num_experts, **options)
    if routed is NO_KERNEL:
        chosen = (ids.clamp(max=num_experts) if is_expert_parallel else ids).to(compact_dtype)
        experts, permutation = torch.sort(chosen.flatten(), stable=True)
        rows = torch.arange(permutation.shape[0], device=permutation.device)
        inverse = torch.empty_like(permutation).scatter_(0, permutation, rows)
        every_expert = torch.arange(num_experts, dtype=experts.dtype, device=experts.device)
        offsets = torch.searchsorted(experts, every_expert, right=True, out_int32=True)
        routed = permutation, inverse, offsets, None, chosen if keeps_choice else None
    permutation, inverse, offsets, tiles, chosen = routed
    return Routing(permutation, inverse, offsets, tiles, top_k_index.shape[1], is_expert_parallel, chosen)
