"""Stochastic rounding: to one of the two nearest values, each with the probability that makes it right on average."""

import torch
from torch import Tensor


def round_stochastic(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Rounds to one of the two values of `dtype` around each entry; the nearer one is the likelier one.

    The expected result is the entry itself, so that updates smaller than half a step are not lost on average.

    Args:
        tensor: float32, any shape.
        dtype: a floating dtype. What it holds exactly comes out as it is.
        generator: of the random numbers, on the tensor's device.
    """
    nearest = tensor.to(dtype)
    error = tensor - nearest.to(tensor.dtype)
    other = torch.nextafter(nearest, torch.copysign(torch.full_like(error, torch.inf), error).to(dtype))
    step = other.to(tensor.dtype) - nearest.to(tensor.dtype)
    draw = torch.rand(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
    return torch.where(draw * step.abs() < error.abs(), other, nearest)
