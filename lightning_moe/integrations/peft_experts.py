"""PEFT's adapters on experts: the factors out of its wrappers, and why some cannot be had.

PEFT (`target_parameters`) nests a wrapper around the experts module for each adapted parameter, and stores all experts'
factors in two matrices: `lora_A.weight` (r·E, in), expert by expert, and `lora_B.weight` (out, r·E), rank by rank.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import peft
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_moe.ops.low_rank import LowRank, merge


def wrappers_around(model: nn.Module, name: str) -> list[ParamWrapper]:
    """PEFT's wrappers around the module of that name, the innermost first."""
    wrappers = []
    while name.rpartition(".")[2] in ("base_layer", "_orig_mod"):
        name = name.rpartition(".")[0]
        wrapper = model.get_submodule(name)
        if isinstance(wrapper, ParamWrapper):
            wrappers.append(wrapper)
    return wrappers


def active_adapters(wrapper: ParamWrapper) -> list[str]:
    """The adapters that this wrapper applies now: none where they are disabled or merged."""
    if wrapper.disable_adapters or wrapper.merged:
        return []
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def low_rank(wrapper: Any, adapter: str) -> LowRank:
    """An adapter's factors, as views of its parameters."""
    return LowRank(
        a=split_a(wrapper.lora_A[adapter].weight, wrapper.num_experts),
        b=split_b(wrapper.lora_B[adapter].weight, wrapper.num_experts),
        scaling=wrapper.scaling[adapter],
    )


def split_a(weight: Tensor, num_experts: int) -> Tensor:
    """PEFT's `lora_A.weight`, or its gradient, as (E, r, in)."""
    return weight.reshape(num_experts, -1, weight.shape[1])


def split_b(weight: Tensor, num_experts: int) -> Tensor:
    """PEFT's `lora_B.weight`, or its gradient, as (E, out, r)."""
    return weight.reshape(weight.shape[0], -1, num_experts).permute(2, 0, 1)


def foreign_parametrization(module: Any, name: str) -> str | None:
    """The class of a parametrization of a parameter that PEFT did not put there; None where there is none."""
    if not is_parametrized(module, name):
        return None
    classes = (type(parametrization) for parametrization in module.parametrizations[name])
    return next((found.__name__ for found in classes if not found.__module__.startswith("peft.")), None)


def adapter_fault(wrapper: ParamWrapper, module: Any) -> str | None:
    """Why this wrapper's adapters would train wrongly or not at all, whichever implementation runs; None if they train.

    Args:
        wrapper: PEFT's.
        module: the experts module inside.
    """
    if peft_refusal() is not None or not wrapper.lora_A:  # nothing can be read out of it, or nothing is in it
        return None
    name = wrapper.parameter_name
    if parametrization := foreign_parametrization(module, name):
        return (
            f"{name} is parametrized by {parametrization}, and over a parametrized weight LoRA of PEFT "
            f"{peft.__version__} is broken: its second forward in training raises, without gradients each forward adds "
            "the update once more, and merging changes nothing"
        )
    weight = module._parameters.get(name)
    if weight is not None and weight.dtype.itemsize < 2:
        return (
            f"{name} holds quantized values ({weight.dtype}), and PEFT {peft.__version__} adds the update to them "
            "before they are scaled: the adapter would train next to nothing"
        )
    return None


def merge_reason(wrapper: Any, module: Any, weights: Sequence[str]) -> str | None:
    """Why PEFT has to merge this wrapper's adapters into the weight; None if the factors can be kept apart.

    Args:
        wrapper: PEFT's.
        module: the experts module inside.
        weights: the names of the two projections' parameters.
    """
    if refusal := peft_refusal():
        return f"PEFT merges them: {refusal}"
    return _own_merge_reason(wrapper, module, weights)


def _own_merge_reason(wrapper: Any, module: Any, weights: Sequence[str]) -> str | None:
    name = wrapper.parameter_name
    if name not in weights:
        return f"PEFT merges the adapter on {name}: only {' and '.join(weights)} have a low-rank form"
    if type(wrapper).forward is not ParamWrapper.forward:
        return f"PEFT merges the adapter on {name}: {type(wrapper).__name__} has a forward of its own"
    if is_parametrized(module, name):
        return f"PEFT merges the adapter on {name}: the parameter has another parametrization"
    for adapter in active_adapters(wrapper):
        if adapter in wrapper.lora_variant or wrapper.lora_bias.get(adapter):
            return f"PEFT merges the adapter on {name}: {adapter!r} is a variant of LoRA, or has a bias"
        if isinstance(wrapper.scaling[adapter], Tensor):
            return f"PEFT merges the adapter on {name}: the scaling of {adapter!r} is a tensor, which may be trained"
        if not (type(wrapper.lora_A[adapter]) is type(wrapper.lora_B[adapter]) is nn.Linear):
            return f"PEFT merges the adapter on {name}: the factors of {adapter!r} are not plain linear layers"
    return None


class _Weight(nn.Module):
    """Stands for an experts module; its forward says which weight it computes with."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.zeros(2, 3, 5, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


@cache
def peft_refusal() -> str | None:
    """Why the factors cannot be read out of this version of PEFT; None if they can. Tried once, on small wrappers.

    PEFT's wrappers are not its public interface: their names, and how they lay out their factors, have changed before.
    """
    refusal = f"the adapters on experts cannot be read out of PEFT {peft.__version__}: "
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            for is_transposed in (False, True):
                if not _is_read_right(_Weight(is_transposed=is_transposed)):
                    return refusal + "lora_A and lora_B make another update than PEFT's own"
    except Exception as error:  # whatever it is, they cannot be read
        return refusal + str(error)
    return None


def _is_read_right(module: _Weight) -> bool:
    """Whether everything that is read out of PEFT's wrapper around the module gives the weight that PEFT gives it."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"], init_lora_weights=False)
    holder: Any = inject_adapter_in_model(config, nn.ModuleDict({"experts": module}))
    wrapper = holder["experts"]
    updates = [low_rank(wrapper, adapter) for adapter in active_adapters(wrapper)]
    merged = merge(module.weight, updates, is_transposed=module.is_transposed)
    if wrapper.base_layer is not wrapper.get_base_layer() or _own_merge_reason(wrapper, module, ["weight"]):
        return False
    return bool(merged.any()) and torch.allclose(ParamWrapper.forward(wrapper, merged), merged)
