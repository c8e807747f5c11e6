"""Patching: points a model's experts modules at the operation, and puts everything back.

The only writer of Transformers' and PEFT's private names. A decorated experts module looks up its forward in a registry
under `module.config._experts_implementation`, at every call. Patching registers one function there, `gategrad`, and
gives each module a copy of its config that names it; the model's own config, other models built from it and the state
dict stay untouched. What belongs to a layer's patch is one attribute on its module, which copies and pickles with it.

PEFT's wrappers around an experts module get a forward of their own that hands the wrapper on to the function, in the
call's arguments, instead of merging its adapters into the weight.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_moe.discovery import (
    DOWN_BIAS,
    DownBias,
    MoELayer,
    TapeEstimate,
    adapter_reason,
    content_refusal,
    conveniences_gone,
    estimate_tape,
    find_moe_layers,
    is_expert_parallel,
    other_parameters,
    parametrization_refusal,
    reaches_class_forward,
    refusal,
    unknown_parameters,
    weights_refusal,
)
from lightning_moe.health import LayerHealth
from lightning_moe.integrations.peft_experts import active_adapters, adapter_fault, low_rank, peft_refusal
from lightning_moe.integrations.transformers_experts import (
    ExpertsContract,
    is_registered,
    read_contract,
    read_flags,
    stock_forward,
)
from lightning_moe.ops.experts import moe_experts
from lightning_moe.ops.low_rank import LowRank, merge
from lightning_moe.ops.validation import ChunkTokens, check_chunk_tokens
from lightning_moe.patch_report import APART, LayerReport, PatchReport

IMPLEMENTATION = "gategrad"
_PATCH = "_gategrad_patch"
# What Transformers' `generate` sets on a GPU for as long as it decodes.
DECODING = "batched_mm"


@dataclass
class LayerPatch:
    """What a patched module carries.

    Attributes:
        config: the module's own config, to be put back; what stock code is, is read from it at every call. None for a
            class registered with `register_experts`, whose stock code is its own forward.
        reason: why stock code runs, or None.
        down_bias: see `patch_moe`.
        chunk_tokens: see `moe_experts`.
        recompute_up: see `moe_experts`.
        named: the copy of `config` that the module has while it is patched.
        implementation: what `config` named when this was last looked at.
        tape: what stock code and the operation keep for backward, with weights of `dtype`.
        dtype: of the weights that the layer computed with last; a strategy may cast them for the call. None before the
            first call where a strategy has taken them apart.
        ranks: of the adapters that are kept apart, by the name of the parameter that they adapt.
        health: the layer's counters.
        merge_reasons: why PEFT merges some of the layer's adapters, as far as has been said.
        other_parameters: names of the module's parameters beside the experts' weights, which may be unfrozen at any
            time.
    """

    config: Any
    reason: str | None = None
    down_bias: DownBias = "exact"
    chunk_tokens: ChunkTokens = "auto"
    recompute_up: bool = False
    named: Any = None
    implementation: str | None = None
    tape: TapeEstimate = TapeEstimate(0, 0)
    dtype: torch.dtype | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    health: LayerHealth = field(default_factory=LayerHealth)
    merge_reasons: set[str] = field(default_factory=set)
    other_parameters: list[str] = field(default_factory=list)


def patch_moe(
    model: nn.Module,
    *,
    down_bias: DownBias = "exact",
    chunk_tokens: ChunkTokens = "auto",
    recompute_up: bool = False,
) -> PatchReport:
    """Makes every MoE layer of a model that can take the operation run it; the others keep stock code.

    Patching a patched model applies the new options. If patching fails, the model is as it was.

    Args:
        model: holds the layers, under any wrappers.
        down_bias: `"exact"` adds the bias's term to the gates' gradient; `"fallback"` runs stock code for a layer whose
            down projection has a bias.
        chunk_tokens: see `moe_experts`.
        recompute_up: see `moe_experts`.

    Returns:
        Every MoE layer, what became of it and why.

    Raises:
        ValueError: on an option out of range; on an adapter of PEFT that would train wrongly, patched or not.
    """
    check_options(down_bias=down_bias, chunk_tokens=chunk_tokens)
    for said in conveniences_gone():
        rank_zero_warn(said, stacklevel=3)
    peft_refusal()  # tried here, and kept: it builds small wrappers and reads them, so that no training step has to
    unpatch_moe(model)
    layers = find_moe_layers(model, down_bias=down_bias)
    _check_adapters(layers)
    reports = []
    try:
        for layer in layers:
            class_name = type(layer.module).__name__
            if layer.reason is None:
                patch = LayerPatch(_own_config(layer.module), None, down_bias, chunk_tokens, recompute_up)
                patch.other_parameters = other_parameters(layer.module)
                _attach(layer.module, patch)
                patch.ranks = _attach_wrappers(layer, patch)
                adapters = "; ".join(sorted(patch.merge_reasons)) or (APART if layer.wrappers else "")
                _estimate(layer.module, patch)
                before, after = _per_token(patch)
                merged = patch.tape.stock_merged
                reports.append(LayerReport(layer.name, class_name, "active", "", before, after, adapters, merged))
            else:
                if layer.is_dispatched:
                    _attach(layer.module, LayerPatch(_own_config(layer.module), layer.reason, down_bias))
                adapters = "PEFT merges them, as the layer runs stock code" if layer.wrappers else ""
                reports.append(LayerReport(layer.name, class_name, "fallback", layer.reason, adapters=adapters))
    except BaseException:
        unpatch_moe(model)
        raise
    return PatchReport(tuple(reports))


def unpatch_moe(model: nn.Module) -> None:
    """Puts back what `patch_moe` changed. Does nothing to a model that is not patched."""
    for module in touched_modules(model):
        if _PATCH in vars(module):
            _switch_off(module, vars(module).pop(_PATCH))
        else:
            del module.forward


@contextmanager
def gategrad(
    model: nn.Module,
    *,
    down_bias: DownBias = "exact",
    chunk_tokens: ChunkTokens = "auto",
    recompute_up: bool = False,
) -> Iterator[PatchReport]:
    """`patch_moe` on entering, `unpatch_moe` on leaving, also by an exception. Arguments as for `patch_moe`."""
    report = patch_moe(model, down_bias=down_bias, chunk_tokens=chunk_tokens, recompute_up=recompute_up)
    try:
        yield report
    finally:
        unpatch_moe(model)


@contextmanager
def stock_code(module: Any) -> Iterator[None]:
    """Has one experts module run what it would without its patch, if it carries one, inside the block."""
    patch = vars(module).get(_PATCH)
    was_on = patch is not None and _is_on(module, patch)
    if was_on:
        _switch_off(module, patch)
    try:
        yield
    finally:
        if was_on:
            _switch_on(module, patch)


def check_options(*, down_bias: DownBias, chunk_tokens: ChunkTokens) -> None:
    """Raises ValueError on an option out of range, naming it."""
    if down_bias not in ("exact", "fallback"):
        raise ValueError(f"down_bias must be 'exact' or 'fallback', not {down_bias!r}")
    check_chunk_tokens(chunk_tokens)


def patched_modules(model: nn.Module) -> list[nn.Module]:
    """The experts modules of a model that carry a patch, active or not."""
    return [module for module in model.modules() if _PATCH in vars(module)]


def touched_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that patching changed: experts modules, and PEFT's wrappers around them."""
    return [module for module in model.modules() if _PATCH in vars(module) or _is_apart(module)]


