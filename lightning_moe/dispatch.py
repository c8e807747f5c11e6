"""Dispatch: what a patched layer runs at each call, the operation or the default implementation.

One experts function, which Transformers' registry knows as `gategrad`, decides for each layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_moe.activation_estimate import estimate_activations
from lightning_moe.discovery import (
    unsupported_content,
    unsupported_flags,
    unsupported_parametrization,
    unsupported_tensors,
    unsupported_training,
)
from lightning_moe.integrations.peft_experts import active_adapters, low_rank, unsupported_layout
from lightning_moe.integrations.torch_modules import is_exporting, replaced_parameters
from lightning_moe.integrations.transformers_dispatch import (
    IMPLEMENTATION,
    implementation_of,
    is_decoding,
    is_expert_parallel,
    register_implementation,
    run_default,
)
from lightning_moe.integrations.transformers_experts import (
    ExpertsSpec,
    ExpertWeights,
    has_activation_of,
    read_flags,
    read_spec,
)
from lightning_moe.integrations.unsupported import Unsupported, unsupported
from lightning_moe.ops import operator
from lightning_moe.ops.experts import moe_experts
from lightning_moe.ops.low_rank import LowRank, merge
from lightning_moe.ops.passes import Inputs
from lightning_moe.ops.quantized import QuantizedWeight
from lightning_moe.patch_state import LayerPatch, patch_of
from lightning_moe.unmerged_lora import UnmergedLoRAForward, warn_once

Updates = Mapping[str, list[LowRank]]


def gategrad_experts(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    adapted_by: tuple[UnmergedLoRAForward, ...] = (),
) -> Tensor:
    """The experts function in Transformers' signature, registered as `gategrad`.

    Runs the operation where it may, and otherwise what the layer had before; either is counted in backward. In a
    compiled graph it is one operator, or the graph breaks here: for an activation without a kernel, for quantized
    weights, and under expert parallelism. Where no gradient is needed, and in an export, the graph has what the layer
    had before.

    Args:
        module: a decorated experts module, patched or only named `gategrad` in its config; or a patched one of a
            registered class.
        hidden_states: (T, H).
        top_k_index: (T, K) integer.
        top_k_weights: (T, K) floating.
        adapted_by: the forwards of PEFT's wrappers whose adapters are not in the weights.

    Returns:
        (T, H).
    """
    inputs = hidden_states, top_k_index, top_k_weights
    if torch.compiler.is_compiling() and not isinstance(module.down_proj, QuantizedWeight):
        patch = patch_of(module)
        if not adapted_by and (is_exporting() or not _needs_gradient(module, *inputs[::2])):
            return run_default(module, module.config if patch is None else patch.config, *inputs)
        if patch is not None and (spec := _traced(module, patch, hidden_states)) is not None:
            return _trace(module, patch, spec, *inputs, adapted_by)
    return _run(module, *inputs, adapted_by)


def _traced(module: Any, patch: LayerPatch, hidden_states: Tensor) -> ExpertsSpec | None:
    """How the compiler may take the layer: as it was patched, if nothing says that it is another one since."""
    spec, probe = patch.spec, patch.health.probe
    if spec is None or probe is None or patch.reason is not None or is_parametrized(module):
        return None
    is_there = probe.device == hidden_states.device and module.down_proj.dtype == patch.dtype
    return spec if is_there and has_activation_of(module, spec) else None


def _trace(
    module: Any,
    patch: LayerPatch,
    spec: ExpertsSpec,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapted_by: tuple[UnmergedLoRAForward, ...],
) -> Tensor:
    """What `gategrad_experts` does inside a graph."""
    updates, weights = _updates(adapted_by), spec.weights(module)
    return operator.call(
        Inputs(
            hidden_states, top_k_weights, weights.gate_up_proj, weights.gate_up_proj_bias, weights.down_proj,
            weights.down_proj_bias,
        ),
        top_k_index,
        updates.get(spec.up_name, ()),
        updates.get("down_proj", ()),
        activation=spec.activation,
        is_transposed=spec.is_transposed,
        output_buffer_mib=patch.options.output_buffer_mib,
        recompute_gate_up=patch.options.recompute_gate_up,
        is_expert_parallel=False,
        probe=patch.health.probe,
        bytes_saved=_bytes_saved(patch, spec, weights, updates, top_k_index.numel()),
    )  # fmt: skip


def update_estimate(module: Any, patch: LayerPatch, weights: ExpertWeights) -> None:
    """Estimates anew what the layer saves for backward, with weights of this dtype."""
    patch.dtype = weights.down_proj.dtype
    patch.estimate = estimate_activations(module, patch.ranks, recompute_gate_up=patch.options.recompute_gate_up)


@torch.compiler.disable
def _run(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapted_by: tuple[UnmergedLoRAForward, ...],
) -> Tensor:
    """What `gategrad_experts` does outside of a graph."""
    patch = patch_of(module)
    is_patched = patch is not None
    patch = patch or LayerPatch(module.config)
    updates = _updates(adapted_by) if adapted_by else {}
    routing_weights = top_k_weights
    if patch.reason or patch.health.audit_due:
        routing_weights = _own(top_k_weights)

    def default(hidden_states: Tensor, top_k_index: Tensor, routing_weights: Tensor) -> Tensor:
        with _merged(module, updates):
            return run_default(module, patch.config, hidden_states, top_k_index, routing_weights)

    reason = patch.reason or _unsupported_call(module, patch, is_patched=is_patched)
    if reason is None:
        known = patch.spec
        spec = known if known is not None and has_activation_of(module, known) else read_spec(module)
        weights = spec.weights(module)
        reason = unsupported_tensors(weights)
    if reason is not None:
        if patch.reason is None:
            patch.reason = reason
            rank_zero_warn(f"{type(module).__name__} runs the default implementation after all: {reason}", stacklevel=3)
            routing_weights = _own(top_k_weights)
        output = default(hidden_states, top_k_index, routing_weights)
        patch.health.watch_fallback(
            output, top_k_index, routing_weights, num_experts=module.num_experts,
            bias_fallback=reason.code == "down_proj_bias",
        )  # fmt: skip
        return output

    if is_patched:
        _notice_choice(patch)
        if patch.dtype != weights.down_proj.dtype:
            update_estimate(module, patch, weights)
    output = moe_experts(
        hidden_states,
        top_k_index,
        routing_weights,
        **weights._asdict(),
        activation=spec.activation,
        is_transposed=spec.is_transposed,
        gate_up_updates=updates.get(spec.up_name, ()),
        down_updates=updates.get("down_proj", ()),
        output_buffer_mib=patch.options.output_buffer_mib,
        recompute_gate_up=patch.options.recompute_gate_up,
        is_expert_parallel=is_expert_parallel(module),
        health=patch.health.counters(hidden_states) if is_patched and torch.is_grad_enabled() else None,
        bytes_saved=_bytes_saved(patch, spec, weights, updates, top_k_index.numel()),
    )
    if patch.health.audit_due:
        patch.health.audit(default, hidden_states, top_k_index, routing_weights, output)
    return output


def _own(routing_weights: Tensor) -> Tensor:
    """A tensor of our own, whose gradient is this layer's alone."""
    return routing_weights.view_as(routing_weights)


