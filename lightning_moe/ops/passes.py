"""The operation's passes on plain tensors: forward up to the activation and from it on, and backward.

Nothing here records for autograd. experts.py has the mathematics and the letters, and hands the passes to autograd;
operator.py hands them to the compiler.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_moe.ops.autograd import without_autocast
from lightning_moe.ops.counting import count
from lightning_moe.ops.grouped import Activation, activate, activation_backward, grouped_outer, grouped_sum
from lightning_moe.ops.low_rank import LowRank, split_gradients
from lightning_moe.ops.projection import Projection, pre_activation, project_and_combine
from lightning_moe.ops.quantized import may_stay_dense
from lightning_moe.ops.routing import Routing, sort_by_expert

# The fewest hidden features that the output buffer takes at a time: the width of a product's tile.
MIN_BUFFER_COLUMNS = 256


class Plan(NamedTuple):
    """What of a call is not a tensor that may need a gradient.

    Attributes:
        activation: (R, N) to (R, I), row by row.
        is_transposed: weights are (E, in, out) rather than (E, out, in).
        buffer_columns: hidden features that the buffer of projected rows takes at a time.
        recomputes_h: whether backward projects x again instead of keeping h.
        is_expert_parallel: whether ids of E and above name other ranks' experts.
        records: whether a backward may come.
        up_scalings: of the updates of W1; their factors come as a, b, a, b, ... after the other tensors,
        down_scalings: and those of W2's after them.
        health: to which backward adds what it counts; None where nothing is counted.
        bytes_saved: what it adds as such.
    """

    activation: Activation
    is_transposed: bool
    buffer_columns: int
    recomputes_h: bool
    is_expert_parallel: bool
    records: bool
    up_scalings: tuple[float, ...]
    down_scalings: tuple[float, ...]
    health: Tensor | None
    bytes_saved: int

    def updates(self, factors: Sequence[Tensor]) -> tuple[list[LowRank], list[LowRank]]:
        """The updates of W1 and of W2."""
        scalings = (*self.up_scalings, *self.down_scalings)
        found = [LowRank(a, b, s) for a, b, s in zip(factors[::2], factors[1::2], scalings, strict=True)]
        return found[: len(self.up_scalings)], found[len(self.up_scalings) :]


class Inputs(NamedTuple):
    """The tensors that a gradient is made of, but for the factors of low-rank updates."""

    hidden_states: Tensor
    routing_weights: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None


class Needs(NamedTuple):
    """Which gradients are asked for: of the inputs, and whether of any A1, B1, A2, B2."""

    hidden_states: bool
    routing_weights: bool
    up_weight: bool
    up_bias: bool
    down_weight: bool
    down_bias: bool
    up_a: bool
    up_b: bool
    down_a: bool
    down_b: bool

    @classmethod
    def of(cls, inputs: Sequence[bool], factors: Sequence[bool], plan: Plan) -> "Needs":
        """Of flags for each input and each factor."""
        num_up = 2 * len(plan.up_scalings)
        up, down = factors[:num_up], factors[num_up:]
        of_factors = any(up[::2]), any(up[1::2]), any(down[::2]), any(down[1::2])
        return cls._make((*inputs, *of_factors))


class Saved(NamedTuple):
    """What backward needs of a forward, beside the factors: inputs, and what was made of them."""

    hidden_states: Tensor | None
    routing_weights: Tensor
    up_weight: Tensor | None
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    top_k_index: Tensor | None
    permutation: Tensor
    inverse: Tensor
    offsets: Tensor
    tiles: Tensor | None
    h: Tensor | None
    up_in_rank: Tensor | None


class Intermediates(NamedTuple):
    """What `from_activation` continues with.

    Attributes:
        routing: the rows.
        h: of one tensor, (S, N). `from_activation` takes it out: only backward may hold it for longer. Empty where
            backward makes its own,
        project: and this is of one function, which makes h and x A1ᵀ, and holds x.
        down_weight: W2.
        down_updates: its updates.
        down_bias: (E, H).
        routing_weights: (T, K).
        top_k_index: (T, K).
        out_dtype: of the output.
    """

    routing: Routing
    h: list[Tensor]
    project: list[Callable[[], tuple[Tensor, Tensor | None]]]
    down_weight: Tensor
    down_updates: list[LowRank]
    down_bias: Tensor | None
    routing_weights: Tensor
    top_k_index: Tensor
    out_dtype: torch.dtype


def without_foreign(routing_weights: Tensor, top_k_index: Tensor, down_weight: Tensor) -> Tensor:
    """The routing weights with zeros for other ranks' experts: whatever stands there adds nothing, be it NaN."""
    return routing_weights.masked_fill(top_k_index >= down_weight.shape[0], 0)


