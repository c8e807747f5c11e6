"""Experts specs: how an experts class stores its weights and what it computes between them.

Transformers' decorator leaves this as flags on a module. `register_experts` says the same of a class that is not
decorated. Private names read here, in Transformers 5.17 to 5.24: `_apply_gate` and `_default_apply_gate`.
"""

import functools
import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.integrations import moe as transformers_moe

from lightning_moe.ops.grouped import Activation, gelu_gated, gelu_tanh_gated, silu_gated

# Activations with kernels, where the module gates them as Transformers does by default.
_GATED: dict[type, Activation] = {
    nn.SiLU: silu_gated,
    SiLUActivation: silu_gated,
    GELUActivation: gelu_gated,
    GELUTanh: gelu_tanh_gated,
}

# What configs call the number of experts per token: the second in gemma4 and diffusion_gemma, the third in aria, the
# fourth in kimi_linear, the last in ernie4_5_moe.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "num_experts_per_token", "moe_k")

FLAGS = ("has_gate", "has_bias", "is_transposed")  # of Transformers' decorator


class Flags(NamedTuple):
    """What Transformers' decorator says of a class, see `register_experts`."""

    is_gated: bool = True
    has_bias: bool = False
    is_transposed: bool = False


# The flags, and the forward that is known to compute by them.
_registered: dict[type, tuple[Flags, Any]] = {}
# By name, so that they need not be imported: not decorated in Transformers, and of the same spec.
_KNOWN = {"transformers.models.step3p7.modeling_step3p7.Step3p7Experts": Flags()}


def register_experts(
    experts_class: type[nn.Module], *, is_gated: bool = True, has_bias: bool = False, is_transposed: bool = False
) -> None:
    """Has the callback and `patch_moe` patch instances of a class that Transformers' registry does not dispatch.

    The class keeps its forward, which runs wherever the patch is off. It must compute what `moe_experts` does, and
    nothing besides: `forward(hidden_states, top_k_index, top_k_weights)`, (T, H), (T, K) integer in [0, E) and (T, K),
    to (T, H), the sum over the slots of routing weight times expert. Nothing but a bias may stand between the down
    projection and the routing weight. While the class is patched its forward does not run, nor what else it does, such
    as counting. `MoEGateGradCallback(audit_every_n_steps=...)` checks that the two agree.

    Its instances have `num_experts`, an integer; parameters `gate_up_proj` (E, 2 I, H) and `down_proj` (E, H, I); and
    between the two `_apply_gate(gate_up)`, (R, 2 I) to (R, I), or `act_fn` alone, for `act_fn(gate_proj) * up_proj`
    of the halves: row by row, without trained parameters, randomness or state, since backward calls it again.

    Args:
        experts_class: the class. A subclass that overrides any of its methods has to be registered by itself.
        is_gated: if False, the first projection is `up_proj`, (E, I, H), and `act_fn` stands between the two.
        has_bias: `gate_up_proj_bias` (E, 2 I), or `up_proj_bias`, and `down_proj_bias` (E, H) are added.
        is_transposed: weights are (E, in, out).

    Raises:
        TypeError: if it is not a module's class, or its forward takes other arguments.
        ValueError: if Transformers' registry dispatches it already.
    """
    if not (inspect.isclass(experts_class) and issubclass(experts_class, nn.Module)):
        raise TypeError(f"register_experts takes a class of modules, not {experts_class!r}")
    if undecorated_forward(experts_class) is not None:
        raise ValueError(
            f"{experts_class.__name__}'s forward is decorated: by Transformers' experts registry, and then there is "
            "nothing to register; or by another decorator, which the operation would leave out"
        )
    if experts_class.forward is nn.Module.forward:  # type: ignore[comparison-overlap]
        raise TypeError(f"{experts_class.__name__} has no forward")
    try:
        inspect.signature(experts_class.forward).bind(None, "hidden_states", "top_k_index", "top_k_weights")
    except TypeError as error:
        raise TypeError(
            f"{experts_class.__name__}.forward must take (hidden_states, top_k_index, top_k_weights): {error}"
        ) from None
    _registered[experts_class] = Flags(is_gated, has_bias, is_transposed), experts_class.forward
    _found_ancestor.cache_clear()


def is_decorated(module: nn.Module) -> bool:
    """Whether Transformers' registry can dispatch this module's forward."""
    return all(hasattr(module, flag) for flag in FLAGS) and hasattr(module, "config")


def is_registered(module: nn.Module) -> bool:
    """Whether the module's class was registered, and runs the forward that was."""
    return _registration(module) is not None


def undecorated_forward(module: Any) -> Any:
    """The class's own forward, before Transformers' decorator, or None where there is none."""
    experts_class = module if inspect.isclass(module) else type(module)
    return getattr(experts_class.forward, "__wrapped__", None)  # type: ignore[union-attr]


