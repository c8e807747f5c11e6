"""The operation: a mixture of experts whose gate gradient needs no output of the down projection.

Letters: T tokens, K top_k, S = T x K rows (token, slot) sorted by expert, H hidden, I intermediate, E experts.
Per row, with gate g, hidden x, weights W1 (gate_up) and W2 (down) and optional biases:

    h = x W1ᵀ + b1        a = act(h)        y = a W2ᵀ + b2        out_t = Σ_k g · y

Stock code keeps y to form dg = <dOut, y>. Linearity of the down projection gives the same number from what the
backward computes anyway. With G = dOut gathered to the rows, not multiplied by the gate:

    da' = G W2            dg = <a, da'> + <b2, G>            da = g · da'            dh = act'(h) · da
    dx = Σ_k dh W1        dW1 = dhᵀ x        db1 = Σ dh       dW2 = (g·a)ᵀ G          db2 = Σ g·G

Low-rank updates of the weights stay apart: with x A1ᵀ, a A2ᵀ and G B2, all (S, r), and the scalings in B1 and B2,

    h += (x A1ᵀ) B1ᵀ      y += (a A2ᵀ) B2ᵀ      da' += (G B2) A2      dx += Σ_k (dh B1) A1
    dB2 = Gᵀ (g · a A2ᵀ)      dA2 = (G B2)ᵀ (g·a)      dB1 = dhᵀ (x A1ᵀ)      dA1 = (dh B1)ᵀ x

Exact for any gate: nothing is divided by it. Kept for backward: h (or x, to make h again), the routing, the gates, the
(S, r) products, and x at token level where W1 or A1 wants a gradient. Not kept: gathered x, a, y, g·y. The down bias
is linear at token level too, so it never touches a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_moe.ops.grouped import (
    Activation,
    activate,
    activation_backward,
    combine,
    grouped_linear,
    grouped_outer,
    grouped_sum,
    product_tiles,
    silu_gated,
)
from lightning_moe.ops.low_rank import LowRank, join, split_gradients
from lightning_moe.ops.routing import Routing, sort_by_expert
from lightning_moe.ops.validation import ChunkTokens, check_chunk_tokens, shape_problem, unsupported

# The buffer of projected rows at "auto", bytes, and the fewest hidden features that it takes at a time.
AUTO_CHUNK_BYTES = 512 * 2**20
CHUNK_GRANULE = 256

_OWNER = "_lightning_moe_owner"

# PyTorch's private answer to whether a backward may run again.
GRAPH_QUESTION = "torch._C._autograd._get_current_graph_task_keep_graph"


@dataclass(frozen=True)
class _Plan:
    """What of a call is neither an input nor saved.

    Attributes:
        activation: (R, N) to (R, I), row by row.
        in_first: weights are (E, in, out) rather than (E, out, in).
        intermediate: I, what the down projection takes.
        chunk_columns: hidden features of the projected rows in flight at once.
        recomputes_h: whether backward projects x again instead of keeping h.
        is_expert_parallel: whether ids of E and above name other processes' experts.
        anchor: what second derivatives are refused by, see `_anchor`; None where no backward will come.
        up_scalings: of the updates of W1; their factors come as a, b, a, b, ... after the other tensors,
        down_scalings: and those of W2's after them.
    """

    activation: Activation
    in_first: bool
    intermediate: int
    chunk_columns: int
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


class _FirstOrderOnly(torch.autograd.Function):
    """Passes a gradient through and raises when it is itself differentiated.

    `once_differentiable` would not do: where the incoming gradient is a constant it hands out gradients without a
    graph, and a gradient penalty silently lacks its term.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, incoming: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "moe_experts has no second derivative: for a gradient penalty or a Hessian, train without the callback"
        )


