"""Unmerged LoRA on experts: PEFT's wrapper hands its factors to the experts function instead of merging them.

The wrapper gets a forward of its own that leaves the weight alone and adds itself to the call's arguments.
"""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_moe.integrations.peft_experts import (
    active_adapters,
    unsupported_adapter,
    unsupported_layout,
    unsupported_unmerged,
)
from lightning_moe.integrations.torch_modules import is_exporting
from lightning_moe.integrations.transformers_dispatch import reaches_class_forward
from lightning_moe.integrations.unsupported import Unsupported, unsupported
from lightning_moe.patch_state import LayerPatch, is_on, patch_of


class UnmergedLoRAForward:
    """The forward of a patched wrapper.

    An object and not a bound function, so that copies and pickles of the model hold one of their own; and not a module,
    which libraries that look through a call's arguments would move.
    """

    def __init__(self, wrapper: ParamWrapper) -> None:
        self.wrapper = wrapper

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the experts with the adapters unmerged, or PEFT's own forward."""
        idles = torch.compiler.is_compiling() and not active_adapters(self.wrapper)
        if idles or is_exporting():  # where PEFT's can be traced
            return ParamWrapper.forward(self.wrapper, x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._dispatch(x, *args, **kwargs)
        return self._run(x, *args, **kwargs)

    @torch.compiler.disable  # one code object for all wrappers: each would be compiled anew, up to a limit
    def _run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._dispatch(x, *args, **kwargs)

    def _dispatch(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        wrapper = self.wrapper
        module: Any = wrapper.get_base_layer()
        if is_parametrized(module) and (reason := unsupported_adapter(wrapper, module)):  # since it was patched
            raise ValueError(str(reason))
        patch = patch_of(module)
        is_active = patch is not None and patch.reason is None and is_on(module)
        if is_active and active_adapters(wrapper) and "adapter_names" not in kwargs:
            assert patch is not None
            merges = why_merged(wrapper, module)
            if merges is None:
                adapted_by = (*kwargs.pop("adapted_by", ()), self)
                return wrapper.base_layer(x, *args, **kwargs, adapted_by=adapted_by)
            warn_once(patch, wrapper.parameter_name, merges)
        return ParamWrapper.forward(wrapper, x, *args, **kwargs)


def is_unmerged(module: nn.Module) -> bool:
    """Whether a module is a wrapper with our forward."""
    return isinstance(vars(module).get("forward"), UnmergedLoRAForward)


def attach_wrapper(wrapper: ParamWrapper, module: nn.Module) -> Unsupported | None:
    """Gives a wrapper our forward; why PEFT merges its adapters all the same, if it does."""
    reason = why_merged(wrapper, module)
    if unsupported_layout() is not None:
        return reason  # nothing that is read out of the wrapper can be relied on
    if "forward" in vars(wrapper):
        return unsupported("lora_forward", name=wrapper.parameter_name)
    wrapper.forward = UnmergedLoRAForward(wrapper)  # type: ignore[method-assign]
    return reason


def why_merged(wrapper: ParamWrapper, module: nn.Module) -> Unsupported | None:
    """Why PEFT has to merge a wrapper's adapters at this call: also if a forward on the way in is another library's."""
    if reason := unsupported_unmerged(wrapper, module):
        return reason
    inner: Any = wrapper.base_layer
    while isinstance(inner, ParamWrapper) and ("forward" not in vars(inner) or is_unmerged(inner)):
        inner = inner.base_layer
    if isinstance(inner, ParamWrapper) or not reaches_class_forward(module):
        return unsupported("lora_inner_forward", name=wrapper.parameter_name)
    return None


def warn_once(patch: LayerPatch, parameter: str, reason: Unsupported) -> None:
    """Warns that PEFT merges the adapters on a parameter of the layer, once for each reason."""
    if (parameter, reason) not in patch.merge_reasons:
        patch.merge_reasons.add((parameter, reason))
        rank_zero_warn(f"PEFT merges adapters into the experts' weights: {reason}", stacklevel=5)
