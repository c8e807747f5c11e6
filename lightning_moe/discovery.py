"""Discovery: the MoE layers of a model, under whatever wraps it, and whether the operation may run in each.

The only reader of what Transformers' experts classes look like; its refusals are the one list of why stock code runs.
"""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from transformers.integrations import moe as transformers_moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_moe.integrations.peft_experts import foreign_parametrization, merge_reason, wrappers_around
from lightning_moe.integrations.transformers_experts import (
    FLAGS,
    ExpertsContract,
    ExpertWeights,
    is_decorated,
    is_registered,
    read_contract,
    read_flags,
    stock_forward,
)
from lightning_moe.ops.experts import GRAPH_QUESTION, graph_question
from lightning_moe.ops.validation import unsupported

DownBias = Literal["exact", "fallback"]

# The options of Transformers' decorator that this module reads, or need not: what one of them sets is understood.
OPTIONS = {"experts_class", "experts_interface", "is_concatenated", "has_post_expert_norm", *FLAGS}
# What a decorated forward reads on its way to a function of the registry.
DISPATCHES_BY = ("config", "_experts_implementation", "get_interface")
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DOWN_BIAS = 'the down projection has a bias and down_bias="fallback" asks for stock code'

# Transformers' classes outside its registry whose contract is another one.
_OTHER_CONTRACTS = {
    "DbrxExperts": "its experts' weights are joined into two-dimensional ones",
    "DogeCDMoE": "its experts are rows of embeddings",
    "JetMoeMoA": "its experts project queries for attention",
    "JetMoeMoE": "its rows reach it sorted by its router, and it adds a bias of its own",
    "Llama4TextExperts": "the gate multiplies the experts' input",
    "LongcatFlashMoE": "some of its experts pass their input on as it is",
    "NllbMoeExperts": "its experts are modules of their own, with dropout after the gate",
    "SwitchTransformersExperts": "its experts are modules of their own, with dropout inside",
    "VitPoseNaiveMoe": "its experts are chosen by the input's kind, without gates",
}


@dataclass(frozen=True)
class MoELayer:
    """An MoE layer as found in a model.

    Attributes:
        name: its path in the model, as `get_submodule` takes it.
        module: the experts module itself, wrappers taken off.
        reason: why the operation may not run in it, or None if it may.
        is_dispatched: whether the module's calls go through Transformers' registry, or its class was registered with
            `register_experts`, so that it can be patched at all.
        wrappers: PEFT's, around the module for the parameters that it adapts, the innermost first.
    """

    name: str
    module: nn.Module
    reason: str | None
    is_dispatched: bool
    wrappers: tuple[ParamWrapper, ...] = ()


def reaches_class_forward(module: nn.Module) -> bool:
    """Whether a call comes to the class's forward or our own, through accelerate's hook if it has put one on."""
    forward = vars(module).get("forward")
    if hasattr(module, "_hf_hook"):
        forward = getattr(forward, "__wrapped__", forward)
    if forward is None or getattr(forward, "dispatches_on", False):
        return True
    return getattr(forward, "__func__", None) is type(module).forward


def find_moe_layers(model: nn.Module, *, down_bias: DownBias = "exact") -> list[MoELayer]:
    """Finds every MoE layer, in the model's order, seeing through PEFT, DDP and compiled wrappers.

    Args:
        model: any module that holds the layers.
        down_bias: `"fallback"` gives every layer with a down bias a reason to run stock code.
    """
    found: dict[str, MoELayer] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if is_decorated(module) or is_registered(module):
            elsewhere = _dispatch_refusal(module)
            reason = elsewhere or refusal(module, down_bias=down_bias) or content_refusal(module)
            wrappers = tuple(wrappers_around(model, name))
            found[name] = MoELayer(name, module, reason, is_dispatched=elsewhere is None, wrappers=wrappers)
    holders = {ancestor for name in found for ancestor in ("", *_ancestors(name))}
    for name, module in modules.items():
        inside = name in found or any(ancestor in found for ancestor in _ancestors(name))
        if not inside and name not in holders and _looks_like_moe(name, module):
            reason = _outside(module)
            wrappers = tuple(wrappers_around(model, name))
            found[name] = MoELayer(name, module, reason, is_dispatched=False, wrappers=wrappers)
    return [found[name] for name in modules if name in found]


def refusal(module: Any, *, down_bias: DownBias) -> str | None:
    """Why the operation may not run in a decorated or registered module, judged by its flags alone; None if it may.

    Cheap enough to be asked at every call: no parameter is read.
    """
    reasons = (
        (getattr(module, "has_post_expert_norm", False), "a norm stands between the down projection and the gate"),
        (down_bias == "fallback" and read_flags(module).has_bias, DOWN_BIAS),
    )
    return next((reason for applies, reason in reasons if applies), None)


