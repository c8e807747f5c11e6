"""Discovery: the MoE layers of a model, under whatever wraps it, and whether the operation may run in each."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

from lightning_moe.integrations.peft_experts import foreign_parametrization, wrappers_around
from lightning_moe.integrations.torch_modules import is_plain
from lightning_moe.integrations.transformers_dispatch import unsupported_dispatch
from lightning_moe.integrations.transformers_experts import (
    FLAGS,
    ExpertsSpec,
    ExpertWeights,
    is_decorated,
    is_registered,
    read_flags,
    read_spec,
)
from lightning_moe.integrations.unsupported import Unsupported, unsupported
from lightning_moe.ops.quantized import QuantizedWeight
from lightning_moe.ops.validation import unsupported_weights

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)

# Transformers' classes outside its registry that compute something else.
_OUTSIDE_REGISTRY = {
    "DbrxExperts": "its experts' weights are joined into two-dimensional ones",
    "DogeCDMoE": "its experts are rows of embeddings",
    "JetMoeMoA": "its experts project queries for attention",
    "JetMoeMoE": "its rows reach it sorted by its router, and it adds a bias of its own",
    "Llama4TextExperts": "the routing weight multiplies the experts' input",
    "LongcatFlashMoE": "some of its experts pass their input on as it is",
    "NllbMoeExperts": "its experts are modules of their own, with dropout after the routing weight",
    "SwitchTransformersExperts": "its experts are modules of their own, with dropout inside",
    "VitPoseNaiveMoe": "its experts are chosen by the input's kind, without routing weights",
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
    reason: Unsupported | None
    is_dispatched: bool
    wrappers: tuple[ParamWrapper, ...] = ()

    @property
    def shown_name(self) -> str:
        """The name without PEFT's wrappers."""
        return self.name.replace(".base_layer", "")


def find_moe_layers(model: nn.Module, *, down_bias_falls_back: bool = False) -> list[MoELayer]:
    """Finds every MoE layer, in the model's order, seeing through PEFT, DDP and compiled wrappers.

    Args:
        model: any module that holds the layers.
        down_bias_falls_back: gives every layer with a `down_proj` bias a reason to run the default implementation.
    """
    found: dict[str, MoELayer] = {}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if is_decorated(module) or is_registered(module):
            elsewhere = unsupported_dispatch(module)
            reason = (
                elsewhere
                or unsupported_flags(module, down_bias_falls_back=down_bias_falls_back)
                or unsupported_content(module)
            )
            wrappers = tuple(wrappers_around(model, name))
            found[name] = MoELayer(name, module, reason, is_dispatched=elsewhere is None, wrappers=wrappers)
    containers = {ancestor for name in found for ancestor in ("", *_ancestors(name))}
    for name, module in modules.items():
        inside = name in found or any(ancestor in found for ancestor in _ancestors(name))
        if not inside and name not in containers and _looks_like_moe(name, module):
            wrappers = tuple(wrappers_around(model, name))
            found[name] = MoELayer(name, module, _outside_registry(module), is_dispatched=False, wrappers=wrappers)
    return [found[name] for name in modules if name in found]


def unsupported_flags(module: Any, *, down_bias_falls_back: bool) -> Unsupported | None:
    """Why the operation may not run in a decorated or registered module, judged by its flags alone.

    Cheap enough for every call: no parameter is read.
    """
    if getattr(module, "has_post_expert_norm", False):
        return unsupported("post_expert_norm")
    if down_bias_falls_back and read_flags(module).has_bias:
        return unsupported("down_proj_bias")
    return None


def unsupported_content(module: Any) -> Unsupported | None:
    """Why the operation may not run in a decorated or registered module, judged by its parameters and submodules.

    Weights that a strategy has sharded are judged at the call.
    """
    try:
        spec = read_spec(module)
        if reason := unsupported_parametrization(module, spec):
            return reason
        weights = spec.weights(module)
    except AttributeError as error:
        return unsupported("missing_attribute", what=error)
    biases = [f"{stem}_bias" for stem in spec.stems if getattr(module, f"{stem}_bias", None) is not None]
    if biases and not spec.has_bias:
        return unsupported("undeclared_bias", names=", ".join(biases))
    if reason := unsupported_training(module, other_parameters(module)):
        return reason
    if any(isinstance(child, DROPOUTS) for child in module.modules()):
        return unsupported("dropout")
    if not all(isinstance(weight, Tensor) for weight in weights[:2]):
        return unsupported("not_a_tensor", names=" or ".join(spec.stems))
    return unsupported_tensors(weights) if weights.are_full else None


def unsupported_parametrization(module: Any, spec: ExpertsSpec) -> Unsupported | None:
    """Why weights are not plain parameters: each reading computes one, which backward would keep beside the packed one.

    What PEFT puts on for a call, to merge its adapters, is none of these.
    """
    for name in spec.stems:
        if parametrization := foreign_parametrization(module, name):
            return unsupported("parametrized", name=name, parametrization=parametrization)
    return None


def unsupported_tensors(weights: ExpertWeights) -> Unsupported | None:
    """Why the operation cannot compute with these tensors, which are full."""
    for name, weight in zip(weights._fields[:2], weights[:2], strict=True):
        if not (is_plain(weight) or isinstance(weight, QuantizedWeight)):
            return unsupported("tensor_class", name=name, tensor_class=type(weight).__name__)
    problem = unsupported_weights(weights.gate_up_proj, weights.down_proj)
    return unsupported("weights", problem=problem) if problem else None


def other_parameters(module: Any) -> list[str]:
    """The names of an experts module's parameters beside the experts' own weights, such as those of its activation."""
    own = {name for stem in read_spec(module).stems for name in (stem, f"{stem}_bias")}
    return [name for name, _ in module.named_parameters() if name not in own]


def unsupported_training(module: nn.Module, names: list[str]) -> Unsupported | None:
    """Why the operation may not run where any of these parameters, which it does not know, is trained."""
    trained = [name for name in names if module.get_parameter(name).requires_grad]
    return unsupported("trained_parameters", names=", ".join(trained)) if trained else None


def _outside_registry(module: nn.Module) -> Unsupported:
    name = type(module).__name__
    why = _OUTSIDE_REGISTRY.get(name) if type(module).__module__.startswith("transformers.") else None
    lacks = ", ".join(flag for flag in (*FLAGS, "config") if not hasattr(module, flag))
    why = why or f"it has no {lacks}; lightning_moe.register_experts may take its experts"
    return unsupported("outside_registry", class_name=name, why=why)


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
