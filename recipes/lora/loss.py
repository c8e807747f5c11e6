"""The loss on the next token without the full logits: 16,384 tokens of a 152k vocabulary would take 9 GiB in float32.

The head and the loss run on some tokens at a time, for any head, and each part's gradients are formed at once: nothing
is computed again in backward, and what is kept for it is as large as the hidden states.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lora.chat import IGNORED

CHUNK_TOKENS = 512


def next_token_loss(hidden_states: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens that have a label.

    Args:
        hidden_states: (1, tokens, H), of the last layer.
        head: from H to the vocabulary.
        labels: (1, tokens) int64, as the tokens themselves: each is compared with what the token before it predicts.
            -100 where there is no loss.

    Returns:
        () float32; 0 where no token has a label.
    """
    hidden, targets = hidden_states[0, :-1], labels[0, 1:]
    if torch.is_grad_enabled():
        total = _ChunkedLoss.apply(hidden, targets, head, *(p for p in head.parameters() if p.requires_grad))
    else:
        chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        total = torch.stack([_loss(head(chunk), target) for chunk, target in chunks]).sum()
    return total / (targets != IGNORED).sum().clamp_min(1)


class _ChunkedLoss(torch.autograd.Function):
    """The sum over tokens, and in forward already its gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, *trained: Tensor) -> Tensor:  # type: ignore[override]
        loss_and_gradient = _compiled() if hidden.is_cuda else _loss_and_gradient
        total = torch.zeros((), device=hidden.device)
        grads = [torch.zeros_like(tensor) for tensor in (hidden, *trained)]
        chunks = (tensor.split(CHUNK_TOKENS) for tensor in (hidden, targets, grads[0]))
        for chunk, target, grad in zip(*chunks, strict=True):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                logits = head(leaf)
            loss, grad_logits = loss_and_gradient(logits.detach(), target)
            parts = torch.autograd.grad(logits, (leaf, *trained), grad_logits)
            for into, part in zip((grad, *grads[1:]), parts, strict=True):
                into += part
            total += loss
            del logits, grad_logits, parts, part  # before the next chunk's are made
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, *trained = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return hidden, None, None, *trained


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of (tokens,) losses, and its gradient, softmax - 1 at the target, in the logits' dtype."""
    log_probabilities, target, has_label = _log_probabilities(logits, targets)
    of_target = log_probabilities.gather(1, target)
    is_target = torch.arange(logits.shape[1], device=logits.device) == target
    gradient = torch.where(is_target, of_target.expm1(), log_probabilities.exp())
    return _sum(of_target, has_label), gradient.where(has_label, 0).to(logits.dtype)


@cache
def _compiled() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same in two passes over (tokens, vocabulary), and nothing as large in float32.

    Each pass takes a good part of the time of a product with the head's weight.
    """
    return torch.compile(_loss_and_gradient, dynamic=True)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    log_probabilities, target, has_label = _log_probabilities(logits, targets)
    return _sum(log_probabilities.gather(1, target), has_label)


def _log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float32; with the targets, any where there is no label; and where there is one: (tokens, 1)."""
    has_label = (targets != IGNORED)[:, None]
    return torch.log_softmax(logits, -1, dtype=torch.float32), targets[:, None].where(has_label, 0), has_label


def _sum(of_target: Tensor, has_label: Tensor) -> Tensor:
    return -of_target.where(has_label, 0).sum()


def losses(causal: Any, inputs: dict[str, Any], labels: Tensor, *, balances: bool) -> tuple[Tensor, Tensor | None]:
    """The loss on the next token and, if asked for, the router's load-balancing loss, () float32 each.

    Args:
        causal: a causal language model.
        inputs: what its decoder takes.
        labels: see `next_token_loss`.
        balances: whether the router's is asked for.
    """
    extra = {"output_router_logits": True} if balances else {}
    outputs = causal.get_decoder()(**inputs, use_cache=False, **extra)
    loss = next_token_loss(outputs.last_hidden_state, causal.get_output_embeddings(), labels)
    if not balances:
        return loss, None
    config = causal.config
    balance = load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok)
    assert isinstance(balance, Tensor)
    return loss, balance
