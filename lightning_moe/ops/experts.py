"""The operation: a mixture of experts whose gate gradient needs no output of the down projection.

Letters: T tokens, K top_k, S = T x K rows (token, slot) sorted by expert, H hidden, I intermediate, E experts.
The *gate* g is a row's routing weight. Per row, with hidden x, weights W1 (gate_up) and W2 (down) and optional biases:

    h = x W1ᵀ + b1        a = act(h)        y = a W2ᵀ + b2        out_t = Σ_k g · y

The default implementation keeps y to form dg = <dOut, y>. Linearity of the down projection gives the same number from
what backward computes anyway. With G = dOut gathered to the rows, not multiplied by the gate:

    da' = G W2            dg = <a, da'> + <b2, G>            da = g · da'            dh = act'(h) · da
    dx = Σ_k dh W1        dW1 = dhᵀ x        db1 = Σ dh       dW2 = (g·a)ᵀ G          db2 = Σ g·G

Low-rank updates of the weights stay unmerged: with x A1ᵀ, a A2ᵀ and G B2, all (S, r), and the scalings in B1 and B2,

    h += (x A1ᵀ) B1ᵀ      y += (a A2ᵀ) B2ᵀ      da' += (G B2) A2      dx += Σ_k (dh B1) A1
    dB2 = Gᵀ (g · a A2ᵀ)      dA2 = (G B2)ᵀ (g·a)      dB1 = dhᵀ (x A1ᵀ)      dA1 = (dh B1)ᵀ x

Exact for any gate: nothing is divided by it. Kept for backward: h (or x, to make h again), the routing, the gates, the
(S, r) products, and x at token level where W1 or A1 wants a gradient. Not kept: gathered x, a, y, g·y. The `down_proj`
bias is linear at token level too, so it never touches a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_moe.ops.autograd import FirstOrderOnly, Owner, anchor, graph_is_kept, has_saved_tensors_hooks
from lightning_moe.ops.grouped import (
    Activation,
    activate,
    activation_backward,
    grouped_outer,
    grouped_sum,
    product_tiles,
    silu_gated,
)
from lightning_moe.ops.low_rank import LowRank, split_gradients
from lightning_moe.ops.projection import Projection, pre_activation, project_and_combine
from lightning_moe.ops.routing import Routing, sort_by_expert
from lightning_moe.ops.validation import check_output_buffer, shape_problem, unsupported_weights

# The fewest hidden features that the output buffer takes at a time: the width of a product's tile.
MIN_BUFFER_COLUMNS = 256


@dataclass(frozen=True)
class _Plan:
    """What of a call is neither an input nor saved.

    Attributes:
        activation: (R, N) to (R, I), row by row.
        is_transposed: weights are (E, in, out) rather than (E, out, in).
        intermediate: I, what the down projection takes.
        buffer_columns: hidden features that the buffer of projected rows takes at a time.
        recomputes_h: whether backward projects x again instead of keeping h.
        is_expert_parallel: whether ids of E and above name other ranks' experts.
        anchor: by which second derivatives raise, see `autograd.anchor`; None where no backward will come.
        up_scalings: of the updates of W1; their factors come as a, b, a, b, ... after the other tensors,
        down_scalings: and those of W2's after them.
    """

    activation: Activation
    is_transposed: bool
    intermediate: int
    buffer_columns: int
    recomputes_h: bool
    is_expert_parallel: bool
    anchor: Tensor | None
    up_scalings: tuple[float, ...]
    down_scalings: tuple[float, ...]

    def updates(self, factors: Sequence[Tensor]) -> tuple[list[LowRank], list[LowRank]]:
        """The updates of W1 and of W2."""
        scalings = (*self.up_scalings, *self.down_scalings)
        found = [LowRank(a, b, s) for a, b, s in zip(factors[::2], factors[1::2], scalings, strict=True)]
        return found[: len(self.up_scalings)], found[len(self.up_scalings) :]


@dataclass(frozen=True)
class _Intermediates:
    """What `_FromActivation` continues with.

    Attributes:
        routing: the rows.
        tiles: of the products.
        h: (S, N); None where `a` is there already.
        a: (S, I); None where it is still to be made of h.
        down: the projection.
        down_in_rank: a A2ᵀ (S, R); None where it is still to be made of a.
        down_bias: (E, H).
        routing_weights: (T, K).
        top_k_index: (T, K).
        out_dtype: of the output.
    """

    routing: Routing
    tiles: Tensor | None
    h: Tensor | None
    a: Tensor | None
    down: Projection
    down_in_rank: Tensor | None
    down_bias: Tensor | None
    routing_weights: Tensor
    top_k_index: Tensor
    out_dtype: torch.dtype


class _UntilActivation(torch.autograd.Function):
    """The operation up to the activation. Saves what the backward of the whole operation needs.

    Returns a placeholder, which stands for the output and hands its gradient on, and the intermediates.
    `_FromActivation` saves nothing: activation checkpointing, whose second forward ends when everything saved has been
    made again, does not run the down projection a second time.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_states: Tensor,
        routing_weights: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        top_k_index: Tensor,
        plan: _Plan,
        *factors: Tensor,
    ) -> tuple[Tensor, _Intermediates]:
        dtype, is_transposed = down_weight.dtype, plan.is_transposed
        routing = sort_by_expert(top_k_index, down_weight.shape[0], is_expert_parallel=plan.is_expert_parallel)
        x = hidden_states.to(dtype).contiguous()
        tiles = product_tiles(x, routing.offsets, routing.num_rows)
        up_updates, down_updates = plan.updates(factors)
        needs_up_a, needs_up_b, _, needs_down_b = _needs_factors(ctx, len(up_updates))
        a: Any = None
        down_in_rank = None
        with torch.autocast(x.device.type, enabled=False):
            up = Projection.of(up_weight, up_updates, is_transposed)
            h, up_in_rank = pre_activation(x, up, up_bias, routing, tiles)
            del x, up
            down = Projection.of(down_weight, down_updates, is_transposed)
            saved_h = h if plan.anchor is not None and not plan.recomputes_h else None
            if saved_h is None or needs_down_b:
                a = _activated(plan, h)
            if needs_down_b:
                down_in_rank = down.to_rank(a, routing, tiles)
        placeholder = hidden_states.new_empty(1, 1).expand(hidden_states.shape)
        intermediates = _Intermediates(
            routing, tiles, h if a is None else None, a, down, down_in_rank, down_bias, routing_weights, top_k_index,
            hidden_states.dtype,
        )  # fmt: skip

        needs_x, _, needs_up, needs_up_bias, _, _ = ctx.needs_input_grad[:6]
        ctx.plan, ctx.hidden_dtype, ctx.top_k = plan, hidden_states.dtype, routing.top_k
        ctx.owner, ctx.is_interrupted = Owner(has_hooks=has_saved_tensors_hooks()), False
        if saved_h is not None:
            ctx.owner.mark(saved_h)
        uses_x = needs_up or plan.recomputes_h or needs_up_a
        ctx.save_for_backward(
            hidden_states if uses_x else None,
            routing_weights,
            up_weight if needs_x or uses_x else None,
            up_bias if needs_up_bias or plan.recomputes_h else None,
            down_weight,
            down_bias,
            top_k_index if down_bias is not None else None,
            routing.permutation,
            routing.inverse,
            routing.offsets,
            tiles,
            saved_h,
            up_in_rank if needs_up_b and not plan.recomputes_h else None,
            down_in_rank,
            *factors,
        )
        return placeholder, intermediates

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad_output: Tensor, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.is_interrupted:
            raise RuntimeError(
                "moe_experts: an earlier backward of this graph failed after it had overwritten what forward saved: "
                "run forward again"
            )
        with torch.no_grad():
            gradients = _gradients(ctx, grad_output, list(ctx.saved_tensors))
        ctx.is_interrupted = False
        if torch.is_grad_enabled():  # create_graph=True
            anchor = ctx.plan.anchor
            gradients = [g if g is None else FirstOrderOnly.apply(anchor, grad_output, g) for g in gradients]
        return *gradients[:6], None, None, *gradients[6:]


