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
    dB2 = Gᵀ ((g·a) A2ᵀ)      dA2 = (G B2)ᵀ (g·a)      dB1 = dhᵀ (x A1ᵀ)      dA1 = (dh B1)ᵀ x

Exact for any gate: nothing is divided by it. Kept for backward: the routing, the gates, h, x A1ᵀ where B1 wants a
gradient (or x, to make h and x A1ᵀ again), and x at token level where W1 or A1 wants one. Not kept: gathered x, a,
a A2ᵀ, y, g·y. The `down_proj` bias is linear at token level too, so it never touches a row.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moe.ops import operator
from lightning_moe.ops.autograd import FirstOrderOnly, Owner, graph_is_kept, has_saved_tensors_hooks, is_measuring
from lightning_moe.ops.grouped import Activation, silu_gated
from lightning_moe.ops.low_rank import LowRank
from lightning_moe.ops.passes import (
    Inputs,
    Intermediates,
    Needs,
    Plan,
    Saved,
    backward,
    from_activation,
    num_buffer_columns,
    until_activation,
    without_foreign,
)
from lightning_moe.ops.quantized import QuantizedWeight, may_stay_dense
from lightning_moe.ops.validation import check_output_buffer, shape_problem, unsupported_weights

_NUM_INPUTS, _NUM_SAVED = len(Inputs._fields), len(Saved._fields)