def until_activation(
    inputs: Inputs,
    top_k_index: Tensor,
    factors: Sequence[Tensor],
    plan: Plan,
    needs: Needs,
    *,
    keeps_choice: bool = False,
) -> tuple[Saved, Intermediates]:
    """The forward pass up to the activation: what backward needs of it, and what the pass continues with.

    With `keeps_choice` its routing has the experts' ids, for `backward` to compare with those of another forward. Where
    h is not saved it is not made: activation checkpointing's second forward, which ends here, makes none.
    """
    hidden_states, routing_weights, up_weight, up_bias, down_weight, down_bias = inputs
    dtype, num_experts, is_expert_parallel = down_weight.dtype, down_weight.shape[0], plan.is_expert_parallel
    routing = sort_by_expert(
        top_k_index, num_experts, is_expert_parallel=is_expert_parallel, dtype=dtype, keeps_choice=keeps_choice
    )
    routing_weights = routing_weights.contiguous()
    x = hidden_states.to(dtype).contiguous()
    up_updates, down_updates = plan.updates(factors)

    def project() -> tuple[Tensor, Tensor | None]:
        up = Projection.of(up_weight, up_updates, plan.is_transposed)
        return pre_activation(x, up, up_bias, routing)

    with without_autocast(x.device.type):
        h, up_in_rank = (None, None) if plan.recomputes_h else project()
    uses_x = needs.up_weight or plan.recomputes_h or needs.up_a
    saved = Saved(
        hidden_states if uses_x else None,
        routing_weights,
        up_weight if needs.hidden_states or uses_x else None,
        up_bias if needs.up_bias or plan.recomputes_h else None,
        down_weight,
        down_bias,
        top_k_index if down_bias is not None else None,
        routing.permutation,
        routing.inverse,
        routing.offsets,
        routing.tiles,
        h if plan.records else None,
        up_in_rank if needs.up_b else None,
    )
    return saved, Intermediates(
        routing, [] if h is None else [h], [project] if h is None else [], down_weight, down_updates, down_bias,
        routing_weights, top_k_index, hidden_states.dtype,
    )  # fmt: skip


def from_activation(made: Intermediates, plan: Plan) -> Tensor:
    """The forward pass from the activation on: the output (T, H)."""
    with without_autocast(made.routing_weights.device.type):
        down = Projection.of(made.down_weight, made.down_updates, plan.is_transposed)
        if made.project:
            made.h.append(made.project.pop()()[0])
        a = _activated(plan, made.h.pop(), down)
        in_rank = down.to_rank(a, made.routing)
        dtype = made.out_dtype if made.down_bias is None else torch.float32  # rounded once, the bias added
        output = project_and_combine(a, down, in_rank, made.routing, made.routing_weights, plan.buffer_columns, dtype)
        del a, in_rank, down
        if made.down_bias is not None:
            _add_biases(output, made.routing_weights, made.top_k_index, made.down_bias, plan)
            output = output.to(made.out_dtype)
    return output


def _activated(plan: Plan, h: Tensor, down: Projection) -> Tensor:
    """A (S, I) of h (S, N)."""
    a, intermediate = activate(plan.activation, h).to(h.dtype), down.weight.shape[1]
    if a.shape != (h.shape[0], intermediate):
        raise ValueError(
            f"moe_experts: the activation makes {tuple(a.shape)} of {tuple(h.shape)}, but down_proj takes "
            f"{intermediate} features"
        )
    return a