class _FromActivation(torch.autograd.Function):
    """The down projection and the sum over the slots. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, made: _Intermediates, plan: _Plan) -> Tensor:  # type: ignore[override]
        with torch.autocast(placeholder.device.type, enabled=False):
            a, in_rank = made.a, made.down_in_rank
            if a is None:
                a = _activated(plan, made.h)
            if in_rank is None:
                in_rank = made.down.to_rank(a, made.routing, made.tiles)
            dtype = made.out_dtype if made.down_bias is None else torch.float32  # rounded once, the bias added
            output = project_and_combine(
                a, made.down, in_rank, made.routing, made.tiles, made.routing_weights, plan.buffer_columns, dtype
            )
            del a, in_rank
            if made.down_bias is not None:
                _add_biases(output, made.routing_weights, made.top_k_index, made.down_bias, plan)
                output = output.to(made.out_dtype)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad_output, None, None


def _activated(plan: _Plan, h: Any) -> Tensor:
    """A (S, I) of h (S, N)."""
    a = activate(plan.activation, h).to(h.dtype)
    if a.shape != (h.shape[0], plan.intermediate):
        raise ValueError(
            f"moe_experts: the activation makes {tuple(a.shape)} of {tuple(h.shape)}, but down_proj takes "
            f"{plan.intermediate} features"
        )
    return a


def _needs_factors(ctx: Any, num_up_updates: int) -> tuple[bool, bool, bool, bool]:
    """Whether any A1, B1, A2, B2 wants a gradient."""
    up, down = ctx.needs_input_grad[8 : 8 + 2 * num_up_updates], ctx.needs_input_grad[8 + 2 * num_up_updates :]
    return any(up[::2]), any(up[1::2]), any(down[::2]), any(down[1::2])


def _gradients(ctx: Any, grad_output: Tensor, saved: list[Any]) -> list[Tensor | None]:
    """The gradients of the six floating-point arguments and of the factors, None for one that wants none."""
    hidden_states, routing_weights, up_weight, up_bias, down_weight, down_bias, top_k_index, *saved = saved
    permutation, inverse, offsets, tiles, h, up_in_rank, down_in_rank, *factors = saved
    tokens = permutation // ctx.top_k
    routing = Routing(permutation, inverse, tokens, offsets, ctx.top_k, ctx.plan.is_expert_parallel)
    needs_x, needs_routing_weights, needs_up, needs_up_bias, needs_down, needs_down_bias = ctx.needs_input_grad[:6]
    plan, dtype, is_transposed = ctx.plan, down_weight.dtype, ctx.plan.is_transposed
    up_updates, down_updates = plan.updates(factors)
    needs_up_a, needs_up_b, needs_down_a, needs_down_b = _needs_factors(ctx, len(up_updates))
    # Small gates leave float16's range sooner in g·a, whose a is small too, than in g·G, as the default has them.
    weighs_the_gradient = dtype == torch.float16

    up: Any
    a: Any
    grad_x = grad_routing_weights = grad_up = grad_up_bias = grad_down = grad_down_bias = None
    grad_up_a = grad_up_b = grad_down_a = grad_down_b = None
    with torch.autocast(grad_output.device.type, enabled=False):
        up = Projection.of(up_weight, up_updates, is_transposed) if up_weight is not None else None
        x: Any = None if hidden_states is None else hidden_states.to(dtype).contiguous()
        if plan.recomputes_h:
            h, up_in_rank = pre_activation(x, up, up_bias, routing, tiles)

        row_weights = routing_weights.flatten().index_select(0, permutation)
        grad, row_scales, scaled_row_weights = grad_output, None, row_weights
        if dtype == torch.float16:  # G W2 leaves its range sooner than (g·G) W2: what divides G goes with g
            scales = _excess(grad_output)
            grad, row_scales = grad_output / scales, scales[tokens, 0]
            scaled_row_weights = row_weights * row_scales
        grad = grad.to(dtype).contiguous()
        back = Projection.of(down_weight, down_updates, is_transposed).mT
        down_grad_in_rank: Any = back.to_rank(grad, routing, tiles, gather=True)
        grad_a = back.project(grad, down_grad_in_rank, routing, tiles, gather=True)
        overwrites_saved = not (plan.recomputes_h or graph_is_kept()) and ctx.owner.may_overwrite(h)
        ctx.is_interrupted = overwrites_saved and not ctx.owner.has_hooks  # which would have h made again
        grad_h, inner, a = activation_backward(
            plan.activation,
            h,
            grad_a,
            scaled_row_weights,
            needs=("a" if weighs_the_gradient else "gated a") if needs_down or needs_down_a else None,
            overwrite=plan.recomputes_h or overwrites_saved,
        )
        del grad_a, h, saved, back
        if row_scales is not None:
            inner *= row_scales
        if needs_routing_weights:
            grad_routing_weights = inner.index_select(0, inverse).view_as(routing_weights)

        weight_column = row_weights.unsqueeze(-1)
        rows_grad, rows_tokens = grad, tokens
        if weighs_the_gradient and (needs_down or needs_down_b or needs_down_bias):
            rows_grad, rows_tokens = (grad_output[tokens] * weight_column).to(dtype), None
        if needs_down:
            rows = rows_grad if rows_tokens is None else rows_grad[tokens]
            grad_down = _grad_weight(a, rows, offsets, is_transposed=is_transposed)
            del rows
        if needs_down_a:
            gated = down_grad_in_rank
            if weighs_the_gradient:
                gated = (gated * scaled_row_weights[:, None]).to(dtype)
            grad_down_a = grouped_outer(gated, a, offsets, out_dtype=torch.float32)
        if needs_down_b:
            gated = down_in_rank if weighs_the_gradient else (down_in_rank * weight_column).to(dtype)
            grad_down_b = grouped_outer(rows_grad, gated, offsets, left_tokens=rows_tokens, out_dtype=torch.float32)
        if needs_down_bias:
            factor = torch.ones_like(weight_column) if weighs_the_gradient else weight_column
            grad_down_bias = grouped_sum(rows_grad, factor, offsets, tokens=rows_tokens).to(down_bias.dtype)
        del a, rows_grad

        if needs_up_bias:
            grad_up_bias = grouped_sum(grad_h, torch.ones_like(weight_column), offsets).to(up_bias.dtype)
        if needs_up:
            grad_up = _grad_weight(x[tokens], grad_h, offsets, is_transposed=is_transposed)
        if needs_up_b:
            grad_up_b = grouped_outer(grad_h, up_in_rank, offsets, out_dtype=torch.float32)
        if needs_x or needs_up_a:
            up_grad_in_rank: Any = up.mT.to_rank(grad_h, routing, tiles)
        if needs_up_a:
            grad_up_a = grouped_outer(up_grad_in_rank, x, offsets, right_tokens=tokens, out_dtype=torch.float32)
        if needs_x:
            grad_x = project_and_combine(
                grad_h, up.mT, up_grad_in_rank, routing, tiles, None, plan.buffer_columns, ctx.hidden_dtype
            )
        if down_bias is not None and grad_routing_weights is not None:
            grad_routing_weights += _bias_products(grad_output, top_k_index, down_bias, plan)

    grad_routing_weights = grad_routing_weights.to(routing_weights.dtype) if grad_routing_weights is not None else None
    grad_factors = chain(
        *split_gradients(grad_up_a, grad_up_b, up_updates), *split_gradients(grad_down_a, grad_down_b, down_updates)
    )
    return [grad_x, grad_routing_weights, grad_up, grad_up_bias, grad_down, grad_down_bias, *grad_factors]


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


def _add_biases(output: Tensor, routing_weights: Tensor, top_k_index: Tensor, bias: Tensor, plan: _Plan) -> None:
    """Adds Σ_k g · b2 to a float32 (T, H), slot by slot: no rows, and no token meets another expert's bias."""
    bias = _with_nonlocal(bias.to(torch.float32), plan)
    for slot, experts in enumerate(top_k_index.clamp(max=bias.shape[0] - 1).unbind(1)):
        output.addcmul_(bias[experts], routing_weights[:, slot, None].to(torch.float32))


