"""The operation: a mixture of experts whose gate gradient needs no output of the down projection.

Letters: T tokens, K top_k, S = T x K rows (token, slot) sorted by expert, H hidden, I intermediate, E experts.
Per row, with gate g, hidden x, weights W1 (gate_up) and W2 (down) and optional biases:

    h = x W1ᵀ + b1        a = act(h)        y = a W2ᵀ + b2        out_t = Σ_k g · y

Stock code keeps y to form dg = <dOut, y>. Linearity of the down projection gives the same number from what the
backward computes anyway. With G = dOut gathered to the rows, not multiplied by the gate:

    da' = G W2            dg = <a, da'> + <b2, G>            da = g · da'            dh = act'(h) · da
    dx = Σ_k dh W1        dW1 = dhᵀ x        db1 = Σ dh       dW2 = (g·a)ᵀ G          db2 = Σ g·G

Exact for any gate: nothing is divided by it. Kept for backward: h, the routing, the gates, and x at token level where
W1 wants a gradient. Not kept: gathered x, a, y, g·y. The down bias is linear at token level too, as the dense (T, E)
gates times b2, so it never touches a row.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_moe.kernels import (
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
from lightning_moe.routing import Routing, sort_by_expert

ChunkTokens = int | Literal["auto"]

# The buffer of projected rows at "auto", bytes, and the fewest hidden features that it takes at a time.
AUTO_CHUNK_BYTES = 512 * 2**20
CHUNK_GRANULE = 256


@dataclass(frozen=True)
class _Plan:
    """What of a call is not a tensor.

    Attributes:
        activation: (R, N) to (R, I), row by row.
        in_first: weights are (E, in, out) rather than (E, out, in).
        intermediate: I, what the down projection takes.
        chunk_columns: hidden features of the projected rows in flight at once.
        records: whether autograd will want a backward.
    """

    activation: Activation
    in_first: bool
    intermediate: int
    chunk_columns: int
    records: bool


class _FirstOrderOnly(torch.autograd.Function):
    """Passes a gradient through and raises when it is itself differentiated.

    `once_differentiable` would not do: where the incoming gradient is a constant it hands out gradients without a
    graph, and a gradient penalty silently lacks its term.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "moe_experts has no second derivative: for a gradient penalty or a Hessian, train without the callback"
        )


def _anchor(inputs: tuple[Tensor | None, ...]) -> Tensor:
    """An empty tensor that depends on every input that wants a gradient, without holding on to any of them."""
    return torch.cat([tensor[:0].reshape(-1) for tensor in inputs if tensor is not None and tensor.requires_grad])


class _Experts(torch.autograd.Function):
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
        anchor: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        dtype, routing = down_weight.dtype, sort_by_expert(top_k_index, down_weight.shape[0])
        x = hidden_states.to(dtype).contiguous()
        tiles = product_tiles(x, routing.offsets, routing.num_rows)
        with torch.autocast(x.device.type, enabled=False):
            h = grouped_linear(
                x, up_weight, routing.offsets, in_first=plan.in_first, tokens=routing.tokens, tiles=tiles
            )
            del x
            if up_bias is not None:
                h += up_bias[routing.expert_of_row()]
            a = activate(plan.activation, h).to(dtype)
            if a.shape != (h.shape[0], plan.intermediate):
                raise ValueError(
                    f"moe_experts: the activation makes {tuple(a.shape)} of {tuple(h.shape)}, but down_proj takes "
                    f"{plan.intermediate} features"
                )
            if not plan.records:
                del h
            out_dtype = hidden_states.dtype if down_bias is None else torch.float32  # rounded once, the bias added
            output = _project_and_combine(
                a, down_weight, routing, tiles, gates, plan, in_first=plan.in_first, out_dtype=out_dtype
            )
            del a
            if down_bias is not None:
                dense_gates = _dense(gates, top_k_index, down_bias.shape[0])
                output = output.addmm_(dense_gates, down_bias.to(torch.float32)).to(hidden_states.dtype)

        needs_x, _, needs_up, needs_up_bias, needs_down, _ = ctx.needs_input_grad[:6]
        ctx.plan, ctx.hidden_dtype, ctx.top_k = plan, hidden_states.dtype, routing.top_k
        uses_up = needs_x or needs_up
        ctx.save_for_backward(
            anchor,
            hidden_states if needs_up else None,
            gates,
            up_weight if uses_up else None,
            up_bias if needs_up_bias else None,
            down_weight,
            down_bias,
            top_k_index if down_bias is not None else None,
            routing.permutation,
            routing.inverse,
            routing.offsets,
            tiles,
            h if plan.records else None,
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        anchor, *saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx, grad_output, saved)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = tuple(g if g is None else _FirstOrderOnly.apply(anchor, g) for g in gradients)
        return *gradients, None, None, None