class _UntilActivation(torch.autograd.Function):
    """The operation up to the activation. Saves what the backward of the whole operation needs.

    Returns a placeholder, which stands for the output and hands its gradient on, and the intermediates.
    `_FromActivation` saves nothing: activation checkpointing, whose second forward ends when everything saved has been
    made again, runs neither the activation nor the down projection a second time.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, top_k_index: Tensor, plan: Plan, anchor: list[Tensor], *tensors: Any
    ) -> tuple[Tensor, Intermediates]:
        inputs, factors = Inputs(*tensors[:_NUM_INPUTS]), tensors[_NUM_INPUTS:]
        wants = ctx.needs_input_grad[3:]
        ctx.needs = Needs.of(wants[:_NUM_INPUTS], wants[_NUM_INPUTS:], plan)
        ctx.owner = Owner(has_hooks=has_saved_tensors_hooks())
        # Where hooks have all this made again, what is saved is the recomputation's choice, and this the forward's.
        keeps_choice = plan.health is not None and ctx.owner.has_hooks
        is_checkpointed = ctx.owner.has_hooks and not is_measuring()  # as hooks nearly always have it
        if is_checkpointed and ctx.needs.hidden_states and may_stay_dense(inputs.up_weight):
            # h is made again anyway: rather in backward, where W1 is then dense once for h and for dx.
            plan = plan._replace(recomputes_h=True)
        saved, made = until_activation(inputs, top_k_index, factors, plan, ctx.needs, keeps_choice=keeps_choice)
        placeholder = inputs.hidden_states.new_empty(1, 1).expand(inputs.hidden_states.shape)
        ctx.plan, ctx.anchor, ctx.chosen, ctx.is_interrupted = plan, anchor, made.routing.chosen, False
        if saved.h is not None:
            ctx.owner.mark(saved.h)
        ctx.save_for_backward(ctx.chosen, *saved, *factors)
        return placeholder, made

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad_output: Tensor, _: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.is_interrupted:
            raise RuntimeError(
                "moe_experts: an earlier backward of this graph failed after it had overwritten what forward saved: "
                "run forward again"
            )

        def may_overwrite(h: Tensor) -> bool:
            overwrites = not graph_is_kept() and ctx.owner.may_overwrite(h)
            ctx.is_interrupted = overwrites and not ctx.owner.has_hooks  # which would have h made again
            return overwrites

        chosen, *saved = ctx.saved_tensors
        factors = saved[_NUM_SAVED:]
        del saved[_NUM_SAVED:]
        with torch.no_grad():
            gradients = backward(
                saved, factors, grad_output, ctx.plan, ctx.needs,
                may_overwrite=may_overwrite, choices=None if ctx.chosen is None else (chosen, ctx.chosen),
            )  # fmt: skip
        ctx.is_interrupted = False
        if torch.is_grad_enabled():  # create_graph=True
            anchor = ctx.anchor.pop()
            gradients = [g if g is None else FirstOrderOnly.apply(anchor, grad_output, g) for g in gradients]
        return None, None, None, *gradients


class _FromActivation(torch.autograd.Function):
    """The down projection and the sum over the slots. Saves nothing.

    Under `create_graph` its backward hands the placeholder to `_UntilActivation`'s, as what the gradients depend on: it
    depends on every input. Held by that one it would hold itself.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, placeholder: Tensor, made: Intermediates, plan: Plan, anchor: list[Tensor]
    ) -> Tensor:
        ctx.placeholder, ctx.anchor = placeholder, anchor
        return from_activation(made, plan)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            ctx.anchor[:] = [ctx.placeholder]
        return grad_output, None, None, None


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
    health: Tensor | None = None,
    bytes_saved: int = 0,
) -> Tensor:
    """Applies each token's experts and sums their outputs, weighted by the gates.

    Products are computed in the weights' dtype and accumulated over the slots in float32; autocast does not change
    that. Gradients of first order reach every floating-point argument that asks for one; asking for a second order
    raises. In a compiled graph this is one operator, for the activations that have kernels and without `health`.

    >>> import torch
    >>> from lightning_moe import moe_experts
    >>> hidden_states, gate_up_proj, down_proj = torch.randn(5, 16), torch.randn(8, 48, 16), torch.randn(8, 16, 24)
    >>> gates, experts = torch.randn(5, 8).softmax(-1).topk(2)  # each token's two experts of eight
    >>> moe_experts(hidden_states, experts, gates, gate_up_proj, down_proj).shape
    torch.Size([5, 16])

    Args:
        hidden_states: (T, H).
        top_k_index: (T, K) integer, the experts of each token, in [0, E); checked on the CPU. Repeats are allowed.
        top_k_weights: (T, K) floating, the gates: any sign, exact zeros too.
        gate_up_proj: (E, N, H), or (E, H, N) if `is_transposed`; N is what `activation` takes (2 I for a gated one). A
            `QuantizedWeight`, as `down_proj` may be, is made dense when it is used, and kept for backward as it is.
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
            projection, (S, N). Results are the same bits. It gains nothing under activation checkpointing, which
            projects a second time anyway.
        is_expert_parallel: the weights are some of the layer's experts, and ids of E and above name others', on other
            ranks: such a slot adds nothing to the output and its gate gets a gradient of zero.
        health: (7,) int64 counters on the tensors' device, `ops.counting.COUNTERS`, to which each backward adds itself.
            Routing flips, choices that activation checkpointing's second forward makes for a token and the first did
            not, are seen with `use_reentrant=False` only: a reentrant checkpoint's first forward leaves nothing behind.
        bytes_saved: added to the last of these counters.

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
    if torch.compiler.is_compiling() and isinstance(down_proj, QuantizedWeight):
        raise TypeError("moe_experts: quantized weights are not compiled: call it in a torch.compiler.disable function")
    if torch.compiler.is_compiling() and operator.is_known(activation) and health is None:
        return operator.call(
            Inputs(hidden_states, top_k_weights, gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias),
            top_k_index,
            gate_up_updates,
            down_updates,
            activation=activation,
            is_transposed=is_transposed,
            output_buffer_mib=output_buffer_mib,
            recompute_gate_up=recompute_gate_up,
            is_expert_parallel=is_expert_parallel,
            probe=None,
            bytes_saved=bytes_saved,
        )
    if problem := unsupported_weights(gate_up_proj, down_proj):
        raise TypeError(f"moe_experts: {problem}")
    num_tokens, hidden_size = hidden_states.shape
    top_k = top_k_index.shape[1]
    if is_expert_parallel:
        top_k_weights = without_foreign(top_k_weights, top_k_index, down_proj)

    inputs = (hidden_states, top_k_weights, gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias)
    factors = [factor for update in (*gate_up_updates, *down_updates) for factor in (update.a, update.b)]
    records = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*inputs, *factors))
    plan = Plan(
        activation=activation,
        is_transposed=is_transposed,
        buffer_columns=num_buffer_columns(output_buffer_mib, num_tokens * top_k, hidden_size, down_proj.element_size()),
        recomputes_h=recompute_gate_up,
        is_expert_parallel=is_expert_parallel,
        records=records,
        up_scalings=tuple(update.scaling for update in gate_up_updates),
        down_scalings=tuple(update.scaling for update in down_updates),
        health=health,
        bytes_saved=bytes_saved,
    )
    anchor: list[Tensor] = []
    placeholder, made = _UntilActivation.apply(top_k_index.long(), plan, anchor, *inputs, *factors)
    return _FromActivation.apply(placeholder, made, plan, anchor)