def backward(
    saved: list[Any],
    factors: Sequence[Tensor],
    grad_output: Tensor,
    plan: Plan,
    needs: Needs,
    *,
    may_overwrite: Callable[[Tensor], bool],
    choices: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor | None]:
    """The gradients of the six inputs and of the factors, None for one that wants none; counts, if that is asked for.

    Args:
        saved: the fields of a `Saved`; emptied, so that no tensor is held for longer than it is used.
        factors: of the updates.
        grad_output: (T, H), in the dtype of `hidden_states`.
        plan: of the call.
        needs: which gradients.
        may_overwrite: whether the memory of the saved h may be taken; asked when it is about to be.
        choices: see `counting.count`.
    """
    hidden_states, routing_weights, up_weight, up_bias, down_weight, down_bias, top_k_index, *made = saved
    permutation, inverse, offsets, tiles, h, up_in_rank = made
    del saved[:], made
    top_k, dtype, is_transposed = routing_weights.shape[1], down_weight.dtype, plan.is_transposed
    routing = Routing(permutation, inverse, offsets, tiles, top_k, plan.is_expert_parallel)
    up_updates, down_updates = plan.updates(factors)

    up: Any
    a: Any
    grad_x = grad_routing_weights = grad_up = grad_up_bias = grad_up_a = grad_up_b = None
    with without_autocast(grad_output.device.type):
        up = Projection.of(up_weight, up_updates, is_transposed) if up_weight is not None else None
        x: Any = None if hidden_states is None else hidden_states.to(dtype).contiguous()
        del hidden_states
        if plan.recomputes_h:
            if needs.hidden_states and may_stay_dense(up_weight):
                up = up.dense()
            h, up_in_rank = pre_activation(x, up, up_bias, routing)
        if not needs.up_weight and not needs.up_a:
            x = None

        grad, scales, scaled_weights = grad_output, None, routing_weights
        if dtype == torch.float16:  # G W2 leaves its range sooner than (g·G) W2: what divides G goes with g
            scales = _excess(grad_output)
            grad, scaled_weights = grad_output / scales, routing_weights * scales
        grad = grad.to(dtype).contiguous()
        down = Projection.of(down_weight, down_updates, is_transposed)
        down_grad_in_rank: Any = down.mT.to_rank(grad, routing, gather=True)
        grad_a = down.mT.project(grad, down_grad_in_rank, routing, gather=True)
        is_exact = scales is None and down_bias is None  # nothing is to come before it is rounded
        needs_a = needs.down_weight or needs.down_a or needs.down_b
        grad_h, inner, a = activation_backward(
            plan.activation,
            h,
            grad_a,
            scaled_weights.flatten(),
            needs=("a" if dtype == torch.float16 else "gated a") if needs_a else None,
            overwrite=plan.recomputes_h or may_overwrite(h),
            pairs=permutation,
            inner_dtype=routing_weights.dtype if is_exact else torch.float32,
        )
        del grad_a, h
        down_in_rank = down.to_rank(a, routing) if needs.down_b else None
        del down
        if needs.routing_weights:
            grad_routing_weights = inner.view_as(routing_weights)
            if scales is not None:
                grad_routing_weights *= scales

        grad_down, grad_down_bias, grad_down_a, grad_down_b = _down_gradients(
            grad_output, grad, a, routing, routing_weights, scaled_weights, down_in_rank, down_grad_in_rank, needs,
            None if down_bias is None else down_bias.dtype, is_transposed=is_transposed,
        )  # fmt: skip
        del a, grad, down_in_rank, down_grad_in_rank

        if needs.up_bias:
            assert up_bias is not None
            grad_up_bias = grouped_sum(grad_h, grad_h.new_ones(routing.num_rows, 1), offsets).to(up_bias.dtype)
        if needs.up_weight:
            grad_up = _grad_weight(x[routing.tokens], grad_h, offsets, is_transposed=is_transposed)
        if needs.up_b:
            grad_up_b = grouped_outer(grad_h, up_in_rank, offsets, out_dtype=torch.float32)
        if needs.hidden_states or needs.up_a:
            up = up.mT
            up_grad_in_rank: Any = up.to_rank(grad_h, routing)
        if needs.up_a:
            grad_up_a = grouped_outer(up_grad_in_rank, x, offsets, right_tokens=routing.tokens, out_dtype=torch.float32)
        if needs.hidden_states:
            grad_x = project_and_combine(
                grad_h, up, up_grad_in_rank, routing, None, plan.buffer_columns, grad_output.dtype
            )
        if down_bias is not None and grad_routing_weights is not None:
            grad_routing_weights += _bias_products(grad_output, top_k_index, down_bias, plan)

    if grad_routing_weights is not None:
        grad_routing_weights = grad_routing_weights.to(routing_weights.dtype)
    if plan.health is not None:
        count(
            plan.health, routing_weights, grad_routing_weights, inverse, offsets, choices=choices,
            bytes_saved=plan.bytes_saved,
        )  # fmt: skip
    grad_down_bias = (
        grad_down_bias if down_bias is None or grad_down_bias is None else grad_down_bias.to(down_bias.dtype)
    )
    grad_factors = chain(
        *split_gradients(grad_up_a, grad_up_b, up_updates), *split_gradients(grad_down_a, grad_down_b, down_updates)
    )
    return [grad_x, grad_routing_weights, grad_up, grad_up_bias, grad_down, grad_down_bias, *grad_factors]