def _updates(adapted_by: tuple[UnmergedLoRAForward, ...]) -> Updates:
    """The low-rank updates by the name of the parameter that they adapt."""
    updates: dict[str, list[LowRank]] = {}
    for wrapper in (forward.wrapper for forward in adapted_by):
        found = [low_rank(wrapper, adapter) for adapter in active_adapters(wrapper)]
        updates.setdefault(wrapper.parameter_name, []).extend(found)
    return updates


def _unsupported_call(module: Any, patch: LayerPatch, *, is_patched: bool) -> Unsupported | None:
    """Why the operation may not run at this call, as far as the weights need not be read."""
    reason = unsupported_flags(module, down_bias_falls_back=patch.options.down_bias == "fallback")
    reason = reason or unsupported_training(module, patch.other_parameters)
    if reason is None and not is_patched:
        reason = unsupported_content(module)
    if reason is None and is_parametrized(module):
        spec = read_spec(module)
        reason = unsupported_parametrization(module, spec)
        if reason is None:
            _warn_of_late_adapters(patch, module, spec)
    return reason


def _warn_of_late_adapters(patch: LayerPatch, module: Any, spec: ExpertsSpec) -> None:
    """Warns of adapters that PEFT merges in this call because they were put on after patching."""
    known = {parameter for parameter, _ in patch.merge_reasons}
    for name in spec.stems:
        if is_parametrized(module, name) and name not in known and unsupported_layout() is None:
            warn_once(patch, name, unsupported("lora_added_later", name=name))


def _bytes_saved(patch: LayerPatch, spec: ExpertsSpec, weights: ExpertWeights, updates: Updates, num_rows: int) -> int:
    """Bytes that the default implementation would have saved for backward in this call, and the operation does not."""
    merged = {spec.up_name: weights.gate_up_proj, "down_proj": weights.down_proj}
    per_row = patch.estimate.baseline_per_row - patch.estimate.saved_per_row
    return per_row * num_rows + sum(merged[name].numel() * merged[name].element_size() for name in updates)


@contextmanager
def _merged(module: Any, updates: Updates) -> Iterator[None]:
    """Has the module's parameters be the sums of weight and updates, for the default implementation to compute with."""
    is_transposed = read_flags(module).is_transposed
    merged = {name: merge(getattr(module, name), found, is_transposed=is_transposed) for name, found in updates.items()}
    with replaced_parameters(module, merged):
        yield


def _needs_gradient(module: nn.Module, *inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *module.parameters()))


def _notice_choice(patch: LayerPatch) -> None:
    """Warns if the model's experts implementation was set since patching, which has no effect on a patched layer."""
    chosen = implementation_of(patch.config)
    if chosen == patch.implementation or is_decoding(chosen):
        return
    patch.implementation = chosen
    if chosen != IMPLEMENTATION:
        rank_zero_warn(
            f"the model's experts implementation was set to {chosen!r} while it is patched: active layers go on with "
            f"the operation, and run {chosen!r} after unpatch_moe",
            stacklevel=5,
        )


register_implementation(gategrad_experts)