def _anchor(inputs: Sequence[Tensor]) -> Tensor:
    """An empty tensor that depends on every one of the inputs, without holding on to any of them."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return torch.cat([tensor[:0].reshape(-1) for tensor in inputs])


class _Owner:
    """Says which call of forward made a tensor, by a mark on its memory that survives what hooks do, but for a copy."""

    def __init__(self, *, has_hooks: bool) -> None:
        self.has_hooks = has_hooks

    def mark(self, tensor: Tensor) -> None:
        """Marks a tensor that this call made."""
        setattr(tensor.untyped_storage(), _OWNER, self)

    def may_overwrite(self, tensor: Tensor) -> bool:
        """Whether nobody else can see a saved tensor, once backward has it.

        Saved-tensor hooks may keep what they packed, or a copy of it. Activation checkpointing, a hook as well, has the
        tensor made again by another call, for this backward alone.
        """
        owner = getattr(tensor.untyped_storage(), _OWNER, None)
        return not self.has_hooks or (owner is not None and owner is not self)


def _has_saved_tensors_hooks() -> bool:
    """Whether saved tensors go through hooks here."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("moe_experts only asks whether there are any"):
            return False
    except RuntimeError:
        return True


@dataclass(frozen=True)
class _Work:
    """What the way down takes over from the way up.

    Attributes:
        routing: the rows.
        tiles: of the products.
        h: (S, N); None where `a` is there already.
        a: (S, I); None where it is still to be made of h.
        down: the projection.
        down_small: a A2ᵀ (S, R); None where it is still to be made of a.
        down_bias: (E, H).
        gates: (T, K).
        top_k_index: (T, K).
        out_dtype: of the output.
    """

    routing: Routing
    tiles: Tensor | None
    h: Tensor | None
    a: Tensor | None
    down: "_Projection"
    down_small: Tensor | None
    down_bias: Tensor | None
    gates: Tensor
    top_k_index: Tensor
    out_dtype: torch.dtype


class _Up(torch.autograd.Function):
    """The way up, which keeps what the backward of both ways needs.

    Returns a ticket, which stands for the output and hands its gradient on, and the work that is left. The way down
    keeps nothing: so activation checkpointing, whose second forward ends when all that is kept has been made again,
    does not project down a second time.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_states: Tensor,
        gates: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        top_k_index: Tensor,
        plan: _Plan,
        *factors: Tensor,
    ) -> tuple[Tensor, _Work]:
        dtype, in_first = down_weight.dtype, plan.in_first
        routing = sort_by_expert(top_k_index, down_weight.shape[0], is_expert_parallel=plan.is_expert_parallel)
        x = hidden_states.to(dtype).contiguous()
        tiles = product_tiles(x, routing.offsets, routing.num_rows)
        up_updates, down_updates = plan.updates(factors)
        needs_up_a, needs_up_b, _, needs_down_b = _needs_factors(ctx, len(up_updates))
        a: Any = None
        down_small = None
        with torch.autocast(x.device.type, enabled=False):
            up = _Projection.of(up_weight, up_updates, in_first)
            h, up_small = _pre_activation(x, up, up_bias, routing, tiles)
            del x, up
            down = _Projection.of(down_weight, down_updates, in_first)
            saved_h = h if plan.anchor is not None and not plan.recomputes_h else None
            if saved_h is None or needs_down_b:
                a = _activated(plan, h)
            if needs_down_b:
                down_small = down.reduce(a, routing, tiles)
        ticket = hidden_states.new_empty(1, 1).expand(hidden_states.shape)
        work = _Work(
            routing, tiles, h if a is None else None, a, down, down_small, down_bias, gates, top_k_index,
            hidden_states.dtype,
        )  # fmt: skip

        needs_x, _, needs_up, needs_up_bias, _, _ = ctx.needs_input_grad[:6]
        ctx.plan, ctx.hidden_dtype, ctx.top_k = plan, hidden_states.dtype, routing.top_k
        ctx.owner, ctx.is_interrupted = _Owner(has_hooks=_has_saved_tensors_hooks()), False
        if saved_h is not None:
            ctx.owner.mark(saved_h)
        uses_x = needs_up or plan.recomputes_h or needs_up_a
        ctx.save_for_backward(
            hidden_states if uses_x else None,
            gates,
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
            up_small if needs_up_b and not plan.recomputes_h else None,
            down_small,
            *factors,
        )
        return ticket, work

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
            gradients = [g if g is None else _FirstOrderOnly.apply(anchor, grad_output, g) for g in gradients]
        return *gradients[:6], None, None, *gradients[6:]


class _Down(torch.autograd.Function):
    """The way down and the sum over the slots, which keeps nothing."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, work: _Work, plan: _Plan) -> Tensor:  # type: ignore[override]
        with torch.autocast(ticket.device.type, enabled=False):
            a = _activated(plan, work.h) if work.a is None else work.a
            small = work.down.reduce(a, work.routing, work.tiles) if work.down_small is None else work.down_small
            rounded_once = work.out_dtype if work.down_bias is None else torch.float32  # the bias added
            output = _project_and_combine(
                a, work.down, small, work.routing, work.tiles, work.gates, plan.chunk_columns, rounded_once
            )
            del a, small
            if work.down_bias is not None:
                _add_biases(output, work.gates, work.top_k_index, work.down_bias, plan)
                output = output.to(work.out_dtype)
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