def layer_patch(module: nn.Module) -> LayerPatch:
    """The patch that a module carries."""
    return vars(module)[_PATCH]


def _check_adapters(layers: list[MoELayer]) -> None:
    """Raises ValueError if PEFT's adapters on an experts module would train wrongly, patched or not."""
    faults: dict[str, list[str]] = {}
    for layer in layers:
        for wrapper in layer.wrappers:
            if fault := adapter_fault(wrapper, layer.module):
                faults.setdefault(fault, []).append(layer.name.replace(".base_layer", ""))
    if faults:
        found = "".join(f"\n- {_shortened(names)}: {fault}" for fault, names in faults.items())
        raise ValueError(
            f"PEFT's adapters on these experts cannot train:{found}\nLeave the experts out of target_parameters, or "
            "load their weights in bfloat16, without quantization or another parametrization."
        )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _attach(module: Any, patch: LayerPatch) -> None:
    patch.implementation = getattr(patch.config, "_experts_implementation", None)
    setattr(module, _PATCH, patch)
    _switch_on(module, patch)


def _estimate(module: Any, patch: LayerPatch) -> None:
    if not read_contract(module).weights(module).are_whole:
        return  # until the first call
    patch.dtype = module.down_proj.dtype
    patch.tape = estimate_tape(module, patch.ranks, recompute_up=patch.recompute_up)


