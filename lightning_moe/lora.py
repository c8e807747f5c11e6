"""Low-rank updates of the experts' weights: what one is, and how PEFT's wrappers hold theirs.

An update is W + scaling · B A per expert. The operation takes its two factors and never forms the product. PEFT
(`target_parameters`) nests a wrapper around the experts module for each adapted parameter, and stores all experts'
factors in two matrices: `lora_A.weight` (r·E, in), expert by expert, and `lora_B.weight` (out, r·E), rank by rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import peft
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized


@dataclass(frozen=True)
class LowRank:
    """A low-rank update of one projection of every expert, to W + scaling · B A.

    Attributes:
        a: A, (E, r, in), any floating dtype and strides.
        b: B, (E, out, r), any floating dtype and strides.
        scaling: of the product; LoRA's alpha / r, say. Times B it must be in the range of the weights' dtype, which for
            float16 ends at 65,504.

    Raises:
        TypeError: if the scaling is a tensor: it would get no gradient.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.scaling, Tensor):
            raise TypeError("LowRank: scaling must be a number; a tensor would get no gradient: multiply it into b")

    @property
    def rank(self) -> int:
        """The factors' inner size, r."""
        return self.a.shape[1]


class Factors(NamedTuple):
    """The updates of one projection, joined along the rank: a (E, R, in) and b (E, out, R), the scalings in b."""

    a: Tensor
    b: Tensor


def join(updates: Sequence[LowRank], dtype: torch.dtype) -> Factors:
    """Joins updates along the rank, in `dtype`, padded with zeros to rows of whole multiples of 16 bytes."""
    step, used = 16 // dtype.itemsize, sum(update.rank for update in updates)
    missing = -used % step
    (experts, _, width_in), width_out = updates[0].a.shape, updates[0].b.shape[1]
    a = [update.a.to(dtype) for update in updates]
    b = [_scaled(update, dtype) for update in updates]
    if missing:
        a.append(a[0].new_zeros(experts, missing, width_in))
        b.append(b[0].new_zeros(experts, width_out, missing))
    return Factors(_joined(a, 1), _joined(b, 2))


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim)


def _scaled(update: LowRank, dtype: torch.dtype) -> Tensor:
    """B times its scaling, multiplied where neither dtype rounds or overflows, and rounded to `dtype` once."""
    return (update.b.to(torch.promote_types(update.b.dtype, dtype)) * update.scaling).to(dtype)


def split_gradients(
    grad_a: Tensor | None, grad_b: Tensor | None, updates: Sequence[LowRank]
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The gradients of each update's factors from those of the joined ones."""
    start = 0
    for update in updates:
        part = slice(start, start + update.rank)
        yield (
            None if grad_a is None else grad_a[:, part].to(update.a.dtype),
            None if grad_b is None else (grad_b[..., part] * update.scaling).to(update.b.dtype),
        )
        start += update.rank


def merge(weight: Tensor, updates: Sequence[LowRank], *, is_transposed: bool) -> Tensor:
    """W + Σ scaling · B A in W's dtype, differentiable: what PEFT's path computes with. (E, out, in), or transposed."""
    with torch.autocast(weight.device.type, enabled=False):
        for update in updates:
            a, b = update.a.to(weight.dtype), update.b.to(weight.dtype)
            left, right = (a.mT, b.mT) if is_transposed else (b, a)
            weight = torch.baddbmm(weight, left, right, alpha=update.scaling)
    return weight


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
