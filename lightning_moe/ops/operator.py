"""The operation as one operator of PyTorch's, which the compiler takes whole: a graph with it in has no break.

Eager calls have experts.py's autograd functions, which cost the host less and take h's memory for its gradient. An
operator may neither change nor hand out what it was given: here every pass makes tensors of its own, and what backward
counts comes back as the gradient of a *probe*, (7,) float64, whose `.grad` adds it up: whole numbers below 2^53, in the
order of `counting.COUNTERS`. A counter changed in place would fail autograd's check where two forwards come before a
backward. A graph does not see how often it is run: routing flips are not counted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_moe.ops.counting import COUNTERS, new_counters
from lightning_moe.ops.grouped import FUSED_ACTIVATIONS, Activation, has_grouped_linear, num_tiles
from lightning_moe.ops.low_rank import LowRank, padded_rank
from lightning_moe.ops.passes import (
    Inputs,
    Needs,
    Plan,
    Saved,
    backward,
    from_activation,
    num_buffer_columns,
    until_activation,
    without_foreign,
)

# An operator takes no function: the activations that it knows, by name.
_ACTIVATIONS = {name: activation for activation, name in FUSED_ACTIVATIONS.items()}
# Of a `Saved` the first are inputs; the rest is made, and an empty tensor stands for one that is not.
_NUM_GIVEN = Saved._fields.index("permutation")


def new_probe(device: torch.device) -> Tensor:
    """What has the counts of each backward for its gradient."""
    return torch.zeros(len(COUNTERS), dtype=torch.float64, device=device, requires_grad=True)


def is_known(activation: Activation) -> bool:
    """Whether the operator has this activation."""
    return activation in FUSED_ACTIVATIONS


def call(
    inputs: Inputs,
    top_k_index: Tensor,
    up_updates: Sequence[LowRank],
    down_updates: Sequence[LowRank],
    *,
    activation: Activation,
    is_transposed: bool,
    output_buffer_mib: float,
    recompute_gate_up: bool,
    is_expert_parallel: bool,
    probe: Tensor | None,
    bytes_saved: int,
) -> Tensor:
    """The output of `moe_experts`, whose arguments these are: W1 and W2 are the `up` and the `down` projection's."""
    if is_expert_parallel:
        inputs = inputs._replace(
            routing_weights=without_foreign(inputs.routing_weights, top_k_index, inputs.down_weight)
        )
    factors = [factor for update in (*up_updates, *down_updates) for factor in (update.a, update.b)]
    wants = [tensor is not None and tensor.requires_grad for tensor in inputs]
    for updates in (up_updates, down_updates):
        wants += [any(u.a.requires_grad for u in updates), any(u.b.requires_grad for u in updates)]
    needs = [torch.is_grad_enabled() and want for want in wants]
    return torch.ops.lightning_moe.experts_2(
        *inputs, top_k_index, factors, probe if any(needs) else None,
        [u.scaling for u in up_updates], [u.scaling for u in down_updates], needs, FUSED_ACTIVATIONS[activation],
        is_transposed, float(output_buffer_mib), recompute_gate_up, is_expert_parallel, bytes_saved,
    )[0]  # fmt: skip


def _plan(
    num_rows: int,
    down_weight: Tensor,
    up_scalings: Sequence[float],
    down_scalings: Sequence[float],
    needs: Sequence[bool],
    activation: str,
    is_transposed: bool,
    output_buffer_mib: float,
    recomputes_h: bool,
    is_expert_parallel: bool,
    bytes_saved: int,
    health: Tensor | None = None,
) -> Plan:
    hidden_size = down_weight.shape[2 if is_transposed else 1]
    return Plan(
        activation=_ACTIVATIONS[activation],
        is_transposed=is_transposed,
        buffer_columns=num_buffer_columns(output_buffer_mib, num_rows, hidden_size, down_weight.element_size()),
        recomputes_h=recomputes_h,
        is_expert_parallel=is_expert_parallel,
        records=any(needs),
        up_scalings=tuple(up_scalings),
        down_scalings=tuple(down_scalings),
        health=health,
        bytes_saved=bytes_saved,
    )


