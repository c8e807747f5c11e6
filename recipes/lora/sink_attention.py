"""Attention with sinks and sliding windows, as gpt-oss has it.

A sink is a score s of each head that takes part in the softmax and brings no value. With l the log-sum-exp of a token's
scores, the output is the one without sinks times exp(l - L), L = log(exp(l) + exp(s)). FlashAttention's backward makes
the probabilities of the scores and the log-sum-exp, and what their normalization adds of the output: given L and the
output with sinks, it gives the gradients of attention with sinks.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

# torch 2.11 takes fewer key-value heads as they are; later versions want to be told.
GROUPED_QUERIES: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scale: float | None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each document to itself, by FlashAttention on a GPU in 16 bits.

    Args:
        query: (tokens, heads, head_dim).
        key: (tokens, key-value heads, head_dim).
        value: (tokens, key-value heads, head_dim).
        ends: (documents + 1,) int32, where each document begins and the last one ends.
        longest: tokens of the longest document, or more.
        scale: of the scores; None for 1 / sqrt(head_dim).
        window: how many tokens a token sees, itself among them; None for all before it.
        sinks: (heads,), one score of each; None for none.

    Returns:
        (tokens, heads, head_dim).
    """
    seen = (-1 if window is None else window - 1, 0)
    if sinks is not None:
        return _WithSinks.apply(query, key, value, sinks, ends, longest, scale, seen)  # type: ignore[return-value]
    return varlen_attn(  # type: ignore[return-value]
        query, key, value, ends, ends, longest, longest, scale=scale, window_size=seen, **GROUPED_QUERIES
    )


class _WithSinks(torch.autograd.Function):
    """FlashAttention's operation and its backward, of documents."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        ends: Tensor,
        longest: int,
        scale: float | None,
        window: tuple[int, int],
    ) -> Tensor:
        ctx.options = longest, scale, window
        attend = torch.ops.torch_attn._varlen_attn
        without, log_sum_exp, random_state = attend(
            query, key, value, ends, ends, longest, longest, window == (-1, 0), scale, window, **GROUPED_QUERIES
        )
        total = torch.logaddexp(log_sum_exp, sinks.float()[:, None])
        output = (without * (log_sum_exp - total).exp().mT[..., None]).to(without.dtype)
        ctx.save_for_backward(query, key, value, sinks, ends, output, total, random_state)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, sinks, ends, output, total, random_state = ctx.saved_tensors
        longest, scale, window = ctx.options
        grads = torch.ops.torch_attn._varlen_attn_backward(
            grad.contiguous(), query, key, value, output, total, ends, ends, longest, longest, window == (-1, 0),
            random_state, scale, window,
        )  # fmt: skip
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            shares = (sinks.float()[:, None] - total).exp()
            grad_sinks = -(shares * (grad.float() * output.float()).sum(-1).mT).sum(-1).to(sinks.dtype)
        return *grads, grad_sinks, None, None, None, None


def masked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same of one document, on any device and beside a cache, with a mask of (tokens x keys) for each head.

    Args:
        module: the attention layer.
        query: (batch, heads, tokens, head_dim), the last of the tokens that there are keys of.
        key: (batch, key-value heads, keys, head_dim).
        value: (batch, key-value heads, keys, head_dim).
        attention_mask: which keys are seen, as `sdpa` takes it; None for those in the window.
        scaling: of the scores.
        dropout: of the probabilities.
        sliding_window: see `attend_documents`.
        s_aux: the sinks, see `attend_documents`.

    Returns:
        (batch, tokens, heads, head_dim) and None.
    """
    if attention_mask is None:
        position = torch.arange(key.shape[2], device=key.device)
        distance = position[-query.shape[2] :, None] - position
        attention_mask = (distance >= 0) & (distance < (sliding_window or len(position)))
    if attention_mask.dtype == torch.bool:
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, -torch.inf)
    if s_aux is not None:  # the score of a key of zeros, whose value is zeros
        column = s_aux.to(query.dtype).view(-1, 1, 1).expand(*query.shape[:3], 1)
        attention_mask = torch.cat([attention_mask.expand(*query.shape[:3], -1), column], -1)
        key, value = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (key, value))
    output = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2), None