@dataclass(frozen=True)
class ExpertsSpec:
    """How an experts class stores its weights and what it computes between them.

    Attributes:
        up_name: the name of the first projection's parameter.
        is_transposed: weights are (E, in, out).
        has_bias: `<name>_bias` exists for both projections.
        activation: (R, N) to (R, I).
        act_fn: the module's, that the activation was read from.
    """

    up_name: str
    is_transposed: bool
    has_bias: bool
    activation: Activation
    act_fn: Any = None

    @property
    def stems(self) -> tuple[str, str]:
        """The names of the two projections' weights."""
        return self.up_name, "down_proj"

    def weights(self, module: Any) -> "ExpertWeights":
        """The tensors of one call. Reads each attribute once: a parametrized one is computed at every reading."""
        return ExpertWeights(
            gate_up_proj=getattr(module, self.up_name),
            down_proj=module.down_proj,
            gate_up_proj_bias=getattr(module, f"{self.up_name}_bias") if self.has_bias else None,
            down_proj_bias=module.down_proj_bias if self.has_bias else None,
        )


class ExpertWeights(NamedTuple):
    """An experts module's tensors, named and shaped as `moe_experts` takes them."""

    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_proj_bias: Tensor | None
    down_proj_bias: Tensor | None

    @property
    def are_full(self) -> bool:
        """Whether they are full tensors now. Between calls FSDP1 leaves a flat part of each, and ZeRO-3 nothing."""
        return self.gate_up_proj.dim() > 1 and self.down_proj.dim() > 1


def read_spec(module: Any) -> ExpertsSpec:
    """Reads the spec of a decorated or registered experts module. Raises AttributeError where something is missing."""
    flags = read_flags(module)
    return ExpertsSpec(
        up_name="gate_up_proj" if flags.is_gated else "up_proj",
        is_transposed=flags.is_transposed,
        has_bias=flags.has_bias,
        activation=_activation(module, flags),
        act_fn=getattr(module, "act_fn", None),
    )


def has_activation_of(module: Any, spec: ExpertsSpec) -> bool:
    """Whether a module still has the activation that its spec was read with; for the compiler, which follows this."""
    return getattr(module, "act_fn", None) is spec.act_fn and "_apply_gate" not in vars(module)


def read_flags(module: Any) -> Flags:
    """The flags of a decorated or registered experts module."""
    return _registration(module) or Flags(module.has_gate, module.has_bias, module.is_transposed)


def experts_per_token(config: Any) -> int | None:
    """How many experts each token is routed to, by an experts module's config; None where that does not say."""
    counts = (getattr(config, name, None) for name in _TOP_K)
    return next((count for count in counts if isinstance(count, int)), None)


def _activation(module: Any, flags: Flags) -> Activation:
    """What stands between the projections: one that has kernels where the module computes just that."""
    if not flags.is_gated:
        return module.act_fn
    if is_registered(module) and not hasattr(module, "_apply_gate"):
        return _GATED.get(type(module.act_fn), functools.partial(_gated, module.act_fn))
    if getattr(module._apply_gate, "__func__", None) is transformers_moe._default_apply_gate:
        return _GATED.get(type(module.act_fn), module._apply_gate)
    return module._apply_gate


def _gated(act_fn: Activation, gate_up: Tensor) -> Tensor:
    gate_proj, up_proj = gate_up.chunk(2, dim=-1)
    return act_fn(gate_proj) * up_proj


def _registration(module: Any) -> Flags | None:
    """The flags of the module's class, or of the one that FSDP's or a parametrization's class was made of."""
    own: Any = type(module)
    ancestor = _registered_ancestor(own)
    if ancestor is None:
        return None
    flags, forward = _registered.get(ancestor) or (_KNOWN[_path(ancestor)], ancestor.forward)
    return flags if own.forward is forward and not _overrides(own, ancestor) else None


@torch.compiler.assume_constant_result  # which keeps the compiler from looking into the cache
def _registered_ancestor(own: Any) -> Any:
    """The nearest class that was registered or is known, from the class itself up."""
    return _found_ancestor(own)


@functools.lru_cache(maxsize=256)  # asked several times at every call of a layer
def _found_ancestor(own: Any) -> Any:
    return next((each for each in own.__mro__ if each in _registered or _path(each) in _KNOWN), None)


def _path(known: type) -> str:
    return f"{known.__module__}.{known.__qualname__}"


def _overrides(own: type, registered: type) -> bool:
    """Whether a class between the two has a method in place of one that the registered class has."""
    between = own.__mro__[: own.__mro__.index(registered)]
    return any(
        callable(value) and not name.startswith("__") and hasattr(registered, name)
        for ancestor in between
        for name, value in vars(ancestor).items()
    )