def _own_config(module: Any) -> Any:
    return None if is_registered(module) else module.config


def _switch_on(module: Any, patch: LayerPatch) -> None:
    """Has the module's calls reach `gategrad_experts`."""
    if patch.config is None:
        module.forward = _RunPatched(module)
    else:
        patch.named = copy.copy(patch.config)
        patch.named._experts_implementation_internal = IMPLEMENTATION
        module.config = patch.named


def _switch_off(module: Any, patch: LayerPatch) -> None:
    if patch.config is not None:
        if _is_on(module, patch):  # and not one that the user has put in since
            module.config = patch.config
    elif isinstance(vars(module).get("forward"), _RunPatched):  # and not another library's, put on since
        del module.forward


def _is_on(module: Any, patch: LayerPatch) -> bool:
    if patch.config is not None:
        return module.config is patch.named
    return isinstance(vars(module).get("forward"), _RunPatched)


def _is_apart(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), _KeepApart)


def _attach_wrappers(layer: MoELayer, patch: LayerPatch) -> dict[str, int]:
    """Patches PEFT's wrappers around a layer and notes why some merge; the others' active ranks, by parameter."""
    ranks = {}
    for wrapper in layer.wrappers:
        reason = _merge_reason(wrapper, layer.module)
        if peft_refusal() is not None:
            pass  # nothing that is read out of the wrapper can be relied on
        elif "forward" in vars(wrapper):
            reason = f"PEFT merges the adapter on {wrapper.parameter_name}: another library replaced its forward"
        else:
            wrapper.forward = _KeepApart(wrapper)  # type: ignore[method-assign]
        if reason is not None:
            patch.merge_reasons.add(reason)
        elif adapters := active_adapters(wrapper):
            ranks[wrapper.parameter_name] = sum(wrapper.r[adapter] for adapter in adapters)
    return ranks


class _RunPatched:
    """The forward of a patched module of a registered class. An object, and not a module, as `_KeepApart` is."""

    dispatches_on = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if _PATCH not in vars(self.module):  # another library kept hold of this forward
            return type(self.module).forward(self.module, *args, **kwargs)
        return gategrad_experts(self.module, *args, **kwargs)


def _merge_reason(wrapper: ParamWrapper, module: nn.Module) -> str | None:
    """Why PEFT has to merge a wrapper's adapters at this call: also if a forward on the way in is another library's."""
    if (reason := adapter_reason(wrapper, module)) is not None:
        return reason
    inner: Any = wrapper.base_layer
    while isinstance(inner, ParamWrapper) and ("forward" not in vars(inner) or _is_apart(inner)):
        inner = inner.base_layer
    if isinstance(inner, ParamWrapper) or not reaches_class_forward(module):
        return f"PEFT merges the adapter on {wrapper.parameter_name}: another library replaced a forward inside"
    return None