def _gradients(ctx: Any, grad_output: Tensor, saved: list[Any]) -> tuple[Tensor | None, ...]:
    """The gradients of the six floating-point arguments, None for one that wants none."""
    hidden_states, gates, up_weight, up_bias, down_weight, down_bias, top_k_index, *routed, tiles, h = saved
    permutation, inverse, offsets = routed
    tokens = permutation // ctx.top_k
    routing = Routing(permutation, inverse, tokens, offsets, ctx.top_k)
    needs_x, needs_gates, needs_up, needs_up_bias, needs_down, needs_down_bias = ctx.needs_input_grad[:6]
    plan, dtype = ctx.plan, down_weight.dtype
    in_first, out_first = plan.in_first, not plan.in_first

    grad_x = grad_gates = grad_up = grad_up_bias = grad_down = grad_down_bias = None
    with torch.autocast(grad_output.device.type, enabled=False):
        grad = grad_output.to(dtype).contiguous()
        grad_a = grouped_linear(grad, down_weight, offsets, in_first=out_first, tokens=tokens, tiles=tiles)  # da'
        row_gates = gates.flatten().index_select(0, permutation)
        # Small gates leave float16's range sooner in g·a, whose a is small too, than in g·G, where stock code has them.
        gates_the_gradient = needs_down and dtype == torch.float16
        bare_a = activate(plan.activation, h).to(dtype) if gates_the_gradient else None
        grad_h, inner, scaled_a = activation_backward(
            plan.activation,
            h,
            grad_a,
            row_gates,
            needs_scaled=needs_down and not gates_the_gradient,
            overwrite=not _graph_is_kept(),
        )
        del grad_a, h, saved
        if needs_gates:
            grad_gates = inner.index_select(0, inverse).view_as(gates)
        if scaled_a is not None:
            grad_down = _grad_weight(scaled_a, grad[tokens], offsets, in_first=in_first)
            del scaled_a
        if bare_a is not None:
            gated = (grad[tokens] * row_gates.unsqueeze(-1)).to(dtype)
            grad_down = _grad_weight(bare_a, gated, offsets, in_first=in_first)
            del bare_a, gated
        if needs_up_bias:
            grad_up_bias = grouped_sum(grad_h, routing.offsets).to(up_bias.dtype)
        if needs_up:
            x = hidden_states[tokens].to(dtype)
            grad_up = _grad_weight(x, grad_h, offsets, in_first=in_first)
            del x
        if needs_x:
            grad_x = _project_and_combine(
                grad_h, up_weight, routing, tiles, None, plan, in_first=out_first, out_dtype=ctx.hidden_dtype
            )
        if down_bias is not None:
            grad = grad_output.to(torch.float32)
            if grad_gates is not None:
                grad_gates += (grad @ down_bias.to(torch.float32).t()).gather(1, top_k_index)
            if needs_down_bias:
                dense_gates = _dense(gates, top_k_index, down_bias.shape[0])
                grad_down_bias = (dense_gates.t() @ grad).to(down_bias.dtype)

    grad_gates = grad_gates.to(gates.dtype) if grad_gates is not None else None
    return grad_x, grad_gates, grad_up, grad_up_bias, grad_down, grad_down_bias


