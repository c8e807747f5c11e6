"""Causal attention of one document, whose backward takes a few key-value heads at a time where the document is long.

Beside the gradients, backward makes 8 bytes for each value of the queries that one call works on: float32 sums of the
queries' gradient and, where query heads share keys, the keys' and the values' gradients of each query head. Forward
needs nothing like it and runs once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

# Tokens times key-value heads that one call in backward works on: more fill the card no better and take memory.
TOKEN_HEADS_IN_FLIGHT = 32_768


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention by the kernel that PyTorch chooses; first order only where backward takes turns.

    Args:
        query: (1, heads, tokens, head_dim).
        key: (1, key-value heads, tokens, head_dim).
        value: (1, key-value heads, tokens, head_dim).
        scale: of the scores; None for 1 / sqrt(head_dim).

    Returns:
        (1, heads, tokens, head_dim).
    """
    kernel: dict[str, Any] = {"is_causal": True, "scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    step = max(1, TOKEN_HEADS_IN_FLIGHT // query.shape[2])
    if step >= key.shape[1]:
        return scaled_dot_product_attention(query, key, value, **kernel)
    with _NoteResults(query, key, value) as noted:
        output = scaled_dot_product_attention(query, key, value, **kernel)
    if noted.operation is None:
        return output
    return _BackwardInTurns.apply(query, key, value, noted.operation, noted.results, scale, step)  # type: ignore[return-value]


def _cudnn_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, results: list[Any], scale: Any) -> Any:
    output, log_sum_exp, ends, key_ends, longest, longest_key, seed, offset, *_ = results
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, output, log_sum_exp, seed, offset, None, ends, key_ends, longest, longest_key,
        0.0, True, scale=scale,
    )  # fmt: skip


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, results: list[Any], scale: Any) -> Any:
    output, log_sum_exp, ends, key_ends, longest, longest_key, seed, offset, *_ = results
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, output, log_sum_exp, ends, key_ends, longest, longest_key, 0.0, True, seed, offset,
        scale=scale,
    )  # fmt: skip


def _cpu_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, results: list[Any], scale: Any) -> Any:
    output, log_sum_exp = results
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, log_sum_exp, 0.0, True, scale=scale
    )


# Operations that take fewer key-value heads as they are. Signatures of PyTorch 2.11 and 2.13.
BACKWARD = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default: _cudnn_backward,
    torch.ops.aten._scaled_dot_product_flash_attention.default: _flash_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _cpu_backward,
}


class _NoteResults(TorchDispatchMode):
    """Notes the operation and its results, if it is one of `BACKWARD` and works on these very tensors.

    It does not where PyTorch expands key-value heads, pads the heads or changes the dtype.
    """

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self._inputs = [id(tensor) for tensor in inputs]
        self.operation: Any = None
        self.results: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func in BACKWARD and [id(tensor) for tensor in args[:3]] == self._inputs:
            self.operation = func
            # Autograd will write a graph into these tensors, which is not to be held.
            self.results = [r.detach() if isinstance(r, Tensor) else r for r in results]
        return results


class _BackwardInTurns(torch.autograd.Function):
    """Takes the results of an operation, and has its backward a few key-value heads at a time."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        operation: Any,
        results: list[Any],
        scale: float | None,
        step: int,
    ) -> Tensor:
        ctx.backward_of, ctx.scale, ctx.step = BACKWARD[operation], scale, step
        ctx.constants = [None if isinstance(result, Tensor) else result for result in results]
        tensors = [result if isinstance(result, Tensor) else None for result in results]
        ctx.save_for_backward(query, key, value, *tensors)
        output: Tensor = results[0]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *tensors = ctx.saved_tensors
        output, log_sum_exp, *rest = (
            constant if tensor is None else tensor for tensor, constant in zip(tensors, ctx.constants, strict=True)
        )
        parts: list[list[Tensor]] = [[], [], []]
        shared_by = query.shape[1] // key.shape[1]
        for start in range(0, key.shape[1], ctx.step):
            shared = slice(start, start + ctx.step)
            heads = slice(start * shared_by, (start + ctx.step) * shared_by)
            of_turn = ctx.backward_of(
                grad[:, heads], query[:, heads], key[:, shared], value[:, shared],
                # FlashAttention reads the log-sum-exp without its strides.
                [output[:, heads], log_sum_exp[:, heads].contiguous(), *rest], ctx.scale,
            )  # fmt: skip
            for of_tensor, part in zip(parts, of_turn, strict=True):
                of_tensor.append(part)
            del of_turn, part
        return *map(_join, (query, key, value), parts), None, None, None, None


def _join(like: Tensor, parts: list[Tensor]) -> Tensor:
    """Heads' gradients in the memory layout of a tensor; the parts are gone afterwards."""
    joined = torch.empty_like(like)
    for place in joined.split([part.shape[1] for part in parts], 1):
        place.copy_(parts.pop(0))
    return joined