# PyTorch keeps compiled graphs from run to run by their operators' names, whatever these return by then: another number
# in both names where what they take or return changes.
@torch.library.custom_op("lightning_moe::experts_2", mutates_args=())
def _experts(
    hidden_states: Tensor,
    routing_weights: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    top_k_index: Tensor,
    factors: Sequence[Tensor],
    probe: Tensor | None,
    up_scalings: Sequence[float],
    down_scalings: Sequence[float],
    needs: Sequence[bool],
    activation: str,
    is_transposed: bool,
    output_buffer_mib: float,
    recomputes_h: bool,
    is_expert_parallel: bool,
    bytes_saved: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and what backward needs beside the arguments, in the order of `Saved`."""
    plan = _plan(
        top_k_index.numel(), down_weight, up_scalings, down_scalings, needs, activation, is_transposed,
        output_buffer_mib, recomputes_h, is_expert_parallel, bytes_saved,
    )  # fmt: skip
    inputs = Inputs(hidden_states, routing_weights, up_weight, up_bias, down_weight, down_bias)
    saved, made = until_activation(inputs, top_k_index.long(), factors, plan, Needs._make(needs))
    output = from_activation(made, plan)
    return output, *(output.new_empty(0) if tensor is None else tensor for tensor in saved[_NUM_GIVEN:])  # type: ignore[return-value]


@_experts.register_fake
def _(
    hidden_states: Tensor, routing_weights: Tensor, up_weight: Tensor, up_bias: Tensor | None, down_weight: Tensor,
    down_bias: Tensor | None, top_k_index: Tensor, factors: Sequence[Tensor], probe: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    up_scalings, _, flags, _, is_transposed, _, recomputes_h, *_ = options
    needs, num_rows, experts = Needs._make(flags), top_k_index.numel(), down_weight.shape[0]
    dtype, device = down_weight.dtype, down_weight.device
    up_rank = padded_rank((a.shape[1] for a in factors[: 2 * len(up_scalings) : 2]), dtype)

    def made(*shape: int, of: torch.dtype = dtype, if_: bool = True) -> Tensor:
        return torch.empty(shape if if_ else (0,), dtype=of if if_ else hidden_states.dtype, device=device)

    return (
        torch.empty_like(hidden_states, memory_format=torch.contiguous_format),
        made(num_rows, of=torch.int64),
        made(num_rows, of=torch.int64),
        made(experts, of=torch.int32),
        made(2, num_tiles(num_rows, experts), of=torch.int32, if_=has_grouped_linear(dtype, device)),
        made(num_rows, up_weight.shape[2 if is_transposed else 1], if_=any(flags) and not recomputes_h),
        made(num_rows, up_rank, if_=needs.up_b and not recomputes_h),
    )


@torch.library.custom_op("lightning_moe::experts_backward_2", mutates_args=())
def _experts_backward(
    grad_output: Tensor,
    saved: Sequence[Tensor | None],
    factors: Sequence[Tensor],
    up_scalings: Sequence[float],
    down_scalings: Sequence[float],
    needs: Sequence[bool],
    activation: str,
    is_transposed: bool,
    output_buffer_mib: float,
    recomputes_h: bool,
    is_expert_parallel: bool,
    bytes_saved: int,
) -> list[Tensor]:
    """The gradients that are needed, of the inputs and the factors in their order, and the counts."""
    held = Saved._make(saved)
    counters = new_counters(grad_output.device)
    plan = _plan(
        held.routing_weights.numel(), held.down_weight, up_scalings, down_scalings, needs, activation, is_transposed,
        output_buffer_mib, recomputes_h, is_expert_parallel, bytes_saved, counters,
    )  # fmt: skip
    grads = backward(list(held), factors, grad_output, plan, Needs._make(needs), may_overwrite=lambda h: False)
    # Parts of one gradient, those of joined factors, would share its memory.
    own = [g.contiguous() if g.untyped_storage().nbytes() == g.nbytes else g.clone() for g in grads if g is not None]
    return [*own, counters.to(torch.float64)]


@_experts_backward.register_fake
def _(
    grad_output: Tensor, saved: Sequence[Tensor | None], factors: Sequence[Tensor], *options: Any
) -> list[Tensor]:  # fmt: skip
    up_scalings, _, flags, *_ = options
    held: Any = Saved._make(saved)
    inputs = (grad_output, held.routing_weights, held.up_weight, held.up_bias, held.down_weight, held.down_bias)
    wanted = _wanted([*inputs, *factors], flags, len(up_scalings))
    likes = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in wanted if tensor is not None]
    return [*likes, grad_output.new_empty(len(COUNTERS), dtype=torch.float64)]


def _wanted(each: Sequence[Any], flags: Sequence[bool], num_up_updates: int) -> list[Any]:
    """What stands for an input or a factor, with None for those that want no gradient."""
    num_inputs = len(Inputs._fields)
    *_, up_a, up_b, down_a, down_b = flags
    num_down_updates = (len(each) - num_inputs) // 2 - num_up_updates
    wants = [*flags[:num_inputs], *[up_a, up_b] * num_up_updates, *[down_a, down_b] * num_down_updates]
    return [found if want else None for found, want in zip(each, wants, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, top_k_index, factors, probe = inputs[: len(Inputs._fields) + 3]
    ctx.options, ctx.counts = inputs[len(Inputs._fields) + 3 :], probe is not None
    hidden_states, routing_weights, up_weight, up_bias, down_weight, down_bias = tensors
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden_states, routing_weights, up_weight, up_bias, down_weight, down_bias, top_k_index, *output[1:], *factors
    )


def _backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Any, ...]:
    saved = list(ctx.saved_tensors)
    factors = saved[len(Saved._fields) :]
    del saved[len(Saved._fields) :]
    *found, counts = torch.ops.lightning_moe.experts_backward_2(grad_output, saved, factors, *ctx.options)
    up_scalings, _, flags, *_ = ctx.options
    at = iter(found)
    num_inputs = len(Inputs._fields)
    wanted = _wanted([True] * (num_inputs + len(factors)), flags, len(up_scalings))
    grads = [next(at) if wants else None for wants in wanted]
    of_inputs, of_factors = grads[:num_inputs], grads[num_inputs:]
    none: list[Any] = [[] if option == [] else None for option in ctx.options]  # an empty list might be one of tensors
    return *of_inputs, None, of_factors, counts if ctx.counts else None, *none


torch.library.register_autograd("lightning_moe::experts_2", _backward, setup_context=_setup_context)