def is_expert_parallel(module: Any) -> bool:
    """Whether a module holds only some of its layer's experts, so that foreign ids reach it."""
    if hasattr(module, "_is_expert_parallel") or is_registered(module):
        return getattr(module, "_is_expert_parallel", False)
    # Transformers 5.17 sets no flag: there the module counts its own experts, the config all of them.
    counts = (getattr(module.config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    num_experts = next((count for count in counts if isinstance(count, int)), None)
    return num_experts is not None and getattr(module, "num_experts", num_experts) != num_experts


def _dispatch_refusal(module: Any) -> str | None:
    """Why a decorated or registered module's calls would not reach the operation."""
    # Under expert parallelism Transformers' own forward goes on to the class's.
    if not (reaches_class_forward(module) or is_expert_parallel(module)):
        return "another library replaced the module's forward (with Liger, apply it with swiglu=False)"
    if not hasattr(module, "num_experts"):
        return "the module has no num_experts"
    if is_registered(module):
        if not getattr(vars(module).get("forward"), "dispatches_on", "forward" not in vars(module)):
            return "the module has a forward of its own, such as accelerate's or expert parallelism's"
        return None
    if stock_forward(module) is None:
        return "the class's forward does not carry its undecorated original (__wrapped__)"
    forward = type(module).forward
    registry = inspect.getclosurevars(forward).nonlocals.get("experts_interface")
    if registry is None or (unread := [name for name in DISPATCHES_BY if name not in forward.__code__.co_names]):
        names = "experts_interface" if registry is None else ", ".join(unread)
        return f"the class's forward has no {names}, by which Transformers' registry was asked"
    if registry is not ALL_EXPERTS_FUNCTIONS:
        return "the class dispatches through a registry of its own, such as quantized experts"
    if not _is_steered(module.config):
        return "the config's _experts_implementation does not follow _experts_implementation_internal"
    return None


def _is_steered(config: Any) -> bool:
    """Whether a copy of the config can be made to name another experts function."""
    if not hasattr(config, "_experts_implementation_internal"):
        return False
    other = copy.copy(config)
    other._experts_implementation_internal = "another"
    return getattr(other, "_experts_implementation", None) == "another"


def conveniences_gone() -> Iterator[str]:
    """Private names that are not there any more, and what that costs: time or memory, never a gradient."""
    if not hasattr(transformers_moe, "_default_apply_gate"):
        yield "Transformers has no _default_apply_gate any more: activations run without their kernels"
    if graph_question() is None:
        yield f"PyTorch has no {GRAPH_QUESTION} any more: backward takes memory of its own for one more gradient"


def content_refusal(module: Any) -> str | None:
    """Why the operation may not run in a decorated or registered module, judged by its parameters and submodules.

    Weights that a strategy has taken apart are judged at the call.
    """
    try:
        contract = read_contract(module)
        if reason := parametrization_refusal(module, contract):
            return reason
        contract.weights(module)
    except AttributeError as error:
        return str(error)
    options = inspect.signature(transformers_moe.use_experts_implementation).parameters
    for name in sorted(options.keys() - OPTIONS):
        if getattr(module, name, options[name].default) != options[name].default:
            return f"the class sets {name}, an option that this version of lightning_moe does not know"
    stems = (contract.up_name, "down_proj")
    biases = [f"{stem}_bias" for stem in stems if getattr(module, f"{stem}_bias", None) is not None]
    if biases and not contract.has_bias:
        return f"the module has {', '.join(biases)}, and its class says that it has no bias"
    if trained := [name for name in other_parameters(module) if module.get_parameter(name).requires_grad]:
        return unknown_parameters(trained)
    if any(isinstance(child, DROPOUTS) for child in module.modules()):
        return "dropout inside the experts would differ when the activation is recomputed"
    if not isinstance(getattr(module, contract.up_name, None), Tensor) or not isinstance(
        getattr(module, "down_proj", None), Tensor
    ):
        return f"{contract.up_name} or down_proj is not a tensor"
    weights = contract.weights(module)
    return weights_refusal(weights) if weights.are_whole else None


def parametrization_refusal(module: Any, contract: ExpertsContract) -> str | None:
    """Why weights are not plain parameters: each reading computes one, which backward would keep beside the packed one.

    What PEFT puts on for a call, to merge its adapters, is none of these.
    """
    for name in (contract.up_name, "down_proj"):
        if parametrization := foreign_parametrization(module, name):
            return (
                f"{name} is parametrized by {parametrization}, such as a quantized weight: backward would keep a dense "
                "copy of it"
            )
    return None


def weights_refusal(weights: ExpertWeights) -> str | None:
    """Why the operation cannot compute with these tensors, which are whole."""
    for name, weight in zip(weights._fields[:2], weights[:2], strict=True):
        is_plain = type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__  # as Parameter and FSDP1's are
        if not (is_plain or isinstance(weight, (DTensor, FakeTensor))):
            return f"{name} is a {type(weight).__name__}, such as a quantized weight, and not a plain tensor"
    return unsupported(weights.gate_up_proj, weights.down_proj)


def other_parameters(module: Any) -> list[str]:
    """The names of an experts module's parameters beside the experts' own weights: those of its activation, say."""
    contract = read_contract(module)
    own = {f"{stem}{end}" for stem in (contract.up_name, "down_proj") for end in ("", "_bias")}
    return [name for name, _ in module.named_parameters() if name not in own]


def unknown_parameters(trained: Sequence[str]) -> str:
    """Why the operation may not run where these parameters of an experts module are trained."""
    return f"the module trains parameters that the operation does not know: {', '.join(trained)}"


def _outside(module: nn.Module) -> str:
    name = type(module).__name__
    why = _OTHER_CONTRACTS.get(name) if type(module).__module__.startswith("transformers.") else None
    lacks = ", ".join(flag for flag in (*FLAGS, "config") if not hasattr(module, flag))
    why = why or f"it has no {lacks}; lightning_moe.register_experts may take its experts"
    return f"{name} does not go through Transformers' experts registry: {why}"


def adapter_reason(wrapper: ParamWrapper, module: Any) -> str | None:
    """Why PEFT has to merge a wrapper's adapters into the weight; None if their factors can be kept apart."""
    if getattr(module, "is_transposed", False) != read_flags(module).is_transposed:
        return f"PEFT merges the adapter on {wrapper.parameter_name}: it reads is_transposed off the module"
    return merge_reason(wrapper, module, (read_contract(module).up_name, "down_proj"))


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _looks_like_moe(name: str, module: nn.Module) -> bool:
    """Whether a module's name or class says that it routes tokens to experts."""
    if isinstance(module, ParamWrapper):  # what it wraps will do
        return False
    classes = (ancestor.__name__ for ancestor in type(module).__mro__)
    return name.replace(".base_layer", "").rpartition(".")[2] == "experts" or any(
        re.search(r"(?<!Shared)(Experts|MoE)$", own) for own in classes
    )


@dataclass(frozen=True)
class TapeEstimate:
    """Bytes that one execution keeps on the autograd tape, the layer's input and its weights not counted.

    Attributes:
        stock_per_row: stock grouped_mm, per (token, slot) row.
        kept_per_row: the operation, per row.
        stock_merged: stock, whatever the rows: the weights that PEFT merges its adapters into.
    """

    stock_per_row: int
    kept_per_row: int
    stock_merged: int = 0


def estimate_tape(module: nn.Module, ranks: Mapping[str, int], *, recompute_up: bool) -> TapeEstimate:
    """Estimates a decorated layer's tape where its input and gates want gradients.

    The activation's share is measured by running it on one row; the rest follows from the shapes.

    Args:
        module: the experts module.
        ranks: of the adapters that are kept apart, by the name of the parameter that they adapt.
        recompute_up: see `moe_experts`.
    """
    contract = read_contract(module)
    weights = contract.weights(module)
    up, down = weights.gate_up_proj, weights.down_proj
    in_axis, out_axis = (1, 2) if contract.is_transposed else (2, 1)
    hidden, width, intermediate = up.shape[in_axis], up.shape[out_axis], down.shape[in_axis]
    size = down.element_size()

    storages: set[torch.UntypedStorage] = set()

    def record(tensor: Tensor) -> Tensor:
        storages.add(tensor.untyped_storage())
        return tensor

    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(record, lambda tensor: tensor):
        contract.activation(torch.zeros(1, width, dtype=down.dtype, device=down.device, requires_grad=True))
    routing = 2 * torch.long.itemsize + size
    adapts_up, adapts_down = contract.up_name in ranks, "down_proj" in ranks
    trained_rows = (up.requires_grad or adapts_up) * hidden + (down.requires_grad or adapts_down) * intermediate
    kept = 0 if recompute_up else width
    experts = torch.long.itemsize if contract.has_bias else 0  # the bias's term asks for them by slot
    return TapeEstimate(
        stock_per_row=sum(storage.nbytes() for storage in storages) + (hidden + trained_rows) * size + routing,
        kept_per_row=(kept + sum(ranks.values())) * size + routing + experts,
        stock_merged=(adapts_up * up.numel() + adapts_down * down.numel()) * size,
    )