@dataclass(frozen=True)
class _Projection:
    """Rows times their expert's W + BA, the sum never formed; `mT` is the way back.

    Attributes:
        weight: (E, in, out), a view of W.
        a: (E, in, R), the low-rank updates' way down to the rank; None where there are none.
        b: (E, R, out), and their way up.
    """

    weight: Tensor
    a: Tensor | None
    b: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, updates: list[LowRank], in_first: bool) -> "_Projection":
        """The projection in the layout that the products take."""
        a, b = join(updates, weight.dtype) if updates else (None, None)
        view = weight if in_first else weight.mT
        return cls(view, None if a is None else a.mT, None if b is None else b.mT)

    @property
    def mT(self) -> "_Projection":  # noqa: N802
        """What takes a gradient back through the projection."""
        return _Projection(self.weight.mT, None if self.b is None else self.b.mT, None if self.a is None else self.a.mT)

    def reduce(self, rows: Tensor, routing: Routing, tiles: Tensor | None, *, gather: bool = False) -> Tensor | None:
        """The rows' (S, R) part in the updates; `gather` where the rows are one per token."""
        if self.a is None:
            return None
        return grouped_linear(rows, self.a, routing.offsets, tokens=routing.tokens if gather else None, tiles=tiles)

    def project(
        self,
        rows: Tensor,
        small: Tensor | None,
        routing: Routing,
        tiles: Tensor | None,
        *,
        gather: bool = False,
        columns: slice = slice(None),
        bias: Tensor | None = None,
    ) -> Tensor:
        """(S, out), or some columns of it; `small` is what `reduce` made of the rows, `bias` (E, out) is added."""
        low_rank = None if self.b is None or small is None else (small, self.b[..., columns])
        tokens = routing.tokens if gather else None
        return grouped_linear(
            rows, self.weight[..., columns], routing.offsets, tokens=tokens, tiles=tiles, low_rank=low_rank,
            bias=None if bias is None else (bias, routing.expert_of_row()), absent=routing.absent(),
        )  # fmt: skip


def _needs_factors(ctx: Any, num_up_updates: int) -> tuple[bool, bool, bool, bool]:
    """Whether any A1, B1, A2, B2 wants a gradient."""
    up, down = ctx.needs_input_grad[8 : 8 + 2 * num_up_updates], ctx.needs_input_grad[8 + 2 * num_up_updates :]
    return any(up[::2]), any(up[1::2]), any(down[::2]), any(down[1::2])


