"""What a patched experts module carries, and how its patch is switched on and off.

Patching gives a module a copy of its config that names our experts function; the model's own config, other models built
from it and the state dict stay untouched. What belongs to a layer's patch is one attribute on its module, which copies
and pickles with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_moe.activation_estimate import ActivationEstimate
from lightning_moe.health import LayerHealth
from lightning_moe.integrations.transformers_dispatch import implementation_of, with_gategrad
from lightning_moe.integrations.transformers_experts import ExpertsSpec
from lightning_moe.integrations.unsupported import Unsupported

DownBias = Literal["exact", "fallback"]

_PATCH = "_gategrad_patch"


@dataclass(frozen=True)
class PatchOptions:
    """The options of `patch_moe`."""

    down_bias: DownBias = "exact"
    output_buffer_mib: float = 512
    recompute_gate_up: bool = False


@dataclass
class LayerPatch:
    """What a patched module carries.

    Attributes:
        config: the module's own config, to be restored; it names the default implementation at every call. None for a
            class registered with `register_experts`, whose default is its own forward.
        options: as given to `patch_moe`.
        reason: why the default implementation runs, or None.
        config_in_place: the copy of `config` that the module has while the patch is on.
        implementation: what `config` named when this was last looked at.
        estimate: what the default implementation and the operation save for backward, with weights of `dtype`.
        dtype: of the weights that the layer computed with last; a strategy may cast them for the call. None before the
            first call where a strategy has sharded them.
        ranks: of the unmerged adapters, by the name of the parameter that they adapt.
        health: the layer's counters.
        merge_reasons: the parameters whose adapters PEFT merges, with the reason, as far as has been reported.
        other_parameters: names of the module's parameters beside the experts' weights, which may be unfrozen at any
            time.
        spec: how the layer stored its weights and what it computed when it was patched.
    """

    config: Any
    options: PatchOptions = PatchOptions()
    reason: Unsupported | None = None
    config_in_place: Any = None
    implementation: str | None = None
    estimate: ActivationEstimate = ActivationEstimate(0, 0)
    dtype: torch.dtype | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    health: LayerHealth = field(default_factory=LayerHealth)
    merge_reasons: set[tuple[str, Unsupported]] = field(default_factory=set)
    other_parameters: list[str] = field(default_factory=list)
    spec: ExpertsSpec | None = None


class PatchedForward:
    """The forward of a patched module of a registered class.

    An object and not a bound function, so that copies and pickles of the model hold one of their own; and not a module,
    which libraries that look through a call's arguments would move.
    """

    dispatches_on = True

    def __init__(self, module: nn.Module, experts_function: Any) -> None:
        self.module, self.experts_function = module, experts_function

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the experts function, or the class's forward where the patch is gone."""
        if patch_of(self.module) is None:  # another library kept hold of this forward
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.experts_function(self.module, *args, **kwargs)


def patch_of(module: nn.Module) -> LayerPatch | None:
    """The patch that a module carries, if any."""
    return vars(module).get(_PATCH)


def patched_modules(model: nn.Module) -> list[nn.Module]:
    """The experts modules of a model that carry a patch, active or not."""
    return [module for module in model.modules() if _PATCH in vars(module)]


def attach(module: nn.Module, patch: LayerPatch, experts_function: Any) -> None:
    """Puts a patch on a module and switches it on."""
    patch.implementation = implementation_of(patch.config)
    setattr(module, _PATCH, patch)
    _switch_on(module, patch, experts_function)


def detach(module: nn.Module) -> None:
    """Takes the patch off a module."""
    _switch_off(module, vars(module).pop(_PATCH))


def is_on(module: Any) -> bool:
    """Whether the module's calls reach our experts function."""
    patch = patch_of(module)
    if patch is None:
        return False
    if patch.config is not None:
        return module.config is patch.config_in_place
    return isinstance(vars(module).get("forward"), PatchedForward)


@contextmanager
def default_implementation(module: Any) -> Iterator[None]:
    """Has one experts module run what it would without its patch, if it carries one, inside the block."""
    patch = patch_of(module)
    if patch is None or not is_on(module):
        yield
        return
    forward = vars(module).get("forward")
    _switch_off(module, patch)
    try:
        yield
    finally:
        _switch_on(module, patch, getattr(forward, "experts_function", None))


def _switch_on(module: Any, patch: LayerPatch, experts_function: Any) -> None:
    if patch.config is None:
        module.forward = PatchedForward(module, experts_function)
    else:
        patch.config_in_place = module.config = with_gategrad(patch.config)


def _switch_off(module: Any, patch: LayerPatch) -> None:
    if patch.config is not None:
        if module.config is patch.config_in_place:  # and not one that the user has put in since
            module.config = patch.config
    elif isinstance(vars(module).get("forward"), PatchedForward):  # and not another library's, put on since
        del module.forward
