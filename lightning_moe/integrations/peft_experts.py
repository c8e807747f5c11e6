"""PEFT's adapters on experts: the factors out of its wrappers, and why some cannot be had.

PEFT (`target_parameters`) nests a wrapper around the experts module for each adapted parameter, and stores all experts'
factors in two matrices: `lora_A.weight` (r·E, in), expert by expert, and `lora_B.weight` (out, r·E), rank by rank. The
wrapper's names and this layout are not PEFT's public interface and have changed before: read in 0.21.0 to 0.21.2, and
tried once in each process, on small wrappers (`unsupported_layout`).
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import peft
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_moe.integrations.torch_modules import COMPILED
from lightning_moe.integrations.transformers_experts import read_flags, read_spec
from lightning_moe.integrations.unsupported import Unsupported, unsupported
from lightning_moe.ops.low_rank import LowRank, merge


def enclosing_names(name: str) -> Iterator[str]:
    """The names of the wrappers around the module of that name, PEFT's and `torch.compile`'s, the innermost first."""
    while name.rpartition(".")[2] in ("base_layer", COMPILED):
        name = name.rpartition(".")[0]
        yield name


def wrappers_around(model: nn.Module, name: str) -> list[ParamWrapper]:
    """PEFT's wrappers around the module of that name, the innermost first."""
    modules = map(model.get_submodule, enclosing_names(name))
    return [module for module in modules if isinstance(module, ParamWrapper)]


def active_adapters(wrapper: ParamWrapper) -> list[str]:
    """The adapters that this wrapper applies now: none where they are disabled or merged."""
    if wrapper.disable_adapters or wrapper.merged:
        return []
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def adapter_state(module: nn.Module) -> tuple[Any, ...] | None:
    """What of an adapted layer decides how it computes, beside its weights; None for a layer that PEFT did not make."""
    if not isinstance(module, BaseTunerLayer):
        return None
    scalings = tuple(sorted(getattr(module, "scaling", {}).items()))
    return tuple(module.active_adapters), module.disable_adapters, module.merged, scalings


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


def unsupported_adapter(wrapper: ParamWrapper, module: Any) -> Unsupported | None:
    """Why this wrapper's adapters would train wrongly or not at all, whichever implementation runs.

    Args:
        wrapper: PEFT's.
        module: the experts module inside.
    """
    if unsupported_layout() is not None or not wrapper.lora_A:  # nothing can be read out of it, or nothing is in it
        return None
    name = wrapper.parameter_name
    if parametrization := foreign_parametrization(module, name):
        return unsupported(
            "lora_over_parametrization", name=name, parametrization=parametrization, version=peft.__version__
        )
    weight = dict(module.named_parameters(recurse=False)).get(name)
    if weight is not None and weight.dtype.itemsize < 2:
        return unsupported("lora_over_quantized", name=name, dtype=weight.dtype, version=peft.__version__)
    return None


def unsupported_unmerged(wrapper: ParamWrapper, module: Any) -> Unsupported | None:
    """Why PEFT has to merge this wrapper's adapters into the weight; None if their factors can stay unmerged.

    Args:
        wrapper: PEFT's.
        module: the experts module inside.
    """
    if reason := unsupported_layout():
        return reason
    name = wrapper.parameter_name
    if getattr(module, "is_transposed", False) != read_flags(module).is_transposed:
        return unsupported("lora_transposed", name=name)
    stems = read_spec(module).stems
    if name not in stems:
        return unsupported("lora_parameter", name=name, known=" and ".join(stems))
    return _unsupported_factors(wrapper, module)


def _unsupported_factors(wrapper: Any, module: Any) -> Unsupported | None:
    name = wrapper.parameter_name
    if type(wrapper).forward is not ParamWrapper.forward:
        return unsupported("lora_forward", name=name)
    if is_parametrized(module, name):
        return unsupported("lora_parametrized", name=name)
    for adapter in active_adapters(wrapper):
        if adapter in wrapper.lora_variant or wrapper.lora_bias.get(adapter):
            return unsupported("lora_variant", name=name, adapter=adapter)
        if isinstance(wrapper.scaling[adapter], Tensor):
            return unsupported("lora_scaling", name=name, adapter=adapter)
        if not (type(wrapper.lora_A[adapter]) is type(wrapper.lora_B[adapter]) is nn.Linear):
            return unsupported("lora_factors", name=name, adapter=adapter)
    return None


class _Weight(nn.Module):
    """Stands for an experts module; its forward says which weight it computes with."""

    def __init__(self, *, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.zeros(2, 3, 5, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


@torch.compiler.assume_constant_result
def unsupported_layout() -> Unsupported | None:
    """Why the factors cannot be read out of this version of PEFT; None if they can. Tried once, on small wrappers."""
    return _tried_layout()


@cache
def _tried_layout() -> Unsupported | None:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            for is_transposed in (False, True):
                if not _is_read_right(_Weight(is_transposed=is_transposed)):
                    why = "lora_A and lora_B make another update than PEFT's own"
                    return unsupported("peft_layout", version=peft.__version__, why=why)
    except Exception as error:  # whatever it is, they cannot be read
        return unsupported("peft_layout", version=peft.__version__, why=error)
    return None


def _is_read_right(module: _Weight) -> bool:
    """Whether everything that is read out of PEFT's wrapper around the module gives the weight that PEFT gives it."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"], init_lora_weights=False)
    holder: Any = inject_adapter_in_model(config, nn.ModuleDict({"experts": module}))
    wrapper = holder["experts"]
    updates = [low_rank(wrapper, adapter) for adapter in active_adapters(wrapper)]
    merged = merge(module.weight, updates, is_transposed=module.is_transposed)
    if wrapper.base_layer is not wrapper.get_base_layer() or _unsupported_factors(wrapper, module):
        return False
    return bool(merged.any()) and torch.allclose(ParamWrapper.forward(wrapper, merged), merged)
