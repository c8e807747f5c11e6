"""Low-rank updates of the experts' weights: W + scaling · B A per expert, of which the product is never formed."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of one projection of every expert, to W + scaling · B A.

    Attributes:
        a: A, (E, r, in), any floating dtype and strides.
        b: B, (E, out, r), any floating dtype and strides.
        scaling: of the product; LoRA's alpha / r, say. Times B it must be in the range of the weights' dtype, which for
            float16 ends at 65,504.

    Raises:
        TypeError: if the scaling is a tensor: it would get no gradient.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.scaling, Tensor):
            raise TypeError("LowRank: scaling must be a number; a tensor would get no gradient: multiply it into b")

    @property
    def rank(self) -> int:
        """The factors' inner size, r."""
        return self.a.shape[1]


class Factors(NamedTuple):
    """The updates of one projection, joined along the rank: a (E, R, in) and b (E, out, R), the scalings in b."""

    a: Tensor
    b: Tensor


def padded_rank(ranks: Iterable[int], dtype: torch.dtype) -> int:
    """R, the rank of updates joined in this dtype: rows of whole multiples of 16 bytes."""
    used = sum(ranks)
    return used + -used % (16 // dtype.itemsize)


def join(updates: Sequence[LowRank], dtype: torch.dtype) -> Factors:
    """Joins updates along the rank, in `dtype`, padded with zeros to rows of whole multiples of 16 bytes."""
    ranks = [update.rank for update in updates]
    missing = padded_rank(ranks, dtype) - sum(ranks)
    (experts, _, width_in), width_out = updates[0].a.shape, updates[0].b.shape[1]
    a = [update.a.to(dtype) for update in updates]
    b = [_scaled(update, dtype) for update in updates]
    if missing:
        a.append(a[0].new_zeros(experts, missing, width_in))
        b.append(b[0].new_zeros(experts, width_out, missing))
    return Factors(_joined(a, 1), _joined(b, 2))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)


def _scaled(update: LowRank, dtype: torch.dtype) -> Tensor:
    """B times its scaling, multiplied where neither dtype rounds or overflows, and rounded to `dtype` once."""
    return (update.b.to(torch.promote_types(update.b.dtype, dtype)) * update.scaling).to(dtype)


def split_gradients(
    grad_a: Tensor | None, grad_b: Tensor | None, updates: Sequence[LowRank]
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The gradients of each update's factors from those of the joined ones."""
    start = 0
    for update in updates:
        part = slice(start, start + update.rank)
        yield (
            None if grad_a is None else grad_a[:, part].to(update.a.dtype),
            None if grad_b is None else (grad_b[..., part] * update.scaling).to(update.b.dtype),
        )
        start += update.rank


def merge(weight: Tensor, updates: Sequence[LowRank], *, is_transposed: bool) -> Tensor:
    """W + Σ scaling · B A in W's dtype, differentiable: what PEFT's path computes with. (E, out, in), or transposed."""
    with torch.autocast(weight.device.type, enabled=False):
        for update in updates:
            a, b = update.a.to(weight.dtype), update.b.to(weight.dtype)
            left, right = (a.mT, b.mT) if is_transposed else (b, a)
            weight = torch.baddbmm(weight, left, right, alpha=update.scaling)
    return weight