def _project_and_combine(
    rows: Tensor,
    weight: Tensor,
    routing: Routing,
    tiles: Tensor | None,
    gates: Tensor | None,
    plan: _Plan,
    *,
    in_first: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Each row times its expert's weight, summed over the slots: (S, in) to (T, H).

    The hidden features are independent here, so a bounded buffer takes some of them at a time and all rows: the
    products stay as efficient as they were, and nothing needs to be accumulated.
    """
    num_tokens, axis = routing.num_rows // routing.top_k, 2 if in_first else 1
    inverse = routing.inverse.view(num_tokens, routing.top_k)
    output = rows.new_empty(num_tokens, weight.shape[axis], dtype=out_dtype)
    for start in range(0, output.shape[1], plan.chunk_columns):
        size = min(plan.chunk_columns, output.shape[1] - start)
        part = grouped_linear(rows, weight.narrow(axis, start, size), routing.offsets, in_first=in_first, tiles=tiles)
        combine(part, inverse, gates, output.narrow(1, start, size))
        del part
    return output


def _graph_is_kept() -> bool:
    """Whether this backward may run again (retain_graph), so that what it saved must not be overwritten."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _grad_weight(inputs: Tensor, grad_outputs: Tensor, offsets: Tensor, *, in_first: bool) -> Tensor:
    left, right = (inputs, grad_outputs) if in_first else (grad_outputs, inputs)
    return grouped_outer(left, right, offsets)


def _dense(gates: Tensor, top_k_index: Tensor, num_experts: int) -> Tensor:
    """The gates as a dense float32 (T, E) matrix; an expert that a token names twice gets both gates."""
    dense = gates.new_zeros(gates.shape[0], num_experts, dtype=torch.float32)
    return dense.scatter_add_(1, top_k_index, gates.to(torch.float32))


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
    chunk_tokens: ChunkTokens = "auto",
) -> Tensor:
    """Applies each token's experts and sums their outputs, weighted by the gates.

    Products are computed in the weights' dtype and accumulated over the slots in float32; autocast does not change
    that. Gradients of first order reach every floating-point argument that asks for one; asking for a second order
    raises.

    Args:
        hidden_states: (T, H).
        top_k_index: (T, K) integer, the experts of each token, in [0, E). Repeats are allowed.
        top_k_weights: (T, K) floating, the gates: any sign, exact zeros too.
        gate_up_proj: (E, N, H), or (E, H, N) if `is_transposed`; N is what `activation` takes (2 I for a gated one).
        down_proj: (E, H, I), or (E, I, H) if `is_transposed`; same dtype as `gate_up_proj`.
        gate_up_proj_bias: (E, N), any floating dtype.
        down_proj_bias: (E, H), any floating dtype. The gates' gradient stays exact with it.
        activation: (R, N) to (R, I), row by row, without parameters or randomness; it is called again in backward.
        is_transposed: the weights' layout.
        chunk_tokens: bounds the buffer of projected rows, (S, H) if nothing did, to the rows of about this many
            tokens; `"auto"` to 512 MiB. All rows then take a part of the hidden features at a time (at least 256 of
            them, the width of a product's tile), so that no expert is left with few rows; results do not depend on it
            beyond rounding.

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
        is_transposed=is_transposed,
    ):  # fmt: skip
        raise ValueError(f"moe_experts: {problem}")
    if problem := unsupported(gate_up_proj, down_proj):
        raise TypeError(f"moe_experts: {problem}")
    num_tokens, hidden_size = hidden_states.shape
    top_k = top_k_index.shape[1]

    inputs = (hidden_states, top_k_weights, gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias)
    records = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    chunk_columns = _chunk_columns(chunk_tokens, num_tokens, top_k, hidden_size, down_proj.element_size())
    plan = _Plan(activation, is_transposed, down_proj.shape[1 if is_transposed else 2], chunk_columns, records)
    return _Experts.apply(*inputs, top_k_index.long(), _anchor(inputs) if records else None, plan)


def _chunk_columns(chunk_tokens: ChunkTokens, num_tokens: int, top_k: int, hidden_size: int, element_size: int) -> int:
    """How many hidden features of all rows make a buffer as large as `chunk_tokens` tokens' whole rows."""
    num_rows = max(num_tokens * top_k, 1)
    if chunk_tokens == "auto":
        columns = AUTO_CHUNK_BYTES // (num_rows * element_size)
    else:
        columns = chunk_tokens * top_k * hidden_size // num_rows
    return min(max(columns // CHUNK_GRANULE * CHUNK_GRANULE, CHUNK_GRANULE), hidden_size)


def check_chunk_tokens(chunk_tokens: ChunkTokens) -> None:
    """Raises ValueError unless `chunk_tokens` is "auto" or a positive integer."""
    if chunk_tokens != "auto" and not (type(chunk_tokens) is int and chunk_tokens >= 1):
        raise ValueError(f"chunk_tokens must be 'auto' or an integer of at least 1, not {chunk_tokens!r}")


def shape_problem(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    *,
    is_transposed: bool,
) -> str | None:
    """Says in words which shapes do not fit each other, or None."""
    if hidden_states.dim() != 2:
        return f"hidden_states must be (tokens, hidden), got {tuple(hidden_states.shape)}; flatten the batch first"
    if top_k_index.shape != top_k_weights.shape or top_k_index.dim() != 2:
        return (
            "top_k_index and top_k_weights must both be (tokens, top_k), got "
            f"{tuple(top_k_index.shape)} and {tuple(top_k_weights.shape)}"
        )
    if top_k_index.shape[0] != hidden_states.shape[0]:
        return f"top_k_index has {top_k_index.shape[0]} tokens, hidden_states {hidden_states.shape[0]}"
    if not (hidden_states.is_floating_point() and top_k_weights.is_floating_point()):
        return f"hidden_states and top_k_weights must be floating, got {hidden_states.dtype}, {top_k_weights.dtype}"
    if top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
        return f"top_k_index must be integer, got {top_k_index.dtype}"
    if gate_up_proj.dim() != 3 or down_proj.dim() != 3 or gate_up_proj.shape[0] != down_proj.shape[0]:
        return (
            "gate_up_proj and down_proj must be three-dimensional with the experts first, got "
            f"{tuple(gate_up_proj.shape)} and {tuple(down_proj.shape)}"
        )
    num_experts, *up_shape = gate_up_proj.shape
    down_shape = list(down_proj.shape[1:])
    hidden_in, width = up_shape if is_transposed else reversed(up_shape)
    hidden_out = down_shape[1] if is_transposed else down_shape[0]
    hidden = hidden_states.shape[1]
    if hidden_in != hidden or hidden_out != hidden:
        return (
            f"hidden_states have {hidden} features, gate_up_proj takes {hidden_in} and down_proj gives {hidden_out} "
            f"(is_transposed={is_transposed})"
        )
    for name, bias, size in (
        ("gate_up_proj_bias", gate_up_proj_bias, width),
        ("down_proj_bias", down_proj_bias, hidden),
    ):
        if bias is not None and tuple(bias.shape) != (num_experts, size):
            return f"{name} must be {(num_experts, size)}, got {tuple(bias.shape)}"
    if top_k_index.device.type == "cpu" and top_k_index.numel():
        low, high = top_k_index.aminmax()
        if low < 0 or high >= num_experts:
            return f"top_k_index names experts {int(low)} to {int(high)}, but there are {num_experts}"
    return None


def unsupported(gate_up_proj: Tensor, down_proj: Tensor) -> str | None:
    """Says in words what about the weights the grouped products do not take, or None."""
    dtype = down_proj.dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16) or gate_up_proj.dtype != dtype:
        return f"weights must both be float32, bfloat16 or float16, got {gate_up_proj.dtype} and {dtype}"
    for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
        # The activations' rows are as long as the weights' sides; a stride of one is the contiguous side's.
        steps = [*weight.shape[1:], *(stride for stride in weight.stride() if stride != 1)]
        if any(step * weight.element_size() % 16 for step in steps):
            return (
                f"grouped_mm needs rows of whole multiples of 16 bytes; {name} is {tuple(weight.shape)} of {dtype} "
                f"with strides {weight.stride()}"
            )
    return None
