"""What the GPU's kernels and the recipe's own functions allocate, as functions that do nothing else.

They run on the meta device in the places of attention, adapted linear layers, Liger's norms and the loss. Each saves
for backward what the real one saves, and makes the same temporary tensors in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_moe.integrations.allocations import AllocationCounter
from lightning_moe.planning.parts import ATTENTION_BACKWARD, ATTENTION_KEPT, GRADIENTS, LOSS

# Of the recipe: tokens times key-value heads that one call in attention's backward works on,
TOKEN_HEADS_IN_FLIGHT = 32_768
# tokens whose logits exist at a time,
LOSS_CHUNK_TOKENS = 512
# the smallest tensor that is brought to the host,
SMALLEST_OFFLOADED_BYTES = 2**20
# and the families whose attention and experts are computed again each by itself.
TWO_BLOCKS = frozenset((
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "gpt_oss",
    "hunyuan_v1_moe", "hy_v3", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open",
))  # fmt: skip


@dataclass
class LayerRun:
    """One execution of a layer.

    Attributes:
        counter: of what it allocates.
        keeps_attention: whether attention's results are kept and used again.
        offloads: whether what is kept waits on the host.
        is_recomputing: whether this is the recomputation.
        kept: attention's results.
        choice: the router's.
        inputs: bytes that the second block took, tile by tile, where it is computed again by itself.
        fetched: what the block before attention's kept, (tag, bytes) each.
        on_device: that, on the device again.
    """

    counter: AllocationCounter
    keeps_attention: bool
    offloads: bool
    is_recomputing: bool = False
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    choice: list[Tensor] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    fetched: tuple[tuple[str, int], ...] = ()
    on_device: list[Tensor] = field(default_factory=list)

    def fetch(self) -> None:
        """Brings back what the block before attention's kept, as that one's recomputation begins."""
        for tag, size in self.fetched:
            with self.counter.tagged(tag):
                self.on_device.append(torch.empty(size, dtype=torch.uint8, device="meta"))


class _Attention(torch.autograd.Function):
    """Variable-length attention: cuDNN's or FlashAttention's, in backward some heads in turn where there are no sinks.

    Backward sums the queries' gradient in float32, and where several heads share keys makes the keys' and the values'
    gradients of each head: 4 + 2 + 2 bytes for each value of the queries.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, run: LayerRun, has_sinks: bool) -> Tensor:  # type: ignore[override]
        (_, heads, tokens, _), kv_heads = query.shape, key.shape[1]
        ctx.run, ctx.step = run, kv_heads if has_sinks else max(1, TOKEN_HEADS_IN_FLIGHT // tokens)
        if run.keeps_attention and run.is_recomputing:
            output, sums = run.kept.pop() if run.offloads else run.kept[-1]
        else:
            with run.counter.tagged(ATTENTION_KEPT):
                output = query.new_empty(1, tokens, heads, value.shape[3])
                sums = query.new_empty(heads, tokens, dtype=torch.float32)
            if run.keeps_attention:
                run.kept.append((output, sums))
        output = output.detach()
        if has_sinks:  # the output without them is kept, the one with them is made of it by a float32 product
            sums = torch.empty_like(sums)
            output = (output * output.new_empty(output.shape[:3], dtype=torch.float32)[..., None]).to(output.dtype)
        ctx.save_for_backward(query, key, value, sums, output)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        run: LayerRun = ctx.run
        with run.counter.during("attention's backward"), run.counter.tagged(ATTENTION_BACKWARD):
            grads = _attention_backward(ctx)
        return *grads, None, None


def _attention_backward(ctx: Any) -> list[Tensor]:
    query, key, value, *_ = ctx.saved_tensors
    shared_by = query.shape[1] // key.shape[1]
    if ctx.step >= key.shape[1]:
        return _kernel_backward(query, key, value, shared_by)
    parts: list[list[Tensor]] = [[], [], []]
    for k, v in zip(key.split(ctx.step, 1), value.split(ctx.step, 1), strict=True):
        of_turn = _kernel_backward(query[:, : k.shape[1] * shared_by], k, v, shared_by)
        for of_tensor in parts:
            of_tensor.append(of_turn.pop(0))
    grads = []
    for like, of_tensor in zip((query, key, value), parts, strict=True):
        grads.append(torch.empty_like(like))
        of_tensor.clear()
    return grads


def _kernel_backward(query: Tensor, key: Tensor, value: Tensor, shared_by: int) -> list[Tensor]:
    grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
    sums = torch.empty_like(grads[0], dtype=torch.float32)
    of_heads = [t.new_empty(1, query.shape[1], *t.shape[2:]) for t in (key, value)] if shared_by > 1 else []
    del sums, of_heads
    return grads


class _AdaptedLinear(torch.autograd.Function):
    """The recipe's LoRA on a linear layer, whose products add the update."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, run: LayerRun) -> Tensor:  # type: ignore[override]
        ctx.run = run
        a, b = a.to(weight.dtype), b.to(weight.dtype)
        rows = x.flatten(0, -2)
        in_rank = rows @ a.t()
        y = rows @ weight.t()
        ctx.save_for_backward(rows, weight, a, b, in_rank)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, in_rank = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_in_rank = rows @ b
        with ctx.run.counter.tagged(GRADIENTS):
            grad_a = (grad_in_rank.t() @ x).float()
            grad_b = (rows.t() @ in_rank).float()
        grad_x = (rows @ weight).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_a, grad_b, None


class _LigerNorm(torch.autograd.Function):
    """Liger's RMSNorm, whose backward writes over the gradient that it gets."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.contiguous().view_as(grad)


class _LigerRotary(torch.autograd.Function):
    """Liger's rotary embedding, which turns queries or keys in their own memory, and their gradient too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.transpose(1, 2).contiguous().transpose(1, 2)


@contextmanager
def ligers_rotary_embedding() -> Iterator[None]:
    """Qwen3-MoE's attention has it within, where Liger puts it."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe  # which takes a second

    before = modeling_qwen3_moe.apply_rotary_pos_emb
    modeling_qwen3_moe.apply_rotary_pos_emb = lambda q, k, *_, **__: (_LigerRotary.apply(q), _LigerRotary.apply(k))
    try:
        yield
    finally:
        modeling_qwen3_moe.apply_rotary_pos_emb = before


class _Output(torch.autograd.Function):
    """Stands for what is after a layer: its backward makes the gradient of the layer's output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:  # type: ignore[override]
        ctx.shape, ctx.dtype = output.shape, output.dtype
        return output.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.new_empty(ctx.shape, dtype=ctx.dtype)


class _Loss(torch.autograd.Function):
    """The loss on the next token, some tokens' logits and their gradient at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, counter: AllocationCounter, num_trained: int) -> Tensor:  # type: ignore[override]
        with counter.tagged(LOSS), counter.during("loss"):
            grads = [torch.empty_like(hidden)]
            if num_trained:
                grads.append(hidden.new_empty(num_trained, dtype=torch.float32))
            for part in hidden[0, :-1].split(LOSS_CHUNK_TOKENS):
                logits = part @ weight.t()
                gradient = torch.empty_like(logits)
                of_hidden = gradient @ weight
                of_head = [torch.empty_like(grad) for grad in grads[1:]]
                del logits, gradient, of_hidden, of_head
        ctx.save_for_backward(*grads)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, *_ = (torch.empty_like(saved) for saved in ctx.saved_tensors)
        return hidden, None, None, None


def attention(query: Tensor, key: Tensor, value: Tensor, run: LayerRun, has_sinks: bool) -> Tensor:
    """(1, heads, tokens, head_dim) of queries, fewer heads of keys and values, to (1, tokens, heads, head_dim)."""
    return _Attention.apply(query, key, value, run, has_sinks)  # type: ignore[return-value]


def adapted_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, run: LayerRun) -> Tensor:
    """A frozen linear layer of (out, in) with float32 factors (r, in) and (out, r)."""
    return _AdaptedLinear.apply(x, weight, a, b, run)  # type: ignore[return-value]


def liger_norm(x: Tensor) -> Tensor:
    """Liger's RMSNorm."""
    return _LigerNorm.apply(x)  # type: ignore[return-value]


def until_loss(output: Tensor) -> Tensor:
    """() of a layer's output; backward begins with that output's gradient."""
    return _Output.apply(output)  # type: ignore[return-value]


def next_token_loss(hidden: Tensor, weight: Tensor, counter: AllocationCounter, num_trained: int) -> Tensor:
    """() of (1, tokens, H) and the head's (vocabulary, H), of which so many values train."""
    return _Loss.apply(hidden, weight, counter, num_trained)  # type: ignore[return-value]
