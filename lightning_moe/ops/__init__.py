"""Arithmetic on tensors: the operation and what it is made of. Needs torch alone, and Triton where there is a GPU."""

from lightning_moe.ops.experts import moe_experts
from lightning_moe.ops.low_rank import LowRank

__all__ = ["LowRank", "moe_experts"]