class _KeepApart:
    """The forward of a patched wrapper: leaves the weight alone, and adds itself to the call's `adapted_by`.

    An object and not a bound function, so that copies and pickles of the model hold one of their own; and not a module,
    which libraries that look through a call's arguments would move.
    """

    def __init__(self, wrapper: ParamWrapper) -> None:
        self.wrapper = wrapper

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        idles = torch.compiler.is_compiling() and not active_adapters(self.wrapper)
        if idles or torch.compiler.is_exporting():  # where PEFT's can be traced
            return ParamWrapper.forward(self.wrapper, x, *args, **kwargs)
        return self._run(x, *args, **kwargs)

    @torch.compiler.disable  # one code object for all wrappers: each would be compiled anew, up to a limit
    def _run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wrapper = self.wrapper
        module: Any = wrapper.get_base_layer()
        if is_parametrized(module) and (fault := adapter_fault(wrapper, module)):  # since it was patched
            raise ValueError(fault)
        patch = vars(module).get(_PATCH)
        is_active = patch is not None and patch.reason is None and _is_on(module, patch)
        if is_active and active_adapters(wrapper) and "adapter_names" not in kwargs:
            reason = _merge_reason(wrapper, module)
            if reason is None:
                adapted_by = (*kwargs.pop("adapted_by", ()), self)
                return wrapper.base_layer(x, *args, **kwargs, adapted_by=adapted_by)
            _say_once(patch, reason)
        return ParamWrapper.forward(wrapper, x, *args, **kwargs)


def _say_once(patch: LayerPatch, reason: str) -> None:
    if reason not in patch.merge_reasons:
        patch.merge_reasons.add(reason)
        rank_zero_warn(reason, stacklevel=4)


def _per_token(patch: LayerPatch) -> tuple[int | None, int | None]:
    top_k = getattr(patch.config, "num_experts_per_tok", None)
    if not isinstance(top_k, int) or patch.dtype is None:
        return None, None
    return patch.tape.stock_per_row * top_k, patch.tape.kept_per_row * top_k


def _stock_experts(module: Any, config: Any, hidden_states: Tensor, top_k_index: Tensor, gates: Tensor) -> Tensor:
    """What the module would run if it had never been patched."""
    if config is None:
        return type(module).forward(module, hidden_states, top_k_index, gates)
    name = config._experts_implementation
    if name == IMPLEMENTATION:  # asked for by name, without patch_moe: Transformers' own default stands behind it
        name = "grouped_mm"
    stock = ALL_EXPERTS_FUNCTIONS.get_interface(name, stock_forward(module))
    return stock(module, hidden_states, top_k_index, gates)


@contextmanager
def _merged(module: Any, updates: Mapping[str, list[LowRank]]) -> Iterator[None]:
    """Has the module's parameters be the sums of weight and updates, for stock code to compute with."""
    kept, is_transposed = {name: module._parameters[name] for name in updates}, read_flags(module).is_transposed
    try:
        for name, weight in kept.items():
            module._parameters[name] = merge(weight, updates[name], is_transposed=is_transposed)
        yield
    finally:
        module._parameters.update(kept)


def _name_merged(patch: LayerPatch, module: Any, contract: ExpertsContract) -> None:
    """Says which adapters PEFT merges in this call because they were put on after patching."""
    for name in (contract.up_name, "down_proj"):
        unsaid = not any(f" on {name}" in said for said in patch.merge_reasons)
        if unsaid and is_parametrized(module, name) and peft_refusal() is None:
            _say_once(patch, f"PEFT merges the adapter on {name}: it was put on after patch_moe; patch again")


def _needs_gradient(module: nn.Module, *inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *module.parameters()))


def _notice_choice(patch: LayerPatch) -> None:
    """Says so if the model's experts implementation was set since patching: that has no effect on a patched layer."""
    chosen = getattr(patch.config, "_experts_implementation", None)
    if chosen == patch.implementation or (chosen == DECODING and not torch.is_grad_enabled()):
        return
    patch.implementation = chosen
    if chosen != IMPLEMENTATION:
        rank_zero_warn(
            f"the model's experts implementation was set to {chosen!r} while it is patched: active layers go on with "
            f"the operation, and run {chosen!r} after unpatch_moe",
            stacklevel=5,
        )


