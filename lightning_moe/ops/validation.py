"""What the operation takes: options, shapes and dtypes. Messages name what is wrong and the remedy."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_moe.ops.low_rank import LowRank
from lightning_moe.ops.quantized import QuantizedWeight

_Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]  # dtype, shape and strides


def check_output_buffer(output_buffer_mib: float) -> None:
    """Raises ValueError unless `output_buffer_mib` is a positive number."""
    if type(output_buffer_mib) not in (int, float) or not 0 < output_buffer_mib < float("inf"):
        raise ValueError(f"output_buffer_mib must be a positive number, not {output_buffer_mib!r}")


def shape_problem(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    gate_up_updates: Sequence[LowRank],
    down_updates: Sequence[LowRank],
    *,
    is_transposed: bool,
    is_expert_parallel: bool,
) -> str | None:
    """Says in words which shapes do not fit each other, or None."""
    if hidden_states.dim() != 2:
        return f"hidden_states must be (tokens, hidden), got {tuple(hidden_states.shape)}; flatten the batch first"
    if top_k_index.shape != top_k_weights.shape or top_k_index.dim() != 2:
        return (
            "top_k_index and top_k_weights must both be (tokens, top_k), got "
            f"{tuple(top_k_index.shape)} and {tuple(top_k_weights.shape)}"
        )
    if top_k_index.shape[1] == 0:
        return "top_k_index must name at least one expert for each token, its top_k is 0"
    if top_k_index.shape[0] != hidden_states.shape[0]:
        return f"top_k_index has {top_k_index.shape[0]} tokens, hidden_states {hidden_states.shape[0]}"
    if not (hidden_states.is_floating_point() and top_k_weights.is_floating_point()):
        return f"hidden_states and top_k_weights must be floating, got {hidden_states.dtype}, {top_k_weights.dtype}"
    if top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
        return f"top_k_index must be integer, got {top_k_index.dtype}"
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        if isinstance(weight, QuantizedWeight) and weight.requires_grad:
            return f"{name} is quantized and cannot train: freeze it with requires_grad_(False)"
    if gate_up_proj.dim() != 3 or down_proj.dim() != 3 or gate_up_proj.shape[0] != down_proj.shape[0]:
        return (
            "gate_up_proj and down_proj must be three-dimensional with the experts first, got "
            f"{tuple(gate_up_proj.shape)} and {tuple(down_proj.shape)}"
        )
    num_experts, *up_shape = gate_up_proj.shape
    if num_experts == 0:
        return "gate_up_proj and down_proj hold no expert: leave the layer out where none is local"
    down_shape = list(down_proj.shape[1:])
    hidden_in, width = up_shape if is_transposed else reversed(up_shape)
    hidden_out = down_shape[1] if is_transposed else down_shape[0]
    hidden = hidden_states.shape[1]
    if hidden_in != hidden or hidden_out != hidden:
        return (
            f"hidden_states have {hidden} features, gate_up_proj takes {hidden_in} and down_proj gives {hidden_out} "
            f"(is_transposed={is_transposed})"
        )
    for name, bias, size in (
        ("gate_up_proj_bias", gate_up_proj_bias, width),
        ("down_proj_bias", down_proj_bias, hidden),
    ):
        if bias is not None and tuple(bias.shape) != (num_experts, size):
            return f"{name} must be {(num_experts, size)}, got {tuple(bias.shape)}"
    intermediate = down_shape[0] if is_transposed else down_shape[1]
    for name, updates, width_in, width_out in (
        ("gate_up_updates", gate_up_updates, hidden, width),
        ("down_updates", down_updates, intermediate, hidden),
    ):
        for update in updates:
            a, b = tuple(update.a.shape), tuple(update.b.shape)
            rank = a[1] if len(a) == 3 else 0
            if rank < 1 or a != (num_experts, rank, width_in) or b != (num_experts, width_out, rank):
                return (
                    f"{name} must have a of {(num_experts, 'r', width_in)} and b of {(num_experts, width_out, 'r')} "
                    f"with a rank r of at least 1, got {a} and {b}"
                )
            if not (update.a.is_floating_point() and update.b.is_floating_point()):
                return f"{name} must be floating, got {update.a.dtype} and {update.b.dtype}"
    if not torch.compiler.is_compiling() and top_k_index.device.type == "cpu" and top_k_index.numel():
        low, high = (int(end) for end in top_k_index.aminmax())  # not compared as the narrow ones that they may be
        if low < 0 or (high >= num_experts and not is_expert_parallel):
            return f"top_k_index names experts {low} to {high}, but there are {num_experts}"
    return None


def unsupported_weights(gate_up_proj: Tensor, down_proj: Tensor) -> str | None:
    """Says in words what about the weights the grouped products do not take, or None."""
    up, down = (
        (weight.dtype, tuple(weight.shape), weight.stride() if weight.dim() == 3 else ())
        for weight in (gate_up_proj, down_proj)
    )
    return _unsupported_layout(up, down)


@lru_cache(maxsize=64)  # asked at every call of a layer, and a model has a few
def _unsupported_layout(up: _Layout, down: _Layout) -> str | None:
    dtype = down[0]
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or up[0] != dtype:
        return f"weights must both be float32, bfloat16 or float16, got {up[0]} and {dtype}"
    for name, (_, shape, strides) in (("gate_up_proj", up), ("down_proj", down)):
        if len(shape) != 3:
            return f"{name} must be three-dimensional with the experts first, got {shape}"
        # The activations' rows are as long as the weights' sides; a stride of one is the contiguous side's.
        steps = [*shape[1:], *(stride for stride in strides if stride != 1)]
        if any(step * dtype.itemsize % 16 for step in steps):
            return (
                f"grouped_mm needs rows of whole multiples of 16 bytes; {name} is {shape} of {dtype} with strides "
                f"{strides}"
            )
    return None