def _pre_activation(
    x: Tensor, up: _Projection, bias: Tensor | None, routing: Routing, tiles: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The pre-activation h (S, N), and x A1ᵀ (S, R) where W1 has updates."""
    small = up.reduce(x, routing, tiles, gather=True)
    h = up.project(x, small, routing, tiles, gather=True, bias=bias)
    return h, small


def _gradients(ctx: Any, grad_output: Tensor, saved: list[Any]) -> list[Tensor | None]:
    """The gradients of the six floating-point arguments and of the factors, None for one that wants none."""
    hidden_states, gates, up_weight, up_bias, down_weight, down_bias, top_k_index, *saved = saved
    permutation, inverse, offsets, tiles, h, up_small, down_small, *factors = saved
    tokens = permutation // ctx.top_k
    routing = Routing(permutation, inverse, tokens, offsets, ctx.top_k, ctx.plan.is_expert_parallel)
    needs_x, needs_gates, needs_up, needs_up_bias, needs_down, needs_down_bias = ctx.needs_input_grad[:6]
    plan, dtype, in_first = ctx.plan, down_weight.dtype, ctx.plan.in_first
    up_updates, down_updates = plan.updates(factors)
    needs_up_a, needs_up_b, needs_down_a, needs_down_b = _needs_factors(ctx, len(up_updates))
    # Small gates leave float16's range sooner in g·a, whose a is small too, than in g·G, where stock code has them.
    gates_the_gradient = dtype == torch.float16

    up: Any
    a: Any
    grad_x = grad_gates = grad_up = grad_up_bias = grad_down = grad_down_bias = None
    grad_up_a = grad_up_b = grad_down_a = grad_down_b = None
    with torch.autocast(grad_output.device.type, enabled=False):
        up = _Projection.of(up_weight, up_updates, in_first) if up_weight is not None else None
        x: Any = None if hidden_states is None else hidden_states.to(dtype).contiguous()
        if plan.recomputes_h:
            h, up_small = _pre_activation(x, up, up_bias, routing, tiles)

        row_gates = gates.flatten().index_select(0, permutation)
        grad, row_scales, scaled_gates = grad_output, None, row_gates
        if dtype == torch.float16:  # G W2 leaves its range sooner than (g·G) W2: what divides G goes with g
            scales = _excess(grad_output)
            grad, row_scales = grad_output / scales, scales[tokens, 0]
            scaled_gates = row_gates * row_scales
        grad = grad.to(dtype).contiguous()
        back = _Projection.of(down_weight, down_updates, in_first).mT
        down_grad_small: Any = back.reduce(grad, routing, tiles, gather=True)
        grad_a = back.project(grad, down_grad_small, routing, tiles, gather=True)
        overwrites_saved = not (plan.recomputes_h or _graph_is_kept()) and ctx.owner.may_overwrite(h)
        ctx.is_interrupted = overwrites_saved and not ctx.owner.has_hooks  # which would have h made again
        grad_h, inner, a = activation_backward(
            plan.activation,
            h,
            grad_a,
            scaled_gates,
            needs=("a" if gates_the_gradient else "gated a") if needs_down or needs_down_a else None,
            overwrite=plan.recomputes_h or overwrites_saved,
        )
        del grad_a, h, saved, back
        if row_scales is not None:
            inner *= row_scales
        if needs_gates:
            grad_gates = inner.index_select(0, inverse).view_as(gates)

        gate_column = row_gates.unsqueeze(-1)
        rows_grad, rows_tokens = grad, tokens
        if gates_the_gradient and (needs_down or needs_down_b or needs_down_bias):
            rows_grad, rows_tokens = (grad_output[tokens] * gate_column).to(dtype), None
        if needs_down:
            rows = rows_grad if rows_tokens is None else rows_grad[tokens]
            grad_down = _grad_weight(a, rows, offsets, in_first=in_first)
            del rows
        if needs_down_a:
            gated = (down_grad_small * scaled_gates[:, None]).to(dtype) if gates_the_gradient else down_grad_small
            grad_down_a = grouped_outer(gated, a, offsets, out_dtype=torch.float32)
        if needs_down_b:
            gated = down_small if gates_the_gradient else (down_small * gate_column).to(dtype)
            grad_down_b = grouped_outer(rows_grad, gated, offsets, left_tokens=rows_tokens, out_dtype=torch.float32)
        if needs_down_bias:
            factor = torch.ones_like(gate_column) if gates_the_gradient else gate_column
            grad_down_bias = grouped_sum(rows_grad, factor, offsets, tokens=rows_tokens).to(down_bias.dtype)
        del a, rows_grad

        if needs_up_bias:
            grad_up_bias = grouped_sum(grad_h, torch.ones_like(gate_column), offsets).to(up_bias.dtype)
        if needs_up:
            grad_up = _grad_weight(x[tokens], grad_h, offsets, in_first=in_first)
        if needs_up_b:
            grad_up_b = grouped_outer(grad_h, up_small, offsets, out_dtype=torch.float32)
        if needs_x or needs_up_a:
            up_grad_small: Any = up.mT.reduce(grad_h, routing, tiles)
        if needs_up_a:
            grad_up_a = grouped_outer(up_grad_small, x, offsets, right_tokens=tokens, out_dtype=torch.float32)
        if needs_x:
            grad_x = _project_and_combine(
                grad_h, up.mT, up_grad_small, routing, tiles, None, plan.chunk_columns, ctx.hidden_dtype
            )
        if down_bias is not None and grad_gates is not None:
            grad_gates += _bias_products(grad_output, top_k_index, down_bias, plan)

    grad_gates = grad_gates.to(gates.dtype) if grad_gates is not None else None
    grad_factors = chain(
        *split_gradients(grad_up_a, grad_up_b, up_updates), *split_gradients(grad_down_a, grad_down_b, down_updates)
    )
    return [grad_x, grad_gates, grad_up, grad_up_bias, grad_down, grad_down_bias, *grad_factors]


def _project_and_combine(
    rows: Tensor,
    projection: _Projection,
    small: Tensor | None,
    routing: Routing,
    tiles: Tensor | None,
    gates: Tensor | None,
    chunk_columns: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Each row projected, summed over the slots: (S, in) to (T, H).

    The hidden features are independent here, so a bounded buffer takes some of them at a time and all rows: the
    products stay as efficient as they were, and nothing needs to be accumulated.
    """
    num_tokens, hidden = routing.num_rows // routing.top_k, projection.weight.shape[2]
    inverse = routing.inverse.view(num_tokens, routing.top_k)
    output = rows.new_empty(num_tokens, hidden, dtype=out_dtype)
    for start in range(0, hidden, chunk_columns):
        columns = slice(start, min(start + chunk_columns, hidden))
        part = projection.project(rows, small, routing, tiles, columns=columns)
        combine(part, inverse, gates, output, start)
        del part
    return output


def _excess(gradient: Tensor) -> Tensor:
    """The power of two that brings each row below 2^6, (T, 1) float32; 1 where it is below, or not finite.

    Products with a column of W2 whose sizes add up to less than 2^10 then stay in float16's range, below 2^16. Digits
    are lost 2^20 below the row's largest value, far below the last digit of the products.
    """
    largest = gradient.to(torch.float32).abs().amax(1, keepdim=True)
    _, exponent = torch.frexp(largest)
    power = torch.ldexp(torch.ones_like(largest), exponent - 6).clamp_min(1.0)
    return power.where(largest.isfinite(), 1.0)


def graph_question() -> Callable[[], bool] | None:
    """What `GRAPH_QUESTION` names, or None where PyTorch has it no more."""
    found: Any = torch
    for name in GRAPH_QUESTION.split(".")[1:]:
        found = getattr(found, name, None)
    return found


def _graph_is_kept() -> bool:
    """Whether this backward may run again (retain_graph), so that what it saved must not be overwritten."""
    ask = graph_question()
    return ask is None or ask()


def _grad_weight(inputs: Tensor, grad_outputs: Tensor, offsets: Tensor, *, in_first: bool) -> Tensor:
    left, right = (inputs, grad_outputs) if in_first else (grad_outputs, inputs)
    return grouped_outer(left, right, offsets)


def _add_biases(output: Tensor, gates: Tensor, top_k_index: Tensor, bias: Tensor, plan: _Plan) -> None:
    """Adds Σ_k g · b2 to a float32 (T, H), slot by slot: no rows, and no token meets another expert's bias."""
    bias = _with_foreign(bias.to(torch.float32), plan)
    for slot, experts in enumerate(top_k_index.clamp(max=bias.shape[0] - 1).unbind(1)):
        output.addcmul_(bias[experts], gates[:, slot, None].to(torch.float32))


def _bias_products(grad_output: Tensor, top_k_index: Tensor, bias: Tensor, plan: _Plan) -> Tensor:
    """<b2, G> of every (token, slot) pair, (T, K) float32."""
    bias = _with_foreign(bias.to(torch.float32), plan)
    products = grad_output.to(torch.float32) @ bias.t()
    return products.gather(1, top_k_index.clamp(max=bias.shape[0] - 1))


def _with_foreign(bias: Tensor, plan: _Plan) -> Tensor:
    """The biases (E, H), with zeros for other processes' experts after the last."""
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
    chunk_tokens: ChunkTokens = "auto",
    recompute_up: bool = False,
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
        chunk_tokens: bounds the buffer of projected rows, (S, H) if nothing did, to the rows of about this many
            tokens; `"auto"` to 512 MiB. All rows then take a part of the hidden features at a time (at least 256 of
            them, the width of a product's tile), so that no expert is left with few rows; results do not depend on it
            beyond rounding.
        recompute_up: keep `hidden_states` for backward and project them a second time there, rather than keep the
            projection, (S, N). Results are the same bits. Not worth it under activation checkpointing, which projects
            a second time anyway.
        is_expert_parallel: the weights are some of the layer's experts, and ids of E and above name others', on other
            processes: such a slot adds nothing to the output and its gate gets a gradient of zero.

    Returns:
        (T, H), the dtype of `hidden_states`.

    Raises:
        ValueError: on shapes that do not fit each other, an expert out of range (checked where that costs no
            synchronisation: on the CPU), or `chunk_tokens` below 1.
        TypeError: on a dtype other than float32, bfloat16 or float16, or sizes that `torch.nn.functional.grouped_mm`
            does not take (rows of whole multiples of 16 bytes).
    """
    check_chunk_tokens(chunk_tokens)
    if problem := shape_problem(
        hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias,
        gate_up_updates, down_updates, is_transposed=is_transposed, is_expert_parallel=is_expert_parallel,
    ):  # fmt: skip
        raise ValueError(f"moe_experts: {problem}")
    if problem := unsupported(gate_up_proj, down_proj):
        raise TypeError(f"moe_experts: {problem}")
    num_tokens, hidden_size = hidden_states.shape
    top_k = top_k_index.shape[1]
    if is_expert_parallel:  # whatever stands in such a slot adds nothing, be it NaN
        top_k_weights = top_k_weights.masked_fill(top_k_index >= down_proj.shape[0], 0)

    inputs = (hidden_states, top_k_weights, gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias)
    factors = [factor for update in (*gate_up_updates, *down_updates) for factor in (update.a, update.b)]
    wanting = [tensor for tensor in (*inputs, *factors) if tensor is not None and tensor.requires_grad]
    records = torch.is_grad_enabled() and bool(wanting)
    chunk_columns = _chunk_columns(chunk_tokens, num_tokens, top_k, hidden_size, down_proj.element_size())
    plan = _Plan(
        activation=activation,
        in_first=is_transposed,
        intermediate=down_proj.shape[1 if is_transposed else 2],
        chunk_columns=chunk_columns,
        recomputes_h=recompute_up,
        is_expert_parallel=is_expert_parallel,
        anchor=_anchor(wanting) if records else None,
        up_scalings=tuple(update.scaling for update in gate_up_updates),
        down_scalings=tuple(update.scaling for update in down_updates),
    )
    return _Down.apply(*_Up.apply(*inputs, top_k_index.long(), plan, *factors), plan)


def _chunk_columns(chunk_tokens: ChunkTokens, num_tokens: int, top_k: int, hidden_size: int, element_size: int) -> int:
    """How many hidden features of all rows make a buffer as large as `chunk_tokens` tokens' whole rows."""
    num_rows = max(num_tokens * top_k, 1)
    if chunk_tokens == "auto":
        columns = AUTO_CHUNK_BYTES // (num_rows * element_size)
    else:
        columns = chunk_tokens * top_k * hidden_size // num_rows
    return min(max(columns // CHUNK_GRANULE * CHUNK_GRANULE, CHUNK_GRANULE), hidden_size)
