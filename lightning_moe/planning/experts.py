"""What the operation `moe_experts` allocates on a GPU, as functions that do nothing else; see stand_ins.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_moe.integrations.allocations import AllocationCounter
from lightning_moe.ops.autograd import has_saved_tensors_hooks
from lightning_moe.ops.grouped import FUSED_ACTIVATIONS, Activation, activate, activation_backward, rows_at_a_time
from lightning_moe.ops.low_rank import Factors, LowRank, join, split_gradients
from lightning_moe.ops.passes import num_buffer_columns
from lightning_moe.ops.quantized import features_in
from lightning_moe.planning.parts import GRADIENTS, LAYER_INPUTS, WORKSPACE
from lightning_moe.planning.stand_ins import LayerRun


@dataclass(frozen=True)
class ExpertsShape:
    """A layer's experts, as the products take them.

    Attributes:
        up: (E, in, out), on the meta device, of the first projection,
        down: and of the second.
        activation: between them.
        has_bias: whether both have one.
        workspace_bytes: what one is made dense to at a time, where they are quantized; 0 where they are dense.
        buffer_mib: bounds the buffer of projected rows.
    """

    up: Tensor
    down: Tensor
    activation: Activation
    has_bias: bool
    workspace_bytes: int
    buffer_mib: float


def experts(
    shape: ExpertsShape, run: LayerRun, hidden: Tensor, index: Tensor, weights: Tensor, factors: tuple[Tensor, ...]
) -> Tensor:
    """`moe_experts`, with the factors a, b of an update of each projection."""
    if not run.is_recomputing:
        with run.counter.tagged(LAYER_INPUTS):
            run.choice.append(torch.empty_like(index, dtype=torch.int32))
    placeholder, made = _Until.apply(hidden, weights, shape, run, *factors)
    return _From.apply(placeholder, made, shape, weights.shape[1])  # type: ignore[no-any-return]


class _Until(torch.autograd.Function):
    """`_UntilActivation` of ops/experts.py."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, shape: ExpertsShape, run: LayerRun, *factors: Tensor) -> Any:  # type: ignore[override]
        num_rows = weights.numel()
        permutation, inverse = (weights.new_empty(num_rows, dtype=torch.long) for _ in range(2))
        up = _joined(factors[:2], shape.up.dtype)
        in_rank = _in_rank(num_rows, up)
        # Left to backward, which has the weights dense once, and to `_From` where that runs.
        leaves_h = has_saved_tensors_hooks() and shape.up.nbytes <= shape.workspace_bytes
        h = None if leaves_h else _pre_activation(hidden, num_rows, shape, run.counter)
        ctx.shape, ctx.run, ctx.leaves_h = shape, run, leaves_h
        kept = hidden if leaves_h else h
        ctx.save_for_backward(weights, kept, permutation, inverse, *factors, *((in_rank, hidden) if factors else ()))
        placeholder = hidden.new_empty(1, 1).expand(hidden.shape)
        return placeholder, ([h], factors[2:], permutation, inverse, run.counter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shape, counter = ctx.shape, ctx.run.counter
        weights, h, *rest = ctx.saved_tensors
        num_rows, top_k, factors = weights.numel(), weights.shape[1], rest[2:6]
        grads: list[Tensor] = []
        with counter.during("the experts' backward"):
            dense, shape_of_up = None, shape
            if ctx.leaves_h:
                shape_of_up = replace(shape, workspace_bytes=0)
                with counter.tagged(WORKSPACE):
                    dense = torch.empty_like(shape.up)
                h = _pre_activation(grad, num_rows, shape_of_up, counter)
            up, down = (_joined(of, shape.up.dtype) for of in (factors[:2], factors[2:]))
            grad_in_rank = _in_rank(num_rows, down)
            grad_a = _project(grad, num_rows, shape.down.mT, shape, counter)
            grad_h = _differentiated(shape, h, grad_a, weights.flatten())
            grad_weights = torch.empty_like(weights)
            if not factors:
                del grad_a
            del h
            if down is not None:
                in_rank, shapes = _in_rank(num_rows, down), [factor.shape for factor in down]
                del down
                with counter.tagged(GRADIENTS):
                    grads += [grad.new_empty(of, dtype=torch.float32) for of in shapes]
                del in_rank, grad_a, grad_in_rank
            up_rank = _in_rank(num_rows, up)
            if up is not None:
                with counter.tagged(GRADIENTS):
                    grads = [torch.empty_like(factor, dtype=torch.float32) for factor in up] + grads
            grad_x = _combined(grad, num_rows, top_k, shape.up.mT, shape_of_up, counter, grad.dtype)
            del grad_h, up_rank, dense
            if shape.has_bias:
                wide = grad.float() @ grad.new_empty(grad.shape[1], shape.up.shape[0], dtype=torch.float32)
                del wide
            if factors:
                with counter.tagged(GRADIENTS):
                    of_up, of_down = (
                        split_gradients(grads[at], grads[at + 1], [_update(factors[at : at + 2])]) for at in (0, 2)
                    )
                    grads = [grad for of in (of_up, of_down) for pair in of for grad in pair]  # type: ignore[misc]
        return grad_x, grad_weights, None, None, *grads


class _From(torch.autograd.Function):
    """`_FromActivation` of ops/experts.py."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, made: Any, shape: ExpertsShape, top_k: int) -> Tensor:  # type: ignore[override]
        kept, factors, _, _, counter = made
        num_rows, h = placeholder.shape[0] * top_k, kept.pop()
        if h is None:
            h = _pre_activation(placeholder, num_rows, shape, counter)
        down = _joined(factors, shape.down.dtype)
        a = _activated(shape, h)
        del h
        in_rank = _in_rank(num_rows, down)
        dtype = torch.float32 if shape.has_bias else placeholder.dtype
        output = _combined(placeholder, num_rows, top_k, shape.down, shape, counter, dtype)
        del a, in_rank, down
        if shape.has_bias:
            output.addcmul_(torch.empty_like(output), torch.empty_like(output[:, :1]))
        return output.to(placeholder.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None, None, None


def _update(factors: Sequence[Tensor]) -> LowRank:
    a, b = factors
    return LowRank(a, b, 2.0)


def _joined(factors: Sequence[Tensor], dtype: torch.dtype) -> Factors | None:
    return join([_update(factors)], dtype) if factors else None


def _in_rank(num_rows: int, factors: Factors | None) -> Tensor | None:
    return None if factors is None else factors[0].new_empty(num_rows, factors[0].shape[1])


def _pre_activation(like: Tensor, num_rows: int, shape: ExpertsShape, counter: AllocationCounter) -> Tensor:
    return _project(like, num_rows, shape.up, shape, counter, bias=shape.has_bias)


def _project(
    like: Tensor,
    num_rows: int,
    weight: Tensor,
    shape: ExpertsShape,
    counter: AllocationCounter,
    width: int | None = None,
    bias: bool = False,
) -> Tensor:
    """`Projection.project`: the product, beside it what it is made dense to, and the bias of each row."""
    width = width or weight.shape[2]
    product = like.new_empty(num_rows, width, dtype=weight.dtype)
    if shape.workspace_bytes:
        step = features_in(shape.workspace_bytes, weight.shape, weight.dtype)
        with counter.tagged(WORKSPACE):
            for start in range(0, width, step):
                weight.new_empty(*weight.shape[:2], min(step, width - start))
    if bias:
        expert = like.new_empty(num_rows, dtype=torch.long)
        of_row = torch.empty_like(product)
        if shape.workspace_bytes:
            product = product + of_row
        del expert, of_row
    return product


def _combined(
    like: Tensor,
    num_rows: int,
    top_k: int,
    weight: Tensor,
    shape: ExpertsShape,
    counter: AllocationCounter,
    dtype: torch.dtype,
) -> Tensor:
    """`project_and_combine`."""
    hidden = weight.shape[2]
    columns = num_buffer_columns(shape.buffer_mib, num_rows, hidden, weight.element_size())
    if shape.workspace_bytes:
        columns = min(columns, features_in(shape.workspace_bytes, weight.shape, weight.dtype))
    output = like.new_empty(num_rows // top_k, hidden, dtype=dtype)
    for start in range(0, hidden, columns):
        _project(like, num_rows, weight, shape, counter, min(columns, hidden - start))
    return output


def _activated(shape: ExpertsShape, h: Tensor) -> Tensor:
    width = shape.down.shape[1]
    part = h[: rows_at_a_time(h)]
    if shape.activation in FUSED_ACTIVATIONS:
        return h.new_empty(len(h), width)
    if len(part) == len(h):
        return activate(shape.activation, h)
    others = h.new_empty(len(h) - len(part), width)
    return torch.cat([others, activate(shape.activation, part)])


def _differentiated(shape: ExpertsShape, h: Tensor, grad_a: Tensor, weights: Tensor) -> Tensor:
    """`activation_backward`, which writes over h; without a kernel it works on a part of the rows at a time."""
    if shape.activation not in FUSED_ACTIVATIONS:
        num, pairs = rows_at_a_time(h), weights.new_empty(len(h), dtype=torch.long)
        sums = weights.new_empty(len(h), dtype=torch.float32), weights.index_select(0, pairs)
        activation_backward(shape.activation, h[:num], grad_a[:num], weights[:num], overwrite=True)
        del sums
    return h
