"""LoRA on a frozen linear layer in fewer passes over memory: the products add the update to what is there.

    y = x Wᵀ + s (x Aᵀ) Bᵀ        dx = dy W + s (dy B) A        dA = s (dy B)ᵀ x        dB = s dyᵀ (x Aᵀ)

PEFT writes (x Aᵀ) Bᵀ, its product with s, and the sum, each as wide as y: of Qwen3-30B-A3B's attention at 16,384 tokens
three times 128 MiB for q_proj alone. Here y is rounded once less, too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from lora.kept_results import is_output_needed


def fuse_updates(model: nn.Module) -> None:
    """Has PEFT's adapted linear layers add their updates this way, where they are plain LoRA's, without dropout.

    Where its adapters are disabled or merged, a layer runs PEFT's own forward.
    """
    layer: Any
    for layer in model.modules():
        if type(layer) is not Linear or any(layer.lora_bias.values()) or layer.lora_variant:
            continue
        drops = not all(isinstance(dropout, nn.Identity) for dropout in layer.lora_dropout.values())
        if type(layer.base_layer) is nn.Linear and not drops:
            layer.forward = partial(_adapted, layer, layer.forward)  # type: ignore[method-assign]


def _adapted(layer: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return forward(x)
    (name,) = layer.active_adapters
    base, device = layer.base_layer, x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _LoRALinear.apply(x, base.weight, a, b, base.bias, layer.scaling[name], dtype, is_output_needed(layer))  # type: ignore[return-value]


class _LoRALinear(torch.autograd.Function):
    """Casts its tensors itself, which costs the host half of what autograd's own casts do.

    Where the output is not needed, it is a placeholder of its shape, without values.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
        needs_output: bool,
    ) -> Tensor:
        weight, a, b = weight.to(dtype), a.to(dtype), b.to(dtype)
        rows = x.to(dtype).flatten(0, -2)
        in_rank = rows @ a.t()
        ctx.scaling = scaling
        ctx.save_for_backward(rows if ctx.needs_input_grad[2] else None, weight, a, b, in_rank)
        if not needs_output:
            return rows.new_empty(1).expand(*x.shape[:-1], len(weight))
        y = nn.functional.linear(rows, weight, bias if bias is None else bias.to(dtype))
        y.addmm_(in_rank, b.t(), alpha=scaling)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, in_rank = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        needs_x, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        grad_in_rank = (rows @ b).mul_(ctx.scaling)
        grad_x = grad_a = grad_b = None
        if needs_a:
            grad_a = grad_in_rank.t() @ x
        if needs_b:
            grad_b = (rows.t() @ in_rank).mul_(ctx.scaling)
        if needs_x:
            grad_x = (rows @ weight).addmm_(grad_in_rank, a).view(*grad.shape[:-1], -1)
        return grad_x, None, grad_a, grad_b, None, None, None, None  # autograd casts them to their tensors' dtypes
