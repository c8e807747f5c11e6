"""The building blocks of the operation: grouped products, activation backward, combine.

Plain PyTorch throughout. Faster kernels belong beside these functions, which stay as their reference; nothing outside
this file knows which one ran. None of them records anything on the autograd tape.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def silu_gated(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of concatenated halves: (R, 2 I) to (R, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor, *, in_first: bool) -> Tensor:
    """Each row times its expert's weight: (R, in) to (R, out).

    Args:
        rows: (R, in), sorted by expert.
        weight: (E, in, out) if `in_first`, else (E, out, in).
        offsets: (E,) int32, the end of each expert's rows.
        in_first: which of the weight's two layouts this is.
    """
    return F.grouped_mm(rows, weight if in_first else weight.transpose(-2, -1), offs=offsets)


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Sum over each expert's rows of `left ⊗ right`: (R, P), (R, Q) to (E, P, Q); zeros for an expert with no row."""
    return F.grouped_mm(left.t(), right, offs=offsets)


def grouped_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each expert's rows, in a fixed order: (R, N) to (E, N)."""
    ones = rows.new_ones(rows.shape[0], 16 // rows.element_size())  # the narrowest operand that grouped_mm takes
    return grouped_outer(rows, ones, offsets)[..., 0]


def activation_backward(
    activation: Activation, pre_activation: Tensor, grad_unscaled: Tensor, gates: Tensor, *, needs_scaled: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Recomputes the activation a = act(h) and returns dh, the gates' inner product and, on request, g·a.

    Args:
        activation: (R, N) to (R, I), row by row.
        pre_activation: h, (R, N).
        grad_unscaled: da' = G W2, (R, I): the gradient of a without the gate.
        gates: g, (R,).
        needs_scaled: whether the gradient of the down projection needs g·a.

    Returns:
        dh = act'(h) · g · da' (R, N); <a, da'> (R,) float32; g·a (R, I) or None.
    """
    with torch.enable_grad():
        pre_activation = pre_activation.detach().requires_grad_()
        activated = activation(pre_activation)
    scale = gates.to(torch.float32).unsqueeze(-1)
    grad_activated = (scale * grad_unscaled).to(activated.dtype)
    (grad_pre_activation,) = torch.autograd.grad(activated, pre_activation, grad_activated)
    activated = activated.detach()
    inner = (activated.to(torch.float32) * grad_unscaled).sum(-1)
    scaled = (scale * activated).to(grad_unscaled.dtype) if needs_scaled else None
    return grad_pre_activation, inner, scaled


def combine_rows(total: Tensor, rows: Tensor, inverse: Tensor, start: int, gates: Tensor | None = None) -> None:
    """Adds a chunk's rows to their tokens, slot by slot in a fixed order, without atomics.

    Args:
        total: (T, H) float32, added to in place.
        rows: (R, H), the chunk's rows.
        inverse: (T, K), the sorted row of each (token, slot) pair.
        start: the chunk's first sorted row.
        gates: (T, K), multiplied in; None for a plain sum.
    """
    num_rows = rows.shape[0]
    if num_rows == 0:
        return
    for slot, position in enumerate((inverse - start).unbind(1)):
        picked = rows[position.clamp(0, num_rows - 1)].to(torch.float32)
        if gates is not None:
            picked *= gates[:, slot, None]
        if num_rows != inverse.numel():
            picked.masked_fill_(((position < 0) | (position >= num_rows)).unsqueeze(-1), 0.0)
        total += picked
