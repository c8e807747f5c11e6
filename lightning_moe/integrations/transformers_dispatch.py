"""How Transformers dispatches the calls of an experts module, and how a call is led elsewhere and back.

A decorated experts module looks up its forward in a registry under `module.config._experts_implementation`, at every
call. Private names read here, in Transformers 5.17 to 5.24: `_experts_implementation`, its setter's
`_experts_implementation_internal`, `_is_expert_parallel`, and the name `experts_interface` in the decorator's closure;
`make_inputs_require_grads`, `output_capturing_hook`; in accelerate 1.15: `_hf_hook`.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lightning_moe.integrations.transformers_experts import is_registered, undecorated_forward
from lightning_moe.integrations.unsupported import Unsupported, unsupported

IMPLEMENTATION = "gategrad"
# What Transformers' `generate` sets on a GPU while it decodes.
_DECODING = "batched_mm"


def register_implementation(experts_function: Callable[..., Tensor]) -> None:
    """Registers the experts function under the name `gategrad`."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_function)


def implementation_of(config: Any) -> str | None:
    """The experts implementation that a config names; None for a class registered with `register_experts`."""
    return None if config is None else vars(config).get("_experts_implementation_internal")


def with_gategrad(config: Any) -> Any:
    """A copy of a config that names our implementation."""
    named = copy.copy(config)
    named._experts_implementation_internal = IMPLEMENTATION
    return named


def is_capturable_hook(hook: Any) -> bool:
    """Whether a hook of Transformers' leaves nothing behind, but for tensors that the same call returns.

    They are those of `enable_input_require_grads`, which PEFT calls, and of outputs such as the router's logits.
    """
    return getattr(hook, "__name__", None) in ("make_inputs_require_grads", "output_capturing_hook")


def is_decoding(implementation: str | None) -> bool:
    """Whether an implementation is the one that `generate` chooses for as long as it decodes."""
    return implementation == _DECODING and not torch.is_grad_enabled()


def run_default(module: Any, config: Any, *inputs: Tensor) -> Tensor:
    """What the module would run if it had never been patched.

    Args:
        module: the experts module.
        config: its own; None for a registered class.
        inputs: hidden states (T, H), experts (T, K) and routing weights (T, K).
    """
    if config is None:
        return type(module).forward(module, *inputs)
    name = config._experts_implementation
    if name == IMPLEMENTATION:  # asked for by name, without patch_moe: Transformers' own default stands behind it
        name = "grouped_mm"
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, undecorated_forward(module))(module, *inputs)


def is_expert_parallel(module: Any) -> bool:
    """Whether a module holds only some of its layer's experts, so that ids of other ranks' experts reach it."""
    if hasattr(module, "_is_expert_parallel") or is_registered(module):
        return getattr(module, "_is_expert_parallel", False)
    # Transformers 5.17 sets no flag: there the module counts its own experts, the config all of them.
    counts = (getattr(module.config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    num_experts = next((count for count in counts if isinstance(count, int)), None)
    return num_experts is not None and getattr(module, "num_experts", num_experts) != num_experts


def reaches_class_forward(module: nn.Module) -> bool:
    """Whether a call comes to the class's forward or our own, through accelerate's hook if it has put one on."""
    forward = vars(module).get("forward")
    if hasattr(module, "_hf_hook"):
        forward = getattr(forward, "__wrapped__", forward)
    if forward is None or getattr(forward, "dispatches_on", False):
        return True
    return getattr(forward, "__func__", None) is type(module).forward


def unsupported_dispatch(module: Any) -> Unsupported | None:
    """Why a decorated or registered module's calls would not reach the experts function."""
    # Under expert parallelism Transformers' own forward goes on to the class's.
    if not (reaches_class_forward(module) or is_expert_parallel(module)):
        return unsupported("replaced_forward")
    if not hasattr(module, "num_experts"):
        return unsupported("missing_attribute", what="the module has no num_experts")
    if is_registered(module):
        if not getattr(vars(module).get("forward"), "dispatches_on", "forward" not in vars(module)):
            return unsupported("instance_forward")
        return None
    if undecorated_forward(module) is None:
        return unsupported("undecorated_forward")
    registry = inspect.getclosurevars(type(module).forward).nonlocals.get("experts_interface")
    if registry is None:
        return unsupported("undecorated_forward")
    return None if registry is ALL_EXPERTS_FUNCTIONS else unsupported("other_registry")