def gategrad_experts(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    adapted_by: tuple[_KeepApart, ...] = (),
) -> Tensor:
    """The experts function in Transformers' signature, registered as `gategrad`.

    Runs the operation where it may, and otherwise what the layer had before; either is counted in backward. Compiled
    models break their graph here where a gradient is needed. Where none is, and in an export, the graph has what the
    layer had before.

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
    is_compiled = torch.compiler.is_compiling() and not _needs_gradient(module, hidden_states, top_k_weights)
    if (is_compiled or torch.compiler.is_exporting()) and not adapted_by:
        config = layer_patch(module).config if _PATCH in vars(module) else module.config
        return _stock_experts(module, config, *inputs)
    return _run_experts(module, *inputs, adapted_by)


@torch.compiler.disable
def _run_experts(
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapted_by: tuple[_KeepApart, ...],
) -> Tensor:
    """What `gategrad_experts` does outside of a graph."""
    is_patched = _PATCH in vars(module)
    patch = layer_patch(module) if is_patched else LayerPatch(module.config)
    gates = top_k_weights.view_as(top_k_weights)  # a tensor of our own, whose gradient is this layer's alone

    def stock(hidden_states: Tensor, top_k_index: Tensor, gates: Tensor) -> Tensor:
        with _merged(module, updates):
            return _stock_experts(module, patch.config, hidden_states, top_k_index, gates)

    updates: dict[str, list[LowRank]] = {}
    for wrapper in (forward.wrapper for forward in adapted_by):
        found = [low_rank(wrapper, adapter) for adapter in active_adapters(wrapper)]
        updates.setdefault(wrapper.parameter_name, []).extend(found)
    reason = patch.reason or refusal(module, down_bias=patch.down_bias)
    if trained := [name for name in patch.other_parameters if module.get_parameter(name).requires_grad]:
        reason = reason or unknown_parameters(trained)
    if not is_patched:
        reason = reason or content_refusal(module)
    if reason is None:
        contract = read_contract(module)
        if is_parametrized(module):
            reason = parametrization_refusal(module, contract)
            if reason is None:
                _name_merged(patch, module, contract)
    if reason is None:
        if is_patched:
            _notice_choice(patch)
        weights = contract.weights(module)
        reason = weights_refusal(weights)
    if reason is not None:
        if patch.reason is None:
            patch.reason = reason
            rank_zero_warn(f"{type(module).__name__} runs stock code after all: {reason}", stacklevel=3)
        output = stock(hidden_states, top_k_index, gates)
        patch.health.watch(
            output, top_k_index, gates, num_experts=module.num_experts, active=False, bias_fallback=reason == DOWN_BIAS
        )
        return output

    output = moe_experts(
        hidden_states,
        top_k_index,
        gates,
        **weights._asdict(),
        activation=contract.activation,
        is_transposed=contract.is_transposed,
        gate_up_updates=updates.get(contract.up_name, ()),
        down_updates=updates.get("down_proj", ()),
        chunk_tokens=patch.chunk_tokens,
        recompute_up=patch.recompute_up,
        is_expert_parallel=is_expert_parallel(module),
    )
    if is_patched and patch.dtype != weights.down_proj.dtype:
        _estimate(module, patch)
    merged = {contract.up_name: weights.gate_up_proj, "down_proj": weights.down_proj}
    saved = (patch.tape.stock_per_row - patch.tape.kept_per_row) * top_k_index.numel()
    saved += sum(merged[name].nbytes for name in updates)
    patch.health.watch(output, top_k_index, gates, num_experts=module.num_experts, active=True, tape_bytes_saved=saved)
    if patch.health.audit_due:
        patch.health.audit(stock, hidden_states, top_k_index, gates, output)
    return output


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, gategrad_experts)
