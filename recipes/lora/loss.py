"""The loss on the next token without the full logits: 16,384 tokens of a 152k vocabulary would take 9 GiB in float32.

torch     torch.nn.functional.linear_cross_entropy (torch 2.13 and later)
liger     Liger's fused linear cross-entropy, on a GPU where the package is installed
chunked   the head and the loss on some tokens at a time, computed again in backward; for any head
"""

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

LossImpl = Literal["torch", "liger", "chunked"]

CHUNK_TOKENS = 1024
IGNORED = -100


def choose_loss(wanted: LossImpl | Literal["auto"], head: nn.Module, device: torch.device) -> LossImpl:
    """The implementation to take with this head on this device.

    Args:
        wanted: one of them, or `auto` for the first that can be taken, in the order torch, liger, chunked.
        head: the model's language head; only a bias-free `nn.Linear`, frozen or trained, can do without its logits.
        device: where it runs.

    Raises:
        ValueError: where the wanted one cannot be taken, with the reason.
    """
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and head.bias is None
    obstacles: dict[LossImpl, str | None] = {
        "torch": None if hasattr(nn.functional, "linear_cross_entropy") else "torch 2.13 or later is needed",
        "liger": "it needs a GPU"
        if device.type != "cuda"
        else None
        if importlib.util.find_spec("liger_kernel")
        else "the package liger-kernel is not installed",
        "chunked": None,
    }
    if not linear:
        for impl in ("torch", "liger"):
            obstacles[impl] = f"the head is a {type(head).__name__}, not a plain linear layer: leave adapters off it"
    if wanted == "auto":
        return next(impl for impl, obstacle in obstacles.items() if obstacle is None)
    if obstacle := obstacles[wanted]:
        raise ValueError(f"model.loss_impl '{wanted}' cannot be taken: {obstacle}")
    return wanted


def next_token_loss(hidden_states: Tensor, head: Any, labels: Tensor, impl: LossImpl) -> Tensor:
    """Mean cross-entropy over the tokens that have a label.

    Args:
        hidden_states: (1, tokens, H), of the last layer.
        head: from H to the vocabulary.
        labels: (1, tokens) int64, as the tokens themselves: each is compared with what the token before it predicts.
            -100 where there is no loss.
        impl: how, from `choose_loss`.

    Returns:
        () float32; 0 where no token has a label.
    """
    hidden, targets = hidden_states[0, :-1], labels[0, 1:]
    count = (targets != IGNORED).sum().clamp_min(1)
    if impl == "chunked":
        chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        sums = [checkpoint(_chunk_loss, chunk, head, target, use_reentrant=False) for chunk, target in chunks]
        return torch.stack(sums).sum() / count
    weight = head.weight.to(hidden.dtype)  # a head that trains is float32
    if impl == "torch":
        # Its sum would be rounded to bfloat16; each token's loss is too, but adds up in float32.
        total = nn.functional.linear_cross_entropy(
            hidden, weight, targets, reduction="none", ignore_index=IGNORED, options=nn.LinearCrossEntropyOptions()
        ).sum(dtype=torch.float32)
    else:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        total = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum", ignore_index=IGNORED)
    return total.float() / count


def losses(
    causal: Any, inputs: dict[str, Any], labels: Tensor, impl: LossImpl, *, balances: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss on the next token and, if asked for, the router's load-balancing loss, () float32 each.

    Args:
        causal: a causal language model.
        inputs: what its decoder takes.
        labels: see `next_token_loss`.
        impl: see `next_token_loss`.
        balances: whether the router's is asked for.
    """
    extra = {"output_router_logits": True} if balances else {}
    outputs = causal.get_decoder()(**inputs, use_cache=False, **extra)
    loss = next_token_loss(outputs.last_hidden_state, causal.get_output_embeddings(), labels, impl)
    if not balances:
        return loss, None
    config = causal.config
    balance = load_balancing_loss_func(outputs.router_logits, config.num_experts, config.num_experts_per_tok)
    assert isinstance(balance, Tensor)
    return loss, balance


def _chunk_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum", ignore_index=IGNORED)