def _bias_products(grad_output: Tensor, top_k_index: Tensor, bias: Tensor, plan: _Plan) -> Tensor:
    """<b2, G> of every (token, slot) pair, (T, K) float32."""
    bias = _with_nonlocal(bias.to(torch.float32), plan)
    products = grad_output.to(torch.float32) @ bias.t()
    return products.gather(1, top_k_index.clamp(max=bias.shape[0] - 1))


def _with_nonlocal(bias: Tensor, plan: _Plan) -> Tensor:
    """The biases (E, H), with zeros for other ranks' experts after the last."""
    return torch.cat([bias, bias.new_zeros(1, bias.shape[1])]) if plan.is_expert_parallel else bias


def moe_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    gate_up_proj_bias: Tensor | None = None,
    down_proj_bias: Tensor | None = None,
    activation: Activation = silu_gated,
    is_transposed: bool = False,
    gate_up_updates: Sequence[LowRank] = (),
    down_updates: Sequence[LowRank] = (),
    output_buffer_mib: float = 512,
    recompute_gate_up: bool = False,
    is_expert_parallel: bool = False,
) -> Tensor:
    """Applies each token's experts and sums their outputs, weighted by the gates.

    Products are computed in the weights' dtype and accumulated over the slots in float32; autocast does not change
    that. Gradients of first order reach every floating-point argument that asks for one; asking for a second order
    raises.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, K) integer, the experts of each token, in [0, E); checked on the CPU. Repeats are allowed.
        top_k_weights: (T, K) floating, the gates: any sign, exact zeros too.
        gate_up_proj: (E, N, H), or (E, H, N) if `is_transposed`; N is what `activation` takes (2 I for a gated one).
        down_proj: (E, H, I), or (E, I, H) if `is_transposed`; same dtype as `gate_up_proj`.
        gate_up_proj_bias: (E, N), any floating dtype.
        down_proj_bias: (E, H), any floating dtype. The gates' gradient stays exact with it.
        activation: (R, N) to (R, I), row by row, without parameters or randomness; it is called again in backward.
        is_transposed: the weights' layout.
        gate_up_updates: low-rank updates of `gate_up_proj`, all applied; the sum W + BA is never formed.
        down_updates: the same for `down_proj`.
        output_buffer_mib: bounds the buffer of the experts' outputs, (S, H) if nothing did, in MiB. Where it is
            smaller, all rows take a part of the hidden features at a time, at least 256 of them (the width of a
            product's tile), so that no expert is left with few rows. Results do not depend on it beyond rounding.
        recompute_gate_up: save `hidden_states` for backward and project them a second time there, rather than save the
            projection, (S, N). Results are the same bits. Not worth it under activation checkpointing, which projects
            a second time anyway.
        is_expert_parallel: the weights are some of the layer's experts, and ids of E and above name others', on other
            ranks: such a slot adds nothing to the output and its gate gets a gradient of zero.

    Returns:
        (T, H), the dtype of `hidden_states`.

    Raises:
        ValueError: on shapes that do not fit each other, an expert out of range (checked where that costs no
            synchronisation: on the CPU), or an `output_buffer_mib` that is not positive.
        TypeError: on a dtype other than float32, bfloat16 or float16, or sizes that `torch.nn.functional.grouped_mm`
            does not take (rows of whole multiples of 16 bytes).
    """
    check_output_buffer(output_buffer_mib)
    if problem := shape_problem(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias,
        gate_up_updates, down_updates, is_transposed=is_transposed, is_expert_parallel=is_expert_parallel,
    ):  # fmt: skip
        raise ValueError(f"moe_experts: {problem}")
    if problem := unsupported_weights(gate_up_proj, down_proj):
        raise TypeError(f"moe_experts: {problem}")
    num_tokens, hidden_size = hidden_states.shape
    top_k = top_k_index.shape[1]
    if is_expert_parallel:  # whatever stands in such a slot adds nothing, be it NaN
        top_k_weights = top_k_weights.masked_fill(top_k_index >= down_proj.shape[0], 0)

    inputs = (hidden_states, top_k_weights, gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias)
    factors = [factor for update in (*gate_up_updates, *down_updates) for factor in (update.a, update.b)]
    wanting = [tensor for tensor in (*inputs, *factors) if tensor is not None and tensor.requires_grad]
    records = torch.is_grad_enabled() and bool(wanting)
    buffer_columns = _buffer_columns(output_buffer_mib, num_tokens * top_k, hidden_size, down_proj.element_size())
    plan = _Plan(
        activation=activation,
        is_transposed=is_transposed,
        intermediate=down_proj.shape[1 if is_transposed else 2],
        buffer_columns=buffer_columns,
        recomputes_h=recompute_gate_up,
        is_expert_parallel=is_expert_parallel,
        anchor=anchor(wanting) if records else None,
        up_scalings=tuple(update.scaling for update in gate_up_updates),
        down_scalings=tuple(update.scaling for update in down_updates),
    )
    placeholder, intermediates = _UntilActivation.apply(*inputs, top_k_index.long(), plan, *factors)
    return _FromActivation.apply(placeholder, intermediates, plan)


def _buffer_columns(output_buffer_mib: float, num_rows: int, hidden_size: int, element_size: int) -> int:
    """How many hidden features of all rows fit the buffer, in whole tiles."""
    columns = int(output_buffer_mib * 2**20) // max(num_rows * element_size, 1)
    return min(max(columns // MIN_BUFFER_COLUMNS, 1) * MIN_BUFFER_COLUMNS, hidden_size)