def _down_gradients(
    grad_output: Tensor,
    grad: Tensor,
    a: Any,
    routing: Routing,
    routing_weights: Tensor,
    scaled_weights: Tensor,
    in_rank: Any,
    grad_in_rank: Any,
    needs: Needs,
    bias_dtype: torch.dtype | None,
    *,
    is_transposed: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of W2, of its bias, and of its updates' joined factors in float32.

    Args:
        grad_output: (T, H).
        grad: the same, in the weights' dtype, and in float16 divided where it is large.
        a: (S, I), g·a; in float16 a.
        routing: the rows.
        routing_weights: (T, K).
        scaled_weights: the same, times what `grad` was divided by.
        in_rank: `a` A2ᵀ (S, R).
        grad_in_rank: G B2 (S, R), of `grad`.
        needs: which of them.
        bias_dtype: of the bias.
        is_transposed: the weights' layout.
    """
    grad_weight = grad_bias = grad_a = grad_b = None
    if not (needs.down_weight or needs.down_bias or needs.down_a or needs.down_b):
        return grad_weight, grad_bias, grad_a, grad_b
    dtype, offsets, tokens = grad.dtype, routing.offsets, routing.tokens

    def by_row(weights: Tensor) -> Tensor:
        return weights.flatten().index_select(0, routing.permutation).unsqueeze(-1)

    # Small gates leave float16's range sooner in g·a, whose a is small too, than in g·G, as the default has them.
    weighs_the_gradient = dtype == torch.float16
    rows_grad, rows_tokens = grad, tokens
    if weighs_the_gradient and (needs.down_weight or needs.down_b or needs.down_bias):
        rows_grad, rows_tokens = (grad_output[tokens] * by_row(routing_weights)).to(dtype), None  # type: ignore[assignment]
    if needs.down_weight:
        rows = rows_grad if rows_tokens is None else rows_grad[tokens]
        grad_weight = _grad_weight(a, rows, offsets, is_transposed=is_transposed)
        del rows
    if needs.down_a:
        gated = (grad_in_rank * by_row(scaled_weights)).to(dtype) if weighs_the_gradient else grad_in_rank
        grad_a = grouped_outer(gated, a, offsets, out_dtype=torch.float32)
    if needs.down_b:
        grad_b = grouped_outer(rows_grad, in_rank, offsets, left_tokens=rows_tokens, out_dtype=torch.float32)
    if needs.down_bias:
        factors = grad.new_ones(routing.num_rows, 1) if weighs_the_gradient else by_row(routing_weights)
        grad_bias = grouped_sum(rows_grad, factors, offsets, tokens=rows_tokens).to(bias_dtype)
    return grad_weight, grad_bias, grad_a, grad_b


def _excess(gradient: Tensor) -> Tensor:
    """The power of two that brings each row below 2^6, (T, 1) float32; 1 where it is below, or not finite.

    Products with a column of W2 whose sizes add up to less than 2^10 then stay in float16's range, below 2^16. Digits
    are lost 2^20 below the row's largest value, far below the last digit of the products.
    """
    largest = gradient.to(torch.float32).abs().amax(1, keepdim=True)
    _, exponent = torch.frexp(largest)
    power = torch.ldexp(torch.ones_like(largest), exponent - 6).clamp_min(1.0)
    return power.where(largest.isfinite(), 1.0)


def _grad_weight(inputs: Tensor, grad_outputs: Tensor, offsets: Tensor, *, is_transposed: bool) -> Tensor:
    left, right = (inputs, grad_outputs) if is_transposed else (grad_outputs, inputs)
    return grouped_outer(left, right, offsets)


def _add_biases(output: Tensor, routing_weights: Tensor, top_k_index: Tensor, bias: Tensor, plan: Plan) -> None:
    """Adds Σ_k g · b2 to a float32 (T, H), slot by slot: no rows, and no token meets another expert's bias."""
    bias = _with_nonlocal(bias.to(torch.float32), plan)
    for slot, experts in enumerate(top_k_index.clamp(max=bias.shape[0] - 1).unbind(1)):
        output.addcmul_(bias[experts], routing_weights[:, slot, None].to(torch.float32))


def _bias_products(grad_output: Tensor, top_k_index: Tensor, bias: Tensor, plan: Plan) -> Tensor:
    """<b2, G> of every (token, slot) pair, (T, K) float32."""
    bias = _with_nonlocal(bias.to(torch.float32), plan)
    products = grad_output.to(torch.float32) @ bias.t()
    return products.gather(1, top_k_index.clamp(max=bias.shape[0] - 1))


def _with_nonlocal(bias: Tensor, plan: Plan) -> Tensor:
    """The biases (E, H), with zeros for other ranks' experts after the last."""
    return torch.cat([bias, bias.new_zeros(1, bias.shape[1])]) if plan.is_expert_parallel else bias


def num_buffer_columns(output_buffer_mib: float, num_rows: int, hidden_size: int, element_size: int) -> int:
    """How many hidden features of all rows fit the buffer, in whole tiles."""
    columns = int(output_buffer_mib * 2**20) // max(num_rows * element_size, 1)
    return min(max(columns // MIN_BUFFER_COLUMNS, 1) * MIN_BUFFER_COLUMNS, hidden_size)
