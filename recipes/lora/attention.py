"""Attention within documents: the recipe's attention function, which Transformers reaches by the name `documents`.

A batch is one row of documents end to end. One document runs through PyTorch's scaled_dot_product_attention. Several
run as what they are, without the (tokens x tokens) mask that Transformers' `sdpa` would build. A very long one runs a
few heads at a time, because what backward needs beside its results grows with the heads in flight.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "documents"

# Tokens times key-value heads that one kernel call works on: fewer fill the card no better, more take memory.
TOKEN_HEADS_IN_FLIGHT = 131_072


def check_config(config: Any) -> None:
    """Whether a model's attention is what this does.

    Raises:
        ValueError: where it sees a window of each document only.
    """
    if config.use_sliding_window:
        raise ValueError(
            f"model.attention {NAME!r} sees whole documents and the model a window of {config.sliding_window} tokens "
            "(use_sliding_window): set --model.attention sdpa"
        )


def register() -> None:
    """Makes the name known to Transformers; `attn_implementation=NAME` then means this attention."""
    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, _mask)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document to itself, in the signature of Transformers' attention functions.

    Args:
        module: the attention layer.
        query: (1, heads, tokens, head_dim).
        key: (1, key-value heads, tokens, head_dim).
        value: (1, key-value heads, tokens, head_dim).
        attention_mask: as `sdpa` takes it; None in training.
        cu_seq_lens_q: (documents + 1,) int32, where each document begins and the last one ends; None for one document.
        max_length_q: tokens of the longest document.
        options: what `sdpa` takes beside these.

    Returns:
        (1, tokens, heads, head_dim) and None.
    """
    num_documents = 1 if cu_seq_lens_q is None else cu_seq_lens_q.numel() - 1
    if attention_mask is not None or num_documents == 1:
        if attention_mask is None and _by_heads(query, key, value):
            return _HeadsInTurn.apply(query, key, value, options.get("scaling")), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert cu_seq_lens_q is not None
    assert max_length_q is not None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        packed = varlen_attn(
            queries, keys, values, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
            scale=options.get("scaling"), window_size=(-1, 0), **_GROUPED_QUERIES,
        )  # fmt: skip
        assert isinstance(packed, Tensor)
        return packed[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    documents = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    attended = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in documents]
    return torch.cat(attended, dim=1), None


# torch 2.11 takes fewer key-value heads as they are; later versions want to be told.
_GROUPED_QUERIES: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}) else {}


def _mask(*, attention_mask: Tensor | None = None, **options: Any) -> Tensor | None:
    # Without padding there is nothing to say that the documents' boundaries do not.
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **options)


def kernel_of(query: Tensor, key: Tensor, value: Tensor) -> SDPBackend:
    """The kernel that PyTorch takes for causal attention of (1, heads, tokens, head_dim) tensors like these."""
    return SDPBackend(torch._fused_sdp_choice(query, key, value, None, 0.0, True, enable_gqa=True))


def _by_heads(query: Tensor, key: Tensor, value: Tensor) -> bool:
    tokens = query.shape[2]
    if not query.is_cuda or key.shape[2] != tokens or tokens * key.shape[1] <= TOKEN_HEADS_IN_FLIGHT:
        return False
    return kernel_of(query, key, value) in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)  # not in float32


class _HeadsInTurn(torch.autograd.Function):
    """Causal attention a few key-value heads at a time, with one output and one gradient for each input.

    Autograd over slices would keep every slice's output beside the joined one, and join gradients in new memory.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """From (1, heads, tokens, head_dim) and twice (1, key-value heads, ...) to (1, tokens, heads, head_dim)."""
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.scale, ctx.kernel = scale, kernel_of(query, key, value)
        states = []
        for queries, keys in _turns(query, key):
            inputs = query[:, queries], key[:, keys], value[:, keys]
            if ctx.kernel == SDPBackend.CUDNN_ATTENTION:
                results = torch.ops.aten._scaled_dot_product_cudnn_attention(
                    *inputs, None, True, 0.0, True, scale=scale
                )
            else:
                results = torch.ops.aten._scaled_dot_product_flash_attention(*inputs, 0.0, True, scale=scale)
            part, log_sum_exp, _, _, _, _, seed, offset, _ = results
            out[:, :, queries] = part.transpose(1, 2)
            states += [log_sum_exp, seed, offset]
        ctx.save_for_backward(query, key, value, out, *states)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of query, key and value, each laid out as its input."""
        query, key, value, out, *states = ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        tokens = query.shape[2]
        for turn, (queries, keys) in enumerate(_turns(query, key)):
            log_sum_exp, seed, offset = states[3 * turn : 3 * turn + 3]
            inputs = (
                grad[:, :, queries].transpose(1, 2), query[:, queries], key[:, keys], value[:, keys],
                out[:, :, queries].transpose(1, 2), log_sum_exp,
            )  # fmt: skip
            if ctx.kernel == SDPBackend.CUDNN_ATTENTION:
                parts = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
                    *inputs, seed, offset, None, None, None, tokens, tokens, 0.0, True, scale=ctx.scale
                )
            else:
                parts = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                    *inputs, None, None, tokens, tokens, 0.0, True, seed, offset, scale=ctx.scale
                )
            for whole, heads, part in zip(grads, (queries, keys, keys), parts, strict=True):
                whole[:, heads] = part
        return *grads, None


def _turns(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Query heads and key-value heads of each kernel call."""
    num_keys, shared_by = key.shape[1], query.shape[1] // key.shape[1]
    step = max(1, TOKEN_HEADS_IN_FLIGHT // query.shape[2])
    for first in range(0, num_keys, step):
        last = min(first + step, num_keys)
        yield slice(first * shared_by, last * shared_by), slice(first, last)
