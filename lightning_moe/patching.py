"""Patching: points a model's experts modules at the operation, and restores everything.

What is changed: a decorated experts module has a copy of its config that names our experts function, a registered one
and PEFT's wrappers around either have a forward of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_moe.discovery import MoELayer, find_moe_layers, other_parameters
from lightning_moe.dispatch import gategrad_experts, update_estimate
from lightning_moe.integrations.peft_experts import active_adapters, unsupported_adapter, unsupported_layout
from lightning_moe.integrations.transformers_dispatch import is_expert_parallel
from lightning_moe.integrations.transformers_experts import experts_per_token, is_registered, read_spec
from lightning_moe.integrations.unsupported import Unsupported, unsupported
from lightning_moe.ops import operator
from lightning_moe.ops.validation import check_output_buffer
from lightning_moe.patch_report import LayerReport, PatchReport
from lightning_moe.patch_state import DownBias, LayerPatch, PatchOptions, attach, detach, patch_of, patched_modules
from lightning_moe.unmerged_lora import attach_wrapper, is_unmerged


def patch_moe(
    model: nn.Module,
    *,
    down_bias: DownBias = "exact",
    output_buffer_mib: float = 512,
    recompute_gate_up: bool = False,
) -> PatchReport:
    """Makes every supported MoE layer of a model run the operation; the others keep the default implementation.

    Patching a patched model applies the new options. If patching fails, the model is as it was.

    >>> from lightning_moe import patch_moe, unpatch_moe
    >>> from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
    >>> config = Qwen3MoeConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_experts=8)
    >>> model = Qwen3MoeForCausalLM(config)
    >>> report = patch_moe(model)
    >>> [(layer.name, layer.status) for layer in report]
    [('model.layers.0.mlp.experts', 'active'), ('model.layers.1.mlp.experts', 'active')]
    >>> unpatch_moe(model)

    Args:
        model: holds the layers, under any wrappers.
        down_bias: `"exact"` adds the bias's term to the gradient of the routing weights; `"fallback"` runs the default
            implementation for a layer whose `down_proj` has a bias.
        output_buffer_mib: see `moe_experts`.
        recompute_gate_up: see `moe_experts`.

    Returns:
        Every MoE layer, what became of it and why.

    Raises:
        ValueError: on an option out of range; on an adapter of PEFT that would train wrongly, patched or not.
    """
    options = PatchOptions(down_bias, output_buffer_mib, recompute_gate_up)
    check_options(options)
    unsupported_layout()  # tried here, and cached: it builds small wrappers and reads them, so that no step has to
    unpatch_moe(model)
    layers = find_moe_layers(model, down_bias_falls_back=down_bias == "fallback")
    _check_adapters(layers)
    try:
        return PatchReport(tuple(_patch(layer, options) for layer in layers))
    except BaseException:
        unpatch_moe(model)
        raise


def unpatch_moe(model: nn.Module) -> None:
    """Restores what `patch_moe` changed. Does nothing to a model that is not patched."""
    for module in touched_modules(model):
        if patch_of(module) is not None:
            detach(module)
        else:
            del module.forward


@contextmanager
def gategrad(
    model: nn.Module,
    *,
    down_bias: DownBias = "exact",
    output_buffer_mib: float = 512,
    recompute_gate_up: bool = False,
) -> Iterator[PatchReport]:
    """`patch_moe` on entering, `unpatch_moe` on leaving, also by an exception. Arguments as for `patch_moe`."""
    report = patch_moe(
        model, down_bias=down_bias, output_buffer_mib=output_buffer_mib, recompute_gate_up=recompute_gate_up
    )
    try:
        yield report
    finally:
        unpatch_moe(model)


def check_options(options: PatchOptions) -> None:
    """Raises ValueError on an option out of range, naming it."""
    if options.down_bias not in ("exact", "fallback"):
        raise ValueError(f"down_bias must be 'exact' or 'fallback', not {options.down_bias!r}")
    check_output_buffer(options.output_buffer_mib)


def touched_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that patching changed: experts modules, and PEFT's wrappers around them."""
    patched = set(patched_modules(model))
    return [module for module in model.modules() if module in patched or is_unmerged(module)]


def _patch(layer: MoELayer, options: PatchOptions) -> LayerReport:
    """Patches one layer."""
    module, class_name = layer.module, type(layer.module).__name__
    config: Any = None if is_registered(module) else getattr(module, "config", None)
    if layer.reason is not None:
        if layer.is_dispatched:
            attach(module, LayerPatch(config, options, layer.reason), gategrad_experts)
        merged = (unsupported("lora_layer_falls_back"),) * bool(layer.wrappers)
        return LayerReport(layer.name, class_name, "fallback", layer.reason, adapter_reasons=merged)
    patch = LayerPatch(config, options, other_parameters=other_parameters(module))
    attach(module, patch, gategrad_experts)
    for wrapper in layer.wrappers:
        if reason := attach_wrapper(wrapper, module):
            patch.merge_reasons.add((wrapper.parameter_name, reason))
        elif adapters := active_adapters(wrapper):
            patch.ranks[wrapper.parameter_name] = sum(wrapper.r[adapter] for adapter in adapters)
    patch.spec = spec = read_spec(module)
    weights = spec.weights(module)
    if weights.are_full:  # else at the first call
        update_estimate(module, patch, weights)
        if operator.is_known(spec.activation) and not (patch.other_parameters or is_expert_parallel(module)):
            patch.health.probe = operator.new_probe(weights.down_proj.device)
    reasons = sorted({reason for _, reason in patch.merge_reasons}, key=str)
    top_k = None if patch.dtype is None else experts_per_token(config)
    return LayerReport(
        layer.name,
        class_name,
        "active",
        baseline_bytes=patch.estimate.baseline_per_row * top_k if top_k is not None else None,
        saved_bytes=patch.estimate.saved_per_row * top_k if top_k is not None else None,
        merged_bytes=patch.estimate.baseline_merged,
        has_adapters=bool(layer.wrappers),
        adapter_reasons=tuple(reasons),
    )


def _check_adapters(layers: list[MoELayer]) -> None:
    """Raises ValueError if PEFT's adapters on an experts module would train wrongly, patched or not."""
    found: dict[Unsupported, list[str]] = {}
    for layer in layers:
        for wrapper in layer.wrappers:
            if reason := unsupported_adapter(wrapper, layer.module):
                found.setdefault(reason, []).append(layer.shown_name)
    if found:
        listed = "".join(f"\n- {_shortened(names)}: {reason}" for reason, names in found.items())
        raise ValueError(
            f"PEFT's adapters on these experts cannot train:{listed}\nLeave the experts out of target_parameters, or "
            "load their weights in bfloat16, without quantization or another parametrization."
        )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
